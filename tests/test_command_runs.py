"""Runs on the command line: exit statuses, the one line that each ends with, and what is left in the folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_runs import TINY, train
from model_folders import model, save_run
from saved_checkpoints import largest_file
from training_runs import content, tensors_of

from gptkern import cli
from gptkern.commands import checkpoints
from gptkern.models.gpt import GPT
from gptkern.training import recipe_files, running
from gptkern.training import run as train_module
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.data.preparing import prepare
from gptkern.training.loop import Trainer

pytest.importorskip("resource", reason="Windows has no limit of a file's size to set")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A report takes as long as the rest of such a run; tests/test_training_run.py looks at it."""
    monkeypatch.setattr(running, "report", lambda *_: None)
    monkeypatch.setattr(train_module, "report", lambda *_: None)


def newest(folder) -> Checkpoint:
    checkpoint, damaged = Checkpoints(Path(folder) / "checkpoints").newest()
    assert damaged == []
    return checkpoint


def resume(*arguments: str) -> int:
    return cli.main(["train", "--resume", *arguments])


# --- A folder ---------------------------------------------------------------------------------------------------------


def test_a_finished_training_is_replaced_where_that_is_asked_for(folder, capsys):
    assert train("--out", "run") == 0
    before = content(folder)
    assert train("--out", "run", "--seed", "1") == 2
    assert capsys.readouterr().err == (
        "gptkern train: --out run holds a run: --resume goes on with it, --overwrite replaces it, another --out leaves "
        "it\n"
    )
    assert content(folder) == before
    (folder / "run" / "notes.txt").write_text("mine")
    assert train("--out", "run", "--seed", "1", "--overwrite") == 0
    after = content(folder)
    assert after.keys() == before.keys() | {"run/notes.txt"} and after["run/notes.txt"] == b"mine"
    assert after["run/metrics.jsonl"] != before["run/metrics.jsonl"]


def test_a_checkpoint_of_before_runs_had_folders_is_replaced_as_well(folder, capsys):
    checkpoints.save(GPT(TINY), folder / "run", {"command": "train"})
    before = content(folder)
    assert train("--out", "run") == 2 and content(folder) == before
    assert train("--out", "run", "--overwrite") == 0
    assert not (folder / "run" / "model.safetensors").exists() and newest("run").step == 4


def test_what_is_printed_and_stored(folder, capsys):
    (folder / "my.toml").write_text('lr = 1e-3\nsteps = 9\nschedule = "wsd"\nsave_every = 3\n')
    assert train("--recipe", "my.toml", "--out", "run", "--warmup", "0.25") == 0
    printed = capsys.readouterr().out
    stored = recipe_files.read("run/recipe.toml").values
    expected = {"lr": 1e-3, "steps": 4, "schedule": "wsd", "save_every": 3, "warmup": 0.25, "decay": 0.2}
    expected |= {"text": str(folder / "text.txt"), "context": 16, "precision": "fp32", "device": "cpu"}
    assert {name: stored[name] for name in expected} == expected
    for name, value in stored.items():
        assert f"{name} = {recipe_files.text({name: value}).partition(' = ')[2].strip()}" in printed, name
    for words in ("nano: 828,160 parameters, fp32 on cpu; ", "memory: ", "modules replaced", "step 4/4: loss "):
        assert words in printed, words
    assert printed.endswith("is in run/checkpoints/step-00000004   (gptkern generate run)\n")
    # What is stored is a recipe: the same run again.
    assert cli.main(["train", "--recipe", "run/recipe.toml", "--out", "again"]) == 0
    assert tensors_of(newest("again")) == tensors_of(newest("run"))


def test_sizes_other_than_the_presets(folder, capsys):
    assert train("--out", "run", "--layers", "1", "--width", "64") == 0
    assert {name: newest("run").about["config"][name] for name in ("layers", "width", "heads")} == {
        "layers": 1, "width": 64, "heads": 2,
    }  # fmt: skip
    assert cli.main(["train", "--recipe", "run/recipe.toml", "--out", "again"]) == 0
    assert tensors_of(newest("again")) == tensors_of(newest("run"))
    capsys.readouterr()
    assert train("--out", "other", "--width", "48") == 2
    assert "width is 48; without heads it needs to be a multiple of 32, the size of nano's" in capsys.readouterr().err
    assert train("--out", "other", "--width", "48", "--heads", "5") == 2
    assert "width is 48; it needs to be a multiple of heads, 5" in capsys.readouterr().err


# --- Going on ---------------------------------------------------------------------------------------------------------


def test_resume_goes_on_and_says_what_it_does_not_take(folder, capsys, monkeypatch):
    assert train("--out", "whole", "--steps", "6") == 0
    with monkeypatch.context() as patch:
        signalled_at(patch, 3, signal.SIGTERM)
        assert train("--out", "run", steps=6) == 130
    before = content(folder / "run")
    capsys.readouterr()
    for arguments, words in (
        (["--lr", "0.5"], "--lr 0.5 contradicts the run's lr, 0.003: --resume goes on with what the run began with"),
        (["--steps", "9"], "--steps 9 contradicts the run's steps, 6"),
        (["--stock"], "--stock True contradicts the run's stock, False"),
        (["--preset", "gpt2"], "--preset gpt2 contradicts the run's preset, nano"),
        (["--from", "whole"], "contradicts the run's from, nothing"),
        (["--overwrite"], "--overwrite has no effect on --resume"),
        (["--data", "whole"], "--data "),
        (["--text", "run/recipe.toml"], "the data, recipe.toml, are not what the run in run is trained on: text.txt"),
    ):
        assert resume("--out", "run", *arguments) == 2, arguments
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and printed.out == "", arguments
        assert content(folder / "run") == before
    # The text may lie elsewhere; what changes nothing of the training may change.
    os.rename("text.txt", "moved.txt")
    assert resume("--out", "run") == 2 and "--text" in capsys.readouterr().err
    assert resume("--out", "run", "--text", "moved.txt", "--keep", "9", "--lr", "0.003") == 0
    assert tensors_of(newest("run")) == tensors_of(newest("whole"))
    before = content(folder / "run")
    capsys.readouterr()
    assert resume("--out", "run") == 0 and content(folder / "run") == before
    assert "6 updates are done: the checkpoint of step 6 is in run" in capsys.readouterr().out


def test_resume_without_a_run(folder, capsys):
    checkpoints.save(GPT(TINY), folder / "run", {"command": "train"})
    for out in ("run", "none"):
        assert resume("--out", out) == 2
        words = f"--out {out} holds no run that --resume could go on with: it has no recipe.toml"
        assert words in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_a_recipe_that_somebody_has_changed(folder, capsys):
    assert train("--out", "run") == 0
    stored = Path("run/recipe.toml").read_text()
    for changed, words in (
        (stored.replace("lr = 0.003", "lr = nan"), "lr is nan"),
        (stored + "spam = 1\n", "spam is no key of a recipe"),
        ("", "recipe.toml has no steps; it needs to be as a run stored it"),
        (stored.replace('preset = "nano"', 'preset = "gpt2"'), "is of a model of other sizes"),
        ("steps = ", "it needs a TOML file"),
    ):
        Path("run/recipe.toml").write_text(changed)
        assert resume("--out", "run") == 2
        assert words in capsys.readouterr().err


def test_another_number_of_threads_is_warned_of(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        signalled_at(patch, 2, signal.SIGINT)
        assert train("--out", "run") == 130
    capsys.readouterr()
    assert resume("--out", "run", "--threads", "2") == 0
    assert "threads is 2 from here on, and was 1: the rest is not bit for bit" in capsys.readouterr().out
    assert torch.get_num_threads() == 1


# --- What ends a run --------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_says_where_it_left_off(folder, capsys):
    assert train("--out", "new", "--lr", "1e30") == 1
    line = capsys.readouterr().err
    assert (
        line == "gptkern train: the loss is nan at step 1: a lower learning rate may help; there is no checkpoint yet\n"
    )
    assert train("--out", "run") == 0
    before = content(folder / "run")
    assert train("--out", "run", "--overwrite", "--lr", "1e30") == 1
    assert content(folder / "run") == before
    assert "a lower learning rate may help; the run in run is as it was" in capsys.readouterr().err


@pytest.mark.parametrize("lr", ["2", "0.5"])
def test_what_ends_far_above_the_untrained_model_replaces_nothing(folder, capsys, lr):
    assert train("--out", "run") == 0
    before = content(folder)
    # Evaluated at its end alone and at every step.
    for steps in (1, 8):
        assert train("--out", "run", "--overwrite", "--lr", lr, steps=steps) == 1
        printed = capsys.readouterr().err
        assert re.search(r"the (validation )?loss is \d+\.\d{4} at step \d, and ", printed)
        assert "the run in run is as it was" in printed
        assert content(folder) == before


@pytest.mark.parametrize("size", [0, 100_000])
def test_a_full_disk_leaves_the_run_that_is_there_and_one_line(folder, capsys, size):
    assert train("--out", "run") == 0
    before = content(folder)
    capsys.readouterr()
    with largest_file(size):
        assert train("--out", "run", "--overwrite", "--seed", "1") == 1
        assert train("--out", "new/below") == 1
    after = content(folder)
    assert {name: after[name] for name in before} == before
    assert all(name in before or (size and name.startswith("new/")) for name in after)
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("gptkern train: ") and "File too large" in line
    assert (folder / "new" / "below").exists() == (size > 0)


def test_a_disk_that_is_too_small_is_said_before(folder, capsys, monkeypatch):
    """The whole disk, through a size that none has."""
    monkeypatch.setattr(train_module, "CHECKPOINT_BYTES", 10**12)
    assert train("--out", "run") == 2
    printed = capsys.readouterr()
    assert "--out run: 4 checkpoints need " in printed.err and "on the disk and there are" in printed.err
    assert printed.out == "" and not (folder / "run").exists()


def test_a_damaged_part_of_the_data_is_named_and_nothing_is_trained_on_it(folder, capsys):
    """The first frame is read when the run begins; the last one's bytes are others than were written."""
    texts(folder)
    prepare(["texts"], folder / "data", held_out=0.2, frame_tokens=1024)
    assert train_on_data("--out", "whole") == 0
    shard = next((folder / "data").glob("train-*.zst"))
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    shard.write_bytes(damaged)
    assert train_on_data("--out", "run") == 1
    line = capsys.readouterr().err
    assert re.fullmatch(r"gptkern train: .*train-00000\.zst: frame \d+ .*damaged.*\n", line), line
    shard.write_bytes(whole)
    assert resume("--out", "run") == 0
    assert tensors_of(newest("run")) == tensors_of(newest("whole"))


def texts(folder: Path) -> None:
    (folder / "texts").mkdir()
    for number in range(30):
        (folder / "texts" / f"{number}.txt").write_text(f"the {number} lions and the {number * number} mice\n" * 20)


def train_on_data(*arguments: str) -> int:
    sizes = ["--steps", "20", "--context", "16", "--batch", "4", "--device", "cpu", "--tensorboard", "off"]
    return cli.main(["train", "--data", "data", *sizes, *arguments])


# --- Signals ----------------------------------------------------------------------------------------------------------


def signalled_at(monkeypatch, step: int, *numbers: int) -> None:
    """Signals come in the forward of this update."""
    objective = Trainer._backward

    def backward(self, batch):
        if self.step + 1 == step:
            for number in numbers:
                signal.raise_signal(number)
        return objective(self, batch)

    monkeypatch.setattr(Trainer, "_backward", backward)


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
def test_a_signal_keeps_every_update_that_was_done(folder, monkeypatch, capsys, number):
    """The update that is under way included."""
    if not hasattr(signal, number):
        pytest.skip(f"{number} is none of this system's signals")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    signalled_at(monkeypatch, 3, getattr(signal, number))
    with not_under_nohup():
        assert train("--out", "run", "--lr", "1e-3", steps=40) == 130
    where = "the checkpoint of step 3 is in run/checkpoints/step-00000003   (gptkern train --resume --out run)"
    assert f"interrupted at step 3 of 40: {where}\n" in capsys.readouterr().out
    assert newest("run").step == 3
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_the_second_signal_ends_it_at_once(folder, monkeypatch, capsys):
    signalled_at(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    assert train("--out", "run", "--save-every", "2", steps=40) == 130
    assert newest("run").step == 2 and capsys.readouterr().err == "gptkern train: interrupted\n"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert resume("--out", "run", "--save-every", "40") == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_under_nohup_a_training_goes_on(folder, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled_at(monkeypatch, 2, signal.SIGHUP)
        assert train("--out", "run") == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupted_before_its_first_checkpoint_it_replaces_nothing(folder, monkeypatch, capsys):
    assert train("--out", "run") == 0
    before = content(folder)
    signalled_at(monkeypatch, 2, signal.SIGINT)
    assert train("--out", "run", "--overwrite", steps=40) == 130
    assert "interrupted at step 2 of 40: run is as it was\n" in capsys.readouterr().out
    assert content(folder) == before


def test_what_was_learnt_is_kept_when_the_terminal_goes_away(folder, monkeypatch):
    from gptkern.commands import display

    def gone(self, now):
        if now.step >= 2:
            raise BrokenPipeError

    monkeypatch.setattr(display.RunDisplay, "update", gone)
    assert train("--out", "run", "--save-every", "4") == 1
    assert newest("run").step == 2


@pytest.mark.deep
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_end_ends_with_a_checkpoint(folder, number):
    command = [sys.executable, "-m", "gptkern", "train", "--text", "text.txt", "--out", "run", "--steps", "100000"]
    process = subprocess.Popen([*command, "--context", "16"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not Path("run/metrics.jsonl").exists() or Path("run/metrics.jsonl").stat().st_size < 1000:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == ""
    assert f"interrupted at step {newest('run').step} of 100000" in out


# --- Models and data from elsewhere -----------------------------------------------------------------------------------


def test_a_training_on_a_folder_of_tokens(folder, capsys):
    texts(folder)
    prepare(["texts"], folder / "data", tokenizer="bpe:300", held_out=0.2)
    assert train_on_data("--out", "run") == 0
    assert Path("run/tokenizer.json").read_bytes() == Path("data/tokenizer.json").read_bytes()
    about = newest("run").about
    assert about["config"]["vocab_size"] == 300 and about["tokenizer"]["kind"] == "file"
    assert "nats per token" in capsys.readouterr().out
    assert cli.main(["generate", "run", "--prompt", "the", "--tokens", "3", "--device", "cpu"]) == 0
    # The shuffled rows come from the store alone: the same updates, however the folder is called.
    os.rename("data", "moved")
    assert resume("--out", "run") == 2 and "--data" in capsys.readouterr().err


def test_a_model_to_start_from(folder, capsys):
    """Of a run and of transformers; the first loss is that of the model and not of a new one."""
    assert train("--out", "first", "--lr", "1e-3", steps=20) == 0
    validation = [json.loads(line) for line in Path("first/metrics.jsonl").read_text().splitlines()][-1]
    arguments = ["--steps", "2", "--batch", "2", "--device", "cpu", "--tensorboard", "off", "--text", "text.txt"]
    assert cli.main(["train", "--from", "first", "--out", "second", *arguments]) == 0
    first = json.loads(Path("second/metrics.jsonl").read_text().splitlines()[0])
    assert first["untrained_validation_loss"] == pytest.approx(validation["validation_loss"], abs=1e-3)
    assert recipe_files.read("second/recipe.toml").values["context"] == 16
    assert "preset" not in recipe_files.read("second/recipe.toml").values
    capsys.readouterr()
    for more, words in (
        (["--preset", "nano"], "--preset and --from: the sizes of the model are those of the folder"),
        (["--context", "17"], "--from first has a context of 16; rows of 17 tokens do not fit into it"),
        (["--from", "none"], "--from none"),
        (["--from", "text.txt"], "--from text.txt"),
    ):
        assert cli.main(["train", "--from", "first", "--out", "third", *arguments, *more]) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and printed.out == ""
        assert not (folder / "third").exists()


def test_a_tokenizer_that_does_not_fit_the_model(folder, capsys):
    save_run(folder / "bpe", model())
    assert train("--out", "run") == 0
    texts(folder)
    prepare(["texts"], folder / "data", tokenizer="bpe:280", held_out=0.2)
    capsys.readouterr()
    arguments = ["--steps", "2", "--batch", "2", "--device", "cpu", "--out", "new"]
    for source in (["--from", "bpe", "--text", "text.txt"], ["--from", "run", "--data", "data"]):
        assert cli.main(["train", *arguments, *source]) == 2
        printed = capsys.readouterr().err
        assert "it needs data of its own tokenizer" in printed and printed.count("\n") == 1
        assert not (folder / "new").exists()


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
    monkeypatch.setattr(Trainer, "run", interrupted)
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


def test_a_demo_does_not_write_into_a_run(folder, capsys):
    assert train("--out", "out") == 0
    before = content(folder)
    assert demo("--out", "out") == 2 and content(folder) == before
    assert "--out out holds a run of `gptkern train`: give another --out" in capsys.readouterr().err


def test_a_demo_replaces_that_of_a_demo(folder):
    for seed in ("0", "1"):
        demo("--out", "out", "--seed", seed)
        history = json.loads((folder / "out" / "checkpoint" / "config.json").read_text())["training"]
        assert history["recipe"]["seed"] == int(seed)
