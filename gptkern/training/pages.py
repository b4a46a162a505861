"""HTML pages that need nothing else, readable in a light and in a dark browser, with curves drawn by matplotlib."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

STYLE = """
:root { --page: #fbfbf9; --card: #ffffff; --ink: #20242b; --soft: #5c6470; --faint: #d9dce1;
        --first: #d97706; --second: #1d4ed8; --good: #15803d; --bad: #b91c1c; --wait: #a16207; }
@media (prefers-color-scheme: dark) {
:root { --page: #14171c; --card: #1b1f26; --ink: #e6e8eb; --soft: #9aa3af; --faint: #343a44;
        --first: #f59e0b; --second: #7aa2ff; --good: #4ade80; --bad: #f87171; --wait: #facc15; } }
body { background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; color-scheme: light dark;
       max-width: 920px; margin: 0 auto; padding: 40px 24px; }
h2 { font-size: 20px; margin-top: 40px; }
.soft, th { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
.card { background: var(--card); border: 1px solid var(--faint); border-radius: 8px; padding: 9px 20px; margin: 9px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--faint); vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
pre { font-size: 13px; white-space: pre-wrap; overflow-wrap: anywhere; } mark { background: none; color: var(--soft); }
"""

# matplotlib knows no CSS variables: these colours are replaced by them.
INK, FAINT, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "--ink", FAINT: "--faint", FIRST: "--first", SECOND: "--second"}


def page(title: str, parts: Sequence[str]) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body>\n</html>\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. A heading that starts with > is of numbers, as in `formatting`."""
    kinds = [' class="number"' if heading.startswith(">") else "" for heading in headings]

    def line(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, row)) + "</tr>"

    head = [line("th", [heading.removeprefix(">") for heading in headings])] if any(headings) else []
    return "\n".join(['<div class="scroll"><table>', *head, *(line("td", row) for row in rows), "</table></div>"])


def text(value: str) -> str:
    return html.escape(value)


class Line(NamedTuple):
    """One line of a plot, and how matplotlib draws it."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: dict[str, Any]


class Axes(NamedTuple):
    """One plot; those of a figure share their x axis."""

    ylabel: str
    lines: Sequence[Line]
    logarithmic: bool = False


def plot(plots: Sequence[Axes], *, size: tuple[float, float], label: str, xlabel: str = "step") -> str:
    """The plots, one below the other, as SVG in the page's colours, as wide as the page."""

    def make(figure: Figure) -> None:
        heights = [2.2, *[1] * (len(plots) - 1)]
        rows = figure.subplots(len(plots), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for axes, drawn in zip(rows, plots):
            for line in drawn.lines:
                axes.plot(line.x, line.y, label=line.label, **line.style)
            axes.set_ylabel(drawn.ylabel)
            if drawn.logarithmic:
                axes.set_yscale("log")
                plain(axes.yaxis)
            if len(drawn.lines) > 1:
                axes.legend(ncols=2)
        rows[-1].set_xlabel(xlabel)

    return figure(make, size=size, label=label)


def plain(axis: Axis) -> None:
    """Numbers beside a logarithmic axis: powers are set by a parser of TeX, which takes longer than all the rest."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def figure(make: Callable[[Figure], None], *, size: tuple[float, float], label: str) -> str:
    """What `make` draws on a figure of so many inches, as SVG in the page's colours, as wide as the page."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "gptkern", "text.color": INK, "axes.labelcolor": INK, "axes.grid": True,
        "axes.edgecolor": FAINT, "grid.color": FAINT, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=size, layout="constrained")
        make(drawn)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    # No metadata (it holds addresses), and as wide as the page allows.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
