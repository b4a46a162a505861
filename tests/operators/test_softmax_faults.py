"""softmax: special values, y's own sum, lengths beside tiles and operands of other layouts, through every kernel."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from checking import same_bits
from layouts import apart, every_other_element, guarded, transposed
from softmax_calls import check_softmax, random

import gptkern.functional as G
from gptkern.backends import dispatch

deep_float32 = pytest.param(torch.float32, marks=pytest.mark.deep)

# (shape, dimension, whether rows wider than 16 are walked in chunks): rows and columns, whole vectors and not, held and
# walked, with and without what shared memory keeps of them.
KERNELS = {
    "rows": ((6, 40), 1, False),
    "rows that begin anywhere": ((6, 37), 1, False),
    "long rows": ((6, 40), 1, True),
    "long rows that begin anywhere": ((6, 37), 1, True),
    "longer rows": ((6, 600), 1, True),
    "columns": ((40, 16), 0, False),
    "columns that begin anywhere": ((40, 7), 0, False),
    "long columns": ((300, 16), 0, True),
    "long columns that begin anywhere": ((40, 7), 0, True),
    "middle columns": ((2, 40, 16), 1, False),
}


# One of each kind; the others take their time.
SHARP = {"rows", "long rows that begin anywhere", "columns", "long columns that begin anywhere"}


@pytest.fixture(params=[name if name in SHARP else pytest.param(name, marks=pytest.mark.deep) for name in KERNELS])
def kernel(request, kernel_backend, monkeypatch):
    """(shape, dim) of a call that the kernel runs."""
    shape, dim, chunks = KERNELS[request.param]
    if chunks:
        monkeypatch.setattr(dispatch.load(kernel_backend, "softmax"), "ONE_PASS_LIMIT", 16)
    return shape, dim


def with_row(input: torch.Tensor, dim: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The input with one row of the value; and where that row is."""
    there = torch.zeros(input.shape, dtype=torch.bool, device=input.device)
    there.movedim(dim, -1).reshape(-1, input.shape[dim])
    rows = there.movedim(dim, -1)
    rows[(*[0] * (rows.dim() - 2), 3)] = True
    return input.masked_fill(there, value), there


@pytest.mark.parametrize("dtype", [torch.bfloat16, deep_float32], ids=str)
def test_a_row_of_minus_infinity(kernel, device, dtype):
    shape, dim = kernel
    input, there = with_row(random(*shape, device=device, dtype=dtype), dim, -math.inf)
    output = G.softmax(guarded(input), dim)
    assert output[there].isnan().all() and output[~there].isfinite().all()

    # Under a mask, of which all take part, it is 0, and so is its gradient.
    leaf = guarded(input).requires_grad_()
    masked = G.softmax(leaf, dim, mask=torch.ones(shape, dtype=torch.bool, device=device))
    masked.backward(torch.randn_like(masked))
    for result in (masked.detach(), leaf.grad):
        assert (result[there] == 0).all() and result.isfinite().all()
    same_bits("the other rows", masked.detach()[~there], output[~there])


@pytest.mark.parametrize("dtype", [torch.bfloat16, deep_float32], ids=str)
@pytest.mark.parametrize(
    ("width", "chunks"), [(37, False), (40, True), pytest.param(600, True, marks=pytest.mark.deep)]
)
def test_a_causal_row_of_minus_infinity_is_zero(kernel_backend, device, monkeypatch, width, chunks, dtype):
    if chunks:
        monkeypatch.setattr(dispatch.load(kernel_backend, "softmax"), "ONE_PASS_LIMIT", 16)
    input = random(20, width, device=device, dtype=dtype)
    input[0, 0] = input[17, :18] = -math.inf
    leaf = input.requires_grad_()
    output = G.softmax(leaf, -1, is_causal=True)
    output.backward(torch.randn_like(output))
    for result in (output.detach(), leaf.grad):
        assert (result[[0, 17]] == 0).all() and result.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, deep_float32], ids=str)
def test_a_special_value_stays_in_its_row(kernel, device, value, dtype):
    shape, dim = kernel
    input = random(*shape, device=device, dtype=dtype)
    for place in (0, shape[dim] // 2, shape[dim] - 1):
        dirty = input.clone()
        dirty.movedim(dim, -1).select(-2, 3).select(-1, place).fill_(value)
        expected = F.softmax(dirty.float(), dim).to(dtype)
        torch.testing.assert_close(G.softmax(dirty, dim), expected, equal_nan=True, rtol=1e-2, atol=1e-5)


def test_what_is_added_to_a_whole_gradient_changes_nothing(kernel, device):
    """A rounded y does not sum to 1: what is left over times a large mean of dy would show."""
    shape, dim = kernel
    input = (random(*shape, device=device) * 2).bfloat16()
    dy = torch.randint(0, 32, shape, device=device) * 2.0
    gradients = []
    for added in (0.0, 256.0):  # 256 … 318 are bfloat16's, too
        leaf = input.clone().requires_grad_()
        G.softmax(leaf, dim).backward((dy + added).bfloat16())
        gradients.append(leaf.grad.float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2**-6, atol=2e-5)


@pytest.mark.deep
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("chunks", [False, True])
def test_neighbours_of_one_operand_lie_apart(kernel_backend, device, monkeypatch, chunks, dim):
    if chunks:
        monkeypatch.setattr(dispatch.load(kernel_backend, "softmax"), "ONE_PASS_LIMIT", 16)
    tensors = [random(2, 20, 24, device=device) for _ in range(3)]
    for which, layout in itertools.product(range(3), (every_other_element, transposed)):
        input, mask, dy = (layout(t) if i == which else guarded(t) for i, t in enumerate(tensors))
        check_softmax(input, dim, mask=mask, grad_output=dy)


# The input and dy; and each of their dimensions but the last, whose elements a kernel takes whole vectors of.
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("which", [0, 1])
def test_columns_of_one_operand_are_not_aligned(kernel_backend, device, which, dim):
    operands = [guarded(random(2, 12, 16, device=device)) for _ in range(2)]
    operands[which] = apart(operands[which], dim)
    check_softmax(operands[0], 1, grad_output=operands[1])


# One below, at and one above what a vector, a thread, a warp, a granule of the causal limit and a tile have.
@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("edge", [4, 8, 16, 32, 128, 256, 1024, 2048, 4096])
def test_widths_beside_tiles(kernel_backend, device, poisoned_memory, edge, dtype):
    for width in (edge - 1, edge, edge + 1):
        check_softmax(guarded(random(3, width, device=device, dtype=dtype)))
        check_softmax(guarded(random(width, 3, device=device, dtype=dtype)), 0)
    # Rows or columns of a tile: 2048 elements of Triton's.
    for lanes in {max(2048 // edge + step, 1) for step in (-1, 0, 1)}:
        check_softmax(guarded(random(lanes, edge, device=device, dtype=dtype)))
        check_softmax(guarded(random(edge, lanes, device=device, dtype=dtype)), 0)


@pytest.mark.deep
@pytest.mark.parametrize("edge", [16_384, 32_768])
def test_widths_beside_the_widest_that_is_held(kernel_backend, device, edge):
    for width in (edge - 1, edge, edge + 1):
        check_softmax(guarded(random(2, width, device=device, dtype=torch.bfloat16)))


@pytest.mark.deep
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("edge", [8, 16, 32])
def test_causal_limits_beside_tiles(kernel_backend, device, monkeypatch, poisoned_memory, edge, chunks):
    if chunks:
        monkeypatch.setattr(dispatch.load(kernel_backend, "softmax"), "ONE_PASS_LIMIT", 16)
    for columns in (edge - 1, edge, edge + 1):
        check_softmax(guarded(random(34, columns, device=device)), is_causal=True)
