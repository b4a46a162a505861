"""A search: what it samples, which trials go on, what a study's file holds, and how it goes on after it was ended."""

from __future__ import annotations

import itertools
import math
import random
import sqlite3
import statistics

import pytest
from searches import SPACE, create, settings, simulated, told
from training_runs import a_store

from gptkern import cli
from gptkern.training import recipe_files
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.errors import RunError, UserError
from gptkern.training.run import Keeping, train
from gptkern.training.search import halving, planning, sampling, trials, working
from gptkern.training.search.settings import Settings
from gptkern.training.search.space import Choices, Grid, Range, Space
from gptkern.training.search.study import FAILED, FINISHED, OPEN, PAUSED, RUNNING, STOPPED, Study, Trial, best

# --- The space --------------------------------------------------------------------------------------------------------


def test_a_space_of_options_is_that_of_a_file(tmp_path):
    path = tmp_path / "space.toml"
    path.write_text(
        'lr = { low = 1e-4, high = 1e-2, log = true }\nbatch = [8, 16]\nschedule = ["cosine", "wsd"]\n'
        "width = { low = 64, high = 256, step = 64 }\ndropout = { low = 0, high = 0.2 }\n"
    )
    options = ["lr=1e-4:1e-2:log", "batch=8,16", "schedule=cosine,wsd", "width=64:256:64", "dropout=0:0.2"]
    space = Space.read(path)
    assert space == Space.parsed(options) == Space.of(space.described(), "")
    assert space.parameters["lr"] == Range(1e-4, 1e-2, log=True)
    assert space.parameters["width"] == Range(64, 256, step=64)


def test_a_grid_is_the_product_of_its_axes():
    space = Space.parsed(["lr=1e-4:1e-2:log", "batch=8,16", "width=64:320:64", "dropout=0:0.3"])
    grid = Grid(space, 3)
    axes = [[1e-4, 1e-3, 1e-2], [8, 16], [64, 192, 320], [0.0, 0.15, 0.3]]
    expected = list(itertools.product(*axes))
    assert len(grid) == len(expected) == 54
    for index, values in enumerate(expected):
        assert list(grid[index].values()) == pytest.approx(values, rel=1e-12)
    assert [grid[0]["lr"], grid[53]["lr"], grid[53]["dropout"]] == [1e-4, 1e-2, 0.3]  # ends to the bit
    drawn = grid.chosen(20, 3)
    assert len({tuple(params.items()) for params in drawn}) == 20 and drawn != grid.chosen(20, 4)
    assert grid.chosen(54, 3) == [grid[index] for index in range(54)]
    assert len(Grid(Space.parsed([f"{key}=0:0.5" for key in ("dropout", "warmup", "beta1", "beta2")]), 1000)) == 10**12


def test_samples_are_spread_as_they_should_be():
    space = Space.parsed(["lr=1e-4:1e-2:log", "dropout=0:0.2", "width=64:256:64", "layers=1:8:log"])
    drawn = [space.sample(random.Random(seed)) for seed in range(2000)]
    # Of 2000 the median of a uniform part of [0, 1] is within 0.05 of a half by more than four deviations.
    lr = statistics.median(math.log10(params["lr"]) for params in drawn)
    assert abs((lr + 4) / 2 - 0.5) < 0.05
    assert abs(statistics.median(params["dropout"] for params in drawn) / 0.2 - 0.5) < 0.05
    for key, values in (("width", {64, 128, 192, 256}), ("layers", set(range(1, 9)))):
        assert {params[key] for params in drawn} == values
    shares = [sum(params["layers"] == layers for params in drawn) / 2000 for layers in (1, 2, 4)]
    for layers, share in zip((1, 2, 4), shares):
        assert abs(share - math.log((layers + 0.5) / (layers - 0.5)) / math.log(8.5 / 0.5)) < 0.05


@pytest.mark.parametrize(
    "option, words",
    [
        ("lr", "--vary lr: it needs KEY=VALUES"),
        ("rate=1", "--vary rate is no key that a search varies"),
        ("steps=1,2", "--vary steps is no key that a search varies"),
        ("dropuot=0,1", "did you mean dropout?"),
        ("lr=2:1", "--vary lr goes from 2.0 to 1.0; it needs low below high"),
        ("dropout=0:0.5:log", "--vary dropout begins at 0.0; with log it needs a low above 0"),
        ("schedule=cosine:wsd", "--vary schedule has words for values"),
        ("batch=1:8:2", "--vary batch goes from 1 to 8 in steps of 2"),
        ("lr=1:2:2", "--vary lr is 1:2:2; after low:high it needs log, or nothing"),
        ("batch=8,8", "--vary batch has a value twice"),
        ("lr=nan", "--vary lr is nan; it needs a finite number above 0"),
        ("batch=" + ",".join(map(str, range(1, 102))), "has 101 values; it needs 1 to 100"),
    ],
)
def test_spaces_that_are_none(option, words):
    with pytest.raises(UserError) as error:
        Space.parsed([option])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("lr = 1", "lr is one value; it needs a list"),
        ("lr = {low = 1}", "lr needs low and high"),
        ("lr = {low = 1, high = 2, steps = 3}", "lr has steps; a range has low, high, log, step"),
        ("batch = [1.5]", "batch is 1.5; it needs a whole number"),
        ("lr = {low = true, high = 2}", "lr is true"),
        ("lr = [", "it needs a TOML file"),
    ],
)
def test_files_that_hold_no_space(tmp_path, content, words):
    path = tmp_path / "space.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^--space ") as error:
        Space.read(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_values_that_do_not_fit_together_are_refused_before_any_work():
    for changes, words in (
        ({"space": Space({"accumulate": Choices((1, 3))})}, "the space holds batch 2, accumulate 3: accumulate is 3"),
        ({"space": Space({"accumulate": Range(1, 4, step=1)}), "given": {"batch": 4}}, "batch 4, accumulate 3"),
        ({"space": Space({"batch": Choices((2, 8))})}, "batch 8: the 128 tokens of a trial are 2 updates"),
        ({"space": Space({"decay": Choices((0.1, 0.2))})}, "decay has no effect on the schedule cosine"),
        ({"space": Space({"warmup": Range(0.1, 0.9), "schedule": Choices(("wsd",))})}, "warmup is 0.9 and decay 0.2"),
        ({"rungs": 13, "eta": 3}, "it needs at most 4096"),
        ({"kind": "tokens", "amount": 127}, "--tokens is 127; it needs at least those of one trial, 128"),
        ({"amount": 20_000}, "is 20000 trials of a way"),
    ):
        with pytest.raises(UserError) as error:
            settings(**changes)
        assert words in str(error.value), error.value


# --- Which trials go on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta, rungs, count, among", [(2, 3, 9, 1), (3, 3, 20, 3), (2, 4, 3, 2), (2, 1, 4, 1)])
def test_halving_keeps_the_right_ones(eta, rungs, count, among):
    of = settings({"steps": 27 * 8}, ways=("experiment",), eta=eta, rungs=rungs, amount=count)
    draw = random.Random(5)
    losses = [[draw.choice((1.0, 2.0, 3.0, 4.0)) for _ in range(of.parts)] for _ in range(count)]
    found = simulated(of, lambda trial, part: losses[trial.number][part - 1], among)
    # Counted once more, of a table of numbers alone.
    alive, steps = list(range(count)), {}
    for rung in range(rungs):
        part = eta**rung
        steps |= dict.fromkeys(alive, part)
        if rung + 1 < rungs:
            places = sorted(alive, key=lambda number: (losses[number][part - 1], number))
            alive = places[: max(1, len(alive) // eta)]
    assert [trial.step * of.parts // trial.steps for trial in found] == [steps[number] for number in range(count)]
    assert {trial.number for trial in found if trial.state == FINISHED} == set(alive)
    assert all(trial.state in (FINISHED, STOPPED) for trial in found)
    spent = sum(steps[number] / of.parts for number in range(count))
    assert float(halving.cost(count, eta, rungs)) == pytest.approx(spent)


def test_what_failed_counts_at_its_rung_and_does_not_go_on():
    def at(number: int, loss: float | None, state: str = PAUSED) -> Trial:
        return Trial(number, "experiment", {}, {} if loss is None else {1: loss}, state)

    four = [at(0, 3.0), at(1, 0.5, FAILED), at(2, 2.0), at(3, 4.0)]
    assert halving.promoted(four, 2) == [0, 2]
    assert halving.promoted([at(0, None, FAILED), at(1, None, FAILED)], 2) == []
    assert halving.promoted([at(7, 1.0), at(3, 1.0)], 2) == [3]


def test_a_budget_of_tokens_is_spent_and_never_passed():
    for amount in (128, 192, 300, 1000, 5000):
        of = settings(ways=("experiment", "learning"), kind="tokens", amount=amount, pruner="none")
        found = simulated(of, lambda trial, part: trial.params["lr"])
        for way in of.ways:
            spent = sum(trial.tokens for trial in found if trial.way == way)
            assert amount / 2 < spent <= amount, (way, amount)
        begun = sum(trial.way == "experiment" for trial in found)
        assert halving.cost(begun, 2, 3) * 128 <= amount < halving.cost(begun + 1, 2, 3) * 128
    # The same tokens whatever the batch.
    assert {trial.tokens_at(trial.steps) for trial in found} == {128}


def test_the_best_is_the_lowest_of_those_that_are_done():
    def a(number: int, step: int, loss: float, state: str = STOPPED) -> Trial:
        return Trial(number, "experiment", {}, {step: loss}, state, step, 8)

    half = [a(0, 2, 1.0), a(1, 4, 3.0, PAUSED), a(2, 4, 2.5)]
    assert best([*half, a(3, 8, 4.0, FINISHED), a(4, 8, 0.1, FAILED)]).number == 3
    assert best(half).number == 2 and best([]) is None


# --- Optuna -----------------------------------------------------------------------------------------------------------


def history(count: int, sampler: str) -> list[Trial]:
    of = settings(ways=("learning",), amount=count, sampler=sampler, startup=6, pruner="none")
    return simulated(of, lambda trial, part: (math.log10(trial.params["lr"]) + 1.5) ** 2)


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.deep)])
def test_a_sampler_learns_and_hangs_on_its_trials_alone(sampler):
    found = history(14, sampler)
    errors = [abs(math.log10(trial.params["lr"]) + 1.5) for trial in found]
    assert statistics.mean(errors[6:]) < 0.6 * statistics.mean(errors[:6])
    assert history(14, sampler) == found
    again = sampling.suggested(SPACE, sampler, 1, 6, found, 4)
    assert again == sampling.suggested(SPACE, sampler, 1, 6, found, 4)
    assert again != sampling.suggested(SPACE, sampler, 2, 6, found, 4)
    # One that failed is the worst: with the lowest loss of all it would draw the others to it.
    failing = [trial._replace(state=FAILED, values={}) if trial.params["lr"] < 0.01 else trial for trial in found]
    assert sampling.suggested(SPACE, sampler, 1, 6, failing, 4)["lr"] > 0.01


def test_pruning_is_above_the_median_of_the_finished():
    space = Space(SPACE.parameters | {"batch": Choices((4,))})
    of = settings(ways=("learning",), space=space, amount=5, pruner="none")
    found = simulated(of, lambda trial, part: 5 - part + trial.number)
    middle = statistics.median(5 - 2 + trial.number for trial in found)
    for loss, expected in ((middle - 0.1, False), (middle + 0.1, True)):
        # Of half the batch, hence twice the updates: losses are compared at equal parts.
        trial = of.trial(9, "learning", found[0].params | {"batch": 2})._replace(state=RUNNING)
        trial = trial._replace(values={trial.steps // 2: loss}, step=trial.steps // 2)
        assert sampling.is_pruned(SPACE, "median", 3, trial, found, of.parts) is expected
        assert not sampling.is_pruned(SPACE, "none", 3, trial, found, of.parts)
        assert not sampling.is_pruned(SPACE, "median", 6, trial, found, of.parts)


# --- The study's file -------------------------------------------------------------------------------------------------


def test_a_trial_is_stored_as_it_is_or_not_at_all(tmp_path):
    of = settings()
    with create(tmp_path / "s", of) as study, Study(tmp_path / "s") as other:
        assert Settings.of(other.about) == of
        trial = of.trial(0, "learning", {"lr": 0.1 + 0.2, "batch": 4, "dropout": 0.1})._replace(
            values={1: 2.5, 2: 1 / 3}
        )
        other._connection.execute("PRAGMA busy_timeout = 0")
        with study.changing():
            # From its beginning on, before anything was written: what is decided is decided on what is there.
            with pytest.raises(RunError, match="database is locked"), other.changing():
                pass
            study.store(trial)
            assert other.trials() == []
        assert other.trials() == [trial]
        with pytest.raises(ZeroDivisionError), study.changing():
            study.store(trial._replace(state=FINISHED))
            raise ZeroDivisionError
        assert other.trials() == [trial]
    with pytest.raises(UserError, match="holds a study: --resume goes on with it, another --out leaves it"):
        create(tmp_path / "s", of)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["study.sqlite"]


def test_files_that_are_no_study(tmp_path):
    of = settings()
    statements = {
        "it has other tables": "CREATE TRIGGER t AFTER INSERT ON trials BEGIN DELETE FROM losses; END",
        "its version is 7": "PRAGMA user_version = 7",
        "another program's": "PRAGMA application_id = 1",
        "does not say what it was begun with": "DELETE FROM about",
        "begun with: 'base'": "UPDATE about SET content = '{}'",
        "state is 'great'": "UPDATE trials SET state = 'great'",
        "params is 'data'": """UPDATE trials SET params = '{"data": "/etc"}'""",
        "it needs a finite number above 0": """UPDATE trials SET params = '{"lr": "1"}'""",
        "step is -1": "UPDATE trials SET step = -1",
        "loss is 'low'": "UPDATE losses SET loss = 'low'",
        "loss is inf": "UPDATE losses SET loss = 9e999",
        "checkpoint is '../../run'": "UPDATE trials SET checkpoint = '../../run'",
        r"step-00000001\\x1b[31m": "UPDATE trials SET checkpoint = 'trials/00000/checkpoints/step-00000001'"
        " || char(27) || '[31m'",
        "too big": "UPDATE trials SET reason = printf('%.*c', 2000000, 'x')",
    }
    for index, (words, statement) in enumerate(statements.items()):
        folder = tmp_path / str(index)
        with create(folder, of) as study, study.changing():
            study.store(of.trial(0, "learning", {"lr": 0.1})._replace(values={1: 2.0}))
        connection = sqlite3.connect(folder / "study.sqlite")
        with connection:
            connection.execute(statement)
        connection.close()
        with pytest.raises(UserError, match=r"^(--out|the study) ") as error, Study(folder) as study:
            Settings.of(study.about)
            study.trials()
        assert words in str(error.value) and "\n" not in str(error.value), error.value
    whole = (tmp_path / "0" / "study.sqlite").read_bytes()
    for content in (b"", b"text", whole[:5000], whole[:100] + b"\xff" * 3996 + whole[4096:]):
        (tmp_path / "0" / "study.sqlite").write_bytes(content)
        with pytest.raises(UserError, match="is no study of gptkern, or is damaged"):
            Study(tmp_path / "0")


def test_a_trial_is_one_workers_until_that_is_gone(tmp_path):
    of = settings(ways=("learning",), amount=3)
    with create(tmp_path, of) as study, Study(tmp_path) as other:
        with working._present(tmp_path) as (first, alive_a), working._present(tmp_path) as (second, alive_b):
            taken = [
                working._taken(study, of, first, alive_a), working._taken(other, of, second, alive_b),
                working._taken(study, of, first, alive_a), working._taken(other, of, second, alive_b),
            ]  # fmt: skip
            assert [trial.number for trial in taken[:3]] == [0, 1, 2] and taken[3] == planning.WAIT
            assert [trial.owner for trial in study.trials()] == [first, second, first]
        # The second is gone, and a third comes: what it held is there again, and the first's too.
        with working._present(tmp_path) as (third, alive_c):
            again = working._taken(study, of, third, alive_c)
            assert again.number == 0 and [trial.state for trial in study.trials()] == [RUNNING, OPEN, OPEN]
            # A kill leaves a worker's file, and nobody who holds its lock.
            killed = tmp_path / working.WORKERS / ("a" * 32)
            killed.touch()
            assert not alive_c(killed.name) and not killed.exists() and alive_c(third)
            for odd in ("../study.sqlite", "/etc/passwd", "", None, "x" * 32):
                assert not alive_c(odd)


# --- From the beginning to the end ------------------------------------------------------------------------------------

SMALL = dict(ways=("experiment", "learning"), amount=4, rungs=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "study"
    with create(folder, settings(**SMALL)) as study:
        assert working.work(study, a_store(), say=lambda line: None)
    return folder


def test_ended_in_the_midst_of_trials_it_is_the_same_study(tmp_path, whole):
    folder = tmp_path / "study"
    with create(folder, settings(**SMALL)) as study:
        done, ends = False, 0
        while not done:
            asked = itertools.count(1)
            done = working.work(study, a_store(), stop=lambda asked=asked: next(asked) > 7, say=lambda line: None)
            ends += not done
        assert ends > 5
        with Study(whole) as other:
            assert told(study) == told(other)


def test_one_checkpoint_is_kept_and_best_toml_is_its_recipe(tmp_path, whole):
    with Study(whole) as study:
        found = study.trials()
    # Two of four went on from the half.
    parts = sorted((trial.state, trial.step / trial.steps) for trial in found if trial.way == "experiment")
    assert parts == [("finished", 1.0)] * 2 + [("stopped", 0.5)] * 2
    the_best = min((trial for trial in found if trial.state == FINISHED), key=lambda trial: trial.loss)
    kept = [path for path in (whole / "trials").glob("*/checkpoints/step-*")]
    assert kept == [whole / the_best.checkpoint]
    given = recipe_files.read(whole / "best.toml")
    values = recipe_files.completed(recipe_files.Given(given.values, given.names))
    recipe = recipe_files.recipe_of(values, length=values["context"], device="cpu")
    config = trials.config_of(values, 256)
    again = train(
        recipe, a_store(), tmp_path / "run", config=config, say=lambda line: None,
        keeping=Keeping(save_every=values["save_every"], evaluate_rows=2, tensorboard="off"),
    )  # fmt: skip
    assert again.validation_loss == the_best.loss
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest()[0].step == the_best.steps


def test_what_diverges_and_what_does_not_fit_are_recorded(tmp_path, monkeypatch):
    space = Space({"lr": Choices((1e-2, 1e4)), "dropout": Choices((0.0, 0.1))})
    of = settings({"spike": 0}, space=space, ways=("experiment",), method="grid", rungs=1)
    real = trials.memory.check

    def check(config, recipe, **how):
        if config.dropout and recipe.lr < 1:
            raise UserError("the training needs 1 TB of memory")
        return real(config, recipe, **how)

    monkeypatch.setattr(trials.memory, "check", check)
    lines: list[str] = []
    with create(tmp_path / "s", of) as study:
        assert working.work(study, a_store(), say=lines.append)
        found = study.trials()
    assert [trial.state for trial in found] == ["finished", "infeasible", "failed", "failed"]
    assert found[1].reason == "the training needs 1 TB of memory" and found[1].step == 0
    assert "no finite number" in found[2].reason or "nan" in found[2].reason or "inf" in found[2].reason
    assert best(found).number == 0 and len(lines) == 4 and found[2].reason in lines[2]


def test_other_data_are_refused(whole):
    with Study(whole) as study, pytest.raises(UserError, match=r"are not what the study in .* trains on: letters"):
        working.work(study, a_store(seed=1))


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--trials", "2", "--tokens", "500"], "--trials and --tokens: a study has one of them"),
        (["--trials", "0"], "--trials is 0; it needs a whole number of at least 1"),
        (["--way", "experience", "--vary", "lr=1,2"], "--vary has no effect on --way experience"),
        (["--way", "experiment", "--sampler", "gp"], "--sampler has no effect on --way experiment"),
        (["--points", "3"], "--points has no effect without --method grid"),
        (["--recipe", "save.toml"], "save.toml: save_every has no effect on a search"),
        (["--recipe", "from.toml"], "from.toml: from: a search trains new models on a text alone"),
        (["--lr", "1e-3", "--vary", "lr=1,2"], "--lr has no effect: lr is varied"),
        (["--vary", "width=48,64"], "width is 48; without heads it needs to be a multiple of 32"),
        (["--tokens", "9"], "--tokens is 9; it needs at least those of one trial"),
        (["--resume"], "holds no study that --resume could go on with: it has no study.sqlite"),
        (["--context", "4096"], "each needs at least 4097"),
        (["--workers", "0"], "--workers is 0"),
    ],
)
def test_options_that_make_no_sense(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    (tmp_path / "save.toml").write_text("save_every = 3\n")
    (tmp_path / "from.toml").write_text('from = "x"\n')
    text = [] if "--resume" in arguments else ["--text", "text.txt", "--device", "cpu"]
    assert cli.main(["search", *text, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "save.toml", "from.toml"}


def test_the_data_may_lie_elsewhere(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    sizes = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "8", "--steps", "2", "--batch", "2"]
    options = ["--way", "experiment", "--rungs", "1", "--trials", "1", "--tensorboard", "off", "--device", "cpu"]
    out = f"--out={tmp_path / 'study'}"
    assert cli.main(["search", out, "--text", str(tmp_path / "text.txt"), *sizes, *options]) == 0
    printed = capsys.readouterr().out
    assert "best: trial 0 (experiment), held-out loss " in printed
    assert f"its checkpoint is in {tmp_path}/study/trials/00000/checkpoints/step-00000002, its recipe in " in printed
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    with Study(tmp_path / "study") as study, study.changing():
        study.store(study.trials()[0]._replace(state=OPEN))
    assert cli.main(["search", "--resume", out]) == 2
    assert cli.main(["search", "--resume", out, "--text", str(tmp_path / "moved.txt")]) == 0
    assert recipe_files.read(tmp_path / "study" / "best.toml").values["text"] == str(tmp_path / "moved.txt")


def test_resume_takes_nothing_that_would_make_it_another_study(whole, capsys):
    assert cli.main(["search", "--resume", "--out", str(whole), "--lr", "1"]) == 2
    assert "--lr has no effect on --resume, which goes on with the study as it was begun" in capsys.readouterr().err


def test_a_missing_optuna_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = sampling.importlib.util.find_spec
    monkeypatch.setattr(
        sampling.importlib.util, "find_spec", lambda name, *rest: None if name == "optuna" else real(name, *rest)
    )
    assert cli.main(["search", "--way", "learning"]) == 2
    assert "needs optuna: install the extra search (pip install 'gptkern[search]')\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
