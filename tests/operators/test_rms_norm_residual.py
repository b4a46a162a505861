"""rms_norm of input + residual in one pass: results, gradients of either, strides, dtypes, mistakes, every kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional
from checking import Watched, same_bits
from conftest import KERNEL_BACKENDS
from layouts import guarded, of_own_strides
from rms_norm_calls import DTYPES, check_residual, tensors_with_residual, twin
from sharp import deep, sharp

import gptkern
from gptkern import functional as F
from gptkern.backends import dispatch
from gptkern.operators.rms_norm.contract import RMSNormResidualFunction

TRITON, CUDA = KERNEL_BACKENDS
# A row of bfloat16 that is held, aligned and not, and one that is walked.
WIDTHS = [
    *(pytest.param("triton", width, chunks, marks=TRITON.marks)
      for width, chunks in ((64, False), (61, False), (48, True), (37, True))),
    *(pytest.param("cuda", width, False, marks=CUDA.marks) for width in (64, 61, 6201, 16_392, 32_776)),
]  # fmt: skip
every_kernel = pytest.mark.parametrize(("kernel_backend", "width", "chunks"), WIDTHS, indirect=["kernel_backend"])


@pytest.fixture
def narrow(monkeypatch):
    """narrow(chunks) -> Triton's kernels for wide rows run from 17 columns on."""

    def narrowed(chunks):
        if chunks:
            kernels = dispatch.load("triton", "rms_norm")
            monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
            monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)

    return narrowed


# --- Against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sharp(DTYPES, torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (257, 3), (16, 64), (17, 65), (2, 1025)])
def test_both_results_and_every_gradient(backend, device, dtype, rows, width):
    check_residual(tensors_with_residual(rows, width, dtype, device))


def test_without_a_weight(backend, device):
    check_residual(tensors_with_residual(5, 65, torch.bfloat16, device, weight=False))


@pytest.mark.parametrize(
    ("dtype", "of_residual"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("width", [64, 65])
def test_a_residual_of_another_dtype(backend, device, dtype, of_residual, width):
    check_residual(tensors_with_residual(7, width, dtype, device, of_residual=of_residual))


# What is walked and not held, in float32 beside 16 bits too.
@pytest.mark.parametrize(("width", "of_residual"), [(16_388, torch.float32), (16_389, torch.bfloat16)])
def test_wide_rows_of_two_dtypes_on_cuda(cuda_backend, device, width, of_residual):
    check_residual(tensors_with_residual(2, width, torch.float32, device, of_residual=of_residual))


# Where the CUDA forward's groups change, by vectors of 16 bytes; rows that begin aligned, and one element less.
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float32)])
@pytest.mark.parametrize("vectors", [1, 5, 33, 129, 1025, 4097])
def test_cuda_variants(cuda_backend, device, dtype, vectors, odd):
    width = vectors * 16 // dtype.itemsize - odd
    check_residual(tensors_with_residual(max(2, min(19, 2000 // vectors)), width, dtype, device))


@pytest.mark.parametrize(("rows", "width"), [(700, 9), (150, 264), (60, 1031)])
def test_cuda_groups_walk_rows(cuda_backend, device, rows, width):
    check_residual(tensors_with_residual(rows, width, torch.bfloat16, device))


@pytest.mark.parametrize("normalized_shape", [[5, 7], (3, 5, 7)], ids=["2", "3"])
def test_normalized_shape_of_several_dimensions(backend, device, normalized_shape):
    input, residual = torch.randn(2, 2, 3, 5, 7, device=device)
    weight = guarded(torch.randn(*normalized_shape, device=device))
    check_residual((guarded(input), guarded(residual), weight), normalized_shape=normalized_shape)


@every_kernel
def test_what_is_normalised_is_the_rounded_sum(kernel_backend, device, narrow, width, chunks):
    """Rounding moves a sum near 256 by up to 1, as much as what is added: statistics of another sum would show."""
    narrow(chunks)
    input = torch.randn(3, width, device=device).add(256).bfloat16()
    residual, dy, ds = (torch.randn(3, width, device=device).bfloat16() for _ in range(3))
    weight = torch.randn(width, device=device).bfloat16()
    leaf = input.requires_grad_()
    y, s = F.rms_norm(leaf, (width,), weight, 1e-5, residual=residual)
    torch.autograd.backward((y, s), (dy, ds))
    summed = (input.detach() + residual).requires_grad_()
    expected = F.rms_norm(summed, (width,), weight, 1e-5)
    torch.autograd.backward((expected, summed), (dy, ds))
    same_bits("sum", s.detach(), summed.detach())
    same_bits("output", y, expected)
    torch.testing.assert_close(leaf.grad, summed.grad, rtol=2**-6, atol=2**-6)


@every_kernel
def test_every_operand_has_strides_of_its_own(kernel_backend, device, narrow, width, chunks):
    narrow(chunks)
    dtype = torch.float32 if chunks or width < 100 else torch.bfloat16
    input, residual, weight = tensors_with_residual(3, width, dtype, device)
    dy, ds = (torch.randn(3, width, device=device).to(dtype) for _ in range(2))
    step = 1 if width % 8 else 8
    input, residual, weight, dy, ds = of_own_strides(input, residual, weight, dy, ds, step=step)
    check_residual((input, residual, weight), grads=[dy, ds])


@pytest.mark.parametrize("width", [64, pytest.param(16_392, marks=pytest.mark.deep)])
@pytest.mark.parametrize("which", ["input", "residual", "weight", "dy", "ds"])
def test_one_operand_is_not_aligned(cuda_backend, device, which, width):
    named = dict(zip(("input", "residual", "weight"), tensors_with_residual(3, width, torch.bfloat16, device)))
    named |= {name: guarded(torch.randn(3, width, device=device).bfloat16()) for name in ("dy", "ds")}
    tensor = named[which]
    if tensor.dim() == 1:
        named[which] = guarded(torch.cat((tensor[:1], tensor)))[1:]
    else:
        named[which] = guarded(torch.cat((tensor, tensor[:, :1]), 1))[:, :-1]
    *tensors, dy, ds = named.values()
    check_residual(tensors, grads=[dy, ds])


def test_eps_left_out_is_that_of_the_sum(backend, device):
    input, residual, weight = (t * 1e-5 for t in tensors_with_residual(3, 33, torch.bfloat16, device))
    for other in (residual, residual.float(), *([residual.double()] if backend == "torch" else [])):
        output, summed = F.rms_norm(input, (33,), weight, residual=other)
        expected = torch.nn.functional.rms_norm(input + other, (33,), weight)
        assert output.dtype == summed.dtype == (input + other).dtype
        torch.testing.assert_close(output, expected.to(output.dtype), rtol=1e-2, atol=1e-6)


# --- Autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 1])
def test_the_gradient_of_one_result_alone(backend, device, missing):
    tensors = tensors_with_residual(9, 33, torch.float32, device)
    grads = [guarded(torch.randn(9, 33, device=device)) for _ in range(2)]
    grads[missing] = None
    check_residual(tensors, grads=grads)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_requires_grad_gets_one(backend, device, need):
    check_residual(tensors_with_residual(19, 33, torch.float32, device), need=need)


def test_everything_is_written(kernel_backend, device, poisoned_memory):
    for width in (33, 64, 1025):
        check_residual(tensors_with_residual(5, width, torch.bfloat16, device))


def test_input_and_residual_are_one_tensor(backend, device):
    x, _, weight = tensors_with_residual(5, 33, torch.float32, device)
    leaf = x.detach().requires_grad_()
    y, s = F.rms_norm(leaf, (33,), weight, 1e-5, residual=leaf)
    (y.sum() + s.sum()).backward()
    other = x.detach().requires_grad_()
    (F.rms_norm(2 * other, (33,), weight, 1e-5).sum() + (2 * other).sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_without_gradients_nothing_is_recorded(backend, device):
    tensors = tensors_with_residual(3, 5, torch.float32, device)
    assert not any(output.requires_grad for output in twin(*tensors, (5,), 1e-5))
    with torch.no_grad():
        tensors[0].requires_grad_()
        assert not any(output.requires_grad for output in twin(*tensors, (5,), 1e-5))


def test_the_sum_is_saved_and_not_made_again(kernel_backend, device):
    leaves = [tensor.requires_grad_() for tensor in tensors_with_residual(5, 33, torch.float32, device)]
    output, summed = twin(*leaves, (33,), 1e-5)
    summed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_twice_adds_the_same_again(backend, device):
    leaves = [tensor.requires_grad_() for tensor in tensors_with_residual(5, 33, torch.float32, device)]
    y, s = twin(*leaves, (33,), 1e-5)
    loss = (y * y).sum() + (s * y).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    assert all(torch.equal(2 * first, leaf.grad) for first, leaf in zip(once, leaves))


def test_second_derivative_is_refused(kernel_backend, device):
    leaves = [tensor.requires_grad_() for tensor in tensors_with_residual(5, 33, torch.float32, device)]
    output = twin(*leaves, (33,), 1e-5)[0]
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="rms_norm has no second derivative"):
        first[0].sum().backward()


def test_second_derivative_on_the_torch_backend(device):
    with gptkern.backend("torch"):
        leaves = [t.double().requires_grad_() for t in tensors_with_residual(2, 3, torch.float32, device)]
        assert torch.autograd.gradgradcheck(lambda *t: twin(*t, (3,), 1e-5), leaves, atol=1e-4)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_the_function_by_finite_differences(device, needs):
    tensors = tensors_with_residual(3, 5, torch.float32, device)
    leaves = [t.double().requires_grad_(needed) for t, needed in zip(tensors, needs)]
    assert torch.autograd.gradcheck(lambda *t: RMSNormResidualFunction.apply(*t, 1e-5, "torch"), leaves)


def test_the_launchers_in_plain_pytorch(device):
    with gptkern.backend("torch:launchers"):
        for dtype in DTYPES:
            check_residual(tensors_with_residual(5, 65, dtype, device))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0), (0, 0)])
def test_nothing_to_normalise(backend, device, shape):
    input, residual, weight = (torch.ones(s, device=device, requires_grad=True) for s in (shape, shape, shape[-1:]))
    output, summed = F.rms_norm(input, shape[-1:], weight, residual=residual)
    assert output.shape == summed.shape == shape
    (output.sum() + summed.sum()).backward()
    assert input.grad.shape == residual.grad.shape == shape and not weight.grad.any()


def test_compiles_to_one_graph(backend, device):
    tensors = tensors_with_residual(5, 33, torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for call in (twin, compiled):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        outputs = call(*leaves, (33,), 1e-5)
        sum(output.sin().sum() for output in outputs).backward()
        results.append([*outputs, *(leaf.grad for leaf in leaves)])
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)


def test_it_is_one_op(kernel_backend, device):
    leaves = [tensor.requires_grad_() for tensor in tensors_with_residual(5, 33, torch.float32, device)]
    with Watched() as watched:
        y, s = twin(*leaves, (33,), 1e-5)
        (y.sum() + s.sum()).backward()
    assert watched.names == ["rms_norm_forward", "rms_norm_backward"]


# --- Autocast, errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_sum_its_dtype(backend, device, autocast_dtype):
    input, residual, weight = tensors_with_residual(5, 33, torch.float32, device)
    with torch.autocast(device, dtype=autocast_dtype):
        normalised, summed = F.rms_norm(input, (33,), weight, residual=residual)
        theirs = torch.nn.functional.rms_norm(input + residual, (33,), weight)
    assert summed.dtype == torch.float32 and normalised.dtype == theirs.dtype
    torch.testing.assert_close(normalised, theirs)


X, W = torch.ones(3, 5), torch.ones(5)


@pytest.mark.parametrize(
    ("residual", "error", "words"),
    [
        (lambda x: x[:2], ValueError, ("residual", "(2, 5)", "(3, 5)")),
        (lambda x: x[None], ValueError, ("residual", "(1, 3, 5)", "(3, 5)")),
        (lambda x: x[:, :1], ValueError, ("residual", "(3, 1)", "(3, 5)")),
        (lambda x: x.long(), ValueError, ("residual", "int64", "floating-point")),
        (lambda x: [1.0], TypeError, ("residual", "list", "Tensor")),
        (lambda x: 1.0, TypeError, ("residual", "float", "Tensor")),
        (lambda x: x.to("meta"), RuntimeError, ("residual|device", "meta", "cpu|cuda")),
    ],
    ids=["rows", "dimensions", "broadcast", "integer", "list", "number", "device"],
)
def test_mistakes_in_the_residual(backend, device, residual, error, words):
    x = X.to(device)
    with pytest.raises(error) as raised:
        F.rms_norm(x, (5,), residual=residual(x))
    assert type(raised.value) is error
    for alternatives in words:
        assert any(word in str(raised.value) for word in alternatives.split("|")), str(raised.value)


def test_the_residual_is_given_by_name(backend, device):
    x, w = X.to(device), W.to(device)
    with pytest.raises(TypeError):
        F.rms_norm(x, (5,), w, 1e-5, x)
    # In eps' place it is taken for a bias, beside a residual too.
    with pytest.raises(TypeError, match=r"eps is a Tensor of shape \(5,\); .*there is no bias"):
        F.rms_norm(x, (5,), w, w, residual=x)


def test_float64_is_left_to_pytorch(kernel_backend, device):
    input, residual, _ = tensors_with_residual(3, 5, torch.float32, device)
    with pytest.raises(gptkern.BackendError, match=r"residual is torch\.float64"):
        F.rms_norm(input, (5,), residual=residual.double())


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (lambda x: torch.nested.as_nested_tensor([x, x[:1]]), "input is a nested tensor (torch.strided)"),
        (lambda x: x.to_sparse(), "input is a sparse tensor (torch.sparse_coo)"),
    ],
)
def test_a_residual_beside_what_is_not_dense(device, of, words):
    x = of(torch.randn(3, 5, device=device))
    with pytest.raises(RuntimeError) as raised:
        F.rms_norm(x, (5,), residual=x)
    assert str(raised.value).startswith("rms_norm: ") and words in str(raised.value)


def test_a_residual_beside_a_jagged_input(device):
    parts = [torch.randn(rows, 5, device=device) for rows in (3, 1)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    output, summed = F.rms_norm(nested, (5,), residual=nested)
    torch.testing.assert_close(summed.values(), 2 * torch.cat(parts))
    torch.testing.assert_close(output.values(), torch.nn.functional.rms_norm(2 * torch.cat(parts), (5,)))
