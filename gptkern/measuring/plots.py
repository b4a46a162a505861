"""Pictures of a results file: one SVG an operator, one small plot for each panel and direction.

A plot shows the rate of gptkern and of each peer over the panel's cells, with its quartiles, and the rate at the
measured ceiling as a dashed line. Where the ceiling changes along the panel, from bytes to operations, it shows the
rate's share of the ceiling in percent.
"""

from __future__ import annotations

import io
import re
import textwrap
from typing import Any

from gptkern import formatting as form
from gptkern.measuring import peers, rates

# Of the implementations in the order of peers.NAMES, the same in every picture. The colours are Okabe and Ito's, which
# colour-blind readers tell apart, and come again; no two implementations share a marker.
COLOURS = ("#D55E00", "#7F7F7F", "#56B4E9", "#0072B2", "#000000", "#E69F00", "#009E73", "#CC79A7")
MARKERS = "os^vD<>PXd*ph1234+x"

_RC = {
    "svg.fonttype": "none",  # text stays text: small files that can be searched
    "svg.hashsalt": "gptkern",  # the same names of shapes on every run
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "legend.frameon": False,
}
_DASHES = {"color": "#20242b", "linestyle": "--", "linewidth": 1}
PERCENT = "% of the ceiling"
# A ceiling this many times above the best rate is written and not drawn: it would press the lines flat.
_FAR = 3.0
# Inches of one plot; plots beside one another; letters of a plot's title.
_WIDTH, _HEIGHT, _COLUMNS, _LETTERS = 4.5, 2.9, 3, 46


def draw_all(results: dict[str, Any]) -> dict[str, str]:
    """Operator -> its picture as SVG, where it has anything to show. Needs matplotlib (gptkern[cli])."""
    drawn = {operator: plots_of(results, operator) for operator in rates.by_operator(results)}
    device = results["machine"]["device"]
    return {operator: _draw(f"{operator} on {device}", plots) for operator, plots in drawn.items() if plots}


def plots_of(results: dict[str, Any], operator: str) -> list[dict[str, Any]]:
    """What each small plot of an operator shows, as plain data."""
    found = (_plot(panel, results["ceilings"]) for panel in rates.by_operator(results)[operator])
    return [plot for plot in found if plot]


def _plot(panel: rates.Panel, ceilings: dict[str, Any]) -> dict[str, Any] | None:
    """None where nothing of the panel was timed or its rate is unknown."""
    cells = [cell for cell in panel.cells if rates.names([cell])]
    unit = rates.unit(cells)
    if unit is None or not cells:
        return None
    amounts = [rates.amount(cell, unit) for cell in cells]
    least = [rates.least_seconds(cell, ceilings) for cell in cells]
    kinds = list(dict.fromkeys(cell["ceiling"] for cell, seconds in zip(cells, least) if seconds))
    if all(least) and len(kinds) > 1:
        unit, amounts = PERCENT, [100 * seconds for seconds in least]
    series: dict[str, list] = {name: [] for name in rates.names(cells)}
    for place, cell in enumerate(cells):
        for name in rates.names([cell]):
            time = rates.seconds(rates.implementation(cell, name))
            series[name].append((place, *(amounts[place] / time[part] for part in ("median", "high", "low"))))
    xs = [rates.x_value(cell) for cell in cells]
    return {
        "title": f"{panel.name.removeprefix(f'{panel.operator}, ')}: {panel.direction}",
        "unit": unit,
        "x": cells[0].get("x"),
        # One size twice, or none: the whole shape tells the cells apart.
        "ticks": [cell["label"] for cell in cells] if None in xs or len(set(xs)) < len(xs) else [f"{x:g}" for x in xs],
        # name -> (place among the ticks, rate, the rate at the upper quartile's time, at the lower one's)
        "series": series,
        "limits": {place: amounts[place] / seconds for place, seconds in enumerate(least) if seconds},
        "ceiling": " and ".join(kinds),
    }


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _draw(title: str, plots: list[dict[str, Any]]) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(name for plot in plots for name in plot["series"]))
    columns = 2 if len(plots) == 4 else min(_COLUMNS, len(plots))
    rows = [plots[start : start + columns] for start in range(0, len(plots), columns)]
    with matplotlib.rc_context(_RC):
        legend = -(-len(names) // (2 * columns)) * 0.22
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * len(rows) + legend + 0.5), layout="constrained")
        grid = figure.add_gridspec(len(rows), columns)
        for place, plot in enumerate(plots):
            axes = figure.add_subplot(grid[divmod(place, columns)])
            axes.set_title(textwrap.fill(plot["title"], _LETTERS), loc="left", fontsize=9, fontweight="bold")
            _lines(axes, plot)
        figure.suptitle(title, fontsize=11.5, fontweight="bold")
        handles = [Line2D([], [], label=name, **_style(name)) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": "gptkern"})
    # Hundredths of a point are enough, and matplotlib leaves blanks at the ends of lines.
    svg = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), buffer.getvalue())
    return re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE)


def _lines(axes, plot: dict) -> None:
    best = max(point[3] for points in plot["series"].values() for point in points)
    scale, prefix = 1.0, ""
    if plot["unit"] not in ("tokens/s", PERCENT):
        scale, prefix = (1e12, "T") if best >= 1e12 and plot["unit"] != "B/s" else (1e9, "G")
    count = len(plot["series"])
    for number, (name, points) in enumerate(plot["series"].items()):
        places, *rest = zip(*points)
        # Over a single cell the points stand beside one another.
        moved = 0.7 * (number + 0.5) / count - 0.35 if len(plot["ticks"]) == 1 else 0.0
        values, lows, highs = ([rate / scale for rate in part] for part in rest)
        off = [[v - low for v, low in zip(values, lows)], [high - v for v, high in zip(values, highs)]]
        order = 4 if name == "gptkern" else 3
        axes.errorbar([p + moved for p in places], values, off, elinewidth=1, zorder=order, **_style(name))
    near = {place: limit / scale for place, limit in plot["limits"].items() if limit <= _FAR * best}
    axes.hlines(near.values(), [place - 0.4 for place in near], [place + 0.4 for place in near], **_DASHES)
    slanted = {"rotation": 20, "ha": "right"} if max(map(len, plot["ticks"])) > 6 else {}
    axes.set_xticks(range(len(plot["ticks"])), plot["ticks"], fontsize=8, **slanted)
    axes.set_xlim(-0.4, len(plot["ticks"]) - 0.6)
    axes.set_ylim(0, 1.08 * max([best / scale, *near.values()]))
    axes.set_xlabel(f"{plot['x']}    {_ceiling(plot)}")
    axes.set_ylabel(prefix + plot["unit"])


def _ceiling(plot: dict) -> str:
    """ "- - bfloat16 ceiling 790 TFLOP/s"; without the number where it differs along the plot."""
    values = set(plot["limits"].values())
    if not values:
        return ""
    known = "" if plot["unit"] == PERCENT else f" {form.rate(min(values), plot['unit'])}"
    return f"- - {plot['ceiling']} ceiling" + (known if max(values) < 1.001 * min(values) else "")


def _style(name: str) -> dict[str, Any]:
    known = ("gptkern", *peers.NAMES)
    place, ours = known.index(name) if name in known else len(known), name == "gptkern"
    look = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place]}
    return look | {"linewidth": 2.4 if ours else 1.2, "markersize": 6.5 if ours else 5}
