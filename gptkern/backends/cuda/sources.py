"""The translation units of csrc/, and the compiler and headers that the host's part of them takes.

Imported by the package's build too, where neither PyTorch nor gptkern can be: the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
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
    package = Path(__file__).resolve().parents[2]
    for place in (package.parent / "csrc", package / "_csrc"):
        if (place / "bindings.cpp").is_file():
            return place
    return None


def kernel_units(csrc: Path) -> Iterator[Unit]:
    """The .cu files of the operators' rooms, whose kernels nvcc and the emulator's compiler both take."""
    for source in sorted(csrc.glob("*/*.cu")):
        parts = _PARTS.search(source.read_text(encoding="utf-8"))
        name = f"{source.parent.name}_{source.stem}"
        yield Unit(name, source, ())
        if parts:
            for value in re.split(r",\s*", parts[2]):
                yield Unit(f"{name}_{value}", source, (f"{parts[1]}={value}",))


def host_units(csrc: Path, *, emulated: bool) -> Iterator[Unit]:
    """The .cpp files, which need no nvcc: the Python module, what each room binds, and the emulator if asked for."""
    yield Unit("bindings", csrc / "bindings.cpp", ())
    for source in sorted(csrc.glob("*/binding.cpp")):
        yield Unit(f"{source.parent.name}_binding", source, ())
    if emulated:
        yield from emulator_units(csrc)


def emulator_units(csrc: Path) -> Iterator[Unit]:
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


def digest(csrc: Path) -> str:
    """Of everything that the compiled module is made of. A module knows its own: one of other sources can be told."""
    found = hashlib.sha256()
    units = [*kernel_units(csrc), *host_units(csrc, emulated=False)]
    for path in sorted({path for unit in units for path in included(unit.source, csrc)}):
        found.update(path.relative_to(csrc.resolve()).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def host_compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, else g++, else clang++; None where there is none.

    Where CXX is set nothing else is taken: a misspelt one would build with another compiler, and say nothing.
    """
    asked = os.environ.get("CXX", "").strip()
    for command in (asked,) if asked else ("g++", "clang++"):
        words = command.split()
        if shutil.which(words[0]):
            return words
    return None


def no_host_compiler() -> str:
    """What to say where `host_compiler` finds none."""
    asked = os.environ.get("CXX", "").strip()
    if asked:
        return f"CXX is {asked!r}, which is not found: set it to a C++ compiler, or unset it"
    return "there is no C++ compiler: install g++ or clang++, or set CXX"


def jobs() -> int:
    """How many compilers run at a time: MAX_JOBS, else one for each core that this process may use.

    Raises:
        ValueError: MAX_JOBS is no such number.
    """
    asked = os.environ.get("MAX_JOBS", "")
    if not asked:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        raise ValueError(f"MAX_JOBS must be a number from 1 on, and is {asked!r}")
    return int(asked)


def pybind11_include() -> str | None:
    """The folder of pybind11's headers: pybind11's own, else those that PyTorch's wheels carry; None without either."""
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11

        return pybind11.get_include()
    # Found without importing it.
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        include = Path(torch.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").is_file():
            return str(include)
    return None
