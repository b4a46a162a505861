"""softmax: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    z_j = scale * x_j  (+ mask_j)        -inf where a bool mask or the causal limit hides j
    y_j = exp(z_j - m) / sum_k exp(z_k - m)        m = max(z)

Backward, with dy the gradient of y:
    dx_j = scale * y_j * (dy_j - sum_k dy_k * y_k)

Only y is kept for the backward: it is 0 wherever something was hidden, so neither mask nor limit is needed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch, tracing
from gptkern.backends.numbers import as_float, as_int
from gptkern.backends.registration import KernelFunction, Operator, on_kernels, once_differentiable


class Call(NamedTuple):
    """A checked call. In a backward input, dtype and mask are None: only the output is kept."""

    input: torch.Tensor  # (…)
    dim: int
    dtype: torch.dtype | None  # the output's; None: the input's
    scale: float
    mask: torch.Tensor | None  # broadcasts to the input
    is_causal: bool


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (…)
    output: torch.Tensor  # (…)
    input_dtype: torch.dtype


@dispatch.twin_of(F.softmax)
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
            be the last. What lies right of the limit is written as 0, whatever it holds.

    Returns:
        The input's shape; dtype `dtype`, or the input's. With a mask or is_causal, a row of which nothing takes
        part (all False, all -inf) is 0 and has gradient 0; without, PyTorch's NaN for a row of -inf.

    Raises (of the same type as PyTorch):
        IndexError: dim is out of range.
        RuntimeError: the input is no floating-point tensor and dtype is None; the mask does not broadcast, or is
            on another device.
        ValueError: is_causal with fewer than two dimensions, or with a dim that is not the last.
        TypeError: an argument that must be a tensor is none (PyTorch: AttributeError for the input); dim is no int;
            dtype is no dtype; a mask that is neither bool nor floating point.

    Backends: torch; triton for float16, bfloat16, float32 and float64, cuda for the same but float64, any dim, any
    width, forward and backward (no second derivative; a mask that requires grad runs on PyTorch).

    Source: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018 (arXiv:1805.02867).
    """
    arguments = input, dim, dtype, scale, mask, is_causal
    if (found := dispatch.recalled("softmax", arguments)) is not None:
        backend, *options = found
        return on_kernels(OPERATOR, SoftmaxFunction, Call(input, *options), backend, True, input)
    if not isinstance(input, torch.Tensor) and not torch.overrides.has_torch_function((input,)):
        raise TypeError(f"softmax: input is {type(input).__name__}; it needs a tensor")
    choice = dispatch.settled(input)
    if choice is not None and mask is None and not is_causal and scale == 1.0:
        # One frame more than PyTorch counts: this one.
        return F.softmax(input, dim, _stacklevel + 1, dtype)
    if dim is None:
        dim = F._get_softmax_dim("softmax", input.dim(), _stacklevel)
    dtype = _autocast_dtype(input, dtype)
    if type(dim) is not int:
        dim = _as_int(dim)
    if type(scale) is not float:
        scale = _as_scale(scale)
    _check(input, dim, dtype, mask, is_causal)
    if choice is None:
        # Integers are converted here; kernels convert the others as they load.
        call = Call(input if input.is_floating_point() else input.to(dtype), dim, dtype, float(scale), mask, is_causal)
        choice, unseen = dispatch.chosen("softmax", call)
        if choice.backend != "torch":
            # Of no `dim` PyTorch warns at each call.
            if unseen and mask is None and arguments[1] is not None and call.input is input:
                dispatch.remember("softmax", arguments, (choice.backend, *call[1:]))
            return on_kernels(OPERATOR, SoftmaxFunction, call, choice.backend, unseen, call.input)
    return _on_pytorch(input, dim, dtype, scale, mask, is_causal)


@dispatch.twin_of(torch.softmax, torch.Tensor.softmax)
def _tensor_softmax(input, dim, dtype=None, *, out=None):
    """The twin of `torch.softmax` and `Tensor.softmax`, whose third argument is the dtype."""
    if out is not None or (not isinstance(dim, int) and as_int(dim) is None):
        return torch.softmax(input, dim, dtype=dtype, **({} if out is None else {"out": out}))
    return softmax(input, dim, dtype=dtype)


def _as_int(dim):
    number = as_int(dim)
    if number is None:
        raise TypeError(f"softmax: dim is {type(dim).__name__}; it needs an int")
    return number


def _as_scale(scale):
    if isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        return scale
    if isinstance(scale, torch.Tensor):
        # What is computed from a size is a tensor there.
        number = scale if scale.dim() == 0 and tracing.in_jit_trace() else None
    else:
        number = as_float(scale)
    if number is None:
        raise TypeError(f"softmax: scale is {type(scale).__name__}; it needs a number")
    return number


def _autocast_dtype(input, dtype):
    """CUDA's autocast gives softmax a float32 result, and leaves a dtype that was asked for as it is."""
    if dtype is None and input.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.float32 if input.is_floating_point() and input.dtype != torch.float64 else None
    return dtype


def _check(input, dim, dtype, mask, is_causal):
    most = max(input.dim(), 1) - 1
    least = -most - 1
    if not least <= dim <= most:
        raise IndexError(f"softmax: dim is {dim}; it needs to be from {least} to {most}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"softmax: dtype is {type(dtype).__name__}; it needs a torch.dtype")
    if not (dtype or input.dtype).is_floating_point:
        name, of = ("input", input.dtype) if dtype is None else ("dtype", dtype)
        raise RuntimeError(f"softmax: {name} is {of}; it needs a floating-point dtype")
    if is_causal and (input.dim() < 2 or dim % input.dim() != input.dim() - 1):
        raise ValueError(
            f"softmax: is_causal needs at least two dimensions and dim to be the last; input has {input.dim()} and "
            f"dim is {dim}"
        )
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"softmax: mask is {type(mask).__name__}; it needs a tensor")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"softmax: mask is {mask.dtype}; it needs bool (True takes part) or floating point (added)")
    if mask.device != input.device:
        raise RuntimeError(f"softmax: mask is on {mask.device}; it needs the input's device, {input.device}")
    mask_shape, shape = mask.shape, input.shape
    if tracing.in_jit_trace():
        mask_shape, shape = tracing.sizes(mask), tracing.sizes(input)
    if len(mask_shape) > len(shape) or any(
        size not in (1, wanted) for size, wanted in zip(reversed(mask_shape), reversed(shape))
    ):
        raise RuntimeError(
            f"softmax: mask has shape {tuple(mask_shape)}; it needs one that broadcasts to the input's, {tuple(shape)}"
        )


def _on_pytorch(input, dim, dtype, scale, mask, is_causal):
    """The twin on PyTorch's operators, differentiable as often as they are."""
    if mask is None and not is_causal and scale == 1.0:
        return F.softmax(input, dim, dtype=dtype)
    dtype = dtype or input.dtype
    z = input.to(dtype).to(_compute_dtype(dtype))
    # z is written in place once it is no longer the caller's tensor: one pass over memory an extension.
    if mask is not None and mask.dtype != torch.bool:
        # z = mask + scale * x, in one pass where scale is a number
        mask = mask.to(z.dtype)
        z = z * scale + mask if isinstance(scale, torch.Tensor) else torch.add(mask, z, alpha=scale)
    elif isinstance(scale, torch.Tensor) or scale != 1.0:
        z = z * scale
    hidden = None if mask is None or mask.dtype != torch.bool else ~mask
    if is_causal:
        above = _above_diagonal(input)
        hidden = above if hidden is None else hidden | above
    if hidden is not None:
        # torch.vmap refuses to write what is of one of its calls into what all of them share.
        if z is input or tracing.in_torch_func():
            z = z.masked_fill(hidden, -torch.inf)
        else:
            z.masked_fill_(hidden, -torch.inf)
    if mask is None and not is_causal:
        return F.softmax(z, dim).to(dtype)
    # A row of -inf is NaN in PyTorch, and so would be its gradient: such rows become 0 before the softmax and after.
    empty = _empty_rows(z.detach(), dim)
    if empty is None:
        return F.softmax(z, dim).to(dtype)
    return F.softmax(z.masked_fill(empty, 0.0), dim).masked_fill(empty, 0.0).to(dtype)


def _above_diagonal(input):
    """(rows, columns): True where column j > row i."""
    return torch.ones(input.shape[-2:], dtype=torch.bool, device=input.device).triu_(1)


def _empty_rows(z, dim):
    """True for the rows of which nothing takes part, or None where there is none (asked on the CPU alone)."""
    if tracing.in_jit_trace():
        # In a graph that is for any size: amax refuses rows without elements.
        return (z == -torch.inf).all(dim, keepdim=True)
    if z.numel() == 0:
        return None
    empty = z.amax(dim, keepdim=True) == -torch.inf
    if z.is_cpu and tracing.has_values(z) and not empty.any():
        return None
    return empty


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    if call.mask is not None and call.mask.requires_grad and torch.is_grad_enabled():
        return "the mask requires a gradient, which the backward does not compute"
    return None


def forward(call: Call):
    """(…) -> output (…) of `dtype` or the input's."""
    input, dim, dtype, scale, mask, is_causal = call
    dtype = dtype or input.dtype
    # z = scale * x (+ mask), -inf where hidden
    z = input.to(dtype).to(_compute_dtype(dtype)) * scale
    if mask is not None:
        z = torch.where(mask, z, -torch.inf) if mask.dtype == torch.bool else z + mask.to(z.dtype)
    if is_causal:
        z = z.masked_fill(_above_diagonal(input), -torch.inf)
    if z.numel() == 0:
        return z.to(dtype)
    # y = exp(z - m) / sum(exp(z - m))
    m = z.amax(dim, keepdim=True)
    if mask is None and not is_causal:
        p = torch.exp(z - m)
        return (p / p.sum(dim, keepdim=True)).to(dtype)
    # A row of which nothing takes part is 0: its maximum, -inf, is not subtracted and its sum, 0, not divided by.
    p = torch.exp(z - m.masked_fill(m == -torch.inf, 0.0))
    total = p.sum(dim, keepdim=True)
    return (p / total.masked_fill(total == 0.0, 1.0)).to(dtype)


def backward(gradient: Gradient, call: Call):
    """-> dx (…) of `dtype`."""
    grad_output, output, dtype = gradient
    dim, scale, is_causal = call.dim, call.scale, call.is_causal
    y = output.to(_compute_dtype(output.dtype))
    dy = grad_output.to(y.dtype)
    if is_causal:
        # y is 0 there, and 0 * dy is NaN where dy is not finite.
        dy = dy.masked_fill(_above_diagonal(output), 0.0)
    if output.dtype in (torch.float16, torch.bfloat16):
        # Rounding moves the sum of y away from 1, and with it the mean of dy, which nearly cancels dy where y is 1.
        total = y.sum(dim, keepdim=True)
        y = y / total.masked_fill(total == 0.0, 1.0)
    # dx = scale * y * (dy - sum(dy * y))
    return (scale * y * (dy - (dy * y).sum(dim, keepdim=True))).to(dtype)


# --- Registration and autograd --------------------------------------------------------------------------------------


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_fake(call: Call):
    return torch.empty(call.input.shape, dtype=call.dtype or call.input.dtype, device=call.input.device)


def _backward_fake(gradient: Gradient, call: Call):
    return torch.empty(gradient.output.shape, dtype=gradient.input_dtype, device=gradient.output.device)


TWIN = softmax
OPERATOR = Operator("softmax", Call, 1, _forward_fake, Gradient, 1, _backward_fake)


class SoftmaxFunction(KernelFunction):
    """The autograd.Function of softmax.

    `apply(input, dim, dtype, scale, mask, is_causal, backend)` -> output. The arguments are trusted:
    gptkern.functional.softmax checks them. The mask gets no gradient.

    Args:
        input: any shape, floating point. dtype: the output's, or None for the input's.
        mask: bool or floating point, broadcastable to the input, or None.
        is_causal: only with `dim` the last of at least two.
        backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, input, dim, dtype, scale, mask, is_causal, backend, unseen=None):
        output = OPERATOR.forward(Call(input, dim, dtype, scale, mask, is_causal), backend, unseen)
        # A gradient that nobody computed arrives as None, not as zeros in memory.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)
        ctx.options = dim, scale, is_causal
        ctx.dtype, ctx.backend = input.dtype, backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None, None, None, None
        (output,) = ctx.saved_tensors
        with torch.no_grad():
            dim, scale, is_causal = ctx.options
            # Of a masked element y is 0, and so is its gradient: the mask is not read again.
            call = Call(None, dim, None, scale, None, is_causal)
            dx = OPERATOR.backward(Gradient(grad_output, output, ctx.dtype), call, ctx.backend)
        (dx,) = once_differentiable("softmax", [dx], (grad_output, output))
        return dx, None, None, None, None, None, None, None
