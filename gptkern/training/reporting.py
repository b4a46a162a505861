"""report.html: a training in one file that needs nothing else, made from the lines of its metrics.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptkern import formatting as form
from gptkern.backends.tables import files
from gptkern.training import pages
from gptkern.training.errors import kept

# Points of a curve; of a longer run a point is the mean over several steps.
MOST_POINTS = 1500
# The training loss of the table is the mean over this many last steps.
LAST_STEPS = 20


class Report(NamedTuple):
    """What the page says.

    Args:
        title: a heading. status: how the training ended, in a sentence. kind: "good", "bad" or "wait", its colour.
        lines: of metrics.jsonl. recipe: the keys and values of the training. facts: (what, value), for people.
        unit: what a loss is counted by, "token" or "byte".
    """

    title: str
    status: str
    kind: str
    lines: Iterable[Mapping[str, Any]]
    recipe: Mapping[str, Any]
    facts: Sequence[tuple[str, str]] = ()
    unit: str = "token"


def write(path: Path, report: Report) -> None:
    """Write the page; one that is there stays whole until the new one is. Raises RunError where it cannot."""
    with kept(path):
        files.replace(path, render(report))


def render(report: Report) -> str:
    curves = Curves()
    for line in report.lines:
        curves.add(line)
    rows = [(name, form.NONE if value is None else _shown(value)) for name, value in report.recipe.items()]
    parts = [
        f"<h1>{pages.text(report.title)}</h1>",
        f'<div class="card"><strong class="{report.kind}">{pages.text(report.status)}</strong></div>',
        _curves(curves, report.unit),
        "<h2>Recipe</h2>\n" + pages.table(("", ""), rows),
        "<h2>Run</h2>\n" + pages.table(("", ""), report.facts) if report.facts else "",
    ]
    return pages.page(report.title, parts)


class Curves:
    """The lines of a run, of any number, in `MOST_POINTS` at most: neighbours are averaged once these are reached."""

    NAMES = ("step", "loss", "grad_norm", "lr", "tokens_per_second")

    def __init__(self):
        self.points: list[list[float]] = []  # one for each of NAMES
        self.validations: list[tuple[int, float]] = []
        self.last: list[float] = []  # losses
        self.speeds: list[float] = []
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self._each, self._open = 1, []

    def add(self, line: Mapping[str, Any]) -> None:
        values = [float("nan") if line.get(name) is None else float(line[name]) for name in self.NAMES]
        self.steps, self.tokens = line["step"], self.tokens + int(line.get("tokens") or 0)
        self.seconds = line.get("seconds") or self.seconds
        if line.get("untrained_validation_loss") is not None:
            self.validations.append((0, line["untrained_validation_loss"]))
        if line.get("validation_loss") is not None:
            self.validations.append((line["step"], line["validation_loss"]))
        self.last = [*self.last, values[1]][-LAST_STEPS:]
        self._open.append(values)
        if len(self._open) == self._each:
            self.points.append(_means(self._open))
            self._open = []
        if len(self.points) >= 2 * MOST_POINTS:
            self.points = [_means(pair) for pair in zip(self.points[::2], self.points[1::2])]
            self._each *= 2

    def column(self, name: str) -> list[float]:
        points = [*self.points, *([_means(self._open)] if self._open else [])]
        return [point[self.NAMES.index(name)] for point in points]


def _means(points: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*points)]


def _curves(curves: Curves, unit: str) -> str:
    if not curves.steps:
        return "<p>No update was done.</p>"
    steps = curves.column("step")
    thin = {"color": pages.SECOND, "linewidth": 1.1}
    losses = [pages.Line("training", steps, curves.column("loss"), thin)]
    if curves.validations:
        style = {"color": pages.FIRST, "marker": "o", "markersize": 4, "linewidth": 1.1}
        losses.append(pages.Line("held-out part", *zip(*curves.validations), style))
    norms = curves.column("grad_norm")
    plots = [pages.Axes(f"loss, nats per {unit}", losses)]
    if any(value > 0 for value in norms):
        plots.append(pages.Axes("gradient norm", [pages.Line("", steps, norms, thin)], logarithmic=True))
    plots += [
        pages.Axes(label, [pages.Line("", steps, curves.column(name), thin)])
        for label, name in (("learning rate", "lr"), ("tokens/s", "tokens_per_second"))
        if not all(map(math.isnan, curves.column(name)))
    ]
    speeds = [speed for speed in curves.column("tokens_per_second") if not math.isnan(speed)]
    headings = (f">training loss, mean of the last {LAST_STEPS} updates", ">held-out loss", ">perplexity", ">updates",
                ">tokens", ">median tokens/s", ">seconds")  # fmt: skip
    held_out = curves.validations[-1][1] if curves.validations else None
    row = (
        f"{math.fsum(curves.last) / len(curves.last):.4f}",
        *((form.NONE,) * 2 if held_out is None else (f"{held_out:.4f}", f"{math.exp(min(held_out, 700)):.4g}")),
        f"{curves.steps:,}", f"{curves.tokens:,}",
        f"{statistics.median(speeds):,.0f}" if speeds else form.NONE, f"{curves.seconds:,.0f}",
    )  # fmt: skip
    drawn = pages.plot(plots, size=(8.6, 2.2 + 1.5 * len(plots)), label="loss, gradient norm, learning rate, speed")
    return (
        f'<h2>Curves</h2>\n<div class="card">{drawn}</div>\n{pages.table(headings, [row])}'
        f'<p class="soft">Losses in nats per {pages.text(unit)}: the whole update\'s, and the mean over held-out rows.'
        "</p>"
    )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
