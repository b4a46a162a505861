"""`gptkern bench`: every kernel against every peer on this machine; `gptkern bench report DIR`: tables and plots."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from gptkern import formatting as form
from gptkern.commands import INTERRUPTED, PARTIAL, RunError, UserError, places
from gptkern.commands import options as types
from gptkern.commands.interrupts import import_torch

SUMMARY = "time this machine's kernels against their peers; `bench report DIR` draws the report"

PASSED, FAILED = 0, 1
# A quick run starts nothing after it, and so ends within two minutes.
QUICK_SECONDS = 70


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", nargs="?", choices=("run", "report"), default="run",
        help="run: measure; report: tables and plots of the results in FOLDER",
    )  # fmt: skip
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="for report: a folder that a run wrote")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="the most telling cells, under 2 minutes")
    extent.add_argument("--smoke", action="store_true", help="tiny cells, to see that the bench itself works")
    parser.add_argument("--op", action="append", metavar="OPERATOR", help="only this one; may be given several times")
    parser.add_argument("--out", metavar="FOLDER", help="where results.json goes (default: out/bench/<device>)")
    parser.add_argument("--peers", metavar="A,B", help="only these peers, by the names that the tables have")
    parser.add_argument(
        "--seconds", type=types.duration, metavar="N",
        help=f"start no new cell after N seconds (default: {QUICK_SECONDS} with --quick, else no limit); where that "
        "leaves some out, the exit status is 3",
    )  # fmt: skip
    parser.add_argument("--rounds", type=types.positive, metavar="N", help="samples of each (default: 50, quick 20)")
    costs = parser.add_mutually_exclusive_group()
    costs.add_argument("--no-costs", action="store_true", help="leave out what is no kernel: host time, import, …")
    costs.add_argument("--costs-only", action="store_true", help="nothing but what is no kernel")
    parser.epilog = "What FOLDER holds already is not measured again: for that, give another --out."


def run(args: argparse.Namespace) -> int:
    if args.action == "report":
        names = ("quick", "smoke", "op", "out", "peers", "seconds", "rounds", "no_costs", "costs_only")
        given = next((name for name in names if getattr(args, name) not in (None, False)), None)
        if given is not None:
            raise UserError(f"--{given.replace('_', '-')} is of a run, and bench report takes a folder alone")
    elif args.out is not None:
        places.folder("--out", args.out)

    import_torch()
    from gptkern.measuring import results

    try:
        return _report(args) if args.action == "report" else _run(args)
    except results.ResultsError as error:
        raise UserError(f"{error}" + (". Give another --out" if args.action == "run" else "")) from error


def _report(args: argparse.Namespace) -> int:
    from gptkern.measuring import report, results

    if args.folder is None:
        raise UserError("bench report needs the folder of a run: gptkern bench report FOLDER")
    folder = places.named("FOLDER", args.folder, "a folder that `gptkern bench` wrote")
    folder = folder.parent if folder.name == results.NAME else folder
    try:
        written = report.write(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {places.reason(error)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        # What a results file holds is looked at where it is drawn.
        what = f"{folder / results.NAME} is not as `gptkern bench` writes it"
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error
    for path in written:
        print(path)
    return PASSED


def _run(args: argparse.Namespace) -> int:
    from gptkern.measuring import machine, results, runner
    from gptkern.measuring import peers as known_peers

    if args.folder is not None:
        raise UserError(f"bench run takes no folder and got {args.folder!r}: --out FOLDER says where results go")
    if args.costs_only:
        for name in ("op", "peers", "rounds"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is of kernels, of which --costs-only measures none: give one of the two")
    args.op = list(dict.fromkeys(args.op or ()))
    peers = None if args.peers is None else [name.strip() for name in args.peers.split(",")]
    for option, given, known in (("op", args.op, runner.OPERATORS), ("peers", peers or (), known_peers.NAMES)):
        for name in given:
            if name not in known:
                raise UserError(f"--{option} {form.shown(name)}: there is no such name; there are {', '.join(known)}")
    seconds = QUICK_SECONDS if args.seconds is None and args.quick else args.seconds
    end = float("inf") if seconds is None else time.monotonic() + seconds
    extent = "smoke" if args.smoke else "quick" if args.quick else "full"
    identity = machine.identify() | {"options": _options(args)}
    # Rates of tiny cells mean nothing: they do not stand beside real ones.
    out = Path(args.out or Path("out") / "bench" / (identity["slug"] + ("-smoke" if args.smoke else "")))
    with results.locked(out):
        recorder = results.Recorder(out, identity)
        if recorder.moved:
            print(f"{recorder.path} held results of another version: they are in {recorder.moved} now")
        versions = f"PyTorch {identity['torch']}, Triton {identity['triton']}"
        print(f"{identity['device']}, {versions}; results go to {recorder.path}")
        return _measured(args, recorder, extent, args.rounds or runner.ROUNDS[extent], peers, end)


def _measured(args, recorder, extent: str, rounds: int, peers, end: float) -> int:
    from gptkern.measuring import ceilings, machine, report, runner

    kind, status, left = machine.kind(), PASSED, []
    try:
        if not recorder.has_ceilings(extent):
            recorder.set_ceilings(ceilings.measure(kind, smoke=args.smoke), extent)
        for line, became in _records(args, recorder, kind, extent, rounds, peers, end):
            print(line, flush=True)
            status = max(status, became, key=(PASSED, PARTIAL, FAILED).index)
            left += [line] if became == PARTIAL else []
    except KeyboardInterrupt:
        print("\ngptkern bench: interrupted; what was measured is kept", file=sys.stderr)
        status = INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        recorder_says = f"{recorder.path} cannot be written: {places.reason(error)}"
        print(f"\ngptkern bench: {recorder_says}; what was measured before is in it", file=sys.stderr)
        status = FAILED
    except runner.DeviceLost as error:
        print(f"\ngptkern bench: {error}; what was measured is kept, start it again to go on", file=sys.stderr)
        status = FAILED
    if recorder.results["cells"] or recorder.results["costs"]:
        print(report.terminal(recorder.results))
        print(f"\n{recorder.path}\nTables and plots: gptkern bench report {recorder.path.parent}")
    # Once more, where it is read.
    print(*left, sep="\n", end="\n" if left else "")
    return status


def _options(args) -> list[str]:
    """What has to be said to measure the same again."""
    options = [f"--{name}" for name in ("quick", "smoke") if getattr(args, name)]
    options += [word for name in args.op for word in ("--op", name)]
    options += ["--peers", f"'{args.peers}'"] if args.peers is not None else []
    return options + (["--rounds", str(args.rounds)] if args.rounds is not None else [])


def _records(args, recorder, kind: str, extent: str, rounds: int, peers, end: float):
    """Measures what is not there yet, and yields (a line on it, PASSED, FAILED or PARTIAL)."""
    from gptkern.measuring import contention, costs, rates, runner

    cells = [] if args.costs_only else runner.cells(kind, extent, args.op or runner.OPERATORS)
    for number, cell in enumerate(cells):
        where = f"[{number + 1}/{len(cells)}] {cell.operator} {cell.direction}, {cell.label} {cell.dtype}"
        if recorder.done(cell.key, rounds, peers):
            yield f"{where}: there already", PASSED
            continue
        if time.monotonic() > end:
            missed = list(dict.fromkeys(each.operator for each in cells[number:]))
            never = [name for name in missed if name not in {each.operator for each in cells[:number]}]
            without = f", nothing of {', '.join(never)}" if never else ""
            yield (
                f"partial, the time is up: {len(cells) - number} of {len(cells)} cells were not measured{without}; the "
                f"same command goes on with them",
                PARTIAL,
            )
            break
        record, _ = runner.measure(cell, kind, rounds, peers)
        recorder.add("cells", record | {"options": recorder.results["machine"]["options"], "extent": extent})
        mine, best = rates.ours(record), rates.best_peer(record)
        if mine is None:
            reason = next(i["skipped"] for i in record["implementations"] if i["name"] == runner.GPTKERN)
            yield f"{where}: FAILED, {reason}", FAILED
            continue
        versus = f"{best['name']}'s time / gptkern's: {form.times(rates.lead(record))}" if best else "no peer"
        doubts = [f"noisy: {rates.noisy(mine)}"] if rates.noisy(mine) else []
        doubts += ["host-bound: the host queues it more slowly than the GPU runs it"] if rates.host_bound(mine) else []
        yield "; ".join([f"{where}: {form.seconds(rates.median(mine))}, {versus}", *doubts]), PASSED
    for key, measure in () if args.no_costs or args.op else costs.listed(extent):
        if recorder.has_cost(key, extent):
            continue
        if time.monotonic() > end:
            yield "partial, the time is up: not all costs that are no kernels were measured", PARTIAL
            break
        try:
            others = contention.Contention()
            record = measure() | {"extent": extent}
            record["noisy"] = contention.busy(others.shares())
        except costs.CostError as error:
            yield f"{key}: FAILED, {error}", FAILED
            continue
        recorder.add("costs", record)
        parts = {"gptkern": record["gptkern"], **record["peers"]}
        amounts = (f"{name} {part.get('skipped') or form.seconds(part['median'])}" for name, part in parts.items())
        doubt = f"; noisy: {record['noisy']}" if record["noisy"] else ""
        yield f"{key}: {', '.join(amounts)}{doubt}", PASSED
