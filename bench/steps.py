"""Runs steps one after the other, each in a process group of its own and with a time of its own: for bench/gpu.py.

A step may use what the steps before it left over of their time, and never what those after it are promised. When its
time is over it is asked to stop, as by Ctrl-C, then killed with all that it started; what it printed is kept. None
stops those that follow. What became of each is in steps.json, from which a later run goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

# A step is asked to stop so long before its time is over: Python then has time to say how far it came.
GRACE = 10
# Bytes of a step's output that are kept: the first ones, and as many of the last.
KEPT_BYTES = 1 << 20
# A log larger than this is begun anew, so that runs that go on and on stay small enough to send.
LOG_BYTES = 8 << 20

PASSED, FAILED, KILLED, SKIPPED, INTERRUPTED = "passed", "failed", "killed", "skipped", "interrupted"
# Its time was over, and what it had found until then is kept: no failure.
STOPPED = "stopped"


class Machine(NamedTuple):
    """What `probe` found."""

    torch: str | None  # its version, or None where it cannot be imported
    gpu: str | None
    architecture: str | None  # "90"
    gibibytes: int
    cores: int


class Context(NamedTuple):
    """What the commands of a step depend on."""

    out: Path
    machine: Machine
    seconds: float  # that the step has


class Step(NamedTuple):
    name: str
    budget: int  # seconds
    what: str
    commands: Callable[[Context], list[list[str]]]  # run one after the other, whatever becomes of the first
    skip: Callable[[Context], str | None] = lambda context: None  # why the step cannot run, or None
    environment: Callable[[Context], dict[str, str]] = lambda context: {}
    output: str | None = None  # a file beside the log that holds this step's output alone
    again: bool = False  # also run where it has come to its end before
    may_stop: bool = False  # keeps what it has found when its time is over: that is no failure


# --- Running ----------------------------------------------------------------------------------------------------------


class Output:
    """Writes lines to several files: the first KEPT_BYTES as they come, and as much of the end when it is closed."""

    def __init__(self, files: list[Any]):
        self.files = files
        self.written = self.ends_bytes = self.left_out = 0
        self.end: deque[bytes] = deque()

    def write(self, line: bytes) -> None:
        if not self.end and self.written + len(line) <= KEPT_BYTES:
            self.written += len(line)
            self._out(line)
            return
        self.end.append(line)
        self.ends_bytes += len(line)
        while self.ends_bytes > KEPT_BYTES:
            dropped = len(self.end.popleft())
            self.ends_bytes -= dropped
            self.left_out += dropped

    def close(self) -> None:
        if self.left_out:
            self._out(f"[{self.left_out} bytes are left out here]\n".encode())
        for line in self.end:
            self._out(line)
        self.end.clear()

    def _out(self, line: bytes) -> None:
        for file in self.files:
            file.write(line)
            file.flush()


class Ended(NamedTuple):
    """How a process ended."""

    exit: int | None  # None: it was killed
    seconds: float


def run_process(command: list[str], environment: dict[str, str], seconds: float, output: Output) -> Ended:
    """Runs a command in a process group of its own, of which nothing is left when it returns or raises."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
        # In the background of a script Ctrl-C is ignored, and children inherit that: a step could not be asked to stop.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    reader = threading.Thread(target=_copy, args=(process.stdout, output), daemon=True)
    reader.start()
    grace = min(GRACE, seconds / 3)
    exit = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit = process.wait(max(0.0, seconds - grace))
    finally:
        try:
            if exit is None:
                _stop(process, grace)
        finally:
            # It, and what it started and left behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(GRACE)
    return Ended(exit, time.monotonic() - start)


def _stop(process: subprocess.Popen, grace: float) -> None:
    """As Ctrl-C does: pytest and the bench then say how far they came. The caller kills what does not stop."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)


def _copy(stream, output: Output) -> None:
    for line in stream:
        output.write(line)


class Record:
    """OUT/steps.json: {"source", "machine", "steps": [{"name", "status", "exit", "seconds", …}]}."""

    def __init__(self, out: Path, machine: Machine, source: str):
        self.path = out / "steps.json"
        self.content: dict[str, Any] = {"source": source, "machine": machine._asdict(), "steps": []}
        try:
            before = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if all(before.get(name) == self.content[name] for name in ("source", "machine")):
            self.content["steps"] = before["steps"]

    def of(self, name: str) -> dict[str, Any] | None:
        return next((step for step in self.content["steps"] if step["name"] == name), None)

    def done(self, step: Step) -> bool:
        """Whether the step has come to its end with these sources, well or badly: it would again."""
        before = self.of(step.name)
        return not step.again and before is not None and before["status"] in (PASSED, FAILED)

    def put(self, entry: dict[str, Any]) -> None:
        self.content["steps"] = [step for step in self.content["steps"] if step["name"] != entry["name"]] + [entry]
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def shares(steps: list[Step], seconds: float) -> list[float]:
    """The seconds that each step is promised: its budget, or its part where there is less time than they need."""
    return [step.budget * min(1.0, seconds / sum(step.budget for step in steps)) for step in steps]


def run(steps: list[Step], out: Path, machine: Machine, seconds: float, source: str, missing: list[str]) -> int:
    """Runs the steps that are not done; the exit status.

    Args:
        seconds: of all steps. source: a digest of what they run; steps that are done are done for one digest.
        missing: what is said before the first.
    """
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    record = Record(out, machine, source)
    log_path = out / "gpu.log"
    large = log_path.exists() and log_path.stat().st_size > LOG_BYTES
    promised = shares(steps, seconds)
    with open(log_path, "wb" if large else "ab") as log:
        _say(log, f"{machine.gpu}, PyTorch {machine.torch}, sources {source}; {seconds:.0f} s")
        for thing in missing:
            _say(log, f"missing: {thing}")
        for place, step in enumerate(steps):
            context = Context(out, machine, deadline - time.monotonic() - sum(promised[place + 1 :]))
            if record.done(step):
                _say(log, f"{step.name}: {record.of(step.name)['status']} before, with the same sources")
                continue
            entry = {"name": step.name, "what": step.what, "started": _now()}
            reason = step.skip(context)
            if reason is not None:
                record.put({**entry, "status": SKIPPED, "reason": reason, "seconds": 0.0})
                _say(log, f"{step.name}: skipped, {reason}")
                continue
            _say(log, f"{step.name}: {step.what}, at most {context.seconds:.0f} s")
            try:
                entry |= _run_step(step, context, log)
            except KeyboardInterrupt:
                record.put({**entry, "status": INTERRUPTED, "seconds": 0.0})
                _say(log, f"{step.name}: interrupted; run again to go on from here")
                return 130
            record.put(entry)
            _say(log, f"{step.name}: {entry['status']} after {entry['seconds']:.1f} s")
        _say(log, "")
        failed = _summary(log, [record.of(step.name) for step in steps])
    return 1 if failed else 0


def _run_step(step: Step, context: Context, log) -> dict[str, Any]:
    """Runs a step's commands, one after the other; what becomes of them, for steps.json."""
    start = time.monotonic()
    added = step.environment(context)
    paths = [str(ROOT), added.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, **added, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # Kernels are to be compiled here, whatever the shell was used for before.
    environment.pop("TRITON_INTERPRET", None)
    commands, exits, status = step.commands(context), [], PASSED
    with contextlib.ExitStack() as stack:
        files = [log, sys.stdout.buffer]
        if step.output:
            files.append(stack.enter_context(open(context.out / step.output, "wb")))
        output = Output(files)
        stack.callback(output.close)
        for command in commands:
            left = context.seconds - (time.monotonic() - start)
            output.write(f"$ {shlex.join(command)}\n".encode())
            try:
                exit, _ = run_process(command, environment, left, output)
            except OSError as error:
                output.write(f"{error}\n".encode())
                exit = error.errno
            exits.append(exit)
            if exit is None:
                output.write(f"[stopped: the step's {context.seconds:.0f} s are over]\n".encode())
                status = STOPPED if step.may_stop else KILLED
                break
            if exit != 0:
                status = FAILED
    return {
        "status": status,
        "exit": exits,
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(context.seconds, 1),
        "commands": [shlex.join(command) for command in commands],
    }


def _summary(log, entries: list[dict[str, Any] | None]) -> bool:
    """Prints a line for each step; whether one failed."""
    found = [entry for entry in entries if entry is not None]
    for entry in found:
        reason = f": {entry['reason']}" if "reason" in entry else ""
        _say(log, f"  {entry['name']:<10} {entry['status']:<8} {entry['seconds']:6.1f} s{reason}")
    return any(entry["status"] in (FAILED, KILLED) for entry in found)


def _say(log, text: str) -> None:
    line = f"== {_now()} {text}".rstrip() + "\n"
    log.write(line.encode())
    log.flush()
    sys.stdout.write(line)
    sys.stdout.flush()


def _now() -> str:
    return datetime.datetime.now().strftime("%H:%M:%S")


# --- Dry run ----------------------------------------------------------------------------------------------------------


def dry_run(steps: list[Step], out: Path, machine: Machine, seconds: float, source: str, missing: list[str]) -> None:
    """Lists the steps: the time that each is promised, its commands, and whether it would run."""
    if machine.gpu is None:
        print("This machine has no GPU. What would run on one, with what is installed here:")
    else:
        print(f"{machine.gpu}, sm_{machine.architecture}, PyTorch {machine.torch}:")
    for thing in missing:
        print(f"missing: {thing}")
    record = Record(out, machine, source)
    for step, share in zip(steps, shares(steps, seconds)):
        context = Context(out, machine, share)
        reason = step.skip(context)
        if reason is not None:
            verdict = f"would be skipped: {reason}"
        elif record.done(step):
            verdict = f"would not run again: {record.of(step.name)['status']} with the same sources"
        else:
            verdict = "would run"
        print(f"\n{step.name}, {share:.0f} s: {step.what}; {verdict}")
        variables = [f"{name}={shlex.quote(value)}" for name, value in step.environment(context).items()]
        for command in step.commands(context):
            print("    " + " ".join([*variables, shlex.join(command)]))
    print(f"\n{sum(shares(steps, seconds)):.0f} s in all, at most.")
