"""A study's report.html: its numbers against counts made here, its parts, and strangers' names in it."""

from __future__ import annotations

import html
import math
import random
import re
from pathlib import Path

import pytest

from gptkern.cli import main
from gptkern.training import recipe_files
from gptkern.training.search import report
from gptkern.training.search.settings import Settings
from gptkern.training.search.space import Space
from gptkern.training.search.study import Study, Trial

SPACE = {
    "lr": {"low": 1e-4, "high": 1e-2, "log": True}, "batch": [8, 16], "schedule": ["cosine", "wsd"],
    "dropout": {"low": 0.0, "high": 0.3},
}  # fmt: skip
HOSTILE = '<script>alert("x")</script> & $\\frac{1}$ ]]> \u2028'


def settings_of(**changes) -> Settings:
    given = recipe_files.Given({"steps": 160, "batch": 8, "context": 64}, {})
    base = recipe_files.completed(given) | {"precision": "fp32", "device": "cpu", "threads": 1}
    advice = ({"key": "lr", "value": 3e-3, "reason": HOSTILE, "source": "a <b>source</b>"},)
    values = {"base": base, "length": 64, "space": Space.of(SPACE, ""), "amount": 24, "advice": advice}
    return Settings(**values | changes)


def about_of(settings: Settings) -> dict:
    return settings.described() | {"data": {"name": HOSTILE, "unit": "byte"}, "versions": {"torch": "<i>2</i>"}}


def trials_of(settings: Settings, count: int, parts=(1, 2, 4, 8, 8, 8)) -> list[Trial]:
    """Of experience one, then as many of each other way; the learning rate decides nearly all of the loss."""
    drawn = random.Random(0)
    first = settings.trial(0, "experience", {"lr": 3e-3, "batch": 4, "dropout": 0.1, "schedule": "cosine"})
    values = {first.steps: 3.3}
    found = [first._replace(state="finished", values=values, step=first.steps, seconds=30.0)]
    for number in range(1, 2 * count + 1):
        way = "experiment" if number % 2 else "learning"
        trial = settings.trial(number, way, settings.space.sample(drawn))
        lowest = 2.5 + abs(math.log10(trial.params["lr"] / 2e-3)) + 0.1 * drawn.random()
        reached = drawn.choice(parts)
        values = {trial.steps * part // 8: lowest + 2 / part for part in range(1, reached + 1)}
        state = "finished" if reached == 8 else "stopped" if way == "experiment" else "pruned"
        reason = None
        if number % 11 == 0:
            state, values, reason = "failed", {}, f"the loss is {HOSTILE}"
        step = trial.steps * reached // 8
        found.append(trial._replace(state=state, values=values, step=step, seconds=7.5, reason=reason))
    return found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(settings, trials, the page)"""
    folder, settings = tmp_path_factory.mktemp("study"), settings_of()
    trials = trials_of(settings, 24)
    with Study.create(folder, about_of(settings)) as study:
        with study.changing():
            for trial in trials:
                study.store(trial)
        report.write(folder / "report.html", study)
    return settings, trials, (folder / "report.html").read_text(encoding="utf-8")


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The table below a heading."""
    table = re.search(rf"<h2>{heading}</h2>.*?<table>(.*?)</table>", page, re.DOTALL)[1]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]
    return [[html.unescape(cell) for cell in row] for row in cells]


def test_the_ways_stand_side_by_side_with_what_they_cost(study):
    _, trials, page = study
    _, *rows = rows_of(page, "The ways, side by side")
    assert [row[0] for row in rows] == ["experience", "experiment", "learning"]
    for way, _, loss, number, count, finished, early, failed, tokens, minutes in rows:
        own = [trial for trial in trials if trial.way == way]
        losses = {max(t.values.items())[1]: t.number for t in own if t.state == "finished"}
        assert (loss, number) == (f"{min(losses):.4f}", str(losses[min(losses)]))
        states = [trial.state for trial in own]
        counts = states.count("finished"), states.count("stopped") + states.count("pruned"), states.count("failed")
        assert (int(count), int(finished), int(early), int(failed)) == (len(own), *counts)
        assert int(tokens.replace(",", "")) == sum(trial.step * trial.params["batch"] * 64 for trial in own)
        assert float(minutes) == pytest.approx(sum(trial.seconds for trial in own) / 60, abs=0.051)
    lowest = min(float(row[2]) for row in rows)
    assert re.search(rf"Best: trial \d+, by \w+, {lowest:.4f} nats per byte\.", page)


def test_a_history_counts_tokens_and_keeps_the_lowest(study):
    _, trials, _ = study
    tokens, lowest, expected = 0, math.inf, []
    for trial in (trial for trial in trials if trial.way == "learning"):
        tokens += trial.step * trial.params["batch"] * 64
        if trial.state == "finished":
            lowest = min(lowest, trial.values[trial.steps])
        expected.append((tokens, None if lowest == math.inf else lowest))
    assert report.spent(trials, "learning", 2, 4) == expected


def test_a_history_of_halving_goes_rung_by_rung():
    """Of 8 steps, with rungs at 2, 4 and 8: the first trial is finished when all have been to their rungs."""
    of = {"steps": 8, "tokens_per_step": 10}
    trials = [
        Trial(1, "experiment", {}, {2: 5.0, 4: 4.0, 8: 3.0}, "finished", 8, **of),
        Trial(2, "learning", {}, {8: 1.0}, "finished", 8, **of),
        Trial(3, "experiment", {}, {2: 6.0}, "stopped", 2, **of),
        Trial(4, "experiment", {}, {2: 5.5, 4: 4.5}, "stopped", 4, **of),
        Trial(5, "experiment", {}, {}, "failed", 3, **of),
        Trial(6, "experiment", {}, {2: 9.0, 4: 9.0, 8: 2.5}, "finished", 8, bracket=1, **of),
    ]
    tokens = [20, 40, 60, 80, 100, 120, 130, 170, 190, 210, 250]
    lowest = [None] * 7 + [3.0] * 3 + [2.5]
    assert report.spent(trials, "experiment", 2, 3) == list(zip(tokens, lowest))


def test_every_parameter_has_a_slice_and_an_importance(study):
    settings, trials, page = study
    found, words = report.importances(settings, trials)
    assert found.keys() == SPACE.keys() and sum(found.values()) == pytest.approx(1)
    assert next(iter(found)) == "lr" and found["lr"] > 0.5
    finished = sum(trial.state == "finished" for trial in trials) - 1  # experience's batch is none of the space's
    assert f"PED-ANOVA of {finished} trials after all of their steps" in words and words in page
    for heading, names in (("Slices", [*SPACE, "cosine", "wsd", "nats per byte"]), ("Importances", SPACE)):
        drawn = re.search(rf"<h2>{heading}</h2>.*?<svg(.*?)</svg>", page, re.DOTALL)[1]
        assert {name for name in names if f">{name}</text>" in drawn} == set(names)


def test_names_are_data_and_the_page_needs_nothing_else(study):
    _, _, page = study
    outside = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|i|b|img|link|iframe)\b", page) and page.count("alert(") > 3
    assert html.escape(HOSTILE) in outside
    # A namespace is no address.
    page = re.sub(r"xmlns[:\w]*=\"[^\"]*\"", "", page)
    assert not re.search(r"(?:src|href)=\"(?!#)|url\((?!#)|@import|https?://", page)


def test_the_best_trials_come_first(study):
    _, trials, page = study
    headings, *rows = rows_of(page, "Trials")
    assert headings[:7] == ["trial", "way", "state", "held-out loss", "tokens", "seconds", "lr"]
    assert sorted(int(row[0]) for row in rows) == list(range(len(trials)))
    states = [row[2] for row in rows]
    done = states.count("finished")
    assert set(states[:done]) == {"finished"} and [row[3] for row in rows[:done]] == sorted(r[3] for r in rows[:done])


def test_importances_of_halved_trials_are_told_after_the_part_that_enough_have_reached():
    settings = settings_of()
    found, words = report.importances(settings, trials_of(settings, 20, parts=(2, 2, 2, 8)))
    assert "after part 2 of 8" in words and next(iter(found)) == "lr"
    for trials, change, said in (
        (trials_of(settings, 6), {}, "it needs 16"),
        (trials_of(settings, 24), {"space": Space.of({"lr": SPACE["lr"]}, "")}, "One parameter is varied"),
        ([], {}, "0 trials of the space"),
    ):
        found, words = report.importances(settings_of(**change), trials)
        assert not found and said in words


@pytest.mark.deep
def test_pages_of_few_many_and_odd_trials(monkeypatch):
    settings = settings_of()
    for trials in ([], trials_of(settings, 24)[:1], [trials_of(settings, 1)[1]._replace(values={}, state="open")]):
        page = report.render(settings, trials, about_of(settings))
        assert page.rstrip().endswith("</html>")
    odd = trials_of(settings, 24)
    # A file may hold what is no number.
    odd[1] = odd[1]._replace(values={20: math.inf}, state="finished")
    assert "inf" not in re.sub(r"<(style|svg).*?</\1>", "", report.render(settings, odd, {}), flags=re.DOTALL)
    monkeypatch.setattr(report, "MOST_DRAWN", 10)
    monkeypatch.setattr(report, "MOST_LISTED", 7)
    trials = trials_of(settings, 24)
    page = report.render(settings, trials, about_of(settings))
    known = sum(bool(trial.values) for trial in trials)
    assert f"{known - 10} more are left out" in page and f"{len(trials) - 7} more are left out" in page
    assert len(rows_of(page, "Trials")) == 8


def test_a_strangers_unit_is_none():
    assert [report.unit_of({"data": {"unit": unit}}) for unit in ("byte", "token", "\x1b[31mred")] == [
        "byte", "token", "token",
    ]  # fmt: skip


@pytest.mark.deep
def test_a_page_that_cannot_be_written_is_said(tmp_path, study):
    from gptkern.training.errors import RunError

    settings, _, _ = study
    made = Study.create(tmp_path / "study", about_of(settings))
    with made, pytest.raises(RunError, match="cannot be written"):
        report.write(Path("/proc/report.html"), made)


@pytest.mark.deep
def test_the_command_writes_it_however_it_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("letters.txt").write_text("".join(random.Random(0).choices("abcdefgh \n", k=3000)))
    sizes = ["--context", "8", "--layers", "1", "--width", "16", "--heads", "2", "--steps", "8", "--batch", "2"]
    how = [*sizes, "--rungs", "2", "--threads", "1", "--tensorboard", "off", "--vary", "lr=1e-3:1e-2:log"]
    assert main(["search", "--text", "letters.txt", *how, "--trials", "2", "--startup", "1", "--out", "study"]) == 0
    page = Path("study/report.html").read_text(encoding="utf-8")
    _, *rows = rows_of(page, "The ways, side by side")
    assert [(row[0], row[4]) for row in rows] == [("experience", "1"), ("experiment", "2"), ("learning", "2")]
    assert [row[0] for row in rows_of(page, "By experience")[1:]][:2] == ["lr", "schedule"]
    assert "study/report.html" in capsys.readouterr().out
