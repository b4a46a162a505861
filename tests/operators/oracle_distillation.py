"""Distillation losses in plain mathematics, from probabilities."""

from __future__ import annotations

import torch
from oracles import ORACLE


def kl(a, log_a, log_b):
    """Σ a * (log a - log b) over the last dimension; where a is 0 there is nothing to add."""
    nothing = a == 0
    return (a * (log_a.masked_fill(nothing, 0.0) - log_b.masked_fill(nothing, 0.0))).sum(-1)


def of_the_stored(log_probabilities, indices, student_logits):
    """(log p, log q) of the stored classes and one more that all others are."""
    q = torch.softmax(student_logits, -1)
    outside = torch.ones_like(q).scatter(-1, indices, 0.0)
    log_p, log_q = [log_probabilities], [torch.log_softmax(student_logits, -1).gather(-1, indices)]
    if indices.shape[-1] < q.shape[-1]:
        log_p.append(torch.log(1.0 - log_probabilities.exp().sum(-1, keepdim=True)))
        log_q.append(torch.log((q * outside).sum(-1, keepdim=True)))
    return torch.cat(log_p, -1), torch.cat(log_q, -1)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    *,
    teacher_top: tuple[torch.Tensor, torch.Tensor] | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mix: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """(1 - mix) T² D + mix CE, of the rows whose target is not ignore_index."""
    student = student_logits.to(precision)
    if teacher_top is None:
        log_q = torch.log_softmax(student / temperature, -1)
        log_p = torch.log_softmax(teacher_logits.to(precision) / temperature, -1)
    else:
        log_p, log_q = of_the_stored(teacher_top[0].to(precision), teacher_top[1], student)
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        found = kl(p, log_p, log_q)
    elif divergence == "reverse_kl":
        found = kl(q, log_q, log_p)
    else:
        m = beta * p + (1 - beta) * q
        # The gradient of a logarithm of 0 is no number.
        log_m = torch.log(torch.where(m == 0, 1.0, m))
        found = beta * kl(p, log_p, log_m) + (1 - beta) * kl(q, log_q, log_m)
    loss = (1 - mix) * temperature**2 * found
    counts = torch.ones_like(loss, dtype=torch.bool) if target is None else target != ignore_index
    if mix > 0:
        index = target.masked_fill(~counts, 0)[..., None]
        loss = loss - mix * torch.log_softmax(student, -1).gather(-1, index)[..., 0]
    loss = torch.where(counts, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / counts.to(precision).sum() if reduction == "mean" else loss.sum()
