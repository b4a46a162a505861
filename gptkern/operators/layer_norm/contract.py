"""layer_norm: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    x_hat = (x - mean) * rstd            rstd = 1 / sqrt(var + eps)
    y     = x_hat * weight + bias

Backward, with g = dy * weight and averages over the row:
    dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
    dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy

Inside gptkern a call is (input, residual, weight, bias, eps): the row is the last dimension, `weight` and
`bias` are one-dimensional. The twin flattens PyTorch's `normalized_shape` to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import has_torch_function_variadic

from gptkern.backends import dispatch, residuals, tracing
from gptkern.backends.numbers import as_float, as_size
from gptkern.backends.registration import (
    KernelFunction,
    Operator,
    autocast,
    is_unseen,
    needs_gradient,
    once_differentiable,
)

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A checked call: rows are the last dimension, whatever `normalized_shape` was.

    In a backward `input` is what was normalised (input + residual), and residual and bias are None.
    """

    input: torch.Tensor  # (…, width)
    residual: torch.Tensor | None  # (…, width)
    weight: torch.Tensor | None  # (width,)
    bias: torch.Tensor | None  # (width,)
    eps: float


class Gradient(NamedTuple):
    """What the backward gets besides the call; grad_summed reaches the sum with the residual by itself."""

    grad_output: torch.Tensor  # (…, width)
    grad_summed: torch.Tensor | None  # (…, width)
    statistics: torch.Tensor  # (2, rows): mean, rstd; float32 (float64)
    need_input: bool
    need_weight: bool
    need_bias: bool


@dispatch.twin_of(F.layer_norm)
def layer_norm(
    input: torch.Tensor,
    normalized_shape: list[int] | tuple[int, ...] | torch.Size,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    _own_nodes: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Layer normalisation over the last dimensions, the twin of `torch.nn.functional.layer_norm`.

        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias        s = input, or input + residual

    The variance is the biased one (divided by the row's width). Statistics are kept in float32 (float64 for
    float64 input).

    Args:
        input: (*, *normalized_shape), floating point.
        normalized_shape: the trailing dimensions that are normalised together; any width.
        weight, bias: normalized_shape, or None. One dtype for both: the input's, or float32 beside a 16-bit input.
        eps: added to the variance.
        residual: the input's shape and device, floating point. Added to the input in the same pass.

    Returns:
        y, of the input's shape and dtype; with `residual`, the pair (y, input + residual), both of
        `torch.result_type(input, residual)`.

    Raises:
        RuntimeError: the input's trailing dimensions, the weight's or the bias's shape differ from
            normalized_shape; normalized_shape is empty; the parameters' dtype does not fit the input's;
            tensors are on several devices; beside a residual a tensor is sparse, or nested in the strided layout.
        NotImplementedError: the input is not floating point.
        ValueError: the residual's shape differs from the input's, or it is not floating point.
        TypeError: an argument that must be a tensor is none; normalized_shape holds no integers; eps is no number.

    Backends: torch; triton for float16, bfloat16, float32 and float64, cuda for the same but float64, forward and
    backward (no second derivative). The weight's and the bias's gradients are summed in a fixed order: the same on
    every run.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016 (arXiv:1607.06450).
    """
    arguments = input, normalized_shape, weight, bias, eps, residual
    if (found := dispatch.recalled("layer_norm", arguments)) is not None:
        return _on_kernels(Call(input, None, weight, bias, found[1]), found[0], True)[0]
    choice = dispatch.settled(input)
    if choice is None:
        normalized_shape, eps = _checked(input, normalized_shape, weight, bias, eps, residual)
        if input.is_cuda and torch.is_autocast_enabled("cuda"):
            if residual is not None:
                # Autocast widens what is normalised; the sum keeps its own dtype, as PyTorch's addition does.
                residuals.check("layer_norm", input, residual)
                summed = input + residual
                return layer_norm(summed, normalized_shape, weight, bias, eps), summed
            cast = autocast("float32", input, weight, bias)
            call = _flattened(cast[0], None, *cast[1:], normalized_shape, eps)
        else:
            call = _flattened(input, residual, weight, bias, normalized_shape, eps)
        choice, unseen = dispatch.chosen("layer_norm", call)
        if choice.backend != "torch":
            if unseen and residual is None and len(normalized_shape) == 1:
                dispatch.remember("layer_norm", arguments, (choice.backend, eps))
            output, summed = _on_kernels(call, choice.backend, unseen, _own_nodes)
            if len(normalized_shape) > 1:
                output, summed = output.view(input.shape), summed.view(input.shape) if residual is not None else summed
            return output if residual is None else (output, summed)
    if residual is None:
        return _on_pytorch(input, normalized_shape, weight, bias, eps)
    try:
        _checked(input, normalized_shape, weight, bias, eps, residual)
        residuals.check("layer_norm", input, residual)
        summed = input + residual
        if summed.dtype != input.dtype:
            # The parameters fit the input; PyTorch wants them to fit what it normalises.
            _check_parameter_dtypes(input, weight, bias)
            weight = None if weight is None else weight.to(summed.dtype)
            bias = None if bias is None else bias.to(summed.dtype)
        return _on_pytorch(summed, normalized_shape, weight, bias, eps), summed
    except RuntimeError:
        residuals.check_layouts("layer_norm", input, residual)
        raise


def _on_pytorch(input, normalized_shape, weight, bias, eps):
    if isinstance(input, torch.Tensor) and input.dtype in _SIXTEEN_BITS:
        # PyTorch sums the gradients of 16-bit layer_norm in 16 bits on the CPU, those of float32 parameters too,
        # which costs the weight's gradient two digits. On a GPU it refuses float32 parameters beside a 16-bit input.
        dtypes = {parameter.dtype for parameter in (weight, bias) if isinstance(parameter, torch.Tensor)}
        refused = input.is_cuda and dtypes == {torch.float32} and not torch.is_autocast_enabled("cuda")
        if refused or (input.is_cpu and dtypes in (set(), {input.dtype}, {torch.float32})):
            weight = weight.float() if isinstance(weight, torch.Tensor) else weight
            bias = bias.float() if isinstance(bias, torch.Tensor) else bias
            return F.layer_norm(input.float(), normalized_shape, weight, bias, eps).to(input.dtype)
    if has_torch_function_variadic(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    # What F.layer_norm calls, without its look-up of torch.backends.cudnn.enabled: a third of the host time.
    return torch.layer_norm(input, normalized_shape, weight, bias, eps)


def _checked(input, normalized_shape, weight, bias, eps, residual):
    """-> normalized_shape of ints, and eps, a float. Raises an error that names what is of a wrong type."""
    is_tensor = isinstance(input, torch.Tensor)
    for argument in (weight, bias, residual):
        is_tensor = is_tensor and (argument is None or isinstance(argument, torch.Tensor))
    if not is_tensor:
        for name, argument in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
            if not isinstance(argument, torch.Tensor) and (argument is not None or name == "input"):
                raise TypeError(f"layer_norm: {name} is a {type(argument).__name__}; it needs to be a Tensor")
    if not isinstance(normalized_shape, (tuple, list)):
        raise TypeError(
            f"layer_norm: normalized_shape is a {type(normalized_shape).__name__}; it needs to be a tuple of ints"
        )
    for size in normalized_shape:
        if type(size) is not int:
            normalized_shape = _of_ints(normalized_shape)
            break
    if type(eps) is not float:
        number = as_float(eps)
        if number is None:
            raise TypeError(f"layer_norm: eps is a {type(eps).__name__}; it needs to be a float")
        eps = number
    return normalized_shape, eps


def _of_ints(normalized_shape):
    # Where torch.jit.trace records, a size is a tensor, and stays one.
    sizes = [size if _is_traced(size) else as_size(size) for size in normalized_shape]
    for size, number in zip(normalized_shape, sizes):
        if number is None:
            raise TypeError(f"layer_norm: normalized_shape holds a {type(size).__name__}; it needs ints")
    return sizes


def _is_traced(size) -> bool:
    return isinstance(size, torch.Tensor) and tracing.in_jit_trace()


def _flattened(input, residual, weight, bias, normalized_shape, eps):
    """The checked call with the normalised dimensions flattened into one."""
    shape = tuple(normalized_shape)
    if len(shape) == 0:
        raise RuntimeError("layer_norm: normalized_shape is empty; it needs at least one dimension")
    # One dimension, as nearly always, costs half of a slice.
    fits = input.shape[-1] == shape[0] if len(shape) == 1 and input.dim() else input.shape[-len(shape) :] == shape
    if not fits:
        raise RuntimeError(
            f"layer_norm: input has shape {tuple(input.shape)}; its last dimensions need to be "
            f"normalized_shape, {shape}"
        )
    device, dtype = input.device, input.dtype
    for parameter in (weight, bias):
        if parameter is None:
            continue
        # All at once where nothing is wrong.
        if parameter.shape != shape or parameter.device != device or parameter.dtype is not dtype:
            _check_parameters(input, weight, bias, shape)
            break
    if not input.is_floating_point():
        raise NotImplementedError(f"layer_norm: input is {input.dtype}; it needs a floating-point dtype")
    if residual is not None:
        residuals.check("layer_norm", input, residual)
        residuals.check_device("layer_norm", input, residual)
    if len(shape) > 1:
        width = math.prod(shape)
        input = input.reshape(*input.shape[: -len(shape)], width)
        residual = None if residual is None else residual.reshape(input.shape)
        weight = None if weight is None else weight.reshape(width)
        bias = None if bias is None else bias.reshape(width)
    return Call(input, residual, weight, bias, eps)


def _check_parameters(input, weight, bias, shape):
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != shape:
            raise RuntimeError(
                f"layer_norm: {name} has shape {tuple(parameter.shape)}; it needs normalized_shape, {shape}"
            )
        if parameter.device != input.device:
            raise RuntimeError(
                f"layer_norm: {name} is on {parameter.device}; it needs the input's device, {input.device}"
            )
    _check_parameter_dtypes(input, weight, bias)


def _check_parameter_dtypes(input, weight, bias):
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None or parameter.dtype == input.dtype:
            continue
        if parameter.dtype != torch.float32 or input.dtype not in _SIXTEEN_BITS:
            raise RuntimeError(
                f"layer_norm: {name} is {parameter.dtype}; it needs the input's dtype, {input.dtype}, "
                "or float32 beside a 16-bit input"
            )
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(f"layer_norm: bias is {bias.dtype}; it needs the weight's dtype, {weight.dtype}")


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> None:
    return None


def forward(call: Call):
    """-> output (…, width), summed (…, width) or None, statistics (2, rows): mean, rstd in float32 (float64)."""
    input, residual, weight, bias, eps = call
    summed = input if residual is None else input + residual
    x = summed.to(_statistics_dtype(summed)).reshape(-1, summed.shape[-1])
    mean = x.mean(1)
    # var = avg((x - mean)²), not E[x²] - mean², which cancels at |mean| >> std
    rstd = torch.rsqrt((x - mean[:, None]).square().mean(1) + eps)
    y = (x - mean[:, None]) * rstd[:, None]
    if weight is not None:
        y = y * weight.to(x.dtype)
    if bias is not None:
        y = y + bias.to(x.dtype)
    output = y.to(summed.dtype).view(summed.shape)
    return output, (None if residual is None else summed), torch.stack((mean, rstd))


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,), dbias (width,); what is not needed is empty.

    dsummed includes grad_summed, the gradient that reaches the sum by itself. dweight and dbias are summed in the
    statistics' dtype and rounded to `_parameters_dtype`.
    """
    grad_output, grad_summed, statistics, need_input, need_weight, need_bias = gradient
    summed, weight = call.input, call.weight
    mean, rstd = statistics.unbind()
    width = summed.shape[-1]
    x = summed.to(mean.dtype).reshape(-1, width)
    dy = grad_output.to(mean.dtype).reshape(-1, width)
    x_hat = (x - mean[:, None]) * rstd[:, None]
    # three tensors: a registered op may not return one twice
    dsummed, dweight, dbias = (mean.new_empty(0) for _ in range(3))
    if need_input:
        g = dy if weight is None else dy * weight.to(mean.dtype)
        # dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
        dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - x_hat * (g * x_hat).mean(1, keepdim=True))
        dsummed = dx.view(summed.shape)
        if grad_summed is not None:
            dsummed = dsummed + grad_summed
        dsummed = dsummed.to(summed.dtype)
    if need_weight:
        dweight = (dy * x_hat).sum(0)
    if need_bias:
        dbias = dy.sum(0)
    dtype = _parameters_dtype(gradient, call)
    return dsummed, dweight.to(dtype), dbias.to(dtype)


# --- Registration and autograd --------------------------------------------------------------------------------------


def _statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _parameters_dtype(gradient: Gradient, call: Call) -> torch.dtype:
    """Of dweight and dbias: the weight's, which is the bias's too; the statistics' where there is no weight."""
    return gradient.statistics.dtype if call.weight is None else call.weight.dtype


def _forward_fake(call: Call):
    input, residual = call.input, call.residual
    dtype = input.dtype if residual is None else torch.result_type(input, residual)
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    summed = None if residual is None else torch.empty_like(output)
    rows = math.prod(input.shape[:-1])
    return output, summed, output.new_empty((2, rows), dtype=_statistics_dtype(output))


def _backward_fake(gradient: Gradient, call: Call):
    statistics, summed = gradient.statistics, call.input
    width = summed.shape[-1]
    dsummed = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    dsummed = dsummed if gradient.need_input else statistics.new_empty(0)
    dtype = _parameters_dtype(gradient, call)
    dweight = statistics.new_empty(width if gradient.need_weight else 0, dtype=dtype)
    return dsummed, dweight, statistics.new_empty(width if gradient.need_bias else 0, dtype=dtype)


TWIN = layer_norm
OPERATOR = Operator("layer_norm", Call, 3, _forward_fake, Gradient, 3, _backward_fake)


class LayerNormFunction(KernelFunction):
    """The autograd.Function of layer_norm over the last dimension.

    `apply(input, residual, weight, bias, eps, backend)` -> (output, summed); `summed` is input + residual, or
    empty where residual is None. The arguments are trusted: gptkern.functional.layer_norm checks them.

    Args:
        input: (…, width). residual: (…, width) or None. weight, bias: (width,) or None.
        backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, input, residual, weight, bias, eps, backend, unseen=None):
        output, summed = _forward_of(ctx, Call(input, residual, weight, bias, eps), backend, unseen)
        if residual is None:
            summed = output.new_empty(0)
            ctx.mark_non_differentiable(summed)
        return output, summed

    @staticmethod
    def backward(ctx, grad_output, grad_summed):
        return *_backward_of(ctx, grad_output, grad_summed, ctx.needs_input_grad[:4]), None, None, None


class _LayerNormAloneFunction(KernelFunction):
    """The same without a residual: a result that nobody asks for takes a tenth of the host's time."""

    @staticmethod
    def forward(ctx, input, weight, bias, eps, backend, call):
        # Where nobody looks on, the call that was made before is handed on.
        unseen = call is not None
        output, _ = _forward_of(ctx, call if unseen else Call(input, None, weight, bias, eps), backend, unseen)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        needs = need_input, False, need_weight, need_bias
        dinput, _, dweight, dbias = _backward_of(ctx, grad_output, None, needs)
        return dinput, dweight, dbias, None, None, None


class _LayerNormOfSumFunction(KernelFunction):
    """The norm of a sum whose kernel has run: `apply(summed, weight, bias, backend, [output, statistics])`."""

    @staticmethod
    def forward(ctx, summed, weight, bias, backend, computed):
        output, statistics = computed
        ctx.set_materialize_grads(False)
        weight = weight if weight is None else weight.contiguous()
        ctx.save_for_backward(summed, weight, statistics)
        ctx.backend = backend
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (summed, None, weight, bias)]
        return output

    @staticmethod
    def backward(ctx, grad_output):
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        needs = need_input, False, need_weight, need_bias
        dsummed, _, dweight, dbias = _backward_of(ctx, grad_output, None, needs)
        return dsummed, dweight, dbias, None, None


def _on_kernels(call: Call, backend: str, unseen: bool | None, own_nodes: bool = False):
    """-> output, and input + residual or None.

    Args:
        own_nodes: sum and norm are two nodes of autograd, as in PyTorch: one more addition in the backward.
    """
    input, residual, weight, bias, eps = call
    if unseen is None:
        unseen = is_unseen(call)
    if not needs_gradient(input, residual, weight, bias):
        return OPERATOR.forward(_with_dense_parameters(call), backend, unseen)[:2]
    if residual is None:
        apply = _LayerNormAloneFunction.apply_unseen if unseen else _LayerNormAloneFunction.apply
        return apply(input, weight, bias, eps, backend, call if unseen else None), None
    if own_nodes and not torch.compiler.is_compiling():
        with torch.no_grad():
            output, summed, statistics = OPERATOR.forward(_with_dense_parameters(call), backend, unseen)
        of_sum, of_norm = residuals.SumFunction, _LayerNormOfSumFunction
        summed = (of_sum.apply_unseen if unseen else of_sum.apply)(input, residual, [summed])
        apply = of_norm.apply_unseen if unseen else of_norm.apply
        return apply(summed, weight, bias, backend, [output, statistics]), summed
    apply = LayerNormFunction.apply_unseen if unseen else LayerNormFunction.apply
    return apply(*call, backend, unseen)


def _with_dense_parameters(call: Call) -> Call:
    """Kernels walk the parameters in steps of one element."""
    input, residual, weight, bias, eps = call
    if (weight is None or weight.is_contiguous()) and (bias is None or bias.is_contiguous()):
        return call
    weight = None if weight is None else weight.contiguous()
    return Call(input, residual, weight, None if bias is None else bias.contiguous(), eps)


def _forward_of(ctx, call: Call, backend: str, unseen: bool | None):
    """-> output, and input + residual or what stands for none."""
    input, residual, weight, bias, _ = call = _with_dense_parameters(call)
    output, summed, statistics = OPERATOR.forward(call, backend, unseen)
    # Gradients that nobody computed arrive as None, not as zeros in memory.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input if residual is None else summed, weight, statistics)
    ctx.backend = backend
    # Of most calls they are those of what is saved: bias has the weight's.
    ctx.dtypes = None
    if residual is not None or weight is None:
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (input, residual, weight, bias)]
    return output, summed


def _backward_of(ctx, grad_output, grad_summed, needed):
    """-> the gradients of input, residual, weight and bias, None where they are not `needed`."""
    # As the forward made them: saved_tensors_hooks may hand back other strides.
    summed, weight, statistics = ctx.saved_tensors
    weight, statistics = None if weight is None else weight.contiguous(), statistics.contiguous()
    need_input, need_residual, need_weight, need_bias = needed
    dtypes = ctx.dtypes or (summed.dtype, None, weight.dtype, weight.dtype)
    has_residual = dtypes[1] is not None
    grad_summed = grad_summed if has_residual else None
    if grad_output is None:
        if grad_summed is None:
            return None, None, None, None
        dsummed, dweight, dbias = grad_summed, None, None
    else:
        with torch.no_grad():
            needs = need_input or need_residual, need_weight, need_bias
            gradient = Gradient(grad_output, grad_summed, statistics, *needs)
            # eps is in the statistics.
            call = Call(summed, None, weight, None, 0.0)
            dsummed, dweight, dbias = OPERATOR.backward(gradient, call, ctx.backend)
    gradients = [
        tensor.to(dtype) if needed and tensor is not None else None
        for tensor, dtype, needed in zip((dsummed, dsummed, dweight, dbias), dtypes, needed)
    ]
    return once_differentiable("layer_norm", gradients, (grad_output, grad_summed, summed, weight))
