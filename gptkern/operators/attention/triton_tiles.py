"""What the kernels of attention share on Triton: tiles in memory, which tiles meet, S, P, and dropout.

The forward, dK/dV and dQ agree on what a query sees because they ask the same functions. Beside a causal limit query i
sees the keys up to i + offset (`causal_offset`):

    key_range      the tiles of keys that a tile of queries sees, whole or in part
    query_range    the tiles of queries that see a tile of keys
    scores_of      S of two tiles, -inf where a query does not see a key

Dropout keeps the probability of (batch, head, row, column) where its word of Philox4x32-10 is not below a threshold:

    words = Philox(key = seed, counter = (column // 4, row, batch * heads + head, 0))
    kept  = words[column % 4], as an int32, >= round(dropout_p * 2^32) - 2^31

The counter knows nothing of tiles: the backward makes the same mask again, whatever its own. Four columns share a
counter because Philox gives four words, and its 20 wide products cost more than the rest of a probability.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_OF_E = tl.constexpr(math.log2(math.e))

# --- Tiles of a sequence --------------------------------------------------------------------------------------------


@triton.jit
def load_tile(
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
def store_tile(
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


# What `mask_ptr` holds (MASK).
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)  # uint8: 0 hides
ADDITIVE_MASK = tl.constexpr(2)


@triton.jit
def load_mask(
    tile_ptr,  # pointer to the tile's first element
    row_stride,
    column_stride,
    row_offsets,  # (BLOCK_M, 1) or (1, BLOCK_M): numbers within the tile
    column_offsets,  # (1, BLOCK_N) or (BLOCK_N, 1)
    rows_left,  # how many rows and columns there are from the tile's first on
    columns_left,
    BY_KEY: tl.constexpr,  # every row is the same: one row is read, and broadcast
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,  # where it need not be, several columns are read at once
):
    """The tile of an attention mask; 0 where it has no element."""
    if BY_KEY:
        pointers = tile_ptr + column_offsets * column_stride
        if CHECK_COLUMNS:
            return tl.load(pointers, mask=column_offsets < columns_left, other=0)
        else:
            return tl.load(pointers)
    else:
        pointers = tile_ptr + (row_offsets * row_stride + column_offsets * column_stride)
        if CHECK_ROWS and CHECK_COLUMNS:
            return tl.load(pointers, mask=(row_offsets < rows_left) & (column_offsets < columns_left), other=0)
        elif CHECK_ROWS:
            return tl.load(pointers, mask=row_offsets < rows_left, other=0)
        elif CHECK_COLUMNS:
            return tl.load(pointers, mask=column_offsets < columns_left, other=0)
        else:
            return tl.load(pointers)


# --- Which tiles meet ----------------------------------------------------------------------------------------------


@triton.jit
def causal_offset(length_q, length_k, LOWER_RIGHT: tl.constexpr):
    """Beside a causal limit query i sees the keys up to i + offset."""
    if LOWER_RIGHT:
        return length_k - length_q
    else:
        return 0


@triton.jit
def key_range(
    start_m,
    length_q,
    length_k,
    CAUSAL: tl.constexpr,
    LOWER_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(full, stop): every query of the tile sees the keys [0, full), whole tiles; some see those of [full, stop)."""
    stop = length_k
    seen_by_all = length_k
    if CAUSAL:
        stop = start_m + causal_offset(length_q, length_k, LOWER_RIGHT) + BLOCK_M
        seen_by_all = start_m + causal_offset(length_q, length_k, LOWER_RIGHT) + 1
        if LOWER_RIGHT:
            stop, seen_by_all = tl.maximum(stop, 0), tl.maximum(seen_by_all, 0)
        stop, seen_by_all = tl.minimum(length_k, stop), tl.minimum(length_k, seen_by_all)
    return seen_by_all // BLOCK_N * BLOCK_N, stop


@triton.jit
def query_range(
    start_n,
    length_q,
    length_k,
    CAUSAL: tl.constexpr,
    LOWER_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(partial, diagonal_stop, whole, count), in tiles of queries.

    Queries of [partial, diagonal_stop) see some of the keys, those of [diagonal_stop, whole) see all of them, and a
    last tile may be cut short by length_q. count: how many tiles are not whole or not seen whole.
    """
    tiles = tl.cdiv(length_q, BLOCK_M)
    whole = length_q // BLOCK_M
    partial = 0
    diagonal_stop = 0
    if CAUSAL:
        # The first query that sees the first of the keys, and the first that sees the last one.
        first = start_n - causal_offset(length_q, length_k, LOWER_RIGHT)
        last = first + BLOCK_N - 1
        if LOWER_RIGHT:
            first, last = tl.maximum(first, 0), tl.maximum(last, 0)
        partial = first // BLOCK_M
        diagonal_stop = tl.minimum(tiles, tl.cdiv(last, BLOCK_M))
    count = tl.maximum(diagonal_stop - partial, 0)
    if tl.maximum(diagonal_stop, whole) < tiles:
        count += 1
    return partial, diagonal_stop, whole, count


# --- S and P --------------------------------------------------------------------------------------------------------


@triton.jit
def scores_of(
    products,  # Q @ K^T of two tiles, float32: (BLOCK_M, BLOCK_N), or (BLOCK_N, BLOCK_M)
    mask,  # the same of the mask; None where MASK is NO_MASK
    queries,  # (BLOCK_M, 1) or (1, BLOCK_M): positions
    keys,  # (1, BLOCK_N) or (BLOCK_N, 1)
    length_k,
    scale,  # where MASK is ADDITIVE_MASK
    CAUSAL: tl.constexpr,
    PARTIAL: tl.constexpr,  # whether the tile has queries that do not see all of its keys, by the limits of the ranges
    CHECK_KEYS: tl.constexpr,  # whether such a tile has to hide keys from length_k on
    MASK: tl.constexpr,
):
    """scale * Q @ K^T + mask where MASK is ADDITIVE_MASK, else Q @ K^T, which exponents scale; -inf where hidden.

    Positions are counted together, so that a causal limit is key <= query: query i at i + offset and key j at j, or,
    where a loop walks the queries, i and j - offset. What the loop keeps is moved, once.
    """
    if MASK == ADDITIVE_MASK:
        scores = products * scale + mask.to(tl.float32)
    elif MASK == BOOL_MASK:
        scores = tl.where(mask != 0, products, float("-inf"))
    else:
        scores = products
    if PARTIAL and CHECK_KEYS and CAUSAL:
        scores = tl.where((keys < length_k) & (keys <= queries), scores, float("-inf"))
    elif PARTIAL and CHECK_KEYS:
        scores = tl.where(keys < length_k, scores, float("-inf"))
    elif PARTIAL and CAUSAL:
        scores = tl.where(keys <= queries, scores, float("-inf"))
    return scores


@triton.jit
def load_lse(lse_ptr, rows, length_q, CHECK_ROWS: tl.constexpr, MASK: tl.constexpr, LOWER_RIGHT: tl.constexpr):
    """lse of a tile of queries; inf beyond the last one and where no key is seen: 2^(S - inf) = 0."""
    if CHECK_ROWS:
        lse = tl.load(lse_ptr + rows, mask=rows < length_q, other=float("inf"))
    else:
        lse = tl.load(lse_ptr + rows)
    if MASK != NO_MASK or LOWER_RIGHT:
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse


@triton.jit
def probabilities_of(
    scores,  # of scores_of
    lse,  # (BLOCK_M, 1) or (1, BLOCK_M), of load_lse
    row_max,  # the same, where MASK is ADDITIVE_MASK
    score_scale,  # scale * log2(e), where it is not
    MASK: tl.constexpr,
):
    """P, which the backward computes anew."""
    if MASK == ADDITIVE_MASK:
        return tl.exp2((scores - row_max) * LOG2_OF_E - lse)
    else:
        # P = 2^(S - lse)
        return tl.exp2(scores * score_scale - lse)


# --- Dropout --------------------------------------------------------------------------------------------------------


@triton.jit
def kept_tile(
    seed,  # int64
    batch_head,
    start_m,
    start_n,
    drop_below,  # int32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_COLUMNS: tl.constexpr,  # (BLOCK_N, BLOCK_M) instead of (BLOCK_M, BLOCK_N)
):
    """bool: which probabilities of the tile dropout keeps."""
    rows = start_m + tl.arange(0, BLOCK_M)
    groups = start_n // 4 + tl.arange(0, BLOCK_N // 4)
    if BY_COLUMNS:
        rows, groups = rows[None, :], groups[:, None]
        zeros = tl.zeros((BLOCK_N // 4, BLOCK_M), tl.uint32)
    else:
        rows, groups = rows[:, None], groups[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, groups.to(tl.uint32) + zeros, rows.to(tl.uint32) + zeros, batch_head.to(tl.uint32) + zeros, zeros
    )
    k0, k1 = w0.to(tl.int32, bitcast=True) >= drop_below, w1.to(tl.int32, bitcast=True) >= drop_below
    k2, k3 = w2.to(tl.int32, bitcast=True) >= drop_below, w3.to(tl.int32, bitcast=True) >= drop_below
    # [..., b, a] is column 2b + a of its group.
    kept = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    if BY_COLUMNS:
        return tl.reshape(tl.permute(kept, (0, 2, 3, 1)), (BLOCK_N, BLOCK_M))
    else:
        return tl.reshape(kept, (BLOCK_M, BLOCK_N))
