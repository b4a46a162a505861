"""`gptkern check`: this machine's kernels against float64 references (gptkern.measuring.checking)."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

from gptkern import formatting as form
from gptkern.commands import INTERRUPTED, PARTIAL, UserError, places, tables
from gptkern.commands.interrupts import import_torch, interruptible, uninterrupted
from gptkern.commands.options import duration
from gptkern.formatting import shown

SUMMARY = "run this machine's kernels against float64 references"

# What came out: 1 where anything failed or nothing was compared, and 3 (PARTIAL) where nothing failed and cases were
# left out because the time was up.
PASSED, FAILED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--op", action="append", metavar="OPERATOR", help="only this operator; may be given several times"
    )
    parser.add_argument(
        "--interpret", action="store_true", help="run the Triton kernels in Triton's interpreter, on the CPU"
    )
    parser.add_argument(
        "--seconds", type=duration, metavar="N",
        help="start no new case after N seconds; where that leaves cases out, the exit status is 3",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write every comparison to FILE")
    parser.add_argument(
        "--require-gpu", action="store_true", help="refuse where no kernel can run on a GPU, for scripts"
    )
    parser.add_argument("--all", action="store_true", help="show every comparison, not the worst of each kind")


def run(args: argparse.Namespace) -> int:
    from gptkern.operators import NAMES

    args.op = list(dict.fromkeys(args.op)) if args.op else None
    unknown = [name for name in args.op or () if name not in NAMES]
    if unknown:
        raise UserError(f"--op {shown(unknown[0])}: there is no such operator; there are {', '.join(NAMES)}")
    json_path = None if args.json is None else places.file("--json", args.json)
    if args.interpret:
        if args.require_gpu:
            raise UserError("--interpret runs kernels on the CPU, which --require-gpu refuses")
        if importlib.util.find_spec("triton") is None:
            raise UserError("--interpret: triton is not installed")
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Triton and gptkern read the variable when they are imported, which may have happened in this process.
            return _in_a_process([sys.executable, "-m", "gptkern", "check", *_as_options(args)])

    import_torch()
    import torch

    from gptkern.measuring import checking

    device = torch.device("cpu" if args.interpret else checking.default_device())
    backends = checking.available(device)
    if args.require_gpu:
        _require_gpu(device, checking)
    backends = _asked_for(backends, device)
    what = _what(device, backends, checking)
    print(_introduction(what, device, backends, checking), flush=True)
    # Overflow and 0/0 in lanes that a mask then drops: NumPy warns of them, a GPU does not.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    results = []
    try:
        with interruptible() as raise_if_dropped:
            for result in checking.run(args.op, device=device, backends=backends, seconds=args.seconds):
                raise_if_dropped()
                results.append(result)
                _progress(len(results), result)
    except KeyboardInterrupt:
        with uninterrupted():
            _progress(len(results), None)
            _report(results, args.all, what)
        raise
    _progress(len(results), None)
    status = _report(results, args.all, what)
    if json_path is not None:
        _write(json_path, results)
    return status


def _in_a_process(command: list[str]) -> int:
    """Its exit status. It says itself that it was interrupted, after what it has compared."""
    with interruptible():
        # Of a session of its own: a terminal's Ctrl-C comes to this process, and from here to that one, once.
        process = subprocess.Popen(command, env={**os.environ, "TRITON_INTERPRET": "1"}, start_new_session=True)
        while True:
            try:
                status = process.wait()
                # `python -m` ends itself by SIGINT, after all that it had to do and say, where the signal had come
                # within an exec(), of which imports are full. A shell gives 130 for that too.
                return INTERRUPTED if status == -signal.SIGINT else status
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)


def _as_options(args: argparse.Namespace) -> list[str]:
    """The options that `args` was read from."""
    options = ["--interpret"]
    for name in args.op or ():
        options += ["--op", name]
    if args.seconds is not None:
        options += ["--seconds", str(args.seconds)]
    if args.json:
        options += ["--json", args.json]
    return options + ["--all"] * args.all


def _asked_for(backends: tuple[str, ...], device) -> tuple[str, ...]:
    """Those of the backend that GPTKERN_BACKEND forces, where it forces one.

    Raises:
        UserError: there is nothing of it to be checked here.
    """
    from gptkern.backends import dispatch

    forced = os.environ.get("GPTKERN_BACKEND")
    if not forced:
        return backends
    reason = dispatch.unavailable(forced, device)
    asked = tuple(name for name in backends if forced in (name, name.partition(":")[0]))
    if not asked:
        raise UserError(f"GPTKERN_BACKEND is {forced}: {reason or 'no kernel of it is checked here'}")
    return asked


def _require_gpu(device, checking) -> None:
    from gptkern.backends import dispatch

    if device.type != "cuda":
        raise UserError("--require-gpu: PyTorch sees no GPU here")
    reasons = [f"{name}: {dispatch.unavailable(name, device)}" for name in checking.KERNELS]
    if all(dispatch.unavailable(name, device) is not None for name in checking.KERNELS):
        raise UserError(f"--require-gpu: no kernel can run on this GPU; {'; '.join(reasons)}")


def _what(device, backends, checking) -> str:
    """What runs, and on what: for the first line and the last."""
    import torch

    if device.type == "cuda" and checking.LAUNCHERS not in backends:
        return f"{', '.join(backends)} on {torch.cuda.get_device_name(device)}"
    if device.type == "cuda":
        return f"plain PyTorch on {torch.cuda.get_device_name(device)}, no kernel"
    if checking.LAUNCHERS in backends:
        return "plain PyTorch on the CPU, no kernel"
    how = {"triton": "triton (interpreted)", "cuda": "cuda (emulated)"}
    return f"{', '.join(how.get(name, name) for name in backends)} on the CPU, no kernel on a GPU"


def _introduction(what: str, device, backends, checking) -> str:
    if device.type == "cuda":
        return f"Checking {what}."
    if checking.LAUNCHERS not in backends:
        return f"Checking {what}, at small shapes."
    return (
        f"Checking {what}. There is no GPU here, so no kernel can run, and what stands in for the kernels is checked, "
        "the launchers in plain PyTorch.\n`gptkern check --interpret` runs the Triton kernels on the CPU, and with "
        "GPTKERN_EMULATE_CUDA=1 set `gptkern check` runs the CUDA kernels there. `--require-gpu` makes this an error."
    )


def _progress(count: int, result) -> None:
    """One line that is written over, in a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    line = "" if result is None else f"{count} done, {result.operator} {result.shape_class} {result.dtype}"
    print(f"\r{line[:79]:79}\r", end="", file=sys.stderr, flush=True)


def _write(path: Path, results: list) -> None:
    from gptkern.version import __version__

    partial = any(result.left_out for result in results)
    report = {"gptkern": __version__, "partial": partial, "results": [dataclasses.asdict(result) for result in results]}
    places.write(path, json.dumps(report, indent=1))


def _report(results: list, show_all: bool, what: str) -> int:
    """Print the table and the failures; the exit status.

    Args:
        what: ran, and on what.
    """
    compared = [result for result in results if result.ok is not None]
    failed = [result for result in compared if not result.ok]
    skipped = [result for result in results if result.ok is None]
    left_out = sum(result.left_out for result in results)
    headings = ("operator", "direction", "backend", "dtype", "shape class", "shape", "worst error", "bound", "ok")
    shown = [(result, 1) for result in compared] if show_all else _worst_of_each(compared)
    if not show_all:
        headings = (*headings[:4], "shapes", *headings[4:])
    rows = []
    for result, count in shown:
        row = [result.operator, result.direction, result.backend, result.dtype, result.shape_class, result.shape]
        row += [_number(result.error), _number(result.bound), "ok" if result.ok else "FAILED"]
        rows.append(row if show_all else [*row[:4], str(count), *row[4:]])
    title = "Every comparison" if show_all else "The comparison nearest to its bound, of each kind"
    if rows:
        tables.show(title, headings, rows, right=("shapes", "worst error", "bound"))
    for note in sorted({(result.operator, result.backend, result.note) for result in skipped}):
        count = sum((result.operator, result.backend, result.note) == note for result in skipped)
        print(f"{note[0]} on {note[1]}: {count} cases {note[2]}")
    for result in failed:
        why = result.note or f"worst error {result.error:.3e}, the rule allows {result.bound:.3e}"
        case = f"{result.operator} {result.direction} on {result.backend}, {result.dtype}, {result.shape_class}"
        print(f"FAILED {case} ({result.shape}): {why}")
    if not compared:
        print("Nothing was compared.")
    counts = f"{len(compared) - len(failed)} passed, {len(failed)} failed, {len(skipped)} cases not run"
    if left_out:
        counts = f"partial, {form.count(left_out, 'case')} left out for want of time: {counts}"
    print(f"{counts}: {what}")
    if left_out and not failed:
        return PARTIAL
    return FAILED if failed or not compared else PASSED


def _worst_of_each(results: list) -> list[tuple]:
    """(the result nearest to its bound, or beyond it, how many there are) for each kind, in order of appearance."""
    kinds: dict[tuple, list] = {}
    for result in sorted(results, key=lambda result: result.operator):
        kinds.setdefault((result.operator, result.backend, result.direction, result.dtype), []).append(result)
    return [(max(group, key=_nearness), len(group)) for group in kinds.values()]


def _nearness(result) -> float:
    if result.error is None:
        return float("inf")
    if result.error == 0:
        return 0.0
    return result.error / result.bound if result.bound else float("inf")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
