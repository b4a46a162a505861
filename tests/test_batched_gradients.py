"""Gradients of many outputs at once (is_grads_batched), which autograd takes in batches from before torch.func."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

import gptkern
import gptkern.functional as G

WEIGHT = torch.randint(-127, 128, (16, 32), dtype=torch.int8)
CALLS = {
    "layer_norm": lambda x: G.layer_norm(x, (32,)),
    "rms_norm": lambda x: G.rms_norm(x, (32,)),
    "softmax": lambda x: G.softmax(x, -1),
    "int8_linear": lambda x: G.int8_linear(x, WEIGHT, torch.ones(16)),
    "attention": lambda x: G.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "gelu": lambda x: G.gelu(x, bias=torch.ones(32, dtype=x.dtype)),
    "swiglu": lambda x: G.swiglu(x),
    "rotary": lambda x: G.rotary_embedding(x[None, None], torch.ones(4, 16), torch.ones(4, 16)),
}


def batched_and_one_by_one(name, dtype):
    x = torch.randn(4, 32, dtype=dtype, requires_grad=True)
    y = CALLS[name](x)
    many = torch.randn(3, *y.shape, dtype=dtype)
    (batched,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    return batched, torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many])


@pytest.mark.skipif(DEVICE != "cpu", reason="the tensors are on the CPU")
@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_gradients_is_one_after_another(name, backend):
    torch.testing.assert_close(*batched_and_one_by_one(name, torch.float16 if backend == "cuda" else torch.float32))


@pytest.mark.parametrize("name", CALLS)
def test_on_the_plain_launchers(name):
    with gptkern.backend("torch:launchers"):
        torch.testing.assert_close(*batched_and_one_by_one(name, torch.float32))
