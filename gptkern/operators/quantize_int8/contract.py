"""quantize_int8: the contract, the PyTorch backend and the registered op.

scale = max|x| / 127        q = clamp(round(x / scale), -127, 127)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends import dispatch
from gptkern.backends.layouts import described, is_dense
from gptkern.backends.quantization import quantized
from gptkern.backends.registration import Operator


class Call(NamedTuple):
    """A checked call."""

    input: torch.Tensor  # any shape of at least one dimension
    dim: int  # from 0 on


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
        IndexError: dim is out of range. RuntimeError: the input is not floating point, or nested or sparse.
        TypeError: the input is no tensor.

    No gradient flows through it. Backends: torch (float64 included); triton and cuda for float16, bfloat16 and float32.
    """
    arguments = input, dim
    if (found := dispatch.recalled("quantize_int8", arguments)) is not None:
        return OPERATOR.forward(Call(input.detach(), found[1]), found[0], True)
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"quantize_int8: input is {type(input).__name__}; it needs a tensor")
    if not is_dense(input):
        raise RuntimeError(f"quantize_int8: input is {described(input)}; it needs to be dense")
    choice = dispatch.settled(input)
    if not input.is_floating_point():
        raise RuntimeError(f"quantize_int8: input is {input.dtype}; it needs a floating-point dtype")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"quantize_int8: dim is {type(dim).__name__}; it needs an int")
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"quantize_int8: dim is {dim}; it needs one of the input's {input.dim()} dimensions")
    call = Call(input.detach(), dim % input.dim())
    if choice is None:
        choice, unseen = dispatch.chosen("quantize_int8", call)
        if choice.backend != "torch":
            if unseen:
                dispatch.remember("quantize_int8", arguments, (choice.backend, call.dim))
            return OPERATOR.forward(call, choice.backend, unseen)
    return forward(call)


# --- The torch backend ----------------------------------------------------------------------------------------------


def unsupported(call: Call) -> None:
    return None


def forward(call: Call):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    return quantized(*call)


# --- Registration ---------------------------------------------------------------------------------------------------


def _forward_fake(call: Call):
    input, dim = call
    q = torch.empty(input.shape, dtype=torch.int8, device=input.device)
    return q, q.new_empty([*input.shape[:dim], *input.shape[dim + 1 :]], dtype=torch.float32)


TWIN = quantize_int8
OPERATOR = Operator("quantize_int8", Call, 2, _forward_fake)
