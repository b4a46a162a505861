"""Tensors of more than 2^31 elements, which nobody has to hold, and the ends of grids, where their offsets are largest.

Address space is reserved without memory behind it (MAP_NORESERVE): only the pages that a kernel touches become real.
A kernel whose index arithmetic is too narrow reads other places of the same tensor, or addresses that bounds.py and
emulation.py refuse.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import mmap

import pytest
import torch

from gptkern.backends.cuda import emulated

LARGE = 2**31 + 4096
MAP_NORESERVE = 0x4000  # Linux


def sparse(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """So many elements of address space, zeros; a page takes memory once it is written."""
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, ValueError) as error:
        pytest.skip(f"no {elements * dtype.itemsize} bytes of address space can be reserved: {error}")
    # Without huge pages a touched row costs its own pages and no more.
    madvise_off = getattr(mmap, "MADV_NOHUGEPAGE", None)
    if madvise_off is not None:
        memory.madvise(madvise_off)
    return torch.frombuffer(memory, dtype=dtype)


def far(tensor: torch.Tensor, *strides: int) -> torch.Tensor:
    """A copy whose first dimensions have these strides; the others lie as in a contiguous tensor."""
    strides = (*strides, *torch.empty(tensor.shape, device="meta").stride()[len(strides) :])
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides)) + 1
    return sparse(span, tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def ending_with(last: torch.Tensor, rows: int) -> torch.Tensor:
    """A contiguous tensor of so many rows (its first dimension), zeros but for the last ones."""
    whole = sparse(rows * math.prod(last.shape[1:]), last.dtype).view(rows, *last.shape[1:])
    whole[-len(last) :] = last
    return whole


@contextlib.contextmanager
def last_programs(count: int):
    """While it lasts, kernels run the last programs of their grids alone: so many blocks, or in each dimension."""
    with _last_programs_interpreted(count), _last_blocks_emulated(count):
        yield


@contextlib.contextmanager
def _last_blocks_emulated(count: int):
    if emulated.missing() is not None:
        yield
        return
    emulated.load().run_last_blocks(count)
    try:
        yield
    finally:
        emulated.load().run_last_blocks(0)


@contextlib.contextmanager
def _last_programs_interpreted(count: int):
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    set_dim, set_index, launch = builder.set_grid_dim, builder.set_grid_idx, executor.__call__
    grids: list[tuple[int, ...]] = []

    def whole_dim(self, *_):
        set_dim(self, *grids[-1])

    def shifted_index(self, *index):
        set_index(self, *(max(size - count, 0) + i for size, i in zip(grids[-1], index)))

    def windowed_launch(self, *arguments, **named):
        grids.append((*self.grid, 1, 1)[:3])
        self.grid = tuple(min(size, count) for size in grids[-1])
        try:
            return launch(self, *arguments, **named)
        finally:
            grids.pop()

    builder.set_grid_dim, builder.set_grid_idx, executor.__call__ = whole_dim, shifted_index, windowed_launch
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx, executor.__call__ = set_dim, set_index, launch
