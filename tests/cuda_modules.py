"""The test kernels of tests/cuda, built for the emulator: one Python module for each file."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import numpy as np

from gptkern.cuda_kernels import emulated, sources

FOLDER = Path(__file__).parent / "cuda"


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
        for unit in sources.host_units(sources.folder(), emulated=True)
        if unit.name != "bindings"
    ]
    units.append(sources.Unit(name, FOLDER / f"{name}.cu", ()))
    path = emulated.build_units(f"{own}_swapcontext", units, quiet=True)
    # Not of the other's name: pybind11 would give that one again.
    return emulated.loaded(f"swapcontext.{own}", path)


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
