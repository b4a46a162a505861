"""adamw on Triton with averages in 8 bits: gptkern/operators/adamw/blockwise.py has the map, contract.py the update.

A program does TILE blocks of one tensor, each a row of its tile: a block's largest magnitude is a reduction over one
axis. Where blocks are whole and follow one another, which is where the rows of dimension 0 are multiples of 256 wide,
the tile is one run of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from gptkern.backends.triton.common import CompileCase
from gptkern.backends.triton.direct import jit
from gptkern.operators.adamw import blockwise
from gptkern.operators.adamw.triton_elements import (
    COLUMNS,
    COUNT,
    EXP_AVG,
    EXP_AVG_SCALE,
    EXP_AVG_SQ,
    EXP_AVG_SQ_SCALE,
    FIRST_CHUNK,
    GRAD,
    PARAM,
    STEP,
    WIDTH,
    at,
    correction,
    draws,
    moved_parameter,
    pointer,
    rounded_at_random,
    scaled,
)
from gptkern.operators.adamw.walking import IN_A_RUN, NEAREST, Kind

# Blocks of a program: 16 elements of a thread. Reasoned, not measured.
TILE, WARPS = 16, 8
NUMBERS = ("lr", "one_less_beta1", "log_beta1", "beta2", "one_less_beta2", "log_beta2", "eps", "weight_decay")
_BLOCK = tl.constexpr(blockwise.BLOCK)
_SIGNED, _UNSIGNED = tl.constexpr(blockwise.SIGNED), tl.constexpr(blockwise.UNSIGNED)
_TOP_SIGNED, _TOP_UNSIGNED = (tl.constexpr(blockwise.top(n)) for n in (blockwise.SIGNED, blockwise.UNSIGNED))


@triton.jit
def _magnitude(code, N: tl.constexpr, TOP: tl.constexpr):
    """float32 x(c) / top of an int32 code from 0 on; 0 of 0."""
    c = code.to(tl.float32)
    # i = floor(log2 c) and 2^i, from the bits of the float
    bits = c.to(tl.int32, bitcast=True)
    i = (bits >> 23) - 127
    width = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    decade = tl.zeros_like(c) + 10.0**-N
    for step in tl.static_range(1, N + 1):
        decade = tl.where(i >= step, 10.0 ** (step - N), decade)
    # x(c) = 10^(i − n) · (0.1 + 0.9 · (c − 2^i + 0.5) / 2^i)
    x = decade * (0.1 + 0.9 * ((c - width + 0.5) / tl.maximum(width, 1.0))) * (1.0 / TOP)
    return tl.where(code > 0, x, 0.0)


@triton.jit
def _code(x, N: tl.constexpr, TOP: tl.constexpr):
    """int32 code of a magnitude from 0 to 1, relative to the block's largest; 0 below the least decade."""
    x = x * TOP
    scale = tl.zeros_like(x) + 10.0**N
    width = tl.zeros_like(x)
    for decade in tl.static_range(0, N + 1):
        above = x >= 10.0 ** (decade - N - 1)
        width = tl.where(above, 2.0**decade, width)
        scale = tl.where(above, 10.0 ** (N - decade), scale)
    # c = 2^i + floor(2^i (x / 10^(i−n) − 0.1) / 0.9)
    k = tl.floor((x * scale - 0.1) * (width * (1.0 / 0.9)))
    k = tl.minimum(tl.maximum(k, 0.0), width - 1.0)
    return tl.where(width > 0, width + k, 0.0).to(tl.int32)


@triton.jit
def _largest(x):
    """(TILE, 256) -> (TILE,): the largest magnitude of each block, NaN where one is."""
    largest = tl.max(tl.abs(x), axis=1)
    return tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), largest)


@jit(do_not_specialize=NUMBERS)
def _update_blocks_kernel(
    table_ptr,  # (tensors, COLUMNS)  int64
    chunk_ptr,  # (programs,)         int32: the tensor of each
    lr_ptr,  # (1,)                float32, or None: `lr` counts
    grad_scale_ptr,  # (1,)           float32, or None
    found_inf_ptr,  # (1,)            float32, or None: nothing is written where it is not 0
    clip_ptr,  # (1,)                float32, or None
    lr,
    one_less_beta1,
    log_beta1,
    beta2,
    one_less_beta2,
    log_beta2,
    eps,
    weight_decay,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PLACES: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,  # all blocks have 256 elements
    TILE: tl.constexpr,
):
    tensor = tl.load(chunk_ptr + tl.program_id(0))
    row_ptr = table_ptr + tensor.to(tl.int64) * COLUMNS
    first = (tl.program_id(0) - tl.load(row_ptr + FIRST_CHUNK)) * TILE
    count, width = tl.load(row_ptr + COUNT), tl.load(row_ptr + WIDTH)
    block = first + tl.arange(0, TILE)
    if found_inf_ptr is not None:
        # Nothing of the tensor is read or written.
        count = tl.where(tl.load(found_inf_ptr) == 0.0, count, 0)
    column = tl.arange(0, _BLOCK)
    if WHOLE:
        blocks = count // _BLOCK
        e = first * _BLOCK + (tl.arange(0, TILE) * _BLOCK)[:, None] + column[None, :]
        inside = (block < blocks)[:, None]
    else:
        in_a_row = (width + _BLOCK - 1) // _BLOCK
        blocks = count // width * in_a_row
        column = (block % in_a_row * _BLOCK)[:, None] + column[None, :]
        e = (block // in_a_row * width)[:, None] + column
        inside = (block < blocks)[:, None] & (column < width)
    t = tl.load(pointer(row_ptr, STEP, tl.float32))
    correction1, correction2 = correction(t, log_beta1), correction(t, log_beta2)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)

    p_at = at(pointer(row_ptr, PARAM, PARAM_DTYPE), e, ALIGNED)
    m_at = at(pointer(row_ptr, EXP_AVG, tl.int8), e, ALIGNED)
    v_at = at(pointer(row_ptr, EXP_AVG_SQ, tl.uint8), e, ALIGNED)
    m_scale_at = pointer(row_ptr, EXP_AVG_SCALE, tl.float32) + block
    v_scale_at = pointer(row_ptr, EXP_AVG_SQ_SCALE, tl.float32) + block
    in_blocks = block < blocks
    p = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(at(pointer(row_ptr, GRAD, GRAD_DTYPE), e, ALIGNED), mask=inside, other=0.0).to(tl.float32)
    m_code = tl.load(m_at, mask=inside, other=0).to(tl.int32)
    v_code = tl.load(v_at, mask=inside, other=0).to(tl.int32)
    m_scale = tl.load(m_scale_at, mask=in_blocks, other=0.0)
    v_scale = tl.load(v_scale_at, mask=in_blocks, other=0.0)
    m = tl.where(m_code < 0, -1.0, 1.0) * _magnitude(tl.abs(m_code), _SIGNED, _TOP_SIGNED) * m_scale[:, None]
    root = _magnitude(v_code, _UNSIGNED, _TOP_UNSIGNED) * v_scale[:, None]

    g = scaled(g, grad_scale_ptr, clip_ptr, MAXIMIZE)
    # m = m + (1 − β₁) (g − m)
    m = m + one_less_beta1 * (g - m)
    # v = β₂ v + (1 − β₂) g²
    v = beta2 * (root * root) + one_less_beta2 * g * g
    p = moved_parameter(p, m, v, correction1, correction2, lr, eps, weight_decay)
    if PLACES != 0:
        if WHOLE:
            bits = tl.reshape(draws(row_ptr, t, e, first * _BLOCK, PLACES, TILE * _BLOCK), (TILE, _BLOCK))
        else:
            bits = draws(row_ptr, t, e, first, 2, TILE * _BLOCK)
        p = rounded_at_random(p, bits)
    tl.store(p_at, p.to(PARAM_DTYPE), mask=inside)

    # What is beyond a row is 0 but for the zeros' own update: it has no part in a block's largest.
    m, root = tl.where(inside, m, 0.0), tl.where(inside, tl.sqrt(v), 0.0)
    m_scale, v_scale = _largest(m), _largest(root)
    x = tl.abs(m) / tl.where(m_scale == 0, 1.0, m_scale)[:, None]
    m_code = tl.where(m < 0, -1, 1) * _code(x, _SIGNED, _TOP_SIGNED)
    x = root / tl.where(v_scale == 0, 1.0, v_scale)[:, None]
    v_code = tl.where((v_scale == 0)[:, None], 0, tl.maximum(_code(x, _UNSIGNED, _TOP_UNSIGNED), 1))
    tl.store(m_at, m_code.to(tl.int8), mask=inside)
    tl.store(v_at, v_code.to(tl.uint8), mask=inside)
    tl.store(m_scale_at, m_scale, mask=in_blocks)
    tl.store(v_scale_at, v_scale, mask=in_blocks)


def launch(kind: Kind, programs: int, pointers: tuple, numbers: tuple, named: dict) -> None:
    _update_blocks_kernel[(programs,)](
        *pointers, *numbers, **named, PLACES=kind.places, ALIGNED=kind.aligned, WHOLE=kind.whole, TILE=TILE,
        num_warps=WARPS,
    )  # fmt: skip


def cases() -> Iterator[CompileCase]:
    pointers = dict(
        table_ptr="*i64", chunk_ptr="*i32", lr_ptr="*fp32", grad_scale_ptr="*fp32", found_inf_ptr="*fp32",
        clip_ptr="*fp32",
    )  # fmt: skip
    for name, places in (("", NEAREST), (" at random", IN_A_RUN)):
        constants = dict(
            PARAM_DTYPE=tl.bfloat16, GRAD_DTYPE=tl.bfloat16, MAXIMIZE=False, PLACES=places, ALIGNED=True, WHOLE=True,
            TILE=TILE,
        )  # fmt: skip
        signature = {**pointers, **dict.fromkeys(NUMBERS, "fp32"), **dict.fromkeys(constants, "constexpr")}
        yield CompileCase(f"update in 8 bits{name}", _update_blocks_kernel, signature, constants, WARPS, 1)
