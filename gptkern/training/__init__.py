"""Training as a library: tokens from texts, the loop, runs that can be killed at any moment, models for others.

The names are imported when they are first used: the command line's errors live here too, and need no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkern.training.adapting import Adaptation
    from gptkern.training.checkpoints import Checkpoints
    from gptkern.training.data.example_rows import load_examples
    from gptkern.training.data.preparing import prepare
    from gptkern.training.data.store import Store
    from gptkern.training.evaluation.evaluating import evaluate
    from gptkern.training.exporting import export
    from gptkern.training.growing import grow
    from gptkern.training.loading import load_model
    from gptkern.training.loop import Trainer
    from gptkern.training.recipe import Recipe
    from gptkern.training.run import Keeping, train

# name -> the module that defines it. The imports above, for Python.
_HOMES = {
    "Adaptation": "adapting",
    "Checkpoints": "checkpoints",
    "Keeping": "run",
    "Recipe": "recipe",
    "Store": "data.store",
    "Trainer": "loop",
    "evaluate": "evaluation.evaluating",
    "export": "exporting",
    "grow": "growing",
    "load_examples": "data.example_rows",
    "load_model": "loading",
    "prepare": "data.preparing",
    "train": "run",
}

__all__ = [
    "Adaptation", "Checkpoints", "Keeping", "Recipe", "Store", "Trainer", "evaluate", "export", "grow",
    "load_examples", "load_model", "prepare", "train",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
