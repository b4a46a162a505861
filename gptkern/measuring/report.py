"""A results file as tables: Markdown with pictures, lines for the README, a table for the terminal.

`write(folder)` makes FOLDER/report.md and FOLDER/<operator>.svg. bench/publish.py puts the same text into docs/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptkern.measuring import plots, provenance, rates, wording
from gptkern.measuring import results as files

NAME = "report.md"
SAMPLE = "SAMPLE: invented numbers, not measured"
SMOKE_CELLS = "SMOKE RUN: some cells are of tiny sizes. Their times and rates mean nothing."
SMOKE_COSTS = "SMOKE RUN: some costs were measured a few times only. They mean nothing."
LOST_MARK, BROKEN_MARK, EVENTS_MARK, UNCLEAR_MARK = "▼", "✗", "†", "≈"
LEVEL = f"level with the best peer (within {files.LOST - 1:.0%}, or within the noise)"
# What the README says of what is no kernel, where it was measured: the key of the cost.
README_COSTS = ("import", "first call", "host time, layer_norm", "host time, layer_norm, to the launch", "wheel")
# An operator with more tables than these has them folded.
_MOST_OPEN = 4


def write(folder: str | Path) -> list[Path]:
    """The report of FOLDER/results.json, beside it; -> the files written.

    Without matplotlib (gptkern[cli]) there are no pictures, and the report says so.

    Raises:
        results.ResultsError: there is no results file, or it is no such file.
    """
    folder = Path(folder)
    results = files.load(folder / files.NAME)
    pictures = {}
    try:
        for operator in rates.operators(results):
            if plots.drawn(results, operator)["plots"]:
                pictures[operator] = plots.draw(results, operator)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
    written = []
    for operator, svg in pictures.items():
        path = folder / f"{operator}.svg"
        path.write_text(svg, encoding="utf-8")
        written.append(path)
    text = markdown(results, {operator: f"{operator}.svg" for operator in pictures}, level=1)
    if not pictures:
        text += "\nThere are no pictures: matplotlib is not installed (`pip install 'gptkern[cli]'`).\n"
    path = folder / NAME
    path.write_text(text, encoding="utf-8")
    return [path, *written]


def markdown(results: dict[str, Any], pictures: Mapping[str, str], level: int = 2) -> str:
    """The whole report.

    Args:
        pictures: operator -> the address of its picture.
        level: of the heading; those below it are one and two deeper.
    """
    parts = [f"{'#' * level} {results['machine']['device']}"]
    if results["sample"]:
        parts.append(f"> **{SAMPLE}.** What follows shows the form of a report and nothing about any device.")
    if rates.meaningless(results, "cells"):
        parts.append(f"> **{SMOKE_CELLS}**")
    parts += [provenance.table(results), provenance.ceilings(results), _summary_table(results), _legend(results)]
    panels = rates.panels(results)
    for operator in rates.operators(results):
        parts.append(f"{'#' * (level + 1)} {operator} on {results['machine']['device']}")
        if operator in pictures:
            parts.append(f"![{_picture_text(results, operator)}]({pictures[operator]})")
        own = [panel for panel in panels if panel.operator == operator]
        # Hundreds of rows: folded, with what there is to find in them on the fold.
        lead = verdict([cell for panel in own for cell in panel.cells])
        tables = wording.count(len(own), "table")
        parts.append(f"<details{_opened(own)}><summary>{tables}: {_sample(results)}{lead}</summary>")
        parts += [_panel(panel, results, level + 2) for panel in own]
        parts.append("</details>")
    parts += [_costs(results, level + 1), _promises(results, level + 1), _skipped(results, level + 1)]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- The counts -------------------------------------------------------------------------------------------------------


def verdict(cells: Sequence[dict[str, Any]]) -> str:
    """ "gptkern is fastest in 12 of 20 cells, level with the best peer (…) in 3, behind in 5"."""
    tally = rates.tally(cells)
    text = (
        f"gptkern is fastest in {tally[rates.FASTEST]} of {wording.count(len(cells), 'cell')}, "
        f"{LEVEL} in {tally[rates.LEVEL]}, behind in {tally[rates.BEHIND]}"
    )
    if tally[rates.ALONE]:
        text += f", without a peer in {tally[rates.ALONE]}"
    if tally[rates.FAILED]:
        text += f", not timed in {tally[rates.FAILED]} (it failed or was wrong)"
    return text


def _summary_table(results: dict[str, Any]) -> str:
    """The counts for each operator and direction, with the widest lead and the widest loss."""
    cells = results["cells"]
    if not cells:
        return "No cell has been measured."
    groups: dict[tuple[str, str], list] = {}
    for panel in rates.panels(results):
        groups.setdefault((panel.operator, panel.direction), []).extend(panel.cells)
    rows = []
    for (operator, direction), group in groups.items():
        tally = rates.tally(group)
        best, worst = _extremes(group)
        counts = [str(tally[name]) for name in (rates.FASTEST, rates.LEVEL)]
        behind = f"**{tally[rates.BEHIND]}** {LOST_MARK}" if tally[rates.BEHIND] else "0"
        others = str(tally[rates.ALONE] + tally[rates.FAILED] or "")
        rows.append((operator, direction, str(len(group)), *counts, behind, others, _extreme(best), _extreme(worst)))
    headings = ["operator", "direction", ">cells", ">fastest", f">{rates.LEVEL}", ">behind", ">no verdict"]
    headings += ["widest lead", "widest loss"]
    broken = [promise for promise in rates.all_promises(results) if promise.broken]
    promised = f" Promised limits broken: **{len(broken)}** {BROKEN_MARK}, listed below." if broken else ""
    return f"**{_sample(results)}{verdict(cells)}.**{promised}\n\n" + wording.table(headings, rows)


def _extremes(cells: Sequence[dict[str, Any]]) -> tuple[dict | None, dict | None]:
    """The cell of the widest lead over the best peer and that of the widest loss, where one is more than noise."""
    leads = [cell for cell in cells if rates.outcome(cell) == rates.FASTEST]
    losses = [cell for cell in cells if _behind(cell)]
    return max(leads, key=rates.lead, default=None), min(losses, key=rates.lead, default=None)


def _behind(cell: dict[str, Any]) -> bool:
    return rates.outcome(cell) == rates.BEHIND


def _extreme(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    best = wording.text(files.best_peer(cell)["name"])
    text = f"{wording.times(rates.lead(cell))} {best}, {wording.text(cell['label'])}"
    return f"**{text}** {LOST_MARK}" if _behind(cell) else text


def _legend(results: dict[str, Any]) -> str:
    if not results["cells"]:
        return ""
    on_gpu = results["machine"]["kind"] == "cuda"
    lines = [
        "Times are medians; *spread* is the distance of the quartiles as a share of the median. A column named after a "
        "peer holds **the peer's time ÷ gptkern's: above 1.00 gptkern is faster, below 1.00 the peer is**.",
        f"Bold, and {LOST_MARK} where it is the best peer: the peer is faster by more than {files.LOST - 1:.0%}, and "
        f"the quartiles of the two do not overlap. {UNCLEAR_MARK}: they overlap, the difference may be noise.",
        "The verdict on a cell is that on its best peer: *fastest*, gptkern is faster and the quartiles do not "
        f"overlap; *behind*, {LOST_MARK}; all else is *level*. The widest lead is of the fastest cells, the widest "
        "loss of those behind.",
        f"{BROKEN_MARK}: a promised limit is broken (of the medians, noise or not). {EVENTS_MARK}: timed with events "
        "around plain calls, no CUDA graph could hold it: gaps between launches count. –: not measured, the reasons "
        "stand at the end.",
    ]
    if on_gpu:
        lines.append(
            "*time* is the device's; *eager wall* is one call after another from Python, launches included, gptkern's "
            "and the best peer's. *peak memory* is what one call allocates at most, and as a share of the best peer's: "
            "below 1.00 gptkern takes less."
        )
    return "\n".join(f"- {line}" for line in lines)


# --- One panel --------------------------------------------------------------------------------------------------------


def _panel(panel: rates.Panel, results: dict[str, Any], level: int) -> str:
    cells, ceilings = panel.cells, results["ceilings"]
    mine, best = files.ours, files.best_peer
    limits = list(dict.fromkeys(cell["ceiling"] for cell in cells if rates.least_seconds(cell, ceilings)))
    backends = {(mine(cell) or {}).get("backend") for cell in cells} - {None}

    columns = [(_shape_heading(cells), _shape)]
    if len(backends) > 1:
        columns.append(("backend", lambda cell: (mine(cell) or {}).get("backend") or "–"))
    columns.append((">time", lambda cell: _time(mine(cell)) if mine(cell) else "**not timed**"))
    columns.append((">spread", lambda cell: f"{rates.spread(mine(cell)):.1%}" if mine(cell) else "–"))
    if any(map(rates.counted, ([cell] for cell in cells))):
        columns.append((">rate", lambda cell: wording.rate(rates.rate(cell, mine(cell)), rates.counted([cell]))))
    if limits:
        name = f"{limits[0]} ceiling" if len(limits) == 1 else "ceiling"
        columns.append((f">of the {name}", lambda cell: _share(cell, ceilings, naming=len(limits) > 1)))
    for peer in rates.names(cells):
        if peer != "gptkern":
            columns.append((f">{wording.text(peer)}", lambda cell, peer=peer: _lead(cell, peer)))
    columns.append(("best peer", lambda cell: wording.text(best(cell)["name"]) if best(cell) else "–"))
    if any((mine(cell) or {}).get("device_s") for cell in cells):
        columns.append((">eager wall", lambda cell: _wall(mine(cell))))
        columns.append((">best peer's", lambda cell: _wall(best(cell))))
    if any((mine(cell) or {}).get("peak_bytes") for cell in cells):
        columns.append((">peak memory", lambda cell: _memory(mine(cell))))
        columns.append((">of best peer's", lambda cell: _memory_share(mine(cell), best(cell))))
    if any(cell.get("limits") for cell in cells):
        columns.append(("promised", lambda cell: "; ".join(map(_promise, rates.promises(cell))) or "–"))

    title = f"{'#' * level} {wording.text(panel.name)}: {panel.direction}"
    rows = [[column(cell) for _, column in columns] for cell in cells]
    table = wording.table([heading for heading, _ in columns], rows)
    return f"{title}\n\n" + (f"**{SAMPLE}**\n\n" if results["sample"] else "") + table


def _shape(cell: dict[str, Any]) -> str:
    label = wording.text(cell["label"])
    return f"{LOST_MARK} **{label}**" if _behind(cell) else label


def _time(implementation: dict[str, Any] | None) -> str:
    return wording.seconds(rates.median(implementation)) + _events(implementation)


def _events(implementation: dict[str, Any] | None) -> str:
    return EVENTS_MARK if (implementation or {}).get("timed") == "events" else ""


def _share(cell: dict[str, Any], ceilings: dict[str, Any], naming: bool) -> str:
    share = rates.share(cell, files.ours(cell), ceilings)
    return wording.percent(share) + (f" ({cell['ceiling']})" if naming and share is not None else "")


def _wall(implementation: dict[str, Any] | None) -> str:
    wall = (implementation or {}).get("wall_s")
    return wording.seconds(wall and wall["median"])


def _opened(panels: Sequence[rates.Panel]) -> str:
    return " open" if len(panels) <= _MOST_OPEN else ""


def _shape_heading(cells: Sequence[dict[str, Any]]) -> str:
    """The names of the sizes, as the labels have them: "batch x heads x length"."""
    names = {
        tuple(name for name, value in cell["sizes"].items() if not isinstance(value, (bool, str))) for cell in cells
    }
    return " x ".join(names.pop()) if len(names) == 1 else "shape"


def _lead(cell: dict[str, Any], name: str) -> str:
    peer = rates.implementation(cell, name)
    lead = None if peer is None else rates.lead(cell, peer)
    if lead is None:
        return "–"
    marks = (UNCLEAR_MARK if rates.unclear(files.ours(cell), peer) else "") + _events(peer)
    behind = rates.outcome(cell, peer) == rates.BEHIND
    return (f"**{wording.times(lead)}**" if behind else wording.times(lead)) + marks


def _memory(implementation: dict[str, Any] | None) -> str:
    count = (implementation or {}).get("peak_bytes")
    return "–" if count is None else wording.size(count)


def _memory_share(mine: dict[str, Any] | None, best: dict[str, Any] | None) -> str:
    own, other = ((entry or {}).get("peak_bytes") for entry in (mine, best))
    return wording.times(own / other) if own is not None and other else "–"


def _promise(promise: rates.Promise) -> str:
    limit = f"≤ {promise.limit:g} × {wording.text(promise.peer)}'s time"
    if promise.ratio is None:
        return f"{limit}: not measured"
    return f"{limit}: **{promise.ratio:.2f}** {BROKEN_MARK}" if promise.broken else f"{limit}: {promise.ratio:.2f}"


# --- The end ----------------------------------------------------------------------------------------------------------


def _costs(results: dict[str, Any], level: int) -> str:
    if not results["costs"]:
        return ""
    rows = []
    for cost in results["costs"]:
        own, peers = _cost(cost)
        rows.append((wording.text(cost["key"]), wording.text(cost.get("what")), own, peers, _cost_promise(cost)))
    title = f"{'#' * level} What is no kernel, on {results['machine']['device']}"
    loud = f"**{SAMPLE}**\n\n" if results["sample"] else ""
    loud += f"> **{SMOKE_COSTS}**\n\n" if rates.meaningless(results, "costs") else ""
    return f"{title}\n\n{loud}" + wording.table(["cost", "what", ">gptkern", "peers", "promised"], rows)


def _cost(cost: dict[str, Any]) -> tuple[str, str]:
    """gptkern's cost in words, and its peers' with what gptkern takes of each."""
    unit, own = cost.get("unit"), (cost.get("gptkern") or {}).get("median")
    peers = []
    for name, peer in (cost.get("peers") or {}).items():
        if "skipped" in peer:
            continue
        known = own is not None and peer["median"]
        ratio = f" (gptkern takes {wording.times(own / peer['median'])})" if known else ""
        peers.append(f"{wording.text(name)}: {wording.quantity(peer['median'], unit)}{ratio}")
    return "–" if own is None else wording.quantity(own, unit), "; ".join(peers) or "–"


def _cost_promise(cost: dict[str, Any]) -> str:
    promise = rates.cost_promise(cost)
    if promise is None:
        return "–"
    if promise.peer:
        limit = f"≤ {promise.limit:g} × {wording.text(promise.peer)}"
        shown = None if promise.ratio is None else f"{promise.ratio:.2f}"
    else:
        limit = f"≤ {wording.quantity(promise.limit, cost.get('unit'))}"
        shown = None if promise.ratio is None else wording.quantity(promise.ratio, cost.get("unit"))
    if shown is None:
        return f"{limit}: not measured"
    return f"{limit}: **{shown}** {BROKEN_MARK}" if promise.broken else f"{limit}: kept"


def _promises(results: dict[str, Any], level: int) -> str:
    """The promises that are broken, and how many were kept."""
    promises = rates.all_promises(results)
    if not promises:
        return ""
    broken = [promise for promise in promises if promise.broken]
    unknown = sum(promise.ratio is None for promise in promises)
    kept = len(promises) - len(broken) - unknown
    lines = [
        f"{'#' * level} Promised limits, on {results['machine']['device']}",
        f"{kept} of {len(promises)} kept, **{len(broken)} broken**, {unknown} not measured.",
    ]
    if broken:
        listed = []
        for promise in broken:
            of = f" × {wording.text(promise.peer)}'s" if promise.peer else ""
            ratio = f"{promise.ratio:.3g}{of}, promised {promise.limit:g}{of}"
            listed.append(f"- {BROKEN_MARK} {wording.text(promise.where)}: {ratio}")
        lines.append("\n".join(listed))
    return "\n\n".join(lines)


def _skipped(results: dict[str, Any], level: int) -> str:
    """Each implementation that was not measured somewhere, with each reason once."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for panel in rates.panels(results):
        for cell in panel.cells:
            for entry in cell["implementations"]:
                if not files.seconds(entry):
                    where = reasons.setdefault(entry["name"], {}).setdefault(entry.get("skipped") or "", [])
                    where.append(f"{panel.operator} {panel.direction}")
    for cost in results["costs"]:
        for name, entry in {"gptkern": cost.get("gptkern") or {}, **(cost.get("peers") or {})}.items():
            if "skipped" in entry:
                reasons.setdefault(name, {}).setdefault(entry["skipped"], []).append(cost["key"])
    if not reasons:
        return ""
    lines = []
    for name in sorted(reasons, key=lambda name: name != "gptkern"):
        for reason, where in reasons[name].items():
            places = ", ".join(
                place if where.count(place) == 1 else f"{where.count(place)} × {place}"
                for place in dict.fromkeys(where)
            )
            mark = "**" if name == "gptkern" else ""
            lines.append(
                f"- {mark}{wording.text(name)}{mark}: {wording.text(wording.cut(reason))} ({wording.text(places)})"
            )
    return f"{'#' * level} Not measured on {results['machine']['device']}\n\n" + "\n".join(lines)


# --- The README and the terminal --------------------------------------------------------------------------------------


def summary(results: dict[str, Any], link: str) -> str:
    """A few lines: who is ahead in how many cells, each operator's widest lead and loss, a few costs."""
    machine = results["machine"]
    versions = f"PyTorch {machine['torch']}" + (f", Triton {machine['triton']}" if machine.get("triton") else "")
    head = f"**[{machine['device']}]({link})**, {machine.get('date')}, {versions}: {_sample(results)}"
    costs = _few_costs(results)
    if not results["cells"]:
        return "\n\n".join([head + "no cell has been measured.", *costs])
    broken = [promise for promise in rates.all_promises(results) if promise.broken]
    kept = f" {BROKEN_MARK} {wording.count(len(broken), 'promised limit')} broken." if broken else ""
    chosen = sum(cell.get("peers_asked") is not None for cell in results["cells"])
    if chosen:
        kept += f" In {wording.count(chosen, 'cell')} not every peer was asked for."
    rows = []
    for operator in rates.operators(results):
        cells = [cell for cell in results["cells"] if cell["operator"] == operator]
        tally = rates.tally(cells)
        best, worst = _extremes(cells)
        counts = " / ".join(str(tally[name]) for name in (rates.FASTEST, rates.LEVEL, rates.BEHIND))
        rows.append((operator, counts, *(_telling(cell, results) for cell in (best, worst))))
    table = wording.table(
        ["operator", f"{rates.FASTEST} / {rates.LEVEL} / {rates.BEHIND}", "widest lead", "widest loss"], rows
    )
    loud = [f"**{provenance.SMOKE_CEILINGS}**"] if rates.meaningless(results, "ceilings") else []
    loud += [f"**{SMOKE_CELLS}**"] if rates.meaningless(results, "cells") else []
    return "\n\n".join([f"{head}{verdict(results['cells'])}.{kept}", *loud, table, *costs])


def _few_costs(results: dict[str, Any]) -> list[str]:
    """The table of README_COSTS, as far as they were measured."""
    measured = {cost["key"]: cost for cost in results["costs"]}
    rows = []
    for cost in (measured[key] for key in README_COSTS if key in measured):
        promise = rates.cost_promise(cost)
        mark = f" {BROKEN_MARK}" if promise and promise.broken else ""
        own, peers = _cost(cost)
        rows.append((wording.text(cost["key"]), own + mark, peers))
    if not rows:
        return []
    loud = [f"**{SMOKE_COSTS}**"] if rates.meaningless(results, "costs") else []
    return [*loud, wording.table(["what is no kernel", ">gptkern", "peers"], rows)]


def _telling(cell: dict[str, Any] | None, results: dict[str, Any]) -> str:
    """ "1.15× SDPA flash: forward, 4x16x4096x128 causal bfloat16, 612 TFLOP/s, 77% of the bfloat16 ceiling"."""
    if cell is None:
        return "–"
    mine, what = files.ours(cell), rates.counted([cell])
    parts = [f"{cell['direction']}, {wording.text(cell['label'])} {cell['dtype']}"]
    if what:
        parts.append(wording.rate(rates.rate(cell, mine), what))
    share = rates.share(cell, mine, results["ceilings"])
    if share is not None:
        parts.append(f"{wording.percent(share)} of the {cell['ceiling']} ceiling")
    lead = f"{wording.times(rates.lead(cell))} {wording.text(files.best_peer(cell)['name'])}"
    return (f"**{lead}** {LOST_MARK}" if _behind(cell) else lead) + f": {', '.join(parts)}"


def terminal_table(results: dict[str, Any]) -> None:
    """Print one table an operator; cells that are lost by more than noise say so."""
    from gptkern.commands import tables

    if results["sample"]:
        print(SAMPLE)
    for name, loud in (("cells", SMOKE_CELLS), ("ceilings", provenance.SMOKE_CEILINGS), ("costs", SMOKE_COSTS)):
        if rates.meaningless(results, name):
            print(loud)
    headings = ("direction", "shape", "dtype", "time", "rate", "of ceiling", "best peer", "its time / gptkern's", "")
    right = headings[3:6] + headings[7:8]
    for operator in rates.operators(results):
        panels = [panel for panel in rates.panels(results) if panel.operator == operator]
        rows = [_terminal_row(cell, results["ceilings"]) for panel in panels for cell in panel.cells]
        print()
        tables.show(f"{operator} on {results['machine']['device']}", headings, rows, right)
    print()
    if results["cells"]:
        print(verdict(results["cells"]) + ".")
    if any(_events(entry) for cell in results["cells"] for entry in cell["implementations"]):
        print(f"{EVENTS_MARK}: timed with events around plain calls, gaps between launches count.")
    for promise in (promise for promise in rates.all_promises(results) if promise.broken):
        of = f" x {promise.peer}'s" if promise.peer else ""
        print(f"BROKEN: {promise.where}: {promise.ratio:.3g}{of}, promised {promise.limit:g}{of}")


def _terminal_row(cell: dict[str, Any], ceilings: dict[str, Any]) -> tuple[str, ...]:
    mine, best = files.ours(cell), files.best_peer(cell)
    lead = rates.lead(cell)
    words = {rates.FASTEST: "ahead", rates.LEVEL: "level", rates.BEHIND: "LOST", rates.FAILED: "FAILED"}
    return (
        cell["direction"],
        cell["label"],
        cell.get("dtype") or "",
        _time(mine),
        wording.rate(rates.rate(cell, mine), rates.counted([cell])),
        wording.percent(rates.share(cell, mine, ceilings)),
        best["name"] if best else "–",
        "–" if lead is None else wording.times(lead) + _events(best),
        words.get(rates.outcome(cell), ""),
    )


def _picture_text(results: dict[str, Any], operator: str) -> str:
    return f"{_sample(results)}rates of gptkern and its peers: {operator} on {results['machine']['device']}"


def _sample(results: dict[str, Any]) -> str:
    return f"{SAMPLE}: " if results["sample"] else ""
