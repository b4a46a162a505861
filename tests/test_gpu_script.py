"""bench/gpu.py: the list of its steps, and with planted steps what it does when they fail, hang, or are run again."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptkern.commands import PARTIAL
from gptkern.measuring import runner

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.py"
_specification = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(gpu)


def planted(name: str, *programs: str, seconds: float = 100, **options):
    """A step that runs small Python programs."""
    return gpu.Step(name, seconds, [[sys.executable, "-c", program] for program in programs], **options)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script with other steps, as on a machine with a GPU; -> (exit status, what it printed)."""
    monkeypatch.setattr(gpu, "source_digest", lambda: "abc")

    def has_gpu(command, **options):
        return subprocess.CompletedProcess(command, 0)

    def of(*steps):
        monkeypatch.setattr(gpu, "steps", lambda out, source: list(steps))
        with monkeypatch.context() as patched:
            patched.setattr(gpu.subprocess, "run", has_gpu)
            return gpu.main([str(tmp_path)]), capsys.readouterr().out

    return of


# --- The steps --------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_every_step_its_time_and_its_command(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, SCRIPT, out, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0 and not out.exists(), done.stderr
    listed = re.findall(r"^(\w+), (\d+) s: .*$\n((?:    .+\n)+)", done.stdout, re.MULTILINE)
    commands = {name: command for name, _, command in listed}
    assert list(commands) == ["info", "build", "check", "tests", "sanitizer", "quick", "costs", "bench"]
    # As many samples as the quick cells have: these are not measured again.
    assert f"--rounds {runner.ROUNDS['quick']}" in commands["bench"] and "--rounds" not in commands["quick"]
    assert f"--out {out}" in commands["bench"] and "--costs-only" in commands["costs"]
    words = shlex.split(commands["tests"])
    assert "tests/operators" in words and all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def test_the_time_of_steps_that_are_done_goes_to_the_bench(tmp_path):
    def budgets():
        return {step.name: step.seconds for step in gpu.steps(tmp_path, "abc") if not step.missing}

    before = budgets()
    assert sum(before.values()) == gpu.SECONDS <= 540
    (tmp_path / "check.done").write_text("abc")
    (tmp_path / "build.done").write_text("of other sources")
    assert budgets()["bench"] == before["bench"] + before["check"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "sees no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- Running ----------------------------------------------------------------------------------------------------------


def test_a_failure_does_not_stop_what_follows_and_is_the_exit_status(run, tmp_path):
    steps = [planted("first", "raise SystemExit(3)", "print('there')"), planted("second", "print('on')")]
    status, printed = run(*steps, gpu.Step("third", 9, [["/no/such/program"]]), planted("fourth", missing="a tool"))
    assert status == 1 and printed.count("FAILED") == 2
    assert "there\n" in (tmp_path / "first.txt").read_text() and "on\n" in (tmp_path / "second.txt").read_text()
    assert [path.name for path in tmp_path.glob("*.done")] == ["second.done"]


def test_what_passed_is_not_run_again_with_the_same_sources(run, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    count = f"open({str(mark)!r}, 'a').write('x')"
    steps = [planted("first", count), planted("second", count + "; raise SystemExit(1)")]
    assert run(*steps)[0] == 1 and run(*steps)[0] == 1
    assert mark.read_text() == "xxx", "the second failed, and runs again"
    monkeypatch.setattr(gpu, "source_digest", lambda: "other sources")
    run(steps[0])
    assert mark.read_text() == "xxxx"


def test_a_step_sees_this_tree_and_its_variables_and_no_interpreter(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    program = "import os; print([os.environ.get(n) for n in ('TRITON_INTERPRET', 'EXTRA', 'PYTHONPATH')], os.getcwd())"
    run(planted("step", program, environment={"EXTRA": "yes"}))
    assert f"['0', 'yes', '{ROOT}{os.pathsep}/mine'] {ROOT}\n" in (tmp_path / "step.txt").read_text()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A process that nobody has waited for yet is still listed, as a zombie.
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


# Ignores being asked to stop, and has started another process.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print("child", child.pid, flush=True)
time.sleep(5)
"""


def test_a_step_is_killed_at_its_time_with_all_it_started(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    steps = [planted("first", STUBBORN, "print('never')", seconds=1.5), planted("second", "print('on')")]
    status, printed = run(*steps)
    text = (tmp_path / "first.txt").read_text()
    assert status == 1 and "FAILED: its time is over" in printed and "never\n" not in text
    assert gone(int(re.search(r"^child (\d+)$", text, re.MULTILINE)[1]))
    assert (tmp_path / "second.done").exists()


def test_a_step_is_asked_to_stop_first_and_may_keep_what_it_found(run, tmp_path):
    program = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    assert run(planted("step", program, seconds=gpu.GRACE + 1.5, unfinished=True))[0] == 0
    assert (tmp_path / "step.txt").read_text().endswith("so far\n")
    assert not (tmp_path / "step.done").exists(), "it had not come to its end"


# --- What did not come to its end -------------------------------------------------------------------------------------


def test_what_left_something_out_is_partial_and_runs_again(run, tmp_path):
    status = "raise SystemExit(3)"
    for judges, expected in ((True, 3), (False, 0)):
        code, printed = run(planted("step", status, judges=judges, partial=3), planted("other", "print('on')"))
        assert code == expected and "partial" in printed and "FAILED" not in printed
        assert printed.splitlines()[-1].startswith("NOT DONE: step. ") and not (tmp_path / "step.done").exists()
    # pytest's own 3 is an error of its own, and a failure counts for more.
    assert run(planted("step", status, judges=True))[0] == 1
    assert run(planted("step", status, "raise SystemExit(1)", judges=True, partial=3))[0] == 1


def test_the_check_s_and_the_bench_s_partial_is_the_commands_own(tmp_path):
    steps = {step.name: step for step in gpu.steps(tmp_path, "abc")}
    assert {name for name, step in steps.items() if step.partial == PARTIAL} == {"check", "quick", "costs", "bench"}
    assert {name for name, step in steps.items() if step.judges} == {"build", "check", "tests", "sanitizer"}


TESTS = """
import time

def test_right():
    pass

def test_first():
    assert {right}

def test_long():
    time.sleep(60)
"""


@pytest.mark.parametrize("right, status, words", [(True, 3, "time over"), (False, 1, "FAILED: its time is over")])
def test_tests_that_are_cut_off_have_failed_only_where_one_had(run, tmp_path, right, status, words):
    (tmp_path / "test_planted.py").write_text(TESTS.format(right=right))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    step = gpu.Step("tests", gpu.GRACE + 3, [command], unfinished=True, judges=True, wrong=gpu.FAILED_TESTS)
    code, printed = run(step)
    assert code == status and words in printed and not (tmp_path / "tests.done").exists()
    assert "test_long" not in printed, "the time is nobody's failure"


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("FAILED tests/test_a.py::test_b - assert 1", True), ("ERROR tests/test_a.py - ImportError", True),
        ("..s.F [ 12%]", True), ("E", True), ("..sx. [ 12%]", False), ("x", False), ("1 passed in 0.1s", False),
        ("[gw0] FAILED is a word", False), ("SKIPPED [1] tests/test_a.py:3: FAILED", False),
    ],
)  # fmt: skip
def test_what_pytest_prints_of_a_failure(line, wrong):
    assert bool(re.search(gpu.FAILED_TESTS, f"tests\n{line}\n", re.MULTILINE)) is wrong


def test_steps_without_the_cuda_kernels_say_so_and_run_again_with_them(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    count = tmp_path / "count"
    check = planted("check", f"open({str(count)!r}, 'a').write('x')")

    def built_by(program, seconds=100):
        return [
            planted("info", "print('there')"), check._replace(name="info2", missing="nothing"),
            planted(gpu.BUILD, program, seconds=seconds, unfinished=True, judges=True), check,
        ]  # fmt: skip

    for number, (program, seconds, status) in enumerate([(STUBBORN, 1.5, 3), ("raise SystemExit(1)", 100, 1)]):
        code, printed = run(*built_by(program, seconds))
        assert code == status and "what follows runs without the CUDA kernels" in printed
        # Once is enough as long as they are missing.
        assert printed.count("WITHOUT the CUDA kernels") == (number == 0) and count.read_text() == "x"
    code, printed = run(*built_by("print('built')"))
    assert code == 0 and "WITHOUT" not in printed and count.read_text() == "xx"
    assert run(*built_by("raise SystemExit(1)"))[1].count("passed before") == 3, "info, build and check"
