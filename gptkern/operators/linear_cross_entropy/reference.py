"""linear_cross_entropy with its logits whole in memory, in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern.backends import few_logits, tracing
from gptkern.backends.losses import (
    LossOptions,
    is_probabilities,
    own_weights,
    reduced,
    row_losses,
    scores,
    stats_of,
    without_ignored,
)
from gptkern.backends.registration import needs_gradient


def usual(input, linear_weight, target, linear_bias, weight, reduction, ignore_index: int, label_smoothing):
    """F.cross_entropy of F.linear: (rows, width), (classes, width), (rows,) int64."""
    input = _without_ignored(input, target, ignore_index, linear_weight, linear_bias)
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, weight, None, ignore_index, None, reduction, label_smoothing)


def in_float32(input, linear_weight, target, linear_bias, options: LossOptions, return_stats: bool, dtype: torch.dtype):
    """The same of 16 bits on a CPU, for what few_logits takes: logits that are not rounded."""
    input = _without_ignored(input, target, options.ignore_index, linear_weight, linear_bias)
    bias = None if linear_bias is None else linear_bias.float()
    logits = F.linear(input.float(), linear_weight.float(), bias)
    loss = few_logits.cross_entropy(logits, target, options.ignore_index, options.reduction, dtype)
    return (loss, stats_of(logits, target, options.ignore_index)) if return_stats else loss


def _without_ignored(input, target, ignore_index: int, *others):
    """The input with 0 in ignored rows, where gradients are needed: 0 times a row of NaN would be in all of them."""
    if not needs_gradient(input, *others) or tracing.is_transformed() or not isinstance(target, torch.Tensor):
        return input
    ignored = target == ignore_index
    # A GPU's are not looked at.
    if target.is_cpu and tracing.has_values(target) and not ignored.any():
        return input
    return input.masked_fill(ignored.unsqueeze(-1), 0.0)


def whole(
    input, linear_weight, target, linear_bias, weight, logits_shape: tuple[int, ...], options: LossOptions,
    return_stats: bool, loss_dtype: torch.dtype | None,
):  # fmt: skip
    """F.cross_entropy of F.linear, and what the extensions add."""
    reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    if target.shape == input.shape[:-1] and not target.is_floating_point():
        input = _without_ignored(input, target.long(), ignore_index, linear_weight, linear_bias)
    if linear_weight.dim() > 2:
        linear_weight = linear_weight.reshape(-1, input.shape[-1])
        linear_bias = None if linear_bias is None else linear_bias.reshape(-1)
    logits = F.linear(input, linear_weight, linear_bias)
    if tuple(logits.shape) != logits_shape:
        logits = logits.reshape(logits_shape)
    if loss_dtype is not None:
        # as who wants another dtype writes it: cross_entropy(logits.float(), …)
        logits = logits.to(loss_dtype)
        weight = None if weight is None else weight.to(loss_dtype)
    logits = without_ignored(logits, target, ignore_index)
    if z_loss == 0.0 and softcap is None and logit_scale == 1.0:
        loss = F.cross_entropy(
            logits, target, weight, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    else:
        s = scores(logits, logit_scale, softcap)
        losses = row_losses(s, target, weight, ignore_index, label_smoothing, z_loss)
        loss = reduced(losses, _denominator(s, target, weight, ignore_index), reduction)
        is_wider = loss_dtype is None and torch.is_autocast_enabled(logits.device.type)
        loss = loss.to(torch.float32 if is_wider else logits.dtype)
    return (loss, stats_of(logits, target, ignore_index, logit_scale, softcap)) if return_stats else loss


def _denominator(s, target, weight, ignore_index):
    """What "mean" divides by: the rows where targets are probabilities, else the weights of those that count."""
    if is_probabilities(s, target):
        return s.numel() // max(s.shape[0 if s.dim() == 1 else 1], 1)
    return own_weights(target, weight, ignore_index, s.dtype).sum()
