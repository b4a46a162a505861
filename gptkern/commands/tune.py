"""`gptkern tune`: measures tiles and backends on this machine's GPU, and keeps what is faster for later runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections import Counter
from typing import Any

from gptkern.commands import RunError, UserError, places, tables
from gptkern.commands.interrupts import import_torch
from gptkern.commands.options import duration, positive, whole
from gptkern.formatting import shown

SUMMARY = "choose tiles and backends for this machine's GPU by measuring them"

# 1 where a candidate cost its process the GPU, or did not end: all else was measured, and kept, beside it.
PASSED, LOST, NOTHING_TO_CHOOSE = 0, 1, 2
# Candidates that are compiled and checked at a time, at most: each process holds a CUDA context.
MOST_JOBS = 8
# What `--dry-run` and `--show` speak of where there is no GPU.
ARCHITECTURE = 90
# What the kernels run on, and more than any that there will be soon.
OLDEST, NEWEST = 80, 999


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="what is in force, and where each entry comes from")
    what.add_argument("--reset", action="store_true", help="remove what was measured here; gptkern's own tables remain")
    what.add_argument("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    parser.add_argument(
        "--op", action="append", type=_operator, metavar="OPERATOR", help="only this one; may be given several times"
    )
    parser.add_argument("--seconds", type=duration, metavar="N", help="start nothing new after N seconds")
    parser.add_argument(
        "--jobs", type=positive, metavar="N",
        help=f"candidates that are compiled and checked at a time (default: one for each core, at most {MOST_JOBS})",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="the GPU: cuda, cuda:1, …")
    parser.add_argument(
        "--architecture", type=whole(OLDEST, NEWEST), metavar="N",
        help=f"with --dry-run or --show: 80, 90, …; the GPU's own, or {ARCHITECTURE} without one",
    )  # fmt: skip
    parser.add_argument(
        "--shipped", action="store_true", help="write into gptkern's own tables, to be committed, not into your cache"
    )


def _operator(name: str) -> str:
    # Looked up when one is given: `--help` does not wait for PyTorch.
    from gptkern.operators import NAMES

    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"is {shown(name)}; it needs one of {', '.join(NAMES)}")
    return name


def run(args: argparse.Namespace) -> int:
    from gptkern.operators import NAMES

    _check_together(args)
    import_torch()
    operators = tuple(dict.fromkeys(args.op or NAMES))
    device = _gpu(args.device)
    if args.dry_run:
        return _dry_run(operators, device, args.architecture)
    if args.show:
        return _show(operators, device, args.architecture)
    if device is None:
        if args.reset:
            raise UserError("--reset removes the file of one GPU, and PyTorch sees none here")
        print(
            "gptkern tune: PyTorch sees no GPU here, and there is nothing to choose: on a CPU every operator runs on "
            "PyTorch. `--dry-run` lists what would be measured, `--show` what is in force."
        )
        return NOTHING_TO_CHOOSE
    return _reset(device) if args.reset else _tune(operators, device, args)


def _check_together(args: argparse.Namespace) -> None:
    """Raises UserError where an option would have no effect."""
    listing = "--dry-run" if args.dry_run else "--show" if args.show else None
    without = listing or ("--reset" if args.reset else None)
    measuring = (
        ("--seconds", args.seconds is not None),
        ("--shipped", args.shipped),
        ("--jobs", args.jobs is not None),
    )
    for option, given in measuring:
        if given and without:
            raise UserError(f"{option} has no effect on {without}, which measures nothing")
    if args.op and args.reset:
        raise UserError("--op has no effect on --reset, which removes the GPU's file")
    if args.architecture is not None and listing is None:
        raise UserError("--architecture needs --dry-run or --show: what is measured is this machine's GPU")


def _gpu(name: str):
    """The GPU as torch.device with an index, or None where there is none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {shown(name)}: no device has this name; it needs cuda or cuda:N") from error
    if device.type != "cuda":
        raise UserError(f"--device {shown(name)}: there is something to choose on a GPU alone, cuda or cuda:N")
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def _tune(operators: tuple[str, ...], device, args: argparse.Namespace) -> int:
    from gptkern.backends.tables import files, user
    from gptkern.measuring import timing, tuning

    found = user.identify(device)
    keep = tuning.keep_shipped(found) if args.shipped else tuning.keep_for_user(found)
    place = files.PACKAGE if args.shipped else user.path(found)
    if place is None:
        raise UserError("this system names no folder for caches: set GPTKERN_CACHE")
    # Before the minutes that it takes to find something that is to be kept.
    places.folder("the folder of tables", str(place if place.is_dir() else place.parent))
    _say_ignored(found)
    with _kernels_needed():
        tasks = tuning.plan(operators, device)
    print(f"{found.name}, sm_{found.architecture}: {len(tasks)} choices; what is found is kept in {place}")
    left, gains, lost = Counter(), 0, []
    try:
        with tuning.Trials(args.jobs or min(MOST_JOBS, os.cpu_count() or 1)) as trials:
            refused = trials.refused(device)
            if refused is not None:
                print(f"Candidates are tried in this process, one after another, since another cannot start: {refused}")
            tried_in = trials if refused is None else None
            for outcome in tuning.tune(tasks, device, keep, seconds=args.seconds, trials=tried_in):
                if isinstance(outcome, tuning.Left):
                    left[outcome.task.operator] += 1
                    continue
                gains += outcome.gain > 1
                lost += [(outcome.task, drop) for drop in outcome.dropped if drop.lost]
                print(*_told(outcome), sep="\n", flush=True)
    except OSError as error:
        raise RunError(f"{place} cannot be written: {error}") from error
    except timing.DeviceLost as error:
        raise RunError(f"{error}; what was found before is kept") from error
    print(f"{gains} of {len(tasks) - left.total()} choices gain time; the others stay as they were")
    if left:
        counted = ", ".join(f"{operator} {count}" for operator, count in left.items())
        print(f"not measured, because {args.seconds:g} s were over: {counted}. Run it again to go on with them")
    for task, drop in lost:
        said = f"{task.name}, {_text(drop.candidate)}: {drop.reason}"
        print(f"gptkern tune: a kernel did more than fail, and was left out: {said}", file=sys.stderr)
    return LOST if lost else PASSED


@contextlib.contextmanager
def _kernels_needed():
    try:
        yield
    except ImportError as error:
        raise UserError(f"there are no kernels to tune: {error}") from error


def _told(outcome) -> list[str]:
    """The lines that are printed of a task."""
    lines = [f"{outcome.task.name} ({outcome.task.on})"]
    lines += [
        f"  {'LOST' if drop.lost else 'dropped'} {_text(drop.candidate)}: {drop.reason}" for drop in outcome.dropped
    ]
    if outcome.chosen is None:
        return [*lines, f"  nothing chosen: {outcome.note}"]
    for candidate, seconds in sorted(outcome.seconds.items(), key=lambda item: item[1]):
        lines.append(f"  {seconds * 1e6:10.1f} µs  {_text(candidate)}")
    chosen = " before ".join(outcome.chosen) if isinstance(outcome.chosen[0], str) else _text(outcome.chosen)
    won = f"{outcome.gain:.2f} x faster" if outcome.gain > 1 else "no other is faster by more than the noise"
    return [*lines, f"  chosen: {chosen} ({won})", *([f"  {outcome.note}"] if outcome.note else [])]


def _text(candidate: Any) -> str:
    if isinstance(candidate, str):
        return candidate
    values = zip(candidate._fields, candidate)
    return " ".join(f"{name.lower()} {value}" for name, value in values if value is not None)


# --- Without measuring ------------------------------------------------------------------------------------------------


def _rows(operators, device, architecture: int | None) -> tuple[Any, int, list[tuple[Any, dict]]]:
    """(the GPU or None, the architecture that is spoken of, each table with its rows in force or its defaults)"""
    from gptkern.backends.tables import user
    from gptkern.measuring.tuning_tasks import tables as tables_of

    found = None if device is None or architecture is not None else user.identify(device)
    of = found.architecture if found else architecture or ARCHITECTURE
    with _kernels_needed():
        listed = tables_of(operators)
    return found, of, [(table, table.in_force(device) if found else table.defaults(of)) for table in listed]


def _dry_run(operators, device, architecture) -> int:
    from gptkern.measuring.tuning_tasks import class_tasks, row_tasks

    _, of, listed = _rows(operators, device, architecture)
    tasks = [task for table, rows in listed for task in row_tasks(table, of, rows)]
    for task in tasks:
        print(f"{task.name}: {task.tuned.direction} of {task.on}\n  present  {_text(task.present)}")
        print(*(f"  against  {_text(candidate)}\n" for candidate in task.candidates), sep="", end="")
    classes = [task for operator in operators for task in class_tasks(operator)]
    for task in classes:
        print(f"{task.name}: the backends against each other, {task.tuned.direction} of {task.on}")
    count = sum(len(task.candidates) for task in tasks)
    calls = f"{len(classes)} classes of calls"
    print(f"sm_{of}: {count} configurations, the neighbours of each that wins, and {calls}; nothing was measured")
    return PASSED


def _show(operators, device, architecture) -> int:
    from gptkern.backends.tables import orders, user
    from gptkern.backends.tables.configurations import described
    from gptkern.operators import problem

    found, of, listed = _rows(operators, device, architecture)
    print(f"{found.name}, sm_{of}" if found else f"No GPU is asked for: the defaults of sm_{of}")
    if found:
        _say_ignored(found)
    print(*(f"your file: {path}\n" for path in user.written()), sep="", end="")
    for table, rows in listed:
        lines = [
            [described(table.key, key), _text(row.configuration), f"{row.source}{_gain(row.measured)}"]
            for key, row in rows.items()
        ]
        tables.show(f"\n{table.operator} on {table.backend}", ("row", "configuration", "where it comes from"), lines)
    lines = []
    for operator in operators:
        preferences = {"all calls": orders.default(operator, found or user.Device("", of))}
        for key, preference in orders.preferences(operator, found).items():
            preferences[problem(operator).classes.described(key)] = preference
        lines += [[f"{operator}, {calls}", ", ".join(order), reason] for calls, (order, reason) in preferences.items()]
    tables.show("\nbackends, in the order in which they are tried", ("calls", "order", "where it comes from"), lines)
    return PASSED


def _gain(measured: dict[str, Any]) -> str:
    return f", {measured['gain']:.2f} x faster on {measured.get('on')}" if measured.get("gain", 1) > 1 else ""


def _say_ignored(found) -> None:
    from gptkern.backends.tables import user

    file = user.read(found)
    if file.ignored:
        print(f"{file.path} is ignored: {file.ignored}")


def _reset(device) -> int:
    from gptkern.backends import dispatch
    from gptkern.backends.tables import user

    path = user.path(user.identify(device))
    if path is None or not path.exists():
        print(f"nothing was measured here: there is no {path}")
        return PASSED
    try:
        path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be removed: {error}") from error
    dispatch.forget()
    print(f"removed {path}")
    return PASSED
