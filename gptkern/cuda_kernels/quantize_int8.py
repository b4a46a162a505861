"""quantize_int8 in CUDA C++: launchers of csrc/quantize_int8.cu."""

from __future__ import annotations

import math

import torch

from gptkern.cuda_kernels import common
from gptkern.cuda_kernels.common import DTYPES

# Rows and widths are counted in 32 bits and run over by less than a block's tile.
_MAX_COUNT = 2**31 - 2**20


def unsupported(input, dim):
    if input.dtype not in DTYPES:
        return f"input is {input.dtype}"
    width = input.shape[dim]
    if width > _MAX_COUNT or input.numel() > max(width, 1) * _MAX_COUNT:
        return f"the input has shape {tuple(input.shape)}; the kernels count its width and its rows in 32 bits"
    return None


def forward(input, dim):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    shape = input.shape
    last = dim == len(shape) - 1
    scale_shape = shape[:-1] if last else (*shape[:dim], *shape[dim + 1 :])
    q = input.new_empty(shape, dtype=torch.int8)
    if input.numel() == 0:
        return q, input.new_ones(scale_shape, dtype=torch.float32)
    scale = input.new_empty(scale_shape, dtype=torch.float32)
    address, width, dtype = common.address, shape[dim], DTYPES[input.dtype]
    if last:
        x = input if dim == 1 else input.reshape(-1, width)
        common.call(
            "quantize_int8_rows", x, address(x), address(q), address(scale), x.shape[0], width, *x.stride(), width,
            dtype,
        )  # fmt: skip
    else:
        # (outer, width, inner)
        x = input.reshape(math.prod(shape[:dim]), width, -1)
        common.call("quantize_int8_columns", x, address(x), address(q), address(scale), *x.shape, *x.stride(), dtype)
    return q, scale
