"""What runs of the commands leave behind: whole checkpoints, on a full disk and after a loss that is NaN as well."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import pytest
import torch
from command_runs import TINY, train

from gptkern import cli
from gptkern.commands import RunError, checkpoints, display, training
from gptkern.models.gpt import GPT, GPTConfig

resource = pytest.importorskip("resource", reason="Windows has no limit of a file's size to set")


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def full_disk(size: int):
    """No file can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_finished_training_is_replaced_where_that_is_asked_for(folder, capsys):
    assert train("--out", "run") == 0
    before = content(folder)
    assert train("--out", "run", "--seed", "1") == 2
    assert "--out run holds a checkpoint: --overwrite replaces it" in capsys.readouterr().err
    assert content(folder) == before
    # A part of one is not written over either.
    os.remove("run/model.safetensors")
    assert train("--out", "run") == 2
    (folder / "run" / "notes.txt").write_text("mine")
    assert train("--out", "run", "--seed", "1", "--overwrite") == 0
    after = content(folder)
    assert after.keys() == before.keys() | {"run/notes.txt"} and after["run/notes.txt"] == b"mine"
    assert after["run/model.safetensors"] != before["run/model.safetensors"]


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_one_line(folder, capsys, size):
    assert train("--out", "run") == 0
    before = content(folder)
    capsys.readouterr()
    with full_disk(size):
        assert train("--out", "run", "--overwrite", "--seed", "1") == 1
        assert train("--out", "new/below") == 1
    assert content(folder) == before and not (folder / "new" / "below").exists()
    first, second = capsys.readouterr().err.splitlines()
    assert first == "gptkern train: run cannot be written: File too large; the checkpoint there is as it was"
    assert second == "gptkern train: new/below cannot be written: File too large"


def test_a_checkpoint_is_put_in_its_place_when_it_is_whole(folder, monkeypatch):
    """Whatever ends the writing, the disk or a signal."""
    checkpoints.save(GPT(TINY), folder / "run", {"step": 1})
    before = content(folder)
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        monkeypatch.setattr(os, "fsync", lambda handle, error=error: (_ for _ in ()).throw(error))
        with pytest.raises((KeyboardInterrupt, RunError)):
            checkpoints.save(GPT(TINY), folder / "run", {"step": 2})
        assert content(folder) == before and sorted(os.listdir("run")) == ["config.json", "model.safetensors"]


def test_a_disk_that_is_too_small_is_said_before(folder, capsys, monkeypatch):
    """The whole disk, through a size that none has."""
    monkeypatch.setattr(training, "parameter_bytes", lambda config: 10**18)
    assert train("--out", "run") == 2
    printed = capsys.readouterr()
    assert "--out run: it needs 1,000,000,000 GB on the disk and there are" in printed.err and "step" not in printed.out


# --- A loss that is no number -----------------------------------------------------------------------------------------


def test_a_training_that_diverges_writes_nothing_that_is_of_no_use(folder, capsys):
    assert train("--out", "new", "--lr", "1e30") == 1
    assert not (folder / "new").exists()
    assert (
        "gptkern train: the loss is nan at step 1: a lower --lr may help; nothing was written"
        in capsys.readouterr().err
    )
    assert train("--out", "run") == 0
    before = content(folder)
    assert train("--out", "run", "--overwrite", "--lr", "1e30") == 1
    assert content(folder) == before
    assert "the checkpoint in run is as it was" in capsys.readouterr().err


def poisoned_at(monkeypatch, step: int, value: float = torch.nan) -> None:
    """A parameter is no finite number after this many updates, in trainers to come."""
    update = training.Trainer._update

    def poisoned(self, index):
        loss = update(self, index)
        if index + 1 == step:
            self.model.final_norm.weight.data[0] = value
        return loss

    monkeypatch.setattr(training.Trainer, "_update", poisoned)


@pytest.mark.parametrize("step, value", [(7, torch.nan), (8, torch.inf)])
def test_the_best_until_then_is_kept(folder, capsys, monkeypatch, step, value):
    # Evaluated every step but the last, of 8; at its end the whole held-out text is.
    poisoned_at(monkeypatch, step, value)
    assert train("--out", "run", "--lr", "1e-3", steps=8) == 1
    assert f"at step {step}: a lower --lr may help; the checkpoint in run is that of step {step - 1}" in (
        capsys.readouterr().err
    )
    config = json.loads((folder / "run" / "config.json").read_text())["training"]
    assert config["step"] == step - 1 == config["validation_losses"][-1][0]
    kept = checkpoints.load(folder / "run", torch.device("cpu"))
    assert all(parameter.isfinite().all() for parameter in kept.parameters())
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    trainer = a_trainer(folder, steps=8)
    trainer.run(step - 1)
    for (name, parameter), other in zip(kept.named_parameters(), trainer.model.parameters()):
        assert torch.equal(parameter, other), name


def a_trainer(folder, steps: int) -> training.Trainer:
    recipe = training.Recipe(steps=steps, batch=2, length=16, lr=1e-3)
    config = GPTConfig.preset("nano", vocab_size=256, context=16)
    data = training.text.load(str(folder / "text.txt"), shortest=17)
    return training.Trainer(training.new_model(config, recipe), data, recipe)


def test_an_update_that_ends_in_nan_is_seen_though_every_loss_was_finite(folder, monkeypatch):
    trainer = a_trainer(folder, steps=3)
    poisoned_at(monkeypatch, 3)
    trainer.run(3)
    assert not trainer.finite()
    with pytest.raises(training.Diverged, match="the loss is nan at step 3"):
        trainer.validate()


def test_the_first_loss_that_is_none_is_named(folder, monkeypatch):
    trainer = a_trainer(folder, steps=5)
    poisoned_at(monkeypatch, 2)
    with pytest.raises(training.Diverged, match="the loss is nan at step 3"):
        trainer.run(5)
    assert trainer.step == 5


def test_back_to_the_best_is_the_best_and_not_the_last(folder):
    trainer = a_trainer(folder, steps=9)
    trainer.validations = [(0, 2.0)]
    trainer.note_best()
    expected = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.run(2)
    trainer.validations.append((2, 3.0))
    trainer.note_best()
    assert trainer.back_to_best() and trainer.step == 0 and trainer.validations == [(0, 2.0)]
    assert all(map(torch.equal, trainer.model.parameters(), expected))


def test_what_was_learnt_is_kept_when_the_terminal_goes_away(folder, monkeypatch):
    def gone(self):
        if self.trainers[0][1].step >= 2:
            raise BrokenPipeError
        self._line()

    monkeypatch.setattr(display.TrainingDisplay, "update", gone)
    monkeypatch.setattr(display.TrainingDisplay, "__exit__", lambda self, *exception: None)
    assert train("--out", "run") == 1
    assert json.loads((folder / "run" / "config.json").read_text())["training"]["step"] == 2


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_keeps_what_was_learnt_if_anything_was(folder, monkeypatch, capsys, after):
    run = training.Trainer.run

    def interrupted(self, steps):
        if self.step >= after:
            raise KeyboardInterrupt
        run(self, steps)

    monkeypatch.setattr(training.Trainer, "run", interrupted)
    assert train("--out", "run") == 130
    assert f"interrupted at step {after} of 4" in capsys.readouterr().out
    assert (folder / "run").exists() == (after > 0)


def signalled_at(monkeypatch, step: int, number: int, within: str) -> None:
    """A signal comes in the forward of this update, or while the optimizer is at its second half."""
    if within == "forward":
        batches = training.text.Batches.next

        def next_batch(self):
            self.taken = getattr(self, "taken", 0) + 1
            if self.taken == step:
                signal.raise_signal(number)
            return batches(self)

        monkeypatch.setattr(training.text.Batches, "next", next_batch)
    else:
        make = training.optimizer_of

        def optimizer_of(*arguments):
            optimizer, taken = make(*arguments), []

            def signal_first(*_):
                taken.append(1)
                if len(taken) == step:
                    signal.raise_signal(number)

            optimizer.register_step_pre_hook(signal_first)
            return optimizer

        monkeypatch.setattr(training, "optimizer_of", optimizer_of)


@contextlib.contextmanager
def not_under_nohup():
    """What these tests run under may be."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) if hasattr(signal, "SIGHUP") else None
    try:
        yield
    finally:
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("within, done", [("forward", 2), ("optimizer", 3)])
def test_a_signal_keeps_every_update_that_was_done(folder, monkeypatch, capsys, number, within, done):
    if not hasattr(signal, number):
        pytest.skip(f"{number} is none of this system's signals")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signalled_at(monkeypatch, 3, getattr(signal, number), within)
    with not_under_nohup():
        assert train("--out", "run", "--lr", "1e-3", steps=40) == 130
    assert f"interrupted at step {done} of 40" in capsys.readouterr().out
    assert json.loads((folder / "run" / "config.json").read_text())["training"]["step"] == done
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    trainer = a_trainer(folder, steps=40)
    trainer.run(done)
    kept = checkpoints.load(folder / "run", torch.device("cpu"))
    assert all(map(torch.equal, kept.parameters(), trainer.model.parameters()))


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_under_nohup_a_training_goes_on(folder, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled_at(monkeypatch, 2, signal.SIGHUP, "forward")
        assert train("--out", "run") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def an_interrupted_training(monkeypatch, *arguments: str) -> int:
    with monkeypatch.context() as patch:
        signalled_at(patch, 3, signal.SIGINT, "forward")
        return train(*arguments, steps=40)


def test_an_interrupted_training_is_put_beside_a_finished_one(folder, monkeypatch, capsys):
    assert train("--out", "run") == 0
    before = content(folder)
    (folder / "run-1").write_text("mine")
    for step in ("run-2", "run-3"):
        assert an_interrupted_training(monkeypatch, "--out", "run", "--overwrite") == 130
        said = f"interrupted at step 2 of 40: the checkpoint of step 2 is in {step}; the one in run is as it was"
        assert said in capsys.readouterr().out
        assert json.loads((folder / step / "config.json").read_text())["training"]["step"] == 2
    after = content(folder)
    assert {name: after[name] for name in before} == before and after["run-1"] == b"mine"
    monkeypatch.chdir(folder / "run")
    (folder / "run" / "text.txt").write_bytes(before["text.txt"])
    assert an_interrupted_training(monkeypatch, "--out", ".", "--overwrite") == 130
    assert (folder / "run-4" / "model.safetensors").exists()


@pytest.mark.parametrize("there", [False, True])
def test_two_trainings_of_one_folder_both_have_a_checkpoint(folder, monkeypatch, capsys, there):
    """The second begins and ends while the first is on its way."""
    run, started = training.Trainer.run, []

    def overtaken(self, steps):
        run(self, steps)
        if not started:
            started.append(1)
            assert train("--out", "run", "--seed", "1", *["--overwrite"] * there) == 0
            started.append(content(folder / "run"))

    if there:
        assert train("--out", "run") == 0
    monkeypatch.setattr(training.Trainer, "run", overtaken)
    assert train("--out", "run", *["--overwrite"] * there) == 1
    said = (
        "another program has written the checkpoint in run meanwhile: the checkpoint of step 4 is in run-1; the one in"
    )
    assert said in capsys.readouterr().err
    assert content(folder / "run") == started[1]
    assert json.loads((folder / "run-1" / "config.json").read_text())["training"]["recipe"]["seed"] == 0


@pytest.mark.parametrize("lr", ["2", "0.5", "1"])
def test_what_ends_far_above_the_untrained_model_replaces_nothing(folder, capsys, lr):
    # Evaluated at its end alone and every step, where the best on the way is none either.
    for steps in (1, 8):
        assert train("--out", "new", "--lr", lr, steps=steps) == 1
        printed = capsys.readouterr().err
        assert "the validation loss is" in printed and "before the first: a lower --lr may help; " in printed
        assert "nothing was written" in printed and not (folder / "new").exists()
    assert train("--out", "run") == 0
    before = content(folder)
    assert train("--out", "run", "--overwrite", "--lr", lr) == 1
    assert content(folder) == before
    assert "the checkpoint in run is as it was" in capsys.readouterr().err


def test_the_best_is_kept_where_the_end_is_far_above_the_untrained_model(folder, capsys, monkeypatch):
    poisoned_at(monkeypatch, 8, 1e3)
    assert train("--out", "run", "--lr", "1e-3", steps=8) == 1
    assert "a lower --lr may help; the checkpoint in run is that of step 7" in capsys.readouterr().err
    assert json.loads((folder / "run" / "config.json").read_text())["training"]["step"] == 7


def test_the_untrained_model_is_the_one_before_the_first_step(folder):
    trainer = a_trainer(folder, steps=2)
    expected = trainer.validate(), trainer.validate(3)
    trainer.run(2)
    assert (trainer.untrained(), trainer.untrained(3)) == expected


# --- The demo ---------------------------------------------------------------------------------------------------------


def demo(*arguments: str) -> int:
    sizes = ["--preset", "nano", "--context", "16", "--batch", "2", "--device", "cpu", "--steps", "4"]
    return cli.main(["demo", "--text", "text.txt", *sizes, "--sample-bytes", "4", "--check-seconds", "0", *arguments])


def test_a_demo_that_diverges_ends_and_says_so(folder, capsys):
    assert demo("--out", "out[b]:smile:", "--lr", "1e30") == 1
    printed = capsys.readouterr().out
    assert "the loss is nan at step 1" in printed and "out[b]:smile:/report.html" in printed
    assert not (folder / "out[b]:smile:" / "checkpoint").exists()
    assert "the loss is nan" in (folder / "out[b]:smile:" / "report.html").read_text()


def test_an_interrupted_demo_leaves_the_report_of_a_finished_one(folder, capsys, monkeypatch):
    def interrupted(self, steps):
        raise KeyboardInterrupt

    (folder / "out").mkdir()
    (folder / "out" / "report.html").write_text("finished")
    (folder / "out" / "results.json").write_text('{"interrupted": ""}')
    before = content(folder)
    monkeypatch.setattr(training.Trainer, "run", interrupted)
    assert demo("--out", "out") == 130 and content(folder) == before
    assert "out/report.html is that of an earlier run, which was finished" in capsys.readouterr().out
    (folder / "out" / "results.json").write_text('{"interrupted": "during: start"}')
    assert demo("--out", "out") == 130 and content(folder)["out/report.html"] != b"finished"


@pytest.mark.parametrize("of", ["train", "somebody", "nobody"])
def test_a_demo_replaces_no_checkpoint_but_its_own(folder, capsys, of):
    if of == "train":
        assert train("--out", "out/checkpoint") == 0
    elif of == "somebody":
        checkpoints.save(GPT(TINY), folder / "out" / "checkpoint")
    else:
        (folder / "out" / "checkpoint").mkdir(parents=True)
        (folder / "out" / "checkpoint" / "config.json").write_text("[")
    before = content(folder)
    assert demo("--out", "out") == 2
    assert "--out out: out/checkpoint holds a checkpoint of no demo: give another --out" in capsys.readouterr().err
    assert content(folder) == before


def test_a_demo_replaces_that_of_a_demo(folder):
    for seed in ("0", "1"):
        demo("--out", "out", "--seed", seed)
        history = json.loads((folder / "out" / "checkpoint" / "config.json").read_text())["training"]
        assert history["recipe"]["seed"] == int(seed)
