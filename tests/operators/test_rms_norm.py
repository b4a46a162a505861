"""rms_norm against its oracle, on every backend: shapes, numerics, the PyTorch launchers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import every_other_row, guarded, strided_rows
from rms_norm_calls import DTYPES, check, tensors_of

import gptkern
from gptkern import functional as F
from gptkern.autograd import RMSNormFunction

# Widths and rows just below, at and above what tiles are made of; many rows of little width, one long row.
SHAPES = [(1, 1), (17, 1), (3, 3), (257, 3), (65, 16), (16, 64), (15, 63), (17, 65), (3, 1000), (2, 1025)]

# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


# --- Against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_forward_and_gradients(backend, device, dtype, rows, width):
    check(tensors_of(rows, width, dtype, device))


def test_float64(device):
    with gptkern.backend("torch"):
        check(tensors_of(5, 65, torch.float64, device), eps=None)


def test_float64_is_left_to_pytorch(kernel_backend, device):
    input, weight = tensors_of(3, 5, torch.float64, device)
    with pytest.raises(gptkern.BackendError, match=r"input is torch\.float64"):
        F.rms_norm(input, (5,))
    with pytest.raises(gptkern.BackendError, match=r"weight is torch\.float64"):
        F.rms_norm(input.float(), (5,), weight)
    with pytest.raises(gptkern.BackendError, match=r"input is torch\.complex64"):
        F.rms_norm(input.to(torch.complex64), (5,))


def test_a_row_of_40000(backend, device):
    # beyond what registers hold, forward and backward
    interpreted = device == "cpu" and backend == "triton"
    for dtype in (torch.float16, torch.float32):
        check(tensors_of(1, 40_000, dtype, device), need=(True, not interpreted))


@pytest.mark.deep
def test_a_row_of_262144(backend, device):
    # Interpreted, the weight's gradient takes a minute at this width.
    interpreted = device == "cpu" and backend == "triton"
    check(tensors_of(1, 262_144, torch.bfloat16, device), need=(True, not interpreted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_weight(backend, device, dtype):
    check(tensors_of(5, 65, dtype, device, weight=False))
    check(tensors_of(5, 64, dtype, device, weight=False))


@pytest.mark.parametrize(
    ("dtype", "parameter"), [pair for pair in itertools.product(DTYPES, repeat=2) if pair[0] != pair[1]]
)
def test_a_weight_of_another_dtype(backend, device, dtype, parameter):
    check(tensors_of(9, 65, dtype, device, parameter=parameter))
    check(tensors_of(9, 64, dtype, device, parameter=parameter))


@pytest.mark.parametrize(
    "normalized_shape", [(7,), [5, 7], (3, 5, 7), torch.Size([2, 3, 5, 7])], ids=["1", "2", "3", "4"]
)
def test_normalized_shape_of_several_dimensions(backend, device, normalized_shape):
    input = torch.randn(2, 3, 5, 7, device=device)
    weight = guarded(torch.randn(*normalized_shape, device=device))
    check((guarded(input), weight), normalized_shape=normalized_shape)
    # normalised together but not contiguous
    check((input.transpose(1, 2).contiguous().transpose(1, 2), weight), normalized_shape=normalized_shape)


@pytest.mark.parametrize("eps", [1e-12, 0.5, 0, 3])
def test_eps(backend, device, eps):
    check(tensors_of(3, 33, torch.float32, device), eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_is_all_that_is_left_of_tiny_rows(backend, device, dtype):
    # The mean square is a thousandth of the default eps, or nothing: what eps is, and where it is added, is the result.
    input, weight = tensors_of(5, 33, dtype, device)
    input = guarded(input * 1e-5)
    input[1] = 0
    output = check((input, weight), eps=None)
    theirs = torch.nn.functional.rms_norm(input.cpu(), (33,), weight.cpu())
    torch.testing.assert_close(output.cpu(), theirs, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)
    assert not output[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(5, 17), (3, 31), (2, 64), (19, 33)])
def test_wide_row_variant_at_small_widths(triton_backend, device, monkeypatch, dtype, rows, width):
    from gptkern.operators.rms_norm import triton as kernels

    monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
    monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)
    check(tensors_of(rows, width, dtype, device))
    if rows < 10:  # interpreted, a row costs as much here as everything else of a test
        check(tensors_of(rows, width, dtype, device, weight=False))
        check(tensors_of(rows, width, dtype, device), need=(False, True))


# Where the CUDA kernels change from one variant to another, by vectors of 16 bytes: threads a row, vectors a thread,
# what registers hold and what shared memory does. With rows that begin aligned (False), and one element less (True).
CUDA_VECTORS = [1, 2, 5, 31, 32, 33, 65, 129, 257, 1024, 1025, 2049, 3073, 4097, 6145]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vectors", CUDA_VECTORS)
def test_cuda_variants(cuda_backend, device, dtype, vectors, odd):
    width = vectors * 16 // dtype.itemsize - odd
    rows = max(2, min(19, 2000 // vectors))
    check(tensors_of(rows, width, dtype, device))


@pytest.mark.parametrize("width", [65, 1000, 1040, 4099])
def test_cuda_weight_gradient_alone(cuda_backend, device, width):
    # Without dx blocks share the columns too.
    check(tensors_of(37, width, torch.bfloat16, device), need=(False, True))


# As many rows as blocks of the CUDA kernels need to have several each.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(700, 8), (700, 9), (150, 264), (150, 261), (60, 776), (60, 1031)])
def test_cuda_groups_walk_rows(cuda_backend, device, dtype, rows, width):
    input, weight = tensors_of(rows, width, dtype, device)
    check((input, weight))
    # no tensor is aligned as the other one
    check((strided_rows(input), weight), grad=every_other_row(torch.randn(rows, width, device=device).to(dtype)))


def test_cuda_groups_walk_to_rows_of_one_alignment(cuda_backend, device, monkeypatch):
    # 9 blocks, a row each: nine rows on, a row of odd width is aligned in another way.
    from gptkern.operators.rms_norm import cuda as kernels

    monkeypatch.setattr(kernels, "most_partials", lambda width, device: 9)
    check(tensors_of(25, 2065, torch.bfloat16, device))


@pytest.mark.deep
@settings(PROPERTY, max_examples=12)
@given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    normalized_shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, -50.0]),
)
def test_any_shape(backend, device, batch, normalized_shape, dtype, weighted, offset):
    input = torch.randn(*batch, *normalized_shape, device=device).add(offset).to(dtype)
    weight = torch.randn(normalized_shape, device=device).to(dtype) if weighted else None
    check((input, weight), normalized_shape=tuple(normalized_shape))


# --- Numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float16, 1.5e4), (torch.bfloat16, 1e17), (torch.float32, 1e17), (torch.float32, 1e-3)]
)
def test_huge_and_tiny_values(backend, device, dtype, factor):
    # in float16 neither the sum nor a square would fit
    uniform = guarded((torch.rand(5, 65, device=device) * 4 * factor).to(dtype))
    check((uniform, tensors_of(5, 65, dtype, device)[1]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_row(backend, device, poison):
    input, weight = tensors_of(9, 65, torch.float32, device)
    clean = F.rms_norm(input, (65,), weight)
    input[4, 7] = poison
    dirty = F.rms_norm(input, (65,), weight)
    # An infinite mean square leaves 0 of what is finite, and NaN of what is not, as in PyTorch.
    theirs = torch.nn.functional.rms_norm(input, (65,), weight)
    torch.testing.assert_close(dirty[4], theirs[4], equal_nan=True)
    assert dirty[4, 7].isnan()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize(("rows", "width"), [(257, 3), (65, 64), (3, 1025), (90, 520)])
def test_twice_the_same_bits(backend, device, rows, width):
    tensors = tensors_of(rows, width, torch.float32, device)
    grad = torch.randn(rows, width, device=device)
    results = []
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = F.rms_norm(leaves[0], (width,), leaves[1])
        output.backward(grad)
        results.append([output, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 3), (33, 65), (2, 1025)])
def test_everything_is_written(kernel_backend, device, poisoned_memory, rows, width):
    check(tensors_of(rows, width, torch.float32, device))
    check(tensors_of(rows, width, torch.bfloat16, device))


# --- The autograd.Function and its registered ops -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (17, 3), (5, 65), (2, 1025)])
def test_the_launchers_in_plain_pytorch(device, rows, width, dtype):
    call = lambda input, weight, eps: RMSNormFunction.apply(input, weight, eps, "torch")  # noqa: E731
    check(tensors_of(rows, width, dtype, device), call=call)
    check(tensors_of(rows, width, dtype, device, weight=False), call=call)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_the_function_by_finite_differences(device, needs):
    leaves = [t.double().requires_grad_(n) for t, n in zip(tensors_of(3, 5, torch.float32, device), needs)]
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-5, "torch"), leaves)
    if needs[0]:
        assert torch.autograd.gradcheck(lambda x: RMSNormFunction.apply(x, None, 1e-5, "torch"), leaves[:1])
