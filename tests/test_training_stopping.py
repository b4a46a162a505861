"""Early stopping: where a run ends, which of its models is kept, and that kills and resumptions change neither."""

from __future__ import annotations

import json

import pytest
from training_runs import lines_of, run, state_of, stopping_at

from gptkern.training import run as train_module
from gptkern.training import running, stopping
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.errors import UserError
from gptkern.training.loading import load_model
from gptkern.training.loop import Trainer

# Of random letters there is nothing to learn but themselves: the held-out loss falls, and rises.
RECIPE = {"steps": 200, "lr": 0.1, "schedule": "constant", "warmup": 0.0}
KEEPING = {"save_every": 1000, "keep": 1, "evaluate_every": 3, "evaluate_rows": 8, "patience": 3, "spike": 0.0}


@pytest.fixture(autouse=True)
def statuses(monkeypatch) -> list[str]:
    """What the reports say. To draw one takes as long as the rest of such a run."""
    said = []
    for module in (running, train_module):
        monkeypatch.setattr(module, "report", lambda *arguments: said.append(arguments[4]))
    return said


def ends_at(evaluations: list[tuple[int, float]], patience: int) -> tuple[int, int]:
    """(the step of the best, the step at which a run of that patience ends), by looking at all that came before."""
    for place, (step, _) in enumerate(evaluations):
        losses = [loss for _, loss in evaluations[: place + 1]]
        best = losses.index(min(losses))
        if place - best >= patience:
            return evaluations[best][0], step
    raise AssertionError("the held-out loss did not rise")


def test_a_run_ends_where_its_held_out_loss_rises_and_its_best_model_is_kept(tmp_path, statuses):
    outcome = run(tmp_path, recipe=RECIPE, keeping=KEEPING)
    lines = lines_of(tmp_path)
    evaluations = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    best, end = ends_at(evaluations, patience=3)
    assert best < end < 200 and lines[-1]["step"] == end
    assert outcome.step == end and outcome.finished and outcome.checkpoint.name == f"step-{best:08}"
    assert outcome.validation_loss == dict(evaluations)[best] == min(loss for _, loss in evaluations)
    assert [each.step for each in Checkpoints(tmp_path / "checkpoints").all()] == [best, end]
    loaded = load_model(tmp_path)
    assert loaded.about["step"] == best and loaded.about["passed_over"] == []
    early = f"Ended early: {end} of 200 updates. The held-out loss was lowest at step {best}, "
    assert statuses == [f"{early}{outcome.validation_loss:.4f}: that model is the run's."]
    # It is done: nothing is trained again. A longer patience goes on, from where it ended.
    assert run(tmp_path, recipe=RECIPE, keeping=KEEPING, resume=True) == outcome
    longer = run(tmp_path, recipe=RECIPE, keeping=KEEPING | {"patience": 5}, resume=True)
    assert longer.step == end + 6 and longer.checkpoint == outcome.checkpoint
    # A damaged best one is said, and the newest taken.
    (file,) = outcome.checkpoint.glob("tensors-*")
    file.write_bytes(file.read_bytes()[:-1])
    loaded = load_model(tmp_path)
    assert loaded.about["step"] == longer.step and "it is the best one" in loaded.about["passed_over"][0]


@pytest.mark.deep
def test_kills_and_resumptions_change_nothing(tmp_path, monkeypatch):
    run(tmp_path / "whole", recipe=RECIPE, keeping=KEEPING)
    whole = state_of(tmp_path / "whole")
    end = whole["lines"][-1]["step"]
    stops = [2, 3, 7, end - 4, end - 3, end]
    for number, step in enumerate(stops):
        run(tmp_path / "parts", recipe=RECIPE, keeping=KEEPING, resume=number > 0, **stopping_at(step))
    run(tmp_path / "parts", recipe=RECIPE, keeping=KEEPING, resume=True)
    assert state_of(tmp_path / "parts") == whole
    # Ended within an evaluation: the update is saved before it was judged.
    validate = Trainer.validate

    def interrupted(self, windows=None):
        if self.step in (6, end - 3, end):
            raise KeyboardInterrupt
        return validate(self, windows)

    for number in range(3):
        monkeypatch.setattr(Trainer, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "again", recipe=RECIPE, keeping=KEEPING, resume=number > 0)
        monkeypatch.setattr(Trainer, "validate", validate)
        step = Checkpoints(tmp_path / "again" / "checkpoints").newest()[0].step
        run(tmp_path / "again", recipe=RECIPE, keeping=KEEPING, resume=True, **stopping_at(step + 1))
    outcome = run(tmp_path / "again", recipe=RECIPE, keeping=KEEPING, resume=True)
    assert (outcome.step, lines_of(tmp_path / "again")) == (end, whole["lines"])
    assert outcome.checkpoint.name == f"step-{whole['about']['best']['step']:08}"


def test_a_run_that_does_not_wait_takes_its_last_model(tmp_path):
    outcome = run(tmp_path, recipe=RECIPE | {"steps": 30}, keeping=KEEPING | {"patience": None})
    assert outcome.step == 30 and load_model(tmp_path).about["step"] == 30
    assert "best" not in Checkpoint(outcome.checkpoint).about


@pytest.mark.parametrize(
    "best",
    [
        {}, [], 3, {"evaluated": 1, "evaluations_since": 0, "step": 9, "validation_loss": 1.0},
        {"evaluated": 1, "evaluations_since": True, "step": 3, "validation_loss": 1.0},
        {"evaluated": 1, "evaluations_since": 0, "step": 3, "validation_loss": float("nan")},
        {"evaluated": 1, "evaluations_since": 0, "step": "../x", "validation_loss": 1.0},
        {"evaluated": 1, "evaluations_since": 0, "step": 3},
    ],
)  # fmt: skip
def test_what_about_json_says_of_it_is_not_trusted(best):
    class Told:
        about = json.loads(json.dumps({"best": best}))
        step, folder = 4, "a folder"

    with pytest.raises(UserError, match=r"about\.json: best is none"):
        stopping.best_of(Told())
