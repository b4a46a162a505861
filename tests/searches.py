"""Studies whose trials take no time, and what two of them have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_runs import a_store

from gptkern.training import recipe_files
from gptkern.training.search import planning
from gptkern.training.search.settings import Settings
from gptkern.training.search.space import Choices, Range, Space
from gptkern.training.search.study import FINISHED, OPEN, PAUSED, RUNNING, Study, Trial
from gptkern.training.search.working import begin

SPACE = Space({"lr": Range(1e-3, 1e-1, log=True), "batch": Choices((2, 4)), "dropout": Choices((0.0, 0.1))})
GIVEN = {
    "preset": "nano", "layers": 1, "width": 16, "heads": 2, "context": 8, "steps": 8, "batch": 2, "device": "cpu",
    "precision": "fp32", "threads": 1, "tensorboard": "off", "evaluate_rows": 2,
}  # fmt: skip


def settings(given: dict[str, Any] | None = None, **changes: Any) -> Settings:
    base = recipe_files.completed(recipe_files.Given(GIVEN | (given or {}), {}))
    made = Settings(base=base, length=8, **({"space": SPACE, "rungs": 3, "startup": 2} | changes))
    made.check()
    return made


def create(folder: Path, of: Settings) -> Study:
    return begin(folder, of, a_store())


def simulated(of: Settings, loss: Callable[[Trial, int], float], among: int = 1) -> list[Trial]:
    """The trials of a study whose trials are not trained: `loss` says what each part of one ends with.

    Args:
        among: workers, which each hold a trial; the one that was taken first ends first.
    """
    found: dict[int, Trial] = {}
    held: list[int] = []
    while True:
        decision = planning.decided(of, [found[number] for number in sorted(found)], lambda owner: True)
        found |= {trial.number: trial for trial in decision.changed}
        if isinstance(decision.next, Trial):
            assert decision.next.state == OPEN and decision.next.number not in held
            found[decision.next.number] = decision.next._replace(state=RUNNING, owner="here")
            held.append(decision.next.number)
        elif not held:
            assert decision.next == planning.DONE
            return [found[number] for number in sorted(found)]
        if len(held) == among or isinstance(decision.next, str):
            trial = found[held.pop(0)]
            step = of.step_of_rung(trial)
            values = {
                s: loss(trial, s * of.parts // trial.steps)
                for s in range(1, step + 1)
                if s * of.parts % trial.steps == 0
            }
            state = FINISHED if step == trial.steps else PAUSED
            found[trial.number] = trial._replace(state=state, owner=None, step=step, values=values)


def told(study: Study) -> list[Trial]:
    """The trials, but for the time that they took."""
    return [trial._replace(seconds=0.0) for trial in study.trials()]
