"""Trains the reference GPT on all ranks of a process group, in each order of wrapping and swapping.

    python tests/distributed_training.py RANK RANKS FOLDER              # test_distributed.py runs it

Rank 0 writes FOLDER/results.pt: {way: {"losses": the ranks' average, "parameters": whole, "calls": of gptkern's
operators in one forward, "classes": of each module, or "error": what it raised}}.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gptkern
from gptkern.backends import dispatch
from gptkern.models import GPT, GPTConfig

ROWS, LENGTH, VOCABULARY, STEPS, LEARNING_RATE = 4, 12, 61, 3, 0.1


def new_model() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(VOCABULARY, context=LENGTH, layers=2, width=32, heads=2))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets (ROWS, LENGTH) of each rank's rows together."""
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def train(model, ids, targets) -> torch.Tensor:
    """The loss of each step, (STEPS,)"""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = model(ids, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def new_trained() -> tuple[GPT, torch.Tensor]:
    """The model and its losses, trained by one process on all rows."""
    model = new_model()
    return model, train(model, *data())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    """The blocks, their attention and one norm by themselves, and the rest."""
    for block in model.blocks:
        fully_shard(block.attention)
        fully_shard(block.perceptron_norm)
        fully_shard(block)
    return fully_shard(model)


def swapped(model):
    gptkern.swap(model)
    return model


def unswapped(model):
    gptkern.unswap(model)
    return model


# How a model is made ready; each function takes the model and returns it.
WAYS = {
    "ddp": (ddp,),
    "swap, ddp": (swapped, ddp),
    "ddp, swap": (ddp, swapped),
    "swap, ddp, unswap": (swapped, ddp, unswapped),
    "fsdp": (fsdp,),
    "swap, fsdp": (swapped, fsdp),
    "fsdp, swap": (fsdp, swapped),
    "swap, fsdp, unswap": (swapped, fsdp, unswapped),
    "fsdp, swap, unswap": (fsdp, swapped, unswapped),
}


def calls_in(action) -> int:
    """How many calls of gptkern's operators `action` makes."""
    count, settled = 0, dispatch.settled

    def counted(tensor):
        nonlocal count
        count += 1
        return settled(tensor)

    dispatch.settled = counted
    try:
        action()
    finally:
        dispatch.settled = settled
    return count


def run(way: str, rank: int, ranks: int) -> dict:
    model = new_model()
    for change in WAYS[way]:
        model = change(model)
    ids, targets = (tensor.chunk(ranks)[rank] for tensor in data())
    losses = train(model, ids, targets)
    dist.all_reduce(losses)
    calls = calls_in(lambda: model(ids, targets))
    named = dict(model.named_parameters())
    # collective: every rank asks for each
    parameters = {name.removeprefix("module."): whole(parameter) for name, parameter in named.items()}
    classes = {name: [c.__name__ for c in type(module).__mro__] for name, module in model.named_modules()}
    return {"losses": losses / ranks, "parameters": parameters, "calls": calls, "classes": classes}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)
    found = {}
    for way in WAYS:
        try:
            found[way] = run(way, rank, ranks)
        except Exception as error:
            found[way] = {"error": f"{type(error).__name__}: {error}"}
        dist.barrier()
    if rank == 0:
        torch.save(found, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
