"""Hooks keep what is saved for a backward as they like (on the CPU, compressed, transposed): every stride is right."""

from __future__ import annotations

import pytest
import torch
from checking import same_bits

import gptkern.functional as G
from gptkern.backends import dispatch


def normal(*shape, dtype=torch.float16):
    return torch.randn(shape).to(dtype)


HEADS = (1, 2, 24, 16)
MASK = torch.randn(24, 24)
SCALED = torch.rand(24) + 0.01

# name -> (call, its inputs; None for the angles)
CALLS = {
    "layer_norm": (lambda x, w, b: G.layer_norm(x, (24,), w, b), [(5, 24), (24,), (24,)]),
    "layer_norm residual": (lambda x, r, w: G.layer_norm(x, (24,), w, residual=r)[0], [(5, 24), (5, 24), (24,)]),
    "rms_norm": (lambda x, w: G.rms_norm(x, (24,), w), [(5, 24), (24,)]),
    "softmax": (lambda x: G.softmax(x, -1), [(5, 24)]),
    "gelu": (lambda x, b: G.gelu(x, bias=b), [(5, 24), (24,)]),
    "swiglu": (G.swiglu, [(5, 24), (5, 24)]),
    "geglu packed": (G.geglu, [(5, 24)]),
    "linear": (
        lambda x, w, b: G.linear(x.float(), w.float(), b.float(), activation="gelu"), [(5, 24), (16, 24), (16,)],
    ),
    "rotary": (lambda x, angles: G.rotary_embedding(x, angles.cos(), angles.sin()), [HEADS, None]),
    "attention": (lambda q, k, v: G.scaled_dot_product_attention(q, k, v, is_causal=True), [HEADS] * 3),
    "attention bool mask": (
        lambda q, k, v: G.scaled_dot_product_attention(q, k, v, attn_mask=MASK.to(q.device) > 0), [HEADS] * 3,
    ),
    "attention additive mask": (
        lambda q, k, v: G.scaled_dot_product_attention(q, k, v, attn_mask=MASK.to(q)), [HEADS] * 3,
    ),
    "attention dropout": (lambda q, k, v: G.scaled_dot_product_attention(q, k, v, dropout_p=0.5), [HEADS] * 3),
    "int8_linear": (
        lambda x, b: G.int8_linear(
            x, (MASK * 40).to(x.device, torch.int8), SCALED.to(x.device), b, activation="gelu"
        ),
        [(5, 24), (24,)],
    ),
}  # fmt: skip
# Each keeps a copy of the same values that lies otherwise in memory.
LAYOUTS = {
    "every other element": lambda saved: torch.stack([saved, saved.clone().fill_(1)], -1)[..., 0],
    "one element on": lambda saved: torch.cat([saved.flatten()[:1], saved.flatten()])[1:].view(saved.shape),
    "transposed": lambda saved: saved.mT.contiguous().mT if saved.dim() > 1 else saved,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_saved_tensors_may_come_back_in_another_layout(kernel_backend, device, name, layout):
    call, shapes = CALLS[name]
    if name.startswith("attention ") and kernel_backend == "cuda":
        with pytest.raises(dispatch.BackendError):
            call(*(normal(*shape).to(device) for shape in shapes))
        return
    angles = torch.rand(24, 8, device=device)
    inputs = [angles if shape is None else normal(*shape).to(device).requires_grad_() for shape in shapes]
    leaves = [tensor for tensor in inputs if tensor.requires_grad]

    def gradients():
        torch.manual_seed(1)
        output = call(*inputs)
        return torch.autograd.grad(output, leaves, torch.ones_like(output) * output.detach())

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(LAYOUTS[layout], lambda kept: kept):
        found = gradients()
    for index, (one, other) in enumerate(zip(found, expected)):
        same_bits(f"gradient {index}", one, other)
