"""quantize_int8 in CUDA C++: launchers of csrc/quantize_int8.cu."""

from __future__ import annotations

import math

import torch

from gptkern.cuda_kernels import common
from gptkern.cuda_kernels.common import DTYPES


def unsupported(input, dim):
    return None if input.dtype in DTYPES else f"input is {input.dtype}"


def forward(input, dim):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    shape = input.shape
    width, scale_shape = shape[dim], (*shape[:dim], *shape[dim + 1 :])
    q = torch.empty(shape, dtype=torch.int8, device=input.device)
    if input.numel() == 0:
        return q, torch.ones(scale_shape, dtype=torch.float32, device=input.device)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=input.device)
    addresses = common.address(q), common.address(scale)
    if dim == len(shape) - 1:
        x = input if dim == 1 else input.reshape(-1, width)
        common.call(
            "quantize_int8_rows", x, common.address(x), *addresses, x.shape[0], width, *x.stride(), width,
            DTYPES[x.dtype],
        )  # fmt: skip
    else:
        # (outer, width, inner)
        x = input.reshape(math.prod(shape[:dim]), width, -1)
        common.call(
            "quantize_int8_columns", x, common.address(x), *addresses, *x.shape, *x.stride(), DTYPES[x.dtype]
        )  # fmt: skip
    return q, scale
