"""How the tests call the distillation losses: inputs, options, teachers, and a call that the oracle judges."""

from __future__ import annotations

import conftest
import oracle_distillation
import pytest
import torch
from checking import check
from layouts import guarded
from sharp import deep, sharp

import gptkern.functional as G
from gptkern.backends import distillation, vocabulary
from gptkern.operators.linear_distillation_loss import contract

DTYPES = [torch.bfloat16, *deep(torch.float16, torch.float32)]
# name -> options of both losses
OPTIONS = {
    "forward_kl": {},
    "reverse_kl": dict(divergence="reverse_kl"),
    "jsd": dict(divergence="jsd", beta=0.3),
    "forward_kl mixed": dict(mix=0.25),
    "reverse_kl, T 2, mixed": dict(divergence="reverse_kl", temperature=2.0, mix=0.5),
    "jsd, T 0.7, mixed": dict(divergence="jsd", temperature=0.7, beta=0.9, mix=0.75),
    "target alone": dict(mix=1.0),
}
# The sharpest of them; the others are left to `make test-deep`.
_SHARP = ("reverse_kl", "forward_kl mixed", "jsd, T 0.7, mixed")
some_options = pytest.mark.parametrize("name", sharp(OPTIONS, *_SHARP))
AT_TEMPERATURE_1 = [name for name in OPTIONS if "T " not in name]
# None of it is written in CUDA C++; PyTorch's launchers are what runs on a CPU, beyond small logits.
on_every_backend = pytest.mark.parametrize(
    "backend", ["torch", "torch:launchers", conftest.KERNEL_BACKENDS[0]], indirect=True
)


def use_small_chunks(monkeypatch):
    """Several chunks of the vocabulary, and blocks of a few rows, of what tests have time for."""
    monkeypatch.setattr(vocabulary, "at_a_time", lambda rows, width, classes, dtype, asked=0: min(16, classes))
    monkeypatch.setattr(vocabulary, "MULTIPLE", 16)
    monkeypatch.setattr(contract, "SMALL", 0)
    monkeypatch.setattr(distillation, "_BLOCK", {"cpu": 64, "cuda": 64})


def logits_of(*shape, dtype=torch.float32, device="cpu", spread=2.0):
    return guarded((torch.randn(*shape, device=device) * spread).to(dtype))


def target_of(*rows, classes, device, ignored=True):
    target = torch.randint(classes, rows, device=device)
    if ignored and target.numel() > 2:
        target.view(-1)[1::3] = -100
    return target


def top_of(logits, n):
    """What is stored of a teacher's logits."""
    return tuple(guarded(x) for x in torch.log_softmax(logits.float(), -1).topk(n))


def check_logits(student, teacher=None, target=None, *, grad=None, floor=0.0, **options):
    """distillation_loss and the student's gradient against the oracle."""
    return check(
        lambda s: G.distillation_loss(s, teacher, target, **options),
        lambda s, precision: oracle_distillation.distillation_loss(s, teacher, target, **options, precision=precision),
        student, grad_output=grad, floor=floor,
    )  # fmt: skip


def linear_of(*rows, width, classes, dtype=torch.float32, device="cpu", bias=True):
    """(hidden states, weight, bias) whose logits have a spread of about 1.5."""
    hidden = guarded(torch.randn(*rows, width, device=device).to(dtype))
    weight = guarded((torch.randn(classes, width, device=device) * 1.5 / width**0.5).to(dtype))
    return hidden, weight, guarded(torch.randn(classes, device=device).to(dtype)) if bias else None


def check_linear(student, teacher, target=None, *, need=None, grad=None, **options):
    """linear_distillation_loss and its gradients against the oracle.

    Args:
        student: (hidden, weight, bias or None). teacher: likewise, or options that give it.
    """
    *hidden, bias = teacher if isinstance(teacher, tuple) else (None, None, None)
    given = {} if isinstance(teacher, tuple) else teacher

    def ours(x, weight, x_bias=None):
        of_teacher = dict(teacher_bias=bias) if isinstance(teacher, tuple) else teacher
        return G.linear_distillation_loss(
            x, weight, *hidden, target=target, student_bias=x_bias, **of_teacher, **options
        )

    def oracle(x, weight, x_bias=None, *, precision):
        def logits(x, weight, bias):
            found = x.to(precision) @ weight.to(precision).mT
            return found if bias is None else found + bias.to(precision)

        of_teacher = dict(teacher_logits=logits(*hidden, bias)) if isinstance(teacher, tuple) else given
        of_student = logits(x, weight, x_bias)
        return oracle_distillation.distillation_loss(
            of_student, target=target, **of_teacher, **options, precision=precision
        )

    present = [tensor for tensor in student if tensor is not None]
    return check(ours, oracle, *present, grad_output=grad, need=need)
