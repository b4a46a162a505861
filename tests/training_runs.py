"""Runs of a model that takes no time, and what two of them have in common."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from gptkern.models.gpt import GPTConfig
from gptkern.training import metrics
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.data.store import Store
from gptkern.training.data.text import Text, text_store
from gptkern.training.recipe import Recipe
from gptkern.training.run import Keeping, Outcome, train

# Dropout, so that generators count; two pieces an update.
CONFIG = GPTConfig(vocab_size=256, context=8, layers=1, width=16, heads=2, dropout=0.1)
RECIPE = Recipe(steps=12, batch=4, length=8, lr=1e-2, accumulate=2, threads=1)
KEEPING = Keeping(save_every=3, keep=2, evaluate_every=4, evaluate_rows=2, tensorboard="off")


def a_store(seed: int = 0) -> Store:
    letters = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return text_store(Text("letters", letters[:500], letters[500:]))


def silent(line: str) -> None:
    pass


def run(out: Path, *, recipe: dict[str, Any] | None = None, keeping: dict[str, Any] | None = None, **more) -> Outcome:
    """`train` with small sizes, some of them changed."""
    of = dataclasses.replace(RECIPE, **(recipe or {}))
    kept = dataclasses.replace(KEEPING, **(keeping or {}))
    if "model" not in more:
        more = {"config": CONFIG} | more
    return train(of, more.pop("store", None) or a_store(), out, keeping=kept, **({"say": silent} | more))


def stopping_at(step: int):
    """(stop, watch): a run that is interrupted once so many updates are done."""
    reached = []

    def watch(progress) -> None:
        if progress.step >= step:
            reached.append(progress.step)

    return {"stop": lambda: bool(reached), "watch": watch}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, but the times."""
    return [
        {name: value for name, value in line.items() if name not in metrics.TIMES}
        for line in metrics.lines(folder / "metrics.jsonl")
    ]


def tensors_of(checkpoint: Checkpoint) -> dict[str, str]:
    """A digest of each tensor: model, optimizer and generators."""
    into = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in checkpoint.names().items()}
    checkpoint.read(into)
    digests = {}
    for name, tensor in into.items():
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def state_of(folder: Path) -> dict[str, Any]:
    """All that two runs of a recipe have in common, however often one was ended on the way."""
    checkpoint, damaged = Checkpoints(folder / "checkpoints").newest()
    assert checkpoint is not None and damaged == []
    steps = [each.step for each in Checkpoints(folder / "checkpoints").all()]
    return {"tensors": tensors_of(checkpoint), "about": checkpoint.about, "lines": lines_of(folder), "steps": steps}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(folder: Path) -> list[int]:
    """The steps of the lines of metrics.jsonl, a torn one left out."""
    if not (folder / "metrics.jsonl").exists():
        return []
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line)["step"] for line in lines]
