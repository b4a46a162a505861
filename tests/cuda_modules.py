"""Kernels built for the emulator: those of tests/cuda, one Python module for each file, and changed copies of csrc/."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np

from gptkern.backends.cuda import emulated, sources

FOLDER = Path(__file__).parent / "cuda"
# Of attention's kernels a changed copy has the tiles of this width, and the others as they are.
HEAD_DIM = "64"


@functools.cache
def module(name: str) -> ModuleType:
    """tests/cuda/<name>.cu, which defines the module test_<name>."""
    own = f"test_{name}"
    return emulated.loaded(own, emulated.build_with(own, [FOLDER / f"{name}.cu"], quiet=True))


@functools.cache
def module_by_swapcontext(name: str) -> ModuleType:
    """The same on an emulator that switches between threads as it does on processors other than x86-64."""
    own = f"test_{name}"
    units = [
        sources.Unit(f"{unit.name}_swapcontext", unit.source, ("GPTKERN_SWAPCONTEXT",))
        for unit in sources.emulator_units(sources.folder())
    ]
    units.append(sources.Unit(name, FOLDER / f"{name}.cu", ()))
    path = emulated.build_units(f"{own}_swapcontext", units, quiet=True)
    # Not of the other's name: pybind11 would give that one again.
    return emulated.loaded(f"swapcontext.{own}", path)


def changed_module(operator: str, function: str, old: str, new: str, copy: Path) -> ModuleType:
    """The emulated module with one expression changed in a copy of csrc/, which is made at `copy`.

    Args:
        operator: its room is compiled from the copy, and the changed file; the rest is as it was.
        function: how the definition begins that is changed. It stands once in csrc/, in whichever file.
        old: stands once from there to the next line that begins with a brace. A space is any white space.
    """
    csrc = sources.folder()
    shutil.copytree(csrc, copy)
    changed = _change(copy, function, old, new)
    own = {
        unit.name: unit
        for unit in sources.kernel_units(copy)
        if (unit.source.resolve() == changed or unit.source.parent.name == operator)
        and changed in sources.included(unit.source, copy)
        and all(define.endswith(f"={HEAD_DIM}") for define in unit.defines)
    }
    assert own, f"{operator} does not use {changed.name}"
    others = [*sources.kernel_units(csrc), *sources.host_units(csrc, emulated=True)]
    # The copy's come first: of functions that are not inlined the linker takes the first it sees.
    units = [*own.values(), *(unit for unit in others if unit.name not in own)]
    path = emulated.build_units(emulated.NAME, units, quiet=True)
    # pybind11 knows modules by their names: of two of one name it gives the first again.
    return emulated.taking_tensors(emulated.loaded(f"{path.name.partition('.')[0]}.{emulated.NAME}", path))


def _change(csrc: Path, function: str, old: str, new: str) -> Path:
    """Changes the one place, and returns its file."""
    found = []
    for path in (path for path in sorted(csrc.rglob("*")) if path.suffix in (".cu", ".cuh", ".h")):
        found += [(path, match) for match in re.finditer(re.escape(function), path.read_text("utf-8"))]
    assert len(found) == 1, f"{function!r} stands in {len(found)} places of csrc; it needs 1"
    ((path, start),) = found
    source = path.read_text("utf-8")
    stop = source.find("\n}", start.end())
    pattern = r"\s+".join(map(re.escape, old.split()))
    body, count = re.subn(pattern, lambda _: new, source[start.end() : stop])
    assert count == 1, f"{path.relative_to(csrc)}, {function!r}: {count} places like {old!r}; it needs 1"
    path.write_text(source[: start.end()] + body + source[stop:], "utf-8")
    return path.resolve()


def address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def aligned(*shape: int, dtype=np.float32, beyond: int = 0) -> np.ndarray:
    """An array of NaN patterns (all bits set) that begins at a multiple of 256 bytes, and as many bytes beyond."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(size + beyond + 256, 0xFF, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(values) -> np.ndarray:
    values = np.asarray(values)
    copy = aligned(*values.shape, dtype=values.dtype)
    copy[...] = values
    return copy
