"""quantize_int8 in CUDA C++: launchers of csrc/quantize_int8/quantize_int8.cu."""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import DTYPES
from gptkern.operators.quantize_int8.contract import Call

# Rows and widths are counted in 32 bits and run over by less than a block's tile.
_MAX_COUNT = 2**31 - 2**20


def unsupported(call: Call) -> str | None:
    input, dim = call
    if input.dtype not in DTYPES:
        return f"input is {input.dtype}"
    width = input.shape[dim]
    if width > _MAX_COUNT or input.numel() > max(width, 1) * _MAX_COUNT:
        return f"the input has shape {tuple(input.shape)}; the kernels count its width and its rows in 32 bits"
    return None


def forward(call: Call):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    input, dim = call
    shape = input.shape
    q = torch.empty_like(input, dtype=torch.int8, memory_format=torch.contiguous_format)
    # A row of no elements has scale 1.
    empty = torch.ones if input.numel() == 0 else torch.empty
    scale = empty(shape[:dim] + shape[dim + 1 :], dtype=torch.float32, device=input.device)
    common.start("quantize_int8", input, q, scale, dim)
    return q, scale
