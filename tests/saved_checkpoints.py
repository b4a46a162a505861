"""Small checkpoints of a counter, and processes that save them. Every tensor holds it, so that a mixture shows."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from gptkern.training.checkpoint_reading import Checkpoint
from gptkern.training.checkpoints import Checkpoints

SECONDS = 60  # that a child may take


def counted(counter: int, elements: int = 12) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.full((elements // 3, 3), float(counter)),
        "optimizer.step": torch.tensor(float(counter)),
        "generators.0.cpu": torch.full((16,), counter % 256, dtype=torch.uint8),
        "model.half": torch.full((5,), float(counter), dtype=torch.bfloat16),
    }


def save(checkpoints: Checkpoints, counter: int, step: int | None = None, elements: int = 12, wait: bool = True):
    step = counter if step is None else step
    checkpoints.save(step, counted(counter, elements), {"counter": counter}, wait=wait)


def counter_of(checkpoint: Checkpoint, elements: int = 12) -> int:
    """The counter of a checkpoint of which every part says the same."""
    counter = checkpoint.about["counter"]
    expected = counted(counter, elements)
    into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    checkpoint.read(into)
    for name, tensor in expected.items():
        assert torch.equal(into[name], tensor), name
    return counter


def run(work: Callable[..., object], *arguments: object) -> int:
    """The exit status of a child that does `work`, negative for a signal. It is forked: torch is not imported again."""
    return ends([start(work, *arguments)])[0]


def start(work: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=_child, args=(work, *arguments))
    child.start()
    return child


def ends(children: list[multiprocessing.Process], seconds: float = SECONDS) -> list[int | None]:
    try:
        for child in children:
            child.join(seconds)
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()


def _child(work: Callable[..., object], *arguments: object) -> None:
    # The threads of the parent's OpenMP are not in the child, and it would wait for them.
    torch.set_num_threads(1)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process can grow beyond so many bytes: what writes on gets EFBIG, as from a full disk ENOSPC."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
