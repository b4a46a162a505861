"""The emulator's cache: what was built is found again, and what nobody uses any more is removed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import DEVICE

from gptkern.backends.cuda import emulated, sources

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.missing():
    pytest.skip(emulated.missing(), allow_module_level=True)

DAY = 24 * 60 * 60


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the objects, empty."""
    monkeypatch.setenv("GPTKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "emulated"


def build(source: Path, value: int) -> Path:
    source.write_text(f"int value() {{ return {value}; }}\n")
    return emulated.build_units("module", [sources.Unit("unit", source, ())], quiet=True)


def age(folder: Path, days: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - days * DAY,) * 2)


def test_what_was_built_is_not_built_again(cache, tmp_path):
    module = build(tmp_path / "unit.cpp", 1)
    assert sorted(path.suffix for path in cache.iterdir()) == [".o", ".so"]
    inodes = {path.stat().st_ino for path in cache.iterdir()}
    assert build(tmp_path / "unit.cpp", 1) == module
    assert {path.stat().st_ino for path in cache.iterdir()} == inodes


def test_a_header_of_a_header_is_part_of_what_was_built(cache, tmp_path):
    (tmp_path / "outer.h").write_text('#include "inner.h"\n')
    (tmp_path / "inner.h").write_text("constexpr int INNER = 1;\n")
    source = tmp_path / "unit.cpp"
    source.write_text('#include "outer.h"\nint value() { return INNER; }\n')
    unit = sources.Unit("unit", source, ())
    module = emulated.build_units("module", [unit], quiet=True)
    assert emulated.build_units("module", [unit], quiet=True) == module
    (tmp_path / "inner.h").write_text("constexpr int INNER = 2;\n")
    assert emulated.build_units("module", [unit], quiet=True) != module


def test_what_is_no_longer_used_is_removed_by_the_next_build(cache, tmp_path):
    old = build(tmp_path / "unit.cpp", 1)
    (cache / ".unit-of-a-build-that-was-killed.o.abcdef").touch()
    (cache / "folder").mkdir()
    age(cache, emulated.UNUSED_DAYS + 1)
    new = build(tmp_path / "unit.cpp", 2)
    assert new != old and new.is_file()
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".o", ".so"]


def test_what_is_younger_or_still_used_is_kept(cache, tmp_path):
    first = build(tmp_path / "unit.cpp", 1)
    age(cache, emulated.UNUSED_DAYS - 1)
    second = build(tmp_path / "unit.cpp", 2)
    assert first.is_file() and len(list(cache.iterdir())) == 4
    age(cache, emulated.UNUSED_DAYS + 1)
    # Found, so used; the second is not.
    assert build(tmp_path / "unit.cpp", 1) == first
    build(tmp_path / "unit.cpp", 3)
    assert first.is_file() and not second.exists() and len(list(cache.iterdir())) == 4
    # Its object too: nothing is compiled to build it again.
    assert max(time.time() - path.stat().st_mtime for path in cache.iterdir()) < DAY
