"""distillation_loss against its oracle, on every backend."""

from __future__ import annotations

import pytest
from distillation_calls import (
    AT_TEMPERATURE_1,
    DTYPES,
    OPTIONS,
    check_logits,
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
    student, teacher = (logits_of(7, 37, dtype=dtype, device=device) for _ in range(2))
    for reduction in ("none", "mean"):
        check_logits(student, teacher, target_of(7, classes=37, device=device), reduction=reduction, **OPTIONS[name])


@on_every_backend
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.deep), 5, pytest.param(37, marks=pytest.mark.deep)])
@pytest.mark.parametrize("name", sharp(AT_TEMPERATURE_1, "jsd", "forward_kl mixed"))
def test_the_likeliest_classes(backend, device, name, n):
    student, teacher = (logits_of(7, 37, device=device) for _ in range(2))
    target = target_of(7, classes=37, device=device)
    check_logits(student, None, target, teacher_top=top_of(teacher, n), reduction="none", **OPTIONS[name])
