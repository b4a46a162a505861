"""The distillation losses over chunks of classes: what of both models' logits is there at a time is a chunk's.

Each loss says how a chunk's logits come about (`Chunked`), each backend how they are added up (`walk`, `walk_again`,
`gradient` and `rest_gradient`: gptkern.backends.distillation in plain PyTorch). The formulas stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from gptkern.backends import distillation
from gptkern.backends.distillation import JSD, Sums, Terms


class Chunked(NamedTuple):
    """Both models' logits, chunk by chunk of classes."""

    rows: int
    chunks: list[tuple[int, int]]
    student: Callable[[int, int], torch.Tensor]  # (start, stop) -> (rows, chunk)
    teacher: Callable[[int, int], torch.Tensor] | None  # None: the likeliest classes are given
    # A chunk of the student's in the dtype that is computed in, which may be written to.
    student_copy: Callable[[int, int], torch.Tensor]

    @property
    def classes(self) -> int:
        return self.chunks[-1][1]


class Top(NamedTuple):
    """The teacher's n likeliest classes, as they were stored."""

    log_probabilities: torch.Tensor  # (rows, n)
    indices: torch.Tensor  # (rows, n)


class Asked(NamedTuple):
    """What of both is asked for, besides the logits."""

    top: Top | None
    target: torch.Tensor | None  # (rows,)
    ignore_index: int
    terms: Terms
    dtype: torch.dtype  # of the sums
    like: torch.Tensor  # says on which device


# --- Forward ----------------------------------------------------------------------------------------------------------


def forward(of: Chunked, asked: Asked, rows: ModuleType) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """-> losses (rows,), 0 of rows that do not count; statistics; and of `top` its classes' student logits (rows, n).

    The statistics are (6, rows), or of `top` the maximum and the log of the sum of all other classes, (2, rows).
    """
    terms, target = asked.terms, asked.target
    counts = distillation.counting(target, asked.ignore_index)
    wanted = target if terms.mix > 0.0 else None
    sums = Sums.empty(of.rows, asked.like, asked.dtype)
    if asked.top is not None:
        return _forward_of_top(of, asked, rows, sums, wanted, counts)
    for start, stop in of.chunks:
        rows.walk(of.student(start, stop), of.teacher(start, stop), start, sums, wanted, terms)
    if terms.divergence == JSD and terms.has_divergence:
        for start, stop in of.chunks:
            rows.walk_again(of.student(start, stop), of.teacher(start, stop), sums, terms)
    return *distillation.finished(sums, counts, terms), None


def _forward_of_top(of, asked, rows, sums, target, counts):
    top = asked.top
    at_top = torch.empty(top.indices.shape, dtype=asked.dtype, device=asked.like.device)
    plain = Terms(JSD, 0.5, 1.0, 0.0)
    for start, stop in of.chunks:
        s = of.student_copy(start, stop)
        index, inside = _inside(top.indices, start, stop)
        at_top = torch.where(inside, s.gather(1, index), at_top)
        if target is not None:
            place, is_here = _inside(target.unsqueeze(1), start, stop)
            sums.at_target.copy_(torch.where(is_here, s.gather(1, place), sums.at_target.unsqueeze(1)).squeeze(1))
        _hide(s, index, inside)
        rows.walk(s, None, start, sums, None, plain)
    of_rest = torch.stack([sums.student_max, sums.student_z.log()])
    student, teacher = _with_the_rest(at_top, of_rest, top, of.classes)
    sums_of_top = _walked(student, teacher, asked.terms)
    sums_of_top.at_target.copy_(sums.at_target)
    losses, _ = distillation.finished(sums_of_top, counts, asked.terms)
    return losses, of_rest, at_top


# --- Backward ---------------------------------------------------------------------------------------------------------


def gradients(
    of: Chunked,
    asked: Asked,
    rows: ModuleType,
    grad_losses: torch.Tensor,
    statistics: torch.Tensor,
    at_top: torch.Tensor | None,
    output: Callable[[int, int, torch.Tensor], torch.Tensor],
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, gradient of these classes' logits (rows, stop - start)), chunk by chunk.

    Args:
        grad_losses: (rows,). statistics, at_top: of `forward`.
        output: output(start, stop, student's logits) -> where the gradient is written; it may be these logits.
    """
    terms, target = asked.terms, asked.target
    counts = distillation.counting(target, asked.ignore_index)
    scale = grad_losses.to(asked.dtype)
    if counts is not None:
        scale = torch.where(counts, scale, 0.0)
    wanted = target if terms.mix > 0.0 else None
    if asked.top is not None:
        yield from _gradients_of_top(of, asked, rows, scale, statistics, at_top, wanted, output)
        return
    for start, stop in of.chunks:
        student = of.student(start, stop)
        written = output(start, stop, student)
        rows.gradient(student, of.teacher(start, stop), start, statistics, scale, wanted, terms, written)
        yield start, stop, written


def _gradients_of_top(of, asked, rows, scale, of_rest, at_top, target, output):
    top, terms = asked.top, asked.terms
    student, teacher = _with_the_rest(at_top, of_rest, top, of.classes)
    # mix * softmax(s) is in it; the target's -mix is not: it may be a class of the rest.
    nowhere = None if target is None else torch.full_like(target, -1)
    sums = _walked(student, teacher, terms)
    _, statistics = distillation.finished(sums, None, terms)
    of_classes = torch.empty_like(student)
    distillation.gradient(student, teacher, 0, statistics, scale, nowhere, terms, of_classes)
    *_, of_the_rest = of_classes.unbind(1)
    for start, stop in of.chunks:
        s = of.student_copy(start, stop)
        index, inside = _inside(top.indices, start, stop)
        _hide(s, index, inside)
        rows.rest_gradient(s, of_rest, of_the_rest, s)
        # What is hidden is 0 so far; a class outside of the chunk adds 0 to another one.
        s.scatter_add_(1, index, torch.where(inside, of_classes.narrow(1, 0, top.indices.shape[1]), 0.0))
        if target is not None:
            place, is_here = _inside(target.unsqueeze(1), start, stop)
            s.scatter_add_(1, place, torch.where(is_here, -terms.mix * scale.unsqueeze(1), 0.0))
        written = output(start, stop, s)
        if written is not s:
            written.copy_(s)
        yield start, stop, written


# --- The likeliest classes and the rest -------------------------------------------------------------------------------


def _inside(indices, start: int, stop: int):
    """Places in the chunk, any where the class is not in it; and whether it is."""
    index = indices - start
    return index.clamp(0, stop - start - 1), (index >= 0) & (index < stop - start)


def _hide(s: torch.Tensor, index: torch.Tensor, inside: torch.Tensor) -> None:
    # Several classes outside of the chunk may meet at one place within: the least of it and +inf is it.
    nothing = torch.full_like(index, torch.inf, dtype=s.dtype)
    s.scatter_reduce_(1, index, nothing.masked_fill_(inside, -torch.inf), "amin")


def _with_the_rest(at_top, of_rest, top: Top, classes: int):
    """The student's and the teacher's logits of n + 1 classes, (rows, n + 1): the last one is the rest."""
    maximum, log_z = of_rest
    student = torch.cat([at_top, (maximum + log_z).unsqueeze(1)], 1)
    return student, with_the_rest(top, student.narrow(1, student.shape[1] - 1, 1), classes)


def with_the_rest(top: Top, student_rest: torch.Tensor, classes: int) -> torch.Tensor:
    """The teacher's logits of n + 1 classes: log p_i as stored, and the logarithm of what they leave of 1.

    p_rest is a difference: what is below its rounding is taken for that, so that no divergence is infinite by a
    rounding. There is no rest where the n classes are all, or where the student has none either.

    Args:
        student_rest: (rows, 1), the student's log-sum-exp of the rest.
    """
    stored = top.log_probabilities.to(student_rest.dtype)
    left = 1.0 - stored.exp().sum(1, keepdim=True)
    rounding = torch.finfo(stored.dtype).eps
    # p_rest = 1 - Σ p_i
    rest = left.clamp_min(rounding).log()
    none = (student_rest == -torch.inf) & (left < rounding * 2**4)
    if stored.shape[1] == classes:
        none = torch.ones_like(none)
    return torch.cat([stored, rest.masked_fill(none, -torch.inf)], 1)


def plain(student, teacher, asked: Asked) -> torch.Tensor:
    """(rows, classes) of both, or of the student alone -> losses (rows,), in PyTorch's operators."""
    top, terms, student = asked.top, asked.terms, student.to(asked.dtype)
    if top is None:
        teacher = teacher.detach().to(asked.dtype)
        return distillation.plain(student, teacher, asked.target, asked.ignore_index, terms)
    classes = student.shape[1]
    if top.indices.shape[1] == classes:
        found, teacher = student.gather(1, top.indices), top.log_probabilities.to(asked.dtype)
    else:
        hidden = torch.zeros(student.shape, dtype=torch.bool, device=student.device).scatter(1, top.indices, True)
        others = student.masked_fill(hidden, -torch.inf)
        # The gradient of the log of 0 is no number.
        none = (others == -torch.inf).all(1, keepdim=True)
        rest = torch.logsumexp(others.masked_fill(none, 0.0), 1, keepdim=True).masked_fill(none, -torch.inf)
        found = torch.cat([student.gather(1, top.indices), rest], 1)
        teacher = with_the_rest(top, rest.detach(), classes)
    return distillation.plain(found, teacher, asked.target, asked.ignore_index, terms, student)


def _walked(student, teacher, terms: Terms) -> Sums:
    """Sums over classes that are all there, but for the target's logit."""
    sums = Sums.empty(len(student), student, student.dtype)
    distillation.walk(student, teacher, 0, sums, None, terms)
    if terms.divergence == JSD and terms.has_divergence:
        distillation.walk_again(student, teacher, sums, terms)
    return sums


def asked_of(call: Any, dtype: torch.dtype, like: torch.Tensor) -> Asked:
    """Of a call's record: what both losses' have by the same names."""
    log_probabilities, indices = call.teacher_log_probabilities, call.teacher_indices
    top = None if log_probabilities is None else Top(log_probabilities, indices)
    terms = Terms(call.divergence, call.beta, call.temperature, call.mix)
    return Asked(top, call.target, call.ignore_index, terms, dtype, like)
