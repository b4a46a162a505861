"""rms_norm: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    x_hat = x * rstd            rstd = 1 / sqrt(avg(x²) + eps)
    y     = x_hat * weight

Backward, with g = dy * weight and averages over the row:
    dx = rstd * (g - x_hat * avg(g * x_hat))
    dweight = sum over rows of dy * x_hat

Inside gptkern a call is (input, residual, weight, eps): the row is the last dimension, `weight` is one-dimensional and
eps a number. The twin flattens PyTorch's `normalized_shape` to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch, residuals
from gptkern.backends.numbers import as_float, as_size
from gptkern.backends.registration import (
    KernelFunction,
    Operator,
    autocast,
    is_unseen,
    needs_gradient,
    once_differentiable,
)


class Call(NamedTuple):
    """A checked call: rows are the last dimension, whatever `normalized_shape` was.

    In a backward `input` is what was normalised (input + residual), and residual is None.
    """

    input: torch.Tensor  # (…, width)
    residual: torch.Tensor | None  # (…, width)
    weight: torch.Tensor | None  # (width,)
    eps: float


class Gradient(NamedTuple):
    """What the backward gets besides the call; grad_summed reaches the sum with the residual by itself."""

    grad_output: torch.Tensor  # (…, width)
    grad_summed: torch.Tensor | None  # (…, width)
    rstd: torch.Tensor  # (rows,), in the statistics' dtype
    need_input: bool
    need_weight: bool


@dispatch.twin_of(F.rms_norm, torch.rms_norm)
def rms_norm(
    input: torch.Tensor,
    normalized_shape: list[int] | tuple[int, ...] | torch.Size,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
    *,
    residual: torch.Tensor | None = None,
    _own_nodes: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalisation by the root of the mean square over the last dimensions: `torch.nn.functional.rms_norm`'s twin.

        y = s / sqrt(mean(s²) + eps) * weight        s = input, or input + residual

    The mean square is kept in float32 (float64 for float64 input).

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: the trailing dimensions that are normalised together; any width.
        weight: normalized_shape, or None. Of any floating-point dtype; the result is not widened by it.
        eps: added to the mean square. None: the machine epsilon of the dtype that is computed in, which is float32
            for 16-bit input.
        residual: the input's shape and device, floating point. Added to the input in the same pass; y is of the sum as
            it is returned, rounded to its dtype.

    Returns:
        y, of the input's shape and dtype; with `residual`, the pair (y, input + residual), both of
        `torch.result_type(input, residual)`.

    Raises:
        RuntimeError: the input's trailing dimensions or the weight's shape differ from normalized_shape;
            normalized_shape is empty; tensors are on several devices; beside a residual a tensor is sparse, or nested
            in the strided layout.
        ValueError: the input has fewer dimensions than normalized_shape; the residual's shape differs from the input's,
            or it is not floating point.
        NotImplementedError: the input is of integers.
        TypeError: an argument that must be a tensor is none; normalized_shape holds no integers; eps is no number.

    Backends: torch, also for complex input; triton and cuda for float16, bfloat16 and float32, forward and backward
    (no second derivative). The weight's gradient is summed in a fixed order: the same on every run.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv:1910.07467).
    """
    # Calls with a residual are not remembered.
    arguments = input, normalized_shape, weight, eps
    if residual is None and (found := dispatch.recalled("rms_norm", arguments)) is not None:
        return _on_kernels(Call(input, None, weight, found[1]), found[0], True)[0]
    choice = dispatch.settled(input)
    if choice is None:
        normalized_shape, eps = _checked(input, normalized_shape, weight, eps, residual)
        if residual is not None and input.is_cuda and torch.is_autocast_enabled("cuda"):
            # Autocast widens what is normalised; the sum keeps its own dtype, as PyTorch's addition does.
            residuals.check("rms_norm", input, residual)
            summed = input + residual
            return rms_norm(summed, normalized_shape, weight, eps), summed
        wide, scale = autocast("float32", input, weight)
        call = _flattened(wide, residual, scale, normalized_shape, eps)
        choice, unseen = dispatch.chosen("rms_norm", call)
        if choice.backend != "torch":
            if unseen and residual is None and len(normalized_shape) == 1:
                dispatch.remember("rms_norm", arguments, (choice.backend, call.eps))
            output, summed = _on_kernels(call, choice.backend, unseen, _own_nodes)
            if len(normalized_shape) > 1:
                output, summed = output.view(input.shape), summed.view(input.shape) if residual is not None else summed
            return output if residual is None else (output, summed)
    if residual is None:
        try:
            return F.rms_norm(input, normalized_shape, weight, eps)
        except TypeError:
            _checked(input, normalized_shape, weight, eps, None)
            raise
    try:
        normalized_shape, eps = _checked(input, normalized_shape, weight, eps, residual)
        residuals.check("rms_norm", input, residual)
        summed = input + residual
        return F.rms_norm(summed, normalized_shape, weight, eps), summed
    except RuntimeError:
        residuals.check_layouts("rms_norm", input, residual)
        raise


def _checked(input, normalized_shape, weight, eps, residual):
    """-> normalized_shape of ints, and eps, a float or None. Raises an error that names what is of a wrong type."""
    is_tensor = isinstance(input, torch.Tensor)
    for argument in (weight, residual):
        is_tensor = is_tensor and (argument is None or isinstance(argument, torch.Tensor))
    if not is_tensor:
        for name, argument in (("input", input), ("weight", weight), ("residual", residual)):
            if not isinstance(argument, torch.Tensor) and (argument is not None or name == "input"):
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


def _flattened(input, residual, weight, normalized_shape, eps):
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
    if residual is not None:
        residuals.check("rms_norm", input, residual)
        residuals.check_device("rms_norm", input, residual)
    if len(shape) > 1:
        width = math.prod(shape)
        input = input.reshape(*input.shape[: -len(shape)], width)
        residual = None if residual is None else residual.reshape(input.shape)
        weight = None if weight is None else weight.reshape(width)
    if eps is None:
        eps = torch.finfo(_statistics_dtype(_summed_dtype(input, residual))).eps
    return Call(input, residual, weight, eps)


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    if call.input.is_complex():
        return f"input is {call.input.dtype}; these launchers are for real numbers"
    return None


def forward(call: Call):
    """-> output (…, width), summed (…, width) or None, rstd (rows,) in float32 (float64 for float64)."""
    input, residual, weight, eps = call
    summed = input if residual is None else input + residual
    x = summed.to(_statistics_dtype(summed.dtype)).reshape(-1, summed.shape[-1])
    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = torch.rsqrt(x.square().mean(1) + eps)
    y = x * rstd[:, None]
    if weight is not None:
        y = y * weight.to(x.dtype)
    return y.to(summed.dtype).view(summed.shape), (None if residual is None else summed), rstd


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,) in `_parameters_dtype`; what is not needed is empty.

    dsummed includes grad_summed, the gradient that reaches the sum by itself.
    """
    grad_output, grad_summed, rstd, need_input, need_weight = gradient
    summed, weight = call.input, call.weight
    width = summed.shape[-1]
    x_hat = summed.to(rstd.dtype).reshape(-1, width) * rstd[:, None]
    dy = grad_output.to(rstd.dtype).reshape(-1, width)
    # two tensors: a registered op may not return one twice
    dsummed, dweight = rstd.new_empty(0), rstd.new_empty(0)
    if need_input:
        g = dy if weight is None else dy * weight.to(rstd.dtype)
        # dx = rstd * (g - x_hat * avg(g * x_hat))
        dx = rstd[:, None] * (g - x_hat * (g * x_hat).mean(1, keepdim=True))
        dsummed = dx.view(summed.shape)
        if grad_summed is not None:
            dsummed = dsummed + grad_summed
        dsummed = dsummed.to(summed.dtype)
    if need_weight:
        dweight = (dy * x_hat).sum(0)
    return dsummed, dweight.to(_parameters_dtype(gradient, call))


# --- Registration and autograd --------------------------------------------------------------------------------------


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _summed_dtype(input: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    # Of one shape they widen as their dtypes do; torch.compile does not trace torch.result_type.
    return input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)


def _parameters_dtype(gradient: Gradient, call: Call) -> torch.dtype:
    """Of dweight: the weight's; the statistics' where there is none."""
    return gradient.rstd.dtype if call.weight is None else call.weight.dtype


def _forward_fake(call: Call):
    input, residual = call.input, call.residual
    dtype = _summed_dtype(input, residual)
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    summed = None if residual is None else torch.empty_like(output)
    rows = math.prod(input.shape[:-1])
    return output, summed, torch.empty(rows, dtype=_statistics_dtype(dtype), device=input.device)


def _backward_fake(gradient: Gradient, call: Call):
    summed, rstd, need_input, need_weight = call.input, gradient.rstd, gradient.need_input, gradient.need_weight
    dsummed = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device) if need_input else rstd.new_empty(0)
    return dsummed, rstd.new_empty(summed.shape[-1] if need_weight else 0, dtype=_parameters_dtype(gradient, call))


TWIN = rms_norm
OPERATOR = Operator("rms_norm", Call, 3, _forward_fake, Gradient, 2, _backward_fake)


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
        output, _ = _forward_of(ctx, Call(input, None, weight, eps), backend, unseen)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        need_input, need_weight, *_ = ctx.needs_input_grad
        dinput, _, dweight = _backward_of(ctx, grad_output, None, (need_input, False, need_weight))
        return dinput, dweight, None, None, None


class RMSNormResidualFunction(KernelFunction):
    """The autograd.Function of rms_norm of a sum.

    `apply(input, residual, weight, eps, backend)` -> (output, input + residual); arguments as RMSNormFunction's.
    """

    @staticmethod
    def forward(ctx, input, residual, weight, eps, backend, unseen=None):
        return _forward_of(ctx, Call(input, residual, weight, eps), backend, unseen)

    @staticmethod
    def backward(ctx, grad_output, grad_summed):
        return *_backward_of(ctx, grad_output, grad_summed, ctx.needs_input_grad[:3]), None, None, None


class _RMSNormOfSumFunction(KernelFunction):
    """The norm of a sum whose kernel has run: `apply(summed, weight, backend, [output, rstd])` -> output."""

    @staticmethod
    def forward(ctx, summed, weight, backend, computed):
        output, rstd = computed
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, None if weight is None else weight.contiguous(), rstd)
        ctx.backend, ctx.dtypes = backend, None
        return output

    @staticmethod
    def backward(ctx, grad_output):
        need_input, need_weight, *_ = ctx.needs_input_grad
        dsummed, _, dweight = _backward_of(ctx, grad_output, None, (need_input, False, need_weight))
        return dsummed, dweight, None, None


def _on_kernels(call: Call, backend: str, unseen: bool | None, own_nodes: bool = False):
    """-> output, and input + residual or what stands for none.

    Args:
        own_nodes: sum and norm are two nodes of autograd, as in PyTorch: one more addition in the backward.
    """
    input, residual, weight, eps = call
    if unseen is None:
        unseen = is_unseen(call)
    if not needs_gradient(input, residual, weight):
        return OPERATOR.forward(_with_dense_weight(call), backend, unseen)[:2]
    if residual is None:
        apply = RMSNormFunction.apply_unseen if unseen else RMSNormFunction.apply
        return apply(input, weight, eps, backend, unseen), None
    if own_nodes and not torch.compiler.is_compiling():
        with torch.no_grad():
            output, summed, rstd = OPERATOR.forward(_with_dense_weight(call), backend, unseen)
        of_sum, of_norm = residuals.SumFunction, _RMSNormOfSumFunction
        summed = (of_sum.apply_unseen if unseen else of_sum.apply)(input, residual, [summed])
        return (of_norm.apply_unseen if unseen else of_norm.apply)(summed, weight, backend, [output, rstd]), summed
    apply = RMSNormResidualFunction.apply_unseen if unseen else RMSNormResidualFunction.apply
    return apply(*call, backend, unseen)


def _with_dense_weight(call: Call) -> Call:
    """Kernels walk the weight in steps of one element."""
    if call.weight is None or call.weight.is_contiguous():
        return call
    return call._replace(weight=call.weight.contiguous())


def _forward_of(ctx, call: Call, backend: str, unseen: bool | None):
    """-> output, and input + residual or what stands for none."""
    input, residual, weight, _ = call = _with_dense_weight(call)
    output, summed, rstd = OPERATOR.forward(call, backend, unseen)
    # Gradients that nobody computed arrive as None, not as zeros in memory.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input if residual is None else summed, weight, rstd)
    ctx.backend = backend
    # Without a residual they are those of what is saved.
    ctx.dtypes = None if residual is None else (input.dtype, residual.dtype)
    return output, summed


def _backward_of(ctx, grad_output, grad_summed, needed):
    """-> the gradients of input, residual and weight, None where they are not `needed`."""
    need_input, need_residual, need_weight = needed
    # As the forward made them: saved_tensors_hooks may hand back other strides.
    summed, weight, rstd = ctx.saved_tensors
    weight, rstd = None if weight is None else weight.contiguous(), rstd.contiguous()
    if grad_output is None:
        if grad_summed is None:
            return None, None, None
        dsummed, dweight = grad_summed, None
    else:
        with torch.no_grad():
            gradient = Gradient(grad_output, grad_summed, rstd, need_input or need_residual, need_weight)
            # eps is in rstd.
            dsummed, dweight = OPERATOR.backward(gradient, Call(summed, None, weight, 0.0), ctx.backend)
    of_input, of_residual = ctx.dtypes or (summed.dtype, None)
    gradients = [
        dsummed.to(of_input) if need_input else None,
        dsummed.to(of_residual) if need_residual else None,
        dweight.to(weight.dtype) if need_weight and dweight is not None else None,
    ]
    return once_differentiable("rms_norm", gradients, (grad_output, grad_summed, summed, weight))
