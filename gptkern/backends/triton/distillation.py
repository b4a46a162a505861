"""Distillation losses on Triton: two distributions over a chunk of classes, added up and turned into gradients.

gptkern/backends/distillation.py has the formulas, and the same functions in plain PyTorch: `walk`, `walk_again`,
`gradient`, `rest_gradient`. s are the student's and t the teacher's logits of a row, q and p their probabilities.

Memory is the floor of each. `walk` reads both models' logits once (two reads of an element; of one model alone, one),
`walk_again`, which jsd needs, once more; a program has one row, all of a chunk. `gradient` reads both once and writes
once; its programs have a block of one row, since nothing is summed.

Tests reach rows of several blocks at small widths by lowering BLOCK (monkeypatch).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptkern.backends import distillation
from gptkern.backends.distillation import DIVERGENCES, Sums, Terms
from gptkern.backends.triton.common import CompileCase, as_rows, cdiv, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.logits import exponential, finite, log1p

# Classes of a step, and of a warp: 8 elements a thread of each model's; 16 spill on sm_80. Reasoned, not measured.
BLOCK, _A_WARP = 4096, 256
# What DIVERGENCE is in a kernel: the place in DIVERGENCES, or NONE, where the target alone counts.
FORWARD_KL, REVERSE_KL, JSD, NONE = (tl.constexpr(kind) for kind in (0, 1, 2, 3))
# Rows of the sums and of the statistics, as gptkern.backends.distillation has them.
_STUDENT_MAX, _STUDENT_Z, _TEACHER_MAX, _TEACHER_Z, _WEIGHTED, _CENTRE, _STUDENT_Z1, _AT_TARGET = (
    tl.constexpr(row) for row in range(8)
)
_STUDENT_LOG_Z, _TEACHER_LOG_Z, _OF_CENTRE, _STUDENT_LOG_Z1 = (tl.constexpr(row) for row in (1, 3, 4, 5))


@triton.jit
def times(probability, value):
    """probability * value, 0 where the probability is: there the value may be infinite, or infinity minus itself."""
    return tl.where(probability == 0.0, 0.0, probability * value)


@triton.jit
def moved(before, maximum):
    """How far a maximum moved; 0 where there was none, and so nothing to scale by it."""
    return tl.where(before == float("-inf"), 0.0, before - maximum)


@triton.jit
def expm1_of_negative(x):
    """exp(x) - 1 of x <= 0: near 0 by its series, of which the difference would lose the digits."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(x > -0.25, series, exponential(x) - 1.0)


@triton.jit
def to_the_mixture(log_p, log_q, beta):
    """log(p / m) and log(q / m), from the difference of both logarithms: exact where they are nearly equal."""
    difference = log_q - log_p
    less = difference <= 0.0
    # log(m / p) = log(1 + (1 - beta) * (q / p - 1)), log(m / q) = log(1 + beta * (p / q - 1))
    near = log1p(tl.where(less, 1.0 - beta, beta) * expm1_of_negative(-tl.abs(difference)))
    far = near + tl.abs(difference)
    return -tl.where(less, near, far), -tl.where(less, far, near)


@triton.jit
def log_probability(x, maximum, log_z, rate):
    """log softmax(x / T) = (x - max) / T - log z"""
    return (x - finite(maximum)) * rate - log_z


@jit(do_not_specialize=["rows", "width", "start", "rate"])
def walk_classes_kernel(
    student_ptr,  # (rows, width)   s, a chunk of classes
    teacher_ptr,  # (rows, width)   t, or None: the sums of the student alone
    target_ptr,  # (rows,)         int64, or None
    sums_ptr,  # (8, rows)       float32: what was added up before, and is then
    student_stride,  # from a row to the next
    teacher_stride,
    rows,
    width,
    start,  # the chunk's first class
    rate,  # 1 / T
    DIVERGENCE: tl.constexpr,
    MIXED: tl.constexpr,  # whether there is a cross-entropy
    SCALED: tl.constexpr,  # whether T is not 1
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    # Offsets of a row of the sums can pass 2^31.
    rows = rows.to(tl.int64)
    sums_ptr += row
    s_max, s_z = tl.load(sums_ptr + _STUDENT_MAX * rows), tl.load(sums_ptr + _STUDENT_Z * rows)
    z1 = tl.load(sums_ptr + _STUDENT_Z1 * rows)
    if teacher_ptr is not None:
        teacher_ptr += row * teacher_stride
        t_max, t_z = tl.load(sums_ptr + _TEACHER_MAX * rows), tl.load(sums_ptr + _TEACHER_Z * rows)
        weighted = tl.load(sums_ptr + _WEIGHTED * rows)

    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        s = tl.load(student_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
        s_before = s_max
        s_max = tl.maximum(s_max, tl.max(s, axis=0))
        s_moved = moved(s_before, s_max)
        if MIXED and SCALED:
            # Σ exp(s - max)
            z1 = z1 * exponential(s_moved) + tl.sum(exponential(s - finite(s_max)), axis=0)
        s_moved *= rate
        u = (s - finite(s_max)) * rate
        e_s = exponential(u)
        if teacher_ptr is not None:
            t = tl.load(teacher_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
            t_before = t_max
            t_max = tl.maximum(t_max, tl.max(t, axis=0))
            t_moved = moved(t_before, t_max) * rate
            v = (t - finite(t_max)) * rate
            e_t = exponential(v)
            # a = Σ w * (v - u), and all so far by how far both maxima moved
            if DIVERGENCE == FORWARD_KL:
                before = times(exponential(t_moved), weighted + t_z * (t_moved - s_moved))
                weighted = before + tl.sum(times(e_t, v - u), axis=0)
            if DIVERGENCE == REVERSE_KL:
                before = times(exponential(s_moved), weighted + s_z * (s_moved - t_moved))
                weighted = before + tl.sum(times(e_s, u - v), axis=0)
            t_z = t_z * exponential(t_moved) + tl.sum(e_t, axis=0)
        s_z = s_z * exponential(s_moved) + tl.sum(e_s, axis=0)

    tl.store(sums_ptr + _STUDENT_MAX * rows, s_max)
    tl.store(sums_ptr + _STUDENT_Z * rows, s_z)
    if MIXED:
        tl.store(sums_ptr + _STUDENT_Z1 * rows, z1 if SCALED else s_z)
    if teacher_ptr is not None:
        tl.store(sums_ptr + _TEACHER_MAX * rows, t_max)
        tl.store(sums_ptr + _TEACHER_Z * rows, t_z)
        tl.store(sums_ptr + _WEIGHTED * rows, weighted)
    if target_ptr is not None:
        index = tl.load(target_ptr + row) - start
        if (index >= 0) & (index < width):
            tl.store(sums_ptr + _AT_TARGET * rows, tl.load(student_ptr + index).to(tl.float32))


@jit(do_not_specialize=["rows", "width", "rate", "beta"])
def walk_classes_again_kernel(
    student_ptr,  # (rows, width)   s, a chunk of classes
    teacher_ptr,  # (rows, width)   t
    sums_ptr,  # (8, rows)       float32
    student_stride,  # from a row to the next
    teacher_stride,
    rows,
    width,
    rate,  # 1 / T
    beta,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    rows = rows.to(tl.int64)
    sums_ptr += row
    s_max, s_log_z = tl.load(sums_ptr + _STUDENT_MAX * rows), tl.log(tl.load(sums_ptr + _STUDENT_Z * rows))
    t_max, t_log_z = tl.load(sums_ptr + _TEACHER_MAX * rows), tl.log(tl.load(sums_ptr + _TEACHER_Z * rows))

    total, centre = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        s = tl.load(student_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
        log_q = log_probability(s, s_max, s_log_z, rate)
        log_p = log_probability(t, t_max, t_log_z, rate)
        of_p, of_q = to_the_mixture(log_p, log_q, beta)
        # D = beta * Σ p * log(p / m) + (1 - beta) * Σ q * log(q / m)
        of_q = times(tl.exp(log_q), of_q)
        of_both = beta * times(tl.exp(log_p), of_p) + (1.0 - beta) * of_q
        # Past the row's end a row of NaN would add its own.
        total += tl.where(column < width, of_both, 0.0)
        centre += tl.where(column < width, of_q, 0.0)
    weighted = tl.load(sums_ptr + _WEIGHTED * rows) + tl.sum(total, axis=0)
    tl.store(sums_ptr + _WEIGHTED * rows, weighted)
    tl.store(sums_ptr + _CENTRE * rows, tl.load(sums_ptr + _CENTRE * rows) + tl.sum(centre, axis=0))


@jit(do_not_specialize=["rows", "width", "start", "rate", "beta", "of_divergence", "mix"])
def class_gradient_kernel(
    student_ptr,  # (rows, width)   s, a chunk of classes
    teacher_ptr,  # (rows, width)   t
    target_ptr,  # (rows,)         int64, or None
    statistics_ptr,  # (6, rows)       float32
    scale_ptr,  # (rows,)         float32: the gradient of the row's loss
    gradient_ptr,  # (rows, width)   output; it may be the student's memory
    student_stride,  # from a row to the next
    teacher_stride,
    gradient_stride,
    rows,
    width,
    start,  # the chunk's first class
    rate,  # 1 / T
    beta,
    of_divergence,  # (1 - mix) * T, of jsd times 1 - beta
    mix,
    DIVERGENCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    rows = rows.to(tl.int64)
    statistics_ptr += row
    scale = tl.load(scale_ptr + row)
    s_max = tl.load(statistics_ptr + _STUDENT_MAX * rows)
    s = tl.load(student_ptr + row * student_stride + column, mask=inside, other=0.0).to(tl.float32)
    found = tl.zeros((BLOCK_N,), tl.float32)
    if DIVERGENCE != NONE:
        t = tl.load(teacher_ptr + row * teacher_stride + column, mask=inside, other=0.0).to(tl.float32)
        log_q = log_probability(s, s_max, tl.load(statistics_ptr + _STUDENT_LOG_Z * rows), rate)
        t_max, t_log_z = (
            tl.load(statistics_ptr + _TEACHER_MAX * rows), tl.load(statistics_ptr + _TEACHER_LOG_Z * rows),
        )  # fmt: skip
        log_p = log_probability(t, t_max, t_log_z, rate)
        q, centre = tl.exp(log_q), tl.load(statistics_ptr + _OF_CENTRE * rows)
        if DIVERGENCE == FORWARD_KL:
            # q - p
            found = q - tl.exp(log_p)
        elif DIVERGENCE == REVERSE_KL:
            # q * (log(q / p) - D)
            found = times(q, log_q - log_p - centre)
        else:
            # (1 - beta) * q * (log(q / m) - KL(q ‖ m))
            _, of_q = to_the_mixture(log_p, log_q, beta)
            found = times(q, of_q - centre)
        found *= of_divergence
    if target_ptr is not None:
        # mix * (softmax(s) - 1[c = target])
        q1 = tl.exp(log_probability(s, s_max, tl.load(statistics_ptr + _STUDENT_LOG_Z1 * rows), 1.0))
        index = tl.load(target_ptr + row) - start
        found += mix * (q1 - tl.where(column == index, 1.0, 0.0))
    # A row that does not count is 0, whatever it holds.
    found = tl.where(scale == 0.0, 0.0, found * scale)
    gradient_ptr += row * gradient_stride
    tl.store(gradient_ptr + column, found.to(gradient_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "width"])
def rest_gradient_kernel(
    student_ptr,  # (rows, width)   s, a chunk of classes
    rest_ptr,  # (2, rows)       float32: maximum and log z of the rest
    coefficient_ptr,  # (rows,)         float32: the gradient of the rest's logit
    gradient_ptr,  # (rows, width)   output; it may be the student's memory
    student_stride,  # from a row to the next
    gradient_stride,
    rows,
    width,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    maximum, log_z = tl.load(rest_ptr + row), tl.load(rest_ptr + rows.to(tl.int64) + row)
    s = tl.load(student_ptr + row * student_stride + column, mask=inside, other=0.0).to(tl.float32)
    # coefficient * exp(s - lse_rest); of a rest of no probability each class, and log z, is -inf
    part = tl.exp(log_probability(s, maximum, finite(log_z), 1.0))
    gradient_ptr += row * gradient_stride
    found = part * tl.load(coefficient_ptr + row)
    tl.store(gradient_ptr + column, found.to(gradient_ptr.dtype.element_ty), mask=inside)


# --- Launchers: as gptkern.backends.distillation has them -------------------------------------------------------------


def walk(student, teacher, start: int, sums: Sums, target, terms: Terms) -> None:
    """Adds a chunk of classes to the sums, in place."""
    (rows, width), student = student.shape, as_rows(student)
    teacher = None if teacher is None else as_rows(teacher)
    block, warps = _tile(width)
    walk_classes_kernel[(rows,)](
        student, teacher, _contiguous(target), sums.values, student.stride(0),
        0 if teacher is None else teacher.stride(0), rows, width, start, 1.0 / terms.temperature,
        DIVERGENCE=_kind(terms), MIXED=terms.mix > 0.0, SCALED=terms.temperature != 1.0, BLOCK_N=block, num_warps=warps,
    )  # fmt: skip


def walk_again(student, teacher, sums: Sums, terms: Terms) -> None:
    """jsd's second walk, when maxima and sums are known: adds a chunk to D and to KL(q ‖ m)."""
    (rows, width), student, teacher = student.shape, as_rows(student), as_rows(teacher)
    block, warps = _tile(width)
    walk_classes_again_kernel[(rows,)](
        student, teacher, sums.values, student.stride(0), teacher.stride(0), rows, width, 1.0 / terms.temperature,
        terms.beta, BLOCK_N=block, num_warps=warps,
    )  # fmt: skip


def gradient(student, teacher, start: int, statistics, scale, target, terms: Terms, output: torch.Tensor) -> None:
    """Writes the gradient of a chunk's logits into `output`, whose rows are contiguous."""
    (rows, width), student, teacher = student.shape, as_rows(student), as_rows(teacher)
    block, warps = _tile(width)
    of_divergence = (1.0 - terms.mix) * terms.temperature
    if terms.divergence == distillation.JSD:
        of_divergence *= 1.0 - terms.beta
    class_gradient_kernel[(rows * cdiv(width, block),)](
        student, teacher, _contiguous(target), statistics, scale.contiguous(), output, student.stride(0),
        teacher.stride(0), output.stride(0), rows, width, start, 1.0 / terms.temperature, terms.beta, of_divergence,
        terms.mix, DIVERGENCE=_kind(terms), BLOCK_N=block, num_warps=warps,
    )  # fmt: skip


def rest_gradient(student, of_rest, coefficient, output) -> None:
    """Writes coefficient * exp(s - lse_rest) into `output`, whose rows are contiguous."""
    (rows, width), student = student.shape, as_rows(student)
    block, warps = _tile(width)
    rest_gradient_kernel[(rows * cdiv(width, block),)](
        student, of_rest, coefficient.contiguous(), output, student.stride(0), output.stride(0), rows, width,
        BLOCK_N=block, num_warps=warps,
    )  # fmt: skip


def unsupported(tensors: dict[str, torch.Tensor | None]) -> str | None:
    """Why these kernels do not cover a call's floating-point tensors, or None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} is {tensor.dtype}; the kernels are for float16, bfloat16 and float32"
    return None


def _kind(terms: Terms) -> int:
    return DIVERGENCES.index(terms.divergence) if terms.has_divergence else NONE.value


def _contiguous(target):
    return None if target is None else target.contiguous()


def _tile(width: int) -> tuple[int, int]:
    block = min(BLOCK, next_power_of_2(width))
    return block, min(max(block // _A_WARP, 1), 32)


# --- Ahead-of-time compilation ----------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Each kernel with everything that it can be asked for at once, by divergence."""

    def case(kernel, name, dtype, width, **constants):
        block, warps = _tile(width)
        constants |= dict(BLOCK_N=block)
        types = {"target_ptr": "*i64", "student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}"}
        types |= {"gradient_ptr": f"*{dtype}"}
        floats = ("rate", "beta", "of_divergence", "mix")
        signature = {
            name: "constexpr" if name in constants
            else types.get(name, "*fp32") if name.endswith("_ptr") else "fp32" if name in floats else "i32"
            for name in kernel.arg_names
        }  # fmt: skip
        constants = {name: constants[name] for name in kernel.arg_names if name in constants}
        aligned = tuple(name for name in signature if name.endswith(("stride", "width")))
        return CompileCase(f"{name} {width} {dtype}", kernel, signature, constants, warps, 3, aligned)

    cases = []
    for dtype in ("bf16", "fp32"):
        for kind, name in enumerate(DIVERGENCES):
            cases += [
                case(walk_classes_kernel, f"walk {name}", dtype, BLOCK, DIVERGENCE=kind, MIXED=True, SCALED=True),
                case(class_gradient_kernel, f"gradient {name}", dtype, BLOCK, DIVERGENCE=kind),
            ]
        alone = dict(teacher_ptr=None, target_ptr=None, DIVERGENCE=NONE.value, MIXED=False, SCALED=False)
        cases += [
            case(walk_classes_kernel, "walk of the rest", dtype, BLOCK, **alone),
            case(walk_classes_again_kernel, "walk again", dtype, BLOCK),
            case(rest_gradient_kernel, "gradient of the rest", dtype, BLOCK),
        ]
    return cases
