"""What the Triton kernels of the losses share: scores and their slopes, exponentials, log(1 + x).

s = logit_scale * x,  then softcap * tanh(s / softcap) where there is a softcap
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def exponential(x):
    """exp(x), as 2 to the x * log2(e): of differences to a maximum, which are not large."""
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0, with the digits of a small x (HP-15C Advanced Functions Handbook, 1982, appendix)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def finite(m):
    """The maximum to subtract: 0 for a row of -inf, as -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def tanh(v):
    """tanh(v) in float32, to a few units in the last place."""
    # (1 - e) / (1 + e) with e = exp(-2 |v|); of a small v its own series, which the difference would lose the digits of
    e = exponential(tl.abs(v) * -2.0)
    far = (1.0 - e) / (1.0 + e)
    v2 = v * v
    near = v * (1.0 + v2 * (-1.0 / 3 + v2 * (2.0 / 15 + v2 * (-17.0 / 315 + v2 * (62.0 / 2835)))))
    return tl.where(tl.abs(v) < 0.25, near, tl.where(v < 0.0, -far, far))


@triton.jit
def scores(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """s of logits in float32. softcap is anything where SOFTCAP is False."""
    s = x * logit_scale
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def slopes(x, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """ds / dx."""
    if SOFTCAP:
        # 1 - tanh(v)² = 4e / (1 + e)²: the difference loses all digits where tanh is near 1
        e = exponential(tl.abs(x * logit_scale / softcap) * -2.0)
        return logit_scale * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    else:
        return logit_scale
