"""int8_linear against its oracle, on every backend; integers are compared bit for bit."""

from __future__ import annotations

import pytest
import torch
from checking import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_linear_calls import ACTIVATIONS, KERNEL_DTYPES, MODES, PROPERTY, function_on, judge, tensors_of, weight_of
from layouts import guarded

import gptkern
from gptkern import functional as F
from gptkern.autograd import Int8LinearFunction
from gptkern.operators.int8_linear import products

# rows, in_features, out_features: at, just below and just above what tiles are made of, and far from any of it
SHAPES = [
    (0, 5, 7),
    (1, 1, 1),
    (1, 129, 65),
    (2, 31, 7),
    (16, 16, 16),
    (17, 5, 1),
    (17, 129, 65),
    (33, 31, 65),
    (33, 1100, 7),
    (150, 70, 140),
]


# --- int8_linear against the oracle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(backend, device, shape, dtype, mode):
    judge(*tensors_of(*shape, dtype, device), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("shape", [(5, 1104, 40), (16, 592, 144), (40, 400, 72), (150, 336, 144)], ids=str)
def test_rows_of_whole_chunks(kernel_backend, device, shape, dtype, mode):
    # Rows of a multiple of 16 bytes, which kernels copy 16 bytes at a time, and more steps than a pipeline has stages.
    judge(*tensors_of(*shape, dtype, device), mode=mode)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_activations(backend, device, dtype, mode, activation):
    for shape in ((3, 31, 7), (17, 129, 65)):
        input, weight, weight_scale, bias = tensors_of(*shape, dtype, device)
        judge(input, weight, weight_scale, bias, activation=activation, mode=mode)
        # far into both tails, where gelu is 0 or the identity
        judge(input * 8, weight, weight_scale, None, activation=activation, mode=mode)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_slope_of_the_activation_at_infinity(kernel_backend, device, activation):
    # z is ±1e25: its cube overflows, and the slope is 1 or 0
    input = torch.tensor([[1e25], [-1e25]], device=device, requires_grad=True)
    weight, one = torch.ones(1, 1, dtype=torch.int8, device=device), torch.ones(1, device=device)
    F.int8_linear(input, weight, one, activation=activation).sum().backward()
    assert input.grad.flatten().tolist() == [1, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_float64_on_pytorch(device, mode, activation):
    with gptkern.backend("torch"):
        judge(*tensors_of(5, 31, 7, torch.float64, device), mode=mode, activation=activation)
        judge(*tensors_of(17, 31, 7, torch.float64, device, torch.float32), mode=mode, activation=activation)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_bias_of_another_dtype(backend, device, dtype, bias_dtype, activation, mode):
    judge(*tensors_of(18, 31, 7, dtype, device, bias_dtype), mode=mode, activation=activation)


@pytest.mark.parametrize("mode", [*MODES, "auto"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 0), (2, 1, 9)], ids=str)
def test_leading_dimensions(backend, device, lead, mode):
    _, weight, weight_scale, bias = tensors_of(1, 31, 7, torch.float32, device)
    input = guarded(torch.randn(*lead, 31, device=device))
    assert judge(input, weight, weight_scale, bias, mode=mode).shape == (*lead, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_is_w8a16_up_to_16_rows(backend, device, dtype):
    for lead, expected, other in (((4, 4), "w8a16", "w8a8"), ((1, 17), "w8a8", "w8a16"), ((16,), "w8a16", "w8a8")):
        _, weight, weight_scale, bias = tensors_of(1, 65, 7, dtype, device)
        input = torch.randn(*lead, 65, device=device).to(dtype)
        results = {mode: F.int8_linear(input, weight, weight_scale, bias, mode=mode) for mode in ("auto", *MODES)}
        same_bits("auto", results["auto"], results[expected])
        assert not torch.equal(results["auto"], results[other])
        same_bits("the default", F.int8_linear(input, weight, weight_scale, bias), results["auto"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_small_tiles(kernel_backend, device, monkeypatch, dtype, mode):
    if kernel_backend == "cuda":
        # nine tiles of 128 rows, or 18 of 64: more than a group of eight, and the last group is not full
        judge(*tensors_of(1100, 32, 130, dtype, device), mode=mode)
        return
    from gptkern.operators.int8_linear import triton as kernels

    small = kernels.Tile(BLOCK_M=16, BLOCK_N=16, BLOCK_K=32, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernels, "tile", lambda *_: small)
    monkeypatch.setattr(kernels, "GROUP_M", 2)
    # three tiles of rows, the last group of them not full; tails in each dimension
    judge(*tensors_of(35, 70, 20, dtype, device), mode=mode)
    judge(*tensors_of(32, 32, 16, dtype, device), mode=mode, activation="gelu")
    # one below and one above whole tiles
    for shape in ((15, 31, 17), (17, 33, 15)):
        judge(*tensors_of(*shape, dtype, device), mode=mode)
    q, input = integers_of(35, 70, device)
    weight, _ = weight_of(20, 70, device)
    output = F.int8_linear(input, weight, torch.ones(20, device=device), mode=mode)
    same_bits("product", output.cpu(), (q.cpu() @ weight.cpu().long().T).float())


# Tiles of the CUDA kernels at these sizes: 16 or 64 rows by 16 or 64 columns, in steps of 64 elements.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(15, 63, 17), (16, 65, 15), (63, 64, 65), (64, 127, 63), (65, 129, 64)], ids=str)
def test_sizes_beside_whole_tiles_on_cuda(cuda_backend, device, poisoned_memory, shape, mode):
    judge(*tensors_of(*shape, torch.float16, device), mode=mode)


@pytest.mark.deep
@settings(PROPERTY, max_examples=15)
@given(
    shape=st.tuples(st.integers(0, 35), st.integers(1, 70), st.integers(1, 40)),
    dtype=st.sampled_from(KERNEL_DTYPES),
    mode=st.sampled_from([*MODES, "auto"]),
    activation=st.sampled_from(ACTIVATIONS),
    with_bias=st.booleans(),
)
def test_any_shape(backend, device, shape, dtype, mode, activation, with_bias):
    input, weight, weight_scale, bias = tensors_of(*shape, dtype, device)
    judge(input, weight, weight_scale, bias if with_bias else None, mode=mode, activation=activation)


# --- Integers, bit for bit ------------------------------------------------------------------------------------------


def integers_of(rows, in_features, device):
    """(q, input): input is q, in float32, in rows whose largest value is 127: quantised, it is itself with scale 1."""
    q = torch.randint(-127, 128, (rows, in_features), device=device)
    q[:, 0] = 127
    return q, guarded(q.float())


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 31, 7), (17, 129, 65), (2, 1100, 33), (130, 65, 129), (150, 336, 144)], ids=str
)
def test_w8a8_product_is_exact(backend, device, shape):
    rows, in_features, out_features = shape
    q, input = integers_of(rows, in_features, device)
    weight, _ = weight_of(out_features, in_features, device)
    ones = torch.ones(out_features, device=device)
    expected = (q.cpu() @ weight.cpu().long().T).float()
    same_bits("product", F.int8_linear(input, weight, ones, mode="w8a8").cpu(), expected)


def test_w8a8_product_of_every_pair(backend, device):
    # in_features = 1: the outer product of all that a quantised row can hold beside 127, and all int8
    values = torch.arange(-127, 128, device=device)
    input = torch.stack([torch.full_like(values, 127), values], 1).float()
    weight = torch.arange(-128, 128, device=device)
    pairs = torch.stack([torch.zeros_like(weight), weight], 1).to(torch.int8)
    output = F.int8_linear(input, pairs, torch.ones(256, device=device), mode="w8a8")
    same_bits("products", output.cpu(), (values[:, None] * weight).float().cpu())


def test_w8a8_sums_of_extremes(backend, device):
    # The partial sums pass 2²⁴, where float32 loses the last bit, and 2¹⁵; the whole is small and odd.
    half = 1250
    input = torch.full((4, 2 * half + 1), 127.0, device=device)
    weight = torch.full((3, 2 * half + 1), -128, dtype=torch.int8, device=device)
    weight[0, half:-1] = 127
    weight[1, ::2] = 127
    weight[:, -1] = 1
    input[1, half:] = -127
    input[2, ::3] = -127
    input[3, -1] = 1
    expected = input.cpu().long() @ weight.cpu().long().T
    assert expected.abs().max() > 2**24
    output = F.int8_linear(input, weight, torch.ones(3, device=device), mode="w8a8")
    same_bits("sums", output.cpu(), expected.float())


# The longest row whose sum int32 always holds: 132104 * 127 * 128 < 2³¹.
LONGEST = 132_104


@pytest.mark.parametrize("in_features", [1024, 1025, LONGEST, LONGEST + 1, 140_000])
def test_sums_of_any_length_on_pytorch(device, in_features):
    q = torch.full((2, in_features), 127, dtype=torch.int8, device=device)
    weight = torch.full((2, in_features), -128, dtype=torch.int8, device=device)
    q[1].random_(-127, 128)
    weight[1].random_(-128, 128)
    expected = q.cpu().long() @ weight.cpu().long().T
    assert torch.equal(products.integer_product(q, weight).cpu().long(), expected)


@pytest.mark.deep
def test_longest_sums_of_kernels(kernel_backend, device):
    input = torch.full((1, LONGEST + 1), 127.0, device=device)
    weight = torch.full((1, LONGEST + 1), -128, dtype=torch.int8, device=device)
    one = torch.ones(1, device=device)
    output = F.int8_linear(input[:, :LONGEST], weight[:, :LONGEST], one, mode="w8a8")
    same_bits("sum", output.cpu(), torch.tensor([[-127.0 * 128 * LONGEST]], dtype=torch.float64).float())
    with pytest.raises(gptkern.BackendError, match=str(LONGEST)):
        F.int8_linear(input, weight, one, mode="w8a8")


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_widened_slice_by_slice(device, monkeypatch, mode):
    monkeypatch.setattr(products, "WIDENED_ELEMENTS", {"cpu": 100, "cuda": 100})
    with gptkern.backend("torch"):
        judge(*tensors_of(17, 31, 65, torch.float32, device), mode=mode)


@pytest.mark.parametrize(
    "threads, in_features, out_features", [(1, 31, 65), (2, 31, 65), (3, 31, 66), (2, 1, 64), (2, 1031, 13)]
)
def test_a_slice_is_multiplied_in_a_part_for_each_thread(monkeypatch, threads, in_features, out_features):
    """Slices of threads x 3 channels; the last may have a number of them that is no multiple."""
    monkeypatch.setattr(products, "WIDENED_ELEMENTS", {"cpu": 3 * in_features})
    monkeypatch.setattr(products, "_COPIED_BY_A_THREAD", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, weight: seen.append(len(weight)) or bmm(x, weight))
    q, weight = (torch.randint(-127, 128, (rows, in_features), dtype=torch.int8) for rows in (5, out_features))
    expected = q.double() @ weight.double().t()
    assert torch.equal(products.widened_product(q.double().float() / 4, weight).double() * 4, expected)
    assert torch.equal(products._product_of_floats(q, weight).double(), expected)
    assert set(seen) == ({threads} if threads > 1 else set())


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_w8a16_keeps_every_int8(backend, device, dtype):
    # A row of the identity picks a column of the weight: what comes out is the weight.
    weight = torch.arange(-128, 128, device=device).to(torch.int8).reshape(16, 16)
    identity = torch.eye(16, dtype=dtype, device=device)
    output = F.int8_linear(identity, weight, torch.ones(16, device=device), mode="w8a16")
    same_bits("weight", output, weight.T.to(dtype))


def test_each_scale_belongs_to_its_row_or_column(backend, device):
    # One number at a time: swapped or shifted scales cannot cancel.
    input = torch.diag(torch.tensor([1.0, 10.0, 100.0], device=device))
    weight = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8, device=device)
    weight_scale = torch.tensor([0.5, 0.125], device=device)
    expected = input.double() @ (weight.double() * weight_scale.double()[:, None]).T
    for mode in MODES:
        output = F.int8_linear(input, weight, weight_scale, mode=mode)
        torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=0)


# --- Autograd, memory, repetition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_written(kernel_backend, device, poisoned_memory, mode):
    for shape in ((1, 1, 1), (17, 31, 7), (33, 129, 65)):
        judge(*tensors_of(*shape, torch.float32, device), mode=mode, activation="gelu")
        judge(*tensors_of(*shape, torch.bfloat16, device), mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_twice_the_same_bits(backend, device, mode):
    tensors = tensors_of(40, 129, 65, torch.float32, device)
    grad = torch.randn(40, 65, device=device)
    runs = []
    for _ in range(2):
        input, bias = tensors[0].detach().requires_grad_(), tensors[3].detach().requires_grad_()
        output = F.int8_linear(input, *tensors[1:3], bias, mode=mode, activation="gelu")
        output.backward(grad)
        runs.append((output, input.grad, bias.grad))
    for first, second in zip(*runs):
        same_bits("second run", second, first)


def test_a_nan_stays_in_its_row(backend, device):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    others = [row for row in range(18) if row != 4]
    for mode in MODES:
        clean = F.int8_linear(input, weight, weight_scale, bias, mode=mode)
        dirty = input.clone()
        dirty[4, 3] = torch.nan
        output = F.int8_linear(dirty, weight, weight_scale, bias, mode=mode)
        assert output[4].isnan().all()
        same_bits("the other rows", output[others], clean[others])


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros(backend, device, mode):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)
    input[::2] = 0
    output = judge(input, weight, weight_scale, bias, mode=mode)
    same_bits("bias", output[::2].detach(), bias.expand(9, 7))


# --- The autograd.Function and the registered ops -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_the_function(backend, device, dtype, mode):
    for shape in ((0, 5, 7), (3, 31, 7), (17, 129, 65)):
        for activation in ACTIVATIONS:
            tensors = tensors_of(*shape, dtype, device)
            judge(*tensors, mode=mode, activation=activation, call=function_on(backend))
    judge(*tensors[:3], None, mode=mode, call=function_on(backend))
    judge(*tensors, mode=mode, call=function_on(backend), need=(False, True))


def test_the_function_is_exact_on_integers(device):
    q, input = integers_of(17, 1100, device)
    weight, _ = weight_of(9, 1100, device)
    output = Int8LinearFunction.apply(input, weight, torch.ones(9, device=device), None, None, "w8a8", "torch")
    same_bits("product", output.cpu(), (q.cpu() @ weight.cpu().long().T).float())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_function_by_finite_differences(device, activation):
    # w8a16: the rounding of w8a8 has no derivative
    input, weight, weight_scale, bias = tensors_of(3, 5, 7, torch.float64, device)

    def function(input, bias):
        return Int8LinearFunction.apply(input, weight, weight_scale, bias, activation, "w8a16", "torch")

    assert torch.autograd.gradcheck(function, (input.requires_grad_(), bias.requires_grad_()))
    assert torch.autograd.gradcheck(lambda input: function(input, None), (input,))
