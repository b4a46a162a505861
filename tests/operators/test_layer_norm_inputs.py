"""layer_norm: what it takes: strides, frozen inputs, autocast, PyTorch's errors, registered ops, compiled code."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional
from checking import Watched, raised_by
from layer_norm_calls import check, leaves_of, refuses_float64, tensors_of, twin
from layouts import LAYOUTS, of_own_strides

import gptkern
from gptkern import functional as F

# --- Memory layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strides_of_the_tensors(backend, device, layout, dtype):
    flat = tensors_of(15, 33, dtype, device, residual=True)
    input, residual = (t.view(3, 5, 33) for t in flat[:2])
    check((layout(input), None, *flat[2:]))
    check((layout(input), residual, *flat[2:]))
    check((input, layout(residual), *flat[2:]))
    grad_y, grad_s = torch.randn(2, 3, 5, 33, device=device).to(dtype)
    check((input, None, *flat[2:]), grads=[layout(grad_y)])
    check((input, residual, *flat[2:]), grads=[layout(grad_y), layout(grad_s)])
    check((input, residual, *flat[2:]), grads=[None, layout(grad_s)])


@pytest.mark.parametrize("width", [33, 32])
def test_every_operand_has_strides_of_its_own(kernel_backend, device, width):
    tensors = tensors_of(15, width, torch.float32, device, residual=True)
    grads = torch.randn(2, 15, width, device=device)
    *tensors, grad_y, grad_s = of_own_strides(*tensors, *grads, step=1 if width % 4 else 4)
    check(tensors, grads=[grad_y, grad_s])


def test_every_operand_of_wide_rows_has_strides_of_its_own(triton_backend, device, monkeypatch):
    from gptkern.operators.layer_norm import triton as kernels

    monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
    monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)
    tensors = tensors_of(3, 33, torch.float32, device, residual=True)
    *tensors, grad_y, grad_s = of_own_strides(*tensors, *torch.randn(2, 3, 33, device=device))
    check(tensors, grads=[grad_y, grad_s])


# The CUDA kernels walk these in chunks, forward and backward: rows that begin anywhere, and aligned ones.
@pytest.mark.parametrize("width", [6201, 32_776])
def test_strides_of_wide_rows_on_cuda(cuda_backend, device, width):
    input, residual, *parameters = tensors_of(3, width, torch.bfloat16, device, residual=True)
    grads = torch.randn(2, 3, width, device=device).to(torch.bfloat16)
    input, residual, *grads = of_own_strides(input, residual, *grads, step=1 if width % 8 else 8)
    check((input, None, *parameters), grads=grads[:1])
    check((input, residual, *parameters), grads=grads)


def test_strides_of_the_parameters(backend, device):
    input, _, weight, bias = tensors_of(5, 33, torch.float32, device)
    every_second = torch.full((66,), torch.nan, device=device)[::2]
    check((input, None, every_second.clone().copy_(weight), bias))
    check((input, None, every_second.copy_(weight), bias.flip(0)))
    check((input, None, torch.full((1,), 1.5, device=device).expand(33), torch.zeros(1, device=device).expand(33)))


def test_gradient_of_a_sum_is_one_number_expanded(backend, device):
    leaves = leaves_of(tensors_of(5, 33, torch.float32, device, residual=True))
    y, s = twin(*leaves, (33,), 1e-5)
    (y.sum() + 2 * s.sum()).backward()
    ones = torch.ones(5, 33, device=device)
    again, _ = check([t.detach() for t in leaves], grads=[ones, 2 * ones])
    for expanded, dense in zip(leaves, again):
        torch.testing.assert_close(expanded.grad, dense.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_nothing_to_normalise(backend, device, shape):
    width = shape[-1]
    tensors = [torch.ones(s, device=device) for s in (shape, shape, (width,), (width,))]
    for residual in (None, tensors[1]):
        leaves = leaves_of((tensors[0], residual, *tensors[2:]))
        outputs = twin(*leaves, (width,), 1e-5)
        assert all(output.shape == shape for output in outputs)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        for leaf in leaves:
            assert leaf is None or torch.equal(leaf.grad, torch.zeros_like(leaf))


# --- Autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:])
def test_only_what_requires_grad_gets_one(backend, device, needs):
    check(tensors_of(5, 33, torch.float32, device, residual=True), needs_grad=needs)
    if needs[0] or needs[2] or needs[3]:
        check(tensors_of(5, 33, torch.float32, device), needs_grad=needs)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_nothing_is_computed_that_nobody_asked_for(kernel_backend, device, needs):
    leaves = leaves_of(tensors_of(5, 33, torch.float32, device), (needs[0], False, *needs[1:]))
    (output,) = twin(*leaves, (33,), 1e-5)
    with Watched() as watched:
        output.sum().backward()
    ((_, result),) = watched.calls
    assert [tensor.numel() > 0 for tensor in result] == list(needs)


def test_without_gradients_nothing_is_recorded(backend, device):
    tensors = tensors_of(3, 5, torch.float32, device, residual=True)
    assert not any(output.requires_grad for output in twin(*tensors, (5,), 1e-5))
    with torch.no_grad():
        assert not any(output.requires_grad for output in twin(*leaves_of(tensors), (5,), 1e-5))


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, False, True, False), (False, True, False, False)])
def test_arguments_and_incoming_gradients_are_not_written(backend, device, needs):
    tensors = tensors_of(5, 33, torch.float32, device, residual=True)
    grads = list(torch.randn(2, 5, 33, device=device))
    before = [t.clone() for t in (*tensors, *grads)]
    leaves = leaves_of(tensors, needs)
    outputs = twin(*leaves, (33,), 1e-5)
    kept = [output.detach().clone() for output in outputs]
    if outputs[1].requires_grad:
        torch.autograd.backward(outputs, grads)
    else:
        outputs[0].backward(grads[0])
    for leaf in leaves:  # what accumulates into a gradient must not reach what it was made from
        if leaf.grad is not None:
            leaf.grad.add_(1000)
    assert all(map(torch.equal, (*tensors, *grads, *outputs), (*before, *kept)))


def test_backward_twice_adds_the_same_again(backend, device):
    leaves = leaves_of(tensors_of(5, 33, torch.float32, device, residual=True))
    y, s = twin(*leaves, (33,), 1e-5)
    loss = (y * y).sum() + (s * y).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    assert all(torch.equal(2 * first, leaf.grad) for first, leaf in zip(once, leaves))


@pytest.mark.parametrize("residual", [False, True])
def test_writing_into_what_the_backward_needs_is_an_error(backend, device, residual):
    leaves = leaves_of(tensors_of(5, 33, torch.float32, device, residual=residual), (False, False, True, False))
    outputs = twin(*leaves, (33,), 1e-5)
    (outputs[1] if residual else leaves[0]).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("residual", [False, True])
def test_second_derivative_is_refused(kernel_backend, device, residual):
    tensors = tensors_of(5, 33, torch.float32, device, residual=residual)
    leaves = leaves_of(tensors)
    output = twin(*leaves, (33,), 1e-5)[0]
    present = [leaf for leaf in leaves if leaf is not None]
    first = torch.autograd.grad(output.square().sum(), present, create_graph=True)
    # the first derivative is there, and right
    checked, _ = check(tensors, grads=[2 * output.detach(), None][: 1 + residual])
    for gradient, leaf in zip(first, (leaf for leaf in checked if leaf is not None)):
        assert torch.equal(gradient, leaf.grad)
    with pytest.raises(NotImplementedError, match="layer_norm has no second derivative"):
        first[0].sum().backward()


def test_second_derivative_on_the_torch_backend(device):
    with gptkern.backend("torch"):
        input, residual, weight, bias = leaves_of(
            t.double() for t in tensors_of(2, 3, torch.float32, device, residual=True)
        )
        assert torch.autograd.gradgradcheck(lambda *t: twin(*t, (3,), 1e-5), (input, residual, weight, bias), atol=1e-4)


# --- Autocast, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
def test_autocast_as_pytorch(backend, device, dtype, parameters, autocast_dtype):
    input, residual, weight, bias = leaves_of(tensors_of(5, 33, dtype, device, parameters=parameters, residual=True))
    if refuses_float64(backend, input, None, weight, bias):
        return
    with torch.autocast(device, dtype=autocast_dtype):
        ours = F.layer_norm(input, (33,), weight, bias)
        theirs = torch.nn.functional.layer_norm(input, (33,), weight, bias)
        normalised, summed = F.layer_norm(input, (33,), weight, bias, residual=residual)
    assert ours.dtype == theirs.dtype == normalised.dtype
    assert summed.dtype == dtype, "autocast leaves an addition alone"
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert [t.grad.dtype for t in (input, weight, bias)] == [t.dtype for t in (input, weight, bias)]


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
    "shape is empty": (lambda f, x, w: f(x, ()), ("normalized_shape", "empty|[]|()", "at least one|1-dim")),
    "shape is another": (lambda f, x, w: f(x, (4,)), ("input", "(3, 5)|[3, 5]", "(4,)|[4]")),
    "shape is too long": (lambda f, x, w: f(x, (2, 3, 5)), ("input", "(3, 5)|[3, 5]", "(2, 3, 5)|[2, 3, 5]")),
    "input has no dimension": (lambda f, x, w: f(x.sum(), (1,)), ("input", "()|[]", "(1,)|[1]")),
    "input is integer": (lambda f, x, w: f(x.long(), (5,)), ("int64|Long",)),
    "input is bool": (lambda f, x, w: f(x.bool(), (5,)), ("bool|Bool",)),
    "input is complex": (lambda f, x, w: f(x.to(torch.complex64), (5,)), ("complex64|ComplexFloat",)),
    "integer input, float weight": (lambda f, x, w: f(x.long(), (5,), w), ()),
    "weight is a list": (lambda f, x, w: f(x, (5,), [1.0] * 5), ("weight", "list", "Tensor")),
    "bias is a number": (lambda f, x, w: f(x, (5,), w, 1.0), ("bias", "float", "Tensor")),
    "weight is too short": (lambda f, x, w: f(x, (5,), w[:4]), ("weight", "(4,)|[4]", "(5,)|[5]")),
    "weight has two dimensions": (lambda f, x, w: f(x, (5,), w[None]), ("weight", "(1, 5)|[1, 5]", "(5,)|[5]")),
    "bias is too long": (lambda f, x, w: f(x, (5,), None, x.new_ones(6)), ("bias", "(6,)|[6]", "(5,)|[5]")),
    "eps is a string": (lambda f, x, w: f(x, (5,), w, w, "1e-5"), ("eps", "str", "float")),
    "eps is None": (lambda f, x, w: f(x, (5,), w, w, None), ("eps", "None", "float")),
    "weight is on another device": (lambda f, x, w: f(x, (5,), w.to("meta")), ("meta", "cpu|cuda")),
    "bias is on another device": (lambda f, x, w: f(x, (5,), w, w.to("meta")), ("meta", "cpu|cuda")),
    "weight alone is float64": (lambda f, x, w: f(x, (5,), w.double()), ()),
    "bias alone is bfloat16": (lambda f, x, w: f(x, (5,), None, w.bfloat16()), ()),
    "float64 input, float32 weight": (lambda f, x, w: f(x.double(), (5,), w), ()),
    "float16 input, float64 weight": (lambda f, x, w: f(x.half(), (5,), w.double()), ()),
    "float16 input, bfloat16 bias": (lambda f, x, w: f(x.half(), (5,), None, w.bfloat16()), ()),
    "float16 input, parameters differ": (lambda f, x, w: f(x.half(), (5,), w, w.half()), ()),
    "bfloat16 input, parameters differ": (lambda f, x, w: f(x.bfloat16(), (5,), w.bfloat16(), w), ()),
}


@pytest.mark.parametrize("mistake", BAD_CALLS)
def test_mistakes_raise_what_pytorch_raises(backend, device, mistake):
    call, words = BAD_CALLS[mistake]
    theirs = raised_by(call, torch.nn.functional.layer_norm, X.to(device), W.to(device))
    ours = raised_by(call, F.layer_norm, X.to(device), W.to(device))
    if device == "cpu":
        assert type(ours) is type(theirs), f"{ours!r}; PyTorch: {theirs!r}"
    else:  # PyTorch looks at dtypes in another order there, and may raise NotImplementedError, which is a RuntimeError
        assert isinstance(theirs, type(ours)) or isinstance(ours, type(theirs)), f"{ours!r}; PyTorch: {theirs!r}"
    if backend != "torch":  # there it is PyTorch's own message
        for alternatives in words:
            assert any(word in str(ours) for word in alternatives.split("|")), str(ours)


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (lambda x: x[:2], ValueError, ("residual", "(2, 5)", "(3, 5)")),
        (lambda x: x[None], ValueError, ("residual", "(1, 3, 5)", "(3, 5)")),
        (lambda x: x.long(), ValueError, ("residual", "int64", "floating-point")),
        (lambda x: [1.0], TypeError, ("residual", "list", "Tensor")),
        (lambda x: 1.0, TypeError, ("residual", "float", "Tensor")),
        (lambda x: x.to("meta"), RuntimeError, ("residual|device", "meta", "cpu|cuda")),
    ],
    ids=["rows", "dimensions", "integer", "list", "number", "device"],
)
def test_mistakes_in_the_residual(backend, device, residual, error, words):
    x = X.to(device)
    with pytest.raises(error) as raised:
        F.layer_norm(x, (5,), residual=residual(x))
    assert type(raised.value) is error
    for alternatives in words:
        assert any(word in str(raised.value) for word in alternatives.split("|")), str(raised.value)


def test_the_residual_is_given_by_name(backend):
    with pytest.raises(TypeError):
        F.layer_norm(X, (5,), W, W, 1e-5, X)


def test_every_argument_by_name_and_by_place(backend, device):
    input, _, weight, bias = tensors_of(3, 5, torch.float32, device)
    by_place = F.layer_norm(input, [5], weight, bias, 0.1)
    by_name = F.layer_norm(input=input, normalized_shape=(5,), weight=weight, bias=bias, eps=0.1)
    assert torch.equal(by_place, by_name)
    torch.testing.assert_close(by_place, torch.nn.functional.layer_norm(input, [5], weight, bias, 0.1))


@pytest.mark.parametrize("size", [np.int64(4), np.prod([4], dtype=np.uint8), np.array(4), torch.tensor(4)], ids=repr)
@pytest.mark.parametrize("eps", [np.float32(0.25), np.float16(0.25), np.int64(1), torch.tensor(0.25), True], ids=repr)
def test_numbers_of_numpy_and_tensors_of_one(backend, device, size, eps):
    input = torch.randn(2, 3, 4, device=device)
    for shape in ((size,), [np.int32(3), size]):
        expected = torch.nn.functional.layer_norm(input, [int(one) for one in shape], eps=float(eps))
        torch.testing.assert_close(torch.nn.functional.layer_norm(input, shape, eps=eps), expected)
        torch.testing.assert_close(F.layer_norm(input, shape, eps=eps), expected)
        torch.testing.assert_close(F.layer_norm(input, shape, eps=eps, residual=input * 0)[0], expected)


@pytest.mark.parametrize("size", [True, np.bool_(True), torch.tensor(1.0), np.float64(1), np.array([1]), "1"], ids=repr)
def test_what_is_no_size(backend, device, size):
    for function in (torch.nn.functional.layer_norm, F.layer_norm):
        assert isinstance(raised_by(function, torch.zeros(3, 1, device=device), [size]), TypeError)


@pytest.mark.parametrize("eps", [torch.ones(1), torch.tensor(1.0, requires_grad=True), np.array(1.0), 1j], ids=repr)
def test_what_is_no_eps(backend, device, eps):
    for function in (torch.nn.functional.layer_norm, F.layer_norm):
        error = raised_by(function, torch.zeros(3, 1, device=device), [1], eps=eps)
        assert isinstance(error, TypeError) and "eps" in str(error)


# --- The autograd.Function and its registered ops -------------------------------------------------------------------


def test_registered_ops(backend, device):
    input, residual, weight, bias = tensors_of(5, 33, torch.bfloat16, device, residual=True)
    forward, backward = torch.ops.gptkern.layer_norm_forward.default, torch.ops.gptkern.layer_norm_backward.default
    cases = [(residual, (weight, bias)), (residual.float(), (weight.float(), None)), (None, (None, None))]
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for other, (weight, bias) in cases:
        torch.library.opcheck(forward, (input, other, weight, bias, 1e-5, backend), **tests)
        output, summed, statistics = forward(input, other, weight, bias, 1e-5, backend)
        summed = input if other is None else summed
        grad_output, grad_summed = torch.randn_like(output), None if other is None else torch.randn_like(summed)
        kept, call = (grad_output, grad_summed, statistics), (summed, None, weight, None, 0.0, backend)
        torch.library.opcheck(backward, (*kept, True, weight is not None, bias is not None, *call), **tests)
        tests = {"test_utils": ("test_schema", "test_faketensor")}
        torch.library.opcheck(backward, (*kept, False, weight is not None, False, *call), **tests)


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_to_one_graph(backend, device, residual):
    tensors = tensors_of(5, 33, torch.float32, device, residual=residual)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for call in (twin, compiled):
        leaves = leaves_of(tensors)
        outputs = call(*leaves, (33,), 1e-5)
        sum(output.sin().sum() for output in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves if leaf is not None)])
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)


def test_explained_without_running(backend, device):
    input, _, weight, bias = tensors_of(3, 5, torch.float32, device)
    for function in (F.layer_norm, torch.nn.functional.layer_norm):
        assert gptkern.explain(function, input, (5,), weight, bias).backend == backend


@pytest.mark.parametrize(
    "of, words",
    [
        (lambda x: torch.nested.as_nested_tensor([x, x[:1]]), "input is a nested tensor (torch.strided)"),
        (lambda x: x.to_sparse(), "input is a sparse tensor (torch.sparse_coo)"),
        (lambda x: x.to_sparse_csr(), "input is a sparse tensor (torch.sparse_csr)"),
    ],
)
def test_a_residual_beside_what_is_not_dense(device, of, words):
    x = of(torch.randn(3, 5, device=device))
    with pytest.raises(RuntimeError) as raised:
        F.layer_norm(x, (5,), residual=x)
    assert str(raised.value).startswith("layer_norm: ") and words in str(raised.value)


def test_a_residual_beside_a_jagged_input(device):
    parts = [torch.randn(rows, 5, device=device) for rows in (3, 1)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    output, summed = F.layer_norm(nested, (5,), residual=nested)
    torch.testing.assert_close(summed.values(), 2 * torch.cat(parts))
    torch.testing.assert_close(output.values(), torch.nn.functional.layer_norm(2 * torch.cat(parts), (5,)))
