"""The numbers of a call, eps, scale and dropout_p, reach a kernel's launcher under torch.compile as they do eagerly.

Inductor may turn a Python float into a float64 tensor or a symbol of its own. The registered ops stand between: their
launchers get Python floats of the same bits, which Triton hands to a kernel as fp32.
"""

from __future__ import annotations

import importlib

import pytest
import torch

import gptkern
import gptkern.functional as F

pytestmark = pytest.mark.deep
jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed")

# operator -> (the call by its number, the fields of its record that are floats, the number)
CALLS = {
    "layer_norm": (lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps), ("eps",), 0.1),
    "rms_norm": (lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps), ("eps",), 0.1),
    "softmax": (lambda x, scale: F.softmax(x, -1, scale=scale), ("scale",), 0.3),
    "cross_entropy": (
        lambda x, z: F.cross_entropy(x, x[:, 0].long().clamp(0), label_smoothing=z, z_loss=z, softcap=z, logit_scale=z),
        ("label_smoothing", "z_loss", "softcap", "logit_scale"),
        0.1,
    ),
    "attention": (
        lambda x, p: F.scaled_dot_product_attention(x, x, x, dropout_p=p, scale=p / 3),
        ("scale", "dropout_p"),
        0.1,
    ),
}


@pytest.fixture
def launched(monkeypatch):
    """What the launchers of an operator were called with, which then run."""

    def watch(operator):
        module, calls = importlib.import_module(f"gptkern.operators.{operator}.triton"), []
        forward = module.forward

        def seen(call):
            calls.append(call)
            return forward(call)

        monkeypatch.setattr(module, "forward", seen)
        return calls

    torch.compiler.reset()
    yield watch
    torch.compiler.reset()


@pytest.mark.parametrize("is_float_symbolic", [False, True])
@pytest.mark.parametrize("operator", CALLS)
def test_floats_reach_the_launcher_as_they_are(operator, is_float_symbolic, launched, device):
    x = torch.randn(2, 2, 16, 16, device=device)
    run, names, number = CALLS[operator]
    calls = launched(operator)
    with gptkern.backend("triton"), torch._dynamo.config.patch(specialize_float=not is_float_symbolic):
        run(x, number)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        # Twice: the second number is a symbol where floats are not specialised.
        for value in (number, number * 1.7):
            compiled(x, value)
        run(x, number * 1.7)
    eager, first, second, eager_second = calls
    for name in names:
        for one, other in ((eager, first), (eager_second, second)):
            assert type(getattr(other, name)) is float
            assert jit.mangle_type(getattr(other, name)) == "fp32"
            assert getattr(one, name) == getattr(other, name)
