"""int8_linear in plain mathematics, with its activations."""

from __future__ import annotations

import math

import torch
from oracles import ORACLE


def gelu(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """z * Φ(z), or its approximation by tanh; z itself where activation is None."""
    if activation == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z


def int8_linear(
    input: torch.Tensor,  # (…, in_features)
    weight: torch.Tensor,  # (out_features, in_features) int8
    weight_scale: torch.Tensor,  # (out_features,) float32
    bias: torch.Tensor | None = None,  # (out_features,)
    activation: str | None = None,
    *,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """activation((x @ weightᵀ) * weight_scale + bias), with x the input, or q * scale of `quantized` (w8a8).

    Gradients pass straight through the quantisation, as if x were the input.
    """
    z = input.to(precision) @ weight.to(precision).T
    if quantized is not None:
        q, scale = quantized
        # The product is of integers and below 2³¹: exact in float64, whatever the precision of the rest.
        product = (q.double() @ weight.cpu().double().T).to(precision) * scale.to(precision)[..., None]
        z = product.to(z.device) + (z - z.detach())
    z = z * weight_scale.to(precision)
    return gelu(z if bias is None else z + bias.to(precision), activation)
