"""One trial: a run in a folder of its own, trained until its rung, from its newest checkpoint where it has one.

What a trial becomes is read off its run's metrics.jsonl, whose lines are the same bit for bit however often it was
killed: so is what a study decides on them.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptkern.models.gpt import GPTConfig
from gptkern.training import memory, metrics, mup, presets
from gptkern.training.data.store import Store
from gptkern.training.errors import UserError
from gptkern.training.loop import Diverged
from gptkern.training.run import Keeping, Progress, train
from gptkern.training.run_folder import RunFolder
from gptkern.training.search.planning import after
from gptkern.training.search.settings import Settings
from gptkern.training.search.study import FAILED, INFEASIBLE, OPEN, PRUNED, Trial

TRIALS = "trials"
KEPT = ("save_every", "keep", "evaluate_every", "evaluate_rows", "spike", "tensorboard")


def folder_of(study: Path, trial: Trial) -> Path:
    return study / TRIALS / f"{trial.number:05}"


def config_of(values: dict[str, Any], vocab_size: int) -> GPTConfig:
    """The sizes of a trial's model. Raises UserError where they do not fit together."""
    sizes = {name: values[name] for name in ("layers", "width", "heads")}
    return presets.configured(values["preset"], values["context"], values["dropout"], vocab_size, **sizes)


def check_sizes(settings: Settings, vocab_size: int) -> None:
    """Raises UserError where a model of the space has sizes that do not fit together."""
    space = settings.space
    widths = space.ends("width", settings.base["width"])
    base = settings.base | {"context": settings.length}
    of_layers, of_heads = (space.ends(key, settings.base[key]) for key in ("layers", "heads"))
    for width, heads in itertools.product(widths, of_heads):
        for layers in of_layers if (width, heads) == (widths[0], of_heads[0]) else of_layers[:1]:
            config = config_of(
                base | {"layers": layers, "width": width, "heads": heads},
                vocab_size,
            )
            if settings.base["mup"] is not None:
                mup.check(config, settings.base["mup"])


def run(
    settings: Settings,
    store: Store,
    study: Path,
    trial: Trial,
    *,
    stop: Callable[[], bool] = lambda: False,
    is_pruned: Callable[[Trial], bool] = lambda trial: False,
) -> Trial:
    """Train until the trial's rung, or until `stop` says so; the trial as it is then.

    Args:
        study: the study's folder. is_pruned: asked at each held-out loss on the way, with the trial as it is there.

    Raises:
        RunError, UserError: something else than the trial failed, as a full disk; it can go on.
    """
    try:
        values, recipe = settings.values(trial), settings.recipe(trial)
    except ValueError as error:
        raise UserError(f"trial {trial.number} of the study is none of its space: {error}") from None
    config = config_of(values, store.tokenizer.vocab_size)
    path, target = folder_of(study, trial), settings.step_of_rung(trial)
    try:
        memory.check(config, recipe, swapped=not values["stock"])
    except UserError as error:
        return trial._replace(state=INFEASIBLE, reason=str(error), owner=None)
    every = values["evaluate_every"]
    began = time.perf_counter()
    ends: list[str] = []  # why it is to end where it is

    def watch(progress: Progress) -> None:
        step = progress.step
        if ends or step == 0 or step % every:
            return
        if step >= target:
            ends.append(after(settings, trial._replace(step=step)))
        elif is_pruned(_read(path, trial, step)):
            ends.append(PRUNED)

    try:
        outcome = train(
            recipe, store, path, config=config, swap=not values["stock"], resume=RunFolder(path).is_run(), keys=values,
            keeping=Keeping(**{name: values[name] for name in KEPT}, report=False), stop=lambda: bool(ends) or stop(),
            watch=watch, say=lambda line: None,
        )  # fmt: skip
    except Diverged as error:
        # Where a checkpoint lies is no part of why, and it goes.
        reason = str(error).partition("; ")[0]
        found = _read(path, trial, error.step)._replace(state=FAILED, reason=reason)
        return found._replace(seconds=trial.seconds + time.perf_counter() - began, owner=None)
    state = after(settings, trial._replace(step=outcome.step)) if outcome.finished else (ends or [OPEN])[0]
    checkpoint = None if outcome.checkpoint is None else str(outcome.checkpoint.relative_to(study))
    seconds = trial.seconds + time.perf_counter() - began
    return _read(path, trial, outcome.step)._replace(state=state, seconds=seconds, checkpoint=checkpoint, owner=None)


def _read(path: Path, trial: Trial, step: int) -> Trial:
    """The trial as the lines of its run say it is at a step."""
    # Of evaluated updates alone; what a killed run wrote beyond its checkpoint was cut off when it went on.
    found = {
        line["step"]: float(line["validation_loss"])
        for line in metrics.lines(path / "metrics.jsonl")
        if line.get("validation_loss") is not None
    }
    return trial._replace(step=step, values=found)


def clean(study: Path, trials: list[Trial], keep: Trial | None) -> None:
    """Remove the checkpoints of trials that have ended, but for one's."""
    for trial in trials:
        if keep is None or trial.number != keep.number:
            shutil.rmtree(folder_of(study, trial) / "checkpoints", ignore_errors=True)
