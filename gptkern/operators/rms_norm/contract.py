"""rms_norm: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    x_hat = x * rstd            rstd = 1 / sqrt(avg(x²) + eps)
    y     = x_hat * weight

Backward, with g = dy * weight and averages over the row:
    dx = rstd * (g - x_hat * avg(g * x_hat))
    dweight = sum over rows of dy * x_hat

Inside gptkern a call is (input, weight, eps): the row is the last dimension, `weight` is one-dimensional and eps a
number. The twin flattens PyTorch's `normalized_shape` to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch
from gptkern.backends.numbers import as_float, as_size
from gptkern.backends.registration import KernelFunction, Operator, autocast, on_kernels, once_differentiable


class Call(NamedTuple):
    """A checked call: rows are the last dimension, whatever `normalized_shape` was."""

    input: torch.Tensor  # (…, width)
    weight: torch.Tensor | None  # (width,)
    eps: float


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (…, width)
    rstd: torch.Tensor  # (rows,), in the statistics' dtype
    need_input: bool
    need_weight: bool


@dispatch.twin_of(F.rms_norm, torch.rms_norm)
def rms_norm(
    input: torch.Tensor,
    normalized_shape: list[int] | tuple[int, ...] | torch.Size,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Normalisation by the root of the mean square over the last dimensions: `torch.nn.functional.rms_norm`'s twin.

        y = x / sqrt(mean(x²) + eps) * weight

    The mean square is kept in float32 (float64 for float64 input).

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: the trailing dimensions that are normalised together; any width.
        weight: normalized_shape, or None. Of any floating-point dtype; the result is not widened by it.
        eps: added to the mean square. None: the machine epsilon of the dtype that is computed in, which is float32
            for 16-bit input.

    Returns:
        y, of the input's shape and dtype.

    Raises:
        RuntimeError: the input's trailing dimensions or the weight's shape differ from normalized_shape;
            normalized_shape is empty; tensors are on several devices.
        ValueError: the input has fewer dimensions than normalized_shape.
        NotImplementedError: the input is of integers.
        TypeError: an argument that must be a tensor is none; normalized_shape holds no integers; eps is no number.

    Backends: torch, also for complex input; triton and cuda for float16, bfloat16 and float32, forward and backward
    (no second derivative). The weight's gradient is summed in a fixed order: the same on every run.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
    """
    arguments = input, normalized_shape, weight, eps
    if (found := dispatch.recalled("rms_norm", arguments)) is not None:
        return _on_kernels(Call(input, weight, found[1]), found[0], True)
    choice = dispatch.settled(input)
    if choice is None:
        normalized_shape, eps = _checked(input, normalized_shape, weight, eps)
        call = _flattened(*autocast("float32", input, weight), normalized_shape, eps)
        choice, unseen = dispatch.chosen("rms_norm", call)
        if choice.backend != "torch":
            if unseen and len(normalized_shape) == 1:
                dispatch.remember("rms_norm", arguments, (choice.backend, call.eps))
            output = _on_kernels(call, choice.backend, unseen)
            return output if len(normalized_shape) == 1 else output.view(input.shape)
    try:
        return F.rms_norm(input, normalized_shape, weight, eps)
    except TypeError:
        _checked(input, normalized_shape, weight, eps)
        raise


def _on_kernels(call: Call, backend: str, unseen: bool | None):
    if call.weight is not None and not call.weight.is_contiguous():
        call = call._replace(weight=call.weight.contiguous())
    output = on_kernels(OPERATOR, RMSNormFunction, call, backend, unseen, call.input, call.weight)
    # Without gradients the statistics come too.
    return output[0] if type(output) is tuple else output


def _checked(input, normalized_shape, weight, eps):
    """-> normalized_shape of ints, and eps, a float or None. Raises an error that names what is of a wrong type."""
    if not isinstance(input, torch.Tensor) or not (weight is None or isinstance(weight, torch.Tensor)):
        name, argument = ("weight", weight) if isinstance(input, torch.Tensor) else ("input", input)
        raise TypeError(f"rms_norm: {name} is a {type(argument).__name__}; it needs to be a Tensor")
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(
            f"rms_norm: normalized_shape is a {type(normalized_shape).__name__}; it needs to be a tuple of ints"
        )
    for size in normalized_shape:
        if type(size) is not int:
            normalized_shape = _of_ints(normalized_shape)
            break
    if eps is not None and type(eps) is not float:
        number = as_float(eps)
        if number is None:
            of_shape = f" of shape {tuple(eps.shape)}" if isinstance(eps, torch.Tensor) else ""
            no_bias = " (there is no bias)" if of_shape else ""
            raise TypeError(
                f"rms_norm: eps is a {type(eps).__name__}{of_shape}; it needs to be a float or None{no_bias}"
            )
        eps = number
    return normalized_shape, eps


def _of_ints(normalized_shape):
    sizes = [as_size(size) for size in normalized_shape]
    for size, number in zip(normalized_shape, sizes):
        if number is None:
            raise TypeError(f"rms_norm: normalized_shape holds a {type(size).__name__}; it needs ints")
    return sizes


def _flattened(input, weight, normalized_shape, eps):
    """The checked call with the normalised dimensions flattened into one, and eps a number."""
    shape = tuple(normalized_shape)
    if len(shape) == 0:
        raise RuntimeError("rms_norm: normalized_shape is empty; it needs at least one dimension")
    if weight is not None and weight.shape != shape:
        raise RuntimeError(
            f"rms_norm: weight has shape {tuple(weight.shape)}; it needs normalized_shape, {shape}"
        )  # fmt: skip
    if input.dim() < len(shape):
        raise ValueError(
            f"rms_norm: input has shape {tuple(input.shape)}; it needs the dimensions of normalized_shape, {shape}"
        )
    # One dimension, as nearly always, costs half of a slice.
    if not (input.shape[-1] == shape[0] if len(shape) == 1 else input.shape[-len(shape) :] == shape):
        raise RuntimeError(
            f"rms_norm: input has shape {tuple(input.shape)}; its last dimensions need to be normalized_shape, {shape}"
        )
    if not input.is_floating_point() and not input.is_complex():
        raise NotImplementedError(f"rms_norm: input is {input.dtype}; it needs a floating-point dtype")
    if weight is not None and weight.device != input.device:
        raise RuntimeError(f"rms_norm: weight is on {weight.device}; it needs the input's device, {input.device}")
    if len(shape) > 1:
        width = math.prod(shape)
        input = input.reshape(*input.shape[: -len(shape)], width)
        weight = None if weight is None else weight.reshape(width)
    return Call(input, weight, torch.finfo(_statistics_dtype(input)).eps if eps is None else eps)


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    if call.input.is_complex():
        return f"input is {call.input.dtype}; these launchers are for real numbers"
    return None


def forward(call: Call):
    """(…, width) -> output (…, width), rstd (rows,) in float32 (float64 for float64)."""
    input, weight, eps = call
    x = input.to(_statistics_dtype(input)).reshape(-1, input.shape[-1])
    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = torch.rsqrt(x.square().mean(1) + eps)
    y = x * rstd[:, None]
    if weight is not None:
        y = y * weight.to(x.dtype)
    return y.to(input.dtype).view(input.shape), rstd


def backward(gradient: Gradient, call: Call):
    """-> dinput (…, width), dweight (width,) in `_parameters_dtype`; what is not needed is empty."""
    grad_output, rstd, need_input, need_weight = gradient
    input, weight, _ = call
    width = input.shape[-1]
    x_hat = input.to(rstd.dtype).reshape(-1, width) * rstd[:, None]
    dy = grad_output.to(rstd.dtype).reshape(-1, width)
    # two tensors: a registered op may not return one twice
    dinput, dweight = rstd.new_empty(0), rstd.new_empty(0)
    if need_input:
        g = dy if weight is None else dy * weight.to(rstd.dtype)
        # dx = rstd * (g - x_hat * avg(g * x_hat))
        dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(1, keepdim=True))
        dinput = dx.to(input.dtype).view(input.shape)
    if need_weight:
        dweight = (dy * x_hat).sum(0)
    return dinput, dweight.to(_parameters_dtype(gradient, call))


# --- Registration and autograd --------------------------------------------------------------------------------------


def _statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32


def _parameters_dtype(gradient: Gradient, call: Call) -> torch.dtype:
    """Of dweight: the weight's; the statistics' where there is none."""
    return gradient.rstd.dtype if call.weight is None else call.weight.dtype


def _forward_fake(call: Call):
    input = call.input
    rows = math.prod(input.shape[:-1])
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    return output, torch.empty(rows, dtype=_statistics_dtype(input), device=input.device)


def _backward_fake(gradient: Gradient, call: Call):
    input, rstd, need_input, need_weight = call.input, gradient.rstd, gradient.need_input, gradient.need_weight
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device) if need_input else rstd.new_empty(0)
    return dinput, rstd.new_empty(input.shape[-1] if need_weight else 0, dtype=_parameters_dtype(gradient, call))


TWIN = rms_norm
OPERATOR = Operator("rms_norm", Call, 2, _forward_fake, Gradient, 2, _backward_fake)


class RMSNormFunction(KernelFunction):
    """The autograd.Function of rms_norm over the last dimension.

    `apply(input, weight, eps, backend)` -> output. The arguments are trusted: gptkern.functional.rms_norm checks them.

    Args:
        input: (…, width). weight: (width,) or None. eps: a number.
        backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, input, weight, eps, backend, unseen=None):
        # Kernels walk the weight in steps of one element.
        weight = None if weight is None else weight.contiguous()
        output, rstd = OPERATOR.forward(Call(input, weight, eps), backend, unseen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, rstd)
        ctx.backend = backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return None, None, None, None, None
        # As the forward made them: saved_tensors_hooks may hand back other strides.
        input, weight, rstd = ctx.saved_tensors
        weight, rstd = None if weight is None else weight.contiguous(), rstd.contiguous()
        need_input, need_weight, *_ = ctx.needs_input_grad
        with torch.no_grad():
            gradient = Gradient(grad_output, rstd, need_input, need_weight)
            # eps is in rstd.
            dinput, dweight = OPERATOR.backward(gradient, Call(input, weight, 0.0), ctx.backend)
        gradients = [dinput if need_input else None, dweight.to(weight.dtype) if need_weight else None]
        return *once_differentiable("rms_norm", gradients, (grad_output, input, weight)), None, None, None
