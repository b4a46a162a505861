"""What the kernels of adamw do to an element, whatever its states are held in."""

from __future__ import annotations

import triton
import triton.language as tl

from gptkern.operators.adamw.contract import DRAWS
from gptkern.operators.adamw.table import COLUMNS as _COLUMNS
from gptkern.operators.adamw.table import NAMES
from gptkern.operators.adamw.walking import IN_A_RUN

COLUMNS = tl.constexpr(_COLUMNS)
(
    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE,
    COUNT, WIDTH, FIRST_CHUNK, NUMBER, START, RUN, STRIDE, SEED,
) = (tl.constexpr(column) for column in range(len(NAMES)))  # fmt: skip
_IN_A_RUN, _DRAWS = tl.constexpr(IN_A_RUN), tl.constexpr(DRAWS)


@triton.jit
def pointer(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def at(pointer, offset, ALIGNED: tl.constexpr):
    """Where elements from `offset` on lie; chunks begin at multiples of 16 bytes where their tensors do."""
    if ALIGNED:
        return tl.multiple_of(pointer, 16) + offset
    else:
        return pointer + offset


@triton.jit
def load(pointers, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit
def store(pointers, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty))


@triton.jit
def correction(t, log_beta):
    """1 − βᵗ = −expm1(x), x = t · log β."""
    x = t * log_beta
    # The difference would have lost its digits where βᵗ is near 1; ten terms hold to the last one from −0.5 on.
    terms = 1.0 + x * 0.1
    terms = 1.0 + x * (1.0 / 9) * terms
    terms = 1.0 + x * (1.0 / 8) * terms
    terms = 1.0 + x * (1.0 / 7) * terms
    terms = 1.0 + x * (1.0 / 6) * terms
    terms = 1.0 + x * (1.0 / 5) * terms
    terms = 1.0 + x * (1.0 / 4) * terms
    terms = 1.0 + x * (1.0 / 3) * terms
    terms = 1.0 + x * (1.0 / 2) * terms
    return tl.where(x > -0.5, -x * terms, 1.0 - tl.exp(x))


@triton.jit
def scaled(g, grad_scale_ptr, clip_ptr, MAXIMIZE: tl.constexpr):
    # g = grad / grad_scale * clip
    if grad_scale_ptr is not None:
        g = g / tl.load(grad_scale_ptr)
    if clip_ptr is not None:
        g = g * tl.load(clip_ptr)
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def moved_parameter(p, m, largest, correction1, correction2, lr, eps, weight_decay):
    # θ = θ − lr · weight_decay · θ
    p = p - lr * weight_decay * p
    # θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)
    return p - lr / correction1 * m / (tl.sqrt(largest / correction2) + eps)


@triton.jit
def draws(row_ptr, t, e, first, PLACES: tl.constexpr, CHUNK: tl.constexpr):
    """int32 of sixteen random bits for each element e, a block of CHUNK that begins with `first`."""
    start, number = tl.load(row_ptr + START), tl.load(row_ptr + NUMBER)
    seed = tl.load(row_ptr + SEED)
    if PLACES == _IN_A_RUN:
        group = (start + first) // _DRAWS + tl.arange(0, CHUNK // _DRAWS)
    else:
        run, stride = tl.load(row_ptr + RUN), tl.load(row_ptr + STRIDE)
        place = start + e // run * stride + e % run
        group = place // _DRAWS
    zeros = tl.zeros_like(group).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, (group & 0xFFFFFFFF).to(tl.uint32), (group >> 32).to(tl.uint32), number.to(tl.uint32) + zeros,
        t.to(tl.int32).to(tl.uint32) + zeros,
    )  # fmt: skip
    if PLACES == _IN_A_RUN:
        # [..., b, a, half] is element 4b + 2a + half of its group.
        low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
        high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
        return tl.reshape(tl.join(low, high), (CHUNK,)).to(tl.int32)
    else:
        half = (place % _DRAWS).to(tl.int32)
        word = tl.where(half < 4, tl.where(half < 2, w0, w1), tl.where(half < 6, w2, w3))
        return ((word >> (16 * (half % 2)).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def rounded_at_random(p, draws):
    """float32 -> float32 of which bfloat16 holds every bit."""
    bits = p.to(tl.int32, bitcast=True)
    up = ((bits + draws) & -65536).to(tl.float32, bitcast=True)
    # An infinity and NaN stay what they are.
    return tl.where((bits & 0x7F800000) == 0x7F800000, p, up)
