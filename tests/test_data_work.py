"""The folder of the work: what gptkern did not write is never deleted, and two programs are told apart."""

from __future__ import annotations

import json
import os

import pytest

from gptkern.training.data import work
from gptkern.training.data.preparing import prepare
from gptkern.training.errors import UserError


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text("to be " * 100)
    return [str(tmp_path / "text")]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["link", "file", "stranger", "folder", "linked shard"])
def test_what_is_a_strangers_is_refused_and_stays(tmp_path, text, kind, overwrite):
    there, other = tmp_path / "out" / work.NAME, tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    (tmp_path / "out").mkdir()
    if kind == "link":
        there.symlink_to(other)
    elif kind == "file":
        there.write_text("years")
    else:
        there.mkdir()
    if kind == "stranger":
        (there / "thesis.tex").write_text("years")
    elif kind == "folder":
        (there / "train-00000.zst").mkdir()
    elif kind == "linked shard":
        (there / "train-00000.zst").symlink_to(other / "thesis.tex")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(UserError, match=r"--out .*\.preparing"):
        prepare(text, tmp_path / "out", held_out=0, overwrite=overwrite)
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert (other / "thesis.tex").read_text() == "years"


def test_a_state_that_says_nothing_of_what_was_asked(tmp_path, text):
    prepare(text, tmp_path / "out", held_out=0)
    (tmp_path / "out" / work.NAME).mkdir()
    for asked in ([], 1, None):
        (tmp_path / "out" / work.NAME / work.STATE).write_text(json.dumps({"asked": asked}))
        assert prepare(text, tmp_path / "out", held_out=0).how == "complete"


def test_a_folder_that_another_program_removes_meanwhile(tmp_path, text, monkeypatch):
    real = os.open

    def removed_before(path, *arguments, **options):
        if os.fspath(path) == str(tmp_path / "out"):
            os.rmdir(path)
        return real(path, *arguments, **options)

    def removed_after(path, *arguments, **options):
        found = real(path, *arguments, **options)
        if os.fspath(path) == str(tmp_path / "out"):
            os.rmdir(path)
        return found

    for each in (removed_before, removed_after):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match="another program is preparing tokens in it"),
        ):
            patch.setattr(os, "open", each)
            prepare(text, tmp_path / "out", held_out=0)
    prepare(text, tmp_path / "out", held_out=0)
