"""attention's forward on Triton, after FlashAttention-2; the backward is in triton_backward.py.

    S = log2(e) * scale * Q @ K^T          P = softmax(scale * Q @ K^T) = 2^(S - lse)
    O = P @ V                              lse = log2(sum over the keys of 2^S)

A tile of keys at a time; m is the running maximum of S, l the running sum, A the running P @ V:
    m' = max(m, rowmax(S))                 p = 2^(S - m')
    l = l * 2^(m - m') + rowsum(p)         A = A * 2^(m - m') + p @ V
    O = A / l                              lse = m + log2(l)

One program computes a tile of BLOCK_M queries of one head. It has two loops: first the tiles on the diagonal and the
tail, which are masked, then the full tiles, which know no mask. P stays in registers, rounded to the inputs' dtype for
the second product, as the tensor cores take it; sums are float32.

What it costs, for n = batch * heads, lengths T and S, head_dim D, b bytes an element:
    operations     forward 4nTSD, backward 14nTSD (dK/dV computes four products, dQ three), both halved by the mask
    least bytes    forward nb(2T + 2S/group)D + 4nT, backward about twice that
At T = S an H100's 989 TFLOP/s and 3.35 TB/s meet near 300 operations a byte and the forward does TS/(T + S) = T/2 of
them a byte in bfloat16: above a length of some 600 (1200 with the mask) the tensor cores are the floor, not memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptkern.backends.triton.common import INTERPRETED, CompileCase, cdiv, dot, float32_precision
from gptkern.backends.triton.direct import jit, keep_plan
from gptkern.operators.attention import triton_backward
from gptkern.operators.attention.checks import outside_of_kernels
from gptkern.operators.attention.contract import Call, empty_in_layout_of, empty_lse, no_key
from gptkern.operators.attention.triton_launch import (
    LOG2E,
    TABLE,
    compile_case,
    extra_cases,
    extras_of,
    forced_tiles,
    input_precision,
    padded_head_dim,
    read,
    shipped_tiles,
    tiles_of,
    unreadable_mask,
)
from gptkern.operators.attention.triton_tiles import (
    ADDITIVE_MASK,
    LOG2_OF_E,
    NO_MASK,
    causal_offset,
    kept_tile,
    key_range,
    load_mask,
    load_tile,
    scores_of,
    store_tile,
)

__all__ = ["TABLE", "backward", "compile_cases", "forced_tiles", "forward", "unsupported"]

# Where the running maximum starts: below every score, yet finite, so that m - m' is never -inf - -inf.
LOWEST = tl.constexpr(-1.0e38)

# --- Forward --------------------------------------------------------------------------------------------------------


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
    mask_ptr,  # this head's mask from the first of these queries on; None where MASK is NO_MASK
    mask_row_stride,
    mask_column_stride,
    seed_ptr,  # None without DROPOUT
    drop_below,
    batch_head,
    start_m,
    positions,  # (BLOCK_M,) of these queries among the keys: i + offset
    start,
    stop,
    length_q,
    length_k,
    score_scale,
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
        # What a load and a product both reach gets the layout of the later one. That of a bool mask's last tile, which
        # is read byte by byte, would make each exponential twice; an additive mask would take registers beside Q @ K^T.
        if MASK == ADDITIVE_MASK:
            products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        mask = None
        if MASK != NO_MASK:
            mask = load_mask(
                mask_ptr + first * mask_column_stride, mask_row_stride, mask_column_stride,
                tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :],
                length_q - start_m, length_k - start_n, MASK_BY_KEY, True, PARTIAL,
            )  # fmt: skip
        if MASK != ADDITIVE_MASK:
            products = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION, WIDEN)
        scores = scores_of(
            products, mask, positions[:, None], columns[None, :], length_k, score_scale, CAUSAL, PARTIAL, True, MASK
        )  # fmt: skip
        if MASK == ADDITIVE_MASK:
            # As below in base e: a mask of -3e38, which hides as well as -inf does, would overflow in base 2.
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2((scores - shift[:, None]) * LOG2_OF_E)
            correction = tl.exp2((row_max - shift) * LOG2_OF_E)
        else:
            # m' = max(m, rowmax(S)): scale > 0, so one product a row instead of one a score
            new_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
            # p = 2^(S - m')
            p = tl.exp2(scores * score_scale - new_max[:, None])
            correction = tl.exp2(row_max - new_max)
        # A = A * 2^(m - m') + p @ V, and l alike
        row_sum = row_sum * correction + tl.sum(p, 1)
        if DROPOUT:
            # l is the sum of all: what is dropped is missing from A alone
            kept = kept_tile(seed, batch_head, start_m, start_n, drop_below, BLOCK_M, BLOCK_N, False)
            p = tl.where(kept, p, 0.0)
        accumulator = accumulator * correction[:, None]
        v = load_tile(
            value_ptr + first * value_row_stride,
            value_row_stride, columns, length_k, BLOCK_N, HEAD_DIM, BLOCK_D, PARTIAL,
        )  # fmt: skip
        accumulator = dot(p.to(v.dtype), v, accumulator, INPUT_PRECISION, WIDEN)
        row_max = new_max
    return accumulator, row_max, row_sum


@jit(do_not_specialize=["heads", "group", "length_q", "length_k", "score_scale", "drop_below", "keep_scale"])
def _forward_kernel(
    query_ptr,  # (batch, heads, length_q, head_dim), any strides but the last, which is 1; so are all below
    key_ptr,  # (batch, heads // group, length_k, head_dim)
    value_ptr,  # (batch, heads // group, length_k, head_dim)
    output_ptr,  # (batch, heads, length_q, head_dim)
    lse_ptr,  # (batch, heads, length_q) contiguous, float32
    row_max_ptr,  # the same, where MASK is ADDITIVE_MASK; None else, and so are all the arguments of what is not used
    mask_ptr,  # (batch, heads, length_q, length_k), any strides: uint8 (0 hides) or floating point
    seed_ptr,  # (1,) int64
    query_batch_stride, query_head_stride, query_row_stride,
    key_batch_stride, key_head_stride, key_row_stride,
    value_batch_stride, value_head_stride, value_row_stride,
    output_batch_stride, output_head_stride, output_row_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride,
    heads, group, length_q, length_k,
    score_scale,  # scale * log2(e); scale where MASK is ADDITIVE_MASK
    drop_below,  # int32, see triton_tiles.py
    keep_scale,  # 1 / (1 - dropout_p)
    CAUSAL: tl.constexpr, LOWER_RIGHT: tl.constexpr,
    MASK: tl.constexpr, MASK_BY_KEY: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, WIDEN: tl.constexpr,
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
    q = load_tile(query_ptr, query_row_stride, rows, length_q, BLOCK_M, HEAD_DIM, BLOCK_D, True)

    if MASK != NO_MASK:
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride + first * mask_row_stride

    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf") if MASK == ADDITIVE_MASK else LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    full, stop = key_range(start_m, length_q, length_k, CAUSAL, LOWER_RIGHT, BLOCK_M, BLOCK_N)
    positions = rows + causal_offset(length_q, length_k, LOWER_RIGHT)
    # Twice the same, first of the tiles that are seen in part. On sm_90 the last P @ V is still under way where a loop
    # ends. A branch around it joins there, which moves its accumulator, and then ptxas makes every wgmma of the kernel
    # wait for the one before: this branch joins behind the wait, and the loop needs none.
    for whole in tl.static_range(2):
        if (0 if whole else full) < (full if whole else stop):
            accumulator, row_max, row_sum = _forward_tiles(
                accumulator, row_max, row_sum, q, key_ptr, value_ptr, key_row_stride, value_row_stride,
                mask_ptr, mask_row_stride, mask_column_stride, seed_ptr, drop_below, batch_head, start_m, positions,
                0 if whole else full, full if whole else stop, length_q, length_k, score_scale, CAUSAL, whole == 0,
                MASK, MASK_BY_KEY, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, INPUT_PRECISION, WIDEN,
            )  # fmt: skip

    inside = rows < length_q
    # O = A / l; a query that sees no key gives 0
    if MASK != NO_MASK or LOWER_RIGHT:
        divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    else:
        divisor = row_sum
    output = accumulator / divisor[:, None]
    if DROPOUT:
        output = output * keep_scale
    output_ptr += batch * output_batch_stride + head * output_head_stride + first * output_row_stride
    store_tile(output_ptr, output_row_stride, rows, length_q, output, BLOCK_M, HEAD_DIM, BLOCK_D)
    if MASK == ADDITIVE_MASK:
        # log2(l) and m, apart: beside a maximum of -3e38 the sum would be lost
        tl.store(row_max_ptr + batch_head * length_q + rows, tl.where(row_sum == 0.0, 0.0, row_max), mask=inside)
        lse = tl.log2(row_sum)
    else:
        # lse = m + log2(l)
        lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + batch_head * length_q + rows, lse, mask=inside)


# --- Launchers ------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
backward = triton_backward.backward


def unsupported(call: Call) -> str | None:
    reason, mask = outside_of_kernels(call, _DTYPES), call.attn_mask
    return unreadable_mask(call.query, call.key, mask) if reason is None and mask is not None else reason


def forward(call: Call):
    """-> output (batch, heads, length_q, head_dim), lse (batch, heads, length_q) float32, in base 2.

    With an additive mask lse is (2, batch, heads, length_q): see gptkern/operators/attention/contract.py.
    """
    query, key, value, is_causal, scale, attn_mask, dropout_p, lower_right, seed = call
    of_query, of_key, plans, plan_key = query.shape, key.shape, TABLE.kept, None
    if attn_mask is None and seed is None:
        dtype = query.dtype
        plan_key = (
            of_query, of_key, query.stride(), key.stride(), value.stride(), dtype, key.dtype, value.dtype,
            is_causal, scale, lower_right, dtype is torch.float32 and float32_precision(), query.get_device(),
        )  # fmt: skip
        plan = plans.get(plan_key)
        if plan is not None and plan[0] is _forward_kernel:
            _, start, of_output, of_lse = plan
            output = torch.empty_like(query) if of_output is None else query.new_empty_strided(of_query, of_output)
            lse = query.new_empty(*of_lse, dtype=torch.float32)
            start(query, key, value, output, lse)
            return output, lse
    batch, heads, length_q, head_dim = of_query
    _, kv_heads, length_k, _ = of_key
    output = empty_in_layout_of(query)
    lse = empty_lse(query, attn_mask)
    if batch * heads * length_q == 0:
        return output, lse
    if length_k == 0:
        return output.zero_(), no_key(lse)
    # Each argument by itself: a call that unpacks takes longer on the host.
    query, (query_batch, query_head, query_row) = read(query)
    key, (key_batch, key_head, key_row) = read(key)
    value, (value_batch, value_head, value_row) = read(value)
    output_batch, output_head, output_row, _ = output.stride()
    extras = extras_of(query, key, attn_mask, dropout_p, seed)
    constants, mask, (mask_batch, mask_head, mask_row, mask_column), seed, drop_below, keep_scale = extras
    lse_of_rows, row_max, score_scale = lse, None, scale * LOG2E
    if extras.is_additive:
        lse_of_rows, row_max, score_scale = lse[0], lse[1], scale
    block_d = padded_head_dim(head_dim)
    block_m, block_n, num_warps, num_stages = tiles_of("forward", query, block_d, extras)
    grid = (cdiv(length_q, block_m) * batch * heads,)
    arguments = (
        query, key, value, output, lse_of_rows, row_max, mask, seed,
        query_batch, query_head, query_row, key_batch, key_head, key_row,
        value_batch, value_head, value_row, output_batch, output_head, output_row,
        mask_batch, mask_head, mask_row, mask_column,
        heads, heads // kv_heads, length_q, length_k, score_scale, drop_below, keep_scale,
    )  # fmt: skip
    options = dict(
        CAUSAL=is_causal, LOWER_RIGHT=lower_right,
        MASK=constants["MASK"], MASK_BY_KEY=constants["MASK_BY_KEY"], DROPOUT=constants["DROPOUT"],
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n,
        INPUT_PRECISION=input_precision(query), WIDEN=INTERPRETED, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    _forward_kernel[grid](*arguments, **options)
    # A copy is not what the key was made of.
    if plan_key is not None and query is call.query and key is call.key and value is call.value:
        of_output = None if query.is_contiguous() else output.stride()
        keep_plan(plans, plan_key, _forward_kernel, (of_output, tuple(lse.shape)), grid, *arguments, **options)
    return output, lse


# --- What ships, for the compile tests ------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the configuration table that serves the architecture."""
    plain = [
        compile_case(_forward_kernel, "forward", row, CAUSAL=causal)
        for causal in (False, True)
        for row in shipped_tiles(architecture, "forward")
        if causal or (row.dtype == "bf16" and row.head_dim != 80)
    ]
    extra = [
        compile_case(_forward_kernel, "forward", row, variant) for variant, row in extra_cases(architecture, "forward")
    ]
    return [*plain, *extra, *triton_backward.compile_cases(architecture)]
