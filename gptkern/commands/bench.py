"""`gptkern bench`: every kernel against every peer on this machine; `gptkern bench report DIR`: tables and plots."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from gptkern.commands import INTERRUPTED, UserError

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
        "--seconds", type=float, metavar="N",
        help=f"start no new cell after N seconds (default: {QUICK_SECONDS} with --quick, else no limit)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each (default: 50, quick 20)")
    costs = parser.add_mutually_exclusive_group()
    costs.add_argument("--no-costs", action="store_true", help="leave out what is no kernel: host time, import, …")
    costs.add_argument("--costs-only", action="store_true", help="nothing but what is no kernel")
    parser.epilog = "What FOLDER holds already is not measured again: for that, give another --out."


def run(args: argparse.Namespace) -> int:
    return _report(args) if args.action == "report" else _run(args)


def _report(args: argparse.Namespace) -> int:
    from gptkern.measuring import report, results

    if args.folder is not None and Path(args.folder).name == results.NAME:
        args.folder = str(Path(args.folder).parent)
    if args.folder is None:
        raise UserError("bench report needs the folder of a run: gptkern bench report FOLDER")
    try:
        written = report.write(Path(args.folder))
    except results.ResultsError as error:
        raise UserError(str(error)) from error
    for path in written:
        print(path)
    return PASSED


def _run(args: argparse.Namespace) -> int:
    from gptkern.measuring import machine, results, runner
    from gptkern.measuring import peers as known_peers

    start = time.monotonic()
    if args.folder is not None:
        raise UserError(f"bench run takes no folder and got {args.folder!r}: --out FOLDER says where results go")
    if args.rounds is not None and args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: it needs at least 1")
    if args.seconds is None and args.quick:
        args.seconds = QUICK_SECONDS
    args.op = list(dict.fromkeys(args.op or ()))
    unknown = [name for name in args.op if name not in runner.OPERATORS]
    if unknown:
        raise UserError(f"--op {unknown[0]}: there is no such operator; there are {', '.join(runner.OPERATORS)}")
    extent = "smoke" if args.smoke else "quick" if args.quick else "full"
    rounds = args.rounds or runner.ROUNDS[extent]
    peers = None if args.peers is None else [name.strip() for name in args.peers.split(",")]
    kind = machine.kind()
    unknown = [name for name in peers or () if name not in known_peers.NAMES]
    if unknown:
        raise UserError(f"--peers {unknown[0]}: there is no such peer; there are {', '.join(known_peers.NAMES)}")
    identity = machine.identify() | _in_force() | {"options": _options(args)}
    # Rates of tiny cells mean nothing: they do not stand beside real ones.
    out = Path(args.out or Path("out") / "bench" / (identity["slug"] + ("-smoke" if args.smoke else "")))
    try:
        with results.locked(out):
            recorder = results.Recorder(out, identity)
            return _measured(args, recorder, kind, extent, rounds, peers, start)
    except results.ResultsError as error:
        raise UserError(f"{error}. Give another --out") from error


def _measured(args, recorder, kind, extent, rounds, peers, start) -> int:
    from gptkern.measuring import ceilings, report, runner

    identity = recorder.results["machine"]
    if recorder.moved:
        print(f"{recorder.path} held results of another version: they are in {recorder.moved} now")
    versions = f"PyTorch {identity['torch']}, Triton {identity['triton']}"
    print(f"{identity['device']}, {versions}; results go to {recorder.path}")

    def time_is_up() -> bool:
        return args.seconds is not None and time.monotonic() - start > args.seconds

    status = PASSED
    try:
        if not recorder.has_ceilings(extent):
            recorder.set_ceilings(ceilings.measure(kind, smoke=args.smoke), extent)
        if not args.costs_only:
            status = _cells(args, recorder, kind, extent, rounds, peers, time_is_up)
        if not args.no_costs:
            status = max(status, _costs(recorder, extent, args.op, time_is_up))
    except KeyboardInterrupt:
        print("\ngptkern bench: interrupted; what was measured is kept", file=sys.stderr)
        status = INTERRUPTED
    except runner.DeviceLost as error:
        print(f"\ngptkern bench: {error}; what was measured is kept, start it again to go on", file=sys.stderr)
        status = FAILED
    if recorder.results["cells"] or recorder.results["costs"]:
        report.terminal_table(recorder.results)
        print(f"\n{recorder.path}\nTables and plots: gptkern bench report {recorder.folder}")
    return status


def _in_force() -> dict[str, str | None]:
    """What changes the choice of a kernel from outside of the sources: a forced backend, the user's own tables."""
    import hashlib

    import torch

    from gptkern.backends.tables import user

    device = user.identify(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else None
    path = None if device is None else user.path(device)
    tables = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path is not None and path.exists() else None
    return {"backend": os.environ.get("GPTKERN_BACKEND") or None, "tables": tables}


def _options(args) -> list[str]:
    """What has to be said to measure the same again."""
    options = [f"--{name}" for name in ("quick", "smoke") if getattr(args, name)]
    for name in args.op or ():
        options += ["--op", name]
    if args.peers is not None:
        options += ["--peers", f"'{args.peers}'"]
    if args.rounds is not None:
        options += ["--rounds", str(args.rounds)]
    return options


def _cells(args, recorder, kind, extent, rounds, peers, time_is_up) -> int:
    from gptkern.measuring import results, runner

    cells = runner.cells(kind, extent, args.op or runner.OPERATORS)
    status = PASSED
    for number, cell in enumerate(cells):
        where = f"[{number + 1}/{len(cells)}] {cell.operator} {cell.direction}, {cell.label} {cell.dtype}"
        if recorder.done(cell.key, rounds, peers):
            print(f"{where}: there already")
            continue
        if time_is_up():
            print(f"The time is up: {len(cells) - number} of {len(cells)} cells were not measured")
            break
        record, _ = runner.measure(cell, kind, rounds, peers)
        recorder.add_cell(record | {"options": recorder.results["machine"]["options"], "extent": extent})
        mine = results.ours(record)
        if mine is None:
            reason = next(i["skipped"] for i in record["implementations"] if i["name"] == runner.GPTKERN)
            print(f"{where}: FAILED, {reason}", flush=True)
            status = FAILED
            continue
        best, against = results.best_peer(record), results.ratio(record)
        versus = "no peer" if best is None else f"{best['name']}'s time / gptkern's: {1 / against:.2f}×"
        print(f"{where}: {_time(results.seconds(mine)['median'])}, {versus}", flush=True)
    return status


def _costs(recorder, extent, operators, time_is_up) -> int:
    from gptkern.measuring import costs

    if operators:
        return PASSED
    status = PASSED
    for key, measure in costs.listed(extent):
        if recorder.has_cost(key, extent):
            continue
        if time_is_up():
            print("The time is up: some of the costs that are no kernels were not measured")
            break
        try:
            record = measure() | {"extent": extent}
        except costs.CostError as error:
            print(f"{key}: FAILED, {error}", flush=True)
            status = FAILED
            continue
        recorder.add_cost(record)
        parts = [("gptkern", record["gptkern"]), *record["peers"].items()]
        print(f"{key}: {', '.join(f'{name} {_amount(part, record)}' for name, part in parts)}", flush=True)
    return status


def _amount(part, record) -> str:
    if "skipped" in part:
        return f"not measured ({part['skipped']})"
    return _time(part["median"]) if record["unit"] == "s" else f"{part['median'] / 1000:.0f} kB"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"
