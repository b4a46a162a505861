"""A small call of each operator that is a twin of PyTorch's: what chooses a backend is the same for all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gptkern.functional as G

PAIRS = {
    "attention": (F.scaled_dot_product_attention, G.scaled_dot_product_attention),
    "layer_norm": (F.layer_norm, G.layer_norm),
    "rms_norm": (F.rms_norm, G.rms_norm),
    "softmax": (F.softmax, G.softmax),
    "nonlinearity": (F.gelu, G.gelu),
    "cross_entropy": (F.cross_entropy, G.cross_entropy),
}


def a_call(operator: str, device: str = "cpu", backend: str | None = None) -> tuple:
    """The arguments of a small call that kernels cover."""
    if operator == "attention":
        # The CUDA kernels leave attention in float32 to Triton.
        dtype = torch.float16 if backend == "cuda" else torch.float32
        return tuple(torch.randn(1, 2, 5, 16, device=device, dtype=dtype) for _ in range(3))
    x = torch.randn(3, 8, device=device)
    if operator == "nonlinearity":
        return (x,)
    if operator == "cross_entropy":
        return x, torch.tensor([0, 7, 3], device=device)
    return (x, (8,)) if operator in ("layer_norm", "rms_norm") else (x, -1)


operators = pytest.mark.parametrize("operator", list(PAIRS))
