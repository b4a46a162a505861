"""softmax: what it takes: dtypes, strides, frozen inputs, PyTorch's calls and errors, registered ops, compiled code."""

from __future__ import annotations

import math

import numpy as np
import oracle_softmax
import pytest
import torch
import torch.nn.functional as F
from checking import Watched, assert_compiles, check, raised_by, same_bits
from layouts import of_own_strides
from softmax_calls import CALLS, arguments_of, check_softmax, dtypes, random, refuses_float64

import gptkern
import gptkern.functional as G

# --- dtype= ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "from_dtype, to_dtype",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_dtype_converts_the_input_first(backend, device, from_dtype, to_dtype):
    input = random(3, 33, device=device, dtype=from_dtype)
    if refuses_float64(backend, lambda: G.softmax(input, -1, dtype=to_dtype), from_dtype, to_dtype):
        return
    converted = input.detach().to(to_dtype).requires_grad_()
    leaf = input.clone().requires_grad_()
    output = G.softmax(leaf, -1, dtype=to_dtype, scale=0.5)
    expected = G.softmax(converted, -1, scale=0.5)
    same_bits("forward", output, expected)
    grad_output = torch.randn(output.shape, device=device).to(to_dtype)
    output.backward(grad_output)
    expected.backward(grad_output)
    # The gradient goes back through the conversion: one more rounding in the narrower dtype.
    narrow = min(from_dtype, to_dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    tolerance = 4 * torch.finfo(narrow).eps
    torch.testing.assert_close(leaf.grad, converted.grad.to(from_dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_dtype_takes_integers(backend, device, dtype):
    input = torch.randint(0, 2, (3, 9), device=device).to(dtype)
    output = G.softmax(input, 1, dtype=torch.float32)
    torch.testing.assert_close(output, F.softmax(input, 1, dtype=torch.float32))


# --- Strides, frozen inputs, gradients ------------------------------------------------------------------------------


def strided_inputs(device, dtype):
    base = random(18, 34, 12, device=device, dtype=dtype)
    yield "transposed", base[:9, :17, 0].T
    yield "every second", base[::2, ::2, ::3]
    yield "permuted", base[:3, :5, :7].permute(2, 0, 1)
    yield "a column", base[:, :, 1]
    yield "expanded rows", base[:1, :17, 0].expand(4, 17)
    yield "expanded columns", base[:4, :1, 0].expand(4, 17)
    yield "an offset", base.flatten()[1:103].view(6, 17)


@dtypes
def test_strided_inputs(backend, device, dtype):
    for name, view in strided_inputs(device, dtype):
        for dim in range(view.dim()):
            try:
                check_softmax(view, dim, scale=0.5)
            except AssertionError as error:
                raise AssertionError(f"{name}, dim {dim}: {error}") from error
        check_softmax(view, -1, is_causal=True, mask=torch.rand(view.shape, device=device) > 0.2)


@pytest.mark.parametrize("width", [17, 16])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_operand_has_strides_of_its_own(kernel_backend, device, dim, width):
    tensors = (random(4, 5, width, device=device) for _ in range(3))
    input, mask, grad_output = of_own_strides(*tensors, step=1 if width % 4 else 4)
    check_softmax(input, dim, mask=mask, grad_output=grad_output)


@dtypes
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_tensors_that_begin_anywhere(backend, device, dtype, offset):
    def shifted(*shape):
        return random(math.prod(shape) + offset, device=device, dtype=dtype)[offset:].view(shape)

    for dim in (0, 1, 2):
        check_softmax(shifted(3, 6, 16), dim)
        check_softmax(shifted(3, 6, 16).clone(), dim, grad_output=shifted(3, 6, 16))
        # Vectors fit the input and not the output.
        check_softmax(random(3, 6, 24, device=device, dtype=dtype)[..., : 16 + offset], dim)
        check_softmax(random(3, 6, 16, device=device, dtype=dtype), dim, mask=shifted(6, 16), scale=0.5)
        check_softmax(random(3, 6, 16, device=device, dtype=dtype), dim, mask=shifted(6, 16) > 0)


def test_many_dimensions(backend, device):
    input = random(2, 3, 2, 3, 2, 3, device=device)
    for order in ((5, 4, 3, 2, 1, 0), (0, 2, 4, 1, 3, 5)):
        view = input.permute(order)
        mask = torch.rand(view.shape[-1], device=device) > 0.2
        for dim in (0, 2, 5):
            check_softmax(view, dim)
            check_softmax(view, dim, mask=mask if dim == 5 else None)


def test_more_dimensions_than_the_cuda_kernels_walk(kernel_backend, device):
    input = random(*[2] * 10, device=device)
    if kernel_backend == "cuda":
        with pytest.raises(gptkern.BackendError, match="dimensions"):
            G.softmax(input, 3)
    else:
        check_softmax(input, 3)


@dtypes
def test_incoming_gradients_of_any_strides(backend, device, dtype):
    input = random(4, 5, 17, device=device, dtype=dtype)
    for dims, grad_output in (
        ((0, 1, 2), torch.randn(17, 5, 4, device=device).to(dtype).permute(2, 1, 0)),
        ((0, 1, 2), torch.randn(8, 10, 34, device=device).to(dtype)[::2, ::2, ::2]),
        # Not over an expanded dimension: there the exact gradient is 0, and what is left is the rounding of y.
        ((2,), torch.randn(1, 1, 17, device=device).to(dtype).expand(4, 5, 17)),
        ((0,), torch.randn(4, 1, 1, device=device).to(dtype).expand(4, 5, 17)),
    ):
        for dim in dims:
            check_softmax(input, dim, grad_output=grad_output)


def test_the_gradient_of_a_sum(backend, device):
    # sum().backward() hands over one number expanded to the whole shape, whose strides are all 0.
    input = random(4, 17, device=device).requires_grad_()
    (G.softmax(input, -1, mask=torch.ones(17, dtype=torch.bool, device=device)) * 3).sum().backward()
    assert input.grad.abs().max() < 1e-5


def test_the_strides_of_the_result_do_not_matter_downstream(backend, device):
    input = random(4, 5, 17, device=device)
    for dim in (0, 1, 2):
        assert G.softmax(input, dim).reshape(-1).sum().sub(input.numel() / input.shape[dim]).abs() < 1e-3


def test_no_gradient_that_nobody_asked_for(kernel_backend, device):
    input = random(4, 17, device=device)
    with Watched() as watched:
        output = G.softmax(input, -1, scale=0.5)
        assert not output.requires_grad
        with torch.no_grad():
            assert not G.softmax(input.clone().requires_grad_(), -1).requires_grad
    assert watched.names == ["softmax_forward"] * 2
    weight = random(4, 17, device=device).requires_grad_()
    (output * weight).sum().backward()
    same_bits("the weight's gradient", weight.grad, output)


def test_two_results_of_one_input_accumulate(backend, device):
    input = random(4, 17, device=device).requires_grad_()
    weights = torch.randn(2, 4, 17, device=device)
    (G.softmax(input, -1) * weights[0] + G.softmax(input, -1, scale=2.0) * weights[1]).sum().backward()
    total = input.grad.clone()
    input.grad = None
    (G.softmax(input, -1) * weights[0]).sum().backward()
    (G.softmax(input, -1, scale=2.0) * weights[1]).sum().backward()
    torch.testing.assert_close(total, input.grad)


def test_backward_twice_with_retain_graph(backend, device):
    input = random(4, 17, device=device).requires_grad_()
    output = G.softmax(input, -1, is_causal=True)
    grad_output = torch.randn(4, 17, device=device)
    (first,) = torch.autograd.grad(output, input, grad_output, retain_graph=True)
    (second,) = torch.autograd.grad(output, input, grad_output)
    same_bits("the second backward", second, first)


def test_a_second_derivative_is_refused(kernel_backend, device):
    input = random(4, 17, device=device).requires_grad_()
    (gradient,) = torch.autograd.grad(G.softmax(input, -1).square().sum(), input, create_graph=True)
    plain = input.detach().clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(F.softmax(plain, -1).square().sum(), plain)[0])
    with pytest.raises(NotImplementedError, match="softmax has no second derivative"):
        gradient.sum().backward()


def test_pytorch_gives_the_second_derivative(device):
    input = random(2, 5, device=device, dtype=torch.float64).requires_grad_()
    mask = torch.rand(2, 5, device=device) > 0.3
    with gptkern.backend("torch"):
        for extensions in ({}, {"scale": 0.5, "mask": mask}, {"is_causal": True}):
            assert torch.autograd.gradgradcheck(lambda x: G.softmax(x, -1, **extensions), input)  # noqa: B023


def test_a_mask_that_requires_grad_runs_on_pytorch(device):
    input, mask = random(4, 17, device=device).requires_grad_(), random(17, device=device).requires_grad_()
    with gptkern.backend("torch"):
        check(
            lambda x, m: G.softmax(x, -1, mask=m, scale=0.5),
            lambda x, m, precision: oracle_softmax.softmax(x, -1, mask=m, scale=0.5, precision=precision),
            input,
            mask,
        )


def test_a_mask_that_requires_grad_is_refused_by_kernels(kernel_backend, device):
    input, mask = random(4, 17, device=device), random(17, device=device).requires_grad_()
    with pytest.raises(gptkern.BackendError, match="mask"):
        G.softmax(input, -1, mask=mask)
    with torch.no_grad():  # nobody asks for its gradient here
        error = None
        try:
            output = G.softmax(input, -1, mask=mask)
        except gptkern.BackendError as refused:
            error = refused
    if error is None:
        torch.testing.assert_close(output, F.softmax(input + mask, -1).detach())


# --- The twin behaves as PyTorch's ----------------------------------------------------------------------------------


SAME_CALLS = {
    "dim": lambda x: ((x, 1), {}),
    "negative dim": lambda x: ((x, -3), {}),
    "keywords": lambda x: ((), {"input": x, "dim": 2}),
    "_stacklevel": lambda x: ((x, 1, 5), {}),
    "dtype": lambda x: ((x, 1), {"dtype": torch.float64}),
    "dtype by position": lambda x: ((x, 1, 3, torch.bfloat16), {}),
    "half": lambda x: ((x.half(), 0), {}),
    "half to float32": lambda x: ((x.half(), 0), {"dtype": torch.float32}),
    "integers": lambda x: ((x.long(), 0), {"dtype": torch.float16}),
    "transposed": lambda x: ((x.transpose(0, 2), 1), {}),
    "a scalar": lambda x: ((x[0, 0, 0], 0), {}),
    "a scalar, dim -1": lambda x: ((x[0, 0, 0], -1), {}),
    "no elements": lambda x: ((x[:0], 1), {}),
    "a Parameter": lambda x: ((torch.nn.Parameter(x), 1), {}),
}


@pytest.mark.parametrize("name", SAME_CALLS)
def test_the_same_result_as_pytorch(backend, device, name):
    args, kwargs = SAME_CALLS[name](random(3, 4, 5, device=device))
    if refuses_float64(backend, lambda: G.softmax(*args, **kwargs), kwargs.get("dtype")):
        return
    actual, expected = G.softmax(*args, **kwargs), F.softmax(*args, **kwargs)
    assert actual.requires_grad == expected.requires_grad
    assert actual.device == expected.device
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_dim_none_warns_and_picks_as_pytorch_does(backend, device, shape):
    input = torch.randn(shape, device=device)
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
        actual = G.softmax(input)
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax"):
        expected = F.softmax(input)
    torch.testing.assert_close(actual, expected)


# name: the call, the exception that the contract promises, what its message names.
BAD_CALLS = {
    "dim too large": (lambda f, x: f(x, 2), IndexError, "dim|[Dd]imension"),
    "dim too small": (lambda f, x: f(x, -3), IndexError, "dim|[Dd]imension"),
    "dim of a scalar": (lambda f, x: f(x[0, 0], 1), IndexError, "dim|[Dd]imension"),
    "dim is a string": (lambda f, x: f(x, "a"), TypeError, "dim"),
    "dim is a float": (lambda f, x: f(x, 1.5), TypeError, "dim"),
    "integers": (lambda f, x: f(x.long(), 1), RuntimeError, "input|Long|int64"),
    "bools": (lambda f, x: f(x > 0, 1), RuntimeError, "input|[Bb]ool"),
    "complex": (lambda f, x: f(x.to(torch.complex64), 1), RuntimeError, "input|[Cc]omplex"),
    "dtype is integer": (lambda f, x: f(x, 1, dtype=torch.int32), RuntimeError, "dtype|Int"),
    "dtype is a string": (lambda f, x: f(x, 1, dtype="float32"), TypeError, "dtype"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_raise_as_in_pytorch(backend, device, name):
    call, expected, words = BAD_CALLS[name]
    input = random(3, 4, device=device)
    pytorchs = raised_by(call, F.softmax, input)
    assert isinstance(pytorchs, expected), "the table is wrong about PyTorch"
    with pytest.raises(expected, match=words) as raised:
        call(G.softmax, input)
    assert isinstance(pytorchs, type(raised.value)) or isinstance(raised.value, type(pytorchs))


@pytest.mark.parametrize("nothing", [None, [1.0, 2.0], 3.0], ids=str)
def test_an_input_that_is_no_tensor(kernel_backend, nothing):
    with pytest.raises(TypeError, match="input"):
        G.softmax(nothing, 0)


def test_an_input_that_is_no_tensor_on_pytorch():
    with gptkern.backend("torch"), pytest.raises((TypeError, AttributeError)):
        G.softmax([1.0, 2.0], 0)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4), (1, 3, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_that_does_not_broadcast(backend, device, shape, additive):
    mask = torch.zeros(shape, device=device) if additive else torch.ones(shape, dtype=torch.bool, device=device)
    with pytest.raises(RuntimeError, match=r"mask|size of tensor|shape"):
        G.softmax(random(3, 4, device=device), -1, mask=mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64], ids=str)
def test_a_mask_that_is_neither_bool_nor_floating_point(backend, device, dtype):
    with pytest.raises(TypeError, match="mask"):
        G.softmax(random(3, 4, device=device), -1, mask=torch.ones(3, 4, device=device).to(dtype))


@pytest.mark.parametrize("mask", [[True] * 4, 1.0, "mask"], ids=str)
def test_a_mask_that_is_no_tensor(backend, device, mask):
    with pytest.raises(TypeError, match="mask"):
        G.softmax(random(3, 4, device=device), -1, mask=mask)


def test_a_mask_on_another_device(backend, device):
    for mask in (torch.ones(4, device="meta"), torch.ones(4, dtype=torch.bool, device="meta")):
        with pytest.raises(RuntimeError, match=r"device|mask"):
            G.softmax(random(3, 4, device=device), -1, mask=mask)


def test_is_causal_needs_two_dimensions_and_the_last_dim(backend, device):
    with pytest.raises(ValueError, match="is_causal"):
        G.softmax(random(4, device=device), -1, is_causal=True)
    for dim in (0, -2):
        with pytest.raises(ValueError, match="is_causal"):
            G.softmax(random(3, 4, device=device), dim, is_causal=True)
    with pytest.raises(IndexError):
        G.softmax(random(3, 4, device=device), 2, is_causal=True)


def test_the_extensions_are_keyword_only(device):
    with pytest.raises(TypeError):
        G.softmax(random(3, 4, device=device), -1, 3, None, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_as_in_pytorch(backend, device, dtype):
    input = random(3, 17, device=device, dtype=dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        leaf = input.clone().requires_grad_()
        output, expected = G.softmax(leaf, -1), F.softmax(input, -1)
        assert output.dtype == expected.dtype
        if not refuses_float64(backend, lambda: G.softmax(leaf, -1, dtype=torch.float64), torch.float64):
            assert G.softmax(leaf, -1, dtype=torch.float64).dtype == F.softmax(input, -1, dtype=torch.float64).dtype
    output.backward(torch.randn(3, 17, device=device).to(output.dtype))
    tolerance = 4 * torch.finfo(output.dtype).eps
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    assert leaf.grad.dtype == dtype


@pytest.mark.parametrize(
    "dim", [np.int64(-1), np.uint8(1), torch.tensor(-2), torch.tensor(0, dtype=torch.int8)], ids=repr
)
def test_dim_of_numpy_and_as_a_tensor(backend, device, dim):
    input = random(3, 5, device=device)
    expected = F.softmax(input, int(dim))
    torch.testing.assert_close(G.softmax(input, dim), expected)
    with gptkern.kernels(), Watched() as watched:
        torch.testing.assert_close(input.softmax(dim), expected)
    assert watched.names == ([] if backend == "torch" else ["softmax_forward"])
    torch.testing.assert_close(G.softmax(input, dim, scale=np.float32(0.5)), F.softmax(input * 0.5, int(dim)))


@pytest.mark.parametrize(
    "dim", [True, np.bool_(True), np.array(1), torch.tensor(1.0), torch.tensor([1]), 1.0], ids=repr
)
def test_what_is_no_dim(backend, device, dim):
    for function in (F.softmax, G.softmax):
        assert isinstance(raised_by(function, random(3, 5, device=device), dim), TypeError)


# --- The PyTorch launchers, the registered ops, torch.compile -------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("name_of_backend", ["torch", "triton"])
def test_the_registered_ops(kernel_backend, device, name, name_of_backend):
    input, (scale, mask, is_causal) = random(2, 7, 9, device=device), arguments_of(name, device)
    output = torch.ops.gptkern.softmax_forward(input, -1, None, scale, mask, is_causal, name_of_backend)
    forward, backward = torch.ops.gptkern.softmax_forward.default, torch.ops.gptkern.softmax_backward.default
    torch.library.opcheck(forward, (input, -1, None, scale, mask, is_causal, name_of_backend))
    torch.library.opcheck(forward, (input.half(), 2, torch.float32, scale, mask, is_causal, name_of_backend))
    gradient = torch.randn_like(output), output, torch.float32
    call = (*gradient, None, -1, None, scale, None, is_causal, name_of_backend)
    torch.library.opcheck(backward, call)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_as_eager(backend, device, name):
    extensions = {key: value.to(device) if key == "mask" else value for key, value in CALLS[name].items()}
    assert_compiles(lambda x: G.softmax(x, -1, **extensions), random(2, 7, 9, device=device))


def test_compiled_over_another_dim(backend, device):
    assert_compiles(lambda x: G.softmax(x * 2, 0, dtype=torch.float32), random(5, 7, 9, device=device).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"is_causal": True}, {"dtype": torch.float32}], ids=str)
def test_vmap_over_a_mask_alone(dtype, options):
    torch.manual_seed(0)
    input, masks = torch.randn(4, 5).to(dtype), torch.rand(3, 4, 5) > 0.4
    expected = torch.stack([G.softmax(input, -1, mask=mask, **options) for mask in masks])
    assert torch.equal(torch.vmap(lambda mask: G.softmax(input, -1, mask=mask, **options))(masks), expected)
