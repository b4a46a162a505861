"""A study: what a search was begun with, and its trials, in one SQLite file that several programs use at once.

    about     one row: JSON of what the study was begun with
    trials    a row a trial: its parameters, how far it is, who runs it
    losses    held-out losses, a row a trial and step

A change is one transaction that begins with the right to write (BEGIN IMMEDIATE), so that what is decided in it was
decided on what is there: two workers never take the same trial. After a kill SQLite rolls back what was not whole.

Optuna's own storages are not used: none of them gives a trial that was begun to another worker under the same number,
and a sampler's place in its random numbers is in none of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptkern.formatting import shown, size
from gptkern.training import recipe_files
from gptkern.training.errors import RunError, UserError, reason
from gptkern.training.search.space import VARIED

FILE, BEST = "study.sqlite", "best.toml"
WAYS = ("experience", "experiment", "learning")

OPEN = "open"  # to be trained until its next rung, by whoever takes it
RUNNING = "running"
PAUSED = "paused"  # at a rung, until it is known which of the rung's trials go on
FINISHED = "finished"  # all of its steps
STOPPED = "stopped"  # at a rung: others were better
PRUNED = "pruned"  # on the way: Optuna's pruner ended it
FAILED = "failed"  # it diverged; counts as worse than all that did not
INFEASIBLE = "infeasible"  # it needs more memory than there is; counts as failed
STATES = (OPEN, RUNNING, PAUSED, FINISHED, STOPPED, PRUNED, FAILED, INFEASIBLE)
ENDED = (FINISHED, STOPPED, PRUNED, FAILED, INFEASIBLE)
WORST = (FAILED, INFEASIBLE)

APPLICATION, VERSION = 0x67706B73, 1  # "gpks", in the file's header
MOST_BYTES = 1 << 30  # of a study's file
MOST_TEXT = 1 << 20  # bytes of a value in it
MOST_TRIALS = 100_000
_CHECKPOINT = re.compile(r"trials[/\\]\d{5,6}[/\\]checkpoints[/\\]step-\d{8,18}", re.ASCII)  # as trials.run stores it
SECONDS_TO_WAIT = 120.0  # for another worker's transaction, in which a sampler may compute
_SCHEMA = {
    "about": "CREATE TABLE about (one INTEGER PRIMARY KEY CHECK (one = 1), content TEXT NOT NULL)",
    "trials": "CREATE TABLE trials (number INTEGER PRIMARY KEY, way TEXT NOT NULL, params TEXT NOT NULL, "
    "state TEXT NOT NULL, bracket INTEGER NOT NULL, rung INTEGER NOT NULL, step INTEGER NOT NULL, "
    "steps INTEGER NOT NULL, tokens_per_step INTEGER NOT NULL, seconds REAL NOT NULL, reason TEXT, owner TEXT, "
    "checkpoint TEXT)",
    "losses": "CREATE TABLE losses (number INTEGER NOT NULL, step INTEGER NOT NULL, loss REAL NOT NULL, "
    "PRIMARY KEY (number, step)) WITHOUT ROWID",
}


class Trial(NamedTuple):
    """One trial.

    Args:
        number: from 0, in the order in which trials were begun. way: one of WAYS. params: by the recipe's keys.
        values: held-out losses by step, nats a token. state: one of STATES. step: updates done. steps: of all of it.
        tokens_per_step: of an update. seconds: of its training, with all that belongs to it.
        reason: why it failed or could not be run. bracket, rung: of successive halving. owner: who runs it.
        checkpoint: the newest one's folder below the study's, None where it has none; those of ended trials, but for
            the best, are not there any more.
    """

    number: int
    way: str
    params: dict[str, Any]
    values: dict[int, float]
    state: str = OPEN
    step: int = 0
    steps: int = 0
    tokens_per_step: int = 0
    seconds: float = 0.0
    reason: str | None = None
    bracket: int = 0
    rung: int = 0
    owner: str | None = None
    checkpoint: str | None = None

    @property
    def tokens(self) -> int:
        """Trained on until now."""
        return self.tokens_at(self.step)

    def tokens_at(self, step: int) -> int:
        return step * self.tokens_per_step

    @property
    def loss(self) -> float | None:
        """The last held-out loss; None before the first."""
        return self.values[max(self.values)] if self.values else None


def best(trials: Sequence[Trial]) -> Trial | None:
    """The lowest held-out loss of the finished trials; where none is, of those that trained for the largest part."""
    of_use = [trial for trial in trials if trial.values and trial.state not in WORST]
    if not of_use:
        return None
    most = max(max(trial.values) / trial.steps for trial in of_use)
    return min(
        (trial for trial in of_use if max(trial.values) / trial.steps == most),
        key=lambda trial: (trial.loss, trial.number),
    )


class Study:
    """A study's file, open.

    `about` is what it was begun with: JSON that nothing changes.

    Args:
        folder: the study's. option: what an error calls it.

    Raises:
        UserError: there is no study, or it is damaged, or another program's file.
    """

    def __init__(self, folder: str | os.PathLike, option: str = "--out"):
        self.folder, self.option = Path(folder), option
        self.path = self.folder / FILE
        self._name = f"{option} {shown(str(self.folder))}"
        if not self.path.is_file():
            raise UserError(f"{self._name} holds no study that --resume could go on with: it has no {FILE}")
        if self.path.stat().st_size > MOST_BYTES:
            raise UserError(f"{self._name}: {FILE} has more than {size(MOST_BYTES)}; it needs to be a study's")
        self._connection = _connected(self.path)
        try:
            with self._refused():
                self._check()
                self.about = self._about()
        except BaseException:
            self._connection.close()
            raise

    @classmethod
    def create(cls, folder: str | os.PathLike, about: dict[str, Any], option: str = "--out") -> Study:
        """A new one in a folder, which is made. It has its name once it is whole.

        Raises:
            UserError: a study is there. RunError: it cannot be written.
        """
        folder = Path(folder)
        new = folder / f".{FILE}.{os.getpid()}.new"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            connection = _connected(new, "rwc")
            try:
                connection.execute("BEGIN EXCLUSIVE")
                for statement in _SCHEMA.values():
                    connection.execute(statement)
                connection.execute("INSERT INTO about VALUES (1, ?)", (json.dumps(about),))
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("COMMIT")
            finally:
                connection.close()
            # Unlike a rename it fails where another program was faster.
            os.link(new, folder / FILE)
        except FileExistsError:
            raise UserError(taken(folder, option)) from None
        except (OSError, sqlite3.Error) as error:
            raise RunError(f"{shown(str(folder / FILE))} cannot be written: {reason(error)}") from error
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
        return cls(folder, option)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Trials -------------------------------------------------------------------------------------------------------

    def trials(self) -> list[Trial]:
        """All of them, by number.

        Raises:
            UserError: the file is damaged.
        """
        with self._refused():
            if self._connection.in_transaction:
                return self._trials()
            # Trials and losses of one moment.
            self._connection.execute("BEGIN")
            try:
                return self._trials()
            finally:
                self._connection.execute("ROLLBACK")

    best = staticmethod(best)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Inside the block no other program changes the study; what the block did is there as a whole, or not at all.

        Raises:
            RunError: the disk takes no more, or another program holds the file for too long.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise RunError(f"{shown(str(self.path))} cannot be written: {error}") from error

    def store(self, trial: Trial) -> None:
        """Add a trial, or put it in the place of the one with its number; inside of `changing` alone."""
        row = trial._asdict() | {"params": json.dumps(trial.params)}
        del row["values"]
        names = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        self._connection.execute(f"INSERT OR REPLACE INTO trials ({names}) VALUES ({marks})", row)
        self._connection.executemany(
            "INSERT OR REPLACE INTO losses VALUES (?, ?, ?)",
            [(trial.number, step, loss) for step, loss in trial.values.items()],
        )

    # --- What a stranger's file may hold ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (sqlite3.Error, ValueError, TypeError, LookupError, RecursionError, OverflowError) as error:
            raise UserError(
                f"{self._name}: {FILE} is no study of gptkern, or is damaged: {shown(str(error))}"
            ) from None

    def _check(self) -> None:
        found = {
            name: self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("application_id", "user_version")
        }
        if found["application_id"] != APPLICATION:
            raise ValueError("its header is another program's")
        if found["user_version"] != VERSION:
            raise ValueError(f"its version is {found['user_version']}; this gptkern reads {VERSION}")
        # Triggers and views would run; other columns would be other data.
        schema = self._connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchmany(
            len(_SCHEMA) + 1
        )
        if dict(schema) != _SCHEMA:
            raise ValueError("it has other tables")
        if (state := self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(state)
        count = self._connection.execute("SELECT count(*) FROM trials").fetchone()[0]
        if count > MOST_TRIALS:
            raise ValueError(f"it has {count} trials; it needs at most {MOST_TRIALS}")

    def _about(self) -> dict[str, Any]:
        row = self._connection.execute("SELECT content FROM about").fetchone()
        about = None if row is None else json.loads(row[0])
        if not isinstance(about, dict):
            raise ValueError("it does not say what it was begun with")
        return about

    def _trials(self) -> list[Trial]:
        losses: dict[int, dict[int, float]] = {}
        for number, step, loss in self._connection.execute(
            "SELECT number, step, loss FROM losses ORDER BY number, step"
        ):
            _need(isinstance(loss, float) and math.isfinite(loss), number, "loss", loss)
            losses.setdefault(number, {})[step] = loss
        columns = [name for name in Trial._fields if name != "values"]
        rows = self._connection.execute(f"SELECT {', '.join(columns)} FROM trials ORDER BY number")
        return [_trial(dict(zip(columns, row)), losses) for row in rows]


def taken(folder: Path, option: str = "--out") -> str:
    return f"{option} {shown(str(folder))} holds a study: --resume goes on with it, another {option} leaves it"


def _connected(path: Path, mode: str = "rw") -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=SECONDS_TO_WAIT, isolation_level=None
    )
    # What a file says of itself starts no function.
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_TEXT)
    return connection


def _trial(row: dict[str, Any], losses: dict[int, dict[int, float]]) -> Trial:
    number = row["number"]
    for name in ("bracket", "rung", "step", "steps", "tokens_per_step"):
        _need(type(row[name]) is int and 0 <= row[name] < 2**62, number, name, row[name])
    _need(row["step"] <= row["steps"] and row["steps"] > 0, number, "step", row["step"])
    _need(row["way"] in WAYS, number, "way", row["way"])
    _need(row["state"] in STATES, number, "state", row["state"])
    _need(isinstance(row["seconds"], float), number, "seconds", row["seconds"])
    for name in ("reason", "owner", "checkpoint"):
        _need(row[name] is None or isinstance(row[name], str), number, name, row[name])
    # It is said on a terminal.
    _need(
        row["checkpoint"] is None or _CHECKPOINT.fullmatch(row["checkpoint"]), number, "checkpoint", row["checkpoint"]
    )
    params = json.loads(row["params"])
    _need(isinstance(params, dict), number, "params", params)
    for key, value in params.items():
        _need(key in VARIED or key == "mup", number, "params", key)
        params[key] = recipe_files.KEYS[key].kind.checked(value)
    values = losses.get(number, {})
    _need(all(type(step) is int and 0 < step <= row["steps"] for step in values), number, "losses", "a step beyond it")
    return Trial(**row | {"params": params, "values": values})


def _need(holds: bool, number: Any, what: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"trial {number}: {what} is {value!r}")
