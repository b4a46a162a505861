"""Mixed precision: parameters, gradients and sums in float32, matrix products in what the recipe says."""

from __future__ import annotations

import contextlib

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Below it the loss itself, times the scale, is smaller than the loss: gradients that still overflow are no matter of
# the scale any more.
LEAST_SCALE = 1.0


def autocast(device: torch.device, precision: str):
    """What a forward runs under: autocast where the precision is one of 16 bits."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def scaler_of(device: torch.device, precision: str) -> torch.amp.GradScaler | None:
    """Of float16 alone, whose gradients would be rounded to 0: it ends at 6e-8, where bfloat16 has float32's range."""
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None
