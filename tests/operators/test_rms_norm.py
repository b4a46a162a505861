"""rms_norm against its oracle, on every backend; then everything else that its docstring promises."""

from __future__ import annotations

import copy
import itertools
import pickle

import oracles
import pytest
import torch
import torch.nn.functional
from checking import Watched, assert_compiles, raised_by
from checking import check as check_against
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, every_other_row, guarded, strided_rows
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
from gptkern import functional as F
from gptkern import nn
from gptkern.autograd import RMSNormFunction

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIXTEEN_BITS = [torch.float16, torch.bfloat16]

# Widths and rows just below, at and above what tiles are made of; many rows of little width, one long row.
SHAPES = [(1, 1), (17, 1), (3, 3), (257, 3), (65, 16), (16, 64), (17, 65), (3, 1000), (2, 1025)]

# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


# --- How a call is judged -------------------------------------------------------------------------------------------


def tensors_of(rows, width, dtype, device, *, weight=True, parameter=None):
    """(input, weight), None where it is not wanted, with memory around them that is NaN."""
    input = guarded(torch.randn(rows, width, device=device).add(0.5).to(dtype))
    if not weight:
        return input, None
    return input, guarded(torch.randn(width, device=device).add(1.0).to(parameter or dtype))


def default_eps(dtype):
    """What None stands for: of 16-bit input too, PyTorch computes in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def check(tensors, *, normalized_shape=None, eps=1e-5, grad=None, need=(True, True), call=None):
    """Runs the call forward and backward and judges the result and every gradient."""
    input = tensors[0]
    shape = normalized_shape or (input.shape[-1],)

    def ours(input, weight=None):
        if call is not None:
            return call(input, weight, eps)
        return F.rms_norm(input, shape, weight, eps)

    def oracle(input, weight=None, *, precision):
        added = default_eps(tensors[0].dtype) if eps is None else eps
        return oracles.rms_norm(input, shape, weight, added, precision=precision)

    present = [tensor for tensor in tensors if tensor is not None]
    output = check_against(ours, oracle, *present, grad_output=grad, need=need[: len(present)])
    assert (output.shape, output.dtype, output.device) == (input.shape, input.dtype, input.device)
    return output


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
@pytest.mark.parametrize(("rows", "width"), [(5, 17), (2, 64), (19, 33)])
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


# --- Memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strides(backend, device, layout, dtype):
    input, weight = tensors_of(15, 33, dtype, device)
    input = input.view(3, 5, 33)
    check((layout(input), weight))
    check((input, weight), grad=layout(torch.randn(3, 5, 33, device=device).to(dtype)))


def test_strides_of_the_weight(backend, device):
    input, weight = tensors_of(5, 33, torch.float32, device)
    every_second = torch.full((66,), torch.nan, device=device)[::2]
    check((input, every_second.copy_(weight)))
    check((input, weight.flip(0)))
    check((input, torch.full((1,), 1.5, device=device).expand(33)))


@pytest.mark.parametrize("width", [32, 33])
def test_gradient_of_a_sum_is_one_number_expanded(backend, device, width):
    input, weight = tensors_of(5, width, torch.float32, device)
    check((input, weight), grad=torch.ones((), device=device).expand(5, width))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0, 0)])
def test_nothing_to_normalise(backend, device, shape):
    width = shape[-1]
    input, weight = (torch.ones(s, device=device, requires_grad=True) for s in (shape, (width,)))
    output = F.rms_norm(input, (width,), weight)
    assert output.shape == shape
    output.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)) and input.grad.shape == shape


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


# --- Autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [(True, False), (False, True)])
@pytest.mark.parametrize("width", [32, 33])
def test_only_what_requires_grad_gets_one(backend, device, need, width):
    check(tensors_of(19, width, torch.float32, device), need=need)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_nothing_is_computed_that_nobody_asked_for(kernel_backend, device, need):
    leaves = [t.requires_grad_(n) for t, n in zip(tensors_of(5, 33, torch.float32, device), need)]
    output = F.rms_norm(leaves[0], (33,), leaves[1])
    with Watched() as watched:
        output.sum().backward()
    ((_, result),) = watched.calls
    assert [tensor.numel() > 0 for tensor in result] == list(need)


def test_without_gradients_nothing_is_recorded(backend, device):
    input, weight = tensors_of(3, 5, torch.float32, device)
    assert not F.rms_norm(input, (5,), weight).requires_grad
    with torch.no_grad():
        assert not F.rms_norm(input.requires_grad_(), (5,), weight).requires_grad


def test_backward_twice_adds_the_same_again(backend, device):
    leaves = [tensor.requires_grad_() for tensor in tensors_of(5, 33, torch.float32, device)]
    loss = F.rms_norm(leaves[0], (33,), leaves[1]).square().sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    assert all(torch.equal(2 * first, leaf.grad) for first, leaf in zip(once, leaves))


def test_writing_into_what_the_backward_needs_is_an_error(backend, device):
    input, weight = tensors_of(5, 33, torch.float32, device)
    output = F.rms_norm(input, (33,), weight.requires_grad_())
    input.add_(1)
    if backend == "torch":  # PyTorch has kept its own x_hat
        return output.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_second_derivative_is_refused(kernel_backend, device):
    tensors = tensors_of(5, 33, torch.float32, device)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = F.rms_norm(leaves[0], (33,), leaves[1], 1e-5)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    # the first derivative is there, and right
    again = [tensor.detach().requires_grad_() for tensor in tensors]
    F.rms_norm(again[0], (33,), again[1], 1e-5).backward(2 * output.detach())
    assert all(torch.equal(gradient, leaf.grad) for gradient, leaf in zip(first, again))
    with pytest.raises(NotImplementedError, match="rms_norm has no second derivative"):
        first[0].sum().backward()


def test_second_derivative_on_the_torch_backend(device):
    with gptkern.backend("torch"):
        leaves = [t.double().requires_grad_() for t in tensors_of(2, 3, torch.float32, device)]
        assert torch.autograd.gradgradcheck(lambda x, w: F.rms_norm(x, (3,), w, 1e-5), leaves, atol=1e-4)


# --- Autocast, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_dtype", SIXTEEN_BITS)
@pytest.mark.parametrize(
    ("dtype", "parameter"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_autocast_as_pytorch(backend, device, dtype, parameter, autocast_dtype):
    input, weight = (t.requires_grad_() for t in tensors_of(5, 33, dtype, device, parameter=parameter))
    with torch.autocast(device, dtype=autocast_dtype):
        ours, theirs = F.rms_norm(input, (33,), weight), torch.nn.functional.rms_norm(input, (33,), weight)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert (input.grad.dtype, weight.grad.dtype) == (dtype, parameter)


def test_autocast_on_a_gpu_as_pytorch(monkeypatch):
    """CUDA's autocast runs rms_norm in float32. The tensors have no memory: no GPU is needed."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gptkern.backends.dispatch, "_uncovered", lambda *call: None)
    was_on = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), gptkern.backend("triton"):
            input, weight = torch.ones(3, 5, dtype=torch.bfloat16, device="cuda"), torch.ones(5, device="cuda")
            assert torch.nn.functional.rms_norm(input, (5,), weight).dtype == torch.float32
            with Watched() as watched:
                assert F.rms_norm(input, (5,), weight).dtype == torch.float32
        assert watched.names == ["rms_norm_forward"]
    finally:
        torch.set_autocast_enabled("cuda", was_on)


X, W = torch.ones(3, 5), torch.ones(5)

# what is wrong -> the call, and what the message says: the argument, what it got, what it needs
BAD_CALLS = {
    "input is a list": (lambda f, x, w: f([1.0, 2.0], (2,)), ("input", "list", "Tensor")),
    "input is None": (lambda f, x, w: f(None, (2,)), ("input", "NoneType", "Tensor")),
    "input is an array": (lambda f, x, w: f(x.cpu().numpy(), (5,)), ("input", "ndarray", "Tensor")),
    "shape is an int": (lambda f, x, w: f(x, 5), ("normalized_shape", "int", "tuple")),
    "shape is None": (lambda f, x, w: f(x, None), ("normalized_shape", "None", "tuple")),
    "shape is a string": (lambda f, x, w: f(x, "5"), ("normalized_shape", "str", "tuple")),
    "shape holds a float": (lambda f, x, w: f(x, (5.0,)), ("normalized_shape", "float", "int")),
    "shape holds a bool": (lambda f, x, w: f(x, (True,)), ("normalized_shape", "bool", "int")),
    "shape is empty": (lambda f, x, w: f(x, ()), ("normalized_shape", "empty", "at least one")),
    "shape is another": (lambda f, x, w: f(x, (4,)), ("input", "(3, 5)", "(4,)")),
    "shape is too long": (lambda f, x, w: f(x, (2, 3, 5)), ("input", "(3, 5)", "(2, 3, 5)")),
    "input has no dimension": (lambda f, x, w: f(x.sum(), (1,)), ("input", "()", "(1,)")),
    "input is integer": (lambda f, x, w: f(x.long(), (5,)), ("int64", "floating-point")),
    "input is bool": (lambda f, x, w: f(x.bool(), (5,), w), ("bool", "floating-point")),
    "weight is a list": (lambda f, x, w: f(x, (5,), [1.0] * 5), ("weight", "list", "Tensor")),
    "weight is a number": (lambda f, x, w: f(x, (5,), 1.0), ("weight", "float", "Tensor")),
    "weight is too short": (lambda f, x, w: f(x, (5,), w[:4]), ("weight", "(4,)", "(5,)")),
    "weight has two dimensions": (lambda f, x, w: f(x, (5,), w[None]), ("weight", "(1, 5)", "(5,)")),
    "weight is on another device": (lambda f, x, w: f(x, (5,), w.to("meta")), ("weight", "meta", "cpu|cuda")),
    "eps is a string": (lambda f, x, w: f(x, (5,), w, "1e-5"), ("eps", "str", "float")),
    "eps is a list": (lambda f, x, w: f(x, (5,), w, [1e-5]), ("eps", "list", "float")),
    "an argument too many": (lambda f, x, w: f(x, (5,), w, 1e-5, None), ()),
    "an argument of another name": (lambda f, x, w: f(x, (5,), bias=w), ()),
}


@pytest.mark.parametrize("mistake", BAD_CALLS)
def test_mistakes_raise_what_pytorch_raises(backend, device, mistake):
    call, words = BAD_CALLS[mistake]
    theirs = raised_by(call, torch.nn.functional.rms_norm, X.to(device), W.to(device))
    ours = raised_by(call, F.rms_norm, X.to(device), W.to(device))
    assert type(ours) is type(theirs), f"{ours!r}; PyTorch: {theirs!r}"
    if backend != "torch":  # there it is PyTorch's own message
        for alternatives in words:
            assert any(word in str(ours) for word in alternatives.split("|")), str(ours)


def test_every_argument_by_name_and_by_place(backend, device):
    input, weight = tensors_of(3, 5, torch.float32, device)
    by_place = F.rms_norm(input, [5], weight, 0.1)
    by_name = F.rms_norm(input=input, normalized_shape=(5,), weight=weight, eps=0.1)
    assert torch.equal(by_place, by_name)
    torch.testing.assert_close(by_place, torch.nn.functional.rms_norm(input, [5], weight, 0.1))


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


def test_registered_ops(backend, device):
    forward, backward = torch.ops.gptkern.rms_norm_forward.default, torch.ops.gptkern.rms_norm_backward.default
    input, weight = tensors_of(5, 33, torch.bfloat16, device)
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for scale in (weight, weight.float(), None):
        torch.library.opcheck(forward, (input, scale, 1e-5, backend), **tests)
        output, rstd = forward(input, scale, 1e-5, backend)
        kept, call = (torch.randn_like(output), rstd), (input, scale, 0.0, backend)
        torch.library.opcheck(backward, (*kept, True, scale is not None, *call), **tests)
        tests = {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(backward, (*kept, False, scale is not None, *call), **tests)


def test_compiles_to_one_graph(backend, device):
    assert_compiles(lambda x, w: F.rms_norm(x, (33,), w), *tensors_of(5, 33, torch.float32, device))


def test_explained_without_running(backend, device):
    input, weight = tensors_of(3, 5, torch.float32, device)
    for function in (F.rms_norm, torch.nn.functional.rms_norm, torch.rms_norm):
        assert gptkern.explain(function, input, (5,), weight).backend == backend


# --- torch.nn.RMSNorm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(normalized_shape=33),
        dict(normalized_shape=33, eps=0.25),
        dict(normalized_shape=(3, 11), elementwise_affine=False),
    ],
    ids=["default", "eps", "several dimensions, no weight"],
)
def test_module_as_pytorch(backend, device, arguments):
    ours, theirs = nn.RMSNorm(**arguments, device=device), torch.nn.RMSNorm(**arguments, device=device)
    assert isinstance(ours, torch.nn.RMSNorm) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    input = torch.randn(4, 3, 11 if isinstance(arguments["normalized_shape"], tuple) else 33, device=device)
    torch.testing.assert_close(ours(input), theirs(input))
    torch.testing.assert_close(ours(x=input), theirs(x=input))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is nn.RMSNorm
        assert torch.equal(copied(input), ours(input))


def test_module_is_swapped_and_brought_back(backend, device):
    model = torch.nn.Sequential(torch.nn.RMSNorm(33), torch.nn.Linear(33, 33)).to(device)
    input = torch.randn(4, 33, device=device)
    expected = model(input)
    report = gptkern.swap(model)
    assert type(model[0]) is nn.RMSNorm
    assert [(entry.name, entry.operator) for entry in report.replaced] == [("0", "rms_norm")]
    torch.testing.assert_close(model(input), expected)
    assert type(gptkern.unswap(model)[0]) is torch.nn.RMSNorm


class CallsInline(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:])


def test_inline_calls_are_routed(kernel_backend, device):
    input = torch.randn(4, 33, device=device)
    model = CallsInline()
    calls = [lambda: torch.nn.functional.rms_norm(input, (33,)), lambda: torch.rms_norm(input, (33,))]
    with Watched() as watched, gptkern.kernels():
        for call in calls:
            call()
    assert watched.names == ["rms_norm_forward"] * 2
    assert gptkern.swap(model).replaced[0].operator == "rms_norm"
    with Watched() as watched:
        model(input)
    assert watched.names == ["rms_norm_forward"]
