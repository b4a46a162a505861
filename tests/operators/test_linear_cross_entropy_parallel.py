"""linear_cross_entropy of a vocabulary that is sharded over a process group (tests/vocabulary_parallel.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import vocabulary_parallel

from gptkern import functional as F

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.deep), pytest.param(4, marks=pytest.mark.deep)])
def test_sharded_as_whole(tmp_path, ranks):
    program = [sys.executable, vocabulary_parallel.__file__]
    processes = [
        subprocess.Popen([*program, str(rank), str(ranks), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    for rank in range(ranks):
        results = torch.load(Path(tmp_path) / f"{rank}.pt")
        unequal = results.pop("unequal")
        assert f"linear_weight has {4 + rank} rows here, and of all processes of the group from 4 to" in unequal
        assert results == dict.fromkeys([*vocabulary_parallel.CASES, "triton"], ""), f"rank {rank}"


class OfOne:
    """A group by its size and its name: what cannot be sharded is refused before anybody is asked."""

    group_name = "one"

    def size(self):
        return 1


@pytest.mark.parametrize("what", ["probabilities", "dimensions"])
def test_what_cannot_be_sharded(what):
    x, w, y = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)
    if what == "dimensions":
        w, y = torch.ones(4, 5, 3), torch.zeros(2, 5).long()
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: group is given and"):
        F.linear_cross_entropy(x, w, y, group=OfOne())
