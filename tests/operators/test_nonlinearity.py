"""gelu, silu, swiglu and geglu against their oracle, on every backend: shapes, numerics, the PyTorch launchers."""

from __future__ import annotations

import math

import pytest
import torch
from checking import same_bits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import guarded
from nonlinearity_calls import DTYPES, FUNCTIONS, KINDS, call, check, combinations, tensors_of
from sharp import deep, sharp

import gptkern
import gptkern.functional as G
from gptkern.autograd import ActivationFunction

all_calls = pytest.mark.parametrize(("function", "kind"), combinations())
# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)
# Widths beside a vector's 4 and 8 elements and a warp's lanes of them; rows beside those of a tile. Of 2048 elements
# there are whole rows of what a contiguous tensor is walked as.
SHAPES = [(1, 1), (5, 3), (3, 7), (4, 8), (9, 9), (2, 33), (3, 255), (2, 257), (2, 1024), (3, 1025), (1, 2049)]


# --- Against the oracle ---------------------------------------------------------------------------------------------


@all_calls
@pytest.mark.parametrize("dtype", sharp(DTYPES, torch.float32), ids=str)
def test_forward_and_gradients(backend, device, dtype, function, kind):
    for shape in ((5, 33), (4, 64)):
        check(function, kind, tensors_of(kind, *shape, dtype=dtype, device=device))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", sharp(SHAPES, (1, 1), (4, 8), (9, 9), (2, 257), (3, 1025), (1, 2049)), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.deep)], ids=str)
def test_shapes(kernel_backend, device, poisoned_memory, kind, shape, dtype):
    check("gelu_tanh", kind, tensors_of(kind, *shape, dtype=dtype, device=device))


@pytest.mark.parametrize("shape", [(), (2, 3, 10), *deep((7,), (2, 1, 3, 8))], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_dimensions(backend, device, kind, shape):
    if shape or kind in ("plain", "pair"):
        check("gelu", kind, tensors_of(kind, *shape, dtype=torch.float32, device=device))


@pytest.mark.parametrize("rows", [7, 8, 9, *deep(1, 65, 300)])
def test_rows_of_a_bias_beside_those_of_a_block(kernel_backend, device, poisoned_memory, rows):
    for width in (24, 261):
        check("gelu", "bias", tensors_of("bias", rows, width, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_bias_beside_a_16_bit_input(backend, device, dtype):
    tensors = tensors_of("bias", 9, 33, dtype=dtype, device=device, bias_dtype=torch.float32)
    check("gelu_tanh", "bias", tensors)


@all_calls
def test_float64(device, function, kind):
    tensors = tensors_of(kind, 3, 9, dtype=torch.float64, device=device)
    with gptkern.backend("torch"):
        check(function, kind, tensors)
    if device == "cpu":
        pytest.importorskip("triton")
    with gptkern.backend("triton"):
        check(function, kind, tensors)


def test_float64_is_none_of_cuda(cuda_backend, device):
    (input,) = tensors_of("plain", 3, 5, dtype=torch.float64, device=device)
    with pytest.raises(gptkern.BackendError, match=r"input is torch\.float64"):
        G.gelu(input)
    with pytest.raises(gptkern.BackendError, match=r"input is torch\.float64"):
        G.swiglu(input, input)


@pytest.mark.deep
@settings(PROPERTY, max_examples=12)
@given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    width=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    of=st.sampled_from(combinations()),
)
def test_any_shape(backend, device, batch, width, dtype, of):
    check(*of, tensors_of(of[1], *batch, width, dtype=dtype, device=device))


# --- Numerics -------------------------------------------------------------------------------------------------------


def gradient_of_one(function, x):
    """The function's value and slope."""
    leaf = x.detach().requires_grad_()
    y = call(function, "plain", leaf)
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_away_it_is_the_identity_or_nothing(kernel_backend, device, dtype, function):
    largest = torch.finfo(dtype).max
    far = [x for x in (200.0, 1e3, 6e4, 1e10, 1.7e19, 2e19, 1e30, 3e38, largest) if x <= largest]
    x = torch.tensor([*far, *(-x for x in far)], dtype=dtype, device=device)
    y, slope = gradient_of_one(function, x)
    assert torch.equal(y, torch.where(x > 0, x, torch.zeros_like(x)))
    assert torch.equal(slope, (x > 0).to(dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_near_the_limit_the_slope_is_right(kernel_backend, device, function):
    # sigmoid(2u) is near 1, or near float32's smallest number. PyTorch's 1 - s has lost digits there (seen: 1e-6).
    x = torch.cat([torch.linspace(-25, 25, 401), torch.linspace(-0.01, 0.01, 41)]).to(device)
    check(function, "plain", [guarded(x)], grad=torch.ones_like(x))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(kernel_backend, device, dtype, function):
    y, slope = gradient_of_one(
        function, torch.tensor([math.inf, math.nan, -math.inf, 0.0, -0.0], dtype=dtype).to(device)
    )
    # At -inf it is the product of -inf and 0, as in PyTorch.
    expected = torch.tensor([math.inf, math.nan, math.nan, 0.0, -0.0], dtype=dtype, device=device)
    same_bits("values", y, expected)
    assert torch.equal(torch.signbit(y[3:]), torch.tensor([False, True], device=device))
    assert slope[1].isnan() and torch.equal(slope[3:], torch.full_like(slope[3:], 0.5))


@pytest.mark.parametrize("kind", ["pair", "packed"])
def test_float16_has_room_for_no_product_on_the_way(backend, device, kind):
    # dy * up is 1e6, and dy * up * f'(gate) is -61.
    gate, up, dy = (torch.full((2, 8), value, device=device, dtype=torch.float16) for value in (-12.0, 1000.0, 1000.0))
    tensors = [gate, up] if kind == "pair" else [torch.cat((gate, up), -1)]
    check("silu", kind, tensors, grad=dy)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_special_value_stays_where_it_is(kernel_backend, device, kind, poison):
    tensors = tensors_of(kind, 3, 24, dtype=torch.float32, device=device)
    clean = call("gelu", kind, *tensors)
    tensors[0][1, 5] = poison
    dirty = call("gelu", kind, *tensors)
    assert not dirty[1, 5].isfinite()
    dirty[1, 5] = clean[1, 5]
    assert torch.equal(dirty, clean)


@pytest.mark.parametrize("width", [24, 261])
def test_twice_the_same_bits(backend, device, width):
    tensors = tensors_of("bias", 77, width, dtype=torch.float32, device=device)
    grad = torch.randn(77, width, device=device)
    results = []
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = call("gelu", "bias", *leaves)
        output.backward(grad)
        results.append([output, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


# --- The autograd.Function ------------------------------------------------------------------------------------------


def by_launchers(function, kind, input, other=None):
    up, bias = (other, None) if kind == "pair" else (None, other)
    return ActivationFunction.apply(input, up, bias, function, kind == "packed", "torch")


@all_calls
@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float16, torch.float32, torch.float64)], ids=str)
def test_the_launchers_in_plain_pytorch(device, function, kind, dtype):
    check(function, kind, tensors_of(kind, 5, 33, dtype=dtype, device=device), by=by_launchers)


@all_calls
def test_the_function_by_finite_differences(device, function, kind):
    leaves = [t.requires_grad_() for t in tensors_of(kind, 3, 5, dtype=torch.float64, device=device)]
    assert torch.autograd.gradcheck(lambda *given: by_launchers(function, kind, *given), leaves)


@all_calls
def test_second_derivatives_on_the_torch_backend(device, function, kind):
    with gptkern.backend("torch"):
        leaves = [t.requires_grad_() for t in tensors_of(kind, 2, 3, dtype=torch.float64, device=device)]
        assert torch.autograd.gradcheck(lambda *given: call(function, kind, *given), leaves)
        assert torch.autograd.gradgradcheck(lambda *given: call(function, kind, *given), leaves, atol=1e-4)
