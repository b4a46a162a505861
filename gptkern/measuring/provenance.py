"""Where the numbers of a report come from: device, versions, sources, clocks, noise, ceilings; how to repeat it."""

from __future__ import annotations

import statistics
from typing import Any

from gptkern.measuring import rates, wording
from gptkern.measuring import results as files

# A GPU whose clock fell below this share of its highest, from cell to cell, is named.
_THROTTLED = 0.95
SMOKE_CEILINGS = "SMOKE RUN: the ceilings are of tiny sizes. Their rates, and every share of a ceiling, mean nothing."


def table(results: dict[str, Any]) -> str:
    machine = results["machine"]
    device = [machine["device"], machine.get("architecture")]
    if machine.get("multiprocessors"):
        device.append(f"{machine['multiprocessors']} multiprocessors")
    if machine["kind"] == "cpu":
        device.append(
            f"{wording.count(machine.get('threads'), 'thread')} on {wording.count(machine.get('cores'), 'core')}"
        )
    versions = {
        "Python": "python", "PyTorch": "torch", "Triton": "triton", "CUDA": "cuda", "driver": "driver",
    }  # fmt: skip
    peers = [f"{name} {version}" for name, version in (machine.get("peers") or {}).items() if version]
    rows = [
        ("device", ", ".join(filter(None, device))),
        ("measured", _dates(results)),
        ("gptkern", _sources(machine)),
        ("versions", ", ".join(f"{name} {machine[key]}" for name, key in versions.items() if machine.get(key))),
        ("peers", ", ".join(peers) or "PyTorch alone"),
        ("peers asked for", _peers_asked(results)),
        ("backends", _backends(results)),
        ("in force", _in_force(machine)),
        ("clocks", _clocks(results)),
        ("noise", _noise(results)),
        ("checked", _checks(results)),
    ]
    table = wording.table(["this run", ""], [(name, wording.text(value)) for name, value in rows if value])
    return f"{table}\n\nTo measure it again, on such a machine:\n\n```\n{_commands(results)}\n```"


def _dates(results: dict[str, Any]) -> str | None:
    """The day of the measurements, or the first and the last."""
    dates = [cell["date"] for cell in results["cells"] if cell.get("date")] or [results["machine"].get("date")]
    first, last = (pick(filter(None, dates), default=None) for pick in (min, max))
    return first if first == last else f"{first} to {last}"


def _peers_asked(results: dict[str, Any]) -> str | None:
    """Where some cells were measured with a choice of peers: nobody else could have been faster there."""
    choices = [cell.get("peers_asked") for cell in results["cells"]]
    asked = [", ".join(choice) + " alone" if choice else "none" for choice in choices if choice is not None]
    listed = (f"{names} in {wording.count(asked.count(names), 'cell')}" for names in dict.fromkeys(asked))
    return "; ".join(listed) or None


def _sources(machine: dict[str, Any]) -> str:
    commit = machine.get("commit")
    state = (
        "" if commit is None else f", commit {commit[:12]}" + (" with changes on top" if machine.get("dirty") else "")
    )
    return f"{machine.get('gptkern')}{state}, digest of the sources {machine.get('source')}"


def _in_force(machine: dict[str, Any]) -> str | None:
    """What chose kernels from outside of the sources."""
    forced = f"GPTKERN_BACKEND={machine['backend']}" if machine.get("backend") else None
    tables = (
        f"tables of gptkern tune in the user's cache, digest {machine['tables']}" if machine.get("tables") else None
    )
    return ", ".join(filter(None, (forced, tables))) or None


def _commands(results: dict[str, Any]) -> str:
    """What to type; each command once where the cells were measured by several."""
    machine = results["machine"]
    commit = machine.get("commit")
    lines = []
    if commit:
        note = "    # and changes that are in no commit: see the digest" if machine.get("dirty") else ""
        lines.append(f"git checkout {commit[:12]}{note}")
    before = f"OMP_NUM_THREADS={machine.get('threads')} " if machine["kind"] == "cpu" else ""
    before += f"GPTKERN_BACKEND={machine['backend']} " if machine.get("backend") else ""
    runs = list(dict.fromkeys(tuple(cell["options"]) for cell in results["cells"] if cell.get("options") is not None))
    if len(runs) < 2:
        runs = [tuple(machine.get("options") or ())]
    for options in runs:
        lines.append(" ".join([f"{before}gptkern bench", *options, f"--out bench/results/{machine['slug']}"]))
    return "\n".join(lines)


def _backends(results: dict[str, Any]) -> str | None:
    """Which of gptkern's backends ran: on a GPU "torch" is a call that no kernel covers."""
    found = [(files.ours(cell) or {}).get("backend") for cell in results["cells"]]
    counts = {name: found.count(name) for name in dict.fromkeys(found) if name}
    listed = ", ".join(f"{name} in {wording.count(number, 'cell')}" for name, number in counts.items())
    return f"gptkern ran {listed}" if listed else None


def _clocks(results: dict[str, Any]) -> str | None:
    found = [cell["clocks"] for cell in results["cells"] if cell.get("clocks")]
    if not found:
        return None
    parts = []
    for name, key in (("SM", "sm_mhz"), ("memory", "memory_mhz")):
        least, most = (pick(clocks[key] for clocks in found) for pick in (min, max))
        parts.append(f"{name} {least} MHz" if least == most else f"{name} {least} to {most} MHz")
        if least < _THROTTLED * most:
            parts[-1] += " (it fell during the run)"
    return ", ".join(parts) + ", read after each cell"


def _noise(results: dict[str, Any]) -> str | None:
    spreads = sorted(rates.spread(mine) for cell in results["cells"] if (mine := files.ours(cell)))
    if not spreads:
        return None
    return f"spread of gptkern's times: {statistics.median(spreads):.1%} in the middle, {spreads[-1]:.1%} at most"


def _checks(results: dict[str, Any]) -> str | None:
    checks = [cell["check"] for cell in results["cells"] if cell.get("check") and files.ours(cell)]
    worst = [check["error"] / check["bound"] for check in checks if check.get("bound") and check["error"] is not None]
    if not worst:
        return _agreement(results)
    checked = (
        f"the results of {len(checks)} of {len(results['cells'])} cells against float64 before they were timed; "
        f"nearest to the bound: {max(worst):.2f} of it"
    )
    return "; ".join(filter(None, (checked, _agreement(results))))


def _agreement(results: dict[str, Any]) -> str | None:
    """How far gptkern's results and gradients are from the first peer's at full size."""
    timed = [cell for cell in results["cells"] if files.ours(cell)]
    found = [cell["agreement"] for cell in timed if (cell.get("agreement") or {}).get("worst") is not None]
    if not found:
        return None
    peers = " or ".join(dict.fromkeys(f"{entry['with']}'s" for entry in found))
    return (
        f"at full size results and gradients against {peers} in {wording.count(len(found), 'cell')}: "
        f"a relative difference of {max(entry['worst'] for entry in found):.1e} at most"
    )


def ceilings(results: dict[str, Any]) -> str:
    rows = [
        (name, wording.rate(ceiling["value"], _ceiling_counts(name)), wording.text(ceiling.get("how")))
        for name, ceiling in results["ceilings"].items()
    ]
    if not rows:
        return ""
    loud = f"> **{SMOKE_CEILINGS}**\n\n" if rates.meaningless(results, "ceilings") else ""
    return loud + wording.table(["measured ceiling", ">rate", "what was measured"], rows)


def _ceiling_counts(name: str) -> str:
    return {"copy": "bytes", "int8": "ops"}.get(name, "flops")
