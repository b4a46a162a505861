"""int8_linear: the contract, the PyTorch backend, the registered ops and the autograd.Function."""

from __future__ import annotations

import torch


def quantize_int8(input: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantisation with one scale for each slice along `dim`.

        scale = max|x| / 127 over dim        q = clamp(round(x / scale), -127, 127), halves to even

    An all-zero slice has scale 1. The quotient is taken in float32 (float64 for float64 input).

    Args:
        input: any shape of at least one dimension, floating point, finite.
        dim: the dimension that shares a scale.

    Returns:
        (q, scale): q is int8 in the input's shape; scale is float32 in the input's shape without `dim`, so that
        `q * scale.unsqueeze(dim)` is within scale/2 of the input.

    Raises:
        IndexError: dim is out of range. RuntimeError: the input is not floating point.
        TypeError: the input is no tensor.

    No gradient flows through it. Backends: torch; triton.
    """
    raise NotImplementedError


def int8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    mode: str = "auto",
) -> torch.Tensor:
    """A linear layer whose weight is int8: `torch.nn.functional.linear` on the dequantised weight.

        w8a16:  y = act((input @ weight^T) * weight_scale + bias)           the weight widened on the fly
        w8a8:   y = act((q @ weight^T) * input_scale * weight_scale + bias)     (q, input_scale) = quantize_int8(input)

    The w8a8 product is exact in int32; it is never written to memory: scales, bias and activation are applied to
    the accumulator in float32 and the result is rounded once.

    Args:
        input: (*, in_features), floating point; any number of rows, 0 included.
        weight: (out_features, in_features), int8, any value in -128…127; any strides.
        weight_scale: (out_features,), float32.
        bias: (out_features,), floating point, or None.
        activation: None, "gelu" (exact) or "gelu_tanh" (PyTorch's approximate="tanh").
        mode: "w8a8", "w8a16", or "auto": w8a16 for at most 16 rows (where the weight's bytes are the time), else w8a8.

    Returns:
        (*, out_features), the input's dtype.

    The backward gives grad_input = grad @ (weight * weight_scale), through the dequantised weight (in w8a8 the
    rounding of the activation passes gradients straight through), and grad_bias. The activation's argument is
    recomputed, not kept. No second derivative.

    Under autocast the input is cast to the autocast dtype, as for F.linear.

    Raises:
        TypeError: the weight is not int8; an argument that must be a tensor is none.
        RuntimeError: shapes do not match; weight_scale is not float32 or requires grad; the input is not floating
            point; tensors are on several devices.
        ValueError: unknown activation or mode.

    Backends: torch (float64 included); triton for float16, bfloat16 and float32, forward and backward.

    Source: Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 2.1, vector-wise quantisation.
    """
    raise NotImplementedError
