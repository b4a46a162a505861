"""attention's backward on Triton, after FlashAttention-2; the letters are those of triton.py.

With delta = sum over head_dim of dO * O:
    dV = P^T @ dO            dP = dO @ V^T
    dS = P * (dP - delta)    dQ = scale * dS @ K            dK = scale * dS^T @ Q

P is recomputed from the log-sum-exp that the forward kept. One program of the dQ kernel computes a tile of BLOCK_M
queries of one head; one of the dK/dV kernel computes BLOCK_N keys of one key/value head, over all queries of all the
query heads that read it. Each has two loops, as the forward has. Every result is written by one program, once: no
atomics, the same on every run. P and dS stay in registers, rounded to the inputs' dtype for the second product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptkern.backends.triton.common import CompileCase, cdiv, dot
from gptkern.backends.triton.direct import jit
from gptkern.operators.attention.contract import Call, Gradient, empty_in_layout_of
from gptkern.operators.attention.triton_launch import (
    LOG2E,
    compile_case,
    constants_of,
    extra_cases,
    extras_of,
    padded_head_dim,
    read,
    shipped_tiles,
    signature,
    tiles_of,
)
from gptkern.operators.attention.triton_tiles import (
    ADDITIVE_MASK,
    NO_MASK,
    causal_offset,
    kept_tile,
    key_range,
    load_lse,
    load_mask,
    load_tile,
    probabilities_of,
    query_range,
    scores_of,
    store_tile,
)

# Above it dK and dV together spill with all the tiles tried (8 to 1456 bytes on sm_90), and get a launch each.
_LARGEST_BLOCK_D_OF_ONE_PASS = 128
_DELTA_BLOCK_M = 32
_DELTA_WARPS = 4

# --- Kernels --------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["heads", "length_q"])
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
    grad = load_tile(grad_output_ptr, grad_output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    output = load_tile(output_ptr, output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
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
    row_max_ptr,  # None where MASK is not ADDITIVE_MASK
    mask_ptr,  # this query head's mask from the first of these keys on; None where MASK is NO_MASK
    seed_ptr,  # None without DROPOUT
    query_row_stride,
    grad_output_row_stride,
    mask_row_stride,
    mask_column_stride,
    batch_head,  # of the queries
    start_n,
    positions,  # (BLOCK_N,) of these keys among the queries: j - offset
    tile,  # the first tile of queries
    count,  # how many tiles
    diagonal_stop,
    tail,  # the tile that follows the last one of the diagonal, where PARTIAL
    length_q,
    length_k,
    score_scale,
    drop_below,
    keep_scale,
    CAUSAL: tl.constexpr, LOWER_RIGHT: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether the tiles see the keys in part, or are cut short
    MASK: tl.constexpr, MASK_BY_KEY: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for index in tl.range(0, count):
        tile_m = tile + index
        if PARTIAL:
            tile_m = tl.where(tile_m < diagonal_stop, tile_m, tail)
        start_m = tile_m * BLOCK_M
        rows = start_m + tl.arange(0, BLOCK_M)
        first = tl.cast(start_m, tl.int64)
        q = load_tile(
            query_ptr + first * query_row_stride,
            query_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, PARTIAL,
        )  # fmt: skip
        grad = load_tile(
            grad_output_ptr + first * grad_output_row_stride,
            grad_output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, PARTIAL,
        )  # fmt: skip
        lse = load_lse(lse_ptr, rows, length_q, PARTIAL, MASK, LOWER_RIGHT)
        row_max = None
        if MASK == ADDITIVE_MASK:
            row_max = tl.load(row_max_ptr + rows, mask=rows < length_q, other=0.0)[None, :]
        products = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), INPUT_PRECISION, WIDEN)
        mask = None
        if MASK != NO_MASK:
            mask = load_mask(
                mask_ptr + first * mask_row_stride, mask_row_stride, mask_column_stride,
                tl.arange(0, BLOCK_M)[None, :], tl.arange(0, BLOCK_N)[:, None],
                length_q - start_m, length_k - start_n, MASK_BY_KEY, PARTIAL, True,
            )  # fmt: skip
        # Of keys beyond the last one nothing is stored: they need not be hidden.
        scores = scores_of(
            products, mask, rows[None, :], positions[:, None], length_k, score_scale, CAUSAL, PARTIAL, False, MASK
        )  # fmt: skip
        p = probabilities_of(scores, lse[None, :], row_max, score_scale, MASK)
        if DROPOUT:
            # The sign of p says whether it is kept: used twice, the mask would be made twice, for two layouts.
            kept = kept_tile(seed, batch_head, start_m, start_n, drop_below, BLOCK_M, BLOCK_N, True)
            p = tl.where(kept, p, -p)
        if NEED_VALUE:
            # dV = P^T @ dO, of the P that dropout kept
            weights = p
            if DROPOUT:
                weights = tl.maximum(p, 0.0)
            grad_value = dot(weights.to(grad.dtype), grad, grad_value, INPUT_PRECISION, WIDEN)
        if NEED_KEY:
            if PARTIAL:
                delta = tl.load(delta_ptr + rows, mask=rows < length_q, other=0.0)
            else:
                delta = tl.load(delta_ptr + rows)
            # dS^T = P^T * (dP - delta)^T,  dP^T = V @ dO^T
            dp = dot(v, tl.trans(grad), tl.zeros((BLOCK_N, BLOCK_M), tl.float32), INPUT_PRECISION, WIDEN)
            if DROPOUT:
                dp = tl.where(p > 0.0, dp * keep_scale, 0.0)
                p = tl.abs(p)
            ds = p * (dp - delta[None, :])
            # dK = scale * dS^T @ Q
            grad_key = dot(ds.to(q.dtype), q, grad_key, INPUT_PRECISION, WIDEN)
    return grad_key, grad_value


@jit(
    do_not_specialize=[
        "kv_heads", "group", "length_q", "length_k", "scale", "score_scale", "drop_below", "keep_scale",
    ]
)  # fmt: skip
def _key_value_kernel(
    grad_output_ptr,  # (batch, kv_heads * group, length_q, head_dim)
    query_ptr,  # (batch, kv_heads * group, length_q, head_dim)
    key_ptr,  # (batch, kv_heads, length_k, head_dim)
    value_ptr,  # (batch, kv_heads, length_k, head_dim)
    lse_ptr,  # (batch, kv_heads * group, length_q) contiguous, float32
    delta_ptr,  # (batch, kv_heads * group, length_q) contiguous, float32; read where NEED_KEY
    row_max_ptr,  # the same, where MASK is ADDITIVE_MASK; None else, and so are all the arguments of what is not used
    mask_ptr,  # (batch, kv_heads * group, length_q, length_k), any strides: uint8 (0 hides) or floating point
    seed_ptr,  # (1,) int64
    grad_key_ptr,  # (batch, kv_heads, length_k, head_dim), written where NEED_KEY
    grad_value_ptr,  # (batch, kv_heads, length_k, head_dim), written where NEED_VALUE
    grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride,
    query_batch_stride, query_head_stride, query_row_stride,
    key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    grad_key_batch_stride, grad_key_head_stride, grad_key_row_stride,
    grad_value_batch_stride, grad_value_head_stride, grad_value_row_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride,
    kv_heads, group, length_q, length_k,
    scale,
    score_scale,  # scale * log2(e); scale where MASK is ADDITIVE_MASK
    drop_below,  # int32, see triton_tiles.py
    keep_scale,  # 1 / (1 - dropout_p)
    CAUSAL: tl.constexpr, LOWER_RIGHT: tl.constexpr,
    MASK: tl.constexpr, MASK_BY_KEY: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_KEY: tl.constexpr, NEED_VALUE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
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
    k = load_tile(key_ptr, key_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_tile(value_ptr, value_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, True)

    partial, diagonal_stop, whole, count = query_range(
        start_n, length_q, length_k, CAUSAL, LOWER_RIGHT, BLOCK_M, BLOCK_N
    )
    positions = columns - causal_offset(length_q, length_k, LOWER_RIGHT)
    grad_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_value = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        query_batch_head = batch * kv_heads * group + head
        row_base = query_batch_head * length_q
        head_query_ptr = query_ptr + batch * query_batch_stride + head * query_head_stride
        head_grad_ptr = grad_output_ptr + batch * grad_output_batch_stride + head * grad_output_head_stride
        head_mask_ptr = mask_ptr
        if MASK != NO_MASK:
            head_mask_ptr += batch * mask_batch_stride + head * mask_head_stride + first * mask_column_stride
        head_row_max_ptr = row_max_ptr
        if MASK == ADDITIVE_MASK:
            head_row_max_ptr += row_base
        # Twice the same, first of the tiles that see the keys in part.
        for full in tl.static_range(2):
            # The branch: as in the forward.
            if (whole - diagonal_stop if full else count) > 0:
                grad_key, grad_value = _key_value_tiles(
                    grad_key, grad_value, k, v, head_query_ptr, head_grad_ptr, lse_ptr + row_base, delta_ptr + row_base,
                    head_row_max_ptr, head_mask_ptr, seed_ptr, query_row_stride, grad_output_row_stride,
                    mask_row_stride, mask_column_stride, query_batch_head, start_n, positions,
                    diagonal_stop if full else partial, whole - diagonal_stop if full else count, diagonal_stop, whole,
                    length_q, length_k, score_scale, drop_below, keep_scale,
                    CAUSAL, LOWER_RIGHT, full == 0, MASK, MASK_BY_KEY, DROPOUT, NEED_KEY, NEED_VALUE,
                    HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
                )  # fmt: skip

    if NEED_KEY:
        grad_key_ptr += batch * grad_key_batch_stride + kv_head * grad_key_head_stride + first * grad_key_row_stride
        store_tile(grad_key_ptr, grad_key_row_stride, columns, length_k, grad_key * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    if NEED_VALUE:
        if DROPOUT:
            grad_value = grad_value * keep_scale
        grad_value_ptr += (
            batch * grad_value_batch_stride + kv_head * grad_value_head_stride + first * grad_value_row_stride
        )
        store_tile(grad_value_ptr, grad_value_row_stride, columns, length_k, grad_value, BLOCK_N, HEAD_DIM, BLOCK_D)


@triton.jit
def _query_tiles(
    grad_query,  # (BLOCK_M, BLOCK_D) float32, dQ / scale
    q,  # (BLOCK_M, BLOCK_D)
    grad,  # (BLOCK_M, BLOCK_D)
    lse,  # (BLOCK_M,) float32
    delta,  # (BLOCK_M,) float32
    row_max,  # (BLOCK_M, 1) float32, where MASK is ADDITIVE_MASK
    key_ptr,  # this head's keys
    value_ptr,
    mask_ptr,  # this head's mask from the first of these queries on; None where MASK is NO_MASK
    seed_ptr,  # None without DROPOUT
    key_row_stride,
    value_row_stride,
    mask_row_stride,
    mask_column_stride,
    batch_head,
    start_m,
    positions,  # (BLOCK_M,) of these queries among the keys: i + offset
    start,
    stop,
    length_q,
    length_k,
    score_scale,
    drop_below,
    keep_scale,
    CAUSAL: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether the tiles are seen in part, or cut short
    MASK: tl.constexpr, MASK_BY_KEY: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start_n in tl.range(start, stop, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        columns = start_n + tl.arange(0, BLOCK_N)
        first = tl.cast(start_n, tl.int64)
        k = load_tile(
            key_ptr + first * key_row_stride, key_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, PARTIAL
        )
        v = load_tile(
            value_ptr + first * value_row_stride,
            value_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, PARTIAL,
        )  # fmt: skip
        products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        mask = None
        if MASK != NO_MASK:
            mask = load_mask(
                mask_ptr + first * mask_column_stride, mask_row_stride, mask_column_stride,
                tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :],
                length_q - start_m, length_k - start_n, MASK_BY_KEY, True, PARTIAL,
            )  # fmt: skip
        scores = scores_of(
            products, mask, positions[:, None], columns[None, :], length_k, score_scale, CAUSAL, PARTIAL, True, MASK
        )  # fmt: skip
        p = probabilities_of(scores, lse[:, None], row_max, score_scale, MASK)
        # dS = P * (dP - delta),  dP = dO @ V^T
        dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        if DROPOUT:
            kept = kept_tile(seed, batch_head, start_m, start_n, drop_below, BLOCK_M, BLOCK_N, False)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        # dQ = scale * dS @ K
        grad_query = dot(ds.to(k.dtype), k, grad_query, INPUT_PRECISION, WIDEN)
    return grad_query


@jit(
    do_not_specialize=[
        "heads", "group", "length_q", "length_k", "scale", "score_scale", "drop_below", "keep_scale",
    ]
)  # fmt: skip
def _query_kernel(
    grad_output_ptr,  # (batch, heads, length_q, head_dim)
    query_ptr,  # (batch, heads, length_q, head_dim)
    key_ptr,  # (batch, heads // group, length_k, head_dim)
    value_ptr,  # (batch, heads // group, length_k, head_dim)
    lse_ptr,  # (batch, heads, length_q) contiguous, float32
    delta_ptr,  # (batch, heads, length_q) contiguous, float32
    row_max_ptr,  # the same, where MASK is ADDITIVE_MASK; None else, and so are all the arguments of what is not used
    mask_ptr,  # (batch, heads, length_q, length_k), any strides: uint8 (0 hides) or floating point
    seed_ptr,  # (1,) int64
    grad_query_ptr,  # (batch, heads, length_q, head_dim)
    grad_output_batch_stride, grad_output_head_stride, grad_output_row_stride,
    query_batch_stride, query_head_stride, query_row_stride,
    key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    grad_query_batch_stride, grad_query_head_stride, grad_query_row_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride,
    heads, group, length_q, length_k,
    scale,
    score_scale,  # scale * log2(e); scale where MASK is ADDITIVE_MASK
    drop_below,  # int32, see triton_tiles.py
    keep_scale,  # 1 / (1 - dropout_p)
    CAUSAL: tl.constexpr, LOWER_RIGHT: tl.constexpr,
    MASK: tl.constexpr, MASK_BY_KEY: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
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
    q = load_tile(query_ptr, query_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    grad = load_tile(grad_output_ptr, grad_output_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    inside = rows < length_q
    row_base = batch_head * length_q
    lse = load_lse(lse_ptr + row_base, rows, length_q, True, MASK, LOWER_RIGHT)
    delta = tl.load(delta_ptr + row_base + rows, mask=inside, other=0.0)
    row_max = None
    if MASK == ADDITIVE_MASK:
        row_max = tl.load(row_max_ptr + row_base + rows, mask=inside, other=0.0)[:, None]
    if MASK != NO_MASK:
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride + first * mask_row_stride

    full, stop = key_range(start_m, length_q, length_k, CAUSAL, LOWER_RIGHT, BLOCK_M, BLOCK_N)
    positions = rows + causal_offset(length_q, length_k, LOWER_RIGHT)
    grad_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for whole in tl.static_range(2):
        # The branch: as in the forward.
        if (0 if whole else full) < (full if whole else stop):
            grad_query = _query_tiles(
                grad_query, q, grad, lse, delta, row_max, key_ptr, value_ptr, mask_ptr, seed_ptr,
                key_row_stride, value_row_stride, mask_row_stride, mask_column_stride, batch_head, start_m, positions,
                0 if whole else full, full if whole else stop,
                length_q, length_k, score_scale, drop_below, keep_scale,
                CAUSAL, whole == 0, MASK, MASK_BY_KEY, DROPOUT,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
            )  # fmt: skip
    grad_query_ptr += batch * grad_query_batch_stride + head * grad_query_head_stride + first * grad_query_row_stride
    store_tile(grad_query_ptr, grad_query_row_stride, rows, length_q, grad_query * scale, BLOCK_M, HEAD_DIM, BLOCK_D)


# --- Launchers ------------------------------------------------------------------------------------------------------


def backward(gradient: Gradient, call: Call):
    """-> dquery, dkey, dvalue of the shapes, dtypes and layouts of query, key, value; what is not needed is empty."""
    grad_output, output, lse, need_query, need_key, need_value = gradient
    query, key, value, is_causal, scale, attn_mask, dropout_p, lower_right, seed = call
    batch, heads, length_q, head_dim = query.shape
    kv_heads, length_k = key.shape[1:3]
    grad_query, grad_key, grad_value = (
        empty_in_layout_of(tensor) if needed else tensor.new_empty(0)
        for tensor, needed in ((query, need_query), (key, need_key), (value, need_value))
    )
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    grad_output, grad_strides = read(grad_output)
    query, query_strides = read(query)
    key, key_strides = read(key)
    value, value_strides = read(value)
    output, output_strides = read(output)
    # As the forward made it: saved_tensors_hooks may hand back other strides.
    lse = lse.contiguous()
    extras = extras_of(query, key, attn_mask, dropout_p, seed)
    lse, row_max = (lse[0], lse[1]) if extras.is_additive else (lse, None)
    group = heads // kv_heads
    block_d = padded_head_dim(head_dim)
    strides = *grad_strides, *query_strides, *key_strides, *value_strides
    scales = scale, scale if extras.is_additive else scale * LOG2E, extras.drop_below, extras.keep_scale
    constants = {"CAUSAL": is_causal, "LOWER_RIGHT": lower_right, **extras.constants}
    # Nobody reads delta for dvalue alone: lse stands in for the pointer.
    delta = lse
    if need_query or need_key:
        delta = torch.empty_like(lse)
        _delta_kernel[(cdiv(length_q, _DELTA_BLOCK_M) * batch * heads,)](
            grad_output, output, delta,
            *grad_strides, *output_strides,
            heads, length_q,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=_DELTA_BLOCK_M, num_warps=_DELTA_WARPS,
        )  # fmt: skip
    # A gradient that is not needed is not written: the key's strides stand in for its own.
    grad_key_strides = (grad_key if need_key else key).stride()[:3]
    grad_value_strides = (grad_value if need_value else key).stride()[:3]
    for pass_key, pass_value in _key_value_passes(need_key, need_value, block_d):
        tiles = tiles_of("key_value", query, block_d, extras)
        _key_value_kernel[(cdiv(length_k, tiles.block_n) * batch * kv_heads,)](
            grad_output, query, key, value, lse, delta, row_max, extras.mask, extras.seed, grad_key, grad_value,
            *strides, *grad_key_strides, *grad_value_strides, *extras.mask_strides,
            kv_heads, group, length_q, length_k,
            *scales,
            NEED_KEY=pass_key, NEED_VALUE=pass_value, **constants, **constants_of(query, head_dim, block_d, tiles),
        )  # fmt: skip
    if need_query:
        tiles = tiles_of("query", query, block_d, extras)
        _query_kernel[(cdiv(length_q, tiles.block_m) * batch * heads,)](
            grad_output, query, key, value, lse, delta, row_max, extras.mask, extras.seed, grad_query,
            *strides, *grad_query.stride()[:3], *extras.mask_strides,
            heads, group, length_q, length_k,
            *scales,
            **constants, **constants_of(query, head_dim, block_d, tiles),
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _key_value_passes(need_key, need_value, block_d):
    """(computes dK, computes dV) for each launch: one for both, where the registers hold both accumulators."""
    if block_d > _LARGEST_BLOCK_D_OF_ONE_PASS:
        return [(True, False)] * need_key + [(False, True)] * need_value
    return [(need_key, need_value)] if need_key or need_value else []


# --- What ships, for the compile tests ------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the configuration table that serves the architecture."""
    cases = [_delta_case()]
    for variant, row, causal in _variants(architecture, "query"):
        cases.append(compile_case(_query_kernel, "query", row, variant, **causal))
    for variant, row, causal in _variants(architecture, "key_value"):
        for need_key, need_value in _key_value_passes(True, True, padded_head_dim(row.head_dim)):
            name = "key_value" + ("" if need_key and need_value else " dK" if need_key else " dV")
            needs = {"NEED_KEY": need_key, "NEED_VALUE": need_value} | causal
            cases.append(compile_case(_key_value_kernel, name, row, variant, "keys", **needs))
    return cases


def _variants(architecture, kernel):
    """(variant, row, constants) of the kernel's cases: causal; without the limit, save head_dim 80; the others."""
    rows = shipped_tiles(architecture, kernel)
    whole = [row for row in rows if row.dtype == "bf16" and row.head_dim != 80]
    found = [("", row, {}) for row in rows] + [("", row, {"CAUSAL": False}) for row in whole]
    return found + [(variant, row, {}) for variant, row in extra_cases(architecture, kernel)]


def _delta_case():
    constants = {"HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_M": _DELTA_BLOCK_M}
    types, aligned = signature(_delta_kernel, "bf16", constants)
    return CompileCase("delta hd128 bf16", _delta_kernel, types, constants, _DELTA_WARPS, 1, aligned)
