"""cross_entropy in plain mathematics."""

from __future__ import annotations

import math

import torch
from oracles import ORACLE


def scores(input: torch.Tensor, logit_scale: float, softcap: float | None, precision: torch.dtype) -> torch.Tensor:
    s = logit_scale * input.to(precision)
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """sum_c t_c * w_c * (lse - s_c) + z_loss * lse² * own of each row: (N, C, d1, …) or (C,), the classes second."""
    s = scores(input, logit_scale, softcap, precision)
    s = s.movedim(0 if s.dim() == 1 else 1, -1)  # (…, C)
    classes = s.shape[-1]
    w = torch.ones(classes, dtype=precision, device=s.device) if weight is None else weight.to(precision)
    if target.shape == input.shape:
        t = target.to(precision)
        t = t.movedim(0 if t.dim() == 1 else 1, -1)
        counts = own = torch.ones(s.shape[:-1], dtype=precision, device=s.device)
    else:
        target = target.reshape(s.shape[:-1])
        counts = (target != ignore_index).to(precision)
        t = (torch.arange(classes, device=s.device) == target[..., None]).to(precision)  # (…, C), one is 1
        own = (t * w).sum(-1) * counts
    t = (1 - label_smoothing) * t + label_smoothing / classes
    largest = s.detach().max(-1, keepdim=True).values
    # In one sum, so that the digits of a loss near 0 are those of float64's.
    below = s - largest
    log_sum = torch.log(torch.exp(below).sum(-1, keepdim=True))
    # What has no part in the target may be as unlikely as it likes.
    losses = counts * (t * w * torch.where(t == 0, 0.0, log_sum - below)).sum(-1)
    if z_loss:
        losses = losses + z_loss * (largest + log_sum).squeeze(-1) ** 2 * own
    if reduction == "none":
        return losses
    return losses.sum() / own.sum() if reduction == "mean" else losses.sum()


def stats(
    input: torch.Tensor, target: torch.Tensor, *, ignore_index: int = -100, logit_scale: float = 1.0, softcap=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(lse, entropy, correct) of each row, by loops over rows."""
    s = scores(input, logit_scale, softcap, ORACLE).movedim(1, -1)
    z = scores(input.float(), logit_scale, None, torch.float32).movedim(1, -1)
    probabilities = target.movedim(1, -1).reshape(-1, s.shape[-1]) if target.shape == input.shape else None
    found = []
    for row, (scores_of_row, logits) in enumerate(zip(s.reshape(-1, s.shape[-1]), z.reshape(-1, s.shape[-1]))):
        wanted = target.reshape(-1)[row].item() if probabilities is None else probabilities[row].tolist()
        if wanted == ignore_index:
            found.append((0.0, 0.0, False))
            continue
        lse = torch.logsumexp(scores_of_row, 0)
        p = [q for q in torch.exp(scores_of_row - lse).tolist() if q > 0]
        likeliest = logits.tolist().index(max(logits.tolist()))
        wanted = wanted if probabilities is None else wanted.index(max(wanted))
        found.append((lse.item(), -sum(q * math.log(q) for q in p), likeliest == wanted))
    return tuple(torch.tensor(column, device=s.device).view(s.shape[:-1]) for column in zip(*found))
