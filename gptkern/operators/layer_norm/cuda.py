"""layer_norm in CUDA C++: launchers over csrc/layer_norm/, where the mathematics is."""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import DTYPES, as_read, most_partials
from gptkern.operators.layer_norm.contract import Call, Gradient

# Columns are 32-bit integers in the kernels, with room for a chunk beyond the row.
WIDEST = 2**30


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    input, residual = call.input, call.residual
    if input.shape[-1] > WIDEST:
        return f"rows are {input.shape[-1]} wide; the kernel counts columns up to {WIDEST}"
    # The contract has weight and bias of the input's dtype or float32.
    if input.dtype not in DTYPES or (residual is not None and residual.dtype not in DTYPES):
        name, tensor = ("input", input) if input.dtype not in DTYPES else ("residual", residual)
        return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(call: Call):
    """(…, width) -> output (…, width), summed (…, width) or None, statistics (2, rows): mean, rstd."""
    input, residual, weight, bias, eps = call
    dtype = input.dtype
    if residual is None:
        # A format that is named costs an eighth of an allocation.
        if input.is_contiguous():
            output = torch.empty_like(input)
        else:
            output = torch.empty_like(input, memory_format=torch.contiguous_format)
        summed = None
    else:
        dtype = torch.result_type(input, residual)
        output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
        summed = torch.empty_like(output)
    # A dtype that is named costs a seventh of an allocation.
    rows = input.shape[:-1].numel()
    is_float32 = input.dtype is torch.float32
    statistics = input.new_empty(2, rows) if is_float32 else input.new_empty(2, rows, dtype=torch.float32)
    if weight is not None and weight.dtype is not dtype:
        weight = as_read(weight, dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = as_read(bias, dtype)
    common.start("layer_norm_forward", input, residual, weight, bias, output, summed, statistics, eps)
    return output, summed, statistics


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,), dbias (width,) in the weight's dtype (the statistics'
    without one); what is not needed is empty."""
    grad_output, grad_summed, statistics, need_input, need_weight, need_bias = gradient
    summed, weight = call.input, call.weight
    width, device, float32 = summed.shape[-1], summed.device, torch.float32
    rows = statistics.shape[1]
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    if need_input:
        dsummed = torch.empty_like(summed, memory_format=torch.contiguous_format)
    else:
        dsummed, grad_summed = torch.empty(0, dtype=float32, device=device), None
    dtype = float32 if weight is None else weight.dtype
    if rows == 0 or width == 0:
        dweight, dbias = (statistics.new_zeros(width * needed, dtype=dtype) for needed in (need_weight, need_bias))
        return dsummed, dweight, dbias
    dweight = torch.empty(width if need_weight else 0, dtype=float32, device=device)
    dbias = torch.empty(width if need_bias else 0, dtype=float32, device=device)
    partials = min(rows, most_partials(width, device))
    wanted = need_weight + need_bias
    partial = torch.empty(wanted * partials * width, dtype=float32, device=device) if wanted else None
    weight = as_read(weight, summed.dtype)
    common.start(
        "layer_norm_backward", grad_output, grad_summed, summed, weight, statistics, dsummed, dweight, dbias, partial,
        partials,
    )  # fmt: skip
    return dsummed, dweight.to(dtype), dbias.to(dtype)
