"""Interpreted Triton kernels may touch no memory but that of their tensor arguments.

A load beyond the end of a tensor, whose value is multiplied by 0 or thrown away, changes no result: on a GPU it
faults, but only where the tensor ends with its page. Here every address that an interpreted kernel loads from or
stores to is looked up among the tensors that it was launched with.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A kernel touched memory that belongs to none of its arguments."""


def _extents(arguments) -> list[tuple[int, int]]:
    """[first byte, one after the last) of each tensor, from its first to its last element."""
    extents = []
    for argument in arguments:
        tensor = getattr(argument, "base", argument)  # what a tensor descriptor or a reinterpreted tensor is made of
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            extents.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
            # Of a table of addresses: what these are the addresses of.
            extents += _extents(getattr(tensor, "reached", ()))
    return extents


@contextlib.contextmanager
def inside_bounds():
    """While it lasts, a load or store outside of a kernel's arguments raises (inside Triton's InterpreterError)."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    running: list[tuple[str, np.ndarray]] = []

    def check(access, pointers, mask):
        name, extents = running[-1]
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].astype(np.uint64)
        if addresses.size == 0:
            return
        size = np.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        first, last = addresses.min(), addresses.max() + size
        if ((extents[:, 0] <= first) & (last <= extents[:, 1])).any():
            return
        # Not all within one tensor: pointers may be chosen element by element among several.
        inside = np.zeros(addresses.shape, dtype=bool)
        for low, high in extents:
            inside |= (addresses >= low) & (addresses + size <= high)
        if not inside.all():
            outside = addresses[~inside]
            raise OutOfBounds(f"{name} {access} {outside.size} elements of {addresses.size} outside of its arguments")

    def checked_load(self, pointers, mask, *rest):
        check("loads", pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check("stores", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def checked_launch(self, *arguments, **named):
        extents = _extents([*arguments, *named.values()])
        running.append((self.fn.__name__, np.array(extents, dtype=np.uint64).reshape(-1, 2)))
        try:
            return launch(self, *arguments, **named)
        finally:
            running.pop()

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor.__call__ = checked_launch
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor.__call__ = launch
