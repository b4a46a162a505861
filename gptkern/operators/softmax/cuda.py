"""softmax in CUDA C++: the launchers over csrc/softmax/forward.cu and csrc/softmax/backward.cu.

The kernels walk any strides in place. What they see as rows and columns is worked out in C++, from shapes and strides.
"""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import DTYPES
from gptkern.operators.softmax.contract import Call, Gradient

MASK_DTYPES = {*DTYPES, torch.bool}

# The widest row that is held in registers where that is less than what they hold, and how much of a wider one shared
# memory keeps. Set by tests alone, to 16 say: the kernels for long rows then run on rows that an emulator gets through.
ONE_PASS_LIMIT: int = 2**62

# MOST_DIMENSIONS of csrc/softmax/softmax.cuh, and the one that sums to 1.
_MOST_DIMENSIONS = 9
# Rows and widths are counted in 32 bits and run over by less than a block's tile.
_MAX_COUNT = 2**31 - 2**20


def unsupported(call: Call) -> str | None:
    input, dim, dtype, _, mask, _ = call
    if input.dtype not in DTYPES or (dtype is not None and dtype not in DTYPES):
        name, of = ("input", input.dtype) if input.dtype not in DTYPES else ("dtype", dtype)
        return f"{name} is {of}; the kernels cover float16, bfloat16 and float32"
    if mask is not None:
        if mask.dtype not in MASK_DTYPES:
            return f"mask is {mask.dtype}; the kernels cover bool, float16, bfloat16 and float32"
        if mask.requires_grad and torch.is_grad_enabled():
            return "the mask requires a gradient, which the kernels do not compute"
    shape = input.shape
    if len(shape) > _MOST_DIMENSIONS:
        return f"the input has {len(shape)} dimensions; the kernels walk {_MOST_DIMENSIONS}"
    width = shape[dim] if shape else 1
    if width > _MAX_COUNT or input.numel() > max(width, 1) * _MAX_COUNT:
        return f"the input has shape {tuple(shape)}; the kernels count its width and its rows in 32 bits"
    return None


def forward(call: Call):
    """(…) -> output (…), contiguous, of `dtype` or the input's."""
    input, dim, dtype, scale, mask, is_causal = call
    output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
    common.start("softmax_forward", input, mask, output, dim, scale, is_causal, ONE_PASS_LIMIT)
    return output


def backward(gradient: Gradient, call: Call):
    """-> dx (…), contiguous, of `dtype`."""
    grad_output, output, dtype = gradient
    dim, scale, is_causal = call.dim, call.scale, call.is_causal
    dx = torch.empty_like(output, dtype=dtype, memory_format=torch.contiguous_format)
    common.start("softmax_backward", grad_output, output, dx, dim, scale, is_causal, ONE_PASS_LIMIT)
    return dx
