"""cross_entropy's kernels on Triton; triton.py starts them.

    s    = logit_scale * x,  then softcap * tanh(s / softcap)
    loss = (1 - e) * w_y * (lse - s_y)  +  sum_c rest_c * (lse - s_c)  +  z_loss * lse² * own
    dx_j = g * ds/dx * (p_j * (rest + 2 * z_loss * lse * own) - rest_j + (1 - e) * w_y * (p_j - [j = y]))

Memory is the floor: the forward reads the logits once, whatever their width, and the backward reads them and writes the
gradient. Of a row that is ignored nothing is read, and zeros are written.

Two kinds of kernels a direction. Where the classes of a row are neighbours and many, a program has one row (forward) or
a chunk of one (backward). Rows of an odd width begin anywhere between two 16-byte vectors: the elements before the
first whole vector and after the last, the edges, are loaded by themselves, so that all others are loaded 16 bytes at a
time, and nothing outside of the row is read. Each group of a vector's elements has a running maximum and sums of its
own, which threads keep without asking each other; a row's groups are gathered once, at its end.

All else goes in tiles of lanes times classes, walked in chunks: narrow rows, and classes that have positions behind
them, where neighbouring threads read neighbouring positions. Lanes and classes are read through their strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptkern.backends.triton.direct import jit
from gptkern.operators.cross_entropy.triton_parts import (
    NO_CLASS,
    accumulated,
    gathered,
    gradient_of,
    load_class,
    load_rest,
    load_row,
    load_scores,
    store_row,
)

_FLOATS = ("smoothing", "z_loss", "softcap", "logit_scale")
_UNSPECIALIZED = ("rows", "lanes", "ignore_index", *_FLOATS)


@triton.jit
def vectors_of(row_ptr, classes, VECTOR: tl.constexpr, PEEL: tl.constexpr):
    """(elements before a row's first whole vector of 16 bytes, elements of its whole vectors)."""
    if PEEL:
        SIZE: tl.constexpr = row_ptr.dtype.element_ty.primitive_bitwidth // 8
        head = ((-(row_ptr.to(tl.int64) // SIZE)) % VECTOR + VECTOR) % VECTOR
        head = tl.minimum(head, classes).to(tl.int32)
        return head, (classes - head) // VECTOR * VECTOR
    else:
        return 0, classes


@triton.jit
def edges_of(head, body, classes, VECTOR: tl.constexpr):
    """The classes of the edges, (2, VECTOR), and which of them there are."""
    edge = tl.arange(0, 2)[:, None]
    n = edge * (head + body) + tl.arange(0, VECTOR)[None, :]
    return n, n < tl.where(edge == 0, head, classes)


@triton.jit
def nothing(GROUPS: tl.constexpr):
    """The sums of groups of no element."""
    zeros = tl.zeros((GROUPS,), tl.float32)
    lowest = tl.full((GROUPS,), float("-inf"), tl.float32)
    return lowest, zeros, zeros, zeros, zeros, zeros, lowest, tl.full((GROUPS,), NO_CLASS, tl.int32)


@triton.jit
def lanes_of(lanes, LANES: tl.constexpr):
    """What a program of tiles computes: its group, its lanes, their rows, and which of them there are."""
    blocks = tl.cdiv(lanes, LANES)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    lane = ((tl.program_id(0) % blocks) * LANES + tl.arange(0, LANES)).to(tl.int64)
    return group, lane, group * lanes + lane, lane < lanes


# --- Forward --------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=_UNSPECIALIZED)
def _forward_row_kernel(
    x_ptr,  # (groups, lanes, classes), classes next to each other
    target_ptr,  # (rows,) of classes, or probabilities as x
    weight_ptr,  # (classes,) or None
    loss_ptr,  # (rows,)
    own_ptr,  # (rows,) float32, or None
    statistics_ptr,  # (4, rows) float32
    lse_ptr, entropy_ptr, correct_ptr,  # (rows,), or None
    rows, lanes, classes,
    x_stride_group, x_stride_lane, x_stride_n,  # x_stride_n is 1
    target_stride_group, target_stride_lane, target_stride_n,
    ignore_index, smoothing, z_loss, softcap, logit_scale,
    CLASSES: tl.constexpr,  # whether the target is classes
    SPREAD: tl.constexpr,  # whether it is spread over all classes
    Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    VECTOR: tl.constexpr, PEEL: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row // lanes * x_stride_group + row % lanes * x_stride_lane
    target_row = target_ptr
    y, counts, s_y, own = 0, row < rows, 0.0, 1.0
    if CLASSES:
        y, counts, s_y, own = load_class(
            x_row, target_ptr, weight_ptr, row, counts, 1, classes, ignore_index, logit_scale, softcap, SOFTCAP
        )
    else:
        target_row += row // lanes * target_stride_group + row % lanes * target_stride_lane
    head, body = vectors_of(x_row, classes, VECTOR, PEEL)

    m, others, total, product, spread, rest, best, first = nothing(GROUPS)
    x_body = x_row + head
    if PEEL:
        x_body = tl.multiple_of(x_body, 16)
    for start in range(0, tl.where(counts, body, 0), GROUPS * VECTOR):
        at = start + tl.arange(0, GROUPS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        inside, n = at < body, head + at
        x, s = load_scores(x_body + at, inside, logit_scale, softcap, SOFTCAP)
        rest_n = load_rest(target_row + n, weight_ptr, n, inside, smoothing, classes, SPREAD, not CLASSES)
        m, others, total, product, spread, rest, best, first = accumulated(
            m, others, total, product, spread, rest, best, first, x, s, n, inside, rest_n, y, logit_scale,
            CLASSES, SPREAD, STATS, 1,
        )  # fmt: skip
    row_m = tl.max(m, axis=0)
    if PEEL:
        m_2, others_2, total_2, product_2, spread_2, rest_2, best_2, first_2 = nothing(2)
        n, inside = edges_of(head, body, classes, VECTOR)
        inside = inside & counts
        x, s = load_scores(x_row + n, inside, logit_scale, softcap, SOFTCAP)
        rest_n = load_rest(target_row + n, weight_ptr, n, inside, smoothing, classes, SPREAD, not CLASSES)
        m_2, others_2, total_2, product_2, spread_2, rest_2, best_2, first_2 = accumulated(
            m_2, others_2, total_2, product_2, spread_2, rest_2, best_2, first_2, x, s, n, inside, rest_n, y,
            logit_scale, CLASSES, SPREAD, STATS, 1,
        )  # fmt: skip
        row_m = tl.maximum(row_m, tl.max(m_2, axis=0))
        others_2, total_2, product_2, spread_2, rest_2 = gathered(
            m_2, others_2, total_2, product_2, spread_2, rest_2, row_m, SPREAD, STATS
        )
    others, total, product, spread, rest = gathered(m, others, total, product, spread, rest, row_m, SPREAD, STATS)
    if PEEL:
        others, total, product, spread, rest = (
            others + others_2, total + total_2, product + product_2, spread + spread_2, rest + rest_2,
        )  # fmt: skip
    likeliest = y
    if STATS:
        row_best = tl.max(best, axis=0)
        if PEEL:
            row_best = tl.maximum(row_best, tl.max(best_2, axis=0))
        likeliest = tl.min(tl.where(best == row_best, first, NO_CLASS), axis=0)
        if PEEL:
            likeliest = tl.minimum(likeliest, tl.min(tl.where(best_2 == row_best, first_2, NO_CLASS), axis=0))
    store_row(
        loss_ptr, own_ptr, statistics_ptr, lse_ptr, entropy_ptr, correct_ptr,
        row, rows, row < rows, counts, y, s_y, own, likeliest,
        row_m, others, total, product, spread, rest, smoothing, z_loss, CLASSES, SPREAD, Z_LOSS, STATS,
    )  # fmt: skip


@jit(do_not_specialize=_UNSPECIALIZED)
def _forward_tile_kernel(
    x_ptr,  # arguments: as _forward_row_kernel's, in any strides
    target_ptr, weight_ptr, loss_ptr, own_ptr, statistics_ptr, lse_ptr, entropy_ptr, correct_ptr,
    rows, lanes, classes,
    x_stride_group, x_stride_lane, x_stride_n,
    target_stride_group, target_stride_lane, target_stride_n,
    ignore_index, smoothing, z_loss, softcap, logit_scale,
    CLASSES: tl.constexpr, SPREAD: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, STATS: tl.constexpr,
    AXIS: tl.constexpr,  # of the tile: which the classes are on
    LANES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group, lane, row, in_rows = lanes_of(lanes, LANES)
    x_lane = x_ptr + group * x_stride_group + lane * x_stride_lane
    target_lane = target_ptr + group * target_stride_group + lane * target_stride_lane
    y, counts, s_y, own = tl.zeros((LANES,), tl.int32), in_rows, 0.0, 1.0
    if CLASSES:
        y, counts, s_y, own = load_class(
            x_lane, target_ptr, weight_ptr, row, in_rows, x_stride_n, classes, ignore_index, logit_scale, softcap,
            SOFTCAP,
        )  # fmt: skip
    m, others, total, product, spread, rest, best, first = nothing(LANES)
    limit = tl.where(tl.max(counts.to(tl.int32), axis=0) > 0, classes, 0)
    for start in range(0, limit, BLOCK_N):
        n = tl.expand_dims(start + tl.arange(0, BLOCK_N), 1 - AXIS)
        inside = (n < classes) & tl.expand_dims(counts, AXIS)
        at = n.to(tl.int64)
        x, s = load_scores(
            tl.expand_dims(x_lane, AXIS) + at * x_stride_n, inside, logit_scale, softcap, SOFTCAP
        )  # fmt: skip
        rest_n = load_rest(
            tl.expand_dims(target_lane, AXIS) + at * target_stride_n, weight_ptr, n, inside, smoothing, classes,
            SPREAD, not CLASSES,
        )  # fmt: skip
        m, others, total, product, spread, rest, best, first = accumulated(
            m, others, total, product, spread, rest, best, first, x, s, n, inside, rest_n,
            tl.expand_dims(y, AXIS), logit_scale, CLASSES, SPREAD, STATS, AXIS,
        )  # fmt: skip
    store_row(
        loss_ptr, own_ptr, statistics_ptr, lse_ptr, entropy_ptr, correct_ptr,
        row, rows, in_rows, counts, y, s_y, own, first,
        m, others, total, product, spread, rest, smoothing, z_loss, CLASSES, SPREAD, Z_LOSS, STATS,
    )  # fmt: skip


# --- Backward -------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=[*_UNSPECIALIZED, "divisor"])
def _backward_row_kernel(
    grad_ptr,  # (rows,) where EACH, else one number
    denominator_ptr,  # one number, or None
    statistics_ptr,  # (4, rows) float32
    x_ptr,  # (groups, lanes, classes), classes next to each other
    target_ptr,  # (rows,) of classes, or probabilities as x
    weight_ptr,  # (classes,) or None
    dx_ptr,  # as x, or x itself
    rows, lanes, classes,
    x_stride_group, x_stride_lane, x_stride_n,  # x_stride_n is 1
    target_stride_group, target_stride_lane, target_stride_n,
    dx_stride_group, dx_stride_lane, dx_stride_n,  # dx_stride_n is 1
    ignore_index, smoothing, z_loss, softcap, logit_scale,
    divisor,  # of the gradient, where it is not by the denominator
    CLASSES: tl.constexpr, SPREAD: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    EACH: tl.constexpr, VECTOR: tl.constexpr, PEEL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group, lane = row // lanes, row % lanes
    x_row = x_ptr + group * x_stride_group + lane * x_stride_lane
    dx_row = dx_ptr + group * dx_stride_group + lane * dx_stride_lane
    target_row = target_ptr + group * target_stride_group + lane * target_stride_lane
    y, counts, g, m, log_total, factor, target_factor, of_target = load_row(
        grad_ptr, denominator_ptr, statistics_ptr, target_ptr, weight_ptr, row, rows, row < rows, classes,
        ignore_index, smoothing, z_loss, divisor, CLASSES, Z_LOSS, EACH,
    )  # fmt: skip
    head, body = vectors_of(x_row, classes, VECTOR, PEEL)
    x_body, dx_body = x_row + head, dx_row + head
    if PEEL:
        x_body, dx_body = tl.multiple_of(x_body, 16), tl.multiple_of(dx_body, 16)
    at = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, n = at < body, head + at
    readable = inside & counts
    x, s = load_scores(x_body + at, readable, logit_scale, softcap, SOFTCAP)
    rest_n = load_rest(target_row + n, weight_ptr, n, readable, smoothing, classes, SPREAD, not CLASSES)
    dx = gradient_of(
        x, s, n, rest_n, y, g, m, log_total, factor, target_factor, of_target, logit_scale, softcap, SOFTCAP, CLASSES,
        SPREAD,
    )  # fmt: skip
    tl.store(dx_body + at, tl.where(counts, dx, 0.0).to(dx_ptr.dtype.element_ty), mask=inside)
    if PEEL and tl.program_id(1) == 0:
        edge, in_edges = edges_of(head, body, classes, VECTOR)
        read = in_edges & counts
        edge_x, edge_s = load_scores(x_row + edge, read, logit_scale, softcap, SOFTCAP)
        edge_rest = load_rest(target_row + edge, weight_ptr, edge, read, smoothing, classes, SPREAD, not CLASSES)
        edge_dx = gradient_of(
            edge_x, edge_s, edge, edge_rest, y, g, m, log_total, factor, target_factor, of_target, logit_scale,
            softcap, SOFTCAP, CLASSES, SPREAD,
        )  # fmt: skip
        edge_dx = tl.where(counts, edge_dx, 0.0)
        tl.store(dx_row + edge, edge_dx.to(dx_ptr.dtype.element_ty), mask=in_edges)


@jit(do_not_specialize=[*_UNSPECIALIZED, "divisor"])
def _backward_tile_kernel(
    grad_ptr,  # arguments: as _backward_row_kernel's, in any strides
    denominator_ptr, statistics_ptr, x_ptr, target_ptr, weight_ptr, dx_ptr,
    rows, lanes, classes,
    x_stride_group, x_stride_lane, x_stride_n,
    target_stride_group, target_stride_lane, target_stride_n,
    dx_stride_group, dx_stride_lane, dx_stride_n,
    ignore_index, smoothing, z_loss, softcap, logit_scale, divisor,
    CLASSES: tl.constexpr, SPREAD: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr, EACH: tl.constexpr,
    AXIS: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group, lane, row, in_rows = lanes_of(lanes, LANES)
    y, counts, g, m, log_total, factor, target_factor, of_target = load_row(
        grad_ptr, denominator_ptr, statistics_ptr, target_ptr, weight_ptr, row, rows, in_rows, classes,
        ignore_index, smoothing, z_loss, divisor, CLASSES, Z_LOSS, EACH,
    )  # fmt: skip
    n = tl.expand_dims(tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), 1 - AXIS)
    at = n.to(tl.int64)
    inside = (n < classes) & tl.expand_dims(in_rows, AXIS)
    counts = tl.expand_dims(counts, AXIS)
    readable = inside & counts
    x_lane = tl.expand_dims(x_ptr + group * x_stride_group + lane * x_stride_lane, AXIS)
    x, s = load_scores(x_lane + at * x_stride_n, readable, logit_scale, softcap, SOFTCAP)
    target_lane = tl.expand_dims(target_ptr + group * target_stride_group + lane * target_stride_lane, AXIS)
    rest_n = load_rest(
        target_lane + at * target_stride_n, weight_ptr, n, readable, smoothing, classes, SPREAD, not CLASSES
    )
    zeros = tl.zeros((LANES,), tl.float32)
    dx = gradient_of(
        x, s, n, rest_n, tl.expand_dims(y, AXIS), tl.expand_dims(zeros + g, AXIS), tl.expand_dims(m, AXIS),
        tl.expand_dims(log_total, AXIS), tl.expand_dims(factor, AXIS), tl.expand_dims(zeros + target_factor, AXIS),
        tl.expand_dims(of_target, AXIS), logit_scale, softcap, SOFTCAP, CLASSES, SPREAD,
    )  # fmt: skip
    dx_lane = tl.expand_dims(dx_ptr + group * dx_stride_group + lane * dx_stride_lane, AXIS)
    tl.store(dx_lane + at * dx_stride_n, tl.where(counts, dx, 0.0).to(dx_ptr.dtype.element_ty), mask=inside)
