"""Early stopping: a run ends when its held-out loss has not become lower for some evaluations.

    best      the lowest evaluation so far, whose checkpoint is saved at once and stays
    since     evaluations after it; the run ends once they are as many as its patience

Both are in about.json of every checkpoint, so that a run that goes on waits no longer than one that was not ended, and
whoever reads the run's model takes the best one's.

Source: Goodfellow, Bengio and Courville, "Deep Learning", 2016, algorithm 7.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gptkern.training.checkpoint_reading import Checkpoint
from gptkern.training.errors import UserError


class Best(NamedTuple):
    """The evaluation with the lowest held-out loss."""

    step: int
    loss: float


class Waiting:
    """How long a run has waited for a better evaluation.

    Args:
        patience: evaluations without a better one that end the run; None for no end, and nothing is noted.
    """

    def __init__(self, patience: int | None):
        self.patience = patience
        self.best: Best | None = None
        self.since = 0
        self.evaluated = 0  # the step of the last evaluation

    @property
    def is_over(self) -> bool:
        return self.patience is not None and self.since >= self.patience

    def note(self, step: int, loss: float, can_be_kept: bool = True) -> bool:
        """Count an evaluation; whether it is the best one so far, of which the checkpoint is to be saved."""
        if self.patience is None:
            return False
        self.evaluated = step
        if can_be_kept and (self.best is None or loss < self.best.loss):
            self.best, self.since = Best(step, loss), 0
            return True
        self.since += 1
        return False

    def about(self) -> dict[str, Any]:
        """What about.json says of it."""
        if self.patience is None:
            return {}
        best = {} if self.best is None else {"step": self.best.step, "validation_loss": self.best.loss}
        return {"best": {"evaluated": self.evaluated, "evaluations_since": self.since} | best}

    def take_up(self, start: Checkpoint, lines: Iterable[Mapping[str, Any]]) -> None:
        """Go on from a checkpoint, with the lines of metrics.jsonl up to it: a run may have been ended between an
        update's checkpoint and its evaluation. Raises as `best_of`.
        """
        if self.patience is None:
            return
        self.best, self.since, self.evaluated = _read(start)
        if not start.about.get("best"):
            # It began without a patience: which of its checkpoints are there, nobody promised.
            return
        for line in lines:
            if self.evaluated < line["step"] <= start.step and line.get("validation_loss") is not None:
                self.note(line["step"], line["validation_loss"], line["step"] == start.step)


def best_of(checkpoint: Checkpoint) -> Best | None:
    """The best evaluation until a checkpoint; None where nobody asked for it.

    Raises:
        UserError: about.json says what none can be.
    """
    return _read(checkpoint)[0]


def _read(checkpoint: Checkpoint) -> tuple[Best | None, int, int]:
    said = checkpoint.about.get("best")
    if said is None:
        return None, 0, 0
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OverflowError):
        since, evaluated = said["evaluations_since"], said["evaluated"]
        step, loss = said.get("step"), said.get("validation_loss")
        whole = all(type(number) is int and number >= 0 for number in (since, evaluated))
        if whole and step is None and loss is None:
            return None, since, evaluated
        if whole and type(step) is int and 0 < step <= checkpoint.step and math.isfinite(loss):
            return Best(step, float(loss)), since, evaluated
    raise UserError(f"{checkpoint.folder}: about.json: best is none; it needs a step and its validation_loss")
