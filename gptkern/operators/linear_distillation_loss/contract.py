"""linear_distillation_loss: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    student_logits = student @ student_weight.T + student_bias
    teacher_logits = teacher @ teacher_weight.T + teacher_bias        or given, or the likeliest of each row
    loss           = distillation_loss(student_logits, teacher_logits)

Neither model's logits are ever whole in memory: the forward walks both vocabularies in chunks and keeps six numbers a
row (gptkern/backends/distillation.py says which, and derives the gradients); the backward makes each chunk again, turns
the student's into its gradient and multiplies that at once:

    dstudent += dlogits @ student_weight[chunk]      dstudent_weight[chunk] = dlogits.T @ student      dbias = Σ dlogits

Products, each of rows * width * classes multiplications: two in the forward (four of jsd, which walks twice), four in
the backward; with a teacher whose logits are there, one (two) and three.

Inside gptkern a call is of rows: (rows, width); the loss of each row comes out, and the twin reduces them.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F

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

    student: torch.Tensor  # (rows, width)
    student_weight: torch.Tensor  # (classes, width)
    student_bias: torch.Tensor | None  # (classes,)
    teacher: torch.Tensor | None  # (rows, teacher's width)
    teacher_weight: torch.Tensor | None  # (classes, teacher's width)
    teacher_bias: torch.Tensor | None  # (classes,)
    teacher_logits: torch.Tensor | None  # (rows, classes)
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
    need_student: bool
    need_weight: bool
    need_bias: bool


_NAME = "linear_distillation_loss"
# Elements of the student's logits up to which they are whole on a CPU, in PyTorch's operators.
SMALL = 2**18
_TENSORS = 10


def linear_distillation_loss(
    student: torch.Tensor,
    student_weight: torch.Tensor,
    teacher: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    teacher_top: tuple[torch.Tensor, torch.Tensor] | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    mix: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """A student's divergence from its teacher, from hidden states and the weights that make logits of them.

        loss = distillation_loss(student @ student_weight.T + student_bias, teacher @ teacher_weight.T + teacher_bias,
                                 target, …)

    which has the formulas. Neither product is ever whole in memory: the vocabulary is walked in chunks, forward and
    backward. Logits, sums and the student's gradient are kept in float32 (float64 for float64); 16-bit results are
    rounded once, on a GPU the logits' gradient too, before it is multiplied. No gradient flows to the teacher.

    Args:
        student: (…, width), floating point.
        student_weight: (classes, width), of the student's dtype. student_bias: (classes,).
        teacher: (…, teacher's width), of any floating-point dtype.
        teacher_weight: (classes, teacher's width), of the teacher's dtype. teacher_bias: (classes,).
        target: (…), int64: indices of classes. Rows with `ignore_index` count nowhere, whatever the mix.
        teacher_logits: (…, classes), in place of teacher and teacher_weight.
        teacher_top: (log_probabilities, indices), each (…, n), in place of them: a teacher's n likeliest classes as
            they were stored, as in distillation_loss, torch.log_softmax(teacher_logits, -1).topk(n).
        divergence, beta, temperature, mix, ignore_index, reduction: as in distillation_loss.

    Returns:
        A number, or (…) with reduction="none"; of the student's dtype, under autocast float32.

    Raises:
        ValueError: not exactly one of the three teachers is given; the vocabularies differ; an option has no such
            value; a mix without a target; a temperature other than 1 with teacher_top; on a CPU, a teacher_top whose
            log_probabilities are none, as in distillation_loss (a GPU's values are not looked at: the loss is wrong).
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: on a CPU, a target or an index of teacher_top is no class; on a GPU the row's loss is NaN where
            its cross-entropy is asked for.
        TypeError: an argument that must be a tensor or a number is none; teacher without teacher_weight, or the other
            way.

    Backends: torch, which walks in chunks too; triton for float16, bfloat16 and float32 (no second derivative on
    either). On a CPU up to 2^18 of the student's logits are whole, and so are all under torch.func, forward mode and
    torch.jit.trace: there PyTorch's operators run.

    Source: as distillation_loss; both models' logits in chunks: Hsu et al., "Liger Kernel: Efficient Triton Kernels for
    LLM Training", 2024 (arXiv:2410.10989).
    """
    check_tensor(_NAME, "student", student)
    _check_linear("student", student, student_weight, student_bias, student)
    classes = student_weight.shape[0]
    given = [
        words
        for words, is_given in (
            ("teacher and teacher_weight", teacher is not None or teacher_weight is not None),
            ("teacher_logits", teacher_logits is not None),
            ("teacher_top", teacher_top is not None),
        )
        if is_given
    ]
    if len(given) != 1:
        got = " and ".join(given) + " are given" if given else "none is given"
        raise ValueError(
            f"{_NAME}: of the teachers (teacher and teacher_weight, teacher_logits, teacher_top) {got}; it needs one"
        )
    if (teacher is None) != (teacher_weight is None):
        got, missing = ("teacher", "teacher_weight") if teacher_weight is None else ("teacher_weight", "teacher")
        raise TypeError(
            f"{_NAME}: {missing} is a NoneType and {got} is given; it needs to be a Tensor: teacher and teacher_weight "
            "go together"
        )
    if teacher_bias is not None and teacher is None:
        raise ValueError(f"{_NAME}: teacher_bias is given without a teacher and its teacher_weight")
    terms = check_options(
        _NAME, divergence, beta, temperature, mix, ignore_index, reduction, target is not None, teacher_top is not None
    )  # fmt: skip
    log_probabilities = indices = None
    if teacher_top is not None:
        log_probabilities, indices = check_top(_NAME, teacher_top, student, classes)
    elif teacher_logits is not None:
        check_tensor(_NAME, "teacher_logits", teacher_logits, student.device)
        check_rows(_NAME, "teacher_logits", teacher_logits, student.shape)
        check_classes(_NAME, "teacher_logits", teacher_logits.shape[-1], "student_weight", classes)
        teacher_logits = teacher_logits.detach().reshape(-1, classes)
    else:
        check_tensor(_NAME, "teacher", teacher, student.device)
        check_rows(_NAME, "teacher", teacher, student.shape)
        _check_linear("teacher", teacher, teacher_weight, teacher_bias, student)
        check_classes(_NAME, "teacher_weight", teacher_weight.shape[0], "student_weight", classes)
        teacher = teacher.detach().reshape(-1, teacher.shape[-1])
        teacher_weight = teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    if target is not None:
        check_target(_NAME, target, student, classes, terms[-1])
        target = target.reshape(-1)
    if log_probabilities is not None:
        log_probabilities, indices = counting_top(_NAME, log_probabilities, indices, target, terms[-1], classes)
    multiplied = student.reshape(-1, student.shape[-1]), student_weight, student_bias, teacher, teacher_weight
    call = Call(
        *autocast("lower", *multiplied, teacher_bias), teacher_logits, log_probabilities, indices, target, *terms
    )
    losses = _losses(call)
    # PyTorch's autocast computes losses in float32.
    probe = student.new_empty(0, dtype=torch.float32)
    dtype = (
        student.dtype if autocast("lower", probe)[0].dtype == torch.float32 else vocabulary.compute_dtype(student.dtype)
    )
    return reduced(losses, target, call.ignore_index, reduction, student.shape, dtype)


def _check_linear(whose: str, hidden, weight, bias, student) -> None:
    """Raises where the weight or the bias does not fit the hidden states."""
    if hidden.dim() == 0:
        raise RuntimeError(f"{_NAME}: {whose} has shape (); it needs (…, width)")
    name = f"{whose}_weight"
    check_tensor(_NAME, name, weight, student.device)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise RuntimeError(
            f"{_NAME}: {name} has shape {tuple(weight.shape)}; it needs (classes, {hidden.shape[-1]}), the width of "
            f"{whose}"
        )
    tensors = [(name, weight)]
    if bias is not None:
        check_tensor(_NAME, f"{whose}_bias", bias, student.device)
        if bias.shape != weight.shape[:1]:
            raise RuntimeError(
                f"{_NAME}: {whose}_bias has shape {tuple(bias.shape)}; it needs ({weight.shape[0]},), as {name} has "
                "classes"
            )
        tensors.append((f"{whose}_bias", bias))
    # Autocast makes them equal.
    for what, tensor in tensors:
        if tensor.dtype != hidden.dtype and len({x.dtype for x in autocast("lower", hidden, tensor)}) > 1:
            raise RuntimeError(f"{_NAME}: {what} is {tensor.dtype}; it needs the dtype of {whose}, {hidden.dtype}")


def _losses(call: Call) -> torch.Tensor:
    choice, unseen = dispatch.settled(call.student), None
    if choice is None:
        choice, unseen = dispatch.chosen(_NAME, call)
    if choice.backend == "torch" and (tracing.is_transformed() or _are_few(call)):
        return _whole(call)
    results = on_kernels(OPERATOR, LinearDistillationLossFunction, call, choice.backend, unseen, *call[:3])
    # Without gradients the statistics come too.
    return results if isinstance(results, torch.Tensor) else results[0]


def _are_few(call: Call) -> bool:
    """Whether the logits are few, on a CPU: the host's time of the chunks' way is then several times the work's."""
    if not call.student.is_cpu or torch.compiler.is_compiling():
        return False
    return call.student.shape[0] * call.student_weight.shape[0] <= SMALL


def _whole(call: Call) -> torch.Tensor:
    """The losses of rows in PyTorch's operators, from whole logits."""

    def linear(hidden, weight, bias):
        if hidden.is_cpu and hidden.dtype.itemsize == 2:
            # A CPU's products would round their results to 16 bits.
            hidden, weight, bias = (None if one is None else one.float() for one in (hidden, weight, bias))
        return F.linear(hidden, weight, bias)

    student, teacher = call.student, call.teacher_logits
    if call.target is not None:
        # 0 times what a row that does not count holds, NaN too, is 0.
        student = student.masked_fill((call.target == call.ignore_index)[:, None], 0.0)
    if call.teacher is not None:
        teacher = linear(call.teacher, call.teacher_weight, call.teacher_bias)
    asked = distillation_sweep.asked_of(call, vocabulary.compute_dtype(student.dtype), student)
    return distillation_sweep.plain(linear(student, call.student_weight, call.student_bias), teacher, asked)


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    return None


def forward(call: Call):
    """-> losses (rows,), statistics (6 or 2, rows), in the dtype of sums; of top the classes' logits (rows, n)."""
    return forward_on(distillation, call)


def backward(gradient: Gradient, call: Call):
    """-> dstudent (rows, width), dstudent_weight (classes, width), dstudent_bias (classes,); what is not needed is
    empty."""
    return backward_on(distillation, gradient, call)


def forward_on(rows: ModuleType, call: Call):
    """Args: rows: a backend's `walk`, `walk_again`, `gradient` and `rest_gradient`."""
    if call.student.shape[0] == 0:
        return _forward_fake(call)
    if (some := _counting_rows(call)) is not None:
        losses, statistics, at_top = _forward_fake(call)
        of_some = forward_on(rows, _only(call, some))
        losses.zero_()[some] = of_some[0]
        statistics.zero_()[:, some] = of_some[1]
        if at_top is not None:
            at_top.zero_()[some] = of_some[2]
        return losses, statistics, at_top
    _, _, of, asked = _chunked(call)
    return distillation_sweep.forward(of, asked, rows)


def backward_on(rows: ModuleType, gradient: Gradient, call: Call):
    grad_losses, *kept, need_student, need_weight, need_bias = gradient
    if call.student.shape[0] == 0:
        dstudent, dweight, dbias = _backward_fake(gradient, call)
        return torch.zeros_like(dstudent), torch.zeros_like(dweight), torch.zeros_like(dbias)
    if (some := _counting_rows(call)) is not None:
        grad_losses, statistics, at_top, *needs = gradient
        of_some = Gradient(grad_losses[some], statistics[:, some], None if at_top is None else at_top[some], *needs)
        dx, dweight, dbias = backward_on(rows, of_some, _only(call, some))
        if need_student:
            dstudent = torch.zeros_like(call.student, memory_format=torch.contiguous_format)
            dstudent[some] = dx
            dx = dstudent
        return dx, dweight, dbias
    # The student's is not made before it is known: it and its sums are large.
    dstudent, dweight, dbias = _backward_fake(gradient._replace(need_student=False), call)
    chunks, student, of, asked = _chunked(call)
    g = chunks.buffer_of_g(call.student.dtype)
    unit = None
    if g.dtype == torch.float16:
        unit = vocabulary.float16_unit(grad_losses)
        grad_losses = grad_losses / unit
    dx = torch.empty(student.shape if need_student else 0, dtype=chunks.z.dtype, device=student.device)

    # 0 times what a row that does not count holds, NaN too, is 0.
    counts, counted = distillation.counting(call.target, call.ignore_index), student
    if need_weight and counts is not None:
        counted = student.masked_fill(~counts[:, None], 0.0)

    def output(start, stop, logits):
        # The bias's gradient is summed before it is rounded.
        return logits if need_bias else g.narrow(1, 0, stop - start)

    for start, stop, dlogits in distillation_sweep.gradients(of, asked, rows, grad_losses, *kept, output):
        if need_bias:
            # dbias = Σ dlogits
            dbias.narrow(0, start, stop - start).copy_(vocabulary.times(dlogits.sum(0), unit))
            dlogits = g.narrow(1, 0, stop - start).copy_(dlogits)
        if need_weight:
            vocabulary.weight_gradient(chunks, dlogits, counted, dweight.narrow(0, start, stop - start), unit)
        if need_student:
            weight = call.student_weight.narrow(0, start, stop - start)
            vocabulary.add_input_gradient(chunks, dx, dlogits, weight, start == 0)
    if need_student:
        dstudent = vocabulary.times(dx, unit).to(call.student.dtype)
    return dstudent, dweight, dbias


# Fewer rows that count than this part of all: the others are left out of the products, for copies of those that count.
_WORTH_COPIES = 0.9


def _counting_rows(call: Call) -> torch.Tensor | None:
    """Indices of the rows that count, where that is known and there are fewer: of a CPU's alone."""
    # A launcher is given plain tensors, or fake ones, which have no values.
    if type(call.target) is not torch.Tensor or not call.target.is_cpu:
        return None
    counts = call.target != call.ignore_index
    return counts.nonzero()[:, 0] if counts.sum() < _WORTH_COPIES * counts.numel() else None


def _only(call: Call, rows: torch.Tensor) -> Call:
    of_rows = "student", "teacher", "teacher_logits", "teacher_log_probabilities", "teacher_indices", "target"
    tensors = {name: getattr(call, name) for name in of_rows}
    return call._replace(**{name: None if x is None else x[rows] for name, x in tensors.items()})


def _chunked(call: Call):
    """-> the chunks, the student as products take it, both models' logits chunk by chunk, and what is asked."""
    rows, width = call.student.shape
    classes = call.student_weight.shape[0]
    # Beside one model's logits, for which the size is made, there are another's.
    each = vocabulary.at_a_time(rows, width, classes, call.student.dtype)
    if call.teacher is not None:
        each = max(each // 2, min(each, vocabulary.MULTIPLE))
    chunks = vocabulary.chunks_of(call.student, classes, each * rows)
    student = chunks.widened(call.student)
    if call.teacher is not None:
        of_teacher = vocabulary.chunks_of(call.teacher, classes, chunks.each * rows)
        teacher = of_teacher.widened(call.teacher)

    def logits_of(chunks, hidden, weight, bias, start, stop):
        found = vocabulary.logits(chunks, hidden, weight.narrow(0, start, stop - start))
        return found if bias is None else found.add_(bias.narrow(0, start, stop - start))

    def student_of(start, stop):
        return logits_of(chunks, student, call.student_weight, call.student_bias, start, stop)

    def teacher_of(start, stop):
        if call.teacher_logits is not None:
            return call.teacher_logits.narrow(1, start, stop - start)
        return logits_of(of_teacher, teacher, call.teacher_weight, call.teacher_bias, start, stop)

    of = distillation_sweep.Chunked(
        rows, list(chunks), student_of, None if call.teacher_indices is not None else teacher_of, student_of
    )
    return chunks, student, of, distillation_sweep.asked_of(call, chunks.z.dtype, call.student)


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
    def empty(shape, dtype, is_needed):
        return torch.empty(shape if is_needed else (0,), dtype=dtype, device=call.student.device)

    classes = call.student_weight.shape[:1]
    bias_dtype = call.student.dtype if call.student_bias is None else call.student_bias.dtype
    return (
        empty(call.student.shape, call.student.dtype, gradient.need_student),
        empty(call.student_weight.shape, call.student_weight.dtype, gradient.need_weight),
        empty(classes, bias_dtype, gradient.need_bias),
    )


TWIN = linear_distillation_loss
OPERATOR = Operator(_NAME, Call, 3, _forward_fake, Gradient, 3, _backward_fake)


class LinearDistillationLossFunction(KernelFunction):
    """The autograd.Function of linear_distillation_loss.

    `apply(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, teacher_logits,
    teacher_log_probabilities, teacher_indices, target, divergence, beta, temperature, mix, ignore_index, backend)` ->
    the loss of each row (rows,), float32 (float64 for float64). The arguments are trusted:
    gptkern.functional.linear_distillation_loss checks them. The student, its weight and its bias get gradients.

    Args:
        student, teacher: (rows, width), each of its own. target: (rows,) or None.
        backend: "torch" or "triton".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(
        ctx, student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, teacher_logits,
        teacher_log_probabilities, teacher_indices, target, divergence, beta, temperature, mix, ignore_index, backend,
        unseen=None,
    ):  # fmt: skip
        options = divergence, beta, temperature, mix, ignore_index
        call = Call(
            student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, teacher_logits,
            teacher_log_probabilities, teacher_indices, target, *options,
        )  # fmt: skip
        losses, statistics, at_top = OPERATOR.forward(call, backend, unseen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call[:_TENSORS], statistics, None if teacher_indices is None else at_top)
        ctx.options, ctx.backend = options, backend
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        needs = ctx.needs_input_grad[:3]
        if grad_losses is None or not any(needs):
            return (None,) * (_TENSORS + 7)
        *tensors, statistics, at_top = ctx.saved_tensors
        with torch.no_grad():
            # As the forward made them: saved_tensors_hooks may hand back other strides.
            gradient = Gradient(grad_losses, statistics.contiguous(), at_top, *needs)
            found = OPERATOR.backward(gradient, Call(*tensors, *ctx.options), ctx.backend)
        gradients = [found[i] if needs[i] else None for i in range(3)]
        tied = once_differentiable(
            _NAME, gradients, (grad_losses, *tensors[:3]), "distillation_loss of F.linear's logits has one."
        )
        return *tied, *(None,) * (_TENSORS + 4)
