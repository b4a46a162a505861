"""layer_norm in plain mathematics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from oracles import ORACLE


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    precision: torch.dtype = ORACLE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) with s = input + residual and y = (s - E[s]) / √(E[(s - E[s])²] + eps) * weight + bias."""
    s = input.to(precision) if residual is None else input.to(precision) + residual.to(precision)
    dims = tuple(range(s.ndim - len(normalized_shape), s.ndim))
    centred = s - s.mean(dims, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(precision)
    y = y if bias is None else y + bias.to(precision)
    return y, s
