"""The objective against its formula in float64."""

from __future__ import annotations

import pytest
import torch

from gptkern.training import losses


def formula(logits, targets, smoothing, z):
    """The sum, written out, of the targets that count."""
    logits = logits.double()
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).tolist()):
        if target != -100:
            lse = row.exp().sum().log()
            total += (1 - smoothing) * (lse - row[target]) + smoothing * (lse - row.mean()) + z * lse**2
    return total


def objective(logits, targets, smoothing, z):
    """The features are the logits: the product with the identity is exact."""
    return losses.objective(logits, torch.eye(logits.shape[-1], dtype=logits.dtype), targets, smoothing, z)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(4, 5, 7, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(0, 7, (4, 5), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z", [0.0, 0.02])
def test_the_objective_is_the_sum_of_its_formula(smoothing, z):
    logits, targets = inputs()
    targets[1], targets[0, 2] = -100, -100
    loss = objective(logits, targets, smoothing, z)
    expected = formula(logits, targets, smoothing, z)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_ignored_targets_count_for_nothing():
    logits, targets = inputs()
    whole = objective(logits, targets, 0.1, 0.02)
    parts = []
    for keep in (targets < 3, targets >= 3):
        part = objective(logits, targets.masked_fill(~keep, -100), 0.1, 0.02)
        (gradient,) = torch.autograd.grad(part, logits)
        assert not gradient[~keep].any()
        parts.append(part.item())
    assert sum(parts) == pytest.approx(whole.item(), rel=1e-6)
    assert objective(logits, torch.full_like(targets, -100), 0.1, 0.02).item() == 0.0


def test_sixteen_bits_are_summed_in_float32():
    logits, targets = inputs(torch.bfloat16)
    loss = objective(logits, targets, 0.1, 0.02)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(formula(logits, targets, 0.1, 0.02).item(), rel=1e-5)
