"""rms_norm in CUDA C++: launchers over csrc/rms_norm/, where the mathematics is."""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import DTYPES, as_read, most_partials
from gptkern.operators.rms_norm.contract import Call, Gradient

# Columns are 32-bit integers in the kernels, with room for a vector of each thread beyond the row.
WIDEST = 2**30


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    input = call.input
    if input.shape[-1] > WIDEST:
        return f"rows are {input.shape[-1]} wide; the kernel counts columns up to {WIDEST}"
    for name, tensor in (("input", input), ("residual", call.residual), ("weight", call.weight)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(call: Call):
    """-> output (…, width), summed (…, width) or None, rstd (rows,) in float32."""
    input, residual, weight, eps = call
    dtype, summed = input.dtype, None
    if residual is None:
        output = torch.empty_like(input, memory_format=torch.contiguous_format)
    else:
        dtype = torch.result_type(input, residual)
        output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
        summed = torch.empty_like(output)
    rstd = input.new_empty(input.shape[:-1].numel(), dtype=torch.float32)
    common.start("rms_norm_forward", input, residual, as_read(weight, dtype), output, summed, rstd, eps)
    return output, summed, rstd


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,) in the weight's dtype; what is not needed is empty."""
    grad_output, grad_summed, rstd, need_input, need_weight = gradient
    summed, weight = call.input, call.weight
    width, rows, device = summed.shape[-1], rstd.numel(), summed.device
    dtype = rstd.dtype if weight is None else weight.dtype
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    if need_input:
        dsummed = torch.empty_like(summed, memory_format=torch.contiguous_format)
    else:
        dsummed, grad_summed = torch.empty(0, dtype=torch.float32, device=device), None
    if rows == 0 or width == 0 or not (need_input or need_weight):
        return dsummed, rstd.new_zeros(width if need_weight else 0, dtype=dtype)
    partial = None
    if need_weight:
        dweight = torch.empty(width, dtype=torch.float32, device=device)
        partial = torch.empty(min(rows, most_partials(width, device)), width, dtype=torch.float32, device=device)
    else:
        dweight = torch.empty(0, dtype=torch.float32, device=device)
    weight = as_read(weight, summed.dtype)
    common.start(
        "rms_norm_backward", grad_output, grad_summed, summed, weight, rstd, dsummed, dweight, partial
    )  # fmt: skip
    return dsummed, dweight.to(dtype)
