"""rotary_embedding in plain mathematics."""

from __future__ import annotations

import torch
from oracles import ORACLE


def rotary_embedding(
    input: torch.Tensor,  # (batch, heads, length, head_dim)
    cos: torch.Tensor,  # (length, pairs) or (batch or 1, length, pairs)
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """Each pair of elements as a complex number, times cos + i sin of its position; the other elements stay."""
    x, cos, sin = (tensor.to(precision) for tensor in (input, cos, sin))
    pairs = cos.shape[-1]
    first = torch.arange(pairs, device=x.device)
    real, imaginary = (2 * first, 2 * first + 1) if interleaved else (first, first + pairs)
    turn = torch.complex(cos, sin).unsqueeze(-3)  # (batch or nothing, 1, length, pairs)
    y = torch.complex(x[..., real].contiguous(), x[..., imaginary].contiguous()) * turn
    return x.index_copy(-1, real, y.real).index_copy(-1, imaginary, y.imag)
