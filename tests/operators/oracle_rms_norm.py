"""rms_norm in plain mathematics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from oracles import ORACLE


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """x / √(E[x²] + eps) * weight."""
    x = input.to(precision)
    dims = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y = x / torch.sqrt((x * x).mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight.to(precision)
