"""quantize_int8 against its oracle, bit for bit, on every backend."""

from __future__ import annotations

import oracle_quantize_int8
import pytest
import torch
from checking import raised_by, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_linear_calls import KERNEL_DTYPES, PROPERTY
from layouts import LAYOUTS, guarded

import gptkern
from gptkern import functional as F


def judge_quantized(input, dim=-1):
    """Runs quantize_int8; its result is the oracle's to the bit, and within half a step of the input."""
    before = input.clone()
    q, scale = F.quantize_int8(input, dim)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert q.is_contiguous() and scale.is_contiguous()
    expected_q, expected_scale = oracle_quantize_int8.quantize_int8(input, dim)
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
    expected_q, expected_scale = oracle_quantize_int8.quantize_int8(input)
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


def test_quantize_float64_has_no_kernels(kernel_backend, device):
    with pytest.raises(gptkern.BackendError, match="float64"):
        F.quantize_int8(torch.randn(3, 5, device=device, dtype=torch.float64))


@pytest.mark.parametrize("dim", [0, 1])
def test_quantize_registered_op(backend, device, dim):
    input = guarded(torch.randn(3, 31, device=device).bfloat16())
    torch.library.opcheck(torch.ops.gptkern.quantize_int8_forward.default, (input, dim, backend))


def test_quantize_compiles_to_one_graph(backend, device):
    input = torch.randn(5, 33, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.quantize_int8(x, 0), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(input), F.quantize_int8(input, 0)):
        same_bits("compiled", actual, expected)


def test_quantize_explained_without_running(backend, device):
    assert gptkern.explain(F.quantize_int8, torch.randn(3, 5, device=device)).backend == backend


@pytest.mark.parametrize(
    "of, words",
    [
        (lambda x: torch.nested.as_nested_tensor([x, x[:1]], layout=torch.jagged), "nested tensor (torch.jagged)"),
        (lambda x: torch.nested.as_nested_tensor([x, x[:1]]), "nested tensor (torch.strided)"),
        (lambda x: x.to_sparse(), "sparse tensor (torch.sparse_coo)"),
    ],
)
def test_an_input_that_is_not_dense(backend, device, of, words):
    with pytest.raises(RuntimeError) as raised:
        F.quantize_int8(of(torch.randn(3, 8, device=device)))
    assert str(raised.value).startswith("quantize_int8: input ") and words in str(raised.value)
