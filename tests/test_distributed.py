"""swap and quantize, before and after DistributedDataParallel and fully_shard."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import distributed_training
import pytest
import torch
import torch.distributed as dist
from model_zoo import CASES
from test_models import batch, built, calls_in
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gptkern

gpt = next(case for case in CASES if case.name == "gpt")


RANKS = 2
# Sums of gradients in another order, in float32.
AS_ONE_PROCESS = dict(rtol=1e-5, atol=1e-6)
CALLS = sum(gpt.calls.values())


@pytest.fixture(scope="module")
def one_process():
    model, losses = distributed_training.new_trained()
    return dict(model.named_parameters()), losses


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What rank 0 of two found in each way."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(gptkern.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, distributed_training.__file__]
    ranks = [
        subprocess.Popen(
            [*program, str(rank), str(RANKS), str(folder)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(errors)
    return torch.load(folder / "results.pt")


@pytest.mark.deep
@pytest.mark.parametrize("way", distributed_training.WAYS)
def test_two_processes_train_as_one(way, two_processes, one_process):
    parameters, losses = one_process
    found = two_processes[way]
    assert "error" not in found, found["error"]
    assert losses[-1] < losses[0]
    torch.testing.assert_close(found["losses"], losses, **AS_ONE_PROCESS)
    assert found["parameters"].keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found["parameters"][name], parameter, **AS_ONE_PROCESS)
    swapped = "swap" in way and not way.endswith("unswap")
    assert found["calls"] == (CALLS if swapped else 0)
    if not swapped:
        assert found["classes"] == two_processes["fsdp" if "fsdp" in way else "ddp"]["classes"]


@pytest.mark.deep
def test_one_process_fails_the_comparison_where_a_rank_is_left_out(one_process):
    """The ranks' rows differ enough for the comparison to see whether gradients were averaged."""
    ids, targets = (tensor.chunk(RANKS)[0] for tensor in distributed_training.data())
    losses = distributed_training.train(distributed_training.new_model(), ids, targets)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(losses, one_process[1], **AS_ONE_PROCESS)


# --- fully_shard and DistributedDataParallel change modules, or hold on to them ---------------------------------------


@pytest.fixture
def _alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def attend(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class CallsAHelper(torch.nn.Module):
    """Attention in a function of the model's own package, which the class of a sharded module is not in."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, x):
        return attend(self.mix(x).unsqueeze(1)).squeeze(1).clone()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("build", [CallsAHelper, functools.partial(torch.nn.LayerNorm, 8)], ids=["routed", "twin"])
def test_a_sharded_module_is_swapped_as_its_class_is(build, monkeypatch):
    model, twin = build(), build()
    fully_shard(model)
    sharded = type(model)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    report = gptkern.swap(model)
    gptkern.swap(twin)
    assert [(entry.name, entry.original) for entry in report.replaced] == [("(model)", type(build()).__name__)]
    assert type(model).__mro__ == (type(model), *sharded.__mro__[1:2], *type(twin).__mro__)
    assert calls_in(monkeypatch, lambda: torch.testing.assert_close(model(x), expected)) == 1
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        copy.deepcopy(model)
    swapped = type(model)
    assert gptkern.swap(model).replaced == report.replaced and type(model) is swapped
    gptkern.unswap(model)
    assert type(model) is sharded
    assert calls_in(monkeypatch, lambda: torch.testing.assert_close(model(x), expected)) == 0


@pytest.mark.usefixtures("_alone")
def test_a_swapped_module_that_is_sharded_can_be_swapped_back():
    model, other = CallsAHelper(), CallsAHelper()
    gptkern.swap(model)
    fully_shard(model)
    with pytest.raises(AssertionError, match="deepcopy"):
        copy.deepcopy(model)
    gptkern.unswap(model)
    assert [cls.__name__ for cls in type(model).__mro__[:3]] == ["FSDPCallsAHelper", "FSDPModule", "CallsAHelper"]
    with pytest.raises(AssertionError, match="deepcopy"):
        copy.deepcopy(model)
    fully_shard(other)
    assert type(other).__mro__[1:] == type(model).__mro__[1:]


@pytest.mark.usefixtures("_alone")
def test_quantize_leaves_alone_what_is_wrapped():
    wrapped = DistributedDataParallel(built(gpt))
    report = gptkern.quantize(wrapped)
    assert report.quantized == [] and len(report.skipped) == 9
    assert {s.reason.partition(" ")[0] for s in report.skipped} == {"DistributedDataParallel", "skip"}
    report = gptkern.quantize(fully_shard(built(gpt)))
    assert report.quantized == [] and {s.reason for s in report.skipped} == {
        "its weight is a DTensor", "skip names 'lm_head'"
    }  # fmt: skip
    quantised = built(gpt)
    gptkern.quantize(quantised)
    wrapped = DistributedDataParallel(quantised)
    ids, targets, _ = batch()
    for _ in range(2):
        wrapped(ids, targets)[1].backward()
