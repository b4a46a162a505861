"""report.html of a study: the ways side by side, what became of each trial, which parameters mattered.

One page that needs nothing else, made of what the study was begun with and of its trials alone. Only losses of finished
trials are compared, which have all been trained on the same number of tokens within rounding.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptkern import formatting as form
from gptkern.backends.tables import files
from gptkern.training import pages
from gptkern.training.errors import kept
from gptkern.training.search import sampling
from gptkern.training.search.settings import Settings
from gptkern.training.search.space import Choices, Range
from gptkern.training.search.study import FINISHED, PAUSED, PRUNED, STOPPED, WORST, Study, Trial, best

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the trials with a loss; of more the best are drawn and listed, and how many were left out is said.
MOST_DRAWN, MOST_LISTED = 1500, 200
# That an importance is told from: PED-ANOVA compares the best quarter with all, so that it has four.
LEAST_TRIALS = 16
BEST_PART = 0.25
_COLUMNS, _WIDTH, _HEIGHT = 3, 8.6, 2.6  # of the slices: a row's, and inches

# Colour, marker and line of a way.
_STYLES = {
    "experience": (pages.INK, "D", ":"), "experiment": (pages.FIRST, "o", "-"), "learning": (pages.SECOND, "s", "--"),
}  # fmt: skip
_MEANING = {
    "experience": "rules of others, nothing searched",
    "experiment": "{method}, with successive halving",
    "learning": "Optuna's {sampler}, pruner: {pruner}",
}


class Spent(NamedTuple):
    """What a way had spent when a trial of it had ended, or had come to a rung.

    Args:
        tokens: trained on by all of its trials until then. lowest: the lowest loss of a finished one, or None.
    """

    tokens: int
    lowest: float | None


def write(path: Path, study: Study) -> None:
    """Write the page; one that is there stays whole until the new one is.

    Raises:
        UserError: the study is damaged. RunError: the page cannot be written.
    """
    content = render(Settings.of(study.about), study.trials(), study.about)
    with kept(path):
        files.replace(path, content)


def render(settings: Settings, trials: Sequence[Trial], about: dict[str, Any]) -> str:
    """The page. `about` may have more of the study than its settings: "data", "versions"."""
    unit = unit_of(about)
    parts = [
        f"<h1>{pages.text(_title(about))}</h1>",
        _status(trials, unit),
        "<h2>The ways, side by side</h2>\n" + _ways(settings, trials, unit),
        "<h2>History</h2>\n" + _history(settings, trials, unit),
        "<h2>Importances</h2>\n" + _importances(settings, trials),
        "<h2>Slices</h2>\n" + _slices(settings, trials, unit),
        "<h2>Trials</h2>\n" + _trials(settings, trials),
        "<h2>By experience</h2>\n" + _advice(settings) if settings.advice else "",
        "<h2>Study</h2>\n" + pages.table(("", ""), _facts(settings, about)),
    ]
    return pages.page(_title(about), parts)


def spent(trials: Sequence[Trial], way: str, eta: int, rungs: int) -> list[Spent]:
    """The history of a way: its trials in the order in which they were begun; by experiment, where all of a rung are
    trained before one goes on, bracket by bracket and rung by rung.

    Args:
        eta, rungs: of successive halving.
    """
    parts = []  # (bracket, rung, number), tokens, the loss where the trial is finished with them
    for trial in trials:
        if trial.way != way:
            continue
        ends = [trial.steps * eta**rung // eta ** (rungs - 1) for rung in range(rungs)]
        reached, before = [end for end in ends if end < trial.step] if way == "experiment" else [], 0
        for rung, end in enumerate([*reached, trial.step]):
            is_end = end == trial.step and trial.state == FINISHED and _is_number(trial.loss)
            order = trial.bracket, rung, trial.number
            parts.append((order, trial.tokens_at(end - before), trial.loss if is_end else math.inf))
            before = end
    found: list[Spent] = []
    tokens, lowest = 0, math.inf
    for _, more, loss in sorted(parts):
        tokens, lowest = tokens + more, min(lowest, loss)
        found.append(Spent(tokens, lowest if lowest < math.inf else None))
    return found


def importances(settings: Settings, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """(key -> part of 1, the largest first; of what it was told), or ({}, why there is none).

    PED-ANOVA: how much of what sets the best quarter of the trials apart is a parameter's own. Losses are those after
    the last part of a trial that enough of them have reached.

    Source: Watanabe, Bansal, Hutter, 2023 (arXiv:2304.10255), as Optuna computes it.
    """
    space = settings.space.parameters
    known = [trial for trial in trials if trial.params.keys() >= space.keys() and _fits(settings, trial)]
    by_part = {part: _losses_at(settings, known, part) for part in range(settings.parts, 0, -1)}
    part = next((part for part, losses in by_part.items() if len(losses) >= LEAST_TRIALS), None)
    if len(space) < 2:
        return {}, "One parameter is varied: there is none to compare it with."
    if part is None:
        most = form.count(max(map(len, by_part.values()), default=0), "trial")
        return {}, f"{most} of the space have a held-out loss after the same part; it needs {LEAST_TRIALS}."
    losses = by_part[part]
    if len(set(losses.values())) < 2:
        return {}, "All of the trials have the same loss."
    if importlib.util.find_spec("optuna") is None:
        return {}, "Optuna, which computes them, is not installed (the extra search)."
    with sampling.quiet():
        import optuna

        distributions = {key: sampling.distribution(key, parameter) for key, parameter in space.items()}
        study = optuna.create_study()
        study.add_trials(
            [
                optuna.trial.create_trial(
                    value=losses[trial.number], params={key: trial.params[key] for key in space},
                    distributions=distributions,
                )
                for trial in known
                if trial.number in losses
            ]
        )  # fmt: skip
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=BEST_PART)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    of = "all of their steps" if part == settings.parts else f"part {part} of {settings.parts}"
    told = f"PED-ANOVA of {len(losses)} trials after {of}: what sets the best quarter apart."
    return {key: float(value) for key, value in sorted(found.items(), key=lambda pair: -pair[1])}, told


# --- What is compared -------------------------------------------------------------------------------------------------


def _losses_at(settings: Settings, trials: Sequence[Trial], part: int) -> dict[int, float]:
    """Trial's number -> its loss after a part."""
    found = {trial.number: trial.values.get(trial.steps * part // settings.parts) for trial in trials}
    return {number: loss for number, loss in found.items() if _is_number(loss)}


def _fits(settings: Settings, trial: Trial) -> bool:
    """Whether the space has the trial's values: those of experience it may not have."""
    for key, parameter in settings.space.parameters.items():
        value = trial.params[key]
        inside = parameter.low <= value <= parameter.high if isinstance(parameter, Range) else value in parameter.values
        if not inside:
            return False
    return True


def _is_number(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _value(settings: Settings, trial: Trial, key: str) -> Any:
    return trial.params.get(key, settings.base[key])


# --- Parts of the page ------------------------------------------------------------------------------------------------


def _title(about: dict[str, Any]) -> str:
    data = about.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    return f"Search: {name}" if isinstance(name, str) else "Search"


def unit_of(about: dict[str, Any]) -> str:
    """What the losses are for each: a byte, or a token."""
    data = about.get("data")
    return "byte" if isinstance(data, dict) and data.get("unit") == "byte" else "token"


def _status(trials: Sequence[Trial], unit: str) -> str:
    counts = {state: sum(trial.state == state for trial in trials) for state in dict.fromkeys(t.state for t in trials)}
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    said = f"{form.count(len(trials), 'trial')}{': ' if words else ''}{words}."
    first = best(trials)
    if first is None:
        lead = '<strong class="wait">No trial has a held-out loss yet.</strong>'
    else:
        kind, of = ("good", "") if first.state == FINISHED else ("wait", ", of those that trained the longest")
        lead = (
            f'<strong class="{kind}">Best: trial {first.number}, by {first.way}, {first.loss:.4f} nats per {unit}{of}.'
            "</strong>"
        )
    return f'<div class="card">{lead}<br><span class="soft">{pages.text(said)}</span></div>'


def _ways(settings: Settings, trials: Sequence[Trial], unit: str) -> str:
    headings = ("way", "how", ">best held-out loss", ">trial", ">trials", ">finished", ">ended early", ">failed",
                ">tokens", ">minutes")  # fmt: skip
    rows = []
    for way in settings.ways:
        own = [trial for trial in trials if trial.way == way]
        done = [trial for trial in own if trial.state == FINISHED and _is_number(trial.loss)]
        first = min(done, key=lambda trial: (trial.loss, trial.number), default=None)
        how = _MEANING[way].format(method=settings.method, sampler=settings.sampler.upper(), pruner=settings.pruner)
        early = sum(trial.state in (STOPPED, PRUNED, PAUSED) for trial in own)
        rows.append(
            (
                way, how, *((form.NONE,) * 2 if first is None else (f"{first.loss:.4f}", str(first.number))),
                str(len(own)), str(len(done)), str(early), str(sum(trial.state in WORST for trial in own)),
                f"{sum(trial.tokens for trial in own):,}", f"{sum(trial.seconds for trial in own) / 60:.1f}",
            )
        )  # fmt: skip
    of = settings.eta, settings.rungs
    histories = {way: [one for one in spent(trials, way, *of) if one.lowest is not None] for way in settings.ways}
    note = (
        f"Budget of each way: {settings.amount:,} {settings.kind}. Losses in nats per {unit}, of finished trials "
        f"alone, which train on at most {settings.tokens:,} tokens each. By experience there is one trial."
    )
    drawn = ""
    if any(histories.values()):

        def make(figure: Figure) -> None:
            axes = figure.subplots()
            for way, history in histories.items():
                if history:
                    colour, marker, line = _STYLES[way]
                    axes.step(
                        [one.tokens for one in history], [one.lowest for one in history], label=way, where="post",
                        color=colour, marker=marker, markersize=4, linewidth=1.3, linestyle=line,
                    )  # fmt: skip
            axes.set_xlabel("tokens trained on by the way's trials, by experiment rung by rung")
            axes.set_ylabel(f"lowest loss, nats per {unit}")
            axes.ticklabel_format(axis="both", style="plain", useOffset=False)
            axes.legend()

        drawn = _card(make, 3.2, "the lowest held-out loss of each way by the tokens that it has trained on")
    return f'{pages.table(headings, rows)}{drawn}<p class="soft">{pages.text(note)}</p>'


def _history(settings: Settings, trials: Sequence[Trial], unit: str) -> str:
    shown, left = _drawn(trials)
    if not shown:
        return "<p>No trial has a held-out loss yet.</p>"
    done = [trial for trial in trials if trial.state == FINISHED and _is_number(trial.loss)]
    lowest = list(itertools.accumulate((trial.loss for trial in done), min))

    def make(figure: Figure) -> None:
        axes = figure.subplots()
        _scatter(axes, shown, lambda trial: trial.number)
        if lowest:
            x = [trial.number for trial in done]
            axes.step(x, lowest, where="post", color=pages.INK, linewidth=1.0, label="lowest of the finished")
        _robust(axes, [trial.loss for trial in shown])
        axes.set_xlabel("trial")
        axes.set_ylabel(f"held-out loss, nats per {unit}")
        axes.legend(ncols=2)

    note = "Filled: finished. Hollow: the last loss of a trial that was ended early or is not at its end."
    return f"{_card(make, 3.2, 'held-out loss of each trial')}{_note(note, left)}"


def _importances(settings: Settings, trials: Sequence[Trial]) -> str:
    found, words = importances(settings, trials)
    if not found:
        return f"<p>None: {pages.text(words)}</p>"

    def make(figure: Figure) -> None:
        axes = figure.subplots()
        names = list(found)[::-1]
        axes.barh(names, [found[name] for name in names], color=pages.SECOND, height=0.6)
        axes.set_xlim(0, 1)
        axes.grid(axis="y", visible=False)

    return f"{_card(make, 0.8 + 0.34 * len(found), 'importance of each parameter')}{_note(words)}"


def _slices(settings: Settings, trials: Sequence[Trial], unit: str) -> str:
    shown, left = _drawn(trials)
    space = settings.space.parameters
    if not shown or not space:
        return "<p>No trial has a held-out loss yet.</p>" if space else "<p>No parameter is varied.</p>"

    def make(figure: Figure) -> None:
        columns = min(_COLUMNS, len(space))
        grid = figure.subplots(math.ceil(len(space) / columns), columns, squeeze=False, sharey=True).ravel()
        for axes in grid[len(space) :]:
            axes.set_visible(False)
        for axes, (key, parameter) in zip(grid, space.items()):
            _slice(axes, settings, key, parameter, shown)
            axes.set_xlabel(key)
        for axes in grid[:: columns or 1]:
            axes.set_ylabel(f"nats per {unit}")
        _robust(grid[0], [trial.loss for trial in shown])

    height = _HEIGHT * math.ceil(len(space) / _COLUMNS)
    words = "A point a trial, by the value of one parameter while the others differ too; hollow: ended early."
    return f"{_card(make, height, 'held-out loss by each parameter')}{_note(words, left)}"


def _slice(axes: Axes, settings: Settings, key: str, parameter: Range | Choices, trials: Sequence[Trial]) -> None:
    if isinstance(parameter, Choices):
        # What experience took may be none of them.
        values = list(dict.fromkeys([*parameter.values, *(_value(settings, trial, key) for trial in trials)]))
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            values.sort()
        places = {value: place for place, value in enumerate(values)}
        _scatter(axes, trials, lambda trial: places[_value(settings, trial, key)])
        axes.set_xticks(range(len(values)), [_shown(value) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return
    if parameter.log:
        axes.set_xscale("log")
        pages.plain(axes.xaxis)
    _scatter(axes, trials, lambda trial: _value(settings, trial, key))


def _trials(settings: Settings, trials: Sequence[Trial]) -> str:
    if not trials:
        return "<p>None was begun.</p>"
    keys = list(dict.fromkeys([*settings.space.parameters, *(key for trial in trials for key in trial.params)]))
    headings = (">trial", "way", "state", ">held-out loss", ">tokens", ">seconds", *(f">{key}" for key in keys), "")
    order = sorted(trials, key=_rank)
    rows = [
        (
            str(trial.number), trial.way, trial.state, f"{trial.loss:.4f}" if _is_number(trial.loss) else form.NONE,
            f"{trial.tokens:,}", f"{trial.seconds:,.0f}",
            *(_shown(trial.params[key]) if key in trial.params else form.NONE for key in keys), trial.reason or "",
        )
        for trial in order[:MOST_LISTED]
    ]  # fmt: skip
    return pages.table(headings, rows) + _note("The best first; finished trials before those that were not.", max(
        0, len(order) - MOST_LISTED
    ))  # fmt: skip


def _advice(settings: Settings) -> str:
    rows = [(one["key"], _shown(one["value"]), one["reason"], one["source"]) for one in settings.advice]
    return pages.table(("key", ">value", "reason", "source"), [tuple(map(str, row)) for row in rows])


def _facts(settings: Settings, about: dict[str, Any]) -> list[tuple[str, str]]:
    found = [
        (key, ", ".join(map(_shown, parameter.values)) if isinstance(parameter, Choices) else _range(parameter))
        for key, parameter in settings.space.parameters.items()
    ]
    found += [
        ("budget of each way", f"{settings.amount:,} {settings.kind}"),
        ("tokens of a trial", f"{settings.tokens:,}, {form.count(settings.parts, 'part')}"),
        ("successive halving", f"{settings.rungs} rungs, of each of which 1 in {settings.eta} goes on"),
        ("seed", str(settings.seed)),
    ]
    for name in ("data", "versions"):
        if isinstance(about.get(name), dict):
            found.append((name, ", ".join(f"{key}: {value}" for key, value in about[name].items())))
    base = {key: value for key, value in settings.base.items() if value is not None}
    return [*found, ("recipe", ", ".join(f"{key}: {_shown(value)}" for key, value in base.items()))]


def _range(parameter: Range) -> str:
    more = ", in the logarithm" if parameter.log else ""
    step = f", in steps of {parameter.step}" if parameter.step not in (None, 1) else ""
    return f"{_shown(parameter.low)} to {_shown(parameter.high)}{more}{step}"


# --- Drawing ----------------------------------------------------------------------------------------------------------


def _rank(trial: Trial) -> tuple:
    """The best first: by how far it came, and then by its loss."""
    far = 0.0 if not trial.values or not _is_number(trial.loss) else max(trial.values) / trial.steps
    return -far, trial.loss if far else math.inf, trial.number


def _drawn(trials: Sequence[Trial]) -> tuple[list[Trial], int]:
    """(those with a loss, in order; how many of them are left out)"""
    known = [trial for trial in trials if _is_number(trial.loss) and trial.state not in WORST]
    kept_ = sorted(sorted(known, key=_rank)[:MOST_DRAWN], key=lambda trial: trial.number)
    return kept_, len(known) - len(kept_)


def _scatter(axes: Axes, trials: Sequence[Trial], of) -> None:
    for way, (colour, marker, _) in _STYLES.items():
        # The legend says each way once.
        label = way
        for finished in (True, False):
            own = [trial for trial in trials if trial.way == way and (trial.state == FINISHED) is finished]
            if own:
                axes.plot(
                    [of(trial) for trial in own], [trial.loss for trial in own], marker, color=colour, markersize=4.5,
                    linestyle="none", fillstyle="full" if finished else "none", alpha=0.9 if finished else 0.6,
                    label=label,
                )  # fmt: skip
                label = "_"


def _robust(axes: Axes, losses: Sequence[float]) -> None:
    """Let a few far above not press the others together: they lie beyond the upper edge."""
    low, high = min(losses), max(losses)
    third = sorted(losses)[int(0.75 * (len(losses) - 1))]
    limit = third + 2 * (third - low)
    if low < limit < high:
        margin = 0.05 * (limit - low)
        axes.set_ylim(low - margin, limit + margin)


def _card(make, height: float, label: str) -> str:
    return f'<div class="card">{pages.figure(make, size=(_WIDTH, height), label=label)}</div>'


def _note(words: str, left: int = 0) -> str:
    more = f" {left:,} more are left out." if left else ""
    return f'<p class="soft">{pages.text(words + more)}</p>'


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)
