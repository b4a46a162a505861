"""The reference GPT in float64, written out with matrices: what likelihoods are held against."""

from __future__ import annotations

import math

import torch

from gptkern.models.gpt import GPT


@torch.no_grad()
def features(model: GPT, ids) -> torch.Tensor:
    """(length, width) of one row of ids, what the output's weight is multiplied with."""
    named = {name: parameter.double() for name, parameter in model.named_parameters()}
    heads, ids = model.config.heads, torch.as_tensor(ids)
    length = len(ids)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * named[f"{name}.weight"] + named[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ named[f"{name}.weight"].T + named[f"{name}.bias"]

    hidden = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)
    x = named["token_embedding.weight"][ids] + named["position_embedding.weight"][:length]
    for block in range(model.config.layers):
        at = f"blocks.{block}"
        query, key, value = linear(norm(x, f"{at}.attention_norm"), f"{at}.attention.qkv").chunk(3, -1)
        mixed = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1)):
            scores = (q @ k.T / math.sqrt(q.shape[-1]) + hidden).exp()
            mixed.append(scores / scores.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(mixed, -1), f"{at}.attention.project")
        y = linear(norm(x, f"{at}.perceptron_norm"), f"{at}.perceptron.expand")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, f"{at}.perceptron.project")
    return norm(x, "final_norm")


@torch.no_grad()
def log_probabilities(model: GPT, ids) -> torch.Tensor:
    """(length, vocab_size) of one row of ids, each of the token that follows its place."""
    logits = features(model, ids) @ model.token_embedding.weight.double().T
    return logits - logits.exp().sum(-1, keepdim=True).log()


def nats(model: GPT, prompt, continuation) -> float:
    """-log p of a continuation behind a prompt."""
    found = log_probabilities(model, [*prompt, *continuation][:-1])
    return -sum(float(found[len(prompt) - 1 + place, token]) for place, token in enumerate(continuation))
