"""Divergences of two models' distributions over classes, and their gradients: what the distillation losses share.

With s the student's and t the teacher's logits of a row, T the temperature:
    q = softmax(s / T)        p = softmax(t / T)        m = beta * p + (1 - beta) * q

    forward_kl    D = KL(p ‖ q) = Σ p * (log p - log q)
    reverse_kl    D = KL(q ‖ p) = Σ q * (log q - log p)
    jsd           D = beta * KL(p ‖ m) + (1 - beta) * KL(q ‖ m)

    loss = (1 - mix) * T² * D + mix * CE        CE = lse(s) - s_target, at temperature 1

A class of probability 0 adds nothing to a sum in which its probability is the factor, whatever the other model says of
it; where p > 0 = q the forward divergence is infinite, and where q > 0 = p the reverse one. (1 - beta) weighs the
student in m: D / beta -> KL(p ‖ q) for beta -> 0 and D / (1 - beta) -> KL(q ‖ p) for beta -> 1; D itself is 0 there.

The gradient of D by the student's scaled logits. d q_j / d (s_c / T) = q_j * (1[j = c] - q_c), so
    d D / d (s_c / T) = q_c * (D'_c - Σ_j q_j * D'_j)        D'_j = the derivative of D by q_j alone
    forward_kl    D'_j = -p_j / q_j                          -> q_c - p_c
    reverse_kl    D'_j = log(q_j / p_j) + 1                  -> q_c * (log(q_c / p_c) - D)
    jsd           D'_j = (1 - beta) * log(q_j / m_j)         -> (1 - beta) * q_c * (log(q_c / m_c) - KL(q ‖ m))
(of jsd what else the derivative has cancels: (1 - beta) * (1 - m_j / m_j)), and that of the loss
    d loss / d s_c = (1 - mix) * T * d D / d (s_c / T) + mix * (softmax(s)_c - 1[c = target])

So the backward needs, of each row, both maxima and logarithms of sums, and the `centre`: D of reverse_kl, KL(q ‖ m) of
jsd. A row is walked in chunks of classes. The sums of forward_kl and reverse_kl are kept online, by the maxima so far:
    z = Σ exp((x - max) / T)        a = Σ w * (u - v)        D = a / z_w - log z_w + log z_other
with w = exp(u), and u, v both models' (x - max) / T, the first that of the distribution in front. What jsd adds up is
not linear in them: it walks the row a second time.

Where of the teacher only the n likeliest classes are known, their probabilities p_1 … p_n under the full softmax at
temperature 1, all other classes are one, the rest:
    p_rest = 1 - Σ p_i        q_rest = Σ of q over the other classes = exp(lse of their logits - lse)
and D is that of these n + 1 classes, a divergence of two distributions, and at most the divergence of all classes. The
rest is a class with the logit lse_rest, of which each class outside has the part exp(s_c - lse_rest): q_rest is never 1
minus a sum. Temperatures other than 1 have no such form, since what the rest has at T depends on how it is spread.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531), where T² keeps
the weight of both terms; Agarwal et al., "On-Policy Distillation of Language Models", 2024 (arXiv:2306.13649): beta.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

FORWARD_KL, REVERSE_KL, JSD = DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Elements of a block of rows that is looked at at once: on a CPU what its caches hold.
_BLOCK = {"cpu": 2**17, "cuda": 2**25}


class Terms(NamedTuple):
    """What of both distributions is computed."""

    divergence: str
    beta: float
    temperature: float
    mix: float

    @property
    def has_divergence(self) -> bool:
        """Of a mix of 1 it is not even looked at: 0 times an infinite divergence would be NaN."""
        return self.mix < 1.0


class Sums(NamedTuple):
    """Of each row, what has been added up over the chunks so far: (rows,) each, and the memory that they share."""

    student_max: torch.Tensor  # of s
    student_z: torch.Tensor  # Σ exp((s - max) / T)
    teacher_max: torch.Tensor
    teacher_z: torch.Tensor
    weighted: torch.Tensor  # a; of jsd, in the second walk, D
    centre: torch.Tensor  # of jsd, in the second walk: KL(q ‖ m)
    student_z1: torch.Tensor  # Σ exp(s - max), for the cross-entropy at temperature 1
    at_target: torch.Tensor  # s_target; NaN until it is found
    values: torch.Tensor  # (8, rows): all of them, in this order

    @classmethod
    def empty(cls, rows: int, like: torch.Tensor, dtype: torch.dtype) -> Sums:
        values = like.new_zeros((len(cls._fields) - 1, rows), dtype=dtype)
        sums = cls(*values.unbind(), values)
        sums.student_max.fill_(-torch.inf)
        sums.teacher_max.fill_(-torch.inf)
        sums.at_target.fill_(torch.nan)
        return sums

    def of(self, rows: slice) -> Sums:
        values = self.values[:, rows]
        return Sums(*values.unbind(), values)


# Rows of the statistics that a forward keeps: (STATISTICS, rows).
STATISTICS = STUDENT_MAX, STUDENT_LOG_Z, TEACHER_MAX, TEACHER_LOG_Z, CENTRE, STUDENT_LOG_Z1 = range(6)


def finished(sums: Sums, counts: torch.Tensor | None, terms: Terms) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the loss of each row (rows,), 0 where it does not count, and the statistics (6, rows)."""
    log_z_s, log_z_t, log_z1 = sums.student_z.log(), sums.teacher_z.log(), sums.student_z1.log()
    centre = sums.centre
    loss = torch.zeros_like(log_z_s)
    if terms.has_divergence:
        divergence = sums.weighted
        if terms.divergence == FORWARD_KL:
            # D = a / z_t - log z_t + log z_s
            divergence = sums.weighted / sums.teacher_z - log_z_t + log_z_s
        elif terms.divergence == REVERSE_KL:
            # D = a / z_s - log z_s + log z_t
            divergence = centre = sums.weighted / sums.student_z - log_z_s + log_z_t
        loss = divergence * ((1.0 - terms.mix) * terms.temperature**2)
    if terms.mix > 0.0:
        # CE = lse(s) - s_target
        loss = loss + terms.mix * (log_z1 + (sums.student_max - sums.at_target))
    if counts is not None:
        loss = torch.where(counts, loss, 0.0)
    return loss, torch.stack([sums.student_max, log_z_s, sums.teacher_max, log_z_t, centre, log_z1])


def counting(target: torch.Tensor | None, ignore_index: int) -> torch.Tensor | None:
    """(rows,): whether a row counts; None where all do."""
    return None if target is None else target != ignore_index


# --- All classes at once, in PyTorch's operators: differentiable as often as they are ---------------------------------


def plain(student, teacher, target, ignore_index: int, terms: Terms, all_logits=None) -> torch.Tensor:
    """(rows, classes) of both -> the loss of each row (rows,), 0 where it does not count.

    Args:
        all_logits: (rows, …), of whose classes the target is one; None: the student's.
    """
    all_logits = student if all_logits is None else all_logits
    counts = counting(target, ignore_index)
    if counts is not None:
        # What a row that does not count holds would be NaN in the gradient, 0 times it.
        student, teacher, all_logits = (torch.where(counts[:, None], x, 0.0) for x in (student, teacher, all_logits))
    loss = 0.0
    if terms.has_divergence:
        loss = ((1.0 - terms.mix) * terms.temperature**2) * _divergence(student, teacher, terms)
    if terms.mix > 0.0:
        # CE = lse(s) - s_target
        index = torch.where(counts, target, 0)[:, None]
        loss = loss - terms.mix * torch.log_softmax(all_logits, 1).gather(1, index)[:, 0]
    return loss if counts is None else torch.where(counts, loss, 0.0)


def _divergence(student, teacher, terms):
    # Beside its maximum x is exact in fewer digits, which a division would round again.
    log_q, log_p = (
        torch.log_softmax((x - _finite(x.detach().amax(1, keepdim=True))) / terms.temperature, 1)
        for x in (student, teacher)
    )
    p, q = log_p.exp(), log_q.exp()

    def kl(probability, over, under):
        # Σ a * (log a - log b); a class of probability 0 adds nothing, nor does its difference of infinities.
        return (probability * torch.where(probability == 0.0, 0.0, over - under)).sum(1)

    if terms.divergence == FORWARD_KL:
        return kl(p, log_p, log_q)
    if terms.divergence == REVERSE_KL:
        return kl(q, log_q, log_p)
    hidden = (log_p == -torch.inf) & (log_q == -torch.inf)
    visible_p, visible_q = log_p.masked_fill(hidden, 0.0), log_q.masked_fill(hidden, 0.0)
    log_m = torch.logaddexp(visible_p + math.log(terms.beta), visible_q + math.log(1.0 - terms.beta))
    return terms.beta * kl(p, log_p, log_m) + (1.0 - terms.beta) * kl(q, log_q, log_m)


# --- Chunks of classes, in plain PyTorch: what a backend has of its own -----------------------------------------------


def walk(student, teacher, start: int, sums: Sums, target, terms: Terms) -> None:
    """Adds a chunk of classes to the sums, in place.

    Args:
        student, teacher: (rows, chunk), logits of any floating dtype; a teacher of None: the sums of the student alone.
        start: the chunk's first class. target: (rows,), or None.
    """
    for rows in _blocks(student):
        s = _converted(student[rows], sums.student_z.dtype)
        t = None if teacher is None else _converted(teacher[rows], s.dtype)
        _walk_block(s, t, start, sums.of(rows), None if target is None else target[rows], terms)


def _walk_block(s, t, start, sums, target, terms):
    rate = 1.0 / terms.temperature
    if target is not None:
        index = target - start
        found = s.gather(1, index.clamp(0, s.shape[1] - 1)[:, None])[:, 0]
        sums.at_target.copy_(torch.where((index >= 0) & (index < s.shape[1]), found, sums.at_target))
    s_max, s_before = torch.maximum(sums.student_max, s.amax(1)), sums.student_max.clone()
    s_moved = _moved(s_before, s_max)
    u = (s - _finite(s_max)[:, None]) * rate
    e_s = torch.exp(u)
    # In the order in which each is needed as it was before: z1, a, z.
    if terms.mix > 0.0:
        # Σ exp(s - max)
        total = e_s.sum(1) if rate == 1.0 else torch.exp(s - _finite(s_max)[:, None]).sum(1)
        sums.student_z1.mul_(torch.exp(s_moved)).add_(total)
    sums.student_max.copy_(s_max)
    s_moved = s_moved * rate
    if t is None:
        sums.student_z.mul_(torch.exp(s_moved)).add_(e_s.sum(1))
        return
    t_max, t_before = torch.maximum(sums.teacher_max, t.amax(1)), sums.teacher_max.clone()
    t_moved = _moved(t_before, t_max) * rate
    v = (t - _finite(t_max)[:, None]) * rate
    e_t = torch.exp(v)
    sums.teacher_max.copy_(t_max)
    if terms.divergence == FORWARD_KL:
        # a = Σ w * (u - v), of the teacher's w = exp(v)
        a, w, moved, difference = sums.teacher_z * (t_moved - s_moved), e_t, t_moved, v - u
    elif terms.divergence == REVERSE_KL:
        a, w, moved, difference = sums.student_z * (s_moved - t_moved), e_s, s_moved, u - v
    if terms.divergence != JSD:
        sums.weighted.copy_(_times(torch.exp(moved), sums.weighted + a) + _times(w, difference).sum(1))
    sums.student_z.mul_(torch.exp(s_moved)).add_(e_s.sum(1))
    sums.teacher_z.mul_(torch.exp(t_moved)).add_(e_t.sum(1))


def walk_again(student, teacher, sums: Sums, terms: Terms) -> None:
    """jsd's second walk, when maxima and sums are known: adds a chunk to D and to KL(q ‖ m)."""
    log_z_s, log_z_t = sums.student_z.log(), sums.teacher_z.log()
    for rows in _blocks(student):
        s, t = (_converted(x[rows], log_z_s.dtype) for x in (student, teacher))
        log_q, log_p = (
            _log_probability(x, maximum[rows], log_z[rows], terms.temperature)
            for x, maximum, log_z in ((s, sums.student_max, log_z_s), (t, sums.teacher_max, log_z_t))
        )
        p, q = log_p.exp(), log_q.exp()
        of_p, of_q = _to_the_mixture(log_p, log_q, terms.beta)
        # D = beta * Σ p * log(p / m) + (1 - beta) * Σ q * log(q / m)
        of_q = _times(q, of_q)
        sums.centre[rows] += of_q.sum(1)
        sums.weighted[rows] += (terms.beta * _times(p, of_p) + (1.0 - terms.beta) * of_q).sum(1)


def gradient(student, teacher, start: int, statistics, scale, target, terms: Terms, output: torch.Tensor) -> None:
    """Writes the gradient of a chunk's logits, (rows, chunk), into `output`, which may be `student`.

    Args:
        statistics: (6, rows), of `finished`.
        scale: (rows,), the gradient of each row's loss; 0 where it does not count.
    """
    for rows in _blocks(student):
        s = _converted(student[rows], statistics.dtype)
        t = None if teacher is None else _converted(teacher[rows], statistics.dtype)
        of = statistics[:, rows]
        at = None if target is None else target[rows] - start
        found = _gradient_block(s, t, of, at, terms) * scale[rows, None]
        # A row that does not count is 0, whatever it holds.
        output[rows] = torch.where((scale[rows] == 0.0)[:, None], 0.0, found)


def rest_gradient(student, of_rest, coefficient, output) -> None:
    """Writes coefficient * exp(s - lse_rest), the gradient of the classes that are one, into `output`.

    Args:
        student: (rows, chunk), -inf where a class is none of them. of_rest: (2, rows), maximum and log z of the rest.
        coefficient: (rows,), the gradient of the rest's logit.
    """
    maximum, log_z = of_rest
    # A rest of no probability: every class of it is -inf, and so is log z.
    log_z = _finite(log_z)
    for rows in _blocks(student):
        part = _log_probability(student[rows], maximum[rows], log_z[rows], 1.0).exp()
        output[rows] = part * coefficient[rows, None]


def _gradient_block(s, t, statistics, index, terms):
    found = torch.zeros_like(s)
    if terms.has_divergence:
        log_q = _log_probability(s, statistics[STUDENT_MAX], statistics[STUDENT_LOG_Z], terms.temperature)
        log_p = _log_probability(t, statistics[TEACHER_MAX], statistics[TEACHER_LOG_Z], terms.temperature)
        q, centre = log_q.exp(), statistics[CENTRE][:, None]
        if terms.divergence == FORWARD_KL:
            # q - p
            found = q - log_p.exp()
        elif terms.divergence == REVERSE_KL:
            # q * (log(q / p) - D)
            found = _times(q, log_q - log_p - centre)
        else:
            # (1 - beta) * q * (log(q / m) - KL(q ‖ m))
            _, of_q = _to_the_mixture(log_p, log_q, terms.beta)
            found = (1.0 - terms.beta) * _times(q, of_q - centre)
        found = found * ((1.0 - terms.mix) * terms.temperature)
    if terms.mix > 0.0:
        # mix * (softmax(s) - 1[c = target])
        q1 = _log_probability(s, statistics[STUDENT_MAX], statistics[STUDENT_LOG_Z1], 1.0).exp()
        classes = torch.arange(s.shape[1], device=s.device)
        found = found + terms.mix * (q1 - (classes == index[:, None]).to(s.dtype))
    return found


def _log_probability(x, maximum, log_z, temperature):
    """log softmax(x / T) = (x - max) / T - log z. A row of -inf is NaN, as in PyTorch: its log z is -inf."""
    return (x - _finite(maximum)[:, None]) * (1.0 / temperature) - log_z[:, None]


def _to_the_mixture(log_p, log_q, beta: float):
    """log(p / m) and log(q / m), from the difference of both logarithms: exact where they are nearly equal.

    log(m / p) = log(1 + (1 - beta) * (q / p - 1))    log(m / q) = log(1 + beta * (p / q - 1))
    """
    difference = log_q - log_p
    less = difference <= 0.0
    ratio = torch.expm1(-difference.abs())
    near = torch.log1p(torch.where(less, (1.0 - beta) * ratio, beta * ratio))
    far = near + difference.abs()
    return -torch.where(less, near, far), -torch.where(less, far, near)


def _times(probability, value):
    """probability * value, 0 where the probability is: there the value may be infinite, or infinity minus itself."""
    return torch.where(probability == 0.0, 0.0, probability * value)


def _moved(before, maximum):
    """How far the maximum moved; 0 where there was none, and so nothing to scale by it."""
    return torch.where(before == -torch.inf, 0.0, before - maximum)


def _finite(maximum):
    """What is subtracted: 0 for a row of -inf, as -inf - -inf is NaN."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def _blocks(tensor):
    """Slices of the rows, a few elements each."""
    rows, width = tensor.shape
    step = max(_BLOCK.get(tensor.device.type, _BLOCK["cuda"]) // max(width, 1), 1)
    for first in range(0, rows, step):
        yield slice(first, first + step)


def _converted(tensor, dtype):
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
