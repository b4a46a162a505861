"""layer_norm against its oracle, on every backend; then everything else that its docstring promises."""

from __future__ import annotations

import functools
import itertools

import oracles
import pytest
import torch
import torch.nn.functional
from checking import Watched, raised_by
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, every_other_row, guarded, strided_rows

import gptkern
from gptkern import functional as F
from gptkern.autograd import LayerNormFunction
from gptkern.measuring.rounding import noise
from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close

ALL_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIXTEEN_BITS = [torch.float16, torch.bfloat16]

# Widths and rows just below, at and above what tiles are made of; many rows of little width, one long row.
SHAPES = [(1, 1), (17, 1), (3, 3), (257, 3), (65, 16), (16, 64), (17, 65), (3, 1000), (2, 1025)]

# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


# --- How a call is judged -------------------------------------------------------------------------------------------


def tensors_of(rows, width, dtype, device, *, residual=False, weight=True, bias=True, parameters=None):
    """(input, residual, weight, bias), each None where it is not wanted, with memory around them that is NaN."""

    def normal(*shape, dtype, offset=0.0):
        return guarded(torch.randn(shape, device=device).add(offset).to(dtype))

    parameters = parameters or dtype
    return (
        normal(rows, width, dtype=dtype, offset=0.5),
        normal(rows, width, dtype=dtype) if residual else None,
        normal(width, dtype=parameters, offset=1.0) if weight else None,
        normal(width, dtype=parameters) if bias else None,
    )


def leaves_of(tensors, requires_grad=(True, True, True, True)):
    """The same memory and strides as new leaves."""
    return [None if t is None else t.detach().requires_grad_(r) for t, r in zip(tensors, requires_grad)]


def twin(input, residual, weight, bias, normalized_shape, eps):
    result = F.layer_norm(input, normalized_shape, weight, bias, eps, residual=residual)
    return (result,) if residual is None else result


def function_on(backend):
    """The autograd.Function itself, with the signature of `twin`."""

    def call(input, residual, weight, bias, normalized_shape, eps):
        output, summed = LayerNormFunction.apply(input, residual, weight, bias, eps, backend)
        return (output,) if residual is None else (output, summed)

    return call


def refuses_float64(backend, *tensors) -> bool:
    """Whether a tensor is float64 and the backend is cuda, which leaves that to Triton and says so."""
    if backend != "cuda" or not any(t is not None and t.dtype == torch.float64 for t in tensors):
        return False
    with pytest.raises(gptkern.BackendError, match="float64"):
        twin(*tensors, (tensors[0].shape[-1],), 1e-5)
    return True


def on_cpu(tensor):
    return None if tensor is None else tensor.detach().cpu()


def references(tensors, grads, normalized_shape, eps, precision):
    """((y, s), gradients) with the gradients in the order of the tensors that are there.

    The yardstick is PyTorch's own layer_norm in float32, of the rounded sum; the oracle does not round it.
    """
    given_residual = tensors[1] is not None
    rounded = on_cpu(tensors[0]) + on_cpu(tensors[1]) if given_residual else None

    def formula(*present):
        present = iter(present)
        input, residual, weight, bias = (None if t is None else next(present) for t in tensors)
        if precision == oracles.ORACLE:
            return oracles.layer_norm(input, normalized_shape, weight, bias, eps, residual=residual)
        s = input
        if given_residual:
            s = input + residual
            # the rounded sum, through which gradients pass straight
            s = rounded.to(precision) + (s - s.detach())
        return torch.nn.functional.layer_norm(s, normalized_shape, weight, bias, eps), s

    present = [on_cpu(t) for t in tensors if t is not None]
    outputs = [output.detach() for output in formula(*(t.to(precision) for t in present))]
    grads = [torch.zeros_like(y) if g is None else on_cpu(g) for g, y in zip(grads, outputs)]
    gradients = oracles.gradients(lambda *t: formula(*t)[: len(grads)], present, tuple(grads), precision)
    return outputs, gradients


def check(tensors, *, call=twin, normalized_shape=None, eps=1e-5, grads=None, needs_grad=(True, True, True, True)):
    """Runs the call forward and backward and judges the results and every gradient.

    Args:
        tensors: input, residual, weight, bias. grads: of y and of s; random ones where they are not given.
    """
    normalized_shape = normalized_shape or (tensors[0].shape[-1],)
    leaves = leaves_of(tensors, needs_grad)
    outputs = call(*leaves, normalized_shape, eps)
    dtype = tensors[0].dtype if tensors[1] is None else torch.result_type(tensors[0], tensors[1])
    for output in outputs:
        assert output.shape == tensors[0].shape
        assert output.dtype == dtype
        assert output.device == tensors[0].device
    if tensors[1] is not None:
        assert torch.equal(outputs[1], tensors[0] + tensors[1])
    if grads is None:
        grads = [guarded(torch.randn_like(output)) for output in outputs]
    asked = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None and output.requires_grad]
    torch.autograd.backward([output for output, _ in asked], [grad for _, grad in asked])

    expected, expected_gradients = references(tensors, grads, normalized_shape, eps, oracles.ORACLE)
    yardstick, yardstick_gradients = references(
        tensors, grads, normalized_shape, eps, oracles.ORACLE if dtype == torch.float64 else oracles.YARDSTICK
    )

    @functools.cache
    def noises():
        return noise(
            lambda: [t for part in references(tensors, grads, normalized_shape, eps, oracles.ORACLE) for t in part]
        )

    assert_close("output", outputs[0], expected[0], yardstick[0], FORWARD_FACTOR, lambda: noises()[0])
    names = [name for name, t in zip(("input", "residual", "weight", "bias"), leaves) if t is not None]
    present = [leaf for leaf in leaves if leaf is not None]
    judged = zip(names, present, expected_gradients, yardstick_gradients)
    for place, (name, leaf, oracle, soft) in enumerate(judged, len(expected)):
        if not leaf.requires_grad:
            assert leaf.grad is None, f"{name} is frozen and has a gradient"
            continue
        if grads[0] is None and name in ("weight", "bias"):
            assert leaf.grad is None or not leaf.grad.any()
            continue
        assert leaf.grad.dtype == leaf.dtype
        assert_close(
            f"gradient of {name}", leaf.grad, oracle, soft, GRADIENT_FACTOR, lambda place=place: noises()[place]
        )
    return leaves, outputs


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
@pytest.mark.parametrize(("rows", "width"), [(5, 17), (2, 64), (3, 65), (19, 33)])
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


# The CUDA kernels walk these in chunks, forward and backward: rows that begin anywhere, and aligned ones.
@pytest.mark.parametrize("width", [6201, 32_776])
def test_strides_of_wide_rows_on_cuda(cuda_backend, device, width):
    input, residual, *parameters = tensors_of(3, width, torch.bfloat16, device, residual=True)
    apart, other = every_other_row(input), every_other_row(residual)
    grads = [every_other_row(grad) for grad in torch.randn(2, 3, width, device=device).to(torch.bfloat16)]
    check((apart, None, *parameters), grads=grads[:1])
    check((apart, other, *parameters), grads=grads)


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


def test_registered_ops(backend, device):
    input, residual, weight, bias = tensors_of(5, 33, torch.bfloat16, device, residual=True)
    forward, backward = torch.ops.gptkern.layer_norm_forward.default, torch.ops.gptkern.layer_norm_backward.default
    cases = [(residual, (weight, bias)), (residual.float(), (weight.float(), None)), (None, (None, None))]
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for other, (weight, bias) in cases:
        torch.library.opcheck(forward, (input, other, weight, bias, 1e-5, backend), **tests)
        output, summed, mean, rstd = forward(input, other, weight, bias, 1e-5, backend)
        summed = input if other is None else summed
        grad_output, grad_summed = torch.randn_like(output), None if other is None else torch.randn_like(summed)
        kept, call = (grad_output, grad_summed, mean, rstd), (summed, None, weight, None, 0.0, backend)
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
