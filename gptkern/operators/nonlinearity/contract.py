"""nonlinearity, which is GELU or SiLU, plain or gated: the contract, the PyTorch backend, the registered ops and
the autograd.Function.

    y = f(x + bias)             gated: y = f(g) * u        packed: (g, u) are the halves of a row of one tensor

    gelu        f(x) = x * Phi(x)            Phi(x) = (1 + erf(x / sqrt(2))) / 2
    gelu_tanh   f(x) = x * sigmoid(2 t)      t = sqrt(2 / pi) * (x + 0.044715 x^3): x / 2 * (1 + tanh(t))
    silu        f(x) = x * sigmoid(x)

Backward:
    dx = dy * f'(x + bias)      dbias = sum over rows of dx        dg = dy * u * f'(g)      du = dy * f(g)

    gelu        f'(x) = Phi(x) + x * phi(x)                        phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    gelu_tanh   f'(x) = s + x * s * (1 - s) * 2 t'(x)              s = sigmoid(2 t)
    silu        f'(x) = s + x * s * (1 - s)                        s = sigmoid(x)

The inputs alone are kept for the backward. The functions are one operator, and which it is a field of the call: what
a kernel reads, writes and sums is the same for all of them, and that of a product with a GELU (`linear`) too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch, tracing
from gptkern.backends.layouts import is_dense
from gptkern.backends.registration import (
    KernelFunction,
    Operator,
    needs_gradient,
    on_kernels,
    once_differentiable,
)

# F.gelu's name of its approximation -> function
_OF_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
# function -> PyTorch's own
_PYTORCHS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
FUNCTIONS = tuple(_PYTORCHS)
# What `linear` applies -> F.gelu's name of its approximation
_APPROXIMATIONS = {function: name for name, function in _OF_APPROXIMATIONS.items()}
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Call(NamedTuple):
    """A checked call."""

    input: torch.Tensor  # (…, width), or packed (…, 2 width): the gate, then what it multiplies
    up: torch.Tensor | None  # (…, width): what the gate multiplies
    bias: torch.Tensor | None  # (width,); never beside a gate
    function: str  # one of FUNCTIONS
    packed: bool


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (…, width)
    need_input: bool
    need_up: bool
    bias_dtype: torch.dtype | None  # of dbias; None where that is not needed


# --- The twins ------------------------------------------------------------------------------------------------------


@dispatch.twin_of(F.gelu)
def gelu(
    input: torch.Tensor,
    *,
    approximate: str = "none",
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Gaussian error linear unit, the twin of `torch.nn.functional.gelu`.

        y = x * Phi(x),  Phi(x) = (1 + erf(x / sqrt(2))) / 2               x = input, or input + bias
        y = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))          approximate="tanh"

    Args:
        input: any shape, floating point; kernels read rows of any stride in place.
        approximate: "none" or "tanh".
        bias: (width,) of the last dimension, or None: added to the input in the same pass, and its gradient summed over
            the rows in that of the backward. Of the input's dtype, or float32 beside a 16-bit input.
        out: PyTorch's: where the result is written, by PyTorch.

    Returns:
        The input's shape and dtype. The arithmetic is float32 (float64 for float64 input), rounded once.

    The input is kept for the backward, and no other tensor of its size. Where x^2 is beyond float32 (|x| > 1.8e19)
    PyTorch's gradient of the tanh form is NaN, and the kernels' 0 or 1. At -inf both give NaN.

    Raises (of the same type as PyTorch):
        NotImplementedError: the input is not floating point.
        RuntimeError: approximate is neither "none" nor "tanh"; the bias's shape, dtype or device does not fit.
        TypeError: an argument that must be a tensor is none; approximate is no string.
        ValueError: out is given beside a bias.

    Backends: torch; triton for float16, bfloat16, float32 and float64, cuda for the same but float64, forward and
    backward (no second derivative). The bias's gradient is summed in float32 in a fixed order: the same on every run.

    Source: Hendrycks, Gimpel, "Gaussian Error Linear Units (GELUs)", 2016 (arXiv:1606.08415).
    """
    arguments = input, None, bias, "gelu", approximate
    if out is None and (found := dispatch.recalled("nonlinearity", arguments)) is not None:
        return _on_kernels(Call(input, None, bias, *found[1:]), found[0], True)
    choice = dispatch.settled(input)
    if out is not None:
        if bias is not None:
            raise ValueError("gelu: out is given beside a bias; it needs one of them")
        if choice is None:
            dispatch.on_pytorch("nonlinearity", "out is given, and only PyTorch's operator writes into it")
        return F.gelu(input, approximate=approximate, out=out)
    if choice is not None and bias is None:
        return F.gelu(input, approximate=approximate)
    return _applied("gelu", Call(input, None, bias, _of_gelu("gelu", approximate), False), choice, arguments)


@dispatch.twin_of(F.silu)
def silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """The sigmoid linear unit (swish), the twin of `torch.nn.functional.silu`.

        y = x * sigmoid(x)

    Args:
        input: any shape, floating point (complex on PyTorch); kernels read rows of any stride in place.
        inplace: writes the result over the input, by PyTorch's operator on every device.

    Returns:
        The input's shape and dtype; float32 arithmetic (float64 for float64 input), rounded once. At -inf it is NaN, as
        PyTorch's.

    Raises (of the same type as PyTorch):
        NotImplementedError: the input is of integers or bool.
        TypeError: the input is no tensor.

    Backends: as gelu.

    Source: Elfwing, Uchibe, Doya, "Sigmoid-weighted linear units", 2017 (arXiv:1702.03118).
    """
    arguments = input, None, None, "silu", None
    if not inplace and (found := dispatch.recalled("nonlinearity", arguments)) is not None:
        return _on_kernels(Call(input, None, None, *found[1:]), found[0], True)
    choice = dispatch.settled(input)
    if choice is None and inplace:
        choice = dispatch.on_pytorch(
            "nonlinearity", "inplace=True writes over the input, as only PyTorch's operator does"
        )
    if choice is not None:
        return F.silu(input, inplace)
    return _applied("silu", Call(input, None, None, "silu", False), choice, arguments)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """A gate of SiLU, as in the MLP of Llama: one pass forward and one backward.

        y = silu(gate) * up

    Args:
        gate: (…, width), floating point. Without `up` (…, 2 width): the gate is the first half of the last dimension,
            up the second. They are read where they lie, and the gradient is written into one tensor of both.
        up: the gate's shape, dtype and device, or None. Halves of a larger tensor are read in place too.

    Returns:
        (…, width), the gate's dtype; float32 arithmetic (float64 for float64), rounded once.

    gate and up alone are kept for the backward; on PyTorch silu(gate) is as well.

    Raises:
        NotImplementedError: the gate is of integers or bool.
        RuntimeError: up's shape, dtype or device is not the gate's; a packed gate has no last dimension, or an odd one.
        TypeError: an argument that must be a tensor is none.

    Backends: torch; triton for float16, bfloat16, float32 and float64, cuda for the same but float64, forward and
    backward (no second derivative).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv:2002.05202).
    """
    arguments = gate, up, None, "swiglu", None
    if (found := dispatch.recalled("nonlinearity", arguments)) is not None:
        return _on_kernels(Call(gate, up, None, *found[1:]), found[0], True)
    return _applied("swiglu", Call(gate, up, None, "silu", up is None), dispatch.settled(gate), arguments)


def geglu(gate: torch.Tensor, up: torch.Tensor | None = None, approximate: str = "none") -> torch.Tensor:
    """A gate of GELU, as in the MLP of T5 v1.1 and Gemma: one pass forward and one backward.

        y = gelu(gate, approximate=approximate) * up

    Args:
        gate, up: as those of swiglu; without `up` the gate is packed.
        approximate: "none" or "tanh", as gelu's.

    Returns:
        y, of the gate's shape and dtype; without `up` the last dimension is half the gate's.

    Raises: what swiglu and gelu do.

    Backends: as swiglu's, and its source.
    """
    arguments = gate, up, None, "geglu", approximate
    if (found := dispatch.recalled("nonlinearity", arguments)) is not None:
        return _on_kernels(Call(gate, up, None, *found[1:]), found[0], True)
    function = _of_gelu("geglu", approximate)
    return _applied("geglu", Call(gate, up, None, function, up is None), dispatch.settled(gate), arguments)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.linear`, with the GELU that follows it in an MLP.

        z = input @ weight^T + bias        y = act(z)

    The product is PyTorch's. On a GPU, where nothing needs a gradient, the tanh form is computed in the product's own
    epilogue (cuBLASLt, by torch.ops.aten._addmm_activation); elsewhere in a pass over z. The backward of kernels sums
    the bias's gradient in the pass that makes dz = dy * act'(z), where PyTorch reads dz again.

    Args:
        input: (…, in_features). weight: (out_features, in_features). bias: (out_features,) or None. All as F.linear's.
        activation: None, "gelu" (exact) or "gelu_tanh" (PyTorch's approximate="tanh").

    Returns:
        (…, out_features), of F.linear's dtype: under autocast the autocast dtype.

    input, weight and z are kept for the backward, as by PyTorch.

    Raises:
        ValueError: unknown activation.
        What F.linear raises.

    Backends: those of gelu; the product is PyTorch's on each.
    """
    if activation is None:
        return F.linear(input, weight, bias)
    if not (isinstance(activation, str) and activation in _APPROXIMATIONS):
        raise ValueError(f"linear: activation is {activation!r}; it needs None, 'gelu' or 'gelu_tanh'")
    approximate = _APPROXIMATIONS[activation]
    operands = (input, weight) if bias is None else (input, weight, bias)
    if not all(isinstance(operand, torch.Tensor) for operand in operands):
        return F.gelu(F.linear(input, weight, bias), approximate=approximate)
    if _has_epilogue(input, weight, bias, activation):
        dispatch.on_pytorch("nonlinearity", "cuBLASLt applies it to the product before that is written", warns=False)
        rows = input.reshape(-1, input.shape[-1])
        # y = gelu(bias + rows @ weight^T), whose GELU is the tanh form on a GPU
        y = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return y.view(*input.shape[:-1], weight.shape[0])
    if bias is None or not needs_gradient(bias):
        return gelu(F.linear(input, weight, bias), approximate=approximate)
    if dispatch.settled(input) is not None:
        return F.gelu(F.linear(input, weight, bias), approximate=approximate)
    # Kernels are asked about all that is multiplied: a tangent or a subclass may stand in any of it.
    choice, unseen = dispatch.chosen("nonlinearity", Call(input, weight, bias, activation, False))
    if choice.backend == "torch":
        return F.gelu(F.linear(input, weight, bias), approximate=approximate)
    # The product does not sum the bias's gradient: the activation does.
    z = F.linear(input, weight, bias.detach())
    function = _AfterBiasFunction
    return (function.apply_unseen if unseen else function.apply)(z, bias, activation, choice.backend, unseen)


def _has_epilogue(input, weight, bias, activation) -> bool:
    """Whether cuBLASLt computes the activation: PyTorch has the tanh form alone there, and no derivative of it."""
    if activation != "gelu_tanh" or bias is None or not input.is_cuda or needs_gradient(input, weight, bias):
        return False
    if dispatch.forced() not in (None, "torch") or tracing.is_transformed() or torch.is_autocast_enabled("cuda"):
        return False
    for operand in (input, weight, bias):
        if type(operand) not in _PLAIN or not is_dense(operand):
            return False
        if operand.dtype != input.dtype or operand.device != input.device or operand.numel() == 0:
            return False
    # What does not fit together is F.linear's to refuse.
    fits = (
        input.dim() > 0 and weight.dim() == 2 and input.shape[-1] == weight.shape[1] and bias.shape == weight.shape[:1]
    )
    return fits and input.is_floating_point()


def activation(
    input: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    function: str,
    bias: torch.Tensor | None = None,
    packed: bool = False,
) -> torch.Tensor:
    """Each of the functions above by the fields of its call; what check, bench and tune call."""
    arguments = input, up, bias, function, packed
    if (found := dispatch.recalled("nonlinearity", arguments)) is not None:
        return _on_kernels(Call(input, up, bias, *found[1:]), found[0], True)
    if function not in FUNCTIONS:
        raise ValueError(f"activation: function is {function!r}; it needs one of {', '.join(map(repr, FUNCTIONS))}")
    return _applied("activation", Call(input, up, bias, function, packed), dispatch.settled(input), arguments)


def _applied(name: str, call: Call, choice, arguments: tuple) -> torch.Tensor:
    """Checks the call of the twin `name` and runs it; choice: what dispatch.settled has said."""
    if tracing.in_jit_trace():
        with tracing.untraced():
            _check(name, call)
    else:
        _check(name, call)
    if choice is None:
        choice, unseen = dispatch.chosen("nonlinearity", call)
        if choice.backend != "torch":
            if unseen:
                dispatch.remember("nonlinearity", arguments, (choice.backend, call.function, call.packed))
            return _on_kernels(call, choice.backend, unseen)
    return _on_pytorch(call)


def _on_kernels(call: Call, backend: str, unseen: bool | None) -> torch.Tensor:
    return on_kernels(OPERATOR, ActivationFunction, call, backend, unseen, call.input, call.up, call.bias)


def _of_gelu(name: str, approximate) -> str:
    if not isinstance(approximate, str):
        raise TypeError(f"{name}: approximate is {type(approximate).__name__}; it needs a str, 'none' or 'tanh'")
    if approximate not in _OF_APPROXIMATIONS:
        raise RuntimeError(f"{name}: approximate is {approximate!r}; it needs 'none' or 'tanh'")
    return _OF_APPROXIMATIONS[approximate]


def _check(name: str, call: Call) -> None:
    input, up, bias, _, packed = call
    first = "input" if up is None and not packed else "gate"
    for argument, tensor in ((first, input), ("up", up), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or argument == first):
            raise TypeError(f"{name}: {argument} is {type(tensor).__name__}; it needs a tensor")
    # Complex numbers are PyTorch's, where it has them.
    if not (input.is_floating_point() or input.is_complex()):
        raise NotImplementedError(f"{name}: {first} is {input.dtype}; it needs a floating-point dtype")
    if not is_dense(input):
        return
    shape = input.shape
    if packed and (len(shape) == 0 or shape[-1] % 2):
        raise RuntimeError(
            f"{name}: gate has shape {tuple(shape)}; without up its last dimension needs to be of both, and even"
        )
    if up is not None:
        if up.shape != shape:
            raise RuntimeError(f"{name}: up has shape {tuple(up.shape)}; it needs the gate's, {tuple(shape)}")
        if up.dtype != input.dtype:
            raise RuntimeError(f"{name}: up is {up.dtype}; it needs the gate's dtype, {input.dtype}")
        if up.device != input.device:
            raise RuntimeError(f"{name}: up is on {up.device}; it needs the gate's device, {input.device}")
    if bias is not None:
        if up is not None or packed:
            raise RuntimeError(f"{name}: bias is given beside a gate; it needs an input without one")
        if len(shape) == 0 or bias.shape != shape[-1:]:
            raise RuntimeError(
                f"{name}: bias has shape {tuple(bias.shape)}; it needs that of the input's last dimension, "
                f"{tuple(shape[-1:])}"
            )
        if bias.dtype != input.dtype and not (bias.dtype == torch.float32 and input.dtype in _SIXTEEN_BITS):
            raise RuntimeError(
                f"{name}: bias is {bias.dtype}; it needs the input's dtype, {input.dtype}, or float32 beside a 16-bit "
                "input"
            )
        if bias.device != input.device:
            raise RuntimeError(f"{name}: bias is on {bias.device}; it needs the input's device, {input.device}")


def _on_pytorch(call: Call) -> torch.Tensor:
    """The operator in PyTorch's own, differentiable as often as they are."""
    x, up, bias, function, packed = call
    if packed:
        x, up = x.chunk(2, -1)
    dtype = x.dtype
    if dtype in _SIXTEEN_BITS and (up is not None or bias is not None):
        # One rounding; and dy * up, which may be beyond float16 where dy * up * f' is not, is none of float16.
        x, up, bias = (None if tensor is None else tensor.float() for tensor in (x, up, bias))
    if bias is not None:
        x = x + bias
    y = _PYTORCHS[function](x)
    return (y if up is None else y * up).to(dtype)


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------

_SQRT_HALF, _INV_SQRT_2PI = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
_TWO_SQRT_2_PI, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
# Beyond it sigmoid(2 t) is 0 or 1 and its slope 0, in float64 too; x^2 would be infinite on its way there.
_SATURATED = 32.0


def unsupported(call: Call) -> str | None:
    if call.input.is_complex():
        return f"input is {call.input.dtype}; the launchers are of real numbers"
    return None


def forward(call: Call):
    """-> output (…, width)."""
    input, up, bias, function, packed = call
    gate, up = input.chunk(2, -1) if packed else (input, up)
    dtype = _compute_dtype(input)
    x = gate.to(dtype) if bias is None else gate.to(dtype) + bias.to(dtype)
    y = _value_and_slope(x, function)[0]
    return (y if up is None else y * up.to(dtype)).to(input.dtype).contiguous()


def backward(gradient: Gradient, call: Call):
    """-> dinput as input, dup (…, width), dbias (width,) in `bias_dtype`; what is not needed is empty."""
    grad_output, need_input, need_up, bias_dtype = gradient
    input, up, bias, function, packed = call
    gate, up = input.chunk(2, -1) if packed else (input, up)
    dtype = _compute_dtype(input)
    x = gate.to(dtype) if bias is None else gate.to(dtype) + bias.to(dtype)
    dy = grad_output.to(dtype)
    value, slope = _value_and_slope(x, function)
    # three tensors: a registered op may not return one twice
    dinput, dup, dbias = input.new_empty(0), input.new_empty(0), input.new_empty(0, dtype=bias_dtype)
    if need_input or bias_dtype is not None:
        # dx = dy * f'(x)          dg = dy * u * f'(g)
        dx = dy * slope if up is None else dy * up.to(dtype) * slope
        if bias_dtype is not None:
            dbias = dx.reshape(-1, dx.shape[-1]).sum(0).to(bias_dtype)
        if need_input and not packed:
            dinput = dx.to(input.dtype).contiguous()
    # du = dy * f(g)
    if packed and need_input:
        dinput = torch.cat((dx, dy * value), -1).to(input.dtype)
    elif need_up:
        dup = (dy * value).to(input.dtype).contiguous()
    return dinput, dup, dbias


def _value_and_slope(x, function):
    """f(x), f'(x)"""
    if function == "gelu":
        # f(x) = x * Phi(x)            f'(x) = Phi(x) + x * phi(x)
        Phi = 0.5 * (1.0 + torch.erf(x * _SQRT_HALF))
        return x * Phi, Phi + x * _INV_SQRT_2PI * torch.exp(-0.5 * x * x)
    if function == "silu":
        # f(x) = x * s                 f'(x) = s + x * s * (1 - s)
        s = torch.sigmoid(x)
        return x * s, s + x * s * torch.sigmoid(-x)
    # f(x) = x * s                     f'(x) = s + x * s * (1 - s) * 2 t'(x)
    inside = x.clamp(-_SATURATED, _SATURATED)
    t2 = _TWO_SQRT_2_PI * (inside + _CUBIC * inside**3)
    s = torch.sigmoid(t2)
    slope = s + inside * s * torch.sigmoid(-t2) * _TWO_SQRT_2_PI * (1.0 + 3.0 * _CUBIC * inside * inside)
    return x * s, slope


# --- Registration and autograd --------------------------------------------------------------------------------------


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def output_shape(call: Call) -> tuple:
    """(…, width)"""
    shape = call.input.shape
    return (*shape[:-1], shape[-1] // 2) if call.packed else tuple(shape)


def _forward_fake(call: Call):
    return torch.empty(output_shape(call), dtype=call.input.dtype, device=call.input.device)


def _backward_fake(gradient: Gradient, call: Call):
    input, shape, bias_dtype = call.input, gradient.grad_output.shape, gradient.bias_dtype
    dinput = torch.empty(input.shape if gradient.need_input else 0, dtype=input.dtype, device=input.device)
    dup = input.new_empty(shape if gradient.need_up else 0)
    return dinput, dup, input.new_empty(0 if bias_dtype is None else shape[-1], dtype=bias_dtype)


TWIN = activation
OPERATOR = Operator("nonlinearity", Call, 1, _forward_fake, Gradient, 3, _backward_fake)


class ActivationFunction(KernelFunction):
    """The autograd.Function of gelu, silu, swiglu and geglu.

    `apply(input, up, bias, function, packed, backend)` -> output (…, width). The arguments are trusted: the functions
    of gptkern.functional check them.

    Args:
        input: (…, width), or packed (…, 2 width): the gate, then what it multiplies.
        up: (…, width), or None. bias: (width,), or None; not beside a gate.
        function: "gelu", "gelu_tanh" or "silu". packed: whether the input has both halves; then up is None.
        backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, input, up, bias, function, packed, backend, unseen=None):
        output = OPERATOR.forward(Call(input, up, bias, function, packed), backend, unseen)
        # A gradient that nobody computed arrives as None, not as zeros in memory.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, up, bias)
        ctx.options = function, packed, backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        need_input, need_up, need_bias = ctx.needs_input_grad[:3]
        if grad_output is None:
            return None, None, None, None, None, None, None
        input, up, bias = ctx.saved_tensors
        gradients = _backward_of(ctx, grad_output, input, up, bias, need_input, need_up, bias if need_bias else None)
        return *gradients, None, None, None, None


class _AfterBiasFunction(KernelFunction):
    """An activation of a product to which the bias was added; the bias's gradient is summed with the product's."""

    @staticmethod
    def forward(ctx, z, bias, function, backend, unseen):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, bias)
        ctx.options = function, False, backend
        return OPERATOR.forward(Call(z, None, None, function, False), backend, unseen)

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return None, None, None, None, None
        z, bias = ctx.saved_tensors
        need_input, need_bias = ctx.needs_input_grad[:2]
        dz, _, dbias = _backward_of(ctx, grad_output, z, None, None, need_input, False, bias if need_bias else None)
        return dz, dbias, None, None, None


def _backward_of(ctx, grad_output, input, up, added, need_input, need_up, bias):
    """-> dinput, dup, dbias, None where they are not needed. added: the bias that the activation adds itself."""
    function, packed, backend = ctx.options
    with torch.no_grad():
        bias_dtype = None if bias is None else bias.dtype
        call = Call(input, up, added, function, packed)
        gradients = OPERATOR.backward(Gradient(grad_output, need_input, need_up, bias_dtype), call, backend)
    needed = need_input, need_up, bias is not None
    return once_differentiable(
        "nonlinearity",
        [gradient if need else None for gradient, need in zip(gradients, needed)],
        (grad_output, input, up, added),
    )
