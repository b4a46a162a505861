"""The report's plots: matplotlib draws them, as SVG that takes its colours from the page's style."""

from __future__ import annotations

import io
import re

from gptkern.commands.findings import Findings

# Colours that the page redefines for its light and its dark form: they stand in the SVG as these and are replaced.
_COLOURS = {"#010101": "var(--ink)", "#020202": "var(--faint)", "#030303": "var(--stock)", "#040404": "var(--swapped)"}
_INK, _FAINT, _STOCK, _SWAPPED = _COLOURS

_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.hashsalt": "gptkern",
}


def losses(findings: Findings) -> str:
    """Training and validation loss of both trainings over the steps."""
    figure, axes = _figure(3.9)
    shown = [
        ("stock", findings.stock, dict(color=_STOCK, linewidth=3.5, alpha=0.45), "o"),
        ("swapped", findings.swapped, dict(color=_SWAPPED, linewidth=1.1), "x"),
    ]
    for name, curve, style, _ in shown:
        steps = range(1, len(curve.losses) + 1)
        axes.plot(steps, curve.losses, label=f"{name}, training", **style)
    for name, curve, style, marker in shown:
        if curve.validations:
            steps, values = zip(*curve.validations)
            axes.plot(
                steps, values, linestyle="none", marker=marker, markersize=8 if marker == "o" else 6,
                color=style["color"], alpha=style.get("alpha", 1), markeredgewidth=1.5, label=f"{name}, validation",
            )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per byte")
    axes.set_xlim(0, max(2, findings.steps_done) * 1.01)
    axes.legend(ncols=2)
    return _svg(figure, "Training and validation loss of the stock and of the swapped model")


def differences(findings: Findings) -> str:
    """|stock - swapped| of the training loss; steps where it is zero have no point."""
    figure, axes = _figure(2.4)
    points = [(step, value) for step, value in enumerate(findings.differences, 1) if value > 0]
    axes.semilogy(*zip(*points), linestyle="none", marker=".", markersize=3, color=_SWAPPED, label="each step")
    axes.axhline(findings.loss_bound, color=_INK, linewidth=1, linestyle="--", label="the bound")
    axes.set_xlabel("step")
    axes.set_ylabel("|stock − swapped|, nats")
    axes.set_xlim(0, max(2, findings.steps_done) * 1.01)
    axes.legend(ncols=2, markerscale=3)
    return _svg(figure, "Difference of the training losses, step by step")


def _figure(height: float):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update(_STYLE)
    return pyplot.subplots(figsize=(8.6, height), layout="constrained")


def _svg(figure, title: str) -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # No metadata (it holds addresses), no fixed font, and as wide as the page allows.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(font: [0-9.]+px)[^;\"]*", r"\1 var(--sans)", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
