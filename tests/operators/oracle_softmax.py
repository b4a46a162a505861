"""softmax in plain mathematics."""

from __future__ import annotations

import torch
from oracles import ORACLE, masked_softmax


def softmax(
    input: torch.Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """softmax of scale * input + mask over `dim`, of the entries that a bool mask and is_causal let take part.

    A row of which nothing takes part is 0 where there is a mask or is_causal, else NaN.
    """
    scores = input.to(precision) * scale
    takes_part = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        takes_part = takes_part & mask
    elif mask is not None:
        scores = scores + mask.to(precision)
    if is_causal:
        takes_part = takes_part.tril()  # element j of row i takes part if j <= i
    if scores.dim() == 0:
        return masked_softmax(scores[None], takes_part[None], zero_if_empty=mask is not None)[0]
    scores, takes_part = scores.transpose(dim, -1), takes_part.transpose(dim, -1)
    y = masked_softmax(scores, takes_part, zero_if_empty=mask is not None or is_causal)
    return y.transpose(dim, -1)
