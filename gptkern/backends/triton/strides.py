"""How a kernel walks several tensors of one shape at once: as few strides as describe them all, and no copy."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """Tensors of one shape as (size_0, size_1, lanes, width), `width` being the dimension that is reduced.

    Neighbours in `lanes` are next to each other in a contiguous tensor but for the width: with AXIS 1 a lane is a
    row and the width lies innermost, with AXIS 0 the lanes do.
    """

    axis: int
    size_0: int
    size_1: int
    lanes: int
    strides: list[tuple[int, int, int, int]]  # (stride_0, stride_1, stride_lane, stride_n) of each tensor


def collapsed(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """(size, stride, stride, …) of each dimension, outermost first, with neighbours merged where all strides allow."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1:], strides)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    return merged


def layout(dim: int, *tensors: torch.Tensor) -> Layout | None:
    """How tensors of one shape are walked together, or None: too many dimensions are left after merging."""
    dims = [(size, *(tensor.stride(i) for tensor in tensors)) for i, size in enumerate(tensors[0].shape)]
    inner = collapsed(dims[dim + 1 :])
    # Where nothing lies inside of the dimension, the innermost outer dimension gives the lanes.
    walked = collapsed(dims[:dim]) + inner
    if len(inner) > 1 or len(walked) > 3:
        return None
    absent = (1, *(0 for _ in tensors))
    (size_0, *strides_0), (size_1, *strides_1), (lanes, *strides_lane) = [absent] * (3 - len(walked)) + walked
    strides_n = (tensor.stride(dim) for tensor in tensors)
    strides = list(zip(strides_0, strides_1, strides_lane, strides_n))
    return Layout(0 if inner else 1, size_0, size_1, lanes, strides)
