"""A worker: takes the next trial, trains it, stores what became of it, until the budget is spent.

A worker holds a lock of the system on a file of its own as long as its process lives. A trial whose worker's lock can
be had was left by one that was killed: it is taken up again, under its number, from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from gptkern.backends.tables import files
from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.data.store import Store
from gptkern.training.errors import UserError, kept
from gptkern.training.memory import parameter_count
from gptkern.training.run import check_rows
from gptkern.training.run_folder import lock
from gptkern.training.search import planning, sampling, trials
from gptkern.training.search.settings import Settings
from gptkern.training.search.study import BEST, ENDED, OPEN, RUNNING, Study, Trial, best
from gptkern.version import __version__

WORKERS = ".workers"
SECONDS_BETWEEN_LOOKS = 0.2  # while others' trials have to end first


def begin(folder: str | os.PathLike, settings: Settings, store: Store) -> Study:
    """A new study in a folder, which is made. Nothing is trained yet.

    Args:
        settings: with a device, a precision and a number of threads that are decided. store: the tokens.

    Raises:
        UserError: a study is there; settings, sizes and tokens do not fit together. RunError: it cannot be written.
    """
    settings.check()
    trials.check_sizes(settings, store.tokenizer.vocab_size)
    check_rows(store, settings.recipe(settings.trial(0, "learning", {})))
    config = trials.config_of(settings.base | {"context": settings.length}, store.tokenizer.vocab_size)
    about = settings.described() | {
        "data": {
            "name": store.name, "fingerprint": store.fingerprint, "train_tokens": len(store.train),
            "validation_tokens": len(store.validation), "unit": "byte" if store.tokenizer.kind == "bytes" else "token",
        },
        "parameters": parameter_count(config),
        "versions": {"gptkern": __version__, "torch": str(torch.__version__)},
    }  # fmt: skip
    return Study.create(folder, about)


def work(
    study: Study,
    store: Store,
    *,
    moved: Mapping[str, str | None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> bool:
    """Train one trial after the other. False where `stop` ended it before the budget was spent.

    Several programs may do so at once, on one machine.

    Args:
        moved: `data` and `text` where the tokens lie now, if that is elsewhere than when the study was begun.
        stop: asked after each update, and between trials. say: lines for people.

    Raises:
        UserError: the data are not the study's, or the study is damaged. RunError: a disk is full, a file damaged; the
            study can go on.
    """
    settings = Settings.of(study.about)
    settings = dataclasses.replace(settings, base=settings.base | dict(moved or {}))
    check_data(study, store)
    with _present(study.folder) as (owner, is_alive):
        while not stop():
            trial = _taken(study, settings, owner, is_alive)
            if trial == planning.DONE:
                return True
            if trial == planning.WAIT:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                continue
            ended = trial._replace(state=OPEN, owner=None)
            try:
                ended = trials.run(
                    settings, store, study.folder, trial, stop=stop,
                    is_pruned=lambda now: _is_pruned(study, settings, now),
                )  # fmt: skip
            finally:
                # Of one that something else ended it is not known how far it came: it is found in its folder.
                with study.changing():
                    study.store(ended)
                _written(study, settings)
            say(_line(settings, ended, study.trials()))
    return False


def check_data(study: Study, store: Store) -> None:
    """Raises UserError where a study was begun with other data."""
    data = study.about.get("data")
    if not isinstance(data, dict) or data.get("fingerprint") != store.fingerprint:
        name = shown(str(data.get("name"))) if isinstance(data, dict) else "others"
        raise UserError(
            f"the data, {store.name}, are not what the study in {shown(str(study.folder))} trains on: {name}"
        )


def _taken(study: Study, settings: Settings, owner: str, is_alive: Callable[[str | None], bool]) -> Trial | str:
    """The trial that is this worker's from now on, or what there is to do instead."""
    with study.changing():
        decision = planning.decided(settings, study.trials(), is_alive)
        for trial in decision.changed:
            study.store(trial)
        if isinstance(decision.next, str):
            return decision.next
        taken = decision.next._replace(state=RUNNING, owner=owner)
        study.store(taken)
        return taken


def _is_pruned(study: Study, settings: Settings, trial: Trial) -> bool:
    if trial.way != "learning":
        return False
    others = [each for each in study.trials() if each.way == trial.way and each.number != trial.number]
    return sampling.is_pruned(settings.space, settings.pruner, settings.startup, trial, others, settings.parts)


def _written(study: Study, settings: Settings) -> None:
    """best.toml of what is known now; the checkpoints that nobody needs any more go."""
    with study.changing():
        # Within the transaction: what was decided later is written later.
        found = study.trials()
        the_best = best(found)
        if the_best is not None:
            path = study.folder / BEST
            heading = (
                f"# Trial {the_best.number} of {study.folder.name}: held-out loss {the_best.loss:.4f} nats a token "
            )
            heading += f"after {max(the_best.values)} of {the_best.steps} updates.\n"
            with kept(path):
                files.replace(path, heading + recipe_files.text(settings.values(the_best)))
    # The best of those that ended: a trial on its way, which may be better, may fail yet.
    ended = [trial for trial in found if trial.state in ENDED]
    trials.clean(study.folder, ended, best(ended))


def _line(settings: Settings, trial: Trial, found: list[Trial]) -> str:
    params = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in trial.params.items()
    )
    loss = "" if trial.loss is None else f", held-out loss {trial.loss:.4f}"
    why = "" if trial.reason is None else f" ({trial.reason.partition(' (')[0]})"
    left = planning.left(settings, trial.way, found)
    # The rules have one trial, whatever the budget.
    kind = "trial" if (left, settings.kind) == (1, "trials") else settings.kind
    rest = "" if trial.way == "experience" else f"; {left:,} {kind} of {trial.way} left"
    return (
        f"trial {trial.number} ({trial.way}): {trial.state} at {trial.step} of {trial.steps} updates{loss}{why}; "
        f"{params}{rest}"
    )


@contextlib.contextmanager
def _present(folder: Path) -> Iterator[tuple[str, Callable[[str | None], bool]]]:
    """(this worker's name, whether the worker of a name is there)"""
    place = folder / WORKERS
    owner = uuid.uuid4().hex
    with kept(place):
        place.mkdir(exist_ok=True)
        handle = os.open(place / owner, os.O_RDWR | os.O_CREAT, 0o666)

    def is_alive(name: str | None) -> bool:
        if name == owner:
            return True
        path = place / (name or "")
        # A name of a stranger's file leads nowhere else.
        if name is None or len(name) != 32 or not name.isalnum() or not path.is_file():
            return False
        other = os.open(path, os.O_RDWR)
        try:
            is_free = lock(other, path)
            if is_free:
                path.unlink(missing_ok=True)
            return not is_free
        finally:
            os.close(other)

    try:
        if not lock(handle, place / owner):
            raise UserError(f"{shown(str(place))}: its file system has no locks; a study needs them")
        yield owner, is_alive
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            (place / owner).unlink()
