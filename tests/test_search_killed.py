"""Studies whose workers are killed, and several workers at once: the same trials, and none of them twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from saved_checkpoints import ends, kill_myself, start
from searches import create, settings, told
from training_runs import a_store

from gptkern.training.search import trials, working
from gptkern.training.search.study import ENDED, FINISHED, RUNNING, Study

KILLED = -signal.SIGKILL
# As Python's audit events name them; SQLite's writes have none.
OPERATIONS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
    "sqlite3.connect",
}
SMALL = dict(ways=("experiment", "learning"), amount=4, rungs=2)


def working_on(folder: Path, operation: int | None = None, begun: Path | None = None) -> None:
    """A worker, whose process is killed before an operation on the disk; `begun` gets a line for each it begins."""
    seen, lock = 0, threading.Lock()

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in OPERATIONS and any(str(folder) in str(argument) for argument in arguments[:2]):
            with lock:
                seen += 1
                if seen == operation:
                    kill_myself()

    if begun is not None:
        run = trials.run

        def noted(of, store, study, trial, **how):
            with open(begun, "a") as file:
                file.write(f"{trial.number} {of.step_of_rung(trial)} {os.getpid()}\n")
            return run(of, store, study, trial, **how)

        trials.run = noted
    if operation is not None:
        sys.addaudithook(watch)
    with Study(folder) as study:
        assert working.work(study, a_store(), say=lambda line: None)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    create(folder, settings(**SMALL)).close()
    working_on(folder)
    with Study(folder) as study:
        return told(study)


@pytest.mark.deep
@pytest.mark.parametrize("seed", range(3))
def test_killed_five_times_it_is_the_study_that_was_not(tmp_path, uninterrupted, seed):
    """Before operations that are drawn: of checkpoints, lines, the best recipe and what is removed; and by a clock."""
    draw, kills = random.Random(seed), 0
    folder, begun = tmp_path / "study", tmp_path / "begun"
    create(folder, settings(**SMALL)).close()
    while kills < 5:
        child = start(working_on, folder, draw.randrange(1, 60), begun)
        if kills % 2:
            child.join(draw.uniform(0.05, 0.6))
            child.kill()
        assert ends([child]) == [KILLED]
        kills += 1
    assert ends([start(working_on, folder, None, begun)]) == [0]
    with Study(folder) as study:
        assert told(study) == uninterrupted
    # Whatever was begun again had been ended in its midst: so often it was killed.
    lines = [line.rsplit(" ", 1)[0] for line in begun.read_text().splitlines()]
    assert len(lines) - len(set(lines)) <= kills
    finished = min((trial for trial in uninterrupted if trial.state == FINISHED), key=lambda trial: trial.loss)
    assert list((folder / "trials").glob("*/checkpoints/*")) == [folder / finished.checkpoint]


@pytest.mark.deep
def test_workers_at_once_train_each_trial_once(tmp_path):
    folder, begun = tmp_path / "study", tmp_path / "begun"
    of = settings(ways=("experiment", "learning"), amount=8, rungs=3)
    create(folder, of).close()
    assert ends([start(working_on, folder, None, begun) for _ in range(3)]) == [0, 0, 0]
    lines = [tuple(map(int, line.split())) for line in begun.read_text().splitlines()]
    pairs = [line[:2] for line in lines]
    assert len(pairs) == len(set(pairs)) and len({line[2] for line in lines}) == 3
    with Study(folder) as study:
        found = study.trials()
    # 8, then 4, then 2 of the experiment, and 8 of the learning.
    assert len(pairs) == 8 + 4 + 2 + 8 and [trial.number for trial in found] == list(range(16))
    assert all(trial.state in ENDED and trial.owner is None for trial in found)


@pytest.mark.deep
def test_what_a_killed_worker_held_another_takes_up(tmp_path):
    folder, begun = tmp_path / "study", tmp_path / "begun"
    create(folder, settings(ways=("learning",), amount=6)).close()
    children = [start(working_on, folder, 40, begun), start(working_on, folder, None, begun)]
    assert ends(children) == [KILLED, 0]
    pairs = [line.rsplit(" ", 1)[0] for line in begun.read_text().splitlines()]
    with Study(folder) as study:
        found = study.trials()
    assert len(found) == 6 and all(trial.state in ENDED for trial in found)
    assert len(pairs) == 7 and len(set(pairs)) == 6


@pytest.mark.deep
def test_ctrl_c_ends_all_workers_of_the_command_and_leaves_all_to_go_on_with(tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "study"
    text.write_text("to be or not to be, that is the question. " * 50)
    sizes = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "8", "--steps", "120", "--batch", "2"]
    options = ["--text", str(text), *sizes, "--way", "experiment", "--trials", "4", "--tensorboard", "off"]
    command = [sys.executable, "-m", "gptkern", "search", "--out", str(out)]
    with subprocess.Popen(
        [*command, *options, "--device", "cpu", "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("trial "):
                break
        os.kill(process.pid, signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors == "" and "gptkern search --resume --out" in printed
    with Study(out) as study:
        assert not any(trial.state == RUNNING for trial in study.trials())
    again = subprocess.run([*command, "--resume", "--workers", "2"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stderr == "" and "best: trial " in again.stdout
    with Study(out) as study:
        assert [trial.number for trial in study.trials()] == [0, 1, 2, 3]
