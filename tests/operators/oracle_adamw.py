"""AdamW in plain mathematics."""

from __future__ import annotations

import torch
from oracles import ORACLE


def adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    max_exp_avg_sq: torch.Tensor | None = None,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    factor: float = 1.0,
    precision: torch.dtype = ORACLE,
) -> tuple[torch.Tensor, ...]:
    """θ, m, v (and the largest v) after update number `step`; gradients are multiplied by `factor` first."""
    beta1, beta2 = betas
    theta, g, m, v = (tensor.to(precision) for tensor in (param, grad, exp_avg, exp_avg_sq))
    g = g * (-factor if maximize else factor)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    largest = v if max_exp_avg_sq is None else torch.where(max_exp_avg_sq.to(precision) > v, max_exp_avg_sq, v)
    m_hat, v_hat = m / (1 - beta1**step), largest.to(precision) / (1 - beta2**step)
    theta = theta * (1 - lr * weight_decay) - lr * m_hat / (torch.sqrt(v_hat) + eps)
    return (theta, m, v) if max_exp_avg_sq is None else (theta, m, v, largest.to(precision))


def levels(decades: int) -> list[float]:
    """Magnitudes of the codes 1, 2, …, relative to the largest: in each decade up to 1 twice as many as in the one
    below, in the middles of equal parts."""
    found = []
    for decade in range(decades):
        low, high = 10.0 ** (decade - decades), 10.0 ** (decade - decades + 1)
        parts = 2**decade
        found += [low + (high - low) * (part + 0.5) / parts for part in range(parts)]
    return [level / found[-1] for level in found]
