"""Steps of gptkern.optim.AdamW over parameters that are spread over a process group, with the same gradients.

    python tests/sharded_optimizer.py RANK RANKS FOLDER              # test_optim_shards.py runs it

Rank 0 writes FOLDER/results.pt: {case: {"parameters": whole, after STEPS, "norms": of each step, "state": whole, of one
parameter}}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import gptkern
from gptkern.optim import AdamW

STEPS = 3
# Rows that no number of ranks divides, fewer rows than ranks, wide rows, a vector.
SHAPES = {"weight": (5, 64), "few": (3, 300), "bias": (13,), "wide": (8, 512), "three": (4, 6, 10)}
# PyTorch's own kernel on a CPU rounds the elements that are left over from whole vectors in its own way: of these no
# shard has any.
VECTORS = "weight", "wide"
EXACT = dict(lr=2.0**-9, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
AT_RANDOM = dict(stochastic_rounding=True, seed=3)
# name -> (dtype, options, backend)
CASES = {
    "plain": (torch.float32, {}, "torch"),
    "plain, triton": (torch.float32, {}, "triton"),
    "clipped": (torch.float32, {"max_norm": 0.5}, "torch"),
    "at random": (torch.bfloat16, {**AT_RANDOM, "state_dtype": torch.float32}, "torch"),
    "at random, triton": (torch.bfloat16, {**AT_RANDOM, "state_dtype": torch.float32, **EXACT}, "triton"),
    "8 bits": (torch.float32, {"state_dtype": "int8"}, "torch"),
    "8 bits, at random, triton": (torch.bfloat16, {**AT_RANDOM, "state_dtype": "int8", **EXACT}, "triton"),
    "amsgrad": (torch.float32, {"amsgrad": True}, "torch"),
}


def values(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        for name, value in values(dtype, 0).items():
            self.register_parameter(name, torch.nn.Parameter(value))


def steps(case: str, params: dict[str, torch.Tensor], spread=lambda grad, like: grad) -> dict:
    """Steps of the case over these parameters, whole or spread.

    Args:
        spread: spread(whole gradient, parameter) -> the gradient as it comes.
    """
    dtype, options, backend = CASES[case]
    # Two groups: numbers go on from the first to the second.
    names = [*params]
    optimizer = AdamW(
        [{"params": [params[name] for name in part]} for part in (names[:2], names[2:]) if part],
        **{"lr": 0.01, **options},
    )
    norms = []
    for step in range(STEPS):
        for name, grad in values(dtype, step + 1).items():
            if name in params:
                params[name].grad = spread(grad, params[name])
        with gptkern.backend(backend):
            optimizer.step()
        norms.append(optimizer.grad_norm)
    state = {key: whole(value) for key, value in optimizer.state[params[names[-2]]].items()}
    return {"parameters": {name: whole(param) for name, param in params.items()}, "norms": norms, "state": state}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def alike(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(grad, param.device_mesh, param.placements)


def as_sums(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The gradient as parts whose sum it is, equal ones on a number of ranks that is a power of two."""
    parts = grad / param.device_mesh.size()
    return DTensor.from_local(parts, param.device_mesh, [Partial()] * param.device_mesh.ndim)


def placed(case: str, mesh, placements: dict[str, list]) -> dict[str, torch.Tensor]:
    """Parameters by name, each with its placements; those that have none are plain tensors."""
    found = {}
    for name, value in values(CASES[case][0], 0).items():
        if name in placements:
            value = distribute_tensor(value, mesh, placements[name])
        found[name] = torch.nn.Parameter(value)
    return found


def some_plain(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    return alike(grad, param) if isinstance(param, DTensor) else grad


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    line = init_device_mesh("cpu", (ranks,))
    results = {}
    for case in CASES:
        net = Net(CASES[case][0])
        fully_shard(net, mesh=line)
        results[f"fully_shard, {case}"] = steps(case, dict(net.named_parameters()), alike)
    columns = {"weight": [Shard(1)], "few": [Shard(1)], "wide": [Shard(1)], "bias": [Replicate()], "three": [Shard(2)]}
    for case in ("plain", "clipped", "at random", "at random, triton"):
        results[f"columns, {case}"] = steps(case, placed(case, line, columns), alike)
        results[f"some plain, {case}"] = steps(case, placed(case, line, {"wide": [Shard(0)]}), some_plain)
    replicated = {name: [Replicate()] for name in SHAPES}
    results["replicas, clipped"] = steps("clipped", placed("clipped", line, replicated), alike)
    results["sums, clipped"] = steps("clipped", placed("clipped", line, {n: [Shard(0)] for n in SHAPES}), as_sums)
    results["refused"] = refused(line)
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        for case in CASES:
            net = Net(CASES[case][0])
            fully_shard(net, mesh=square)
            results[f"HSDP, {case}"] = steps(case, dict(net.named_parameters()), alike)
        both = {"weight": [Shard(0), Shard(1)], "wide": [Shard(0), Shard(1)], "three": [Shard(0), Shard(2)]}
        both |= {"few": [Replicate(), Shard(1)], "bias": [Shard(0), Replicate()]}
        for case in ("clipped", "at random", "at random, triton"):
            results[f"rows and columns, {case}"] = steps(case, placed(case, square, both), alike)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def refused(mesh) -> dict[str, str]:
    """What each of these raises."""
    columns = torch.nn.Parameter(distribute_tensor(torch.ones(4, 128), mesh, [Shard(1)]))
    plain = torch.nn.Parameter(torch.ones(3))
    found = {}
    for name, act in {
        "8 bits of columns": lambda: AdamW([columns], state_dtype="int8"),
        "a plain state": lambda: loaded(columns),
    }.items():
        try:
            act()
        except ValueError as error:
            found[name] = str(error)
    assert plain.grad is None
    return found


def loaded(param: torch.Tensor) -> None:
    optimizer = AdamW([param])
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(4, 128), "exp_avg_sq": torch.zeros(4, 128)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
