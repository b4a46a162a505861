"""int8_linear and quantize_int8 against their oracles, on every backend; integers are compared bit for bit."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional
from checking import Watched, assert_compiles, check, raised_by, same_bits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, every_other_element, expanded, guarded, strided_rows, transposed

import gptkern
from gptkern import functional as F
from gptkern.autograd import Int8LinearFunction
from gptkern.operators.int8_linear import contract as int8_linear

KERNEL_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MODES = ["w8a16", "w8a8"]
ACTIVATIONS = [None, "gelu", "gelu_tanh"]
# At most this many rows take w8a16 in mode "auto".
FEW_ROWS = 16

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

# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


# --- How a call is judged -------------------------------------------------------------------------------------------


def weight_of(out_features, in_features, device):
    """(weight, weight_scale): every int8 value, scales that make the product about as large as the input."""
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8, device=device)
    weight_scale = (torch.rand(out_features, device=device) + 0.5) / (64 * max(in_features, 1) ** 0.5)
    return guarded(weight), guarded(weight_scale)


def tensors_of(rows, in_features, out_features, dtype, device, bias_dtype=None):
    """(input, weight, weight_scale, bias)."""
    input = guarded(torch.randn(rows, in_features, device=device).to(dtype))
    bias = guarded(torch.randn(out_features, device=device).to(bias_dtype or dtype))
    return input, *weight_of(out_features, in_features, device), bias


def function_on(backend):
    """The autograd.Function itself, with the signature of the twin."""

    def call(input, weight, weight_scale, bias=None, *, activation=None, mode):
        return Int8LinearFunction.apply(input, weight, weight_scale, bias, activation, mode, backend)

    return call


def judge(input, weight, weight_scale, bias, *, activation=None, mode, call=F.int8_linear, **how):
    """Runs the call forward and backward and judges the result and the gradients of input and bias."""
    rows = input.numel() // max(input.shape[-1], 1)
    runs_as = mode if mode != "auto" else ("w8a16" if rows <= FEW_ROWS else "w8a8")
    quantized = oracles.quantize_int8(input) if runs_as == "w8a8" and rows else None

    def oracle(input, bias=None, *, precision):
        return oracles.int8_linear(
            input, weight, weight_scale, bias, activation, quantized=quantized, precision=precision
        )

    def twin(input, bias=None):
        return call(input, weight, weight_scale, bias, activation=activation, mode=mode)

    output = check(twin, oracle, *((input,) if bias is None else (input, bias)), **how)
    assert output.dtype == input.dtype
    assert output.device == input.device
    return output


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
    q, input = integers_of(35, 70, device)
    weight, _ = weight_of(20, 70, device)
    output = F.int8_linear(input, weight, torch.ones(20, device=device), mode=mode)
    same_bits("product", output.cpu(), (q.cpu() @ weight.cpu().long().T).float())


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
    assert torch.equal(int8_linear.integer_product(q, weight).cpu().long(), expected)


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
    monkeypatch.setattr(int8_linear, "WIDENED_ELEMENTS", {"cpu": 100, "cuda": 100})
    with gptkern.backend("torch"):
        judge(*tensors_of(17, 31, 65, torch.float32, device), mode=mode)


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
    for call in (lambda: F.int8_linear(input, weight, weight_scale, bias), lambda: F.quantize_int8(input)):
        with pytest.raises(gptkern.BackendError, match="float64"):
            call()


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
    for dim in (0, 1):
        torch.library.opcheck(ops.quantize_int8_forward.default, (input, dim, backend))


@pytest.mark.parametrize(("mode", "activation"), [("auto", "gelu"), ("w8a16", None), ("w8a8", "gelu_tanh")])
def test_compiles_to_one_graph(backend, device, mode, activation):
    input, weight, weight_scale, bias = tensors_of(18, 31, 7, torch.float32, device)

    def layer(input, bias):
        return F.int8_linear(input, weight, weight_scale, bias, mode=mode, activation=activation)

    assert_compiles(layer, input, bias)


def test_quantize_compiles_to_one_graph(backend, device):
    input = torch.randn(5, 33, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.quantize_int8(x, 0), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(input), F.quantize_int8(input, 0)):
        same_bits("compiled", actual, expected)


def test_explained_without_running(backend, device):
    tensors = tensors_of(3, 5, 7, torch.float32, device)
    assert gptkern.explain(F.int8_linear, *tensors).backend == backend
    assert gptkern.explain(F.quantize_int8, tensors[0]).backend == backend


# --- quantize_int8 --------------------------------------------------------------------------------------------------


def judge_quantized(input, dim=-1):
    """Runs quantize_int8; its result is the oracle's to the bit, and within half a step of the input."""
    before = input.clone()
    q, scale = F.quantize_int8(input, dim)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert q.is_contiguous() and scale.is_contiguous()
    expected_q, expected_scale = oracles.quantize_int8(input, dim)
    same_bits("scale", scale.cpu(), expected_scale)
    same_bits("q", q.cpu(), expected_q)
    step = scale.double().unsqueeze(dim)
    # a little more than half: the quotient was rounded before it was rounded to an integer
    assert ((q.double() * step - input.double()).abs() <= (0.5 + 1e-5) * step).all()
    same_bits("input", input, before)
    return q, scale


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    "shape", [(1,), (5,), (1, 1), (3, 129), (65, 16), (2, 1100), (2, 3, 65), (2, 20_000), (1, 60_000)], ids=str
)
def test_quantize(backend, device, shape, dtype):
    judge_quantized(guarded(torch.randn(shape, device=device).to(dtype)))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_quantize_along_any_dimension(backend, device, dim):
    _, scale = judge_quantized(guarded(torch.randn(3, 17, 5, device=device)), dim)
    assert scale.shape == tuple(size for d, size in enumerate((3, 17, 5)) if d != dim % 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantize_strides(backend, device, layout):
    for dim in (-1, 0):
        judge_quantized(layout(torch.randn(3, 6, 33, device=device)), dim)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_quantize_halves_to_even(backend, device, dtype):
    halves = torch.arange(-126.5, 127)
    row = torch.cat([torch.tensor([127.0]), halves]).to(device=device, dtype=dtype)
    q, scale = judge_quantized(row)
    assert scale == 1
    assert (q[1:] % 2 == 0).all()
    judge_quantized(-row * 2)
    judge_quantized(row / 4)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_quantize_extremes(backend, device, dtype):
    input = torch.randn(9, 33, device=device).to(dtype)
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    input[0] = 0
    input[1, 1:], input[1, 0] = 0, -largest
    input[2] = largest
    input[3] = tiny
    input[4] = -tiny
    input[5] *= tiny  # subnormal numbers among them
    input[6] = tiny * torch.finfo(dtype).eps  # the smallest number that there is
    input[7] = -0.0
    input[8, ::2] = 0
    q, scale = judge_quantized(input)
    assert scale[0] == 1 and scale[7] == 1
    assert not q[0].any() and not q[7].any()
    assert (scale > 0).all() and scale.isfinite().all()


def test_quantize_never_gives_minus_128(backend, device):
    q, _ = judge_quantized(-torch.rand(5, 33, device=device))
    assert q.min() == -127


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_quantize_a_row_that_is_not_finite(backend, device, poison):
    input = torch.randn(5, 33, device=device)
    expected_q, expected_scale = oracles.quantize_int8(input)
    input[2, 7] = poison
    q, scale = (result.cpu() for result in F.quantize_int8(input))
    assert scale[2].isnan() if poison != poison else scale[2] == torch.inf
    others = [0, 1, 3, 4]
    same_bits("scale", scale[others], expected_scale[others])
    same_bits("q", q[others], expected_q[others])


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), -1), ((2, 0, 5), -1), ((2, 0, 5), 0)])
def test_quantize_nothing(backend, device, shape, dim):
    q, scale = F.quantize_int8(torch.ones(shape, device=device), dim)
    assert q.shape == shape and q.dtype == torch.int8
    assert scale.shape == torch.ones(shape).sum(dim).shape and scale.dtype == torch.float32


def test_quantize_float64_on_pytorch(device):
    with gptkern.backend("torch"):
        judge_quantized(torch.randn(5, 33, device=device, dtype=torch.float64))


def test_quantize_everything_is_written(kernel_backend, device, poisoned_memory):
    for shape in ((1, 1), (17, 33), (3, 1100)):
        judge_quantized(torch.randn(shape, device=device))
        judge_quantized(torch.randn(shape, device=device), 0)


def test_quantize_gives_no_gradient(backend, device):
    q, scale = F.quantize_int8(torch.randn(3, 5, device=device, requires_grad=True))
    assert not q.requires_grad and not scale.requires_grad


@pytest.mark.deep
@settings(PROPERTY, max_examples=20)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dim=st.integers(-1, 0),
    dtype=st.sampled_from(KERNEL_DTYPES),
    exponent=st.integers(-14, 12),
)
def test_quantize_any_shape(backend, device, shape, dim, dtype, exponent):
    judge_quantized((torch.randn(shape, device=device) * 2.0**exponent).to(dtype), dim)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: F.quantize_int8(x, 2), IndexError, ("dim", "2")),
        (lambda x: F.quantize_int8(x, -3), IndexError, ("dim", "-3")),
        (lambda x: F.quantize_int8(x.sum()), IndexError, ("dim",)),
        (lambda x: F.quantize_int8(x.long()), RuntimeError, ("input", "int64", "floating")),
        (lambda x: F.quantize_int8(x.to(torch.complex64)), RuntimeError, ("input", "complex64", "floating")),
        (lambda x: F.quantize_int8([1.0]), TypeError, ("input", "list", "ensor")),
        (lambda x: F.quantize_int8(None), TypeError, ("input", "None", "ensor")),
    ],
    ids=["dim 2", "dim -3", "no dimension", "integer", "complex", "list", "None"],
)
def test_quantize_mistakes(backend, device, call, error, words):
    raised = raised_by(call, torch.ones(3, 5, device=device))
    assert type(raised) is error, repr(raised)
    for word in words:
        assert word in str(raised), str(raised)
