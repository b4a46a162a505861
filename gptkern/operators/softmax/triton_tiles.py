"""What softmax's kernels share on Triton: the lanes of a program, what of a row it reads, z, a sum's reciprocal."""

from __future__ import annotations

import triton
import triton.language as tl

# Loads end at the causal limit rounded up to this many elements, and what is past the limit is thrown away: a limit at
# any element would leave the compiler no two neighbours that it knows to load together.
GRANULE = tl.constexpr(16)
# What `mask_ptr` holds (MASK).
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)


@triton.jit
def position_of(lanes, size_1, LANES: tl.constexpr, AXIS: tl.constexpr):
    """What this program computes: its place in (size_0, size_1), both indices flattened into one, and its lanes."""
    blocks = tl.cdiv(lanes, LANES)
    group = tl.program_id(0) // blocks
    lane = (tl.program_id(0) % blocks) * LANES + tl.arange(0, LANES)
    return (group // size_1).to(tl.int64), (group % size_1).to(tl.int64), group.to(tl.int64), tl.expand_dims(lane, AXIS)


@triton.jit
def indices_from(start, BLOCK_N: tl.constexpr, AXIS: tl.constexpr):
    """start … start + BLOCK_N - 1 along the tile's softmax axis."""
    return tl.expand_dims(start + tl.arange(0, BLOCK_N), 1 - AXIS)


@triton.jit
def limits_of(in_row, n, lane, causal_rows, CAUSAL: tl.constexpr):
    """(readable, visible) of a tile: n <= lane % causal_rows is visible, and a little more is readable."""
    if CAUSAL:
        last = lane % causal_rows
        return in_row & (n < (last // GRANULE + 1) * GRANULE), in_row & (n <= last)
    else:
        return in_row, in_row


@triton.jit
def contiguous(group, lane, lanes, width, AXIS: tl.constexpr):
    """Offsets of the lanes' first elements in a contiguous tensor, and the stride along the row."""
    if AXIS == 1:
        return (group * lanes + lane) * width, 1
    else:
        return group * lanes * width + lane, lanes


@triton.jit
def scores_of(
    x_lane,  # pointers to the lanes' first elements
    mask_lane,
    n,
    x_stride_n,
    mask_stride_n,
    readable,
    visible,
    scale,
    CONVERTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASK: tl.constexpr,
):
    """z of a tile; -inf where it is hidden or past the tensor's end."""
    n = n.to(tl.int64)
    # The input is converted to the result's dtype first, as PyTorch does.
    x = tl.load(x_lane + n * x_stride_n, mask=readable, other=0.0).to(CONVERTED).to(COMPUTE)
    # z = scale * x (+ mask)
    z = x * scale
    if MASK == ADDITIVE_MASK:
        z += tl.load(mask_lane + n * mask_stride_n, mask=readable, other=0.0).to(COMPUTE)
    if MASK == BOOL_MASK:
        visible = visible & (tl.load(mask_lane + n * mask_stride_n, mask=readable, other=0) != 0)
    return tl.where(visible, z, float("-inf"))


@triton.jit
def load_y_and_dy(
    y_lane,  # pointers to the lanes' first elements
    dy_lane,
    n,
    y_stride_n,
    dy_stride_n,
    readable,
    visible,
    COMPUTE: tl.constexpr,
):
    """A tile of y and of its gradient; where it is hidden y is 0 already, and dy, which might be infinite, made so."""
    n = n.to(tl.int64)
    y = tl.load(y_lane + n * y_stride_n, mask=readable, other=0.0).to(COMPUTE)
    dy = tl.load(dy_lane + n * dy_stride_n, mask=readable, other=0.0).to(COMPUTE)
    return y, tl.where(visible, dy, 0.0)


@triton.jit
def finite(m):
    """The maximum to subtract: 0 for a row of -inf, as -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def reciprocal_of(total, MAY_BE_EMPTY: tl.constexpr):
    """1 / sum. A row of which nothing takes part is 0 under a mask, and PyTorch's NaN (0 * inf) without one."""
    if MAY_BE_EMPTY:
        return tl.where(total == 0.0, 0.0, 1.0 / total)
    else:
        return 1.0 / total


@triton.jit
def last_visible(lane, width, causal_rows, CAUSAL: tl.constexpr):
    """One past the last element that any of the lanes sees."""
    if CAUSAL:
        return tl.minimum(width, tl.max(lane % causal_rows) + 1)
    else:
        return width


@triton.jit
def store_zeros(
    lane_ptr,  # pointers to the lanes' first elements
    stride_n,
    lane,
    lanes,
    start,
    width,
    BLOCK_N: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Zeros from the first whole tile after `start` to the row's end: right of the causal limit."""
    for first in range(tl.cdiv(start, BLOCK_N) * BLOCK_N, width, BLOCK_N):
        n = indices_from(first, BLOCK_N, AXIS)
        zero = tl.zeros((n + lane).shape, lane_ptr.dtype.element_ty)
        tl.store(lane_ptr + n.to(tl.int64) * stride_n, zero, mask=(n < width) & (lane < lanes))
