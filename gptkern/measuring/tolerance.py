"""When is a kernel right? The one rule, for the tests and for `gptkern check`.

    worst error of the kernel  <=  factor * worst error of the yardstick  +  rounding

both against a float64 reference of the same inputs. The yardstick is plain PyTorch on those inputs with
float32 internals, its result rounded to the kernel's dtype. `rounding` is what the output's dtype itself
costs: 2 * max|(ref + 0.3 - 0.3) - ref|, evaluated in that dtype. NaN never passes; equal infinities do.

A float64 result has no reference that is more precise than itself: there the bound is FLOAT64_RELATIVE of the
largest reference value (or of 1).
"""

from __future__ import annotations

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
    reference: torch.Tensor, yardstick: torch.Tensor, dtype: torch.dtype, factor: float = FORWARD_FACTOR
) -> float:
    """The largest error that the rule allows a result of `dtype`."""
    if reference.numel() == 0:
        return 0.0
    if dtype == torch.float64:
        finite = reference[reference.isfinite()].abs()
        return FLOAT64_RELATIVE * max(1.0, finite.max().item() if finite.numel() else 1.0)
    rounded = reference.detach().cpu().to(dtype)
    finite = rounded[rounded.isfinite()]
    rounding = 2 * ((finite + 0.3 - 0.3) - finite).abs().double().max().item() if finite.numel() else 0.0
    yardstick_error = worst_error(yardstick.to(dtype), reference)
    return factor * (yardstick_error if yardstick_error != torch.inf else 0.0) + rounding


def assert_close(
    name: str,
    actual: torch.Tensor,
    reference: torch.Tensor,
    yardstick: torch.Tensor,
    factor: float = FORWARD_FACTOR,
) -> None:
    """Raises AssertionError, with the numbers, where `actual` breaks the rule.

    Args:
        name: what is compared, for the message.
        actual: the kernel's result; its dtype is the one the rule is evaluated in.
        reference: float64. yardstick: plain PyTorch with float32 internals, any floating dtype.
    """
    error, allowed = worst_error(actual, reference), bound(reference, yardstick, actual.dtype, factor)
    if not error <= allowed:
        raise AssertionError(f"{name}: worst error {error:.3e} in {actual.dtype}; the rule allows {allowed:.3e}")
