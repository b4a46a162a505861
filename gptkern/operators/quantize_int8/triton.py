"""quantize_int8 on Triton: the rows of gptkern/backends/triton/quantize.py, whichever dimension they lie along."""

from __future__ import annotations

import torch

from gptkern.backends.triton import quantize
from gptkern.operators.quantize_int8.contract import Call

compile_cases = quantize.compile_cases


def unsupported(call: Call) -> str | None:
    input = call.input
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"input is {input.dtype}"
    return None


def forward(call: Call):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    input, dim = call
    moved = input.movedim(dim, -1)  # (…, width)
    rows = moved.shape[:-1]
    q, scale = quantize.quantized_rows(moved.reshape(rows.numel(), moved.shape[-1]))
    return q.view(moved.shape).movedim(-1, dim).contiguous(), scale.view(rows)
