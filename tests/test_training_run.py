"""A run as a library: what it writes, what ends it, what is left then, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs
from saved_checkpoints import ends, largest_file, start
from training_runs import CONFIG, KEEPING, RECIPE, a_store, content, lines_of, run, state_of, stopping_at, told

from gptkern.formatting import shown
from gptkern.models.gpt import GPT
from gptkern.training import metrics, recipe_files, running
from gptkern.training import run as train_module
from gptkern.training.board import Board
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.data.store import ArrayTokens
from gptkern.training.errors import RunError, UserError
from gptkern.training.loop import Diverged, Trainer, new_model
from gptkern.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """A report takes as long as the rest of such a run: it is left away where no test looks at it."""
    if "reported" not in request.fixturenames:
        monkeypatch.setattr(running, "report", lambda *_: None)
        monkeypatch.setattr(train_module, "report", lambda *_: None)


@pytest.fixture
def reported():
    """A test that looks at the report asks for this."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing ended; not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = run(folder)
    assert outcome.finished and outcome.step == 12
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def back_to(folder: Path, step: int) -> None:
    """As a run that was ended after the checkpoint of this step."""
    for checkpoint in Checkpoints(folder / "checkpoints").all():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.folder)


def damage(checkpoint: Checkpoint) -> None:
    file = next(checkpoint.folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# --- What a run writes ------------------------------------------------------------------------------------------------


def test_a_line_for_each_update_with_the_trainer_s_own_numbers(whole):
    """Of a trainer that is driven by hand: the losses are the same numbers, to the last digit."""
    from gptkern.swapping import swap

    model = new_model(CONFIG, RECIPE.seed)
    swap(model)
    trainer = Trainer(model, a_store(), RECIPE)
    untrained = trainer.validate(KEEPING.evaluate_rows)
    expected = []
    for step in range(1, 13):
        trainer.update()
        (record,) = trainer.records()
        line = {name: getattr(record, name) for name in ("step", "loss", "grad_norm", "lr", "tokens")}
        if step == 1:
            line["untrained_validation_loss"] = untrained
        if step % 4 == 0:
            line["validation_loss"] = trainer.validate(None if step == 12 else KEEPING.evaluate_rows)
        expected.append(line)
    trainer.close()
    assert lines_of(whole) == expected
    raw = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in raw)
    assert sorted(line["seconds"] for line in raw) == [line["seconds"] for line in raw]


def test_the_files_of_a_run(whole):
    files = {name.partition("/")[0] for name in content(whole)}
    assert files == {".lock", "recipe.toml", "metrics.jsonl", "report.html", "checkpoints"}
    assert [each.step for each in Checkpoints(whole / "checkpoints").all()] == [9, 12]
    stored = recipe_files.read(whole / "recipe.toml").values
    assert (stored["steps"], stored["context"], stored["accumulate"], stored["threads"]) == (12, 8, 2, 1)
    assert (stored["save_every"], stored["keep"]) == (3, 2)
    about = Checkpoint(whole / "checkpoints" / "step-00000012").about
    assert about["config"]["width"] == 16 and about["data"]["name"] == "letters"
    assert about["tokenizer"] == {"kind": "bytes", "end_of_text": False}


def test_the_report_needs_nothing_else(whole):
    page = (whole / "report.html").read_text()
    assert "Finished: 12 updates." in page and page.count("<svg") == 1
    for word in ("held-out part", "gradient norm", "learning rate", "tokens/s", "accumulate", "letters: 500 tokens"):
        assert word in page, word
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "") and "src=" not in page


def test_what_a_watcher_is_told(tmp_path):
    seen = []
    run(tmp_path / "run", watch=seen.append)
    assert [each.step for each in seen] == list(range(13)) and {each.steps for each in seen} == {12}
    assert seen[0].loss is None and seen[0].validation > 0 and seen[0].seconds_left is None
    assert [each.saved for each in seen] == [None] * 3 + [3] * 3 + [6] * 3 + [9] * 3 + [12]
    assert seen[-1].seconds_left == 0 and all(each.seconds_left > 0 for each in seen[1:-1])


def test_tensorboard_where_it_is_asked_for(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "ré[sumé]…"
    on = {"tensorboard": "on"}
    run(folder, keeping=on, **stopping_at(5))
    back_to(folder, 3)
    run(folder, keeping=on, resume=True)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    drawn = {event.step: event.value for event in events.Scalars("loss")}
    assert drawn == {line["step"]: pytest.approx(line["loss"]) for line in lines_of(folder)}
    assert [event.step for event in events.Scalars("validation_loss")] == [4, 8, 12]


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard on: TensorBoard is not installed"):
        run(tmp_path / "run", keeping={"tensorboard": "on"})
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", keeping={"tensorboard": "auto"}, recipe={"steps": 1}).finished


def test_a_disk_that_is_full_for_tensorboard_alone_ends_no_run(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tmp_path / "run").mkdir()
    said = []
    board = Board(tmp_path / "run" / "tensorboard", 0, said.append)
    with largest_file(0):
        for step in range(1, 200):
            board.add({"step": step, "loss": 1.0})
        board.close()
    board.close()
    assert said == ["TensorBoard's files are not written on: File too large"]


# --- Going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"precision": "fp16"}, {"precision": "bf16", "schedule": "wsd"}])
def test_interrupted_anywhere_and_resumed_it_is_the_same_run(tmp_path, changes):
    """With float16 the loss scale and its skipped updates too; dropout, the place in the data and the schedule."""
    run(tmp_path / "whole", recipe=changes)
    folder = tmp_path / "run"
    for step in (1, 4, 8, 11):
        outcome = run(folder, recipe=changes, resume=step > 1, **stopping_at(step))
        assert outcome == (step, False, outcome.validation_loss, folder / "checkpoints" / f"step-{step:08}")
    assert run(folder, recipe=changes, resume=True).finished
    ours, theirs = state_of(folder), state_of(tmp_path / "whole")
    assert ours.pop("steps") == [11, 12] and theirs.pop("steps") == [9, 12]
    assert ours == theirs
    if changes.get("precision") == "fp16":
        assert all(line["scale"] > 1 for line in ours["lines"]) and ours["about"]["scaler"]


def test_lines_beyond_the_checkpoint_are_cut_off_and_a_torn_one(copy, whole):
    back_to(copy, 9)
    with open(copy / "metrics.jsonl", "r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.truncate()
    assert run(copy, resume=True).finished
    assert state_of(copy) == state_of(whole)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not tell what a descriptor is of")
def test_the_lines_of_a_checkpoint_are_on_the_disk_before_it(tmp_path, monkeypatch):
    """What a power cut would show: metrics.jsonl is synced before the first file of each checkpoint."""
    fsync, synced = os.fsync, []

    def noted(handle):
        synced.append(re.sub(r".*/(metrics.jsonl|\.step-\d+).*", r"\1", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run(tmp_path / "run")
    for number, step in enumerate((3, 6, 9, 12), 1):
        before = synced[: synced.index(f".step-{step:08}")]
        # A save waits for the one before, so that the lines of the next may be there already.
        assert before.count("metrics.jsonl") >= number, synced


@pytest.mark.parametrize("step", [4, 12])
def test_an_evaluation_that_was_not_reached_is_made_up_for(tmp_path, whole, monkeypatch, step):
    """Ctrl-C while the held-out part is looked at, between an update and the checkpoint."""
    validate = Trainer.validate

    def interrupted(self, rows=None):
        if self.step == step:
            raise KeyboardInterrupt
        return validate(self, rows)

    folder = tmp_path / "run"
    monkeypatch.setattr(Trainer, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert Checkpoints(folder / "checkpoints").newest()[0].step == step
    monkeypatch.undo()
    assert run(folder, resume=True).finished
    ours, theirs = state_of(folder), state_of(whole)
    assert (ours["lines"], ours["tensors"]) == (theirs["lines"], theirs["tensors"])


@pytest.mark.parametrize("step", [8, 12])
def test_an_evaluation_that_is_made_up_for_may_be_ended_too(copy, whole, monkeypatch, step):
    """The line stays as it is until the evaluation is done: killed before, the run can go on still."""
    folder = copy
    back_to(folder, step)
    if step == 8:
        shutil.rmtree(folder)
        run(folder, **stopping_at(8))
    given = [line for line in (folder / "metrics.jsonl").read_text().splitlines(True)][:step]
    last = json.loads(given[-1])
    del last["validation_loss"]
    (folder / "metrics.jsonl").write_text("".join(given[:-1]) + json.dumps(last) + "\n")
    seen = []

    def ended(self, rows=None):
        seen.append(told(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "validate", ended)
    with pytest.raises(KeyboardInterrupt):
        run(folder, resume=True)
    assert seen == [list(range(1, step + 1))]
    monkeypatch.undo()
    assert run(folder, resume=True).finished
    assert lines_of(folder) == lines_of(whole)


def test_a_damaged_checkpoint_is_passed_over_loudly(copy, whole):
    newest = Checkpoints(copy / "checkpoints").newest()[0]
    damage(newest)
    said = []
    assert run(copy, resume=True, say=said.append).finished
    assert said[0].startswith("passed over a damaged checkpoint: ") and "step-00000012" in said[0]
    assert state_of(copy) == state_of(whole)


def test_a_damaged_checkpoint_is_never_named_as_the_newest(copy, monkeypatch):
    damage(Checkpoints(copy / "checkpoints").newest()[0])
    outcome = run(copy, resume=True, **stopping_at(10))
    assert outcome[:2] == (10, False) and outcome.checkpoint == copy / "checkpoints" / "step-00000010"
    poisoned(monkeypatch, 11, math.nan)
    with pytest.raises(Diverged, match="the checkpoint of step 10 is "):
        run(copy, resume=True)


def test_a_run_of_which_no_checkpoint_is_whole_does_not_begin_anew(copy):
    for checkpoint in Checkpoints(copy / "checkpoints").all():
        damage(checkpoint)
    before = content(copy)
    with pytest.raises(UserError, match=r"has no whole checkpoint \(.*step-00000012"):
        run(copy, resume=True)
    assert content(copy) == before


def test_a_finished_run_is_left_as_it_is(copy):
    before = content(copy)
    outcome = run(copy, resume=True)
    assert outcome.finished and outcome.step == 12 and outcome.validation_loss == lines_of(copy)[-1]["validation_loss"]
    assert content(copy) == before


def test_a_run_without_a_checkpoint_stays_one(tmp_path, whole):
    """Interrupted again before its first update, and on a full disk: it can be resumed all the same."""
    folder = tmp_path / "run"
    assert run(folder, stop=lambda: True) == (0, False, pytest.approx(5.5, abs=0.5), None) and not folder.exists()
    assert ends([start(dying, folder)]) == [3]
    before = (folder / "recipe.toml").read_bytes()
    assert run(folder, resume=True, recipe={"seed": 1}, stop=lambda: True).step == 0
    with largest_file(0), pytest.raises(RunError, match="File too large"):
        run(folder, resume=True, recipe={"seed": 1})
    assert (folder / "recipe.toml").read_bytes() == before
    assert run(folder, resume=True, recipe={"seed": 1}).finished


def test_what_would_be_another_run_is_refused(copy, tmp_path):
    back_to(copy, 9)
    before = content(copy)
    for recipe, words in (
        ({"lr": 0.5}, "lr is 0.5; the run in .* began with 0.01"),
        ({"steps": 50}, "steps is 50; the run in .* began with 12"),
        ({"length": 4}, "context is 4; the run in .* began with 8"),
        ({"seed": 3}, "seed is 3; the run in .* began with 0"),
    ):
        with pytest.raises(UserError, match=words):
            run(copy, resume=True, recipe=recipe)
    with pytest.raises(UserError, match=r"the data, letters, are not what the run in .* is trained on: letters"):
        run(copy, resume=True, store=a_store(1))
    with pytest.raises(UserError, match="is of a model of other sizes"):
        run(copy, resume=True, config=training_runs.dataclasses.replace(CONFIG, layers=2))
    with pytest.raises(UserError, match="holds no run that --resume could go on with"):
        run(tmp_path / "none", resume=True)
    assert content(copy) == before and not (tmp_path / "none").exists()


def test_the_number_of_threads_is_the_run_s(tmp_path, whole):
    """On which sums depend: whatever the process has, the run goes on with its own, and gives the other back."""
    folder, before = tmp_path / "run", torch.get_num_threads()
    run(folder, **stopping_at(5))
    try:
        torch.set_num_threads(2)
        seen = []
        assert run(folder, resume=True, recipe={"threads": None}, watch=lambda _: seen.append(torch.get_num_threads()))
        assert set(seen) == {1} and torch.get_num_threads() == 2
        assert recipe_files.read(folder / "recipe.toml").values["threads"] == 1
    finally:
        torch.set_num_threads(before)
    assert (lines_of(folder), state_of(folder)["tensors"]) == (lines_of(whole), state_of(whole)["tensors"])


def test_bookkeeping_may_change_on_the_way(tmp_path, whole):
    folder = tmp_path / "run"
    run(folder, **stopping_at(5))
    assert run(folder, resume=True, keeping={"save_every": 2, "keep": 5}).finished
    assert state_of(folder)["steps"] == [5, 6, 8, 10, 12]
    assert recipe_files.read(folder / "recipe.toml").values["keep"] == 5
    assert (lines_of(folder), state_of(folder)["tensors"]) == (lines_of(whole), state_of(whole)["tensors"])


def test_metrics_that_are_gone_or_none(copy):
    back_to(copy, 9)
    (copy / "metrics.jsonl").unlink()
    said = []
    assert run(copy, resume=True, say=said.append).finished
    assert any("does not reach the checkpoint's step, 9" in line for line in said)
    assert [line["step"] for line in lines_of(copy)] == [10, 11, 12]
    back_to(copy, 9)
    (copy / "metrics.jsonl").write_text('{"step": 8}\n[]\n{"step": 11}\n')
    before = content(copy)
    with pytest.raises(UserError, match="the line after that of step 8 is no line of an update"):
        run(copy, resume=True, keeping={"keep": 7})
    assert content(copy) == before
    # Behind the checkpoint's line it goes with what is cut off.
    (copy / "metrics.jsonl").write_text('{"step": 9}\n[]\n{"step": 11}\n')
    assert run(copy, resume=True).finished


def test_lines_that_are_gone_end_no_run(tmp_path, reported):
    """Said when the run goes on, and no matter from then on: neither to its report nor to the next part."""
    folder, said = tmp_path / "run", []
    run(folder, **stopping_at(5))
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:4]))
    assert run(folder, resume=True, say=said.append, **stopping_at(7)).step == 7
    assert any("does not reach the checkpoint's step, 5" in line for line in said)
    assert run(folder, resume=True, say=said.append).finished
    assert [line["step"] for line in lines_of(folder)] == [1, 2, 4, *range(6, 13)]
    assert "Finished: 12 updates." in (folder / "report.html").read_text()


@pytest.mark.parametrize("apart, reports", [(0, ["3", "6", "9"]), (10**9, ["3"])])
def test_reports_on_the_way_take_little_of_the_time(tmp_path, monkeypatch, apart, reports):
    statuses = []
    monkeypatch.setattr(running, "report", lambda *given: statuses.append(given[4]))
    monkeypatch.setattr(running, "SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr(running, "REPORTS_APART", apart)
    assert run(tmp_path / "run").finished
    # None of the last step: its own comes next.
    assert statuses == [f"Under way: {step} of 12 updates." for step in reports] + ["Finished: 12 updates."]


def test_a_speed_that_is_not_known_is_left_away(tmp_path, monkeypatch):
    synchronize, calls = running.synchronize, []

    def failing(device):
        calls.append(device)
        if len(calls) == 2:
            raise MemoryError
        synchronize(device)

    monkeypatch.setattr(running, "synchronize", failing)
    with pytest.raises(MemoryError):
        run(tmp_path / "run")
    first, second = metrics.lines(tmp_path / "run" / "metrics.jsonl")
    assert first["tokens_per_second"] > 0 and "tokens_per_second" not in second


def test_a_report_that_cannot_be_drawn_is_a_line(tmp_path, reported):
    folder, said = tmp_path / "run", []

    def watch(progress):
        if progress.step == 12:
            (folder / "report.html").mkdir()

    assert run(folder, watch=watch, say=said.append).finished
    assert re.fullmatch(r"the report was not written: .*report.html cannot be written: .*", said[-1])


def test_a_model_that_has_weights(tmp_path):
    model = GPT(CONFIG)
    run(tmp_path / "run", config=None, model=lambda: model, recipe={"steps": 1, "lr": 1e-9})
    kept = Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001")
    into = {"token_embedding.weight": torch.zeros(256, 16)}
    kept.read(into, prefix="model.")
    assert torch.allclose(into["token_embedding.weight"], model.token_embedding.weight.detach())
    for wrong in ({"config": None}, {"config": CONFIG, "model": model}):
        with pytest.raises(ValueError, match="one of config and model"):
            training_runs.train(RECIPE, a_store(), tmp_path / "new", say=training_runs.silent, **wrong)
    assert not (tmp_path / "new").exists()


# --- What ends a run --------------------------------------------------------------------------------------------------


def poisoned(monkeypatch, step: int, value: float) -> None:
    """Each parameter of the last norm has this value after the update of that step."""
    update = Trainer.update

    def update_and_poison(self):
        update(self)
        if self.step == step:
            with torch.no_grad():
                self.model.final_norm.weight.fill_(value)

    monkeypatch.setattr(Trainer, "update", update_and_poison)


@pytest.mark.parametrize(
    "step, value, words, kept",
    [
        # Seen by the next update; by an evaluation; by the parameters themselves, before they are saved.
        (6, math.nan, "a parameter is nan at step 6", 3),
        (7, math.nan, "the loss is nan at step 8", 6),
        (8, math.nan, "the loss is nan at step 8", 6),
        (10, math.inf, "the loss is nan at step 11", 9),
        # Finite, and far above: losses and evaluations on the way only put the checkpoint off.
        (5, 1e4, r"the validation loss is \d+\.\d+ at step 12, and that before the first 5\.\d+", 3),
        (8, 1e4, r"the validation loss is \d+\.\d+ at step 12, and that before the first 5\.\d+", 6),
    ],
)
def test_a_loss_that_is_of_no_use_ends_it_and_saves_nothing(tmp_path, monkeypatch, step, value, words, kept):
    poisoned(monkeypatch, step, value)
    folder = tmp_path / "run"
    with pytest.raises(Diverged, match=f"{words}: a lower learning rate may help; the checkpoint of step {kept} is "):
        run(folder)
    newest, damaged = Checkpoints(folder / "checkpoints").newest()
    assert newest.step == kept and damaged == []
    into = {"final_norm.weight": torch.zeros(16)}
    newest.read(into, prefix="model.")
    assert into["final_norm.weight"].isfinite().all() and into["final_norm.weight"].abs().max() < 2
    # What the lines say of the last update is JSON, whatever it was.
    text = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    monkeypatch.undo()
    assert run(folder, resume=True).finished


def test_a_spike_that_lasts_ends_it(tmp_path, monkeypatch):
    poisoned(monkeypatch, 7, 1e4)
    longer = {"steps": 40}
    words = r"the loss is \d+\.\d+ at step 17, and after 10 updates far above the median before them, 5\.\d+: "
    with pytest.raises(Diverged, match=f"{words}a lower learning rate may help; the checkpoint of step 6 is "):
        run(tmp_path / "run", recipe=longer)
    assert len(lines_of(tmp_path / "run")) == 17
    # Where it is allowed the end is what counts, and what was saved meanwhile is there.
    with pytest.raises(Diverged, match=r"the validation loss is .* at step 40, and that before the first "):
        run(tmp_path / "other", recipe=longer, keeping={"spike": 0.0})
    assert len(lines_of(tmp_path / "other")) == 40
    assert Checkpoints(tmp_path / "other" / "checkpoints").newest()[0].step == 39


def test_a_spike_that_goes_by_puts_the_checkpoint_off(tmp_path, monkeypatch):
    """In the sixth update, after which a checkpoint is due; bad weights are gone again after the eighth."""
    update, seen = Trainer.update, []

    def update_and_poison(self):
        update(self)
        if self.step in (5, 8):
            with torch.no_grad():
                self.model.final_norm.weight.fill_(1e4 if self.step == 5 else 1.0)

    monkeypatch.setattr(Trainer, "update", update_and_poison)
    assert run(tmp_path / "run", watch=lambda now: seen.append(now.saved)).finished
    assert seen == [None] * 3 + [3] * 6 + [9] * 3 + [12]


def test_the_losses_before_a_checkpoint_count_for_a_resumed_run(tmp_path, monkeypatch):
    folder, longer = tmp_path / "run", {"steps": 40}
    # After the sixth update, whose own loss shows nothing of it.
    poisoned(monkeypatch, 6, 1e4)
    run(folder, recipe=longer, **stopping_at(6))
    with pytest.raises(Diverged, match=r"at step 16, and after 10 updates far above the median"):
        run(folder, recipe=longer, resume=True)


@pytest.mark.parametrize("how", ["signal", "failure"])
def test_interrupted_in_a_spike_it_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, whole, how):
    poisoned(monkeypatch, 5, 1e4)
    folder, said = tmp_path / "run", []

    def failing(progress):
        if progress.step == 7:
            raise MemoryError

    if how == "signal":
        outcome = run(folder, keeping={"keep": 1}, say=said.append, **stopping_at(7))
        assert outcome[:2] == (7, False) and outcome.checkpoint == folder / "checkpoints" / "step-00000003"
        assert said[-1] == "the losses at step 7 are far above those before them: its model was not saved"
    else:
        with pytest.raises(MemoryError):
            run(folder, keeping={"keep": 1}, watch=failing)
    assert [each.step for each in Checkpoints(folder / "checkpoints").all()] == [3]
    monkeypatch.undo()
    assert run(folder, resume=True).finished and lines_of(folder) == lines_of(whole)


def test_a_run_whose_end_is_far_above_has_diverged(tmp_path, monkeypatch):
    """By losses alone, and by the last evaluation alone; by the last update's loss alone it has not."""
    records, validate = Trainer.records, Trainer.validate
    low = {"keeping": {"keep": 1, "spike": 1.0}}

    def above(self):
        return [each._replace(loss=each.loss + 2) if each.step >= first else each for each in records(self)]

    monkeypatch.setattr(Trainer, "records", above)
    first = 12
    assert run(tmp_path / "one", **low).checkpoint.name == "step-00000012"
    first = 11
    words = r"the loss is \d\.\d+ at step 12, and that is far above the median before the last 2 updates, \d\.\d+: "
    with pytest.raises(Diverged, match=words):
        run(tmp_path / "losses", **low)
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "validate", lambda self, rows=None: validate(self, rows) - 2 * (0 < self.step < 12))
    words = r"the validation loss is \d\.\d+ at step 12, and the lowest before it is \d\.\d+: .* step 9 is"
    with pytest.raises(Diverged, match=words):
        run(tmp_path / "evaluations", **low)
    for name in ("losses", "evaluations"):
        assert [each.step for each in Checkpoints(tmp_path / name / "checkpoints").all()] == [9]


class Damaged(ArrayTokens):
    """Tokens of which the later ones cannot be read."""

    def read(self, start: int, stop: int) -> np.ndarray:
        if start >= 100:
            raise UserError("train-00000.zst: frame 17 is damaged; nothing was trained on it")
        return super().read(start, stop)


def test_damaged_data_end_it_with_what_was_done_until_then(tmp_path, whole):
    store = a_store()
    damaged = store._replace(train=Damaged(store.train.array))
    folder = tmp_path / "run"
    with pytest.raises(
        RunError, match=r"train-00000.zst: frame 17 is damaged; nothing was trained on it; (.*)$"
    ) as error:
        run(folder, store=damaged)
    step = len(lines_of(folder))
    newest, _ = Checkpoints(folder / "checkpoints").newest()
    if step:
        assert newest.step == step and f"the checkpoint of step {step} is " in str(error.value)
    # With the data mended it is the run that it would have been.
    assert run(folder, resume=True).finished
    assert lines_of(folder) == lines_of(whole)


def test_the_report_says_how_it_ended(tmp_path, monkeypatch, reported):
    folder = tmp_path / "run"
    run(folder, **stopping_at(5))
    assert "Interrupted after 5 of 12 updates." in (folder / "report.html").read_text()
    poisoned(monkeypatch, 7, math.nan)
    with pytest.raises(Diverged):
        run(folder, resume=True)
    assert "Ended: the loss is nan at step 8: a lower learning rate may help; the checkpoint of step 6 is " in (
        (folder / "report.html").read_text()
    )
    monkeypatch.undo()
    # Killed between the last checkpoint and the report: the report is what is left to do.
    monkeypatch.setattr(running, "report", lambda *_: None)
    assert run(folder, resume=True).finished and "Ended" in (folder / "report.html").read_text()
    assert run(folder, resume=True).finished and "Finished" in (folder / "report.html").read_text()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), MemoryError(), KeyboardInterrupt()])
def test_what_was_learnt_is_kept_when_something_else_fails(tmp_path, whole, error):
    def watch(progress):
        if progress.step == 5:
            raise error

    folder = tmp_path / "run"
    with pytest.raises(type(error)):
        run(folder, watch=watch)
    assert Checkpoints(folder / "checkpoints").newest()[0].step == 5
    assert run(folder, resume=True).finished
    assert lines_of(folder) == lines_of(whole)


@pytest.mark.parametrize("size", [0, 300, 1500, 20_000])
def test_a_full_disk_is_said_and_what_is_there_is_whole(tmp_path, size):
    """At the recipe, at a line of the metrics, in a checkpoint."""
    folder = tmp_path / "run"
    with largest_file(size), pytest.raises(RunError, match="File too large") as error:
        run(folder, keeping={"save_every": 1})
    assert str(error.value).count("\n") == 0
    checkpoints = Checkpoints(folder / "checkpoints")
    newest, damaged = checkpoints.newest()
    assert damaged == []
    if size <= 300:
        assert not folder.exists()
    else:
        assert newest is None and re.search("there is no (older checkpoint|checkpoint yet)$", str(error.value))
        assert run(folder, keeping={"save_every": 1}, resume=True).finished


def test_a_disk_that_is_full_later_leaves_the_older_checkpoint(tmp_path, whole):
    folder = tmp_path / "run"
    run(folder, **stopping_at(5))
    size = (folder / "metrics.jsonl").stat().st_size
    words = "metrics.jsonl cannot be written: File too large; the checkpoint of step 5 is "
    with largest_file(size + 10), pytest.raises(RunError, match=words):
        run(folder, resume=True)
    assert Checkpoints(folder / "checkpoints").newest()[0].step == 5
    assert run(folder, resume=True).finished and lines_of(folder) == lines_of(whole)


# --- Another run in its place -----------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused(copy):
    before = content(copy)
    with pytest.raises(UserError, match=r"^--out .* holds a run: --resume goes on with it, --overwrite replaces it"):
        run(copy)
    assert content(copy) == before


@pytest.mark.parametrize("name", ["report.html", "config.json", "tokenizer.json", "model.safetensors"])
def test_what_no_training_wrote_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"holds {name}, which no training wrote: give another --out"):
            run(tmp_path, overwrite=overwrite)
    assert content(tmp_path) == {name: b"mine"}


def test_a_run_is_replaced_once_the_new_one_has_a_checkpoint(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "tensorboard").mkdir()
    there = []

    def watch(progress):
        there.append((copy / ".replaced").exists())

    assert run(copy, overwrite=True, recipe={"seed": 1}, watch=watch).finished
    assert there == [True] * 3 + [False] * 10
    assert (copy / "notes.txt").read_text() == "mine" and not (copy / "tensorboard").exists()
    assert recipe_files.read(copy / "recipe.toml").values["seed"] == 1


@pytest.mark.parametrize("ending", ["nan", "interrupt", "stop", "disk"])
def test_a_run_is_back_if_the_new_one_ends_before(copy, monkeypatch, ending):
    before = content(copy)

    def watch(progress):
        if progress.step == 2 and ending == "interrupt":
            raise KeyboardInterrupt

    if ending == "nan":
        poisoned(monkeypatch, 1, math.nan)
        with pytest.raises(Diverged, match=r"; the run in .* is as it was$"):
            run(copy, overwrite=True, recipe={"seed": 1})
    elif ending == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            run(copy, overwrite=True, watch=watch)
    elif ending == "disk":
        with largest_file(500), pytest.raises(RunError, match="cannot be written"):
            run(copy, overwrite=True)
    else:
        assert run(copy, overwrite=True, **stopping_at(2)) == (2, False, pytest.approx(5.5, abs=1), None)
    assert content(copy) == before


def dying(folder: Path) -> None:
    def watch(progress):
        if progress.step == 2:
            os._exit(3)

    run(folder, overwrite=True, recipe={"seed": 1}, watch=watch)


def test_a_run_is_back_after_the_new_one_was_killed(copy):
    before = content(copy)
    assert ends([start(dying, copy)]) == [3]
    assert (copy / ".replaced").exists()
    said = []
    assert run(copy, resume=True, say=said.append).finished
    where = shown(str(copy))
    assert said == [f"what was to replace the run in {where} was ended before its first checkpoint: the run is back"]
    assert content(copy) == before


def test_a_move_that_was_cut_off_is_taken_back(copy, monkeypatch):
    before = content(copy)
    for after in range(1, 4):
        rename, done = os.rename, []

        def cut(source, target, rename=rename, done=done, after=after):
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(source)
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", cut)
            # The way back is cut off too.
            with pytest.raises(KeyboardInterrupt):
                RunFolder(copy).set_aside()
        assert RunFolder(copy).mend() is None
        assert content(copy) == before and not (copy / ".replaced").exists()


def test_two_programs_in_one_folder(tmp_path):
    folder, status = tmp_path / "run", []

    def other() -> None:
        for more in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UserError, match="another program is training there"):
                run(folder, **more)

    def watch(progress):
        if progress.step == 2:
            status.extend(ends([start(other)]))

    assert run(folder, watch=watch).finished and status == [0]
    # The lock goes with the program.
    assert run(folder, overwrite=True, recipe={"steps": 1}).finished


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_lines_are_cut_where_they_are_asked_to_be(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics.cut(path, 3) == [] and not path.exists()
    written = [{"step": step, "loss": 0.1 * step} for step in range(1, 6)]
    file = metrics.Metrics(path)
    file.append(written[:3])
    file.append(written[3:])
    file.close()
    whole = path.read_bytes()
    for torn in (b"", b'{"step": 6', b'{"step": 6, "loss": 1.0}'):
        path.write_bytes(whole + torn)
        assert list(metrics.lines(path)) == written
        assert metrics.cut(path, 5) == written and path.read_bytes() == whole
    assert metrics.cut(path, 2) == written[:2] and path.read_bytes() == b"".join(whole.splitlines(True)[:2])
    assert metrics.cut(path, 0) == [] and path.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        "{}",
        '{"step": 1}',
        '{"step": 2.0}',
        '{"step": 2, "loss": "abc"}',
        '{"step": 2, "seconds": []}',
        '{"step": 2, "grad_norm": true}',
        '{"step": 2, "validation_loss": NaN}',
        '{"step": 2, "skipped": 3}',
        '{"step": "2"}',
        "nonsense",
        "[" * 70_000,
    ],
)
def test_a_line_that_is_none_is_named_and_nothing_is_cut(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(UserError, match="the line after that of step 1 is no line of an update"):
        metrics.cut(path, 5)
    assert path.read_text().endswith(line + "\n")
