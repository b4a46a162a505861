"""How a run begins, anew or again: what is checked before anything changes, and what it is told then."""

from __future__ import annotations

import os

import pytest
from saved_checkpoints import ends, start
from training_runs import CONFIG, content, run, state_of, stopping_at

from gptkern import cli
from gptkern.training import recipe_files, running
from gptkern.training import run as train_module
from gptkern.training.errors import UserError


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
