"""AdamW over FSDP2's shards and other DTensors: two and four processes of Gloo do what one does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded_optimizer
import torch
import torch.distributed as dist
from sharded_optimizer import CASES, VECTORS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import gptkern
from gptkern.operators.adamw import sharding

# Of a norm: sums in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
SECONDS = 240


def _processes(ranks: int, folder: Path) -> dict:
    """What rank 0 of so many found."""
    path = os.pathsep.join([str(Path(gptkern.__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "ignore", sharded_optimizer.__file__]
    started = [
        subprocess.Popen(
            [*program, str(rank), str(ranks), str(folder)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(errors)[-6000:]
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def one_process():
    return {
        case: sharded_optimizer.steps(case, dict(sharded_optimizer.Net(CASES[case][0]).named_parameters()))
        for case in CASES
    }


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    return request.param, _processes(request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.deep
def test_shards_do_what_one_process_does(processes, one_process):
    """The same bits, of stochastic rounding and 8 bits too; where gradients are clipped, within the norm's rounding."""
    ranks, results = processes
    ways = {"fully_shard", "columns", "some plain", "replicas", "sums"} | (
        {"HSDP", "rows and columns"} if ranks == 4 else set()
    )
    refused = results.pop("refused")
    assert {name.split(", ")[0] for name in results} == ways
    for name, found in results.items():
        case = name.partition(", ")[2]
        expected = one_process[case]
        clipped, runs_on_pytorchs = "max_norm" in CASES[case][1], case in ("plain", "amsgrad")
        for key, value in expected["parameters"].items():
            actual = found["parameters"][key]
            exact = not clipped and (key in VECTORS or not runs_on_pytorchs)
            assert torch.equal(actual, value) if exact else torch.allclose(actual, value, **ROUNDING), (name, key)
        for actual, norm in zip(found["norms"], expected["norms"]):
            assert (actual is None) == (norm is None) != clipped, name
            assert norm is None or torch.allclose(actual, norm, **ROUNDING), (name, actual, norm)
        assert found["state"].keys() == expected["state"].keys()
        for key, value in expected["state"].items():
            assert found["state"][key].shape == value.shape and found["state"][key].dtype == value.dtype, (name, key)
            assert clipped or torch.equal(found["state"][key], value), (name, key)
    assert 'spread over dimension 1; state_dtype "int8" needs whole rows' in refused["8 bits of columns"]
    assert "one of parameter and exp_avg is a DTensor; both need to be" in refused["a plain state"]


def test_the_cases_move_and_clip(one_process):
    """Nothing above would mean anything if they did not."""
    for case, (dtype, options, _) in CASES.items():
        before = sharded_optimizer.values(dtype, 0)
        assert all(not torch.equal(one_process[case]["parameters"][key], value) for key, value in before.items())
        assert "max_norm" not in options or min(one_process[case]["norms"]) > 2 * options["max_norm"]
    to_the_nearest = CASES["at random"][1] | {"stochastic_rounding": False}
    assert to_the_nearest["state_dtype"] == torch.float32


# --- Where a shard lies, of one process that is told it were one of several -------------------------------------------


@contextlib.contextmanager
def rank_of(rank: int, *shape: int):
    """A mesh of which this process is told it were that rank; nobody answers."""
    ranks = torch.Size(shape).numel()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield init_device_mesh("cpu", shape)
    finally:
        dist.destroy_process_group()


def part(whole: torch.Tensor, mesh_shape: tuple, rank: int, placements: list) -> torch.Tensor:
    """What of the whole the rank has: cut along one dimension of the mesh after another, as torch.chunk cuts."""
    coordinate = torch.arange(torch.Size(mesh_shape).numel()).view(mesh_shape).eq(rank).nonzero()[0].tolist()
    order = range(len(placements))
    if isinstance(placements[0], _StridedShard):
        order = reversed(order)
    for dimension in order:
        placement = placements[dimension]
        if not isinstance(placement, Replicate):
            pieces = whole.chunk(mesh_shape[dimension], placement.dim)
            at = coordinate[dimension]
            whole = pieces[at] if at < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


@pytest.mark.parametrize(
    "shape, mesh_shape, placements",
    [
        ((13,), (4,), [Shard(0)]),
        ((2, 5), (4,), [Shard(0)]),
        ((5, 7), (3,), [Shard(1)]),
        ((3, 5, 7), (4,), [Shard(1)]),
        ((3, 5, 7), (2,), [Shard(2)]),
        ((5, 6), (2, 2), [Replicate(), Shard(0)]),
        ((9, 6), (2, 2), [Shard(0), Shard(0)]),
        ((9, 7, 3), (2, 2), [Shard(0), Shard(1)]),
        ((9, 5, 6), (2, 2), [Shard(2), Shard(0)]),
        ((1, 5, 6), (2, 2), [Shard(1), Shard(2)]),
        # FSDP over tensor parallelism.
        ((8, 3), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((16, 3), (4, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ],
    ids=str,
)
def test_the_place_in_the_whole(shape, mesh_shape, placements):
    """Of every rank: where its elements are is what they hold, in a tensor of numbers from 0 on."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for rank in range(torch.Size(mesh_shape).numel()):
        here = part(whole, mesh_shape, rank, placements).contiguous()
        with rank_of(rank, *mesh_shape) as mesh:
            strides = whole.stride()
            param = DTensor.from_local(here.float(), mesh, placements, run_check=False, shape=shape, stride=strides)
            start, run, stride = sharding.place_of(param)
        e = torch.arange(here.numel())
        assert torch.equal(start + e // run * stride + e % run, here.flatten()), rank


@pytest.mark.parametrize(
    "shape, placements",
    [((4, 6, 8), [Shard(1), Shard(2)]), ((8, 4), [_StridedShard(0, split_factor=2), Replicate()])],
    ids=str,
)
def test_a_place_that_is_no_run_of_runs_is_refused(shape, placements):
    size = [4, 3, 4] if len(shape) == 3 else [4, 4]
    with rank_of(1, 2, 2) as mesh:
        stride = torch.empty(shape).stride()
        param = DTensor.from_local(torch.zeros(size), mesh, placements, run_check=False, shape=shape, stride=stride)
        with pytest.raises(NotImplementedError, match="stochastic rounding needs it to be spread over one dimension"):
            sharding.place_of(param)
        partial = DTensor.from_local(torch.zeros(size), mesh, [Partial(), Replicate()], run_check=False)
        with pytest.raises(ValueError, match="each needs to be a shard or a replica"):
            sharding.place_of(partial)
