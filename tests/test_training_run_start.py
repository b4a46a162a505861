"""How a run begins, anew or again: what is checked before anything changes, and what it is told then."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from saved_checkpoints import ends, start
from training_runs import CONFIG, content, run, state_of, stopping_at

from gptkern import cli
from gptkern.models.gpt import GPT
from gptkern.training import memory, model_files, recipe_files, running
from gptkern.training import run as train_module
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.errors import UserError
from gptkern.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A report takes as long as the rest of such a run; tests/test_training_run.py looks at it."""
    monkeypatch.setattr(running, "report", lambda *_: None)
    monkeypatch.setattr(train_module, "report", lambda *_: None)


def stored(folder) -> dict:
    return recipe_files.read(folder / "recipe.toml").values


# --- A run that was begun from Python ---------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
def test_the_recipe_says_the_operators_and_another_choice_is_refused(tmp_path, swap):
    run(tmp_path, swap=swap, **stopping_at(3))
    assert (stored(tmp_path)["stock"], stored(tmp_path)["dropout"]) == (not swap, CONFIG.dropout)
    before = content(tmp_path)
    with pytest.raises(UserError, match=rf"^swap is {not swap}; the run in .* began with {swap}$"):
        run(tmp_path, swap=not swap, resume=True)
    assert content(tmp_path) == before
    assert run(tmp_path, swap=swap, resume=True).finished


def test_the_command_line_goes_on_with_it(tmp_path, capsys):
    """With its sizes and its dropout, which no preset has: the same run as without a pause."""
    from gptkern.training.data import text

    (tmp_path / "text.txt").write_bytes(bytes(range(97, 122)) * 30)
    store = text.text_store(text.load(tmp_path / "text.txt", shortest=2))
    run(tmp_path / "whole", store=store)
    run(tmp_path / "run", store=store, **stopping_at(5))
    arguments = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--resume"]
    assert cli.main(["train", *arguments, "--preset", "nano"]) == 2
    assert "is of a model of other sizes" in capsys.readouterr().err
    assert cli.main(["train", *arguments]) == 0, capsys.readouterr().err
    assert state_of(tmp_path / "run")["tensors"] == state_of(tmp_path / "whole")["tensors"]
    assert "preset" not in stored(tmp_path / "run")


def dying(folder) -> None:
    def watch(progress):
        if progress.step == 2:
            os._exit(3)

    run(folder, watch=watch)


def test_without_a_checkpoint_its_sizes_are_nowhere(tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(bytes(range(97, 122)) * 30)
    assert ends([start(dying, tmp_path / "run")]) == [3]
    arguments = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--resume"]
    assert cli.main(["train", *arguments]) == 2
    assert "recipe.toml does not say the sizes of its model" in capsys.readouterr().err


# --- Another run in its place, and a power cut ------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not tell what a descriptor is of")
def test_what_reaches_the_disk_before_a_mark_is_made_or_goes(tmp_path, monkeypatch):
    """A power cut may leave any of what was not synced: of a mark and of what it speaks of, one goes first."""
    run(tmp_path / "run")
    happened = []
    short = {str(tmp_path / "run"): "the folder", str(tmp_path / "run" / ".replaced"): ".replaced"}

    def noted(name):
        original = getattr(os, name)

        def call(*arguments, **more):
            path = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[0])
            if name == "fsync":
                path = short.get(path) or ("recipe" if ".recipe.toml." in path else "other")
            if path != "other" and more.get("dir_fd") is None:
                happened.append((name, path.removeprefix(str(tmp_path / "run") + "/")))
            return original(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        noted(name)
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (happened.append(("touch", path.name)), touch(path)))

    synced = [("fsync", "the folder"), ("fsync", ".replaced")]
    folder = RunFolder(tmp_path / "run")
    folder.set_aside()
    at = happened.index(("touch", "moved"))
    assert happened[at - 2 : at] == synced and happened[at + 1 :] == synced
    assert [what for what, _ in happened[: at - 2]] == ["rename"] * 3
    happened.clear()
    folder.put_back()
    at = happened.index(("unlink", ".replaced/moved"))
    assert happened[at + 1 : at + 3] == synced and happened[at + 3][0] == "rename"
    assert happened[-2:] == [("fsync", "the folder"), ("rmdir", ".replaced")]
    folder.set_aside()
    happened.clear()
    recipe_files.write(folder.recipe, {"steps": 3})
    assert [happened[0], happened[1][0], happened[-1]] == [("fsync", "recipe"), "replace", ("fsync", "the folder")]
    happened.clear()
    folder.forget()
    at = happened.index(("unlink", ".replaced/moved"))
    assert happened[:2] == synced and happened[at - 2 : at] == synced
    assert ("unlink", ".replaced/metrics.jsonl") in happened[2:at]
    happened.clear()
    checkpoints = Checkpoints(folder.checkpoints)
    checkpoints.save(1, {"a": torch.zeros(1)}, {}, wait=True)
    assert ("fsync", "the folder") in happened


def replacing(folder) -> None:
    def watch(progress):
        if progress.step == 2:
            os._exit(3)

    run(folder, overwrite=True, recipe={"seed": 1}, watch=watch)


@pytest.mark.parametrize("moved", [True, False])
def test_what_is_refused_moves_no_file(tmp_path, capsys, moved):
    """Of a run that a killed program was replacing: the checks see the run that will be back."""
    folder = tmp_path / "run"
    run(folder, **stopping_at(3))
    before = content(folder)
    if moved:
        assert ends([start(replacing, folder)]) == [3]
    else:
        (folder / ".replaced").mkdir()
        for name in ("metrics.jsonl", "checkpoints"):
            os.rename(folder / name, folder / ".replaced" / name)
    left = content(folder)
    for more, words in (
        ({}, "holds a run: --resume goes on with it"),
        ({"resume": True, "recipe": {"lr": 0.5}}, "lr is 0.5; the run in .* began with 0.01"),
        ({"resume": True, "recipe": {"seed": 1}}, "seed is 1; the run in .* began with 0"),
    ):
        with pytest.raises(UserError, match=words):
            run(folder, **more)
        assert content(folder) == left
    for arguments in (["--resume", "--lr", "0.5"], ["--steps", "3"]):
        assert cli.main(["train", "--out", str(folder), *arguments]) == 2
        assert content(folder) == left
    said = []
    assert run(folder, resume=True, say=said.append, stop=lambda: True).step == 3
    assert any("the run is back" in line for line in said) == moved
    assert {name: content(folder)[name] for name in before} == before


# --- A model that has weights -----------------------------------------------------------------------------------------


def test_a_model_is_loaded_once_the_memory_is_seen_to_suffice(folder, capsys, monkeypatch):
    run(folder / "first", recipe={"steps": 3})
    made, little = [], []
    original = model_files.unfilled
    monkeypatch.setattr(model_files, "unfilled", lambda *all: made.append(1) or original(*all))
    monkeypatch.setattr(memory, "available", lambda device: little[0] if little else None)
    arguments = ["--from", "first", "--text", "text.txt", "--steps", "2", "--batch", "2", "--device", "cpu"]
    little.append(20_000)
    assert cli.main(["train", "--out", "run", *arguments]) == 2
    printed = capsys.readouterr()
    assert "of memory on cpu and there are 20" in printed.err and printed.out == ""
    assert made == [] and not (folder / "run").exists()
    little.clear()
    assert cli.main(["train", "--out", "run", "--tensorboard", "off", *arguments]) == 0
    assert made == [1] and stored(folder / "run")["context"] == 8


def test_sizes_beside_a_function_are_those_of_its_model(tmp_path):
    with pytest.raises(ValueError, match=r"train: config is .*; it needs to be the model's, "):
        run(tmp_path / "run", config=dataclasses.replace(CONFIG, layers=2), model=lambda: GPT(CONFIG))
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", config=CONFIG, model=lambda: GPT(CONFIG)).finished


# --- Where it goes on -------------------------------------------------------------------------------------------------


def test_other_versions_are_said(tmp_path, monkeypatch):
    run(tmp_path, **stopping_at(3))
    said = []
    run(tmp_path, resume=True, say=said.append, **stopping_at(4))
    assert not any("bit for bit" in line for line in said)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0.1")
        said.clear()
        assert run(tmp_path, resume=True, say=said.append).finished
    (line,) = [line for line in said if "bit for bit" in line]
    assert line == (
        f"torch is 2.0.1 from here on, and was {torch.__version__}: the rest is not bit for bit what the run would "
        "have been"
    )


# --- Several processes ------------------------------------------------------------------------------------------------


def of_processes(count: int, folder: Path) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    if count == 1:
        assert run(folder, recipe={"steps": 1}).finished
        return
    with pytest.raises(UserError, match=r"torch\.distributed has 2 processes; a run needs to be one: "):
        run(folder)
    assert not folder.exists()


def test_a_run_is_one_process(tmp_path):
    pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="this PyTorch has no stand-in of others")
    # In processes of their own: a group stays.
    assert ends([start(of_processes, count, tmp_path / str(count)) for count in (1, 2)]) == [0, 0]


# --- Names that a recipe cannot hold ----------------------------------------------------------------------------------


def test_a_name_that_is_no_utf_8_is_refused(folder, capsys, monkeypatch):
    """By the option, and of the current folder too: in recipe.toml it would be another file's."""
    name = os.fsdecode(b"te\xffxt")
    try:
        os.mkdir(name)
    except (OSError, UnicodeError):
        pytest.skip("this file system has UTF-8 names alone")
    os.rename("text.txt", f"{name}/text.txt")
    for option in ("--text", "--data", "--from"):
        assert cli.main(["train", "--out", "run", option, f"{name}/text.txt"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"gptkern train: {option} ") and "it needs a name in UTF-8, as recipe.toml is" in err
    monkeypatch.chdir(name)
    assert cli.main(["train", "--out", "../run", "--text", "text.txt"]) == 2
    assert "--text " in capsys.readouterr().err and not (folder / "run").exists()
