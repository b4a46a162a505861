"""rotary: the contract, the PyTorch backend, the registered ops and the autograd.Function.

The elements of a head are turned in pairs (a, b), each by an angle of its own that grows with the position:

    y_a = x_a * cos - x_b * sin
    y_b = x_b * cos + x_a * sin

of pair i < rotary_dim / 2:
    half-split (GPT-NeoX, Llama)    a = i        b = i + rotary_dim / 2
    interleaved (GPT-J)             a = 2 * i    b = 2 * i + 1
Elements from rotary_dim on pass through. Backward: the same by the negative angle,

    dx_a = dy_a * cos + dy_b * sin
    dx_b = dy_b * cos - dy_a * sin

so neither input nor output is kept, and a backend's backward is its forward with -sin.

Inside gptkern a call is (input, cos, sin, rotary_dim, interleaved), where the last dimension of cos and sin is
rotary_dim / 2, one for each pair, or rotary_dim, both elements of a pair having the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.backends import dispatch, tracing
from gptkern.backends.layouts import described, is_dense
from gptkern.backends.registration import (
    KernelFunction,
    Operator,
    needs_gradient,
    on_kernels,
    once_differentiable,
    without_autocast,
)


class Call(NamedTuple):
    """A checked call. In a backward, which does not read it, input is None."""

    input: torch.Tensor  # (batch, heads, length, head_dim)
    cos: torch.Tensor  # (length, width) or (batch or 1, length, width)
    sin: torch.Tensor  # as cos
    rotary_dim: int
    interleaved: bool


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (batch, heads, length, head_dim)


def rotary_embedding(
    input: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> torch.Tensor:
    """The rotary position embedding: turns pairs of a head's elements by the angles of their position.

        y_a = x_a * cos - x_b * sin          (a, b) = (i, i + rotary_dim / 2), or interleaved: (2 i, 2 i + 1)
        y_b = x_b * cos + x_a * sin          of each pair i < rotary_dim / 2; what is beyond rotary_dim is copied

    Args:
        input: (batch, heads, length, head_dim), floating point: the query or the key. Any strides with a contiguous
            last dimension are read in place: a third of a packed projection, a transposed (batch, length, heads,
            head_dim).
        cos, sin: (length, width), (batch, length, width) or (1, length, width), both of one shape and of one
            floating-point dtype, which need not be the input's. The width is rotary_dim / 2, an angle for each pair,
            or rotary_dim, in which both elements of a pair have the angle: what Hugging Face's Llama makes (the
            halves equal), or interleaved what GPT-J makes (neighbours equal). Of those the first is read; that the
            second equals it is not looked at.
        interleaved: a pair is two neighbours (GPT-J), not two elements half of rotary_dim apart (GPT-NeoX, Llama).
        rotary_dim: how many elements of a head are turned, even. By default a width of head_dim says that all are,
            and any other width is half of rotary_dim. So it has to be given where fewer than head_dim are turned
            and cos has an entry for each of them: rotary_dim=cos.shape[-1].

    Returns:
        The input's shape and dtype, dense, with the input's order in memory: (batch, length, heads, head_dim) where
        the input's heads lie closer together than its positions, else (batch, heads, length, head_dim).

    The arithmetic is float32 (float64 for float64 input) and the result is rounded once; under autocast too it keeps
    the input's dtype. No second derivative, but on PyTorch, as for every operator here.

    Raises:
        TypeError: input, cos or sin is no tensor; rotary_dim is no int; interleaved is no bool.
        RuntimeError: a shape is none of these, or does not fit the input's; a dtype is not floating point, or sin's is
            not that of cos; tensors are on several devices; the input is nested or sparse.
        ValueError: rotary_dim is odd, negative or more than head_dim, or the width is neither it nor half of it.

    Backends: torch; triton for float16, bfloat16, float32 and float64, cuda for the same but float64, forward and
    backward. Where cos or sin requires grad, PyTorch runs, and computes it.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021 (arXiv:2104.09864).
    """
    arguments = input, cos, sin, interleaved, rotary_dim
    if (found := dispatch.recalled("rotary", arguments)) is not None and not needs_gradient(cos, sin):
        call = Call(input, cos, sin, found[1], interleaved)
        return on_kernels(OPERATOR, RotaryFunction, call, found[0], True, input)
    if isinstance(input, torch.Tensor) and not is_dense(input):
        raise RuntimeError(f"rotary_embedding: input is {described(input)}; it needs to be dense")
    choice = dispatch.settled(input)
    if tracing.in_jit_trace():
        return _traced(input, cos, sin, interleaved, rotary_dim)
    rotary_dim = _checked_rotary_dim(input, cos, sin, interleaved, rotary_dim)
    if choice is None:
        call = Call(input, cos, sin, rotary_dim, interleaved)
        choice, unseen = dispatch.chosen("rotary", call)
        if choice.backend != "torch":
            if unseen:
                dispatch.remember("rotary", arguments, (choice.backend, rotary_dim))
            return on_kernels(OPERATOR, RotaryFunction, call, choice.backend, unseen, call.input)
    # Autocast would look at the 16-bit parts of the result, and on a CPU refuses float16.
    with without_autocast(input.device.type):
        return _turned(input, cos, sin, rotary_dim, interleaved)


def _traced(input, cos, sin, interleaved, rotary_dim):
    """The operator as torch.jit.trace records it: for any sizes, which are tensors there, as rotary_dim may be."""
    with tracing.untraced():
        if isinstance(rotary_dim, torch.Tensor) and rotary_dim.dim() == 0 and not rotary_dim.is_floating_point():
            rotary_dim = rotary_dim.item()
        rotary_dim = _checked_rotary_dim(input, cos, sin, interleaved, rotary_dim)
        is_whole, is_double = rotary_dim == input.shape[-1], rotary_dim == cos.shape[-1]
    rotary_dim = cos.shape[-1] if is_double else 2 * cos.shape[-1]
    with without_autocast(input.device.type):
        return _turned_pairs(input, cos, sin, rotary_dim, interleaved, is_whole, is_double)


def _checked_rotary_dim(input, cos, sin, interleaved, rotary_dim) -> int:
    """How many elements of a head are turned; raises where the arguments do not fit together."""
    for name, tensor in (("input", input), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"rotary_embedding: {name} is {type(tensor).__name__}; it needs a tensor")
        if not tensor.is_floating_point():
            raise RuntimeError(f"rotary_embedding: {name} is {tensor.dtype}; it needs a floating-point dtype")
    if not isinstance(interleaved, bool):
        raise TypeError(f"rotary_embedding: interleaved is {type(interleaved).__name__}; it needs a bool")
    shape, cos_shape = input.shape, cos.shape
    if len(shape) != 4:
        raise RuntimeError(
            f"rotary_embedding: input has shape {tuple(shape)}; it needs (batch, heads, length, head_dim)"
        )
    batch, _, length, head_dim = shape
    fits = (len(cos_shape) == 2 or (len(cos_shape) == 3 and cos_shape[0] in (1, batch))) and cos_shape[-2] == length
    if not fits:
        raise RuntimeError(
            f"rotary_embedding: cos has shape {tuple(cos_shape)}; it needs (length, width) or (batch or 1, length, "
            f"width), with the input's length, {length}, and batch, {batch}"
        )
    if sin.shape != cos_shape:
        raise RuntimeError(
            f"rotary_embedding: sin has shape {tuple(sin.shape)}; it needs that of cos, {tuple(cos_shape)}"
        )
    if sin.dtype != cos.dtype:
        raise RuntimeError(f"rotary_embedding: sin is {sin.dtype}; it needs the dtype of cos, {cos.dtype}")
    device = input.device
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.device != device:
            raise RuntimeError(f"rotary_embedding: {name} is on {tensor.device}; it needs the input's device, {device}")
    width = cos_shape[-1]
    if rotary_dim is None:
        rotary_dim = width if width == head_dim else 2 * width
        if rotary_dim > head_dim:
            raise RuntimeError(
                f"rotary_embedding: cos has shape {tuple(cos_shape)}; its last dimension needs to be head_dim, "
                f"{head_dim}, or half of what is turned, at most {head_dim // 2}; or rotary_dim has to be given"
            )
        if rotary_dim % 2:
            raise RuntimeError(
                f"rotary_embedding: input has shape {tuple(shape)} and all of its head_dim is turned; that needs to be "
                "even"
            )
        return rotary_dim
    if not isinstance(rotary_dim, (int, torch.SymInt)) or isinstance(rotary_dim, bool):
        raise TypeError(f"rotary_embedding: rotary_dim is {type(rotary_dim).__name__}; it needs an int")
    if not 0 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(
            f"rotary_embedding: rotary_dim is {rotary_dim}; it needs to be even, and at most the input's head_dim, "
            f"{head_dim}"
        )
    if width != rotary_dim and 2 * width != rotary_dim:
        raise ValueError(
            f"rotary_embedding: cos has shape {tuple(cos_shape)}; with rotary_dim={rotary_dim} its last dimension "
            f"needs to be {rotary_dim} or {rotary_dim // 2}"
        )
    return rotary_dim


# --- The layout of a result, for every backend ----------------------------------------------------------------------


def result_strides(shape: tuple, strides: tuple) -> tuple:
    """Of the result, dense, from the input's: (batch, length, heads, head_dim) in memory where heads lie inside."""
    _, heads, length, head_dim = shape
    if strides[1] < strides[2]:
        return length * heads * head_dim, head_dim, heads * head_dim, 1
    return heads * length * head_dim, length * head_dim, head_dim, 1


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def _turned(input, cos, sin, rotary_dim, interleaved):
    is_whole, is_double = rotary_dim == input.shape[-1], rotary_dim == cos.shape[-1]
    return _turned_pairs(input, cos, sin, rotary_dim, interleaved, is_whole, is_double)


def _turned_pairs(input, cos, sin, rotary_dim, interleaved, is_whole, is_double):
    """The operator in PyTorch's own, differentiable as often as they are.

    Args:
        is_whole: whether all of head_dim is turned. is_double: whether cos and sin have an entry for each element.
    """
    half = rotary_dim // 2
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    # In the order of memory, in which the result is written: (batch, heads, length, head_dim), or heads inside.
    heads_inside = input.stride(1) < input.stride(2)
    x = input.transpose(1, 2) if heads_inside else input
    if is_double:
        of_pairs = slice(0, None, 2) if interleaved else slice(0, half)
        cos, sin = cos[..., of_pairs], sin[..., of_pairs]
    # (…, length, half) -> (…, 1, length, half), or (…, length, 1, half)
    cos, sin = (angles.to(dtype).unsqueeze(-2 if heads_inside else -3) for angles in (cos, sin))
    turned, rest = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    if interleaved:
        x_a, x_b = turned[..., 0::2], turned[..., 1::2]
    else:
        x_a, x_b = turned[..., :half], turned[..., half:]
    # y_a = x_a * cos - x_b * sin
    y_a = torch.addcmul(x_a * cos, x_b, sin, value=-1).to(input.dtype)
    # y_b = x_b * cos + x_a * sin
    y_b = torch.addcmul(x_b * cos, x_a, sin).to(input.dtype)
    y = [torch.stack((y_a, y_b), -1).flatten(-2)] if interleaved else [y_a, y_b]
    y = torch.cat([*y, rest], -1) if not (is_whole and interleaved) else y[0]
    return y.transpose(1, 2) if heads_inside else y


def unsupported(call: Call) -> str | None:
    if torch.is_grad_enabled() and (call.cos.requires_grad or call.sin.requires_grad):
        return "cos or sin requires a gradient, which the backward does not compute"
    return None


def forward(call: Call):
    """-> output (batch, heads, length, head_dim), of the input's dtype and order in memory."""
    return _turned(*call)


def backward(gradient: Gradient, call: Call):
    """-> dx (batch, heads, length, head_dim), of the gradient's dtype and order in memory."""
    _, cos, sin, rotary_dim, interleaved = call
    return _turned(gradient.grad_output, cos, -sin, rotary_dim, interleaved)


# --- Registration and autograd --------------------------------------------------------------------------------------


def _in_order_of(input):
    strides = result_strides(input.shape, input.stride())
    return torch.empty_strided(input.shape, strides, dtype=input.dtype, device=input.device)


TWIN = rotary_embedding
OPERATOR = Operator(
    "rotary", Call, 1, lambda call: _in_order_of(call.input),
    Gradient, 1, lambda gradient, call: _in_order_of(gradient.grad_output),
)  # fmt: skip


class RotaryFunction(KernelFunction):
    """The autograd.Function of the rotary embedding.

    `apply(input, cos, sin, rotary_dim, interleaved, backend)` -> output. The arguments are trusted:
    gptkern.functional.rotary_embedding checks them. cos and sin get no gradient.

    Args:
        input: (batch, heads, length, head_dim), floating point.
        cos, sin: (length, width) or (batch or 1, length, width), width being rotary_dim / 2 or rotary_dim.
        rotary_dim: even, at most head_dim. interleaved: whether pairs are neighbours.
        backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, input, cos, sin, rotary_dim, interleaved, backend, unseen=None):
        output = OPERATOR.forward(Call(input, cos, sin, rotary_dim, interleaved), backend, unseen)
        # A gradient that nobody computed arrives as None, not as zeros in memory.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)
        ctx.options = rotary_dim, interleaved
        ctx.backend = backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None, None
        cos, sin = ctx.saved_tensors
        with torch.no_grad():
            dx = OPERATOR.backward(Gradient(grad_output), Call(None, cos, sin, *ctx.options), ctx.backend)
        (dx,) = once_differentiable("rotary_embedding", [dx], (grad_output,))
        return dx, None, None, None, None, None, None
