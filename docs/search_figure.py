"""The ways of studies side by side: prints the table of docs/search.md, and draws docs/figures/search.svg.

python docs/search_figure.py STUDY…
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from gptkern import formatting as form
from gptkern.training.search import report
from gptkern.training.search.study import FINISHED, WAYS, Study, Trial

FIGURE = Path(__file__).resolve().parent / "figures" / "search.svg"
# Seen on a light page and on a dark one.
COLOURS = {"experience": "#6b7280", "experiment": "#d97706", "learning": "#3b72e8"}
DASHES = ("-", "--", ":")


def table(studies: dict[str, list[Trial]]) -> str:
    rows = []
    for name, trials in studies.items():
        for way in WAYS:
            own = [trial for trial in trials if trial.way == way]
            done = [trial for trial in own if trial.state == FINISHED]
            if not own:
                continue
            first = min(done, key=lambda trial: trial.loss, default=None)
            said = (form.NONE, form.NONE) if first is None else (f"{first.loss:.4f}", _params(first))
            tokens, seconds = sum(trial.tokens for trial in own), sum(trial.seconds for trial in own)
            rows.append(
                (name, way, said[0], str(len(own)), str(len(done)), f"{tokens:,}", f"{seconds / 60:.1f}", said[1])
            )
    headings = ("seed", "way", ">best held-out loss", ">trials", ">finished", ">tokens", ">minutes", "its parameters")
    return form.table(headings, rows)


def _params(trial: Trial) -> str:
    values = ((key, f"{value:.3g}" if isinstance(value, float) else str(value)) for key, value in trial.params.items())
    return ", ".join(f"{key} {value}" for key, value in values)


def figure(studies: dict[str, list[Trial]], eta: int, rungs: int) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    grey = COLOURS["experience"]
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "gptkern", "text.color": grey, "axes.labelcolor": grey,
        "axes.grid": True, "axes.edgecolor": grey, "grid.color": grey, "grid.alpha": 0.25,
        "xtick.color": grey, "ytick.color": grey, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawn = Figure(figsize=(7.6, 3.4), layout="constrained")
        axes = drawn.subplots()
        for dash, (name, trials) in zip(DASHES, studies.items()):
            for way, colour in COLOURS.items():
                history = [one for one in report.spent(trials, way, eta, rungs) if one.lowest is not None]
                x, y = [one.tokens / 1e6 for one in history], [one.lowest for one in history]
                look = {"color": colour, "linewidth": 1.3, "linestyle": dash, "where": "post"}
                axes.step(x, y, label=f"{way}, seed {name}", marker="D" if len(x) == 1 else "", markersize=4, **look)
        axes.set_xlabel("million tokens trained on by the way's trials")
        axes.set_ylabel("lowest held-out loss, nats per token")
        axes.legend(ncols=len(studies), fontsize=8)
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    return re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def main(folders: list[str]) -> None:
    studies, halving = {}, (2, 4)
    for folder in folders:
        with Study(folder, "STUDY") as study:
            studies[str(study.about["seed"])] = study.trials()
            halving = study.about["eta"], study.about["rungs"]
    print(table(studies))
    FIGURE.write_text(figure(studies, *halving), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
