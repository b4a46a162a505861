"""softmax: the contract, the PyTorch backend, the registered ops and the autograd.Function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern import dispatch


@dispatch.twin_of(F.softmax, torch.softmax, torch.Tensor.softmax)
def softmax(
    input: torch.Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Softmax over one dimension, the twin of `torch.nn.functional.softmax`.

        z = scale * input  (+ mask, where it is additive;  -inf where a bool mask is False or is_causal hides it)
        y_i = exp(z_i - max(z)) / sum_j exp(z_j - max(z))

    One pass over the row: scale, mask and the causal limit cost no memory of their own. Sums are kept in
    float32 (float64 for float64 input).

    Args:
        input: any shape; floating point, or any dtype together with `dtype`.
        dim: the dimension that sums to 1. None picks one as PyTorch does, with PyTorch's warning.
        dtype: the result's dtype; the input is converted to it first.
        scale: multiplies the input before the mask; its gradient is not taken.
        mask: bool (True takes part) or floating point (added), broadcastable to the input.
        is_causal: element j of row i takes part if j <= i; rows are the second-to-last dimension and `dim` has to
            be the last. What lies right of the limit is written as 0 and not read.

    Returns:
        The input's shape; dtype `dtype`, or the input's. With a mask or is_causal, a row of which nothing takes
        part (all False, all -inf) is 0 and has gradient 0; without, PyTorch's NaN for a row of -inf.

    Raises (of the same type as PyTorch):
        IndexError: dim is out of range.
        RuntimeError: the input is no floating-point tensor and dtype is None; the mask does not broadcast, or is
            on another device.
        ValueError: is_causal with fewer than two dimensions, or with a dim that is not the last.
        TypeError: an argument that must be a tensor is none; a mask that is neither bool nor floating point.

    Backends: torch; triton for float16, bfloat16, float32 and float64, any dim, any width, forward and backward
    (no second derivative; a mask that requires grad runs on PyTorch).

    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
    """
    raise NotImplementedError
