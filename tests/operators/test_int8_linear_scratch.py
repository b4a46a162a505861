"""int8_linear on a CPU widens its weight into memory that the next call writes again: nobody may have kept it."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import TorchFunctionMode

import gptkern.functional as G
from gptkern.operators.int8_linear import products

MODES = pytest.mark.parametrize("mode", ["w8a8", "w8a16"])


@pytest.fixture(autouse=True)
def widened(monkeypatch):
    """Every product takes the widened weight, and the thread's memory is made anew."""
    floats = products.Trial(products.FLOATS, products.FLOATS, "for the test")
    monkeypatch.setattr(products, "integer_trial", lambda: floats)
    monkeypatch.setattr(products, "_scratch", products._Scratch())


def a_weight(terms: int = 100):
    return torch.randint(-128, 128, (64, terms), dtype=torch.int8), torch.rand(64)


@MODES
@pytest.mark.parametrize("made_in_inference", [False, True])
def test_a_tangents_gradient_outlives_the_next_call(mode, made_in_inference):
    weight, scale = a_weight()
    with torch.inference_mode(made_in_inference):
        G.int8_linear(torch.randn(5, 100), weight, scale, mode="w8a16")
    tangent = torch.randn(5, 100, requires_grad=True)
    with forward_ad.dual_level():
        output = G.int8_linear(forward_ad.make_dual(torch.randn(5, 100), tangent), weight, scale, mode=mode)
        total = forward_ad.unpack_dual(output).tangent.sum()
        G.int8_linear(torch.randn(5, 90), *a_weight(90), mode="w8a16")
        (gradient,) = torch.autograd.grad(total, tangent)
    torch.testing.assert_close(gradient, (scale[:, None] * weight.float()).sum(0).expand(5, -1), rtol=1e-4, atol=1e-2)


@MODES
def test_what_a_mode_has_recorded_stays(mode):
    recorded = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") in ("matmul", "linear", "mm", "addmm"):
                recorded.append((function, args, kwargs or {}, result.clone()))
            return result

    with Recorder():
        for _ in range(2):
            G.int8_linear(torch.randn(5, 100), *a_weight(), mode=mode)
    assert len(recorded) >= 2
    for function, args, kwargs, result in recorded:
        assert torch.equal(function(*args, **kwargs), result)
