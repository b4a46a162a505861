"""rms_norm: what it takes: strides, frozen inputs, autocast, PyTorch's errors, registered ops, compile; nn.RMSNorm."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional
from checking import Watched, assert_compiles, raised_by
from layouts import LAYOUTS, of_own_strides
from rms_norm_calls import SIXTEEN_BITS, check, tensors_of
from simulated_gpus import H200, simulate
from torch._subclasses.fake_tensor import FakeTensorMode

import gptkern
from gptkern import functional as F
from gptkern import nn

# --- Memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strides(backend, device, layout, dtype):
    input, weight = tensors_of(15, 33, dtype, device)
    input = input.view(3, 5, 33)
    check((layout(input), weight))
    check((input, weight), grad=layout(torch.randn(3, 5, 33, device=device).to(dtype)))


@pytest.mark.parametrize("width", [33, 32])
def test_every_operand_has_strides_of_its_own(kernel_backend, device, width):
    grad = torch.randn(15, width, device=device)
    input, weight, grad = of_own_strides(
        *tensors_of(15, width, torch.float32, device), grad, step=1 if width % 4 else 4
    )
    check((input, weight), grad=grad)


def test_every_operand_of_wide_rows_has_strides_of_its_own(triton_backend, device, monkeypatch):
    from gptkern.operators.rms_norm import triton as kernels

    monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
    monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)
    tensors = *tensors_of(3, 33, torch.float32, device), torch.randn(3, 33, device=device)
    input, weight, grad = of_own_strides(*tensors)
    check((input, weight), grad=grad)


# The CUDA kernels keep these in shared memory, or walk them in chunks: rows that begin anywhere, and aligned ones.
@pytest.mark.parametrize("width", [6201, 32_776])
def test_strides_of_wide_rows_on_cuda(cuda_backend, device, width):
    tensors = *tensors_of(3, width, torch.bfloat16, device), torch.randn(3, width, device=device).bfloat16()
    input, weight, grad = of_own_strides(*tensors, step=1 if width % 8 else 8)
    check((input, weight), grad=grad)


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
    simulate(monkeypatch, (H200.name, (9, 0)))
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
    "eps is a bias": (lambda f, x, w: f(x, (5,), w, torch.zeros_like(w)), ("eps", "(5,)", "float", "bias")),
    "eps is a parameter": (lambda f, x, w: f(x, (5,), w, torch.nn.Parameter(w.sum())), ("eps", "()", "float")),
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


def test_a_bias_is_named(backend, device):
    x, w = X.to(device), W.to(device)
    for arguments in ((w, w), (None, w.double())):
        error = raised_by(F.rms_norm, x, (5,), *arguments)
        assert type(error) is TypeError and "eps is a Tensor of shape (5,)" in str(error) and "no bias" in str(error)


def test_every_argument_by_name_and_by_place(backend, device):
    input, weight = tensors_of(3, 5, torch.float32, device)
    by_place = F.rms_norm(input, [5], weight, 0.1)
    by_name = F.rms_norm(input=input, normalized_shape=(5,), weight=weight, eps=0.1)
    assert torch.equal(by_place, by_name)
    torch.testing.assert_close(by_place, torch.nn.functional.rms_norm(input, [5], weight, 0.1))


@pytest.mark.parametrize("size", [np.int64(4), np.prod([4], dtype=np.uint8), np.array(4), torch.tensor(4)], ids=repr)
@pytest.mark.parametrize("eps", [np.float32(0.25), np.float16(0.25), np.int64(1), torch.tensor(0.25), True], ids=repr)
def test_numbers_of_numpy_and_tensors_of_one(backend, device, size, eps):
    input = torch.randn(2, 3, 4, device=device)
    for shape in ((size,), [np.int32(3), size]):
        expected = torch.nn.functional.rms_norm(input, [int(one) for one in shape], eps=float(eps))
        torch.testing.assert_close(torch.nn.functional.rms_norm(input, shape, eps=eps), expected)
        torch.testing.assert_close(F.rms_norm(input, shape, eps=eps), expected)


@pytest.mark.parametrize("size", [True, np.bool_(True), torch.tensor(1.0), np.float64(1), np.array([1]), "1"], ids=repr)
def test_what_is_no_size(backend, device, size):
    for function in (torch.nn.functional.rms_norm, F.rms_norm):
        assert isinstance(raised_by(function, torch.zeros(3, 1, device=device), [size]), TypeError)


@pytest.mark.parametrize("eps", [torch.ones(1), torch.tensor(1.0, requires_grad=True), np.array(1.0), 1j], ids=repr)
def test_what_is_no_eps(backend, device, eps):
    for function in (torch.nn.functional.rms_norm, F.rms_norm):
        error = raised_by(function, torch.zeros(3, 1, device=device), [1], eps=eps)
        assert isinstance(error, TypeError) and "eps" in str(error)


# --- The autograd.Function and its registered ops -------------------------------------------------------------------


def test_registered_ops(backend, device):
    forward, backward = torch.ops.gptkern.rms_norm_forward.default, torch.ops.gptkern.rms_norm_backward.default
    input, weight = tensors_of(5, 33, torch.bfloat16, device)
    residual = torch.randn(5, 33, device=device).bfloat16()
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for other, scale in ((residual, weight), (residual.float(), weight.float()), (None, weight), (None, None)):
        torch.library.opcheck(forward, (input, other, scale, 1e-5, backend), **tests)
        output, summed, rstd = forward(input, other, scale, 1e-5, backend)
        summed = input if other is None else summed
        grad_output, grad_summed = torch.randn_like(output), None if other is None else torch.randn_like(summed)
        kept, call = (grad_output, grad_summed, rstd), (summed, None, scale, 0.0, backend)
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
    gptkern.unswap(model)
    assert type(model[0]) is torch.nn.RMSNorm


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


def test_complex_numbers_are_pytorchs(device):
    input = torch.randn(3, 8, dtype=torch.complex64, device=device)
    torch.testing.assert_close(F.rms_norm(input, (8,)), torch.nn.functional.rms_norm(input, (8,)))
    with gptkern.backend("torch:launchers"), pytest.raises(gptkern.BackendError, match="complex64"):
        F.rms_norm(input, (8,))
