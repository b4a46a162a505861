"""When is a kernel right? The one rule, for the tests and for `gptkern check`.

    worst error of the kernel  <=  max(factor * worst error of the yardstick, floor)  +  rounding

all against a float64 reference of the same inputs. The yardstick is plain PyTorch on those inputs with float32
internals, its result rounded to the kernel's dtype. `rounding` is what the output's dtype itself costs:
2 * max|(ref + 0.3 - 0.3) - ref|, evaluated in that dtype. NaN never passes; equal infinities do.

The yardstick's error is one draw of chance: of few elements it can be exact by luck, on one kind of processor and not
on another. No honest kernel can promise to be as lucky:

    floor = factor * noise + half a unit in the last place of the largest |ref|

`noise` is how far the float32 roundings of the operations behind the result move it, from their number and the
magnitudes of what they add (rounding.py, with the sources); the half unit is the output's own last rounding. Without
`noise` the floor is that rounding alone: enough for a result that stands at the end of few operations.

A float64 result has no reference that is more precise than itself: there the bound is FLOAT64_RELATIVE of the
largest reference value (or of 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
# 5e4 roundings of float64: far above what a reordered sum of 1e5 terms costs, far below any float32 in between.
FLOAT64_RELATIVE = 1e-11


def worst_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual - reference| in float64; infinite where a NaN or an unequal infinity is on either side."""
    if actual.shape != reference.shape:
        raise AssertionError(f"the result has shape {tuple(actual.shape)}; it needs {tuple(reference.shape)}")
    if reference.numel() == 0:
        return 0.0
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    difference = torch.where(actual == reference, 0.0, (actual - reference).abs())
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()


def bound(
    reference: torch.Tensor,
    yardstick: torch.Tensor,
    dtype: torch.dtype,
    factor: float = FORWARD_FACTOR,
    noise: float = 0.0,
) -> float:
    """The largest error that the rule allows a result of `dtype`.

    Args:
        reference: float64. yardstick: plain PyTorch with float32 internals, any floating dtype.
        noise: what the float32 roundings behind the result amount to: rounding.noise of the reference.
    """
    if reference.numel() == 0:
        return 0.0
    if dtype == torch.float64:
        finite = reference[reference.isfinite()].abs()
        return FLOAT64_RELATIVE * max(1.0, finite.max().item() if finite.numel() else 1.0)
    rounded = reference.detach().cpu().to(dtype)
    finite = rounded[rounded.isfinite()]
    rounding = 2 * ((finite + 0.3 - 0.3) - finite).abs().double().max().item() if finite.numel() else 0.0
    yardstick_error = worst_error(yardstick.to(dtype), reference)
    floor = factor * noise + _half_ulp(finite.abs().max().item() if finite.numel() else 0.0, dtype)
    return max(factor * (yardstick_error if yardstick_error != torch.inf else 0.0), floor) + rounding


def _half_ulp(value: float, dtype: torch.dtype) -> float:
    """Half the distance between the numbers of `dtype` beside a value: the largest error of rounding to it."""
    if value == 0:
        return 0.0
    _, exponent = math.frexp(max(value, torch.finfo(dtype).smallest_normal))
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 2)


def verdict(
    actual: torch.Tensor,
    reference: torch.Tensor,
    yardstick: torch.Tensor,
    factor: float = FORWARD_FACTOR,
    noise: Callable[[], float] | None = None,
) -> tuple[float, float]:
    """(the worst error, the largest that the rule allows): `actual` is right where the first is not the larger.

    Args:
        actual: the kernel's result; its dtype is the one the rule is evaluated in.
        noise: called where the yardstick alone allows too little: most results need none.
    """
    error, allowed = worst_error(actual, reference), bound(reference, yardstick, actual.dtype, factor)
    if noise is not None and allowed < error < math.inf:
        allowed = bound(reference, yardstick, actual.dtype, factor, noise())
    return error, allowed


def assert_close(
    name: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    yardstick: torch.Tensor,
    factor: float = FORWARD_FACTOR,
    noise: Callable[[], float] | None = None,
) -> None:
    """Raises AssertionError, with the numbers, where `actual` breaks the rule.

    Args:
        name: what is compared, for the message.
        actual, reference, yardstick, factor, noise: as in verdict() and bound().
    """
    error, allowed = verdict(actual, reference, yardstick, factor, noise)
    if not error <= allowed:
        raise AssertionError(f"{name}: worst error {error:.3e} in {actual.dtype}; the rule allows {allowed:.3e}")
