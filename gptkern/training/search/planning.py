"""What is to be trained next: a decision on the trials that there are, made inside of a transaction.

    experience     one trial, of what the rules say
    experiment     a bracket of grid or random trials, then successive halving; with a budget of minutes, brackets
                   until these are over
    learning       one trial after the other, of what the sampler makes of those before

The ways come in this order, each with the study's budget; a worker that finds all trials of a way in others' hands goes
on to the next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptkern.training.search import halving, sampling
from gptkern.training.search.settings import Settings, derived
from gptkern.training.search.space import Grid
from gptkern.training.search.study import ENDED, FINISHED, OPEN, PAUSED, RUNNING, STOPPED, Trial

WAIT, DONE = "wait", "done"


class Decision(NamedTuple):
    """What to store, and what to do then.

    Args:
        changed: trials that are new, or others than before. next: the trial to train, WAIT while the others' trials
            have to end first, or DONE.
    """

    changed: list[Trial]
    next: Trial | str


def decided(settings: Settings, trials: Sequence[Trial], alive: Callable[[str | None], bool]) -> Decision:
    """What the worker that asks shall do.

    Args:
        trials: all of the study, by number. alive: whether the worker that a trial names is still there.
    """
    found = {trial.number: trial for trial in trials}
    changed: dict[int, Trial] = {}

    def put(trial: Trial) -> None:
        found[trial.number] = changed[trial.number] = trial

    for trial in trials:
        if trial.state == RUNNING and not alive(trial.owner):
            put(trial._replace(state=OPEN, owner=None))
    for way in settings.ways:
        if way == "experiment":
            for trial in _halved(settings, _of(found, way)):
                put(trial)
        if not any(trial.state == OPEN for trial in _of(found, way)):
            for trial in _begun(settings, way, _of(found, way), len(found)):
                put(trial)
        waiting = [trial for trial in _of(found, way) if trial.state == OPEN]
        if waiting:
            return Decision(list(changed.values()), waiting[0])
    is_waiting = any(trial.state not in ENDED for trial in found.values())
    return Decision(list(changed.values()), WAIT if is_waiting else DONE)


def left(settings: Settings, way: str, trials: Sequence[Trial]) -> float:
    """Of the budget of a way: trials that were not begun; tokens that trials neither took nor will until where they are
    to be trained now; minutes, rounded.
    """
    of_way = [trial for trial in trials if trial.way == way]
    if settings.kind == "trials":
        return max(0, settings.amount - len(of_way))
    if settings.kind == "tokens":
        return settings.amount - sum(_tokens(settings, trial) for trial in of_way)
    return max(0.0, round(settings.amount - sum(trial.seconds for trial in of_way) / 60, 2))


def _tokens(settings: Settings, trial: Trial) -> int:
    """Spent, and those that it will have spent where it goes on."""
    return trial.tokens if trial.state in ENDED else trial.tokens_at(max(trial.step, settings.step_of_rung(trial)))


def _of(found: dict[int, Trial], way: str) -> list[Trial]:
    return [trial for _, trial in sorted(found.items()) if trial.way == way]


def _begun(settings: Settings, way: str, trials: list[Trial], first: int) -> list[Trial]:
    """New trials of a way; none where its budget is spent, or others have to end first."""
    if way == "experience":
        return [] if trials else [settings.trial(first, way, settings.advised)]
    if way == "experiment":
        return _bracket(settings, trials, first)
    if settings.kind == "minutes":
        goes_on = left(settings, way, trials) > 0
    else:
        goes_on = left(settings, way, trials) >= (1 if settings.kind == "trials" else settings.tokens)
    if not goes_on:
        return []
    params = sampling.suggested(
        settings.space, settings.sampler, derived(settings.seed, first), settings.startup, trials, settings.parts
    )
    return [settings.trial(first, way, params)]


def _bracket(settings: Settings, trials: list[Trial], first: int) -> list[Trial]:
    """The trials that successive halving begins with."""
    if trials and (settings.kind != "minutes" or any(trial.state not in ENDED for trial in trials)):
        return []
    bracket = 1 + max((trial.bracket for trial in trials), default=-1)
    if settings.kind == "trials":
        count = settings.amount
    elif settings.kind == "tokens":
        count = settings.bought
    else:
        count = settings.parts if left(settings, "experiment", trials) > 0 else 0
    if settings.method == "grid":
        # There is one grid: as much of it as the budget buys, or all of it within the minutes.
        grid = Grid(settings.space, settings.points)
        chosen = [] if trials else grid.chosen(len(grid) if settings.kind == "minutes" else count, settings.seed)
        return [settings.trial(first + place, "experiment", params) for place, params in enumerate(chosen)]
    found = []
    for number in range(first, first + count):
        params = settings.space.sample(random.Random(f"random:{settings.seed}:{number}"))
        found.append(settings.trial(number, "experiment", params, bracket))
    return found


def _halved(settings: Settings, trials: list[Trial]) -> list[Trial]:
    """Those of which it is known now whether they go on."""
    if settings.kind == "minutes" and left(settings, "experiment", trials) <= 0:
        return [
            trial._replace(state=STOPPED, reason="the minutes were over")
            for trial in trials
            if trial.state in (OPEN, PAUSED)
        ]
    bracket = max((trial.bracket for trial in trials), default=0)
    present = [trial for trial in trials if trial.bracket == bracket]
    if not present or any(trial.state in (OPEN, RUNNING) for trial in present):
        return []
    rung = max(trial.rung for trial in present)
    at_rung = [trial for trial in present if trial.rung == rung]
    if not any(trial.state == PAUSED for trial in at_rung):
        return []
    on = halving.promoted(at_rung, settings.eta)
    return [
        trial._replace(state=OPEN, rung=rung + 1) if trial.number in on else trial._replace(state=STOPPED)
        for trial in at_rung
        if trial.state == PAUSED
    ]


def after(settings: Settings, trial: Trial) -> str:
    """The state of a trial that came to the step until which it was to be trained."""
    return FINISHED if trial.step == trial.steps else PAUSED
