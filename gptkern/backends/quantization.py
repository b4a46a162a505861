"""Symmetric int8 quantisation in plain PyTorch: what the operators that quantise share.

scale = max|x| / 127        q = clamp(round(x / scale), -127, 127)
"""

from __future__ import annotations

import torch

from gptkern.backends import tracing

# -128 is left out, so that the range is symmetric.
LARGEST = 127
# The least scale: below it float32 has too few digits for x / scale to stay within ±127.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantized(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> q, int8 in x's shape; scale, float32 in x's shape without dim. dim is from 0 on."""
    without = [*x.shape[:dim], *x.shape[dim + 1 :]]
    if not tracing.in_jit_trace() and x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_ones(without, dtype=torch.float32)
    x = x if x.dtype == torch.float64 else x.float()
    magnitude = x.abs()
    largest = magnitude.amax(dim, keepdim=True)
    # q = round(x / scale); no finite |x| / scale rounds to more than 127, so that there is nothing to clamp
    if x.is_cpu and tracing.has_values(magnitude) and not magnitude.requires_grad:
        q, scale = _in_place(x, magnitude, largest)
    else:
        # scale = max|x| / 127; by a tensor, because on a GPU PyTorch multiplies by a number's reciprocal, an ulp off
        scale = largest / torch.full_like(largest, LARGEST)
        scale = scale.clamp_(min=SMALLEST_SCALE).masked_fill_(largest == 0, 1.0).float()
        q = (x / scale).round_().to(torch.int8)
    return q.contiguous(), scale.squeeze(dim).contiguous()


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantized(x, 1)` of float32 (rows, columns), neither 0, on a CPU where nobody looks on; scale: (rows, 1)."""
    magnitude = x.abs()
    return _in_place(x, magnitude, magnitude.amax(1, keepdim=True))


def _in_place(x, magnitude, largest):
    """q and scale in fewer steps, which are most of a row's time, and in the memory of what they are made from."""
    # A row of zeros: 127 / 127.
    scale = torch.threshold_(largest, 0.0, LARGEST).div_(LARGEST).clamp_(min=SMALLEST_SCALE)
    scale = scale if scale.dtype == torch.float32 else scale.float()
    # q = round(x / scale); no finite |x| / scale rounds to more than 127, so that there is nothing to clamp
    return torch.div(x, scale, out=magnitude).round_().to(torch.int8), scale
