"""bench/gpu.py: the list of its steps, and with planted steps what it does when they fail, hang, or are run again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.py"

sys.path.insert(0, str(SCRIPT.parent))
try:
    import gpu
    import steps as running
finally:
    sys.path.remove(str(SCRIPT.parent))

# For a pytest within a test: it starts faster.
WITHOUT_PLUGINS = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
A_GPU = gpu.Machine(torch="2.13.0", gpu="NVIDIA H200", architecture="90", gibibytes=139, cores=16)
NO_GPU = gpu.Machine(torch="2.13.0", gpu=None, architecture=None, gibibytes=0, cores=2)
NAMES = ["identify", "build", "check", "tests", "sanitizer", "quick", "costs", "bench"]


def planted(name: str, *programs: str, budget: int = 100, **options) -> gpu.Step:
    """A step that runs small Python programs."""
    commands = [[sys.executable, "-c", program] for program in programs]
    return gpu.Step(name, budget, f"the step {name}", lambda context: commands, **options)


def counting(path: Path) -> str:
    """A program that leaves a mark each time it runs."""
    return f"open({str(path)!r}, 'a').write('x'); print('ran')"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(steps, out, *, seconds=60.0, source="abc", machine=A_GPU) -> int:
    return running.run(steps, out, machine, seconds, source, gpu.obstacles())


def statuses(out) -> dict[str, str]:
    return {step["name"]: step["status"] for step in json.loads((out / "steps.json").read_text())["steps"]}


def log(out) -> str:
    return (out / "gpu.log").read_text()


# --- The steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [A_GPU, NO_GPU], ids=["a GPU", "no GPU"])
def test_a_dry_run_lists_every_step_its_time_and_its_command(machine, out, capsys):
    running.dry_run(gpu.STEPS, out, machine, gpu.SECONDS, "abc", [])
    output = capsys.readouterr().out
    listed = re.findall(r"^(\w+), (\d+) s: .*; would (run|be skipped: .+)$\n((?:    .+\n)+)", output, re.MULTILINE)
    assert [name for name, *_ in listed] == NAMES
    assert sum(int(seconds) for _, seconds, *_ in listed) <= 540
    assert sum(step.budget for step in gpu.STEPS) <= gpu.SECONDS <= 540
    commands = {name: command for name, _, _, command in listed}
    assert "gptkern info --json" in commands["identify"]
    # For the GPUs that it finds: no architectures are given.
    assert "GPTKERN_CUDA=1 " in commands["build"] and "-m building" in commands["build"]
    assert f"gptkern check --json {out}/check.json" in commands["check"]
    assert "pytest" in commands["tests"] and "test_compiled_kernels" not in commands["tests"]
    assert "--tool memcheck" in commands["sanitizer"] and "--tool racecheck" in commands["sanitizer"]
    assert "gptkern bench --quick" in commands["quick"] and f"--out {out}" in commands["bench"]
    assert "--costs-only" in commands["costs"]
    assert ("no GPU" in output) == (machine.gpu is None)
    assert not out.exists()


def test_the_script_itself_lists_without_a_gpu(out):
    done = subprocess.run([sys.executable, SCRIPT, "--dry-run", "--out", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^{name}, \d+ s: ", done.stdout, re.MULTILINE) for name in NAMES)
    assert "PyTorch" in done.stdout or "This machine has no GPU" in done.stdout, "the machine was not looked at"


@pytest.mark.parametrize(
    "machine, words",
    [(NO_GPU, "there is no NVIDIA GPU here; --dry-run"), (NO_GPU._replace(torch=None), "PyTorch cannot be imported")],
    ids=["no GPU", "no PyTorch"],
)
def test_without_a_gpu_it_says_so(machine, words, out, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "probe", lambda: machine)
    assert gpu.main(["--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def commands_of(name: str, out: Path, machine=A_GPU) -> list[list[str]]:
    step = next(step for step in gpu.STEPS if step.name == name)
    return step.commands(gpu.Context(out, machine, float(step.budget)))


@pytest.mark.parametrize(
    "module, there, absent",
    [
        ("pytest_timeout", "-o addopts=-ra --strict-markers", True),
        ("xdist", "-n 12 --dist", False),
        ("expecttest", "-k not registered_ops", True),
    ],
)
def test_the_tests_run_without_pytests_plugins(module, there, absent, out, monkeypatch):
    monkeypatch.setattr(gpu, "_found", lambda name: True)
    (everything,) = commands_of("tests", out)
    monkeypatch.setattr(gpu, "_found", lambda name: name != module)
    (without,) = commands_of("tests", out)
    assert (there in " ".join(without)) is absent
    assert (there in " ".join(everything)) is not absent


@pytest.mark.parametrize("accepted", [True, False])
def test_without_pytest_timeout_the_configuration_is_no_error(tmp_path, accepted):
    """`timeout` in pyproject.toml, --strict-config and no plugin that knows it: an error, but for what is added."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "test_one.py").write_text("def test(): pass\n")
    options = ["-p", "no:cacheprovider", *(["-o", "addopts=-ra --strict-markers"] * accepted)]
    command = [sys.executable, "-m", "pytest", "-q", *options, "test_one.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=WITHOUT_PLUGINS)
    assert (done.returncode == 0) is accepted, done.stdout + done.stderr


@pytest.mark.parametrize("workers", [[], ["-p", "xdist.plugin", "-n", "1"]], ids=["one process", "xdist"])
def test_a_failed_test_is_printed_when_it_fails(tmp_path, workers):
    """Not at pytest's end, which a budget may cut off: here the test after it does not end."""
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_two.py").write_text(
        "import time\ndef test_first(): assert 1 + 1 == 3, 'the reason'\ndef test_second(): time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu", "-p", "no:cacheprovider", *workers, "test_two.py"]
    environment = {**WITHOUT_PLUGINS, "PYTHONPATH": str(SCRIPT.parent)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "the reason" in line:
            break
    over = process.poll()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert over is None and "FAILED at call: test_two.py::test_first\n" in seen, "".join(seen)


def test_what_every_kernel_needs_is_said_first(out, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_found", lambda name: name != "triton")
    monkeypatch.setattr(gpu.shutil, "which", lambda name, **options: None)
    monkeypatch.setattr(gpu.sysconfig, "get_path", lambda name: "/no/such/folder")
    monkeypatch.delenv("CC", raising=False)
    running.dry_run(gpu.STEPS, out, A_GPU, gpu.SECONDS, "abc", gpu.obstacles())
    run([planted("step", "")], out)
    for text in (capsys.readouterr().out, log(out)):
        for words in ("triton cannot be imported", "needs a C compiler", "Python.h, which is not in /no/such/folder"):
            assert words in text
    monkeypatch.setenv("CC", "tcc")
    assert not any("C compiler" in obstacle for obstacle in gpu.obstacles())


@pytest.mark.parametrize("module", ["pytest", "hypothesis"])
def test_without_what_every_test_needs_they_are_skipped(module, out, monkeypatch):
    monkeypatch.setattr(gpu, "_found", lambda name: name != module)
    step = next(step for step in gpu.STEPS if step.name == "tests")
    assert module in step.skip(gpu.Context(out, A_GPU, 100.0))


def test_the_tests_of_kernels_come_first_and_all_are_there():
    files = gpu.test_files()
    assert files[: len(gpu.KERNEL_TESTS)] == [f"tests/test_{name}.py" for name in gpu.KERNEL_TESTS]
    assert len(set(files)) == len(files)
    left_out = {path.name for path in (ROOT / "tests").glob("test_*.py")} - {Path(file).name for file in files}
    assert left_out == {f"test_{name}.py" for name in gpu.NOT_FOR_A_GPU}


def test_fewer_workers_where_the_gpu_is_small(out, monkeypatch):
    monkeypatch.setattr(gpu, "_found", lambda name: True)
    for gibibytes, workers in ((139, 12), (24, 6), (3, 1)):
        (command,) = commands_of("tests", out, A_GPU._replace(gibibytes=gibibytes))
        assert command[command.index("-n") + 1] == str(workers)


def test_the_digest_is_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "gptkern" / "ops").mkdir(parents=True)
    source = tmp_path / "gptkern" / "ops" / "softmax.py"
    source.write_text("1")
    first = gpu.source_digest()
    (tmp_path / "gptkern" / "_cuda.so").write_text("what a build leaves behind")
    assert gpu.source_digest() == first
    source.write_text("2")
    assert gpu.source_digest() != first


# --- Running ----------------------------------------------------------------------------------------------------------


def test_steps_run_in_order_and_leave_their_output(out):
    steps = [planted("first", "print('one')", "print('two')", output="first.txt"), planted("second", "print('three')")]
    assert run(steps, out) == 0
    assert statuses(out) == {"first": "passed", "second": "passed"}
    text = log(out)
    assert text.index("\none\n") < text.index("\ntwo\n") < text.index("\nthree\n")
    assert "one\n" in (out / "first.txt").read_text() and "three" not in (out / "first.txt").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["first.txt", "gpu.log", "steps.json"]


def test_a_step_sees_this_tree_and_its_variables_and_no_interpreter(out, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = "import os; print([os.environ.get(n) for n in ('TRITON_INTERPRET', 'EXTRA', 'PYTHONPATH')], os.getcwd())"
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert run([planted("step", program, environment=lambda c: {"EXTRA": "yes", "PYTHONPATH": "/the-steps"})], out) == 0
    assert f"[None, 'yes', '{os.pathsep.join([str(ROOT), '/the-steps', '/mine'])}']" in log(out)
    assert f"] {ROOT}\n" in log(out)


def test_a_failure_does_not_stop_what_follows_and_is_the_exit_status(out):
    steps = [planted("first", "print('here'); raise SystemExit(3)", "print('there')"), planted("second", "print('on')")]
    assert run(steps, out) == 1
    assert statuses(out) == {"first": "failed", "second": "passed"}
    assert json.loads((out / "steps.json").read_text())["steps"][0]["exit"] == [3, 0]
    assert "there\n" in log(out) and "on\n" in log(out)


def test_a_program_that_is_not_there_is_a_failure(out):
    step = gpu.Step("step", 10, "nothing", lambda context: [["/no/such/program"]])
    assert run([step], out) == 1
    assert "No such file" in log(out)


def test_a_step_that_cannot_run_is_skipped_with_the_reason(out):
    assert run([planted("first", "raise SystemExit(1)", skip=lambda context: "no such tool")], out) == 0
    (entry,) = json.loads((out / "steps.json").read_text())["steps"]
    assert (entry["status"], entry["reason"]) == ("skipped", "no such tool")
    assert "skipped, no such tool" in log(out)


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
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""


def test_a_step_is_killed_at_its_budget_with_all_it_started_and_what_it_printed_is_kept(out):
    start = time.monotonic()
    steps = [planted("first", STUBBORN, "print('never')", budget=1), planted("second", "print('on')", budget=2)]
    assert run(steps, out, seconds=3.0) == 1
    assert time.monotonic() - start < 30, "the process was waited for"
    assert statuses(out) == {"first": "killed", "second": "passed"}
    assert "never\n" not in log(out)
    assert gone(int(re.search(r"^child (\d+)$", log(out), re.MULTILINE)[1]))


def test_a_step_is_asked_to_stop_before_it_is_killed(out):
    program = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    assert run([planted("step", program, budget=3)], out, seconds=3.0) == 1
    assert statuses(out) == {"step": "killed"}
    assert "so far\n" in log(out)


def test_a_step_that_keeps_what_it_found_may_be_stopped(out):
    step = planted("step", "import time; print('so far', flush=True); time.sleep(60)", budget=3)._replace(may_stop=True)
    assert run([step], out, seconds=3.0) == 0
    assert statuses(out) == {"step": "stopped"} and "so far\n" in log(out)
    again = planted("step", "print('the rest')")._replace(may_stop=True)
    assert run([again], out) == 0
    assert statuses(out) == {"step": "passed"}, "it had not come to its end"


def test_the_whole_bench_does_not_repeat_the_quick_one():
    from gptkern.measuring import runner

    assert runner.ROUNDS["quick"] == gpu.QUICK_ROUNDS


def test_what_a_step_leaves_over_goes_to_the_next(out):
    seen = []
    steps = [
        gpu.Step(name, budget, name, lambda context: seen.append(context.seconds) or [[sys.executable, "-c", ""]])
        for name, budget in (("first", 100), ("second", 50), ("third", 50))
    ]
    assert run(steps, out, seconds=200.0) == 0
    assert seen == pytest.approx([100, 150, 200], abs=20)
    assert running.shares(steps, 100.0) == [50, 25, 25]


def test_what_is_done_is_not_done_again_with_the_same_sources(out, tmp_path):
    mark = tmp_path / "mark"
    steps = [planted("first", counting(mark)), planted("second", counting(mark) + "; raise SystemExit(1)")]
    assert run(steps, out) == 1
    assert run(steps, out) == 1, "a failure stays one"
    assert mark.read_text() == "xx"
    assert "first: passed before, with the same sources" in log(out)
    assert run(steps, out, source="other") == 1
    assert mark.read_text() == "xxxx"
    assert run(steps, out, source="other", machine=A_GPU._replace(gpu="NVIDIA A100")) == 1
    assert mark.read_text() == "xxxxxx"


def test_what_goes_on_where_it_was_is_run_again(out, tmp_path):
    mark = tmp_path / "mark"
    steps = [planted("step", counting(mark), again=True)]
    run(steps, out)
    run(steps, out)
    assert mark.read_text() == "xx"


def test_what_was_killed_or_skipped_is_run_again(out, tmp_path):
    assert run([planted("step", "import time; time.sleep(60)", budget=1)], out, seconds=1.0) == 1
    assert run([planted("step", "print('now')", skip=lambda context: "no such tool")], out) == 0
    assert run([planted("step", "print('now')")], out) == 0
    assert statuses(out) == {"step": "passed"}


def test_ctrl_c_stops_the_step_and_writes_what_is_known(out, tmp_path):
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import steps
def step(name, program):
    return steps.Step(name, 100, name, lambda context: [[sys.executable, "-c", program]])
planted = [step("first", ""), step("second", "import os, time; print('pid', os.getpid(), flush=True); time.sleep(60)")]
machine = steps.Machine("2.13.0", "NVIDIA H200", "90", 139, 16)
sys.exit(steps.run(planted + [step("third", "")], Path({str(out)!r}), machine, 300.0, "abc", []))
"""
    # Ctrl-C is taken even where these tests run in the background of a script.
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    line = next(line for line in process.stdout if line.startswith("pid "))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert statuses(out) == {"first": "passed", "second": "interrupted"}
    assert gone(int(line.split()[1]))


def test_output_without_end_is_cut_in_the_middle(out, monkeypatch):
    monkeypatch.setattr(running, "KEPT_BYTES", 2000)
    assert run([planted("step", "for i in range(10_000): print('line', i)", output="step.txt")], out) == 0
    text = (out / "step.txt").read_text()
    assert len(text) < 5000
    assert "line 0\n" in text and "line 9999\n" in text and "line 5000\n" not in text
    kept, left_out = (
        re.findall(r"^line \d+\n", text, re.MULTILINE),
        re.search(r"\[(\d+) bytes are left out here\]", text),
    )
    assert sum(map(len, kept)) + int(left_out[1]) == sum(len(f"line {i}\n") for i in range(10_000))


def test_a_large_log_is_begun_anew(out, monkeypatch):
    run([planted("step", "print('before')")], out)
    monkeypatch.setattr(running, "LOG_BYTES", 10)
    run([planted("step", "print('now')")], out, source="other")
    assert "now\n" in log(out) and "before\n" not in log(out)


def test_a_torn_steps_json_is_as_none(out):
    out.mkdir()
    (out / "steps.json").write_text('{"source": "ab')
    assert run([planted("step", "print('on')")], out) == 0
    assert statuses(out) == {"step": "passed"}
