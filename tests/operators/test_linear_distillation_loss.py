"""linear_distillation_loss against its oracle, on every backend: three teachers, chunks of the vocabulary."""

from __future__ import annotations

import pytest
import torch
from distillation_calls import (
    AT_TEMPERATURE_1,
    DTYPES,
    OPTIONS,
    check_linear,
    linear_of,
    logits_of,
    on_every_backend,
    some_options,
    target_of,
    top_of,
    use_small_chunks,
)
from sharp import sharp


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    use_small_chunks(monkeypatch)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@some_options
def test_every_divergence(backend, device, name, dtype):
    student = linear_of(9, width=5, classes=37, dtype=dtype, device=device)
    teacher = linear_of(9, width=8, classes=37, dtype=dtype, device=device)
    target = target_of(9, classes=37, device=device)
    for reduction in ("none", "mean"):
        check_linear(student, teacher, target, reduction=reduction, **OPTIONS[name])


@on_every_backend
@pytest.mark.parametrize("name", ["reverse_kl, T 2, mixed", "jsd"])
def test_a_teacher_of_logits(backend, device, name):
    student = linear_of(9, width=5, classes=37, device=device, bias=False)
    teacher = dict(teacher_logits=logits_of(9, 37, dtype=torch.bfloat16, device=device))
    check_linear(student, teacher, target_of(9, classes=37, device=device), **OPTIONS[name])


@on_every_backend
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.deep), 5, pytest.param(37, marks=pytest.mark.deep)])
@pytest.mark.parametrize("name", sharp(AT_TEMPERATURE_1, "jsd", "forward_kl mixed"))
def test_the_likeliest_classes(backend, device, name, n):
    student = linear_of(9, width=5, classes=37, device=device)
    teacher = dict(teacher_top=top_of(logits_of(9, 37, device=device), n))
    check_linear(student, teacher, target_of(9, classes=37, device=device), reduction="none", **OPTIONS[name])
