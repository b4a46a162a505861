"""Small models that the tests of swap share, and a count of the operators' calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch
from gptkern.models import GPT, GPTConfig

SMALL = dict(vocab_size=61, context=24, layers=2, width=32, heads=2)


class CausalAttention(torch.nn.Module):
    """Attention through a method and a module alias, as people write it."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(8, 24)
        self.softmax = torch.nn.Softmax(dim=-1)

    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        query, key, value = (part.unsqueeze(1) for part in self.mix(x).split(8, dim=-1))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).squeeze(1)


class BiaslessNorm(torch.nn.Module):
    """A norm of the model's own, with the function called inline."""

    def __init__(self, width=8):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


def gpt(**changes):
    torch.manual_seed(1)
    return GPT(GPTConfig(**SMALL | changes))


def batch(rows=3, length=24):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 61, (rows, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def class_names(model):
    return {name: type(module) for name, module in model.named_modules()}


def calls_of_twins(monkeypatch, action):
    """How often each operator of gptkern is called while `action` runs."""
    counts = {}
    settled = dispatch.settled
    monkeypatch.setattr(dispatch, "settled", lambda tensor: counts.update(n=counts.get("n", 0) + 1) or settled(tensor))
    action()
    monkeypatch.setattr(dispatch, "settled", settled)
    return counts.get("n", 0)
