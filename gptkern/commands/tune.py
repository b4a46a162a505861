"""`gptkern tune`: measures tiles and backends on this machine's GPU, and keeps what is faster for later runs."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from gptkern.commands import UserError, tables

SUMMARY = "choose tiles and backends for this machine's GPU by measuring them"

PASSED, NOTHING_TO_CHOOSE = 0, 2
# What `--dry-run` and `--show` speak of where there is no GPU.
ARCHITECTURE = 90
# What the kernels run on.
OLDEST = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="what is in force, and where each entry comes from")
    what.add_argument("--reset", action="store_true", help="remove what was measured here; gptkern's own tables remain")
    what.add_argument("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    parser.add_argument(
        "--op", action="append", type=_operator, metavar="OPERATOR", help="only this one; may be given several times"
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="start nothing new after N seconds")
    parser.add_argument("--device", default="cuda", help="the GPU: cuda, cuda:1, …")
    parser.add_argument(
        "--architecture", type=int, metavar="N",
        help=f"with --dry-run or --show: 80, 90, …; the GPU's own, or {ARCHITECTURE} without one",
    )  # fmt: skip
    parser.add_argument(
        "--shipped", action="store_true", help="write into gptkern's own tables, to be committed, not into your cache"
    )


def _operator(name: str) -> str:
    # Looked up when one is given: `--help` does not wait for PyTorch.
    from gptkern.operators import NAMES

    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r} (choose from {', '.join(NAMES)})")
    return name


def run(args: argparse.Namespace) -> int:
    from gptkern.operators import NAMES

    if args.architecture is not None and args.architecture < OLDEST:
        raise UserError(f"--architecture {args.architecture}: it needs {OLDEST} or more, as the kernels do")
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


def _gpu(name: str):
    """The GPU as torch.device with an index, or None where there is none."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type != "cuda":
        raise UserError(f"--device {name}: there is something to choose on a GPU alone")
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


# --- Measuring --------------------------------------------------------------------------------------------------------


def _tune(operators: tuple[str, ...], device, args: argparse.Namespace) -> int:
    from gptkern.backends.tables import files, user
    from gptkern.measuring import tuning

    found = user.identify(device)
    keep = tuning.keep_shipped(found) if args.shipped else tuning.keep_for_user(found)
    place = files.PACKAGE if args.shipped else user.path(found)
    if place is None:
        raise UserError("this system names no folder for caches: set GPTKERN_CACHE")
    _say_ignored(found)
    tasks = _planned(operators, device)
    print(f"{found.name}, sm_{found.architecture}: {len(tasks)} choices; what is found is kept in {place}")
    left, gains = [], 0
    try:
        for outcome in tuning.tune(tasks, device, keep, seconds=args.seconds):
            if isinstance(outcome, tuning.Left):
                left.append(outcome.task)
                continue
            gains += outcome.gain > 1
            for line in _told(outcome):
                print(line, flush=True)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error}") from error
    print(f"{gains} of {len(tasks) - len(left)} choices gain time; the others stay as they were")
    if left:
        counts = Counter(task.operator for task in left)
        counted = ", ".join(f"{operator} {count}" for operator, count in counts.items())
        print(f"not measured, because {args.seconds:g} s were over: {counted}. Run it again to go on with them")
    return PASSED


def _planned(operators: tuple[str, ...], device) -> list:
    from gptkern.measuring import tuning

    try:
        return tuning.plan(operators, device)
    except ImportError as error:
        raise UserError(f"there are no kernels to tune: {error}") from error


def _told(outcome) -> list[str]:
    """The lines that are printed of a task."""
    lines = [f"{outcome.task.name} ({outcome.task.on})"]
    lines += [f"  dropped {_text(drop.candidate)}: {drop.reason}" for drop in outcome.dropped]
    if outcome.chosen is None:
        return [*lines, f"  nothing chosen: {outcome.note}"]
    for candidate, seconds in sorted(outcome.seconds.items(), key=lambda item: item[1]):
        lines.append(f"  {seconds * 1e6:10.1f} µs  {_text(candidate)}")
    chosen = " before ".join(outcome.chosen) if isinstance(outcome.chosen[0], str) else _text(outcome.chosen)
    won = f"{outcome.gain:.2f} x faster" if outcome.gain > 1 else "no other is faster by more than the noise"
    return [*lines, f"  chosen: {chosen} ({won})"]


def _text(candidate: Any) -> str:
    if isinstance(candidate, str):
        return candidate
    values = zip(candidate._fields, candidate)
    return " ".join(f"{name.lower()} {value}" for name, value in values if value is not None)


# --- Without measuring ------------------------------------------------------------------------------------------------


def _rows(operators, device, architecture) -> list[tuple[Any, dict]]:
    """(table, its rows: those in force on the GPU, or an architecture's defaults) for each of the operators' tables."""
    from gptkern.measuring.tuning_tasks import tables as tables_of

    try:
        found = tables_of(operators)
    except ImportError as error:
        raise UserError(f"there are no kernels to tune: {error}") from error
    if device is not None and architecture is None:
        return [(table, table.in_force(device)) for table in found]
    return [(table, table.defaults(architecture or ARCHITECTURE)) for table in found]


def _place(device, architecture) -> tuple[Any, int]:
    """(what is known of the GPU, or None; the architecture that is spoken of)"""
    from gptkern.backends.tables import user

    found = None if device is None or architecture is not None else user.identify(device)
    return found, found.architecture if found else architecture or ARCHITECTURE


def _dry_run(operators, device, architecture) -> int:
    from gptkern.measuring.tuning_tasks import class_tasks, row_tasks

    _, of = _place(device, architecture)
    count = 0
    for table, rows in _rows(operators, device, architecture):
        for task in row_tasks(table, of, rows):
            print(f"{task.name}: {task.tuned.direction} of {task.on}\n  present  {_text(task.present)}")
            for candidate in task.candidates:
                print(f"  against  {_text(candidate)}")
            count += len(task.candidates)
    classes = [task for operator in operators for task in class_tasks(operator)]
    for task in classes:
        print(f"{task.name}: the backends against each other, {task.tuned.direction} of {task.on}")
    print(f"sm_{of}: {count} configurations and {len(classes)} classes of calls; nothing was measured")
    return PASSED


def _show(operators, device, architecture) -> int:
    from gptkern.backends.tables import orders, user
    from gptkern.backends.tables.configurations import described
    from gptkern.operators import problem

    found, of = _place(device, architecture)
    print(f"{found.name}, sm_{of}" if found else f"No GPU is asked for: the defaults of sm_{of}")
    if found:
        _say_ignored(found)
    for path in user.written():
        print(f"your file: {path}")
    for table, rows in _rows(operators, device, architecture):
        print()
        lines = [
            [described(table.key, key), _text(row.configuration), f"{row.source}{_gain(row.measured)}"]
            for key, row in rows.items()
        ]
        tables.show(f"{table.operator} on {table.backend}", ("row", "configuration", "where it comes from"), lines)
    print()
    lines = []
    for operator in operators:
        default = orders.default(operator, found or user.Device("", of))
        lines.append([f"{operator}, all calls", ", ".join(default.order), default.reason])
        for key, preference in orders.preferences(operator, found).items():
            call = f"{operator}, {problem(operator).classes.described(key)}"
            lines.append([call, ", ".join(preference.order), preference.reason])
    tables.show("backends, in the order in which they are tried", ("calls", "order", "where it comes from"), lines)
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
