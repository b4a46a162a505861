"""The translation units of csrc/: what nvcc, or the emulator's compiler, is to compile.

Imported by the package's build too, where neither PyTorch nor gptkern can be: the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# A source may ask to be compiled in parts, which compilers take side by side: "// parts: HEAD_DIM = 64, 128" gives one
# unit with HEAD_DIM defined for each value, and one without.
_PARTS = re.compile(r"^// parts: (\w+) = ([\w, ]+)$", re.MULTILINE)


class Unit(NamedTuple):
    """One run of a compiler."""

    name: str  # of the object file: "attention_64"
    source: Path
    defines: tuple[str, ...]  # "HEAD_DIM=64"


def folder() -> Path | None:
    """csrc/ beside the package (a clone), or as the package's own _csrc/ (a wheel); None where there is neither."""
    package = Path(__file__).resolve().parent.parent
    for place in (package.parent / "csrc", package / "_csrc"):
        if (place / "bindings.cpp").is_file():
            return place
    return None


def kernel_units(csrc: Path) -> Iterator[Unit]:
    """The .cu files, whose kernels nvcc and the emulator's compiler both take."""
    for source in sorted(csrc.glob("*.cu")):
        parts = _PARTS.search(source.read_text(encoding="utf-8"))
        yield Unit(source.stem, source, ())
        if parts:
            for value in re.split(r",\s*", parts[2]):
                yield Unit(f"{source.stem}_{value}", source, (f"{parts[1]}={value}",))


def host_units(csrc: Path, *, emulated: bool) -> Iterator[Unit]:
    """The .cpp files, which need no nvcc."""
    yield Unit("bindings", csrc / "bindings.cpp", ())
    if emulated:
        for source in sorted((csrc / "emulator").glob("*.cpp")):
            yield Unit(f"emulator_{source.stem}", source, ())


def included(source: Path, csrc: Path) -> list[Path]:
    """The source and every file of the project that it includes, directly or not."""
    found, open_ = {source.resolve()}, [source.resolve()]
    while open_:
        path = open_.pop()
        for name in re.findall(r'^\s*#\s*include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            for there in (path.parent / name, csrc / name):
                if there.is_file():
                    if there.resolve() not in found:
                        found.add(there.resolve())
                        open_.append(there.resolve())
                    break
    return sorted(found)


def headers(csrc: Path, *, emulated: bool) -> list[Path]:
    """Every header: where one changes, all units are compiled again."""
    found = [*csrc.glob("*.h"), *(csrc / "device").glob("*.cuh")]
    if emulated:
        found += (csrc / "emulator").glob("*.h")
    return sorted(found)
