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
    input, residual, weight, _ = call
    if input.shape[-1] > WIDEST:
        return f"rows are {input.shape[-1]} wide; the kernel counts columns up to {WIDEST}"
    if residual is not None:
        return "the kernel adds no residual yet"
    for name, tensor in (("input", input), ("residual", residual), ("weight", weight)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(call: Call):
    """-> output (…, width), summed (…, width) or None, rstd (rows,) in float32."""
    input, residual, weight, eps = call
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    rstd = input.new_empty(input.shape[:-1].numel(), dtype=torch.float32)
    common.start("rms_norm_forward", input, as_read(weight, input.dtype), output, rstd, eps)
    return output, None, rstd


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,) in the weight's dtype; what is not needed is empty."""
    grad_output, grad_summed, rstd, need_input, need_weight = gradient
    input, weight = call.input, call.weight
    width, rows, device = input.shape[-1], rstd.numel(), input.device
    dtype = rstd.dtype if weight is None else weight.dtype
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    if need_input:
        dinput = torch.empty_like(input, memory_format=torch.contiguous_format)
    else:
        dinput = torch.empty(0, dtype=torch.float32, device=device)
    if rows == 0 or width == 0 or not (need_input or need_weight):
        return dinput, rstd.new_zeros(width if need_weight else 0, dtype=dtype)
    partial = None
    if need_weight:
        dweight = torch.empty(width, dtype=torch.float32, device=device)
        partial = torch.empty(min(rows, most_partials(width, device)), width, dtype=torch.float32, device=device)
    else:
        dweight = torch.empty(0, dtype=torch.float32, device=device)
    weight = as_read(weight, input.dtype)
    common.start("rms_norm_backward", grad_output, input, weight, rstd, dinput, dweight, partial)
    return dinput, dweight.to(dtype)
