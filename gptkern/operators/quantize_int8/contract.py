"""quantize_int8: the contract, the PyTorch backend and the registered op.

scale = max|x| / 127        q = clamp(round(x / scale), -127, 127)
"""

from __future__ import annotations

import torch

from gptkern.backends import dispatch
from gptkern.backends.registration import register

# -128 is left out, so that the range is symmetric.
LARGEST = 127
# The least scale: below it float32 has too few digits for x / scale to stay within ±127.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantize_int8(input: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantisation with one scale for each slice along `dim`.

        scale = max|x| / 127 over dim        q = clamp(round(x / scale), -127, 127), halves to even

    An all-zero slice has scale 1; any other has at least float32's smallest normal number, 2^-126. The quotient is
    taken in float32 (float64 for float64 input).

    Args:
        input: any shape of at least one dimension, any strides, floating point, finite.
        dim: the dimension that shares a scale.

    Returns:
        (q, scale), contiguous: q is int8 in the input's shape; scale is float32 in the input's shape without `dim`,
        so that `q * scale.unsqueeze(dim)` is within scale/2 of the input. A slice that holds a NaN or an infinity
        has that as its scale.

    Raises:
        IndexError: dim is out of range. RuntimeError: the input is not floating point.
        TypeError: the input is no tensor.

    No gradient flows through it. Backends: torch (float64 included); triton and cuda for float16, bfloat16 and float32.
    """
    choice = dispatch.settled(input)
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"quantize_int8: input is {type(input).__name__}; it needs a tensor")
    if not input.is_floating_point():
        raise RuntimeError(f"quantize_int8: input is {input.dtype}; it needs a floating-point dtype")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"quantize_int8: dim is {type(dim).__name__}; it needs an int")
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"quantize_int8: dim is {dim}; it needs one of the input's {input.dim()} dimensions")
    call = input.detach(), dim % input.dim()
    if choice is None:
        choice = dispatch.choose("quantize_int8", *call)
    return forward(*call) if choice.backend == "torch" else _forward(*call, choice.backend)


# --- The torch backend ----------------------------------------------------------------------------------------------


def unsupported(input, dim):
    return None


def forward(input, dim):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    x = input if input.dtype == torch.float64 else input.float()
    if input.numel() == 0:
        return torch.empty(input.shape, dtype=torch.int8, device=input.device), x.new_ones(
            _without(input.shape, dim), dtype=torch.float32
        )
    # scale = max|x| / 127; by a tensor, because on a GPU PyTorch multiplies by a number's reciprocal, an ulp off
    largest = x.abs().amax(dim, keepdim=True)
    scale = largest / torch.full_like(largest, LARGEST)
    scale = scale.clamp_(min=SMALLEST_SCALE).masked_fill_(largest == 0, 1.0).float()
    # q = round(x / scale); no finite |x| / scale rounds to more than 127, so that there is nothing to clamp
    q = (x / scale).round_().to(torch.int8)
    return q.contiguous(), scale.squeeze(dim).contiguous()


# --- Registration ---------------------------------------------------------------------------------------------------


def _without(shape, dim):
    return [*shape[:dim], *shape[dim + 1 :]]


def _forward_fake(input, dim, backend):
    q = torch.empty(input.shape, dtype=torch.int8, device=input.device)
    return q, q.new_empty(_without(input.shape, dim), dtype=torch.float32)


_forward = register(
    "quantize_int8", "forward", "(Tensor input, int dim, str backend) -> (Tensor, Tensor)", _forward_fake
)
