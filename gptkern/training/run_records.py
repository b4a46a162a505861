"""What a run is asked for beside its mathematics, and what it says of itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Keeping:
    """What a run keeps of a training, and when it ends one. None of it changes what is learnt.

    Args:
        save_every, evaluate_every: updates; None for a tenth of the steps.
        keep: newest checkpoints that stay. evaluate_rows: rows of the held-out part for an evaluation on the way.
        spike: nats by which a loss may be above the median of the last 100, and an evaluation above the lowest before.
            Above it nothing is saved, by a signal neither; after 10 such updates in a row, or with such a last one, the
            run ends as Diverged; 0 for no limit.
        tensorboard: "on", "off", or "auto": where it is installed. report: write report.html.
        patience: so many evaluations in a row that are no better than the best before them end the run. The checkpoint
            of the best one stays, and is what `load_model` takes of the run; every evaluation then looks at the same
            `evaluate_rows` rows. None for no end before the last step, whose checkpoint is taken.
    """

    save_every: int | None = None
    keep: int = 3
    evaluate_every: int | None = None
    evaluate_rows: int = 64
    spike: float = 3.0
    tensorboard: str = "auto"
    patience: int | None = None
    report: bool = True


class Progress(NamedTuple):
    """Where a run is.

    Args:
        loss: the mean over the last updates. validation: the last held-out loss. saved: the step of the newest
            checkpoint that was begun. share: of the device's peak, None where that is not known.
        seconds_left: None before the first update.
    """

    step: int
    steps: int
    loss: float | None
    grad_norm: float | None
    lr: float | None
    validation: float | None
    tokens_per_second: float
    share: float | None
    seconds_left: float | None
    saved: int | None


class Outcome(NamedTuple):
    """How a run ended that did not fail.

    Args:
        step: updates done. finished: all of them, or as many as `patience` allowed. validation_loss: the last one, or
            with `patience` the best.
        checkpoint: the newest whole one, of this step; of an earlier one where a run was interrupted in a spike, or
            where with `patience` the best one is; None where an interrupted run has none.
    """

    step: int
    finished: bool
    validation_loss: float | None
    checkpoint: Path | None
