"""quantize_int8 in NumPy, whose divisions are correctly rounded."""

from __future__ import annotations

import numpy as np
import torch


def quantize_int8(input: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale): scale = max(max|x| / 127, 2⁻¹²⁶) along dim, or 1 if all is 0; q = x / scale, halves to even.

    In NumPy's float32 (float64 for float64), whose divisions are correctly rounded: exact, to be compared bit for bit.
    """
    x = input.detach().cpu()
    x = (x if x.dtype == torch.float64 else x.float()).numpy()
    largest = np.abs(x).max(axis=dim, keepdims=True)
    scale = np.maximum((largest / x.dtype.type(127)).astype(np.float32), np.finfo(np.float32).tiny)
    scale = np.where(largest == 0, np.float32(1), scale)
    q = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return torch.from_numpy(q), torch.from_numpy(scale.squeeze(dim))
