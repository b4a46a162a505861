"""linear_distillation_loss on Triton: its contract's walk over chunks, on gptkern/backends/triton/distillation.py."""

from __future__ import annotations

from gptkern.backends.triton import distillation as rows
from gptkern.backends.triton.common import CompileCase
from gptkern.operators.linear_distillation_loss.contract import Call, Gradient, backward_on, forward_on

_FLOATING = ("student", "student_weight", "teacher", "teacher_logits", "teacher_log_probabilities")


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    return rows.unsupported({name: getattr(call, name) for name in _FLOATING})


def forward(call: Call):
    """-> losses (rows,), statistics (6 or 2, rows), in float32; of top the classes' logits (rows, n)."""
    return forward_on(rows, call)


def backward(gradient: Gradient, call: Call):
    """-> as the contract's backward."""
    return backward_on(rows, gradient, call)


def compile_cases(architecture: int) -> list[CompileCase]:
    return rows.compile_cases(architecture)
