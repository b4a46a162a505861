"""What the losses share in plain PyTorch: scores, the losses of rows, reductions, and the checks of their options.

    s    = logit_scale * x,  then softcap * tanh(s / softcap) where there is a softcap
    lse  = log sum_c exp(s_c)
    loss = sum_c t_c * w_c * (lse - s_c)  +  z_loss * lse² * w_y        t: the target after label smoothing

A row's target is a class y (t is 1 there; the row's own weight is w_y, and `mean` divides by the sum of these) or class
probabilities (the row's own weight is 1, in z_loss too, and `mean` divides by the number of rows). A row whose class is
ignore_index has loss 0 and weight 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import tracing
from gptkern.backends.numbers import as_float, as_int

REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyStats(NamedTuple):
    """What a cross-entropy knows of each row besides its loss; nothing of it is differentiable.

    Of a row whose target is ignored all three are 0.
    """

    lse: torch.Tensor  # the target's shape, float32 (float64): log sum_c exp(s_c)
    entropy: torch.Tensor  # likewise: -sum_c p_c log p_c of p = softmax(s)
    correct: torch.Tensor  # bool: the likeliest class, of equal ones the first, is the target


class LossOptions(NamedTuple):
    """The options of a loss as numbers: what `checked_options` returns."""

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


# Of LossOptions, from label_smoothing on.
NO_EXTENSION = 0.0, 0.0, None, 1.0


# --- Checks ---------------------------------------------------------------------------------------------------------


def checked_options(
    operator: str,
    reduction: str,
    ignore_index: Any,
    label_smoothing: Any,
    z_loss: Any,
    softcap: Any,
    logit_scale: Any,
) -> LossOptions:
    """The options as numbers; a label smoothing that is not above 0 is 0, as PyTorch has it.

    Raises:
        ValueError: the reduction has another name; z_loss is negative; softcap is not above 0.
        RuntimeError: label_smoothing is above 1.
        TypeError: what must be a number is none.
    """
    if reduction not in REDUCTIONS:
        # PyTorch's own message, and its warning for a name that it had before.
        F._Reduction.get_enum(reduction)
        reduction = "mean"
    if type(ignore_index) is not int:
        index = None if isinstance(ignore_index, bool) else as_int(ignore_index)
        if index is None:
            raise TypeError(f"{operator}: ignore_index is a {type(ignore_index).__name__}; it needs to be an int")
        ignore_index = index
    label_smoothing = _number(operator, "label_smoothing", label_smoothing)
    if label_smoothing > 1.0:
        raise RuntimeError(f"{operator}: label_smoothing is {label_smoothing}; it needs to be from 0 to 1")
    z_loss = checked_z_loss(operator, z_loss)
    softcap = checked_softcap(operator, softcap)
    logit_scale = _number(operator, "logit_scale", logit_scale)
    return LossOptions(
        reduction, ignore_index, label_smoothing if label_smoothing > 0.0 else 0.0, z_loss, softcap, logit_scale
    )


def checked_z_loss(operator: str, z_loss: Any) -> float:
    z_loss = _number(operator, "z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{operator}: z_loss is {z_loss}; it needs to be a finite number from 0 up")
    return z_loss


def checked_softcap(operator: str, softcap: Any) -> float | None:
    if softcap is None:
        return None
    softcap = _number(operator, "softcap", softcap)
    if not 0.0 < softcap < math.inf:
        raise ValueError(f"{operator}: softcap is {softcap}; it needs to be None or a finite number above 0")
    return softcap


def _number(operator: str, name: str, value: Any) -> float:
    if type(value) is float:
        return value
    number = as_float(value)
    if number is None:
        raise TypeError(f"{operator}: {name} is a {type(value).__name__}; it needs to be a float")
    return number


def legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """The reduction that size_average and reduce ask for, with PyTorch's warning, where either is given."""
    if size_average is None and reduce is None:
        return reduction
    return F._Reduction.legacy_get_string(size_average, reduce)


# --- Rows that do not count -----------------------------------------------------------------------------------------


def without_ignored(x: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The logits x (N, C, d1, …), or (C,), with 0 in ignored rows that hold what is not finite, where gradients are
    needed: PyTorch's operators multiply such a row by 0, which gives NaN. On a CPU, whose values may be looked at.

    Copies x where there is such a row, and reads it where any row is ignored.
    """
    if type(x) not in (torch.Tensor, torch.nn.Parameter) or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    if not x.is_cpu or not isinstance(target, torch.Tensor) or not tracing.has_values(target):
        return x
    dim = 0 if x.dim() == 1 else 1
    if target.is_floating_point() or target.shape != x.shape[:dim] + x.shape[dim + 1 :]:
        return x
    # As long: of uint8, -100 would be class 156.
    ignored = target.long() == ignore_index
    if not ignored.any():
        return x
    poisoned = x.detach().sum(dim).isfinite().logical_not_().logical_and_(ignored)
    return x.masked_fill(poisoned.unsqueeze(dim), 0.0) if poisoned.any() else x


# --- Mathematics, differentiable as often as PyTorch is -------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which statistics and sums are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scores(x: torch.Tensor, logit_scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """s of logits x, in float32 (float64)."""
    s = x.to(compute_dtype(x.dtype))
    if logit_scale != 1.0:
        s = s * logit_scale
    # s = softcap * tanh(s / softcap)
    return s if softcap is None else torch.tanh(s / softcap) * softcap


def slopes(x: torch.Tensor, logit_scale: float, softcap: float | None) -> torch.Tensor | float:
    """ds / dx."""
    if softcap is None:
        return logit_scale
    # 1 - tanh(v)² = 4e / (1 + e)², e = exp(-2 |v|): the difference loses all digits where tanh is near 1
    e = torch.exp(x.to(compute_dtype(x.dtype)).mul(logit_scale / softcap).abs() * -2.0)
    return logit_scale * 4.0 * e / (1.0 + e).square()


def row_losses(
    s: torch.Tensor,  # (N, C, d1, …) or (C,)
    target: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The loss of each row, (N, d1, …) or (): F.cross_entropy of the scores, and the z-loss."""
    weight = None if weight is None else weight.to(s.dtype)
    losses = F.cross_entropy(s, target, weight, None, ignore_index, None, "none", label_smoothing)
    if z_loss:
        # z_loss * lse² * w_y
        z = torch.logsumexp(s, 0 if s.dim() == 1 else 1).square() * z_loss
        if not is_probabilities(s, target):
            own = own_weights(target, weight, ignore_index, s.dtype)
            # Of an ignored row lse may be anything.
            z = torch.where(own == 0.0, 0.0, z) * own
        losses = losses + z
    return losses


def is_probabilities(input: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the target holds class probabilities: PyTorch goes by its shape."""
    return tracing.sizes(input) == tracing.sizes(target)


def own_weights(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, dtype: torch.dtype
) -> torch.Tensor:
    """w_y of each target that is a class, 0 of an ignored one: (…) of `dtype`."""
    # As long: of uint8, -100 would be class 156.
    counts = target.long() != ignore_index
    if weight is None:
        return counts.to(dtype)
    last = max(weight.shape[0] - 1, 0)
    own = weight.to(dtype)[target.long().clamp(0, last)] if weight.shape[0] else torch.zeros_like(counts, dtype=dtype)
    return torch.where(counts, own, 0.0)


def reduced(losses: torch.Tensor, denominator: torch.Tensor | float | None, reduction: str) -> torch.Tensor:
    """The losses of rows, summed and divided as `reduction` says. `denominator` is read for "mean" alone."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / denominator if reduction == "mean" else total


def stats_of(
    x: torch.Tensor,  # (N, C, d1, …) or (C,)
    target: torch.Tensor,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> CrossEntropyStats:
    """What is known of each row besides its loss, in plain PyTorch, from passes of its own."""
    with torch.no_grad():
        blocks = _blocks(x)
        if len(blocks) < 2:
            return _stats_of_block(x, target, ignore_index, logit_scale, softcap)
        found = [_stats_of_block(x[part], target[part], ignore_index, logit_scale, softcap) for part in blocks]
        return CrossEntropyStats(*map(torch.cat, zip(*found)))


# Elements of a block of rows: what a CPU's caches hold, and the system need not clear anew for each temporary tensor.
_BLOCK = 2**17


def _blocks(x: torch.Tensor) -> list[slice]:
    """Parts of the first dimension: of a CPU's tensor, where nothing records or transforms what runs."""
    # A trace's sizes are tensors, and it is for others too.
    if tracing.in_jit_trace() or not x.is_cpu or x.dim() < 2 or x.numel() <= _BLOCK:
        return []
    if not tracing.has_values(x.detach()):
        return []
    each = max(_BLOCK // (x.numel() // x.shape[0]), 1)
    return [slice(start, start + each) for start in range(0, x.shape[0], each)]


# exp of less is 0, of float64 too: 0 times it is 0, where 0 times -inf is NaN.
_NOTHING = -1e3


def _stats_of_block(x, target, ignore_index, logit_scale, softcap) -> CrossEntropyStats:
    dim = 0 if x.dim() == 1 else 1
    s = scores(x, logit_scale)
    # Of what is not capped: a softcap keeps the order, and its rounding must not make ties.
    likeliest = first_largest(s, dim)
    if softcap is not None:
        s = scores(x, logit_scale, softcap)
    if tracing.sizes(s)[dim] == 0:
        lse, entropy = torch.logsumexp(s, dim), s.sum(dim)
    else:
        m = s.amax(dim, keepdim=True)
        # -inf is not subtracted from -inf
        m = m.masked_fill(m.isinf(), 0.0)
        # lse = m + log sum_c exp(s_c - m)
        s = s - m
        e = torch.exp(s)
        total = e.sum(dim)
        log_total = torch.log(total)
        lse = m.squeeze(dim) + log_total
        # -sum_c p_c log p_c = log_total - sum_c exp(s_c - m) (s_c - m) / total
        entropy = log_total - s.clamp_min_(_NOTHING).mul_(e).sum(dim) / total
    if is_probabilities(x, target):
        return CrossEntropyStats(lse, entropy, likeliest == first_largest(target, dim))
    target = target.view(likeliest.shape).long()
    counts = target != ignore_index
    correct = (likeliest == target).logical_and_(counts)
    ignored = counts.logical_not_()
    return CrossEntropyStats(lse.masked_fill_(ignored, 0.0), entropy.masked_fill_(ignored, 0.0), correct)


def first_largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Where the largest value stands; of equal ones the first. NaN counts as the largest."""
    if tracing.sizes(values)[dim] == 0:
        return torch.zeros(values.sum(dim).shape, dtype=torch.int64, device=values.device)
    return values.argmax(dim)
