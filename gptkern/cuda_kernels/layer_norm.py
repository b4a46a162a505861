"""layer_norm in CUDA C++: launchers over csrc/layer_norm.cu and csrc/layer_norm_backward.cu: their mathematics."""

from __future__ import annotations

import functools

import torch

from gptkern.cuda_kernels import common
from gptkern.cuda_kernels.common import DTYPES

# Blocks a multiprocessor that share the rows of a backward: with 256 threads of at most 128 registers, as many as fit.
BLOCKS_PER_MULTIPROCESSOR = 2
# Of wider rows one block takes more of a multiprocessor, and its partial sums more memory: there are fewer of them.
FULL_BLOCKS_WIDTH = 8192
# Of a width that is no multiple of this, groups of threads walk in steps of as many rows, which are aligned alike.
ROWS_OF_ONE_ALIGNMENT = 8
# Columns are 32-bit integers in the kernels, with room for a chunk beyond the row.
WIDEST = 2**30


def unsupported(input, residual, weight, bias, eps) -> str | None:
    """Why these kernels do not cover a call, or None."""
    if input.shape[-1] > WIDEST:
        return f"rows are {input.shape[-1]} wide; the kernel counts columns up to {WIDEST}"
    for name, tensor in (("input", input), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(input, residual, weight, bias, eps):
    """(…, width) -> output (…, width), summed (…, width) or empty, mean (rows,), rstd (rows,)."""
    dtype, device = input.dtype, input.device
    if residual is not None:
        dtype = torch.result_type(input, residual)
    output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
    summed = torch.empty(0, dtype=dtype, device=device) if residual is None else torch.empty_like(output)
    mean = torch.empty(input.shape[:-1].numel(), dtype=torch.float32, device=device)
    rstd = torch.empty_like(mean)
    weight, bias = _as_read(weight, dtype), _as_read(bias, dtype)
    common.start("layer_norm_forward", input, residual, weight, bias, output, summed, mean, rstd, eps)
    return output, summed, mean, rstd


def backward(grad_output, grad_summed, summed, weight, mean, rstd, need_input, need_weight, need_bias):
    """-> dsummed (…, width), dweight (width,), dbias (width,) in float32; what is not needed is empty."""
    width, device, float32 = summed.shape[-1], summed.device, torch.float32
    rows = mean.numel()
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    if need_input:
        dsummed = torch.empty_like(summed, memory_format=torch.contiguous_format)
    else:
        dsummed, grad_summed = torch.empty(0, dtype=float32, device=device), None
    if rows == 0 or width == 0:
        return dsummed, mean.new_zeros(width if need_weight else 0), mean.new_zeros(width if need_bias else 0)
    dweight = torch.empty(width if need_weight else 0, dtype=float32, device=device)
    dbias = torch.empty(width if need_bias else 0, dtype=float32, device=device)
    partials = min(rows, _most_partials(width, device))
    wanted = need_weight + need_bias
    partial = torch.empty(wanted * partials * width, dtype=float32, device=device) if wanted else None
    weight = _as_read(weight, summed.dtype)
    common.start(
        "layer_norm_backward", grad_output, grad_summed, summed, weight, mean, rstd, dsummed, dweight, dbias, partial,
        partials,
    )  # fmt: skip
    return dsummed, dweight, dbias


@functools.cache
def _most_partials(width: int, device: torch.device) -> int:
    """How many partial sums of weight and bias gradients are made, of enough rows."""
    partials = BLOCKS_PER_MULTIPROCESSOR * common.multiprocessors(device)
    if width > FULL_BLOCKS_WIDTH:
        partials = partials * FULL_BLOCKS_WIDTH // width
    return max(partials, ROWS_OF_ONE_ALIGNMENT if width % ROWS_OF_ONE_ALIGNMENT else 1)


def _as_read(parameter, dtype):
    """A parameter of `dtype` or float32, as the kernels read it."""
    if parameter is None or parameter.dtype is dtype or parameter.dtype is torch.float32:
        return parameter
    # 16-bit parameters beside a sum that a residual has widened.
    return parameter.float()
