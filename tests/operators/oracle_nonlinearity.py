"""GELU and SiLU, plain and gated, in plain mathematics."""

from __future__ import annotations

import math

import torch
from oracles import ORACLE


def nonlinearity(
    input: torch.Tensor,
    other: torch.Tensor | None = None,
    *,
    function: str,
    kind: str = "plain",
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """f(x); f(x + other), kind "bias"; f(x) * other, kind "pair"; of both halves of a row, kind "packed"."""
    x, other = input.to(precision), None if other is None else other.to(precision)
    if kind == "packed":
        width = input.shape[-1] // 2
        x, other = x[..., :width], x[..., width:]
    if kind == "bias":
        x = x + other
    if function == "silu":
        y = x / (1 + torch.exp(-x))
    elif function == "gelu":
        y = x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    else:
        y = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))
    return y * other if kind in ("pair", "packed") else y
