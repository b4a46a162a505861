"""The distillation losses' Triton kernels, broken on purpose: the test meant for each fault has to see it.

As in test_broken_rows.py one expression is changed in a copy of a kernel, on the CPU; the same check passes before.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from mutants import Mutation, cases, plant_in_triton, seen

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels are changed where they are interpreted", allow_module_level=True)

import distillation_calls as calls
import test_distillation_inputs as inputs
import test_distillation_values as values

NAME = "distillation_loss"


def of_options(name):
    """A call with these options, in several chunks of a row: the kernel's own, or those of the teacher's stored."""

    def check(backend, monkeypatch):
        from gptkern.backends import dispatch

        monkeypatch.setattr(dispatch.load("triton", NAME).rows, "BLOCK", 16)
        torch.manual_seed(1)
        student, teacher = (calls.logits_of(3, 37, device=DEVICE) for _ in range(2))
        target = torch.tensor([3, 36, -100], device=DEVICE)
        calls.check_logits(student, teacher, target, reduction="none", **calls.OPTIONS[name])

    return check


def of_stored(backend, monkeypatch):
    calls.use_small_chunks(monkeypatch)
    torch.manual_seed(1)
    student, teacher = (calls.logits_of(3, 37, device=DEVICE) for _ in range(2))
    target = torch.tensor([3, 36, -100], device=DEVICE)
    top = calls.top_of(teacher, 5)
    calls.check_logits(student, None, target, teacher_top=top, reduction="none", divergence="jsd", mix=0.5)


def of_strides(backend, monkeypatch):
    inputs.test_every_operand_has_strides_of_its_own(backend, DEVICE, monkeypatch, 33)


def of_test(test, *arguments):
    def check(backend, monkeypatch):
        from gptkern.backends import dispatch

        monkeypatch.setattr(dispatch.load("triton", NAME).rows, "BLOCK", 16)
        torch.manual_seed(0)
        test(backend, DEVICE, *arguments)

    return check


WALK, AGAIN, GRADIENT = "walk_classes_kernel", "walk_classes_again_kernel", "class_gradient_kernel"
TRITON = {
    NAME: [
        # Sums that are kept online
        Mutation(
            "the student's sum is not moved to its new maximum", WALK,
            r"s_z = s_z \* exponential\(s_moved\)", "s_z = s_z", of_options("forward_kl"),
        ),
        Mutation(
            "the weighted sum forgets by how far the other maximum moved", WALK,
            r"weighted \+ t_z \* \(t_moved - s_moved\)", "weighted + t_z * t_moved", of_options("forward_kl"),
        ),
        Mutation(
            "the reverse one does", WALK,
            r"weighted \+ s_z \* \(s_moved - t_moved\)", "weighted + s_z * s_moved", of_options("reverse_kl"),
        ),
        Mutation(
            "the sum at temperature 1 is moved at T", WALK,
            r"z1 \* exponential\(s_moved\)", "z1 * exponential(s_moved * rate)",
            of_options("reverse_kl, T 2, mixed"),
        ),
        Mutation(
            "a maximum that was none moves", "moved",
            r"tl\.where\(before == float\(\"-inf\"\), 0\.0, before - maximum\)",
            "finite(before) - maximum", of_test(values.test_maxima_far_below_zero_after_hidden_chunks),
        ),
        Mutation(
            "0 times infinity", "times", r"tl\.where\(probability == 0\.0, 0\.0, probability \* value\)",
            "probability * value", of_test(values.test_classes_that_both_models_hide, "reverse_kl"),
        ),
        Mutation(
            "NaN is taken for nothing", "times", r"probability == 0\.0",
            "(probability == 0.0) | (probability != probability)",
            of_test(values.test_what_is_no_number_stays_in_its_row, "reverse_kl", float("nan")),
        ),
        # jsd
        Mutation(
            "beta and 1 - beta", AGAIN, r"beta \* times\(tl\.exp\(log_p\), of_p\) \+ \(1\.0 - beta\) \* of_q",
            "(1.0 - beta) * times(tl.exp(log_p), of_p) + beta * of_q", of_options("jsd"),
        ),
        Mutation(
            "the mixture's parts are swapped", "to_the_mixture", r"tl\.where\(less, 1\.0 - beta, beta\)",
            "tl.where(less, beta, 1.0 - beta)", of_options("jsd"),
        ),
        Mutation(
            "the gradient is not centred", GRADIENT, r"times\(q, of_q - centre\)", "times(q, of_q)", of_options("jsd"),
        ),
        Mutation(
            "nor that of reverse_kl", GRADIENT, r"log_q - log_p - centre", "log_q - log_p", of_options("reverse_kl"),
        ),
        Mutation(
            "the centre is of the last block", AGAIN, r"centre \+= ", "centre = ", of_options("jsd"),
        ),
        # The cross-entropy, rows that do not count
        Mutation(
            "the target is a class of the chunk alone", GRADIENT, r"tl\.load\(target_ptr \+ row\) - start",
            "tl.load(target_ptr + row) - start + 1", of_options("forward_kl mixed"),
        ),
        Mutation(
            "softmax(s) at T in the cross-entropy", GRADIENT, r"_STUDENT_LOG_Z1 \* rows\), 1\.0",
            "_STUDENT_LOG_Z1 * rows), rate", of_options("reverse_kl, T 2, mixed"),
        ),
        Mutation(
            "T is forgotten in the gradient", "gradient", r"\(1\.0 - terms\.mix\) \* terms\.temperature",
            "(1.0 - terms.mix)", of_options("jsd, T 0.7, mixed"),
        ),
        Mutation(
            "a row that does not count is 0 times what it holds", GRADIENT,
            r"tl\.where\(scale == 0\.0, 0\.0, found \* scale\)", "found * scale",
            of_test(values.test_ignored_rows_are_nothing_whatever_they_hold, "forward_kl"),
        ),
        # Layouts
        Mutation(
            "the teacher by the student's stride", WALK, r"row \* teacher_stride", "row * student_stride", of_strides,
        ),
        Mutation(
            "and in the gradient", GRADIENT, r"row \* teacher_stride", "row * student_stride", of_strides,
        ),
        Mutation(
            "and in jsd's second walk", AGAIN, r"row \* teacher_stride", "row * student_stride", of_strides,
        ),
        Mutation(
            "past the row's end", GRADIENT, r"inside = column < width", "inside = column < width + 1", of_strides,
        ),
        Mutation(
            "the last class is left out", WALK, r"tl\.load\(student_ptr \+ column, mask=column < width,",
            "tl.load(student_ptr + column, mask=column < width - 1,", of_options("reverse_kl"),
        ),
        # The likeliest classes
        Mutation(
            "the rest by its maximum alone", "rest_gradient_kernel", r"finite\(log_z\), 1\.0", "0.0, 1.0", of_stored,
        ),
        Mutation(
            "log z of a rest of nothing", "rest_gradient_kernel", r"finite\(log_z\)", "log_z",
            of_test(values.test_no_rest_where_both_models_hide_it, "forward_kl"),
        ),
    ],
}  # fmt: skip
# Of each class one, in `make test`.
SHARP = {
    "the weighted sum forgets by how far the other maximum moved", "0 times infinity", "the gradient is not centred",
    "and in jsd's second walk",
}  # fmt: skip


@cases(TRITON, SHARP)
def test_the_fault_is_seen(operator, mutation, triton_backend, poisoned_memory, monkeypatch, tmp_path):
    with monkeypatch.context() as sound:
        mutation.check("triton", sound)
    plant_in_triton(operator, mutation, tmp_path, monkeypatch)
    with seen():
        mutation.check("triton", monkeypatch)
