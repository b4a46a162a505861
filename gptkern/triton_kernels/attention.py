"""attention on Triton, after FlashAttention-2.

    S = log2(e) * scale * Q @ K^T          P = softmax(scale * Q @ K^T) = 2^(S - lse)
    O = P @ V                              lse = log2(sum over the keys of 2^S)

Forward, a tile of keys at a time; m is the running maximum of S, l the running sum, A the running P @ V:
    m' = max(m, rowmax(S))                 p = 2^(S - m')
    l = l * 2^(m - m') + rowsum(p)         A = A * 2^(m - m') + p @ V
    O = A / l                              lse = m + log2(l)

Backward, with delta = sum over head_dim of dO * O:
    dV = P^T @ dO            dP = dO @ V^T
    dS = P * (dP - delta)    dQ = scale * dS @ K            dK = scale * dS^T @ Q

One program of the forward computes a tile of BLOCK_M queries of one head, and so does one of the dQ kernel; one of
the dK/dV kernel computes BLOCK_N keys of one key/value head, over all queries of all the query heads that read it. Each
has two loops: full tiles, which know no mask, then the tiles on the diagonal and the tail, which do. Every result is
written by one program, once: no atomics, the same on every run. P and dS stay in registers, rounded to the
inputs' dtype for the second product, as the tensor cores take them; sums are float32.

What it costs, for n = batch * heads, lengths T and S, head_dim D, b bytes an element:
    operations     forward 4nTSD, backward 14nTSD (dK/dV computes four products, dQ three), both halved by the mask
    least bytes    forward nb(2T + 2S/group)D + 4nT, backward about twice that
At T = S an H100's 989 TFLOP/s and 3.35 TB/s meet near 300 operations a byte and the forward does TS/(T + S) = T/2 of
them a byte in bfloat16: above a length of some 600 (1200 with the mask) the tensor cores are the floor, not memory.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.ops.attention import empty_in_layout_of
from gptkern.tables.configurations import Table
from gptkern.triton_kernels.common import INTERPRETED, CompileCase, cdiv, dot, float32_precision, next_power_of_2

# Where the running maximum starts: below every score, yet finite, so that m - m' is never -inf - -inf.
LOWEST = tl.constexpr(-1.0e38)

# --- Forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_tile(
    tile_ptr,  # pointer to the tile's first element
    row_stride,
    rows,  # (BLOCK,) numbers of the tile's rows within the sequence, for the mask
    length,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK, BLOCK_D), zero beyond head_dim and, where MASKED, beyond the sequence's length."""
    columns = tl.arange(0, BLOCK_D)
    pointers = tile_ptr + tl.arange(0, BLOCK)[:, None] * row_stride + columns[None, :]
    if MASKED:
        inside = rows[:, None] < length
        if HEAD_DIM != BLOCK_D:
            inside = inside & (columns[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(
    tile_ptr,
    row_stride,
    rows,
    length,
    tile,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes what lies inside head_dim and the sequence's length, rounded to the pointer's dtype."""
    columns = tl.arange(0, BLOCK_D)
    inside = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        inside = inside & (columns[None, :] < HEAD_DIM)
    pointers = tile_ptr + tl.arange(0, BLOCK)[:, None] * row_stride + columns[None, :]
    tl.store(pointers, tile.to(tile_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_tiles(
    accumulator,  # (BLOCK_M, BLOCK_D) float32, A
    row_max,  # (BLOCK_M,) float32, m
    row_sum,  # (BLOCK_M,) float32, l
    q,  # (BLOCK_M, BLOCK_D)
    key_ptr,  # this head's keys
    value_ptr,
    key_row_stride,
    value_row_stride,
    rows,  # (BLOCK_M,) numbers of the queries
    start,
    stop,
    length_k,
    scale_log2e,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    for start_n in tl.range(start, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        columns = start_n + tl.arange(0, BLOCK_N)
        first = tl.cast(start_n, tl.int64)
        k = _load_tile(
            key_ptr + first * key_row_stride, key_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED
        )
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        if MASKED:
            seen = columns[None, :] < length_k
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        # m' = max(m, rowmax(S)): scale > 0, so one product a row instead of one a score
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2e)
        # p = 2^(S - m')
        p = tl.exp2(scores * scale_log2e - new_max[:, None])
        # A = A * 2^(m - m') + p @ V, and l alike
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, 1)
        accumulator = accumulator * correction[:, None]
        v = _load_tile(
            value_ptr + first * value_row_stride,
            value_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED,
        )  # fmt: skip
        accumulator = dot(p.to(v.dtype), v, accumulator, INPUT_PRECISION, WIDEN)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit(do_not_specialize=["heads", "group", "length_q", "length_k"])
def _forward_kernel(
    query_ptr,  # (batch, heads, length_q, head_dim), any strides but the last, which is 1; so are all below
    key_ptr,  # (batch, heads // group, length_k, head_dim)
    value_ptr,  # (batch, heads // group, length_k, head_dim)
    output_ptr,  # (batch, heads, length_q, head_dim)
    lse_ptr,  # (batch, heads, length_q) contiguous, float32
    query_batch_stride, query_head_stride, query_row_stride,
    key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    output_batch_stride, output_head_stride, output_row_stride,
    heads, group, length_q, length_k,
    scale_log2e,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length_q, BLOCK_M)
    # Neighbouring programs share a head's keys in the L2 cache; within a head the heaviest causal block comes first.
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    rows = start_m + tl.arange(0, BLOCK_M)
    first = start_m.to(tl.int64)

    query_ptr += batch * query_batch_stride + head * query_head_stride + first * query_row_stride
    key_ptr += batch * key_batch_stride + head // group * key_head_stride
    value_ptr += batch * value_batch_stride + head // group * value_head_stride
    q = _load_tile(query_ptr, query_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)

    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    # [0, full) are keys that every query of this block sees, in whole tiles; [full, stop) are seen by some.
    stop = length_k
    seen_by_all = length_k
    if CAUSAL:
        stop = tl.minimum(length_k, start_m + BLOCK_M)
        seen_by_all = tl.minimum(length_k, start_m + 1)
    full = seen_by_all // BLOCK_N * BLOCK_N
    accumulator, row_max, row_sum = _forward_tiles(
        accumulator, row_max, row_sum, q, key_ptr, value_ptr, key_row_stride, value_row_stride, rows, full, stop,
        length_k, scale_log2e, CAUSAL, True, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
    )  # fmt: skip
    accumulator, row_max, row_sum = _forward_tiles(
        accumulator, row_max, row_sum, q, key_ptr, value_ptr, key_row_stride, value_row_stride, rows, 0, full,
        length_k, scale_log2e, CAUSAL, False, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
    )  # fmt: skip

    # O = A / l
    output = accumulator / row_sum[:, None]
    output_ptr += batch * output_batch_stride + head * output_head_stride + first * output_row_stride
    _store_tile(output_ptr, output_row_stride, rows, length_q, output, BLOCK_M, HEAD_DIM, BLOCK_D)
    # lse = m + log2(l)
    lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + batch_head * length_q + rows, lse, mask=rows < length_q)


# --- Backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["heads", "length_q"])
def _delta_kernel(
    grad_output_ptr,  # (batch, heads, length_q, head_dim)
    output_ptr,  # (batch, heads, length_q, head_dim)
    delta_ptr,  # (batch, heads, length_q) contiguous, float32
    grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride,
    output_batch_stride, output_head_stride, output_row_stride,
    heads, length_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length_q, BLOCK_M)
    start_m = tl.program_id(0) % blocks * BLOCK_M
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    rows = start_m + tl.arange(0, BLOCK_M)
    first = start_m.to(tl.int64)
    grad_output_ptr += (
        batch * grad_output_batch_stride + head * grad_output_head_stride + first * grad_output_row_stride
    )
    output_ptr += batch * output_batch_stride + head * output_head_stride + first * output_row_stride
    grad = _load_tile(grad_output_ptr, grad_output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    output = _load_tile(output_ptr, output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    # delta = sum over head_dim of dO * O
    delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(delta_ptr + batch_head * length_q + rows, delta, mask=rows < length_q)


@triton.jit
def _key_value_tiles(
    grad_key,  # (BLOCK_N, BLOCK_D) float32, dK / scale
    grad_value,  # (BLOCK_N, BLOCK_D) float32, dV
    k,  # (BLOCK_N, BLOCK_D)
    v,  # (BLOCK_N, BLOCK_D)
    query_ptr,  # this query head's queries
    grad_output_ptr,
    lse_ptr,
    delta_ptr,
    query_row_stride,
    grad_output_row_stride,
    columns,  # (BLOCK_N,) numbers of the keys
    tile,  # the first tile of queries
    count,  # how many tiles
    diagonal_stop,
    tail,  # the tile that follows the last one of the diagonal, where MASKED
    length_q,
    scale_log2e,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    for index in tl.range(0, count):
        tile_m = tile + index
        if MASKED:
            tile_m = tl.where(tile_m < diagonal_stop, tile_m, tail)
        start_m = tile_m * BLOCK_M
        rows = start_m + tl.arange(0, BLOCK_M)
        first = tl.cast(start_m, tl.int64)
        q = _load_tile(
            query_ptr + first * query_row_stride,
            query_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED,
        )  # fmt: skip
        grad = _load_tile(
            grad_output_ptr + first * grad_output_row_stride,
            grad_output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, MASKED,
        )  # fmt: skip
        if MASKED:
            # 2^(S - inf) = 0 beyond the last query
            lse = tl.load(lse_ptr + rows, mask=rows < length_q, other=float("inf"))
        else:
            lse = tl.load(lse_ptr + rows)
        # P^T = 2^(S - lse)^T
        scores = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), INPUT_PRECISION, WIDEN)
        p = tl.exp2(scores * scale_log2e - lse[None, :])
        if MASKED and CAUSAL:
            p = tl.where(columns[:, None] <= rows[None, :], p, 0.0)
        if NEED_VALUE:
            # dV = P^T @ dO
            grad_value = dot(p.to(grad.dtype), grad, grad_value, INPUT_PRECISION, WIDEN)
        if NEED_KEY:
            if MASKED:
                delta = tl.load(delta_ptr + rows, mask=rows < length_q, other=0.0)
            else:
                delta = tl.load(delta_ptr + rows)
            # dS^T = P^T * (dP - delta)^T,  dP^T = V @ dO^T
            dp = dot(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), INPUT_PRECISION, WIDEN)
            ds = p * (dp - delta[None, :])
            # dK = scale * dS^T @ Q
            grad_key = dot(ds.to(q.dtype), q, grad_key, INPUT_PRECISION, WIDEN)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["kv_heads", "group", "length_q", "length_k"])
def _key_value_kernel(
    grad_output_ptr,  # (batch, kv_heads * group, length_q, head_dim)
    query_ptr,  # (batch, kv_heads * group, length_q, head_dim)
    key_ptr,  # (batch, kv_heads, length_k, head_dim)
    value_ptr,  # (batch, kv_heads, length_k, head_dim)
    lse_ptr,  # (batch, kv_heads * group, length_q) contiguous, float32
    delta_ptr,  # (batch, kv_heads * group, length_q) contiguous, float32; read where NEED_KEY
    grad_key_ptr,  # (batch, kv_heads, length_k, head_dim), written where NEED_KEY
    grad_value_ptr,  # (batch, kv_heads, length_k, head_dim), written where NEED_VALUE
    grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride,
    query_batch_stride, query_head_stride, query_row_stride,
    key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    grad_key_batch_stride, grad_key_head_stride, grad_key_row_stride,
    grad_value_batch_stride, grad_value_head_stride, grad_value_row_stride,
    kv_heads, group, length_q, length_k,
    scale, scale_log2e,
    CAUSAL: tl.constexpr,
    NEED_KEY: tl.constexpr,
    NEED_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length_k, BLOCK_N)
    # The first block of keys is seen by the most queries: it comes first.
    start_n = tl.program_id(0) % blocks * BLOCK_N
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    columns = start_n + tl.arange(0, BLOCK_N)
    first = start_n.to(tl.int64)

    key_ptr += batch * key_batch_stride + kv_head * key_head_stride + first * key_row_stride
    value_ptr += batch * value_batch_stride + kv_head * value_head_stride + first * value_row_stride
    # Keys beyond the last one are zeros; what they get is not stored.
    k = _load_tile(key_ptr, key_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = _load_tile(value_ptr, value_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)

    # Tiles of queries: [diagonal, diagonal_stop) hold queries that see some of these keys, [diagonal_stop, whole)
    # are seen whole, and a last one may be cut short by length_q.
    tiles = tl.cdiv(length_q, BLOCK_M)
    whole = length_q // BLOCK_M
    diagonal = 0
    diagonal_stop = 0
    if CAUSAL:
        diagonal = start_n // BLOCK_M
        diagonal_stop = tl.minimum(tiles, tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M))
    masked_tiles = tl.maximum(diagonal_stop - diagonal, 0)
    if tl.maximum(diagonal_stop, whole) < tiles:
        masked_tiles += 1

    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        row_base = (batch * kv_heads * group + head) * length_q
        head_query_ptr = query_ptr + batch * query_batch_stride + head * query_head_stride
        head_grad_ptr = grad_output_ptr + batch * grad_output_batch_stride + head * grad_output_head_stride
        grad_key, grad_value = _key_value_tiles(
            grad_key, grad_value, k, v, head_query_ptr, head_grad_ptr, lse_ptr + row_base, delta_ptr + row_base,
            query_row_stride, grad_output_row_stride, columns, diagonal, masked_tiles, diagonal_stop, whole,
            length_q, scale_log2e, CAUSAL, True, NEED_KEY, NEED_VALUE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            INPUT_PRECISION, WIDEN,
        )  # fmt: skip
        grad_key, grad_value = _key_value_tiles(
            grad_key, grad_value, k, v, head_query_ptr, head_grad_ptr, lse_ptr + row_base, delta_ptr + row_base,
            query_row_stride, grad_output_row_stride, columns, diagonal_stop, whole - diagonal_stop, 0, 0,
            length_q, scale_log2e, CAUSAL, False, NEED_KEY, NEED_VALUE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            INPUT_PRECISION, WIDEN,
        )  # fmt: skip

    if NEED_KEY:
        grad_key_ptr += batch * grad_key_batch_stride + kv_head * grad_key_head_stride + first * grad_key_row_stride
        _store_tile(grad_key_ptr, grad_key_row_stride, columns, length_k, grad_key * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    if NEED_VALUE:
        grad_value_ptr += (
            batch * grad_value_batch_stride + kv_head * grad_value_head_stride + first * grad_value_row_stride
        )
        _store_tile(grad_value_ptr, grad_value_row_stride, columns, length_k, grad_value, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_tiles(
    grad_query,  # (BLOCK_M, BLOCK_D) float32, dQ / scale
    q,  # (BLOCK_M, BLOCK_D)
    grad,  # (BLOCK_M, BLOCK_D)
    lse,  # (BLOCK_M,) float32
    delta,  # (BLOCK_M,) float32
    key_ptr,  # this head's keys
    value_ptr,
    key_row_stride,
    value_row_stride,
    rows,  # (BLOCK_M,) numbers of the queries
    start,
    stop,
    length_k,
    scale_log2e,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    for start_n in tl.range(start, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        columns = start_n + tl.arange(0, BLOCK_N)
        first = tl.cast(start_n, tl.int64)
        k = _load_tile(
            key_ptr + first * key_row_stride, key_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED
        )
        v = _load_tile(
            value_ptr + first * value_row_stride,
            value_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED,
        )  # fmt: skip
        # P = 2^(S - lse)
        scores = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        p = tl.exp2(scores * scale_log2e - lse[:, None])
        if MASKED:
            seen = columns[None, :] < length_k
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None])
            p = tl.where(seen, p, 0.0)
        # dS = P * (dP - delta),  dP = dO @ V^T
        dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        ds = p * (dp - delta[:, None])
        # dQ = scale * dS @ K
        grad_query = dot(ds.to(k.dtype), k, grad_query, INPUT_PRECISION, WIDEN)
    return grad_query


@triton.jit(do_not_specialize=["heads", "group", "length_q", "length_k"])
def _query_kernel(
    grad_output_ptr,  # (batch, heads, length_q, head_dim)
    query_ptr,  # (batch, heads, length_q, head_dim)
    key_ptr,  # (batch, heads // group, length_k, head_dim)
    value_ptr,  # (batch, heads // group, length_k, head_dim)
    lse_ptr,  # (batch, heads, length_q) contiguous, float32
    delta_ptr,  # (batch, heads, length_q) contiguous, float32
    grad_query_ptr,  # (batch, heads, length_q, head_dim)
    grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride,
    query_batch_stride, query_head_stride, query_row_stride,
    key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    grad_query_batch_stride, grad_query_head_stride, grad_query_row_stride,
    heads, group, length_q, length_k,
    scale, scale_log2e,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(length_q, BLOCK_M)
    start_m = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    batch_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    rows = start_m + tl.arange(0, BLOCK_M)
    first = start_m.to(tl.int64)

    query_ptr += batch * query_batch_stride + head * query_head_stride + first * query_row_stride
    grad_output_ptr += (
        batch * grad_output_batch_stride + head * grad_output_head_stride + first * grad_output_row_stride
    )
    key_ptr += batch * key_batch_stride + head // group * key_head_stride
    value_ptr += batch * value_batch_stride + head // group * value_head_stride
    q = _load_tile(query_ptr, query_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    grad = _load_tile(grad_output_ptr, grad_output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    inside = rows < length_q
    lse = tl.load(lse_ptr + batch_head * length_q + rows, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + batch_head * length_q + rows, mask=inside, other=0.0)

    stop = length_k
    seen_by_all = length_k
    if CAUSAL:
        stop = tl.minimum(length_k, start_m + BLOCK_M)
        seen_by_all = tl.minimum(length_k, start_m + 1)
    full = seen_by_all // BLOCK_N * BLOCK_N
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_query = _query_tiles(
        grad_query, q, grad, lse, delta, key_ptr, value_ptr, key_row_stride, value_row_stride, rows, full, stop,
        length_k, scale_log2e, CAUSAL, True, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
    )  # fmt: skip
    grad_query = _query_tiles(
        grad_query, q, grad, lse, delta, key_ptr, value_ptr, key_row_stride, value_row_stride, rows, 0, full,
        length_k, scale_log2e, CAUSAL, False, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
    )  # fmt: skip
    grad_query_ptr += batch * grad_query_batch_stride + head * grad_query_head_stride + first * grad_query_row_stride
    _store_tile(grad_query_ptr, grad_query_row_stride, rows, length_q, grad_query * scale, BLOCK_M, HEAD_DIM, BLOCK_D)


# --- Configurations -------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys at a time, by a program of num_warps, loads num_stages tiles ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# kernel, bits of an element, the largest padded head_dim -> tiles, from attention.json.
TABLE = Table(
    "attention", {"kernel": ("forward", "key_value", "query"), "bits": (16, 32), "head_dim": None}, Tiles
)  # fmt: skip
# Above it dK and dV together spill with all the tiles tried (8 to 1456 bytes on sm_90), and get a launch each.
_LARGEST_BLOCK_D_OF_ONE_PASS = 128
_DELTA_BLOCK_M = 32
_DELTA_WARPS = 4

_forced_tiles: Tiles | None = None


@contextlib.contextmanager
def forced_tiles(block_m: int, block_n: int, num_warps: int = 4, num_stages: int = 1):
    """For tests: every attention kernel started inside the `with` block uses these tiles.

    Small ones (16 at least: tl.dot's least) bring many tiles, diagonals and tails out of short sequences.
    """
    global _forced_tiles
    before, _forced_tiles = _forced_tiles, Tiles(block_m, block_n, num_warps, num_stages)
    try:
        yield
    finally:
        _forced_tiles = before


def _tiles(kernel: str, device: torch.device, block_d: int, element_size: int) -> Tiles:
    return _forced_tiles or TABLE.find(device, block_d, kernel, 8 * element_size)


def _block_d(head_dim: int) -> int:
    """The power of two that holds head_dim, 16 at least: tl.dot's least."""
    return max(16, next_power_of_2(head_dim))


# --- Launchers ------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_HEAD_DIM = 256
_LARGEST_BLOCK = 256
_INT32_RANGE = 2**31
_LOG2E = math.log2(math.e)


def unsupported(query, key, value, is_causal, scale, attn_mask=None, dropout_p=0.0):
    if attn_mask is not None:
        return "attn_mask is given, and these kernels have the causal mask alone"
    if dropout_p != 0.0:
        return f"dropout_p is {dropout_p}, and these kernels have no dropout"
    if not query.dim() == key.dim() == value.dim() == 4:
        return (
            f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} dimensions; "
            "kernels need 4, (batch, heads, length, head_dim)"
        )
    if query.dtype not in _DTYPES:
        return f"the dtype is {query.dtype}; kernels need float16, bfloat16 or float32"
    batch, heads, _, head_dim = query.shape
    if value.shape[3] != head_dim:
        return f"value has head_dim {value.shape[3]} and query {head_dim}; kernels need them equal"
    if head_dim % 8 != 0 or not 0 < head_dim <= _LARGEST_HEAD_DIM:
        return f"head_dim is {head_dim}; kernels need a multiple of 8 up to {_LARGEST_HEAD_DIM}"
    if key.shape[0] != batch or value.shape[0] != batch:
        return f"batch sizes are {batch}, {key.shape[0]} and {value.shape[0]}; kernels need them equal"
    kv_heads = key.shape[1]
    if value.shape[1] != kv_heads or (heads % kv_heads if kv_heads else heads):
        return (
            f"query, key and value have {heads}, {kv_heads} and {value.shape[1]} heads; kernels need as many in "
            "value as in key, and that they divide the query's"
        )
    return None


def forward(query, key, value, is_causal, scale):
    """-> output (batch, heads, length_q, head_dim), lse (batch, heads, length_q) float32, in base 2."""
    batch, heads, length_q, head_dim = query.shape
    length_k = key.shape[2]
    output = empty_in_layout_of(query)
    lse = query.new_empty((batch, heads, length_q), dtype=torch.float32)
    if output.numel() == 0:
        return output, lse
    if length_k == 0:
        return output.zero_(), lse.fill_(-math.inf)
    query, key, value = map(_readable, (query, key, value))
    block_d = _block_d(head_dim)
    tiles = _tiles("forward", query.device, block_d, query.element_size())
    _forward_kernel[(cdiv(length_q, tiles.block_m) * batch * heads,)](
        query, key, value, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *output.stride()[:3],
        heads, heads // key.shape[1], length_q, length_k,
        scale * _LOG2E,
        CAUSAL=is_causal, **_constants(query, head_dim, block_d, tiles),
    )  # fmt: skip
    return output, lse


def backward(
    grad_output, query, key, value, output, lse, is_causal, scale, need_query, need_key, need_value
):  # fmt: skip
    """-> dquery, dkey, dvalue of the shapes, dtypes and layouts of query, key, value; what is not needed is empty."""
    batch, heads, length_q, head_dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    grad_query, grad_key, grad_value = (
        empty_in_layout_of(tensor) if needed else tensor.new_empty(0)
        for tensor, needed in ((query, need_query), (key, need_key), (value, need_value))
    )
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    grad_output, query, key, value = map(_readable, (grad_output, query, key, value))
    group = heads // kv_heads
    block_d = _block_d(head_dim)
    strides = [stride for tensor in (grad_output, query, key, value) for stride in tensor.stride()[:3]]
    # Nobody reads delta for dvalue alone: lse stands in for the pointer.
    delta = lse
    if need_query or need_key:
        delta = torch.empty_like(lse)
        _delta_kernel[(cdiv(length_q, _DELTA_BLOCK_M) * batch * heads,)](
            grad_output, output, delta,
            *grad_output.stride()[:3], *output.stride()[:3],
            heads, length_q,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=_DELTA_BLOCK_M, num_warps=_DELTA_WARPS,
        )  # fmt: skip
    # A gradient that is not needed is not written: the key's strides stand in for its own.
    key_strides = (grad_key if need_key else key).stride()[:3]
    value_strides = (grad_value if need_value else key).stride()[:3]
    for pass_key, pass_value in _key_value_passes(need_key, need_value, block_d):
        tiles = _tiles("key_value", query.device, block_d, query.element_size())
        _key_value_kernel[(cdiv(length_k, tiles.block_n) * batch * kv_heads,)](
            grad_output, query, key, value, lse, delta, grad_key, grad_value,
            *strides, *key_strides, *value_strides,
            kv_heads, group, length_q, length_k,
            scale, scale * _LOG2E,
            CAUSAL=is_causal, NEED_KEY=pass_key, NEED_VALUE=pass_value,
            **_constants(query, head_dim, block_d, tiles),
        )  # fmt: skip
    if need_query:
        tiles = _tiles("query", query.device, block_d, query.element_size())
        _query_kernel[(cdiv(length_q, tiles.block_m) * batch * heads,)](
            grad_output, query, key, value, lse, delta, grad_query,
            *strides, *grad_query.stride()[:3],
            heads, group, length_q, length_k,
            scale, scale * _LOG2E,
            CAUSAL=is_causal, **_constants(query, head_dim, block_d, tiles),
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _key_value_passes(need_key, need_value, block_d):
    """(computes dK, computes dV) for each launch: one for both, where the registers hold both accumulators."""
    if block_d > _LARGEST_BLOCK_D_OF_ONE_PASS:
        return [(True, False)] * need_key + [(False, True)] * need_value
    return [(need_key, need_value)] if need_key or need_value else []


def _readable(tensor):
    """The tensor itself, or a copy where its head_dim is not contiguous or a tile would pass the int32 range."""
    if tensor.stride(3) == 1 and tensor.stride(2) * _LARGEST_BLOCK < _INT32_RANGE:
        return tensor
    return tensor.contiguous()


def _constants(query, head_dim, block_d, tiles):
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        # IEEE for 16 bits: the option is for float32 operands alone.
        "INPUT_PRECISION": float32_precision() if query.dtype == torch.float32 else "ieee",
        "WIDEN": INTERPRETED,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


# --- What ships, for the compile tests ------------------------------------------------------------------------------

_KERNELS = {"forward": _forward_kernel, "key_value": _key_value_kernel, "query": _query_kernel}


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the configuration table that serves the architecture.

    The one table of float32 is compiled whole for 80: its products are the same scalar instructions on every part.
    """
    cases = [_delta_case()]
    for device, rows in TABLE.shipped(architecture):
        tiles = {key: row.configuration for key, row in rows.items()}
        cases += _cases_of(tiles, device, ("bf16", 64), ("forward",), causal=False)
        # 80 fills 128 columns with masked ones, which costs registers: its rows are the 128s.
        shapes = [("bf16", head_dim) for head_dim in (64, 80, 128, 256)] + [("fp32", 64)]
        if architecture == 80 or device:
            shapes += [("fp32", 128), ("fp32", 256)]
        for shape in shapes:
            cases += _cases_of(tiles, device, shape, ("forward", "query", "key_value"))
    return cases


def _cases_of(tiles, device, shape, kernels, causal=True):
    """The cases of these kernels on a (dtype, head_dim), where the rows have them."""
    dtype, head_dim = shape
    block_d = _block_d(head_dim)
    cases = []
    for kernel in kernels:
        row = tiles.get((kernel, 16 if dtype == "bf16" else 32, max(block_d, 64)))
        if row is not None:
            passes = _key_value_passes(True, True, block_d) if kernel == "key_value" else [(True, True)]
            cases += [_compile_case(kernel, row, device, dtype, head_dim, causal, needs) for needs in passes]
    return cases


def _compile_case(kernel, tiles, device, dtype, head_dim, causal, needs):
    constants = {
        "CAUSAL": causal,
        "HEAD_DIM": head_dim,
        "BLOCK_D": _block_d(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "INPUT_PRECISION": "ieee",
        "WIDEN": False,
    }
    if kernel == "key_value":
        constants |= dict(zip(("NEED_KEY", "NEED_VALUE"), needs))
    signature, aligned = _signature(_KERNELS[kernel], dtype, constants)
    gradients = "" if all(needs) else " dK" if needs[0] else " dV"
    name = f"{kernel}{gradients} hd{head_dim}{' causal' if causal else ''} {dtype}{device}"
    return CompileCase(
        name, _KERNELS[kernel], signature, constants, tiles.num_warps, tiles.num_stages, aligned,
        matrix_product=dtype == "bf16",
    )  # fmt: skip


def _delta_case():
    constants = {"HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_M": _DELTA_BLOCK_M}
    signature, aligned = _signature(_delta_kernel, "bf16", constants)
    return CompileCase("delta hd128 bf16", _delta_kernel, signature, constants, _DELTA_WARPS, 1, aligned)


def _signature(kernel, dtype, constants):
    """The types of a kernel's arguments by their names, and which of them are multiples of 16: the strides."""
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32", "scale_log2e": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return signature, tuple(name for name in kernel.arg_names if name.endswith("_stride"))
