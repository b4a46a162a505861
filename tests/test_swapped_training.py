"""A swapped GPT computes, trains and compiles as the stock one does, on each backend."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from swapped_models import batch, gpt

import gptkern


def train(model, steps, learning_rate=1e-2):
    """The losses of some AdamW steps on arithmetic progressions, each batch its own."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(3)
    losses = []
    device = model.final_norm.weight.device
    for _ in range(steps):
        start, step = (
            torch.randint(0, 61, (2, 1), generator=generator),
            torch.randint(1, 4, (2, 1), generator=generator),
        )
        ids = ((start + step * torch.arange(13)) % 61).to(device)
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def without_cuda(*marks):
    """On PyTorch and on Triton: the model's attention is in float32, which the CUDA kernels leave to Triton."""
    missing = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
    return pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=[missing, *marks])], indirect=True)


@without_cuda()
def test_a_swapped_model_agrees(backend, device):
    """Logits, loss and every parameter's gradient, within float32's rounding through two layers."""
    stock, swapped = gpt().to(device), gpt().to(device)
    gptkern.swap(swapped)
    ids, targets = (part.to(device) for part in batch())
    results = []
    for model in (stock, swapped):
        logits, loss = model(ids, targets)
        loss.backward()
        results.append((logits, loss, {name: p.grad for name, p in model.named_parameters()}))
    (logits, loss, gradients), (other_logits, other_loss, other_gradients) = results
    torch.testing.assert_close(other_logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            other_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@without_cuda(pytest.mark.deep)
def test_a_training_curve_agrees(backend, device):
    """50 AdamW steps: the curves lie on top of each other, and fall."""
    tiny = dict(context=12, layers=1, heads=1)
    stock = train(gpt(**tiny).to(device), 50)
    model = gpt(**tiny).to(device)
    gptkern.swap(model)
    swapped = train(model, 50)
    assert stock[-1] < stock[0] - 0.5
    torch.testing.assert_close(swapped, stock, rtol=0, atol=2e-3)


@without_cuda()
def test_frozen_parameters_get_no_gradient(backend, device):
    model = gpt().to(device)
    model.blocks[0].attention_norm.weight.requires_grad_(False)
    gptkern.swap(model)
    ids, targets = (part.to(device) for part in batch(rows=1))
    model(ids, targets)[1].backward()
    assert model.blocks[0].attention_norm.weight.grad is None
    assert model.blocks[0].attention_norm.bias.grad is not None


@pytest.mark.deep
def test_compiles_without_a_graph_break(triton_backend, device):
    model = gpt(layers=1).to(device)
    gptkern.swap(model)
    ids, targets = (part.to(device) for part in batch(rows=1, length=8))
    expected = model(ids, targets)[1]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, targets)[1]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert model.final_norm.weight.grad is not None


def test_dropout_in_training_stays_dropout():
    model = gpt(dropout=0.5)
    gptkern.swap(model)
    ids, targets = batch()
    model.train()
    assert model(ids, targets)[1] != model(ids, targets)[1]
    model.eval()
    assert model(ids, targets)[1] == model(ids, targets)[1]
