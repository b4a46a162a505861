"""quantize_int8: special values, strides of each dimension, lengths beside tiles, through every kernel."""

from __future__ import annotations

import math

import oracle_quantize_int8
import pytest
import torch
from checking import same_bits
from conftest import KERNEL_BACKENDS
from layouts import guarded, of_own_strides

from gptkern import functional as F


def check(input, dim=-1):
    q, scale = F.quantize_int8(input, dim)
    expected_q, expected_scale = oracle_quantize_int8.quantize_int8(input, dim)
    same_bits("scale", scale.cpu(), expected_scale)
    same_bits("q", q.cpu(), expected_q)


TRITON, CUDA = KERNEL_BACKENDS
# (backend, shape, dim): rows that registers or shared memory hold, wider ones, and columns.
KERNELS = [
    pytest.param(*backend.values, shape, dim, marks=backend.marks)
    for backend, calls in (
        (TRITON, [((4, 33), 1), ((4, 20_000), 1), ((33, 4), 0)]),
        (CUDA, [((4, 33), 1), ((4, 1100), 1), ((4, 60_000), 1), ((33, 40), 0), ((300, 4), 0), ((2, 33, 40), 1)]),
    )
    for shape, dim in calls
]
every_kernel = pytest.mark.parametrize(("kernel_backend", "shape", "dim"), KERNELS, indirect=["kernel_backend"])


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@every_kernel
def test_a_special_value_shows_in_its_scale_alone(kernel_backend, device, shape, dim, value):
    input = torch.randn(shape, device=device).bfloat16()
    expected_q, expected_scale = oracle_quantize_int8.quantize_int8(input, dim)
    others = torch.ones(expected_scale.shape, dtype=torch.bool)
    others[..., 1] = False
    # Of several threads, and of several warps of columns.
    for place in (0, shape[dim] // 2 + 1, shape[dim] - 2):
        dirty = guarded(input)
        dirty.movedim(dim, -1)[..., 1, place] = value
        q, scale = (result.cpu() for result in F.quantize_int8(dirty, dim))
        shown = scale[~others]
        assert (shown.isnan() if value != value else shown == math.inf).all(), (place, shown)
        same_bits("scale", scale[others], expected_scale[others])
        same_bits("q", q.movedim(dim, -1)[others], expected_q.movedim(dim, -1)[others])


@every_kernel
def test_a_row_of_zeros(kernel_backend, device, shape, dim):
    input = torch.randn(shape, device=device).bfloat16()
    input.movedim(dim, -1)[..., 1, :] = 0
    input.movedim(dim, -1)[..., 2, :] = -0.0
    check(guarded(input), dim)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 8])
def test_no_stride_follows_from_another(kernel_backend, device, step, dim):
    (input,) = of_own_strides(torch.randn(3, 6, 40, device=device).bfloat16(), step=step)
    check(input, dim)
    check(input.transpose(0, 1), dim)
    check(input.transpose(1, 2), dim)
    # Two dimensions, neither of which has neighbours: what Triton's kernels would get a copy of with three.
    check(input[..., 3], dim % 2)


# A vector, a warp's share before a row has more warps, what registers hold (Triton), what shared memory holds (CUDA).
@pytest.mark.deep
@pytest.mark.parametrize("edge", [8, 32, 256, 1024, 4096, 8192, 16_384, 24_576, 49_152])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_widths_beside_tiles(kernel_backend, device, poisoned_memory, edge, dtype):
    for width in (edge - 1, edge, edge + 1):
        check(guarded(torch.randn(2, width, device=device).to(dtype)))
    # Rows of a tile: 4096 elements of Triton's.
    for rows in {max(4096 // edge + step, 1) for step in (-1, 0, 1)}:
        check(guarded(torch.randn(rows, edge, device=device).to(dtype)))
