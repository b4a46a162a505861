"""A run that is killed and goes on until it is done is, bit for bit, the run that nothing ended."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import training_runs
from saved_checkpoints import ends, kill_myself, start
from training_runs import state_of, told

from gptkern.training.checkpoints import Checkpoints

KILLED = -signal.SIGKILL
# What a run does to the disk, as Python's audit events name it; a write and an fsync have none.
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def dying(folder: Path, resume: bool, operation: int | None) -> None:
    """A run whose process is killed before an operation on the disk below its folder, in whatever thread that is."""
    seen, lock = 0, threading.Lock()

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and any(str(folder) in str(argument) for argument in arguments[:2]):
            with lock:
                seen += 1
                if seen == operation:
                    kill_myself()

    sys.addaudithook(watch)
    training_runs.run(folder, resume=resume)


def new_or_resumed(folder: Path) -> bool:
    return (folder / "recipe.toml").exists()


def check_what_is_left(folder: Path, before: int) -> int:
    """After a kill: no damaged checkpoint, none lost, and all of its lines beside it; the newest one's step."""
    newest, damaged = Checkpoints(folder / "checkpoints").newest()
    step = 0 if newest is None else newest.step
    assert damaged == [] and step >= before
    assert told(folder)[:step] == list(range(1, step + 1))
    return step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert training_runs.run(folder).finished
    return state_of(folder)


def the_newest(folder: Path) -> dict[str, Any]:
    """The state; killed behind the last checkpoint a run has one more, which was to be removed."""
    state = state_of(folder)
    return state | {"steps": state["steps"][-2:]}


def finished_after(folder: Path, kill: Callable[[int], int | None]) -> tuple[int, int]:
    """(kills, those that met a save), until the run is done; `kill(attempt)` goes on with it and ends it, or not."""
    saves = step = 0
    for attempt in range(200):
        status = kill(attempt)
        if status == 0:
            return attempt, saves
        assert status == KILLED
        saves += any((folder / "checkpoints").glob(".step-*"))
        step = check_what_is_left(folder, step)
    raise AssertionError("it does not come to its end")


def killed_before(folder: Path, operations: Sequence[int]) -> Callable[[int], int | None]:
    """Each attempt is killed before that of its operations on the disk; when there are no more of them none is."""

    def kill(attempt: int) -> int | None:
        operation = operations[attempt] if attempt < len(operations) else None
        return ends([start(dying, folder, new_or_resumed(folder), operation)])[0]

    return kill


def killed_after(folder: Path, seconds: Iterator[float]) -> Callable[[int], int | None]:
    """Each attempt is killed after a time."""

    def kill(attempt: int) -> int | None:
        child = start(dying, folder, new_or_resumed(folder), None)
        child.join(next(seconds))
        child.kill()
        return ends([child])[0]

    return kill


def test_killed_and_resumed_until_it_is_done(tmp_path, uninterrupted):
    """Before the second checkpoint has its name, while the third is written, and before the fourth has its place."""
    folder = tmp_path / "run"
    kills, saves = finished_after(folder, killed_before(folder, [23, 18, 22]))
    assert kills == 3 and saves == 3
    assert state_of(folder) == uninterrupted


def test_killed_before_it_has_a_checkpoint(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    finished_after(folder, killed_before(folder, [5]))
    assert state_of(folder) == uninterrupted


@pytest.mark.deep
def test_killed_before_each_operation(tmp_path, uninterrupted):
    """Of which the run has some sixty; each in a folder of its own, and then resumed."""
    operation, status, met = 0, KILLED, 0
    while status == KILLED:
        operation += 1
        folder = tmp_path / str(operation)
        status = ends([start(dying, folder, False, operation)])[0]
        if status == KILLED:
            met += any((folder / "checkpoints").glob(".step-*"))
            check_what_is_left(folder, 0)
            assert ends([start(dying, folder, new_or_resumed(folder), None)]) == [0]
        assert the_newest(folder) == uninterrupted, operation
        assert "Finished" in (folder / "report.html").read_text()
    assert status == 0 and operation > 50 and met > 15


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_20_random_moments(tmp_path, uninterrupted, seed):
    """Half of them by a clock, half before an operation that is drawn."""
    numbers = random.Random(seed)
    total = saves = attempt = 0
    while total < 20:
        attempt += 1
        folder = tmp_path / str(attempt)
        if attempt % 2:
            kill = killed_before(folder, [numbers.randint(5, 40) for _ in range(4)])
        else:
            kill = killed_after(folder, (numbers.uniform(0.02, 0.6) if number < 4 else 60.0 for number in count()))
        kills, met = finished_after(folder, kill)
        total, saves = total + kills, saves + met
        assert the_newest(folder) == uninterrupted
    assert saves >= 3
