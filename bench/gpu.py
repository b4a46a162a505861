"""Everything that a GPU has to say about this source tree, step by step, in at most nine minutes, without a network.

    python bench/gpu.py [FOLDER] [--dry-run]        (make gpu OUT=FOLDER [DRY=1])

Each step is a process of its own with a time of its own; none stops those that follow. FOLDER (out/gpu) holds what each
printed (<step>.txt), a mark of those that passed (<step>.done), check.json and the bench's results.json. Run again with
the same sources, steps that passed are not run again and the bench goes on where it was. Steps that ran without the
CUDA kernels, because their build had failed or had not come to its end, say so and run again once these are built.

Exit status: 0; 1 where a step failed; 3 where none failed and a build, check or test did not come to its end, so that
there is no verdict yet (what only measures may: it goes on next time); 2 where there is no GPU; 130 after Ctrl-C.
Nothing is installed and no setting of the card is changed: gptkern is taken from the source tree, all else from the
Python that runs this.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Seconds of the whole run; and of a step's time those in which it is asked to stop, as by Ctrl-C, before it is killed:
# pytest and the bench then say how far they came.
SECONDS, GRACE = 540, 10
# The bench and the check start nothing new so long before their time is over.
MARGIN = 25
# The exit status of a command that left out what its `--seconds` did not reach (gptkern.commands.PARTIAL), and of this.
PARTIAL = 3
# What pytest prints of tests that fail, one by one as they end and in its summary: a run that is cut off may have seen
# some already, which its exit status does not tell.
FAILED_TESTS = r"^(FAILED|ERROR) |^[.sxX]*[FE][.sxXFE]*( +\[ *\d+%\])?$"
# The same of compute-sanitizer.
FOUND_ERRORS = r"^=+ +(ERROR SUMMARY: [1-9]|Invalid|Error|Program hit|Race reported)"
NO_SANITIZER = "compute-sanitizer, on the PATH or in CUDA_HOME"
# The step that compiles the CUDA kernels, and those that come before it or do not run them.
BUILD, BEFORE_THE_BUILD = "build", ("info", "build")
OVER = "time over"
# What a GPU changes nothing about: compiling ahead of time, packaging, what runs on the CPU alone.
NOT_FOR_A_GPU = {"build", "compiled_kernels", "bounds", "package", "gpu_script", "demo", "gpt"}


class Step(NamedTuple):
    name: str
    seconds: float
    commands: list[list[str]]
    environment: dict[str, str] | None = None
    missing: str = ""  # what it would need and is not here
    unfinished: bool = False  # keeps what it has found when its time is over: that is no failure, nor its end
    judges: bool = False  # until it comes to its end there is no verdict of the whole
    partial: int | None = None  # the exit status by which its commands say that they left something out
    wrong: str | None = None  # a pattern of what its output holds where something was wrong before its time was over


def steps(out: Path, source: str) -> list[Step]:
    gptkern = [sys.executable, "-m", "gptkern"]

    def bench(seconds: float, *options: str) -> list[list[str]]:
        return [[*gptkern, "bench", *options, "--out", str(out), "--seconds", f"{seconds - MARGIN:g}"]]

    smi = [["nvidia-smi"]] if shutil.which("nvidia-smi") else []
    found = [
        Step("info", 25, [[*gptkern, "info", "--json"], *smi]),
        # What was compiled until its time is over is not compiled again.
        Step(BUILD, 45, [[sys.executable, "-m", "building"]], {"GPTKERN_CUDA": "1"}, unfinished=True, judges=True),
        Step(
            "check", 50, [[*gptkern, "check", "--json", f"{out}/check.json", "--seconds", f"{50 - MARGIN}"]],
            judges=True, partial=PARTIAL,
        ),
        Step(
            "tests", 145, [tests()], missing="" if has("pytest") and has("hypothesis") else "pytest and hypothesis",
            unfinished=True, judges=True, wrong=FAILED_TESTS,
        ),
        # Every tensor is an allocation of its own: PyTorch's allocator would put another one where a kernel goes wrong.
        Step(
            "sanitizer", 75, sanitized(), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "" if sanitizer() else NO_SANITIZER,
            unfinished=True, judges=True, wrong=FOUND_ERRORS,
        ),
        Step("quick", 90, bench(90, "--quick", "--no-costs"), unfinished=True, partial=PARTIAL),
        Step("costs", 40, bench(40, "--quick", "--costs-only"), unfinished=True, partial=PARTIAL),
    ]  # fmt: skip
    # The time that is left. As many samples as the quick ones have: these would be measured again with more.
    left = SECONDS - sum(step.seconds for step in found if not (step.missing or done(step, out, source)))
    everything = bench(left, "--no-costs", "--rounds", "20")
    return [*found, Step("bench", left, everything, unfinished=True, partial=PARTIAL)]


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def tests() -> list[str]:
    """The kernels' first, in case that the time does not suffice for all."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    # Without pytest-timeout its `timeout` in pyproject.toml is unknown, which --strict-config takes for an error.
    command += [] if has("pytest_timeout") else ["-o", "addopts=-ra --strict-markers"]
    # Each worker holds a CUDA context and its tensors.
    command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "load"] if has("xdist") else []
    # torch.library.opcheck imports expecttest.
    command += [] if has("expecttest") else ["-k", "not registered_ops"]
    others = sorted(path for path in (ROOT / "tests").glob("test_*.py") if path.stem[5:] not in NOT_FOR_A_GPU)
    return [*command, "tests/operators", *(f"tests/{path.name}" for path in others)]


def sanitizer() -> str | None:
    """Where compute-sanitizer is: on the PATH, or in a CUDA toolkit."""
    toolkits = (f"{os.environ.get('CUDA_HOME') or '/usr/local/cuda'}/bin", "/usr/local/cuda/bin")
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *toolkits]))


def sanitized() -> list[list[str]]:
    """The first run is without: the kernels are compiled in it, which the sanitizer would only slow down."""
    calls = [sys.executable, str(Path(__file__).resolve()), "--calls"]
    options = ["--target-processes", "all", "--error-exitcode", "1", "--print-limit", "20"]
    tool = sanitizer() or "compute-sanitizer"
    return [calls, *([tool, "--tool", name, *options, *calls] for name in ("memcheck", "racecheck"))]


def small_calls() -> None:
    """One small forward and backward of each operator, on every backend with kernels."""
    import gptkern
    from gptkern.measuring import costs, machine, runner

    for cell in runner.cells(machine.kind(), "smoke", [name for name in runner.OPERATORS if name != "model"]):
        for backend in ("cuda", "triton"):
            try:
                with gptkern.backend(backend):
                    output = costs.calls(cell)[0]()
                if output.requires_grad:
                    output.sum().backward()
                print(f"{cell.key}, {backend}: ran", flush=True)
            except gptkern.BackendError as error:
                print(f"{cell.key}, {backend}: not covered, {error}", flush=True)


def source_digest() -> str:
    """Of everything that the steps run."""
    digest = hashlib.sha256()
    for folder in ("gptkern", "csrc", "building", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".cu", ".cuh", ".h", ".cpp") and "results" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# --- Running ----------------------------------------------------------------------------------------------------------


def mark(step: Step, source: str, built: bool) -> str:
    """What stands in the mark of a step that has passed: of what it has seen."""
    return source if built or step.name in BEFORE_THE_BUILD else f"{source} without the CUDA kernels"


def done(step: Step, out: Path, source: str, built: bool = True) -> bool:
    """built: whether the CUDA kernels are there; a step that passed without them has not passed with them."""
    path = out / f"{step.name}.done"
    return path.exists() and path.read_text() == mark(step, source, built)


def run(step: Step, out: Path, source: str, built: bool = True) -> str:
    """Runs a step's commands one after the other, whatever becomes of the first; -> what became of them."""
    end, exits = time.monotonic() + step.seconds, []
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Kernels are to be compiled here, whatever the shell was used for before. What is buffered dies with a process.
    environment = {**os.environ, **(step.environment or {}), "PYTHONPATH": paths, "TRITON_INTERPRET": "0"}
    environment["PYTHONUNBUFFERED"] = "1"
    with open(out / f"{step.name}.txt", "w") as log:
        for command in step.commands:
            print(f"$ {shlex.join(command)}", file=log, flush=True)
            exits.append(exit_status(command, environment, end - time.monotonic(), log))
            if exits[-1] is None:
                break
    if None in exits:
        wrong = wrong_before_its_end(step, out)
        if wrong is not None:
            return f"FAILED: its time is over, and before that: {wrong}"
        return (
            f"{OVER}; what it found is kept" if step.unfinished and not any(exits[:-1]) else "FAILED: its time is over"
        )
    if any(status not in (0, step.partial) for status in exits):
        return f"FAILED: exit status {', '.join(map(str, exits))}"
    if any(exits):
        return f"partial, its time was too short for all of it; {OVER}"
    (out / f"{step.name}.done").write_text(mark(step, source, built))
    return "passed"


def wrong_before_its_end(step: Step, out: Path) -> str | None:
    """The first line of its output that says that something is wrong."""
    text = (out / f"{step.name}.txt").read_text(errors="replace")
    found = re.search(step.wrong, text, re.MULTILINE) if step.wrong else None
    return None if found is None else text[found.start() :].splitlines()[0]


def exit_status(command: list[str], environment: dict[str, str], seconds: float, log) -> int | None:
    """None where its time is over. Of the process and all that it has started nothing is left."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            # In the background of a script Ctrl-C is ignored, and children inherit that: they could not be stopped.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    except OSError as error:
        print(error, file=log)
        return 127
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, seconds - GRACE))
    finally:
        # Also where this run itself is stopped. A process that has ended takes no signal.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, max(0.0, seconds)))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", metavar="FOLDER", default="out/gpu", help="where everything goes: out/gpu")
    parser.add_argument("--dry-run", action="store_true", help="list the steps and run none; needs no GPU")
    parser.add_argument("--calls", action="store_true", help="nothing but the small calls that the sanitizer watches")
    args = parser.parse_args(arguments)
    if args.calls:
        small_calls()
        return 0
    out, source = Path(args.out).resolve(), source_digest()
    if not args.dry_run:
        if importlib.util.find_spec("torch") is None:
            print(
                f"gpu.py: {sys.executable} has no PyTorch; make gpu PYTHON=… names a Python that has it, such as that "
                "of an environment in which gptkern is installed (.venv/bin/python)",
                file=sys.stderr,
            )
            return 2
        # In a process of its own: CUDA's context would stay in the GPU's memory while the steps run.
        probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", probe]).returncode:
            print("gpu.py: PyTorch sees no GPU here; --dry-run (make gpu DRY=1) lists what would run", file=sys.stderr)
            return 2
        out.mkdir(parents=True, exist_ok=True)
    failed, built, left = False, True, []
    for step in steps(out, source):
        state = "passed before, with the same sources" if done(step, out, source, built) else ""
        state = f"skipped: it needs {step.missing}" if step.missing else state
        print(f"{step.name}, {step.seconds:g} s: {state}", flush=True)
        if args.dry_run:
            variables = [f"{name}={value}" for name, value in (step.environment or {}).items()]
            print(*(f"    {' '.join([*variables, shlex.join(command)])}" for command in step.commands), sep="\n")
        elif not state:
            start = time.monotonic()
            state = run(step, out, source, built)
            failed |= state.startswith("FAILED")
            if OVER in state:
                left.append(step)
            unseen = "" if built or step.name in BEFORE_THE_BUILD else ", WITHOUT the CUDA kernels, which are not built"
            print(f"    {state} after {time.monotonic() - start:.1f} s{unseen}, {out}/{step.name}.txt", flush=True)
        if step.name == BUILD:
            built = args.dry_run or done(step, out, source)
            if not built:
                print("    what follows runs without the CUDA kernels, and again once they are built", flush=True)
    if left:
        print(
            f"NOT DONE: {', '.join(step.name for step in left)}. Run it again with the same FOLDER to go on", flush=True
        )
    if failed:
        return 1
    return PARTIAL if any(step.judges for step in left) else 0


if __name__ == "__main__":
    # A scheduler that ends the run gets the same clean end as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
