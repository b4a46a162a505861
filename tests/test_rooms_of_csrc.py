"""The rooms of csrc/: one operator's folder never needs another's, and what they share needs none of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SHARED = ("device", "emulator")
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
ROOMS = sorted({path.parent.name for path in CSRC.glob("*/*.cu")})


def room_of(path: Path) -> str | None:
    """The room that a file is in; None for what all share."""
    folder = path.relative_to(CSRC).parts[0]
    return folder if folder in ROOMS else None


def included(path: Path) -> list[Path]:
    """The project's files that a file includes, by itself."""
    names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text("utf-8"), re.MULTILINE)
    found = []
    for name in names:
        places = [place.resolve() for place in (path.parent / name, CSRC / name) if place.is_file()]
        assert places, f"{path}: {name} is nowhere"
        found.append(places[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_a_file_includes_its_own_room_and_what_all_share(path):
    for there in included(path):
        assert room_of(there) in (None, room_of(path)), f"includes {there.relative_to(CSRC)}"


def test_every_folder_is_a_room_or_shared():
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == {*ROOMS, *SHARED}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_declares_its_launchers_and_binds_them_all(room):
    """By bind_launcher, which releases Python's lock."""
    declared = re.findall(r"^Unreadable (\w+)\(", (CSRC / room / "launchers.h").read_text("utf-8"), re.MULTILINE)
    binding = (CSRC / room / "binding.cpp").read_text("utf-8")
    assert declared and [*re.findall(r'bind_launcher\(module, "(\w+)", &(\w+)\)', binding)] == [
        (name, name) for name in declared
    ]
    assert not {*declared} & {*re.findall(r'module\.def\("(\w+)"', binding)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_a_file_can_be_read_in_one_go(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500
