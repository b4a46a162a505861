"""Activations on Triton, and their slopes, for the rooms that apply one: GELU in both of PyTorch's forms, and SiLU.

    gelu        f(z) = z * Phi(z)           f'(z) = Phi(z) + z * phi(z)
    gelu_tanh   f(z) = z * s                f'(z) = s + z * s * (1 - s) * 2u'(z)        s = sigmoid(2u)
    silu        f(z) = z * s                f'(z) = s + z * s * (1 - s)                 s = sigmoid(z)

with u = sqrt(2 / pi) * (z + 0.044715 z^3): gelu_tanh is z / 2 * (1 + tanh(u)). Without an ACTIVATION `activated` is the
identity.

For every finite z all of them are finite, and where the slope is 0 or 1 in z's dtype it is that exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
# Beyond it sigmoid(2u) is 0 or 1 to 260 digits, and z^3 on the way to infinity.
_SATURATED = tl.constexpr(20.0)


@triton.jit
def _two_u(z):
    # Constants stand on the right: the interpreter cannot multiply a constexpr by a tensor.
    return (z + z * z * z * _CUBIC) * _TWO_SQRT_2_PI


@triton.jit
def _sigmoid_and_rest(t):
    """s = sigmoid(t) and 1 - s, which has all its digits where s is near 1."""
    # e^-|t| is at most 1: nothing overflows, and s is exact to its last digits on both sides.
    e = tl.exp(-tl.abs(t))
    reciprocal = 1.0 / (1.0 + e)
    return tl.where(t > 0, 1.0, e) * reciprocal, tl.where(t > 0, e, 1.0) * reciprocal


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """f(z)"""
    if ACTIVATION == "gelu":
        # f(z) = z * Phi(z)
        return z * 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # f(z) = z * sigmoid(2u)
        s, _ = _sigmoid_and_rest(_two_u(z))
        return z * s
    elif ACTIVATION == "silu":
        # f(z) = z * sigmoid(z)
        s, _ = _sigmoid_and_rest(z)
        return z * s
    else:
        return z


@triton.jit
def activated_with_slope(z, ACTIVATION: tl.constexpr):
    """f(z), f'(z)"""
    if ACTIVATION == "gelu":
        # f'(z) = Phi(z) + z * phi(z)
        Phi = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        return z * Phi, Phi + z * _INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        # f'(z) = s + z * s * (1 - s) * 2u'(z)
        s, rest = _sigmoid_and_rest(_two_u(z))
        inner = (1.0 + z * z * 3.0 * _CUBIC) * _TWO_SQRT_2_PI
        return z * s, tl.where(tl.abs(z) > _SATURATED, s, s + z * s * rest * inner)
    else:
        # f'(z) = s + z * s * (1 - s)
        s, rest = _sigmoid_and_rest(z)
        return z * s, s + z * s * rest


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """f'(z)"""
    _, slope = activated_with_slope(z, ACTIVATION)
    return slope
