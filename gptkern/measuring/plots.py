"""Pictures of a results file: one SVG an operator, one small plot for each panel and direction.

A plot shows the rate of gptkern and of each peer over the panel's size, and the rate at the measured ceiling as a
dashed line. Where the ceiling changes along the panel, from bytes to operations, it shows the rate's share of the
ceiling in percent. Where a panel has one size alone, or one size twice, its plot has bars.

`drawn` is all that a picture shows, as plain data. Its digest stands in the SVG's description, so that a picture that
no longer shows the results is found without drawing it again (`digest`, `embedded_digest`). The file's last line has a
digest of all before it, so that an edit by hand is found too (`intact`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import textwrap
from pathlib import Path
from typing import Any

from gptkern.measuring import rates
from gptkern.measuring import results as files

# (colour, marker, line) of an implementation, the same in every picture. The colours are Okabe and Ito's, which
# colour-blind readers tell apart; no two implementations of one operator share a marker.
STYLES = {
    "gptkern": ("#D55E00", "o", "-"),
    "eager": ("#7F7F7F", "s", "--"),
    "compile": ("#56B4E9", "^", "-"),
    "compile max-autotune": ("#0072B2", "v", "--"),
    "SDPA flash": ("#0072B2", "D", "-"),
    "SDPA efficient": ("#56B4E9", "<", ":"),
    "SDPA cuDNN": ("#009E73", ">", "-"),
    "FlexAttention": ("#CC79A7", "P", "-"),
    "Liger-Kernel": ("#E69F00", "X", "-"),
    "flash-attn 2": ("#000000", "d", ":"),
    "flash-attn 3": ("#000000", "*", "--"),
    "flash-attn 4": ("#000000", "p", "-"),
    "quack": ("#009E73", "h", "-"),
    "bf16 linear": ("#000000", "D", "--"),
    "int_mm + dequantise": ("#0072B2", ">", "-"),
    "torchao int8": ("#009E73", "P", "-"),
    "bitsandbytes int8": ("#CC79A7", "d", "-"),
}
# Of a peer that is not listed, in turn.
OTHER_STYLES = (("#999933", "1", "-."), ("#882255", "2", "-."), ("#44AA99", "3", "-."), ("#332288", "4", "-."))

_RC = {
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "gptkern",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": "#20242b",
    "axes.labelcolor": "#20242b",
    "axes.edgecolor": "#8a919c",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "xtick.color": "#20242b",
    "ytick.color": "#20242b",
    "legend.frameon": False,
}
# A ceiling this many times above the best rate is written beside the plot: drawn, it would press the lines flat.
_FAR = 3.0
# Inches of one plot, of one bar, and of the legend's line; a plot has room for this many bars at least.
_WIDTH, _HEIGHT, _BAR, _LEGEND_LINE = 4.5, 2.9, 0.24, 0.22
_FEWEST_BARS = 3
# Letters of the title over one plot's width, and of a plot's own.
_LETTERS, _OWN_LETTERS = 44, 46
_DASHES = {"color": "#20242b", "linestyle": (0, (5, 3)), "linewidth": 1}
_MOST_COLUMNS = 3
# The share of empty places that a grid of panels and directions may have.
_HOLES = 0.35
# Ticks of the x axis that have room beside one another.
_MOST_TICKS = 9
_SAMPLE = "#b91c1c"
_PATH = re.compile(r'\bd="[^"]*"')
_DIGEST = re.compile(r"digest ([0-9a-f]{16})")
_SEAL = "<!-- sha256 of what stands above: "


def draw(results: dict[str, Any], operator: str) -> str:
    """The picture of an operator, as SVG. Needs matplotlib (gptkern[cli])."""
    import matplotlib
    from matplotlib.figure import Figure

    picture = drawn(results, operator)
    with matplotlib.rc_context(_RC):
        rows = _grid(picture["plots"])
        columns = max(map(len, rows))
        heights = [max(_plot_height(plot) for plot in row if plot) for row in rows]
        # Bars bear their names.
        named = [] if all(plot["bars"] for plot in picture["plots"]) else picture["names"]
        lines = -(-len(named) // (2 * columns))
        title = textwrap.fill(picture["title"], _LETTERS * columns)
        if picture["sample"]:
            title += "\nSAMPLE: invented numbers, not measured"
        extra = (lines + 1.5 + title.count("\n")) * _LEGEND_LINE
        size = (_WIDTH * columns + 0.2, sum(heights) + extra)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for place, row in enumerate(rows):
            for column, plot in enumerate(row):
                if plot:
                    axes = figure.add_subplot(grid[place, column])
                    (_bars if plot["bars"] else _lines)(axes, plot, picture["names"])
        figure.suptitle(title, fontsize=11.5, fontweight="bold", color=_SAMPLE if picture["sample"] else None)
        if named:
            figure.legend(handles=_legend(named), loc="outside lower center", ncols=2 * columns, handlelength=3)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": "gptkern", "Description": _description(picture)}
        figure.savefig(buffer, format="svg", facecolor="white", metadata=metadata)
    # Hundredths of a point are enough, and matplotlib leaves blanks at the ends of lines.
    svg = _PATH.sub(lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), buffer.getvalue())
    return _sealed(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))


def drawn(results: dict[str, Any], operator: str) -> dict[str, Any]:
    """All that the picture of an operator shows."""
    panels = [panel for panel in rates.panels(results) if panel.operator == operator]
    plots = [plot for panel in panels if (plot := _plot(panel, results["ceilings"]))]
    machine = results["machine"]
    return {
        "title": f"{operator} on {machine['device']}",
        "sample": results["sample"],
        "names": rates.names([cell for panel in panels for cell in panel.cells]),
        "plots": plots,
    }


def digest(results: dict[str, Any], operator: str) -> str:
    """Of what the picture shows and of how it is drawn."""
    return _digest(drawn(results, operator))


def embedded_digest(svg: str) -> str | None:
    """The digest that an SVG was drawn with, or None where it has none."""
    found = _DIGEST.search(svg)
    return found and found.group(1)


def intact(svg: str) -> bool:
    """Whether an SVG is as it was drawn: its last line has the digest of all that stands above it."""
    above, seal, _ = svg.rpartition(_SEAL)
    return bool(seal) and svg == _sealed(above)


def _sealed(svg: str) -> str:
    return f"{svg}{_SEAL}{hashlib.sha256(svg.encode()).hexdigest()} -->\n"


def _digest(picture: dict[str, Any]) -> str:
    content = json.dumps(picture, sort_keys=True, ensure_ascii=False) + Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _description(picture: dict[str, Any]) -> str:
    return f"{picture['title']}. Drawn from a results.json of gptkern bench, digest {_digest(picture)}"


def _plot(panel: rates.Panel, ceilings: dict[str, Any]) -> dict[str, Any] | None:
    """What one small plot shows, or None where nothing of the panel was timed or its rate is unknown."""
    what = rates.counted(panel.cells)
    cells = [cell for cell in panel.cells if rates.names([cell])]
    if what is None or not cells:
        return None
    xs = [rates.x_value(cell) for cell in cells]
    amounts = [rates.amount(cell, what) for cell in cells]
    least = [rates.least_seconds(cell, ceilings) for cell in cells]
    if all(least) and len({cell["ceiling"] for cell in cells}) > 1:
        what, amounts = "share", [100 * seconds for seconds in least]
    series = {name: [] for name in rates.names(cells)}
    for place, cell in enumerate(cells):
        for name in rates.names([cell]):
            time = files.seconds(rates.implementation(cell, name))
            series[name].append([place, *(amounts[place] / time[part] for part in ("median", "high", "low"))])
    limits = [
        [place, amounts[place] / seconds, cells[place]["ceiling"]] for place, seconds in enumerate(least) if seconds
    ]
    # The picture's title has the operator, the plot's second line the direction.
    name = panel.name
    for known in (f"{panel.operator}, ", f"{panel.direction}, "):
        name = name.removeprefix(known)
    return {
        "panel": name,
        "direction": panel.direction,
        "what": what,
        "x": cells[0].get("x"),
        "xs": xs,
        "labels": [cell.get("label") or cell["key"] for cell in cells],
        # Over one size alone there is no line to draw, and with a size twice none that could be read.
        "bars": None in xs or len(set(xs)) < max(2, len(xs)),
        "series": series,
        "limits": limits,
    }


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _grid(plots: list[dict]) -> list[list[dict | None]]:
    """Rows of plots: a row a panel and a column a direction where that leaves few holes, else as they come."""
    panels = list(dict.fromkeys(plot["panel"] for plot in plots))
    directions = list(dict.fromkeys(plot["direction"] for plot in plots))
    places = len(panels) * len(directions)
    if 1 < len(directions) <= _MOST_COLUMNS and places - len(plots) <= _HOLES * places:
        at = {(plot["panel"], plot["direction"]): plot for plot in plots}
        return [[at.get((panel, direction)) for direction in directions] for panel in panels]
    columns = min(_MOST_COLUMNS, len(plots)) if len(plots) != 4 else 2
    rows = [list(plots[start : start + columns]) for start in range(0, len(plots), columns)]
    return [row + [None] * (columns - len(row)) for row in rows]


def _plot_height(plot: dict) -> float:
    if not plot["bars"]:
        return _HEIGHT
    return _BAR * max(len(_bar_rows(plot)), _FEWEST_BARS) + 1.1


def _lines(axes, plot: dict, names: list[str]) -> None:
    scale, unit = _unit(plot)
    xs = plot["xs"]
    for name, points in plot["series"].items():
        style = _line_style(name, names)
        at = [xs[place] for place, *_ in points]
        values, lows, highs = ([rate / scale for rate in part] for part in list(zip(*points))[1:])
        axes.fill_between(at, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(at, values, zorder=4 if name == "gptkern" else 3, **style)
    axes.set_xscale("log", base=2)
    ticks = _apart(xs)
    axes.set_xticks(ticks, [_short(x) for x in ticks])
    axes.minorticks_off()
    # Room for the markers at both ends.
    axes.set_xlim(min(xs) / 1.25, max(xs) * 1.25)
    axes.set_xlabel(plot["x"])
    axes.set_ylabel(unit)
    axes.set_title(_title(plot), loc="left", fontweight="bold")
    _y_axis_and_ceiling(axes, plot, scale, unit)


def _y_axis_and_ceiling(axes, plot: dict, scale: float, unit: str) -> None:
    """The ceiling as a dashed line, with its name in the corner above it."""
    best = _best(plot) / scale
    limits = [(plot["xs"][place], limit / scale) for place, limit, _ in plot["limits"]]
    nearest = min((limit for _, limit in limits), default=0)
    far = nearest > _FAR * best
    top = max([best, *(limit for _, limit in limits if not far)])
    axes.set_ylim(0, top * (1.17 if limits else 1.08))
    axes.yaxis.set_major_formatter(_number)
    if not limits:
        return
    if far:
        pass
    elif math.isclose(nearest, max(limit for _, limit in limits)):
        axes.axhline(nearest, zorder=2, **_DASHES)
    else:
        axes.plot(*zip(*limits), zorder=2, **_DASHES)
    text = ("↑  " if far else "") + _ceiling_text(plot, unit, scale)
    axes.text(0.01, 0.985, text, transform=axes.transAxes, ha="left", va="top", fontsize=8, zorder=6)


def _title(plot: dict) -> str:
    one = f": {plot['labels'][0]}" if plot["bars"] and len(plot["labels"]) == 1 else ""
    return "\n".join(textwrap.fill(line, _OWN_LETTERS) for line in (plot["panel"], plot["direction"] + one))


def _bar_rows(plot: dict) -> list[tuple[int, str]]:
    """(place of the cell, name) of each bar from the top; (place, "") above each cell's where there are several."""
    rows = []
    for place in range(len(plot["xs"])):
        timed = [name for name, points in plot["series"].items() if any(point[0] == place for point in points)]
        heading = [(place, "")] if len(plot["xs"]) > 1 else []
        rows += heading + [(place, name) for name in timed]
    return rows


def _bars(axes, plot: dict, names: list[str]) -> None:
    scale, unit = _unit(plot)
    rows = _bar_rows(plot)
    best = _best(plot) / scale
    limits = {place: limit / scale for place, limit, _ in plot["limits"]}
    near = [limit for limit in limits.values() if limit <= _FAR * best]
    right = max([best * 1.22, *(limit * 1.06 for limit in near)])
    labels = []
    for at, (place, name) in enumerate(rows):
        labels.append(name)
        if not name:
            axes.text(0, at + 0.1, plot["labels"][place], va="center", fontsize=8, style="italic")
            continue
        point = next(point for point in plot["series"][name] if point[0] == place)
        _, value, low, high = (part / scale for part in point)
        quartiles = {"xerr": [[value - low], [high - value]], "error_kw": {"elinewidth": 1}}
        axes.barh(at, value, height=0.72, color=_style(name, names)[0], **quartiles)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        axes.text(high + right * 0.015, at, _number(value), va="center", fontsize=8, zorder=6, bbox=box)
    for place, limit in limits.items():
        if limit in near:
            own = [at for at, row in enumerate(rows) if row[0] == place and row[1]]
            axes.plot([limit] * 2, [min(own) - 0.5, max(own) + 0.5], zorder=5, **_DASHES)
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_ylim(max(len(rows), _FEWEST_BARS) - 0.4, -0.6)
    axes.set_xlim(0, right)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(_number)
    axes.set_xlabel(unit + (f"    ({'' if near else '→  '}{_ceiling_text(plot, unit, scale)})" if limits else ""))
    axes.set_title(_title(plot), loc="left", fontweight="bold")


def _ceiling_text(plot: dict, unit: str, scale: float) -> str:
    """ "- - bfloat16 ceiling 790 TFLOP/s"; without the number where it differs along the plot."""
    kinds = " and ".join(dict.fromkeys(name for *_, name in plot["limits"]))
    if plot["what"] == "share":
        return f"- -  {kinds} ceiling"
    values = {_number(limit / scale) for _, limit, _ in plot["limits"]}
    return f"- -  {kinds} ceiling" + (f" {values.pop()} {unit}" if len(values) == 1 else "")


def _legend(names: list[str]) -> list:
    from matplotlib.lines import Line2D

    return [Line2D([], [], label=name, **_line_style(name, names)) for name in names]


def _line_style(name: str, names: list[str]) -> dict[str, Any]:
    colour, marker, line = _style(name, names)
    width, size = (2.4, 6.5) if name == "gptkern" else (1.2, 5)
    return {
        "color": colour, "marker": marker, "linestyle": line, "linewidth": width, "markersize": size,
        "markeredgecolor": "white", "markeredgewidth": 0.4,
    }  # fmt: skip


def _style(name: str, names: list[str]) -> tuple[str, str, str]:
    if name in STYLES:
        return STYLES[name]
    others = [other for other in names if other not in STYLES]
    return OTHER_STYLES[others.index(name) % len(OTHER_STYLES)]


def _best(plot: dict) -> float:
    return max(point[3] for points in plot["series"].values() for point in points)


def _apart(xs: list[float]) -> list[float]:
    """Those of some rising sizes whose labels have room on a logarithmic axis: the last, and others from the left."""
    room = math.log(xs[-1] / xs[0]) / _MOST_TICKS
    kept = []
    for x in xs[:-1]:
        if math.log(xs[-1] / x) >= room and (not kept or math.log(x / kept[-1]) >= room):
            kept.append(x)
    return [*kept, xs[-1]]


def _unit(plot: dict) -> tuple[float, str]:
    """(what to divide rates by, their unit)."""
    if plot["what"] == "bytes":
        return 1e9, "GB/s"
    if plot["what"] == "tokens":
        return 1.0, "tokens/s"
    if plot["what"] == "share":
        return 1.0, "% of the ceiling"
    name = "OP/s" if plot["what"] == "ops" else "FLOP/s"
    scale, prefix = (1e12, "T") if _best(plot) >= 1e12 else (1e9, "G")
    return scale, prefix + name


def _number(value: float, _=None) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(x: float) -> str:
    """16384 -> "16K"."""
    return f"{x / 1024:g}K" if x >= 1024 and x % 1024 == 0 else f"{x:g}"
