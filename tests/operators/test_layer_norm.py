"""layer_norm against its oracle, on every backend: shapes, the residual, numerics, the PyTorch launchers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layer_norm_calls import ALL_DTYPES, SIXTEEN_BITS, check, function_on, leaves_of, refuses_float64, tensors_of, twin
from layouts import every_other_row, guarded, strided_rows

from gptkern import functional as F
from gptkern.autograd import LayerNormFunction

# Widths and rows just below, at and above what tiles are made of; many rows of little width, one long row.
SHAPES = [(1, 1), (17, 1), (3, 3), (257, 3), (65, 16), (16, 64), (15, 63), (17, 65), (3, 1000), (2, 1025)]

# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


# --- Against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_forward_and_gradients(backend, device, dtype, rows, width):
    tensors = tensors_of(rows, width, dtype, device)
    if not refuses_float64(backend, *tensors):
        check(tensors)


def test_a_row_of_20000(backend, device):
    check(tensors_of(1, 20_000, torch.float16, device))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_of_262144(backend, device, dtype):
    # Interpreted, the parameters' gradients take a minute at this width; test_forward_and_gradients has them at 20,000.
    interpreted = device == "cpu" and backend == "triton"
    tensors = tensors_of(1, 262_144, dtype, device)
    check(tensors, needs_grad=(True, True, not interpreted, not interpreted))


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_weight_or_bias(backend, device, dtype, weight, bias):
    check(tensors_of(5, 65, dtype, device, weight=weight, bias=bias))
    check(tensors_of(5, 65, dtype, device, weight=weight, bias=bias, residual=True))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_float32_parameters_beside_a_sixteen_bit_input(backend, device, dtype):
    check(tensors_of(9, 65, dtype, device, parameters=torch.float32))
    check(tensors_of(9, 65, dtype, device, parameters=torch.float32, bias=False))


@pytest.mark.parametrize(
    "normalized_shape", [(7,), [5, 7], (3, 5, 7), torch.Size([2, 3, 5, 7])], ids=["1", "2", "3", "4"]
)
def test_normalized_shape_of_several_dimensions(backend, device, normalized_shape):
    input, residual = torch.randn(2, 2, 3, 5, 7, device=device)
    weight, bias = torch.randn(2, *normalized_shape, device=device)
    check((guarded(input), None, guarded(weight), guarded(bias)), normalized_shape=normalized_shape)
    check((guarded(input), guarded(residual), guarded(weight), None), normalized_shape=normalized_shape)
    # normalised together but not contiguous
    strided = input.transpose(2, 3).contiguous().transpose(2, 3)
    check((strided, None, guarded(weight), guarded(bias)), normalized_shape=normalized_shape)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5, 0])
def test_eps(backend, device, eps):
    check(tensors_of(3, 33, torch.float32, device), eps=eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(5, 17), (3, 31), (2, 64), (3, 65), (19, 33)])
def test_wide_row_variant_at_small_widths(triton_backend, device, monkeypatch, dtype, rows, width):
    from gptkern.operators.layer_norm import triton as kernels

    monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
    monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)
    check(tensors_of(rows, width, dtype, device, residual=True))
    if rows < 10:  # interpreted, a row costs as much here as everything else of a test
        check(tensors_of(rows, width, dtype, device, bias=False))
        check(tensors_of(rows, width, dtype, device, weight=False, bias=False))
        offset, *others = tensors_of(rows, width, torch.float32, device)
        check((offset + 1e4, *others))


# Where the CUDA kernels change from one variant to another, by vectors of 16 bytes: threads a row, vectors a thread,
# rows in chunks. With a row start that is aligned (False) and one that is not (True).
CUDA_VECTORS = [1, 2, 5, 31, 32, 33, 65, 97, 129, 385, 513, 769, 1025, 1537, 2049, 4097]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vectors", CUDA_VECTORS)
def test_cuda_variants(cuda_backend, device, dtype, vectors, odd):
    width = vectors * 16 // dtype.itemsize - odd
    rows = max(2, min(19, 2000 // vectors))
    check(tensors_of(rows, width, dtype, device, residual=vectors % 2 == 1))


# As many rows as blocks of the CUDA kernels need to have several each.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(700, 8), (700, 9), (150, 264), (150, 261), (60, 776), (60, 1031)])
def test_cuda_groups_walk_rows(cuda_backend, device, dtype, rows, width):
    check(tensors_of(rows, width, dtype, device, residual=True))
    # no tensor is aligned as the other one
    tensors = tensors_of(rows, width, dtype, device)
    apart = strided_rows(tensors[0])
    check((apart, None, tensors[2], None), grads=[every_other_row(torch.randn(rows, width, device=device).to(dtype))])


@pytest.mark.deep
@settings(PROPERTY, max_examples=15)
@given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    normalized_shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    dtype=st.sampled_from(ALL_DTYPES),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    offset=st.sampled_from([0.0, 3.0, -50.0]),
)
def test_any_shape(backend, device, batch, normalized_shape, dtype, has, offset):
    full = (*batch, *normalized_shape)
    make = lambda shape, there: torch.randn(shape, device=device).to(dtype) if there else None  # noqa: E731
    residual, weight, bias = make(full, has[0]), make(normalized_shape, has[1]), make(normalized_shape, has[2])
    if backend != "cuda" or dtype != torch.float64:
        check((make(full, True) + offset, residual, weight, bias), normalized_shape=tuple(normalized_shape))


# --- The residual ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["both", "output", "sum"])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_residual(backend, device, dtype, which):
    tensors = tensors_of(17, 65, dtype, device, residual=True)
    if refuses_float64(backend, *tensors):
        return
    grad_y, grad_s = torch.randn(2, 17, 65, device=device).to(dtype)
    check(tensors, grads=[grad_y if which != "sum" else None, grad_s if which != "output" else None])


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "parameters"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float16, torch.float64),
    ],
)
def test_residual_of_another_dtype(backend, device, dtype, residual_dtype, parameters):
    input, residual, weight, bias = tensors_of(5, 33, dtype, device, residual=True, parameters=parameters)
    tensors = (input, residual.to(residual_dtype), weight, bias)
    if not refuses_float64(backend, *tensors):
        check(tensors)


# --- Numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 1000])
def test_mean_far_above_the_standard_deviation(backend, device, width):
    # E[x²] - mean² would lose every digit: mean² is 1e8 and float32 keeps seven
    input, _, weight, bias = tensors_of(17, width, torch.float32, device)
    check((input + 1e4, None, weight, bias))
    check((input * 1e-2 - 1e2, None, weight, bias))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float16, 1.5e4), (torch.bfloat16, 1e18), (torch.float32, 1e18), (torch.float32, 1e-3)]
)
def test_huge_and_tiny_values(backend, device, dtype, factor):
    # in float16 neither the sum nor a square would fit
    uniform = guarded((torch.rand(5, 65, device=device) * 4 * factor).to(dtype))
    weight, bias = tensors_of(5, 65, dtype, device)[2:]
    check((uniform, None, weight, bias))


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("value", [0.0, 3.0, -1024.0])
def test_constant_rows(backend, device, dtype, value):
    input, _, weight, bias = tensors_of(3, 65, dtype, device)
    input[1] = value
    if refuses_float64(backend, input, None, weight, bias):
        return
    _, (output,) = check((input, None, weight, bias))
    assert torch.equal(output[1], bias)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_row(backend, device, poison):
    input, _, weight, bias = tensors_of(9, 65, torch.float32, device)
    clean = F.layer_norm(input, (65,), weight, bias)
    input[4, 7] = poison
    dirty = F.layer_norm(input, (65,), weight, bias)
    assert dirty[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize(("rows", "width"), [(257, 3), (65, 64), (3, 1025), (90, 520)])
def test_twice_the_same_bits(backend, device, rows, width):
    tensors = tensors_of(rows, width, torch.float32, device, residual=True)
    grads = list(torch.randn(2, rows, width, device=device))
    results = []
    for _ in range(2):
        leaves = leaves_of(tensors)
        outputs = twin(*leaves, (width,), 1e-5)
        torch.autograd.backward(outputs, grads)
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 3), (33, 65), (2, 1025)])
def test_everything_is_written(kernel_backend, device, poisoned_memory, rows, width):
    check(tensors_of(rows, width, torch.float32, device))
    check(tensors_of(rows, width, torch.bfloat16, device, residual=True))


# --- The autograd.Function and its registered ops -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 3), (5, 65), (2, 1025)])
@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_function(device, name, rows, width, dtype):
    if name == "triton":
        pytest.importorskip("triton")
    check(tensors_of(rows, width, dtype, device), call=function_on(name))
    check(tensors_of(rows, width, dtype, device, residual=True), call=function_on(name))


@pytest.mark.parametrize("which", ["output", "sum"])
def test_the_function_through_one_output(device, which):
    tensors = tensors_of(5, 33, torch.bfloat16, device, residual=True)
    grad_y, grad_s = torch.randn(2, 5, 33, device=device).bfloat16()
    grads = [grad_y, None] if which == "output" else [None, grad_s]
    check(tensors, call=function_on("torch"), grads=grads)


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, False, True, False), (True, False, False, True)])
def test_the_function_by_finite_differences(device, needs):
    leaves = leaves_of((t.double() for t in tensors_of(3, 5, torch.float32, device, residual=True)), needs)
    function = lambda *t: LayerNormFunction.apply(*t, 1e-5, "torch")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda x, w, b: function(x, None, w, b)[0], (leaves[0], *leaves[2:]))
