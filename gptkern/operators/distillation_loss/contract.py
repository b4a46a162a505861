"""distillation_loss: the contract, the PyTorch backend, the registered ops and the autograd.Function.

The divergences, their gradients and what is kept for the backward stand in gptkern/backends/distillation.py, which
linear_distillation_loss computes with too. Inside gptkern a call is of rows: (rows, classes) of both models, or of the
student alone and the teacher's likeliest classes; the loss of each row comes out, and the twin reduces them.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from gptkern.backends import dispatch, distillation, distillation_sweep, tracing, vocabulary
from gptkern.backends.distillation_checks import (
    check_classes,
    check_options,
    check_rows,
    check_target,
    check_tensor,
    check_top,
    counting_top,
    reduced,
)
from gptkern.backends.registration import KernelFunction, Operator, autocast, on_kernels, once_differentiable


class Call(NamedTuple):
    """A checked call: leading dimensions are flattened into rows."""

    student: torch.Tensor  # (rows, classes)
    teacher: torch.Tensor | None  # (rows, classes)
    teacher_log_probabilities: torch.Tensor | None  # (rows, n)
    teacher_indices: torch.Tensor | None  # (rows, n), int64
    target: torch.Tensor | None  # (rows,), int64
    divergence: str
    beta: float
    temperature: float
    mix: float
    ignore_index: int


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_losses: torch.Tensor  # (rows,)
    statistics: torch.Tensor  # (6, rows), or (2, rows) of the likeliest classes
    student_at_top: torch.Tensor | None  # (rows, n)


_NAME = "distillation_loss"
# Elements of the student's logits up to which PyTorch's operators run, whose temporaries are then no matter.
SMALL = 2**18


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
) -> torch.Tensor:
    """A student's divergence from its teacher, from both models' logits, mixed with the cross-entropy of a target.

        q = softmax(student_logits / T)    p = softmax(teacher_logits / T)    m = beta * p + (1 - beta) * q
        D = KL(p ‖ q)                                         "forward_kl"
            KL(q ‖ p)                                         "reverse_kl"
            beta * KL(p ‖ m) + (1 - beta) * KL(q ‖ m)         "jsd"
        loss = (1 - mix) * T² * D + mix * cross_entropy(student_logits, target)

    T² is part of the loss, so that a temperature changes how much the classes count and not how much the teacher does;
    for a library's loss without it divide by T². The cross-entropy is at temperature 1. No gradient flows to the
    teacher. Sums are kept in float32 (float64 for float64), and 16-bit results are rounded once. No tensor of the
    logits' size is made but the gradient, from 2^18 elements on.

    Args:
        student_logits: (…, classes), floating point.
        teacher_logits: (…, classes), of any floating-point dtype.
        target: (…), int64: indices of classes. Rows with `ignore_index` count nowhere, whatever the mix.
        teacher_top: in place of teacher_logits what was stored of a teacher: (log_probabilities, indices), each (…, n):
            its n likeliest classes, each once, with their logarithms under the softmax of all classes at temperature 1,
            torch.log_softmax(teacher_logits, -1).topk(n). Logits or probabilities in their place are refused on a CPU,
            where values above 0 or sums above 1 show them; a GPU's values are not looked at, and the loss is wrong.
            All other classes are one in both distributions, the rest, with p_rest = 1 - Σ p_i, of n + 1 classes; where
            rounding makes the p_i more than 1 together, all are divided by their sum.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's part in m, above 0 and below 1 (at both D is 0). D / beta goes to KL(p ‖ q), forward_kl, as
            beta goes to 0, and D / (1 - beta) to KL(q ‖ p), reverse_kl, as it goes to 1. Read by "jsd" alone.
        temperature: above 0; 1 with teacher_top.
        mix: from 0, the teacher alone, to 1, the target alone.
        reduction: "mean" over the rows that count (NaN if none does), "sum", or "none".

    Returns:
        A number, or (…) with reduction="none"; of the student's dtype, under CUDA's autocast float32.

    Raises:
        ValueError: both or none of the teachers are given; the vocabularies differ; an option has no such value;
            a mix without a target; a temperature other than 1 with teacher_top; on a CPU, a teacher_top whose
            log_probabilities are above 0, or their exponentials above 1 together, by more than rounding.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: on a CPU, a target or an index of teacher_top is no class; on a GPU the row's loss is NaN where
            its cross-entropy is asked for.
        TypeError: an argument that must be a tensor or a number is none.

    Backends: torch; triton for float16, bfloat16 and float32 (no second derivative).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531); for beta
    Agarwal et al., "On-Policy Distillation of Language Models", 2024 (arXiv:2306.13649).
    """
    student = student_logits
    check_tensor(_NAME, "student_logits", student)
    if student.dim() == 0:
        raise RuntimeError(f"{_NAME}: student_logits has shape (); it needs (…, classes)")
    classes = student.shape[-1]
    if (teacher_logits is None) == (teacher_top is None):
        got = "both are" if teacher_top is not None else "none is"
        raise ValueError(f"{_NAME}: of teacher_logits and teacher_top {got} given; it needs one")
    terms = check_options(
        _NAME, divergence, beta, temperature, mix, ignore_index, reduction, target is not None, teacher_top is not None
    )  # fmt: skip
    log_probabilities = indices = None
    if classes == 0:
        raise ValueError(f"{_NAME}: student_logits has shape {tuple(student.shape)}; it needs at least one class")
    if teacher_top is not None:
        log_probabilities, indices = check_top(_NAME, teacher_top, student, classes)
    else:
        check_tensor(_NAME, "teacher_logits", teacher_logits, student.device)
        check_rows(_NAME, "teacher_logits", teacher_logits, student.shape)
        check_classes(_NAME, "teacher_logits", teacher_logits.shape[-1], "student_logits", classes)
        teacher_logits = teacher_logits.detach().reshape(-1, classes)
    if target is not None:
        check_target(_NAME, target, student, classes, terms[-1])
        target = target.reshape(-1)
    if log_probabilities is not None:
        log_probabilities, indices = counting_top(_NAME, log_probabilities, indices, target, terms[-1], classes)
    rows = student.reshape(-1, classes)
    call = Call(rows, teacher_logits, log_probabilities, indices, target, *terms)
    losses = _losses(call)
    dtype = autocast("float32", student.new_empty(0))[0].dtype
    return reduced(losses, target, call.ignore_index, reduction, student.shape, dtype)


def _losses(call: Call) -> torch.Tensor:
    choice, unseen = dispatch.settled(call.student), None
    if choice is None:
        choice, unseen = dispatch.chosen(_NAME, call)
    if choice.backend == "torch":
        # What is asked for by name is PyTorch's operators, differentiable as often as they are.
        is_small = isinstance(call.student.numel(), int) and call.student.numel() <= SMALL
        if is_small or choice.reason == dispatch.BY_NAME or tracing.is_transformed():
            asked = distillation_sweep.asked_of(call, vocabulary.compute_dtype(call.student.dtype), call.student)
            return distillation_sweep.plain(call.student, call.teacher, asked)
    results = on_kernels(OPERATOR, DistillationLossFunction, call, choice.backend, unseen, call.student)
    # Without gradients the statistics come too.
    return results if isinstance(results, torch.Tensor) else results[0]


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    return None


def forward(call: Call):
    """-> losses (rows,), statistics (6 or 2, rows), in the dtype of sums; of top the classes' logits (rows, n)."""
    return forward_on(distillation, call)


def backward(gradient: Gradient, call: Call):
    """-> dstudent (rows, classes)."""
    return backward_on(distillation, gradient, call)


def forward_on(rows: ModuleType, call: Call):
    """Args: rows: a backend's `walk`, `walk_again`, `gradient` and `rest_gradient`."""
    if call.student.numel() == 0:
        return _forward_fake(call)
    of, asked = _chunked(call)
    return distillation_sweep.forward(of, asked, rows)


def backward_on(rows: ModuleType, gradient: Gradient, call: Call):
    dstudent = torch.empty(call.student.shape, dtype=call.student.dtype, device=call.student.device)
    if dstudent.numel() == 0:
        return dstudent
    of, asked = _chunked(call)
    for _ in distillation_sweep.gradients(
        of, asked, rows, *gradient, lambda start, stop, student: dstudent[:, start:stop]
    ):
        pass
    return dstudent


def _chunked(call: Call):
    student, dtype = call.student, vocabulary.compute_dtype(call.student.dtype)
    rows, classes = student.shape
    chunks = [(0, classes)]
    if call.teacher is None:
        # Chunks of a copy, in which the stored classes are hidden.
        each = vocabulary.at_a_time(rows, 0, classes, dtype, vocabulary.LEAST_ELEMENTS)
        chunks = [(start, min(start + each, classes)) for start in range(0, classes, each)]
    of = distillation_sweep.Chunked(
        rows, chunks,
        lambda start, stop: student[:, start:stop],
        None if call.teacher is None else lambda start, stop: call.teacher[:, start:stop],
        lambda start, stop: student[:, start:stop].to(dtype, copy=True, memory_format=torch.contiguous_format),
    )  # fmt: skip
    return of, distillation_sweep.asked_of(call, dtype, student)


# --- Registration and autograd --------------------------------------------------------------------------------------


def _forward_fake(call: Call):
    rows, dtype = call.student.shape[0], vocabulary.compute_dtype(call.student.dtype)
    statistics = 6 if call.teacher_indices is None else 2
    at_top = None
    if call.teacher_indices is not None:
        at_top = call.student.new_empty(call.teacher_indices.shape, dtype=dtype)
    losses = call.student.new_empty(rows, dtype=dtype)
    return losses, call.student.new_empty((statistics, rows), dtype=dtype), at_top


def _backward_fake(gradient: Gradient, call: Call):
    return torch.empty(call.student.shape, dtype=call.student.dtype, device=call.student.device)


TWIN = distillation_loss
OPERATOR = Operator(_NAME, Call, 3, _forward_fake, Gradient, 1, _backward_fake)


class DistillationLossFunction(KernelFunction):
    """The autograd.Function of distillation_loss.

    `apply(student, teacher, teacher_log_probabilities, teacher_indices, target, divergence, beta, temperature, mix,
    ignore_index, backend)` -> the loss of each row (rows,), float32 (float64 for float64). The arguments are trusted:
    gptkern.functional.distillation_loss checks them. The student alone gets a gradient.

    Args:
        student, teacher: (rows, classes); the teacher's are None where log-probabilities and indices (rows, n) are not.
        target: (rows,) or None. divergence, beta, temperature, mix, ignore_index: as there.
        backend: "torch" or "triton".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(
        ctx, student, teacher, teacher_log_probabilities, teacher_indices, target, divergence, beta, temperature, mix,
        ignore_index, backend, unseen=None,
    ):  # fmt: skip
        options = divergence, beta, temperature, mix, ignore_index
        call = Call(student, teacher, teacher_log_probabilities, teacher_indices, target, *options)
        losses, statistics, at_top = OPERATOR.forward(call, backend, unseen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call[:5], statistics, None if teacher_indices is None else at_top)
        ctx.options, ctx.backend = options, backend
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        dstudent = None
        if grad_losses is not None and ctx.needs_input_grad[0]:
            *tensors, statistics, at_top = ctx.saved_tensors
            with torch.no_grad():
                # As the forward made them: saved_tensors_hooks may hand back other strides.
                gradient = Gradient(grad_losses, statistics.contiguous(), at_top)
                dstudent = OPERATOR.backward(gradient, Call(*tensors, *ctx.options), ctx.backend)
            (dstudent,) = once_differentiable(_NAME, [dstudent], (grad_losses, tensors[0]))
        return dstudent, *(None,) * 11
