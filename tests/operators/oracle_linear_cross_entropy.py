"""linear_cross_entropy in plain mathematics: of class indices, one vocabulary."""

from __future__ import annotations

import torch
from oracles import ORACLE


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    linear_bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """-Σ t_c w_c log p_c + z_loss lse² w_y, t the smoothed target; rows that are ignored are not there at all."""
    counts = target != ignore_index
    y = target[counts]
    s = scores(input, linear_weight, linear_bias, softcap, logit_scale, precision)[counts]
    classes = s.shape[1]
    w = torch.ones(classes, dtype=precision) if weight is None else weight.to(precision)
    likeliest = s.detach().amax(1, keepdim=True)
    # log p from differences to the largest, and where the target is the largest from what the others have
    shifted = s - likeliest
    lse = torch.log(torch.exp(shifted).sum(1, keepdim=True))
    minus_log_p = lse - shifted
    is_target = torch.nn.functional.one_hot(y, classes).bool()
    others = torch.exp(shifted - shifted.gather(1, y[:, None])).masked_fill(is_target, 0.0).sum(1)
    minus_log_p_of_target = torch.log1p(others)
    losses = (1 - label_smoothing) * w[y] * minus_log_p_of_target
    if label_smoothing:
        losses = losses + label_smoothing / classes * (w * minus_log_p).sum(1)
    if z_loss:
        losses = losses + z_loss * w[y] * (lse + likeliest)[:, 0] ** 2
    if reduction == "none":
        return torch.zeros(len(target), dtype=precision).index_put((counts.nonzero()[:, 0],), losses)
    return losses.sum() if reduction == "sum" else losses.sum() / w[y].sum()


def scores(input, linear_weight, linear_bias, softcap, logit_scale, precision=ORACLE):
    z = input.to(precision) @ linear_weight.to(precision).T
    z = z if linear_bias is None else z + linear_bias.to(precision)
    s = z * logit_scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)
