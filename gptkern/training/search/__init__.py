"""The search for a good recipe: by experience, by experiment, by learning, in a study that can be killed at any moment.

space.py        what is varied: keys of a recipe, and their values
study.py        the study's SQLite file: what was begun, and its trials
halving.py      which trials go on (successive halving), and how many a budget buys
sampling.py     Optuna's samplers and pruners, asked for one trial at a time
planning.py     what is to be trained next
trials.py       one trial, or the part of it until its next rung
working.py      a worker, from trial to trial, until the budget is spent

The names are imported when they are first used: what an option means needs no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptkern.training.search.settings import Settings
    from gptkern.training.search.space import Choices, Range, Space
    from gptkern.training.search.study import Study, Trial, best
    from gptkern.training.search.working import begin, work

# name -> the module that defines it. The imports above, for Python.
_HOMES = {
    "Choices": "space",
    "Range": "space",
    "Settings": "settings",
    "Space": "space",
    "Study": "study",
    "Trial": "study",
    "begin": "working",
    "best": "study",
    "work": "working",
}

__all__ = ["Choices", "Range", "Settings", "Space", "Study", "Trial", "begin", "best", "work"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
