"""A results file as tables: Markdown with pictures, and lines for the terminal.

`write(folder)` makes FOLDER/report.md and FOLDER/<operator>.svg. bench/publish.py puts the same text into docs/.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkern import formatting as form
from gptkern.measuring import plots, rates
from gptkern.measuring import results as files

NAME = "report.md"
LOST_MARK, BROKEN_MARK, EVENTS_MARK, UNCLEAR_MARK = "▼", "✗", "†", "≈"
HOST_MARK, NOISY_MARK = "‡", "~"
# A reason in the list of what was not measured is cut here, in letters.
LONGEST_REASON = 240
# A GPU whose clock fell below this share of its highest, from cell to cell, is named.
THROTTLED = 0.95


def write(folder: str | Path) -> list[Path]:
    """The report of FOLDER/results.json, beside it; -> the files written.

    Without matplotlib (gptkern[cli]) there are no pictures, and the report says so.

    Raises:
        results.ResultsError: there is no results file, or it is no such file.
    """
    folder = Path(folder)
    results = files.load(folder / files.NAME)
    note = ""
    try:
        pictures = {f"{operator}.svg": svg for operator, svg in plots.draw_all(results).items()}
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        pictures, note = {}, "\nThere are no pictures: matplotlib is not installed (it is in the extra `cli`).\n"
    text = markdown(results, {name.removesuffix(".svg"): name for name in pictures}, level=1) + note
    written = {NAME: text, **pictures}
    for name, content in written.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in written]


def markdown(results: dict[str, Any], pictures: Mapping[str, str], level: int = 2) -> str:
    """The whole report.

    Args:
        pictures: operator -> the address of its picture.
        level: of the heading; those below it are one and two deeper.
    """
    device = results["machine"]["device"]
    parts = [f"{'#' * level} {device}"]
    parts += [_provenance(results), _ceilings(results), _summary(results), _legend(results)]
    deeper = "#" * (level + 1)
    for operator, panels in rates.by_operator(results).items():
        parts.append(f"{deeper} {operator} on {device}")
        if operator in pictures:
            parts.append(f"![rates of gptkern and its peers: {operator} on {device}]({pictures[operator]})")
        # Hundreds of rows: folded, with what there is to find in them on the fold.
        found = verdict([cell for panel in panels for cell in panel.cells])
        parts.append(f"<details><summary>{form.count(len(panels), 'table')}: {found}</summary>")
        parts += [_panel(panel, results, f"{deeper}#") for panel in panels]
        parts.append("</details>")
    ends = {
        "What is no kernel": _costs,
        "Promised limits": _promises,
        "Times that say less": _doubts,
        "Not measured": _skipped,
    }
    parts += [f"{deeper} {title}, on {device}\n\n{text}" for title, make in ends.items() if (text := make(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- Where the numbers come from --------------------------------------------------------------------------------------


def _provenance(results: dict[str, Any]) -> str:
    machine, cells = results["machine"], results["cells"]
    commit = str(machine.get("commit"))[:12] + (" with changes on top" if machine.get("dirty") else "")
    dates = sorted({cell["date"] for cell in cells if cell.get("date")} or {machine.get("date") or ""})
    versions = {"Python": "python", "PyTorch": "torch", "Triton": "triton", "CUDA": "cuda", "driver": "driver"}
    peers = [f"{name} {version}" for name, version in (machine.get("peers") or {}).items() if version]
    timed = [mine for cell in cells if (mine := rates.ours(cell))]
    # On a GPU "torch" is a call that no kernel covers.
    ran = [mine["backend"] for mine in timed if mine.get("backend")]
    spreads = [f"{pick(map(rates.spread, timed)):.1%}" for pick in (statistics.median, max)] if timed else []
    before = f"OMP_NUM_THREADS={machine['threads']} " if machine["kind"] == "cpu" else ""
    before += f"GPTKERN_BACKEND={machine['backend']} " if machine.get("backend") else ""
    # Each command once where the cells were measured by several.
    runs = dict.fromkeys(" ".join(["gptkern bench", *(cell.get("options") or ())]) for cell in cells)
    rows = {
        "device": ", ".join(filter(None, (machine["device"], machine.get("architecture")))),
        "measured": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "with": "; ".join(before + command for command in runs),
        "gptkern": f"{machine['gptkern']}, commit {commit}, digest of sources {machine['source']}",
        "versions": ", ".join(f"{name} {machine[key]}" for name, key in versions.items() if machine.get(key)),
        "peers": ", ".join(peers) or "PyTorch alone",
        "tables of gptkern tune": f"digest {machine['tables']}" if machine.get("tables") else "",
        "backends": ", ".join(f"{name} in {form.count(ran.count(name), 'cell')}" for name in dict.fromkeys(ran)),
        "clocks": _clocks(cells),
        "spread of times": f"{' in the middle, '.join(spreads)} at most" if spreads else "",
        "checked": _checks(cells),
    }
    return form.table(["this run", ""], [(name, form.escaped(value)) for name, value in rows.items() if value])


def _clocks(cells: Sequence[dict[str, Any]]) -> str:
    found = [cell["clocks"] for cell in cells if cell.get("clocks")]
    parts = []
    for name, key in (("SM", "sm_mhz"), ("memory", "memory_mhz")) if found else ():
        low, high = (pick(clocks[key] for clocks in found) for pick in (min, max))
        fell = " (it fell during the run)" if low < THROTTLED * high else ""
        parts.append(f"{name} {low if low == high else f'{low} to {high}'} MHz{fell}")
    return ", ".join(parts)


def _checks(cells: Sequence[dict[str, Any]]) -> str:
    timed = [cell for cell in cells if rates.ours(cell)]
    shares = [check["error"] / check["bound"] for c in timed if (check := c.get("check")) and check["bound"]]
    apart = [cell["agreement"]["worst"] for cell in timed if cell.get("agreement")]
    parts = []
    if shares:
        parts.append(f"{len(shares)} of {len(cells)} cells against float64; nearest to its bound: {max(shares):.2f}")
    if apart:
        parts.append(f"at full size {len(apart)} against a peer; relative difference at most {max(apart):.1e}")
    return "; ".join(parts)


def _ceilings(results: dict[str, Any]) -> str:
    units = {"copy": "B/s", "int8": "OP/s"}
    rows = [
        (name, form.rate(ceiling["value"], units.get(name, "FLOP/s")), form.escaped(ceiling["how"]))
        for name, ceiling in results["ceilings"].items()
    ]
    return form.table(["measured ceiling", ">rate", "what was measured"], rows) if rows else ""


# --- The counts -------------------------------------------------------------------------------------------------------


def verdict(cells: Sequence[dict[str, Any]]) -> str:
    """In how many cells gptkern is fastest, level, behind."""
    tally = rates.tally(cells)
    text = (
        f"gptkern is fastest in {tally[rates.FASTEST]} of {form.count(len(cells), 'cell')}, level with the best peer "
        f"(within {rates.LOST - 1:.0%}, or within the noise) in {tally[rates.LEVEL]}, behind in {tally[rates.BEHIND]}"
    )
    others = {
        rates.NOISY: "not told in {} (the times are noisy)",
        rates.ALONE: "without a peer in {}",
        rates.FAILED: "not timed in {} (it failed or was wrong)",
    }
    return ", ".join([text, *(words.format(tally[name]) for name, words in others.items() if tally[name])])


def _summary(results: dict[str, Any]) -> str:
    """The counts for each operator and direction."""
    cells = results["cells"]
    if not cells:
        return "No cell has been measured."
    groups: dict[tuple[str, str], list] = {}
    for panel in rates.panels(results):
        groups.setdefault((panel.operator, panel.direction), []).extend(panel.cells)
    rows = []
    for names, group in groups.items():
        tally = rates.tally(group)
        behind = f"**{tally[rates.BEHIND]}** {LOST_MARK}" if tally[rates.BEHIND] else "0"
        counts = len(group), tally[rates.FASTEST], tally[rates.LEVEL], behind
        rows.append(
            (*names, *map(str, counts), str(tally[rates.NOISY] + tally[rates.ALONE] + tally[rates.FAILED] or ""))
        )
    headings = ["operator", "direction", ">cells", ">fastest", ">level", ">behind", ">no verdict"]
    return f"**{verdict(cells)}.**\n\n" + form.table(headings, rows)


def _legend(results: dict[str, Any]) -> str:
    if not results["cells"]:
        return ""
    return (
        "Times are medians, *spread* the distance of the quartiles. A column named after a peer holds **the peer's "
        "time ÷ gptkern's: above 1.00 gptkern is faster, below 1.00 the peer is**; bold, and "
        f"{LOST_MARK} where it is the best peer: faster by more than {rates.LOST - 1:.0%}, and the quartiles of the "
        f"two do not overlap; {UNCLEAR_MARK}: they overlap. {EVENTS_MARK}: timed with events around plain calls, gaps "
        f"between launches count; {HOST_MARK}: host-bound, the host queued them more slowly than the GPU ran them, and "
        f"the host's time may be in it. {NOISY_MARK}: noisy, a time that says little, and no verdict hangs on it. "
        f"{form.NONE}: not measured. The reasons stand at the end."
    )


# --- One panel --------------------------------------------------------------------------------------------------------


def _panel(panel: rates.Panel, results: dict[str, Any], heading: str) -> str:
    cells = panel.cells
    peers = [name for name in rates.names(cells) if name != "gptkern"]
    rows = [_row(cell, results["ceilings"], peers) for cell in cells]
    # What nothing is known of has no column.
    shown = [name for name in rows[0] if name == ">time" or any(row[name] != form.NONE for row in rows)]
    if len({row["backend"] for row in rows} - {form.NONE}) < 2 and "backend" in shown:
        shown.remove("backend")
    lines = [[_shape(cell), *(row[name] for name in shown)] for cell, row in zip(cells, rows)]
    table = form.table([_shape_heading(cells), *shown], lines)
    return f"{heading} {form.escaped(panel.name)}: {panel.direction}\n\n{table}"


def _row(cell: dict[str, Any], ceilings: dict[str, Any], peers: Sequence[str]) -> dict[str, str]:
    """Heading -> what stands there: gptkern's own numbers, its lead over each peer, and the best peer's."""
    mine, best = rates.ours(cell), rates.best_peer(cell)
    share = {kind: rates.share(cell, mine, ceilings) if cell["ceiling"] == kind else None for kind in ceilings}
    # On a CPU the wall time is the time that counts.
    wall, best_wall = ((each or {}).get("wall_s") if (mine or {}).get("device_s") else None for each in (mine, best))
    memory, other = ((each or {}).get("peak_bytes") for each in (mine, best))
    memory_share = memory / other if memory is not None and other else None
    return {
        "backend": (mine or {}).get("backend") or form.NONE,
        ">time": _time(mine),
        ">spread": f"{rates.spread(mine):.1%}" if mine else form.NONE,
        ">rate": form.rate(rates.rate(cell, mine), rates.unit([cell])),
        **{f">of the {kind} ceiling": form.percent(value) for kind, value in share.items()},
        **{f">{form.escaped(name)}": _lead(cell, name) for name in peers},
        "best peer": form.escaped(best["name"]) if mine and best else form.NONE,
        ">eager wall": form.seconds((wall or {}).get("median")),
        ">best peer's": form.seconds((best_wall or {}).get("median")),
        ">peak memory": form.size(memory),
        ">of best peer's": form.times(memory_share),
    }


def _shape(cell: dict[str, Any]) -> str:
    label = form.escaped(cell["label"])
    return f"{LOST_MARK} **{label}**" if rates.outcome(cell) == rates.BEHIND else label


def _time(implementation: dict[str, Any] | None) -> str:
    return form.seconds(rates.median(implementation)) + _marks(implementation)


def _marks(implementation: dict[str, Any] | None) -> str:
    how = EVENTS_MARK if (implementation or {}).get("timed") == "events" else ""
    how = HOST_MARK if rates.host_bound(implementation) else how
    return how + (NOISY_MARK if rates.noisy(implementation) else "")


def _shape_heading(cells: Sequence[dict[str, Any]]) -> str:
    """The names of the sizes, as the labels have them: "batch x heads x length"."""
    names = {tuple(name for name, value in c["sizes"].items() if not isinstance(value, (bool, str))) for c in cells}
    return " x ".join(names.pop()) if len(names) == 1 else "shape"


def _lead(cell: dict[str, Any], name: str) -> str:
    mine, peer = rates.ours(cell), rates.implementation(cell, name)
    if mine is None or peer is None:
        return form.NONE
    lead = form.times(rates.lead(cell, peer))
    bold = "**" if rates.outcome(cell, peer) == rates.BEHIND else ""
    return f"{bold}{lead}{bold}{UNCLEAR_MARK if rates.unclear(mine, peer) else ''}{_marks(peer)}"


# --- The end ----------------------------------------------------------------------------------------------------------


def _costs(results: dict[str, Any]) -> str:
    rows = []
    for cost in results["costs"]:
        own, peers = cost["gptkern"].get("median"), []
        for name, peer in cost["peers"].items():
            if "skipped" not in peer:
                ratio = form.times(own / peer["median"] if own is not None and peer["median"] else None)
                peers.append(f"{form.escaped(name)}: {form.seconds(peer['median'])} (gptkern takes {ratio})")
        texts = (cost["key"], cost["what"])
        mark = NOISY_MARK if cost.get("noisy") else ""
        rows.append((*map(form.escaped, texts), form.seconds(own) + mark, "; ".join(peers) or form.NONE))
    return form.table(["cost", "what", ">gptkern", "peers"], rows) if rows else ""


def _promises(results: dict[str, Any]) -> str:
    """How many were kept, and each that is broken."""
    promises = rates.promises(results)
    if not promises:
        return ""
    broken, unknown = [p for p in promises if p.broken], sum(promise.measured is None for promise in promises)
    kept = len(promises) - len(broken) - unknown
    counts = f"{kept} of {len(promises)} kept, **{len(broken)} broken**, {unknown} not measured."
    return "\n".join([counts, "", *(f"- {BROKEN_MARK} {form.escaped(promise)}" for promise in broken)]).rstrip()


def _doubts(results: dict[str, Any]) -> str:
    """What is noisy, host-bound or was not captured in a graph, with each reason once."""
    found = []
    for cell in results["cells"]:
        where = f"{cell['operator']} {cell['direction']}"
        for implementation in cell["implementations"]:
            name = implementation["name"]
            if (reason := rates.noisy(implementation)) is not None:
                # Each cell has numbers of its own.
                found.append((f"{NOISY_MARK} {name}", f"{where}, {cell['label']}: {reason}", None))
            if rates.host_bound(implementation):
                found.append((f"{HOST_MARK} {name}", "host-bound", where))
            if implementation.get("not_captured"):
                found.append((f"{EVENTS_MARK} {name}", f"no CUDA graph: {implementation['not_captured']}", where))
    found += [(f"{NOISY_MARK} {cost['key']}", cost["noisy"], None) for cost in results["costs"] if cost.get("noisy")]
    return _listed(found)


def _skipped(results: dict[str, Any]) -> str:
    """Each implementation that was not measured somewhere, with each reason once."""
    entries = [
        (f"{c['operator']} {c['direction']}", i["name"], i) for c in results["cells"] for i in c["implementations"]
    ]
    for cost in results["costs"]:
        entries += [(cost["key"], name, entry) for name, entry in {"gptkern": cost["gptkern"], **cost["peers"]}.items()]
    return _listed([(name, entry["skipped"], where) for where, name, entry in entries if "skipped" in entry])


def _listed(found: Sequence[tuple[str, str, str | None]]) -> str:
    """A line for each (name, reason), with how often it was where; gptkern's own first, and bold."""
    places: dict[tuple[str, str], list[str]] = {}
    for name, reason, where in found:
        places.setdefault((name, reason), []).extend([where] if where else [])
    lines = []
    for name, reason in sorted(places, key=lambda pair: not pair[0].endswith("gptkern")):
        where = places[name, reason]
        listed = ", ".join(f"{where.count(place)} × {place}" for place in dict.fromkeys(where))
        reason = reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "…"
        mark = "**" if name.endswith("gptkern") else ""
        lines.append(f"- {mark}{form.escaped(name)}{mark}: {form.escaped(reason + (f' ({listed})' if listed else ''))}")
    return "\n".join(lines)


def terminal(results: dict[str, Any]) -> str:
    """The counts, the cells that are lost by more than noise, and the promises that are broken."""
    lost = [cell for cell in results["cells"] if rates.outcome(cell) == rates.BEHIND]
    lines = [f"\n{verdict(results['cells'])}."] if results["cells"] else []
    for cell in lost:
        lead, best = form.times(rates.lead(cell)), rates.best_peer(cell)["name"]
        lines.append(f"LOST: {cell['operator']} {cell['direction']}, {cell['label']} {cell['dtype']}: {lead} of {best}")
    for cell in results["cells"]:
        mine, where = rates.ours(cell), f"{cell['operator']} {cell['direction']}, {cell['label']} {cell['dtype']}"
        if reason := rates.noisy(mine) or rates.noisy(rates.best_peer(cell)):
            lines.append(f"NOISY: {where}: {reason}")
        if rates.host_bound(mine):
            lines.append(f"HOST-BOUND: {where}: the host queues it more slowly than the GPU runs it")
    return "\n".join([*lines, *(f"BROKEN: {promise}" for promise in rates.promises(results) if promise.broken)])
