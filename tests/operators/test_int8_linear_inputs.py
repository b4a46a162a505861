"""int8_linear: what it takes: strides, frozen inputs, autocast, errors, registered ops, compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional
from checking import Watched, assert_compiles, raised_by, same_bits
from int8_linear_calls import MODES, judge, tensors_of
from layouts import LAYOUTS, every_other_element, expanded, of_own_strides, strided_rows, transposed

import gptkern
import gptkern.nn
from gptkern import functional as F

# --- Memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_input_and_its_gradient(backend, device, layout, mode):
    flat, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    input = flat.view(3, 6, 31)
    judge(layout(input), weight, weight_scale, bias, mode=mode, activation="gelu")
    grad = layout(torch.randn(3, 6, 7, device=device))
    judge(input, weight, weight_scale, bias, mode=mode, grad_output=grad)
    judge(input, weight, weight_scale, bias, mode=mode, activation="gelu_tanh", grad_output=grad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [transposed, strided_rows, every_other_element, expanded])
def test_strides_of_the_weight(backend, device, layout, mode):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    judge(input, layout(weight), weight_scale, bias, mode=mode)
    judge(input.bfloat16(), layout(weight), weight_scale, None, mode=mode, activation="gelu")


@pytest.mark.parametrize("mode", MODES)
def test_strides_of_scale_and_bias(backend, device, mode):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    strided = [torch.full((14,), torch.nan, device=device)[::2].copy_(t) for t in (weight_scale, bias)]
    judge(input, weight, *strided, mode=mode)
    judge(input, weight, weight_scale[:1].expand(7), bias[:1].expand(7), mode=mode, activation="gelu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("rows", [5, 18])
def test_every_operand_has_strides_of_its_own(kernel_backend, device, rows, step, mode):
    # 16 bytes of the weight are what kernels copy at a time.
    tensors = tensors_of(rows, 48, 20, torch.float32, device)
    *tensors, grad_output = of_own_strides(*tensors, torch.randn(rows, 20, device=device), step=step)
    judge(*tensors, mode=mode, activation="gelu", grad_output=grad_output)


# --- Autograd, memory, repetition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_only_what_requires_grad_gets_one(backend, device, activation, need):
    for mode in MODES:
        judge(*tensors_of(18, 31, 7, torch.float32, device), mode=mode, activation=activation, need=need)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_nothing_is_computed_that_nobody_asked_for(kernel_backend, device, activation, need):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    input.requires_grad_(need[0])
    bias.requires_grad_(need[1])
    output = F.int8_linear(input, weight, weight_scale, bias, activation=activation)
    with Watched() as watched:
        output.sum().backward()
    results = [result for name, result in watched.calls if name == "int8_linear_backward"]
    assert [[tensor.numel() > 0 for tensor in result] for result in results] == [list(need)]


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_for_the_backward(kernel_backend, device, mode):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    input.requires_grad_()
    bias.requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    for activation, expected in ((None, False), ("gelu", True)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            F.int8_linear(input, weight, weight_scale, bias, mode=mode, activation=activation)
        assert (input.shape in kept) == expected
        assert (18, 7) not in kept  # the activation's argument


def test_the_weight_and_its_scale_get_no_gradient(backend, device):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    F.int8_linear(input.requires_grad_(), weight, weight_scale, bias).sum().backward()
    assert weight.grad is None
    assert weight_scale.grad is None
    with torch.no_grad():
        assert not F.int8_linear(input, weight, weight_scale, bias).requires_grad


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_second_derivative_is_refused(kernel_backend, device, activation):
    input, weight, weight_scale, bias = tensors_of(3, 31, 7, torch.float32, device)
    input.requires_grad_()
    output = F.int8_linear(input, weight, weight_scale, bias, activation=activation)
    (gradient,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="int8_linear has no second derivative"):
        gradient.sum().backward()


# --- Autocast, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_as_linear(backend, device, dtype, mode):
    if backend != "torch" and dtype == torch.float64:
        pytest.skip("there are no float64 kernels, and autocast leaves float64 alone")
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, dtype, device)
    bias = bias.bfloat16().to(dtype).requires_grad_()
    input.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        output = F.int8_linear(input, weight, weight_scale, bias, mode=mode)
        linear = torch.nn.functional.linear(input, weight.to(dtype), bias)
    assert output.dtype == linear.dtype
    cast = input.detach().to(linear.dtype)
    same_bits("output", output.detach(), F.int8_linear(cast, weight, weight_scale, bias.detach(), mode=mode))
    output.sum().backward()
    assert (input.grad.dtype, bias.grad.dtype) == (dtype, dtype)


def _call(**changes):
    """int8_linear with these arguments in place of right ones: made from (input, weight, weight_scale, bias)."""

    def call(device):
        arguments = dict(zip(("input", "weight", "weight_scale", "bias"), tensors_of(3, 5, 7, torch.float32, device)))
        arguments.update({name: make(arguments) if callable(make) else make for name, make in changes.items()})
        return F.int8_linear(**arguments)

    return call


# what is wrong -> the call, the exception, and what the message says: the argument, what it got, what it needs
BAD_CALLS = {
    "weight is float": (_call(weight=lambda a: a["weight"].float()), TypeError, ("weight", "float32", "int8")),
    "weight is uint8": (_call(weight=lambda a: a["weight"].to(torch.uint8)), TypeError, ("weight", "uint8", "int8")),
    "input is a list": (_call(input=[[1.0] * 5]), TypeError, ("input", "list", "ensor")),
    "input is None": (_call(input=None), TypeError, ("input", "None", "ensor")),
    "weight is a list": (_call(weight=[1]), TypeError, ("weight", "list", "ensor")),
    "scale is a number": (_call(weight_scale=0.5), TypeError, ("weight_scale", "float", "ensor")),
    "bias is a number": (_call(bias=1.0), TypeError, ("bias", "float", "ensor")),
    "input is too wide": (_call(input=lambda a: a["input"].new_ones(3, 6)), RuntimeError, ("input", "6", "5")),
    "input has no dimension": (_call(input=lambda a: a["input"].sum()), RuntimeError, ("input", "()", "5")),
    "weight has three dimensions": (_call(weight=lambda a: a["weight"][None]), RuntimeError, ("weight", "(1, 7, 5)")),
    "weight has one dimension": (_call(weight=lambda a: a["weight"][0]), RuntimeError, ("weight", "(5,)")),
    "scale is too short": (_call(weight_scale=lambda a: a["weight_scale"][:6]), RuntimeError, ("scale", "6", "7")),
    "scale is a column": (
        _call(weight_scale=lambda a: a["weight_scale"][:, None]), RuntimeError, ("weight_scale", "(7, 1)", "(7,)"),
    ),
    "bias is too short": (_call(bias=lambda a: a["bias"][:6]), RuntimeError, ("bias", "6", "7")),
    "bias is a row": (_call(bias=lambda a: a["bias"][None]), RuntimeError, ("bias", "(1, 7)", "(7,)")),
    "scale is float16": (
        _call(weight_scale=lambda a: a["weight_scale"].half()), RuntimeError, ("weight_scale", "float16", "float32"),
    ),
    "scale requires grad": (
        _call(weight_scale=lambda a: a["weight_scale"].requires_grad_()), RuntimeError, ("weight_scale", "grad"),
    ),
    "input is integer": (_call(input=lambda a: a["input"].long()), RuntimeError, ("input", "int64", "floating")),
    "input is complex": (
        _call(input=lambda a: a["input"].to(torch.complex64)), RuntimeError, ("input", "complex64", "floating"),
    ),
    "bias is integer": (_call(bias=lambda a: a["bias"].int()), RuntimeError, ("bias", "int32", "floating")),
    "weight is elsewhere": (_call(weight=lambda a: a["weight"].to("meta")), RuntimeError, ("weight", "meta")),
    "scale is elsewhere": (_call(weight_scale=lambda a: a["weight_scale"].to("meta")), RuntimeError, ("scale", "meta")),
    "bias is elsewhere": (_call(bias=lambda a: a["bias"].to("meta")), RuntimeError, ("bias", "meta")),
    "activation is unknown": (_call(activation="relu"), ValueError, ("activation", "relu", "gelu_tanh")),
    "mode is unknown": (_call(mode="w4a16"), ValueError, ("mode", "w4a16", "w8a16")),
    "mode is None": (_call(mode=None), ValueError, ("mode", "None", "auto")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BAD_CALLS)
def test_mistakes(backend, device, mistake):
    call, expected, words = BAD_CALLS[mistake]
    error = raised_by(call, device)
    assert type(error) is expected, repr(error)
    for word in words:
        assert word in str(error), str(error)


def test_options_are_given_by_name(backend, device):
    with pytest.raises(TypeError):
        F.int8_linear(*tensors_of(3, 5, 7, torch.float32, device), "gelu")


def test_float64_has_no_kernels(kernel_backend, device):
    input, weight, weight_scale, bias = tensors_of(3, 5, 7, torch.float64, device)
    with pytest.raises(gptkern.BackendError, match="float64"):
        F.int8_linear(input, weight, weight_scale, bias)


# --- torch.func and forward mode, on PyTorch -------------------------------------------------------------------------


def derivatives(x, weight, weight_scale, bias, mode, activation):
    """act(z), act'(z), act''(z) and dz/dx (out_features, in_features) of one row x in float64, by the straight-through
    rule: z is the quantised product's."""
    dz = weight.double() * weight_scale.double()[:, None]
    z = F.int8_linear(x[None], weight, weight_scale, bias, mode=mode)[0].double().requires_grad_()
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}.get(activation)
    y = z * 1 if activation is None else torch.nn.functional.gelu(z, approximate=approximate)
    (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    second = torch.autograd.grad(first.sum(), z)[0] if activation else torch.zeros_like(z)
    return y.detach(), first.detach(), second.detach(), dz


TRANSFORMED = [(mode, activation) for mode in MODES for activation in (None, "gelu", "gelu_tanh")]


@pytest.mark.parametrize(("mode", "activation"), TRANSFORMED)
def test_every_derivative_follows_the_straight_through_rule(device, mode, activation):
    input, weight, weight_scale, bias = tensors_of(1, 31, 7, torch.float32, device)
    x, tangent, cotangent = input[0].clone(), torch.randn(31, device=device), torch.randn(7, device=device)

    def layer(x):
        return F.int8_linear(x, weight, weight_scale, bias, mode=mode, activation=activation)

    with gptkern.backend("torch"):
        y, first, second, dz = derivatives(x, weight, weight_scale, bias, mode, activation)
        jacobian = (first[:, None] * dz).float()
        value, pull = torch.func.vjp(layer, x)
        same_bits("the value", value, layer(x))
        torch.testing.assert_close(value, y.float())
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(pull(cotangent)[0], cotangent @ jacobian, **close)
        value, pushed = torch.func.jvp(layer, (x,), (tangent,))
        same_bits("the value", value, layer(x))
        torch.testing.assert_close(pushed, jacobian @ tangent, **close)
        for of in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(of(layer)(x), jacobian, **close)
        hessian = torch.func.hessian(lambda x: layer(x) @ cotangent)(x)
        expected = dz.T @ ((cotangent * second)[:, None] * dz)
        torch.testing.assert_close(hessian, expected.float(), **close)
        # Outside of torch.func, of what requires grad and of what does not.
        for leaf in (x, x.clone().requires_grad_()):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(leaf, tangent)
                pushed = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
                torch.testing.assert_close(pushed, jacobian @ tangent, **close)


@pytest.mark.parametrize(("mode", "activation"), TRANSFORMED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_gradient_of_torch_func_is_autograds(device, mode, activation, dtype):
    # Longer than what float32 sums exactly.
    input, weight, weight_scale, bias = tensors_of(3, 1100, 7, dtype, device)
    grad_output = torch.randn(3, 7, device=device).to(dtype)
    leaves = input.clone().requires_grad_(), bias.clone().requires_grad_()
    with gptkern.backend("torch"), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):

        def layer(input, bias):
            return F.int8_linear(input, weight, weight_scale, bias, mode=mode, activation=activation)

        expected = layer(*leaves)
        value, pull = torch.func.vjp(layer, input, bias)
    same_bits("the value", value, expected.detach())
    for name, ours, autograds in zip(
        ("input", "bias"), pull(grad_output), torch.autograd.grad(expected, leaves, grad_output)
    ):
        torch.testing.assert_close(
            ours, autograds, rtol=2 * torch.finfo(dtype).eps, atol=1e-2 if dtype == torch.bfloat16 else 1e-9, msg=name
        )


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_vmap_over_inputs_weights_and_modules(device, mode):
    count = 3
    inputs = torch.randn(count, 20, 31, device=device)
    layers = [gptkern.nn.Int8Linear.from_linear(torch.nn.Linear(31, 7, device=device), mode=mode) for _ in range(count)]
    with gptkern.backend("torch"):
        expected = torch.stack([layer(input) for layer, input in zip(layers, inputs)])
        parameters, buffers = torch.func.stack_module_state(layers)

        def run(parameters, buffers, input):
            return torch.func.functional_call(layers[0], (parameters, buffers), (input,))

        torch.testing.assert_close(torch.vmap(run)(parameters, buffers, inputs), expected)
        gradients = torch.vmap(torch.func.grad(lambda *a: run(*a).square().sum()))(parameters, buffers, inputs)
        expected.square().sum().backward()
    torch.testing.assert_close(gradients["bias"], torch.stack([layer.bias.grad for layer in layers]))


@pytest.mark.parametrize("mode", MODES)
def test_the_scale_may_carry_a_tangent(device, mode):
    """It gets no gradient, and in forward mode no silent zero."""
    input, weight, weight_scale, bias = tensors_of(3, 31, 7, torch.float32, device)
    tangent = torch.rand(7, device=device)
    with gptkern.backend("torch"):
        layer = lambda scale: F.int8_linear(input, weight, scale, bias, mode=mode)  # noqa: E731
        _, pushed = torch.func.jvp(layer, (weight_scale,), (tangent,))
        torch.testing.assert_close(pushed, layer(tangent) - bias, rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="weight_scale requires grad"):
            torch.func.grad(lambda scale: layer(scale).sum())(weight_scale)


# --- The autograd.Function and the registered ops -------------------------------------------------------------------


def test_registered_ops(backend, device):
    ops = torch.ops.gptkern
    input, weight, weight_scale, bias = tensors_of(3, 31, 7, torch.bfloat16, device)
    grad = torch.randn(3, 7, device=device).bfloat16()
    cases = [("gelu", "w8a8", bias), (None, "w8a16", None), ("gelu_tanh", "w8a16", bias.float())]
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for activation, mode, other_bias in cases:
        call = (input, weight, weight_scale, other_bias, activation, mode)
        torch.library.opcheck(ops.int8_linear_forward.default, (*call, backend), **tests)
        call = (None if activation is None else input, *call[1:], backend)
        torch.library.opcheck(ops.int8_linear_backward.default, (grad, True, other_bias is not None, *call), **tests)
        tests = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(ops.int8_linear_backward.default, (grad, False, False, *call), **tests)


@pytest.mark.parametrize(("mode", "activation"), [("auto", "gelu"), ("w8a16", None), ("w8a8", "gelu_tanh")])
def test_compiles_to_one_graph(backend, device, mode, activation):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)

    def layer(input, bias):
        return F.int8_linear(input, weight, weight_scale, bias, mode=mode, activation=activation)

    assert_compiles(layer, input, bias)


def test_explained_without_running(backend, device):
    tensors = tensors_of(3, 5, 7, torch.float32, device)
    assert gptkern.explain(F.int8_linear, *tensors).backend == backend


# --- Nested and sparse input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("mode, activation", [("w8a16", None), ("w8a8", "gelu"), ("auto", None)])
def test_a_nested_input(backend, device, layout, mode, activation):
    weight, scale = F.quantize_int8(torch.randn(5, 8, device=device))
    for inner in ((), (2,)):
        bias = torch.randn(5, device=device, requires_grad=True)
        parts = [torch.randn(rows, *inner, 8, device=device, requires_grad=True) for rows in (3, 1, 14)]
        nested = torch.nested.as_nested_tensor(parts, layout=layout)
        # Of `auto` the rows of all tensors count.
        known = "w8a8" if mode == "auto" else mode
        expected = [F.int8_linear(part, weight, scale, bias, mode=known, activation=activation) for part in parts]
        output = F.int8_linear(nested, weight, scale, bias, mode=mode, activation=activation)
        assert output.is_nested and output.layout == layout
        wanted = torch.autograd.grad(sum(one.square().sum() for one in expected), [*parts, bias])
        actual = torch.autograd.grad(sum(one.square().sum() for one in output.unbind()), [*parts, bias])
        for one, other in zip([*output.unbind(), *actual], [*expected, *wanted], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_a_jagged_result_is_added_to_its_input(backend, device):
    values, offsets = torch.randn(7, 8, device=device), torch.tensor([0, 2, 7], device=device)
    nested = torch.nested.nested_tensor_from_jagged(values, offsets)
    weight, scale = F.quantize_int8(torch.randn(8, 8, device=device))
    output = nested + F.int8_linear(nested, weight, scale)
    torch.testing.assert_close(output.values(), values + F.int8_linear(values, weight, scale))
    heads = torch.nested.nested_tensor_from_jagged(values.view(7, 2, 4).repeat(1, 1, 2), offsets).transpose(1, 2)
    moved = F.int8_linear(heads, weight, scale).transpose(1, 2).values()
    torch.testing.assert_close(moved, F.int8_linear(heads.transpose(1, 2).values(), weight, scale))


def _with_holes(x):
    lengths = torch.tensor([2, 3], device=x.device)
    return torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 3, 6], device=x.device), lengths)


@pytest.mark.parametrize(
    "of, words",
    [
        (lambda x: x.to_sparse(), "sparse tensor (torch.sparse_coo)"),
        (lambda x: x.to_sparse_csr(), "sparse tensor (torch.sparse_csr)"),
        (lambda x: torch.nested.as_nested_tensor([x[:1, :7], x]), "nested tensor (torch.strided)"),
        (lambda x: torch.nested.nested_tensor([]), "nested tensor (torch.strided)"),
        (lambda x: torch.nested.as_nested_tensor([x[:1].T, x.T], layout=torch.jagged), "ragged"),
        (_with_holes, "nested tensor (torch.jagged)"),
        (lambda x: torch.nested.as_nested_tensor([x[:, :7], x[:1, :7]]), "(7, 7)"),
        (lambda x: torch.nested.as_nested_tensor([x[:, :7], x[:1, :7]], layout=torch.jagged), "(7, 7)"),
    ],
)
def test_what_no_product_is_taken_of(backend, device, of, words):
    weight, scale = F.quantize_int8(torch.randn(5, 8, device=device))
    with pytest.raises(RuntimeError) as raised:
        F.int8_linear(of(torch.randn(6, 8, device=device)), weight, scale)
    assert str(raised.value).startswith("int8_linear: input ") and words in str(raised.value)
