"""Several processes train as one does: each its share of every batch, the gradients summed up over all of them.

python tests/test_training_processes.py RANK RANKS FOLDER          # what the test runs, once for each process
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

RANKS, STEPS = 2, 4


def trained(rank: int = 0, world: int = 1):
    from plain_training import CONFIG, SEED, a_store, recipe

    from gptkern.training import loop

    model = loop.new_model(dataclasses.replace(CONFIG, dropout=0.0), SEED)
    trainer = loop.Trainer(model, a_store(), recipe(batch=8, accumulate=2, z_loss=0.01), rank=rank, world=world)
    trainer.run(STEPS)
    return [tuple(record) for record in trainer.records()], dict(model.state_dict())


def main(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    torch.save(trained(rank, world), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.deep
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch was built without gloo")
def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    programs = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(RANKS), str(tmp_path)], env=environment)
        for rank in range(RANKS)
    ]
    assert [program.wait(timeout=240) for program in programs] == [0] * RANKS
    (records, model), (others, other) = (torch.load(Path(tmp_path, f"rank{rank}.pt")) for rank in range(RANKS))
    assert records == others
    assert all(torch.equal(model[name], other[name]) for name in model)
    expected, alone = trained()
    for record, one in zip(records, expected, strict=True):
        assert record[:5] == pytest.approx(one[:5], rel=1e-5)  # step, loss, norm, rate, tokens
    for name, parameter in alone.items():
        # Of gradients near 0 AdamW's first steps keep the sign alone.
        torch.testing.assert_close(model[name], parameter, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
