"""linear_cross_entropy with its logits whole in memory, in PyTorch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern.backends.losses import LossOptions, is_probabilities, own_weights, reduced, row_losses, scores, stats_of


def whole(
    input, linear_weight, target, linear_bias, weight, logits_shape: tuple[int, ...], options: LossOptions,
    return_stats: bool, loss_dtype: torch.dtype | None,
):  # fmt: skip
    """F.cross_entropy of F.linear, and what the extensions add."""
    reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
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
