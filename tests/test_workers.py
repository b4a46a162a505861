"""Processes that may die of what they try: the others go on, and what became of each is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worked_on import work

from gptkern.measuring import workers


def test_workers_outlive_what_ends_one_of_them():
    calls = [
        ("works", 1),
        ("ends",),
        ("raises", "tile"),
        ("is killed", signal.SIGSEGV),
        ("loses the GPU",),
        ("works", 2),
        ("works", 3),
    ]
    with workers.Workers(work, 2, patience=60) as pool:
        found = dict(pool.run(calls))
        again = dict(pool.run([("works", 4)]))
    assert [found[place][1] for place in (0, 5, 6)] == [1, 2, 3] and again[0][1] == 4
    assert again[0][0] in {found[place][0] for place in (0, 5, 6)} and os.getpid() not in found[0], "they are kept"
    assert found[2] == workers.Raised("ValueError: no tile")
    assert found[1] == workers.Died("its process ended with status 7")
    assert found[3] == workers.Died("its process was ended by SIGSEGV")
    assert found[4] == workers.Died("the GPU answers no more: an illegal memory access")


@pytest.mark.skipif(not hasattr(signal, "SIGRTMIN"), reason="this system has no real-time signals")
def test_a_signal_without_a_name():
    with workers.Workers(work, 1, patience=60) as pool:
        # The first two of the real-time signals are the C library's own.
        found = dict(pool.run([("is killed", signal.SIGRTMIN + 1)]))
    assert found[0] == workers.Died(f"its process was ended by signal {signal.SIGRTMIN + 1}")


def test_a_worker_that_ends_between_two_calls_costs_none_of_them():
    with workers.Workers(work, 1, patience=60) as pool:
        ((_, (process, _)),) = pool.run([("works", 1)])
        os.kill(process, signal.SIGKILL)
        while not pool._idle[0].pipe.poll(0.1):
            pass
        ((_, (other, value)),) = pool.run([("works", 2)])
    assert value == 2 and other != process


def test_a_worker_that_does_not_end_is_ended():
    with workers.Workers(work, 2, patience=3) as pool:
        found = dict(pool.run([("hangs",), ("works", 1), ("works", 2)]))
    assert found[0] == workers.Died("it did not end within 3 s") and (found[1][1], found[2][1]) == (1, 2)


def test_a_run_that_is_left_early_leaves_no_process():
    with workers.Workers(work, 2, patience=60) as pool:
        run = pool.run([("works", 1), ("hangs",)])
        next(run)
        (hanging, _), *_ = pool._busy.values()
        run.close()
    assert hanging._process.exitcode is not None or not hanging._process.is_alive()


def test_ctrl_c_is_for_the_process_that_started_them():
    """From before they import anything: to a group goes what a terminal sends."""
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.split()) == (0, ["interrupted", "1"]) and not err


# A call is on its way to a process that is only starting; the answer comes after the interruption.
STARTS = """
import signal

import pytest
from worked_on import work
from gptkern.measuring import workers

signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
with workers.Workers(work, 1, patience=60) as pool:
    worker = workers._Worker(pool._context, work)
    worker.give(("works", 1))
    print("started", flush=True)
    worker.pipe.poll(60)
    print(worker.take()[1], flush=True)
    worker.end(politely=True)
"""
