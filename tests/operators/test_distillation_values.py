"""The distillation losses where numbers are hard: infinities, NaN, ignored rows, equal models, limits."""

from __future__ import annotations

import math

import pytest
import torch
from distillation_calls import (
    AT_TEMPERATURE_1,
    OPTIONS,
    check_linear,
    check_logits,
    linear_of,
    logits_of,
    on_every_backend,
    some_options,
    target_of,
    top_of,
    use_small_chunks,
)
from layouts import guarded

import gptkern
import gptkern.functional as G
from gptkern.autograd import DistillationLossFunction, LinearDistillationLossFunction
from gptkern.backends import distillation

DIVERGENCES = {name: dict(divergence=name) for name in distillation.DIVERGENCES}
divergences = pytest.mark.parametrize("divergence", DIVERGENCES)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    use_small_chunks(monkeypatch)


# --- Infinite logits, NaN ---------------------------------------------------------------------------------------------


@on_every_backend
@some_options
def test_classes_that_both_models_hide(backend, device, name):
    # Whole chunks of the vocabulary too, the first one among them.
    student, teacher = (logits_of(6, 50, device=device) for _ in range(2))
    for logits in (student, teacher):
        logits[:, :17] = -math.inf
        logits[2, 20:] = -math.inf
        logits[:, 44] = -math.inf
    target = torch.full((6,), 18, device=device)
    check_logits(student, teacher, target, reduction="none", **OPTIONS[name])


@on_every_backend
def test_maxima_far_below_zero_after_hidden_chunks(backend, device):
    # exp(0 - max) overflows for them: what was nothing so far is not scaled by it.
    student, teacher = (logits_of(3, 50, device=device) - 300 for _ in range(2))
    student[:, :20] = teacher[:, :20] = -math.inf
    for name in ("forward_kl", "reverse_kl", "jsd, T 0.7, mixed"):
        check_logits(student, teacher, torch.full((3,), 30, device=device), **OPTIONS[name])


@on_every_backend
def test_a_class_that_one_model_hides(backend, device):
    student, teacher = (logits_of(2, 40, device=device) for _ in range(2))
    student[0, 33] = teacher[1, 5] = -math.inf

    def losses(divergence):
        return G.distillation_loss(student, teacher, divergence=divergence, reduction="none").tolist()

    forward, reverse, jsd = (losses(name) for name in DIVERGENCES)
    assert forward[0] == math.inf and math.isfinite(forward[1])
    assert reverse[1] == math.inf and math.isfinite(reverse[0])
    assert all(math.isfinite(loss) for loss in jsd)
    check_logits(student, teacher, divergence="jsd", beta=0.2)
    check_logits(student[:1], teacher[:1], divergence="reverse_kl")
    check_logits(student[1:], teacher[1:])


@on_every_backend
@divergences
@pytest.mark.parametrize("poison", [math.nan, pytest.param(math.inf, marks=pytest.mark.deep)])
def test_what_is_no_number_stays_in_its_row(backend, device, divergence, poison):
    student, teacher = (logits_of(4, 40, device=device) for _ in range(2))
    clean = G.distillation_loss(student, teacher, divergence=divergence, reduction="none")
    for of in (student, teacher):
        dirty = guarded(of)
        dirty[1, 37] = poison
        pair = (dirty, teacher) if of is student else (student, dirty)
        leaf = pair[0].clone().requires_grad_()
        losses = G.distillation_loss(leaf, pair[1], divergence=divergence, reduction="none")
        losses.sum().backward()
        assert losses[1].isnan() and leaf.grad[1].isnan().any()
        others = [0, 2, 3]
        assert torch.equal(losses[others], clean[others]) and leaf.grad[others].isfinite().all()
    hidden = torch.full_like(student, -math.inf)
    assert G.distillation_loss(hidden, teacher, divergence=divergence, reduction="none").isnan().all()


# --- Rows that do not count -------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("name", ["forward_kl", "jsd, T 0.7, mixed"])
def test_ignored_rows_are_nothing_whatever_they_hold(backend, device, name):
    student, teacher = (logits_of(5, 40, device=device) for _ in range(2))
    target = target_of(5, classes=40, device=device)
    assert (target == -100).tolist() == [False, True, False, False, True]
    student[1], teacher[4] = math.nan, math.inf
    leaf = student.clone().requires_grad_()
    losses = G.distillation_loss(leaf, teacher, target, reduction="none", **OPTIONS[name])
    losses.sum().backward()
    assert losses[[1, 4]].tolist() == [0.0, 0.0] and not leaf.grad[[1, 4]].any()
    rest = [0, 2, 3]
    of_rest = G.distillation_loss(leaf[rest], teacher[rest], target[rest], **OPTIONS[name])
    mean = G.distillation_loss(leaf, teacher, target, **OPTIONS[name])
    torch.testing.assert_close(mean, of_rest)
    target[:] = 7
    same = G.distillation_loss(leaf, teacher, target, ignore_index=7, reduction="sum", **OPTIONS[name])
    assert same.item() == 0.0
    assert G.distillation_loss(leaf, teacher, target, ignore_index=7, **OPTIONS[name]).isnan()


@on_every_backend
@pytest.mark.parametrize("padding", [(math.nan, -1), (99.0, 0), (0.0, 2**40)], ids=["nan", "twice", "far"])
def test_what_is_stored_of_ignored_rows_is_padding(backend, device, padding):
    student, teacher = (logits_of(5, 40, device=device) for _ in range(2))
    target = target_of(5, classes=40, device=device)
    clean = top_of(teacher, 4)
    padded = tuple(torch.where((target == -100)[:, None], held, one) for held, one in zip(padding, clean))
    hidden, weight, _ = linear_of(5, width=3, classes=40, device=device)
    options = dict(divergence="reverse_kl", mix=0.5)
    for loss, leaf in (
        (lambda leaf, top: G.distillation_loss(leaf, None, target, teacher_top=top, **options), student),
        (lambda leaf, top: G.linear_distillation_loss(leaf, weight, target=target, teacher_top=top, **options), hidden),
    ):
        found = []
        for top in (clean, padded):
            given = leaf.clone().requires_grad_()
            value = loss(given, top)
            found.append((value, *torch.autograd.grad(value, given)))
        assert all(torch.equal(*pair) for pair in zip(*found))
        # Of rows that count it is refused as ever, or said on a GPU by what comes out.
        if device == "cpu":
            with pytest.raises((IndexError, ValueError)):
                loss(leaf, tuple(torch.where((target != -100)[:, None], h, one) for h, one in zip(padding, clean)))


@on_every_backend
def test_no_rows(backend, device):
    student, teacher = (logits_of(2, 0, 7, device=device) for _ in range(2))
    leaf = student.requires_grad_()
    assert G.distillation_loss(leaf, teacher, reduction="none").shape == (2, 0)
    assert G.distillation_loss(leaf, teacher).isnan()
    G.distillation_loss(leaf, teacher, reduction="sum").backward()
    assert leaf.grad.shape == (2, 0, 7)
    hidden, weight, _ = linear_of(0, width=3, classes=7, device=device)
    weight.requires_grad_()
    G.linear_distillation_loss(
        hidden, weight, teacher_logits=logits_of(0, 7, device=device), reduction="sum"
    ).backward()
    assert weight.grad.shape == (7, 3) and not weight.grad.any()


# --- Sizes of numbers -------------------------------------------------------------------------------------------------


@on_every_backend
@some_options
def test_logits_far_from_zero(backend, device, name):
    # The logarithms of the sums would have lost the digits that the maxima keep.
    student, teacher = logits_of(4, 37, device=device) + 5000, logits_of(4, 37, device=device) - 3000
    check_logits(student, teacher, target_of(4, classes=37, device=device), reduction="none", **OPTIONS[name])


@on_every_backend
@divergences
def test_models_that_are_nearly_equal(backend, device, divergence):
    teacher = logits_of(5, 37, device=device)
    check_logits(teacher.clone(), teacher, divergence=divergence)
    leaf = (teacher + 1e-3 * torch.randn_like(teacher)).requires_grad_()
    check_logits(leaf.detach(), teacher, divergence=divergence, reduction="none")
    # The gradient is of the size of the difference: as many digits as that has.
    G.distillation_loss(leaf, teacher, divergence=divergence, reduction="sum").backward()
    exact = leaf.detach().double().requires_grad_()
    with gptkern.backend("torch"):
        G.distillation_loss(exact, teacher.double(), divergence=divergence, reduction="sum").backward()
    worst = (leaf.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert worst < 2e-3, worst


@on_every_backend
def test_likely_and_unlikely_classes(backend, device):
    student, teacher = (logits_of(5, 37, device=device, spread=12.0) for _ in range(2))
    for options in OPTIONS.values():
        check_logits(student, teacher, target_of(5, classes=37, device=device), **options)


@on_every_backend
def test_beta_goes_to_both_divergences(backend, device):
    student, teacher = (logits_of(5, 37, device=device) for _ in range(2))
    forward, reverse = (G.distillation_loss(student, teacher, divergence=name) for name in ("forward_kl", "reverse_kl"))
    near_0, near_1 = (G.distillation_loss(student, teacher, divergence="jsd", beta=beta) for beta in (1e-4, 1 - 1e-4))
    torch.testing.assert_close(near_0 / 1e-4, forward, rtol=2e-2, atol=0)
    torch.testing.assert_close(near_1 / 1e-4, reverse, rtol=2e-2, atol=0)
    assert not torch.isclose(forward, reverse, rtol=0.05)


@on_every_backend
def test_a_high_temperature_keeps_its_gradients_size(backend, device):
    # Hinton et al., section 2.1: at a high temperature T² * KL is the squared difference of the centred logits / 2V.
    student, teacher = (logits_of(3, 37, device=device) for _ in range(2))
    leaf = student.requires_grad_()
    G.distillation_loss(leaf, teacher, temperature=1e3, reduction="sum").backward()
    difference = leaf.detach() - teacher
    expected = (difference - difference.mean(1, keepdim=True)) / 37
    torch.testing.assert_close(leaf.grad, expected, rtol=2e-2, atol=2e-3)


# --- The likeliest classes --------------------------------------------------------------------------------------------


@on_every_backend
@divergences
def test_stored_in_16_bits_their_sum_may_be_above_1(backend, device, divergence):
    student, teacher = (logits_of(5, 37, device=device, spread=6.0) for _ in range(2))
    log_probabilities, indices = top_of(teacher, 6)
    log_probabilities = (log_probabilities + 0.02).bfloat16()
    assert (log_probabilities.float().exp().sum(1) > 1).any()
    top = log_probabilities, indices
    losses = G.distillation_loss(student, teacher_top=top, divergence=divergence, reduction="none")
    whole = G.distillation_loss(student, teacher, divergence=divergence, reduction="none")
    assert losses.isfinite().all() and (losses > 0).all()
    torch.testing.assert_close(losses, whole, rtol=0.5, atol=0.05)


@on_every_backend
@divergences
def test_the_likeliest_classes_are_at_most_the_whole(backend, device, divergence):
    student, teacher = (logits_of(5, 37, device=device) for _ in range(2))
    whole = G.distillation_loss(student, teacher, divergence=divergence, reduction="none")
    before = torch.zeros_like(whole)
    for n in (1, 4, 12, 37):
        losses = G.distillation_loss(student, teacher_top=top_of(teacher, n), divergence=divergence, reduction="none")
        assert (losses >= before - 1e-5).all() and (losses <= whole + 1e-5).all()
        before = losses
    torch.testing.assert_close(before, whole, rtol=1e-4, atol=1e-5)


@on_every_backend
@divergences
def test_no_rest_where_both_models_hide_it(backend, device, divergence):
    student, teacher = (logits_of(4, 40, device=device) for _ in range(2))
    for logits in (student, teacher):
        logits[:, 5:30] = -math.inf
    top = top_of(teacher, 15)
    whole = G.distillation_loss(student, teacher, divergence=divergence, reduction="none")
    leaf = student.clone().requires_grad_()
    stored = G.distillation_loss(leaf, teacher_top=top, divergence=divergence, reduction="none")
    torch.testing.assert_close(stored, whole, rtol=1e-4, atol=1e-5)
    stored.sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[:, 5:30].any()


@on_every_backend
def test_an_unlikely_rest_keeps_its_digits(backend, device):
    # Of the student's 1e-9 nothing would be left of 1 minus the others.
    student = logits_of(3, 40, device=device, spread=0.5)
    teacher = logits_of(3, 40, device=device, spread=0.5)
    student[:, 4:] -= 20
    top = torch.log_softmax(teacher, 1)[:, :4].contiguous(), torch.arange(4, device=device).expand(3, 4)
    for name in AT_TEMPERATURE_1:
        target = torch.tensor([1, 30, -100], device=device)
        check_logits(student, None, target, teacher_top=top, reduction="none", **OPTIONS[name])


# --- Finite differences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_the_launchers_by_finite_differences(device, name):
    terms = distillation.Terms(
        *(dict(divergence="forward_kl", beta=0.5, temperature=1.0, mix=0.0) | OPTIONS[name]).values()
    )
    student, teacher = (logits_of(3, 5, device=device).double() for _ in range(2))
    target = torch.tensor([1, -100, 4], device=device)
    leaf = student.requires_grad_()

    def whole(s):
        return DistillationLossFunction.apply(s, teacher, None, None, target, *terms, -100, "torch")

    assert torch.autograd.gradcheck(whole, [leaf])
    if terms.temperature == 1.0:
        top = torch.log_softmax(teacher, 1).topk(2)
        stored = lambda s: DistillationLossFunction.apply(s, None, *top, target, *terms, -100, "torch")  # noqa: E731
        assert torch.autograd.gradcheck(stored, [leaf])
    hidden, weight, bias = (x.double().requires_grad_() for x in linear_of(3, width=2, classes=5, device=device))

    def linear(x, w, b):
        return LinearDistillationLossFunction.apply(
            x, w, b, None, None, None, teacher, None, None, target, *terms, -100, "torch"
        )

    assert torch.autograd.gradcheck(linear, [hidden, weight, bias])


@on_every_backend
def test_twice_the_same_bits(backend, device):
    student = linear_of(9, width=5, classes=37, device=device)
    top = top_of(logits_of(9, 37, device=device), 7)
    found = []
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in student]
        loss = G.linear_distillation_loss(*leaves[:2], student_bias=leaves[2], teacher_top=top)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*found))


def test_check_linear_needs_only_what_is_asked(device):
    student = linear_of(9, width=5, classes=37, device=device)
    teacher = linear_of(9, width=8, classes=37, device=device)
    for need in ((True, False, False), (False, True, False), (False, False, True)):
        check_linear(student, teacher, need=need)
