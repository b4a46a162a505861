"""Trains in a process of its own and says how much memory that took.

    python tests/training_memory.py '{"config": {…}, "recipe": {…}, "swapped": true, "saves": false}'

A line of JSON: "needed" (parts, total, more), "resident" (the most that the process had, VmHWM), "grown" (by how much
that is above what it had before the model was made), and "trained" (the same above what it had after a training of the
smallest size, when PyTorch had loaded what it loads at a first update).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch

from gptkern.models.gpt import GPTConfig
from gptkern.training import free_memory, memory
from gptkern.training.recipe import Recipe

SMALLEST = dict(vocab_size=256, context=32, layers=1, width=32, heads=2)
UPDATES = 2


def train(config: GPTConfig, recipe: Recipe, swapped: bool, saves: bool) -> None:
    """As `gptkern train` does it: updates, a validation, a checkpoint in the background of the last update."""
    from gptkern.swapping import swap
    from gptkern.training.checkpoints import Checkpoints
    from gptkern.training.data.text import Text, text_store
    from gptkern.training.loop import Trainer, new_model

    ids = torch.randint(0, 256, (recipe.batch * (recipe.length + 1) + 1,), dtype=torch.uint8)
    model = new_model(config, recipe.seed)
    if swapped:
        swap(model)
    trainer = Trainer(model, text_store(Text("random", ids, ids)), recipe)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        for _ in range(UPDATES):
            trainer.update()
        trainer.validate(16)
        if saves:
            tensors, about = trainer.state()
            checkpoints.save(trainer.step, tensors, about)
        trainer.update()
        checkpoints.wait()
    trainer.close()


def main(what: dict) -> dict:
    config = GPTConfig(**what["config"])
    recipe = Recipe(**dict(steps=UPDATES + 1, lr=1e-3, length=config.context, threads=1) | what["recipe"])
    how = dict(swapped=what.get("swapped", True), saves=what.get("saves", False))
    if what.get("returned"):
        memory.return_freed(recipe)
    if what.get("warm"):
        train(GPTConfig(**SMALLEST), Recipe(UPDATES + 1, 4, 32, 1e-3, precision=recipe.precision, threads=1), **how)
        free_memory.forget_peak()
    before = free_memory.resident()
    need = memory.needed(config, recipe, **how)
    train(config, recipe, **how)
    return {"needed": need._asdict(), "total": need.total, "before": before, "resident": free_memory.peak()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(json.loads(sys.argv[1]))))
