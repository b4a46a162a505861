"""int8_linear: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    z = (x @ weight^T) * weight_scale + bias        y = act(z)

where x is the input (w8a16), or q * input_scale of its quantisation (w8a8). Backward, with dz = dy * act'(z):
    dinput = (dz * weight_scale) @ weight,  dbias = sum over rows of dz

Inside gptkern a call is (input, weight, weight_scale, bias, activation, mode), with mode "w8a8" or "w8a16".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch, tracing
from gptkern.backends.layouts import described, is_dense
from gptkern.backends.quantization import quantized, quantized_rows
from gptkern.backends.registration import (
    KernelFunction,
    Operator,
    autocast,
    on_kernels,
    once_differentiable,
    without_autocast,
)
from gptkern.operators.int8_linear import products
from gptkern.operators.int8_linear.products import bfloat16_product, integer_product, widened_product

MODES = ("w8a8", "w8a16", "auto")
# activation -> F.gelu's name of its approximation
ACTIVATIONS = {"gelu": "none", "gelu_tanh": "tanh"}
# mode="auto" takes w8a16 up to here: one row of the tile of a matrix instruction. Reading the weight is then all
# the time there is, and quantising the input would only cost accuracy. Reasoned, not measured yet.
AUTO_W8A16_ROWS = 16


class Call(NamedTuple):
    """A checked call; mode is "w8a8" or "w8a16". In a backward input and bias are None where there is no activation."""

    input: torch.Tensor  # (…, in_features)
    weight: torch.Tensor  # (out_features, in_features) int8
    weight_scale: torch.Tensor  # (out_features,) float32
    bias: torch.Tensor | None  # (out_features,)
    activation: str | None
    mode: str


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (…, out_features)
    need_input: bool
    need_bias: bool


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
        input: (*, in_features), floating point; any number of rows, 0 included. Of a nested tensor (torch.jagged,
            torch.strided) the rows of all of its tensors, and the result is nested as it is.
        weight: (out_features, in_features), int8, any value in -128…127; any strides.
        weight_scale: (out_features,), float32.
        bias: (out_features,), floating point, or None.
        activation: None, "gelu" (exact) or "gelu_tanh" (PyTorch's approximate="tanh").
        mode: "w8a8", "w8a16", or "auto": w8a16 for at most 16 rows (where the weight's bytes are the time), else w8a8.
            A graph that is kept for any number of rows (torch.jit.trace; with sizes that vary make_fx, and torch.export
            but for strict=True) computes both for "auto", and takes the one that a call's rows ask for.

    Returns:
        (*, out_features), the input's dtype.

    The backward gives grad_input = (grad * weight_scale) @ weight, through the dequantised weight (in w8a8 the
    rounding of the activation passes gradients straight through), and grad_bias. The activation's argument is
    recomputed, not kept. No second derivative, but under torch.func: there and in forward mode
    (torch.autograd.forward_ad) PyTorch runs, and every derivative follows the same rule.

    On a CPU w8a8 runs on torch._int_mm where a trial in the process finds it exact and not slower by far, else on exact
    float32 products, with the same bits; `gptkern info` says which. In bfloat16 the sums of w8a16, in float32, may be
    rounded to bfloat16 before the scale too, where the product that does so was found right and fast. The trial takes
    0.1 s of a call and the step that it is in at most; on a machine too busy for it float32 products run, until calls
    that go on with it end it.

    Under autocast the input is cast to the autocast dtype, as for F.linear.

    Raises:
        TypeError: the weight is not int8; an argument that must be a tensor is none.
        RuntimeError: shapes do not match; weight_scale is not float32 or requires grad; the input is not floating
            point; tensors are on several devices; the input is sparse.
        ValueError: unknown activation or mode.

    Backends: torch (float64 included); triton and cuda for float16, bfloat16 and float32, forward and backward
    (w8a8: for up to 132,104 in_features, whose sums int32 holds).

    Source: Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 2.1, vector-wise quantisation.
    """
    arguments = input, weight, weight_scale, bias, activation, mode
    if (found := dispatch.recalled("int8_linear", arguments)) is not None and not weight_scale.requires_grad:
        backend, mode = found
        call = Call(input, weight, weight_scale, bias, activation, mode)
        return on_kernels(OPERATOR, Int8LinearFunction, call, backend, True, input, bias)
    if isinstance(input, torch.Tensor) and not is_dense(input):
        return _on_packed_values(input, weight, weight_scale, bias, activation, mode)
    choice = dispatch.settled(input)
    if tracing.in_jit_trace():
        with tracing.untraced():
            _check_tensors(input, weight, weight_scale, bias)
    else:
        _check_tensors(input, weight, weight_scale, bias)
    check_options("int8_linear", activation, mode)
    if mode == "auto":
        rows = math.prod(input.shape[:-1])
        if tracing.is_for_any_size(rows):
            return _for_any_rows(rows, input, weight, weight_scale, bias, activation)
        mode = "w8a16" if rows <= AUTO_W8A16_ROWS else "w8a8"
    (input,) = autocast("lower", input)
    call = Call(input, weight, weight_scale, bias, activation, mode)
    if choice is None:
        choice, unseen = dispatch.chosen("int8_linear", call)
        if choice.backend != "torch":
            if unseen:
                dispatch.remember("int8_linear", arguments, (choice.backend, mode))
            return on_kernels(OPERATOR, Int8LinearFunction, call, choice.backend, unseen, input, bias)
    if choice.backend == "torch":
        needs_grad = torch.is_grad_enabled() and _requires_grad(input, bias)
        is_transformed = tracing.is_transformed()
        if not is_transformed and not needs_grad and _is_tried_at_each_call(call):
            return OPERATOR.forward(call, choice.backend)
        if is_transformed or not needs_grad:
            # torch.jit.trace checks its graph against one that it makes under no_grad: both are the same.
            differentiable = is_transformed and (needs_grad or tracing.in_derivative() or tracing.in_jit_trace())
            with without_autocast("cpu" if input.is_cpu else input.device.type):
                return _straight_through(call) if differentiable else forward(call)
    return Int8LinearFunction.apply(*call, choice.backend)


def _on_packed_values(input, weight, weight_scale, bias, activation, mode):
    """Of a nested input: the operator on the rows of all of its tensors, nested as the input is."""
    options = dict(activation=activation, mode=mode)
    if input.layout == torch.jagged:
        ragged = input._ragged_idx  # of no public name: a compiler's sizes are all ints
        if input.lengths() is not None or ragged == input.dim() - 1:
            raise RuntimeError(
                f"int8_linear: input is {described(input)} of shape {tuple(input.shape)} with holes, or whose last "
                "dimension is ragged; it needs in_features there, and values without holes, as contiguous() gives"
            )
        values = int8_linear(input.values(), weight, weight_scale, bias, **options)
        # The same offsets make the same ragged size: the result can be added to the input.
        return torch.nested.nested_tensor_from_jagged(values, offsets=input.offsets(), jagged_dim=ragged)
    parts = input.unbind() if input.is_nested else ()
    if not parts or any(part.dim() == 0 or part.shape[-1] != parts[0].shape[-1] for part in parts):
        raise RuntimeError(
            f"int8_linear: input is {described(input)}; it needs to be dense, or nested of tensors whose last "
            "dimension is the weight's in_features"
        )
    rows = int8_linear(torch.cat([rows_of(part) for part in parts]), weight, weight_scale, bias, **options)
    shapes = [part.shape[:-1] for part in parts]
    outputs = rows.split([math.prod(shape) for shape in shapes])
    return torch.nested.as_nested_tensor([y.view(*shape, y.shape[-1]) for y, shape in zip(outputs, shapes)])


def _check_tensors(input, weight, weight_scale, bias):
    for name, tensor in (("input", input), ("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"int8_linear: {name} is {type(tensor).__name__}; it needs a tensor")
    if weight.dtype != torch.int8:
        raise TypeError(f"int8_linear: weight is {weight.dtype}; it needs torch.int8, as quantize_int8 returns")
    if weight.dim() != 2:
        raise RuntimeError(f"int8_linear: weight has shape {tuple(weight.shape)}; it needs (out_features, in_features)")
    out_features, in_features = weight.shape
    if not input.is_floating_point():
        raise RuntimeError(f"int8_linear: input is {input.dtype}; it needs a floating-point dtype")
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise RuntimeError(
            f"int8_linear: input has shape {tuple(input.shape)}; its last dimension needs to be the weight's "
            f"in_features, {in_features}"
        )
    if weight_scale.dtype != torch.float32:
        raise RuntimeError(f"int8_linear: weight_scale is {weight_scale.dtype}; it needs torch.float32")
    if weight_scale.requires_grad:
        raise RuntimeError("int8_linear: weight_scale requires grad; it needs to be constant, as it gets no gradient")
    if bias is not None and not bias.is_floating_point():
        raise RuntimeError(f"int8_linear: bias is {bias.dtype}; it needs a floating-point dtype")
    device = input.device
    for name, tensor in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
        if tensor is None:
            continue
        if name != "weight" and tensor.shape != (out_features,):
            raise RuntimeError(
                f"int8_linear: {name} has shape {tuple(tensor.shape)}; it needs the weight's out_features, "
                f"({out_features},)"
            )
        if tensor.device != device:
            raise RuntimeError(f"int8_linear: {name} is on {tensor.device}; it needs the input's device, {device}")


def check_options(where, activation, mode):
    """Raises ValueError where `activation` or `mode` is none of those that there are."""
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"{where}: activation is {activation!r}; it needs None, 'gelu' or 'gelu_tanh'")
    if mode not in MODES:
        raise ValueError(f"{where}: mode is {mode!r}; it needs 'w8a8', 'w8a16' or 'auto'")


def _requires_grad(input, bias):
    return input.requires_grad or (bias is not None and bias.requires_grad)


def _is_tried_at_each_call(call):
    """Whether the graph that is compiled holds the operator whole: which product this CPU has is not tried in a trace.

    A graph that is exported may run on another one: it holds the products that are right on any.
    """
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiles and call.input.is_cpu and (call.mode == "w8a8" or call.input.dtype == torch.bfloat16)


# --- On PyTorch under torch.func, in forward mode and in traces ------------------------------------------------------


def _straight_through(call: Call):
    """`forward` in operators that PyTorch differentiates by itself, in every direction and as often as it is asked."""
    return _computed(call, _straight_through_product)


def _straight_through_product(x, weight, mode):
    """`_product`, with the derivative of x @ weight^T."""
    x = x.to(_computing_dtype(x))
    z = widened_product(x, weight)
    if mode == "w8a16":
        return z
    # Of the quantised product the value, of the plain one the derivative: what is added is 0.
    return _product(x.detach(), weight, mode) + (z - z.detach())


def _for_any_rows(rows, input, weight, weight_scale, bias, activation):
    """mode="auto" in a graph that is kept for any number of rows: both modes, and the one that a call asks for."""
    few, many = (
        int8_linear(input, weight, weight_scale, bias, activation=activation, mode=mode) for mode in ("w8a16", "w8a8")
    )
    if not isinstance(rows, torch.Tensor):
        rows = torch.full((), rows)
    return torch.where((rows <= AUTO_W8A16_ROWS).to(input.device), few, many)


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> None:
    return None


def on_this_cpu() -> list[str]:
    """What runs here without a kernel, and why: found out by trying, in some milliseconds, where no call has yet."""
    found = products.integer_trial(math.inf), products.bfloat16_trial(math.inf)
    return [f"w8a8: {found[0]}", f"w8a16 of bfloat16: {found[1]}"]


def forward(call: Call):
    """(…, in_features) -> (…, out_features) in the input's dtype."""
    if (
        call.mode == "w8a8"
        and call.input.dtype == torch.float32
        and products.is_integer_product(call.input, call.weight)
    ):
        return _in_few_steps(call)
    return _computed(call, _product)


def _in_few_steps(call):
    """w8a8 of float32 on a CPU, the bits of `_computed`: of few rows, what stands around the product is a third of the
    time, and most of that is each step's own.
    """
    input, weight, weight_scale, bias, activation, _ = call
    # y = act((q @ weight^T) * input_scale * weight_scale + bias)
    q, input_scale = quantized_rows(rows_of(input) if input.dim() != 2 else input)
    y = products.integer_product_here(q, weight).to(torch.float32).mul_(input_scale).mul_(weight_scale)
    if bias is not None:
        y.add_(bias if bias.dtype == torch.float32 else bias.float())
    if activation is not None:
        y = F.gelu(y, approximate=ACTIVATIONS[activation])
    return y if input.dim() == 2 else y.view(*input.shape[:-1], weight.shape[0])


def backward(gradient: Gradient, call: Call):
    """-> dinput (…, in_features) in grad_output's dtype, dbias (out_features,) in float32 (float64 for float64).

    What is not needed is empty. `input` is None where there is no activation.
    """
    grad_output, need_input, need_bias = gradient
    input, weight, weight_scale, bias, activation, mode = call
    dz = rows_of(grad_output).to(_computing_dtype(grad_output))
    if activation is not None:
        # dz = dy * act'(z)
        z = _preactivation(input, weight, weight_scale, bias, mode, _unrounded_product)
        dz = torch.ops.aten.gelu_backward(dz, z, approximate=ACTIVATIONS[activation])
    dinput = grad_output.new_empty(0)
    if need_input:
        # dinput = (dz * weight_scale) @ weight
        dinput = widened_product(dz * weight_scale, weight.t()).to(grad_output.dtype)
        dinput = dinput.view(*grad_output.shape[:-1], weight.shape[1])
    return dinput, dz.sum(0) if need_bias else dz.new_empty(0)


def _computed(call, product):
    input, weight, weight_scale, bias, activation, mode = call
    y = _preactivation(input, weight, weight_scale, bias, mode, product)
    if activation is not None:
        y = F.gelu(y, approximate=ACTIVATIONS[activation])
    return y.to(input.dtype).view(*input.shape[:-1], weight.shape[0])


def _preactivation(input, weight, weight_scale, bias, mode, product):
    """z (rows, out_features) in float32 (float64 for float64 input)."""
    # z = product * weight_scale + bias
    z = product(rows_of(input), weight, mode)
    if _may_be_written(z):
        z.mul_(weight_scale)
        return z if bias is None else z.add_(bias.to(z.dtype))
    z = z * weight_scale
    return z if bias is None else z + bias.to(z.dtype)


def _may_be_written(z):
    """Whether a result is ours alone. New memory for each step would cost more than the step."""
    return tracing.has_values(z) and not tracing.is_transformed() and not z.requires_grad


def _product(x, weight, mode):
    """(rows, out_features) in float32 (float64 for float64 x), before the weight's scale."""
    dtype = _computing_dtype(x)
    if mode == "w8a16":
        # x @ weight^T
        return (
            bfloat16_product(x, weight).to(dtype) if x.dtype == torch.bfloat16 else widened_product(x.to(dtype), weight)
        )
    # (q @ weight^T) * input_scale
    q, input_scale = quantized(x, 1)
    z = integer_product(q, weight).to(dtype)
    return z.mul_(input_scale[:, None]) if _may_be_written(z) else z * input_scale[:, None]


def _unrounded_product(x, weight, mode):
    """`_product` of which w8a16's is not rounded to bfloat16: the gradient of a float32 bias is in float32."""
    return _product(x if mode == "w8a8" else x.to(_computing_dtype(x)), weight, mode)


def rows_of(tensor):
    """(…, width) -> (rows, width), width 0 included."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


# --- Registration and autograd --------------------------------------------------------------------------------------


def _computing_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _forward_fake(call: Call):
    return call.input.new_empty(*call.input.shape[:-1], call.weight.shape[0])


def _backward_fake(gradient: Gradient, call: Call):
    grad_output, need_input, need_bias = gradient
    weight = call.weight
    dinput = grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]) if need_input else 0)
    return dinput, grad_output.new_empty(weight.shape[0] if need_bias else 0, dtype=_computing_dtype(grad_output))


TWIN = int8_linear
OPERATOR = Operator("int8_linear", Call, 1, _forward_fake, Gradient, 2, _backward_fake)


class Int8LinearFunction(KernelFunction):
    """The autograd.Function of int8_linear.

    `apply(input, weight, weight_scale, bias, activation, mode, backend)` -> output. The arguments are trusted:
    gptkern.functional.int8_linear checks them. The input is kept for the backward only where there is an activation.

    Args:
        input: (…, in_features). weight: (out_features, in_features) int8. weight_scale: (out_features,) float32.
        bias: (out_features,) or None. mode: "w8a8" or "w8a16". backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, input, weight, weight_scale, bias, activation, mode, backend, unseen=None):
        output = OPERATOR.forward(Call(input, weight, weight_scale, bias, activation, mode), backend, unseen)
        kept = (None, None) if activation is None else (input, bias)
        ctx.save_for_backward(weight, weight_scale, *kept)
        ctx.options = activation, mode
        ctx.backend = backend
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    def backward(ctx, grad_output):
        weight, weight_scale, input, bias = ctx.saved_tensors
        need_input, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        with torch.no_grad():
            call = Call(input, weight, weight_scale, bias, *ctx.options)
            dinput, dbias = OPERATOR.backward(Gradient(grad_output, need_input, need_bias), call, ctx.backend)
        gradients = [dinput if need_input else None, dbias.to(ctx.bias_dtype) if need_bias else None]
        dinput, dbias = once_differentiable("int8_linear", gradients, (grad_output, input, bias), remedy="")
        return dinput, None, None, dbias, None, None, None, None
