"""Every causal model of the installed transformers, tiny: swapped against stock, in all ways in which it is called."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import causal_models
from transformers import StaticCache

import gptkern
from gptkern.backends import dispatch

# Of the largest value: other operators than PyTorch's compute the same in float32.
TOLERANCE = 5e-5
ROWS, LENGTH, PADDED = 2, 12, 4


def batch():
    """ids and mask (ROWS, LENGTH), the first row padded on the left."""
    ids = torch.randint(3, causal_models.VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :PADDED] = 0
    return ids.masked_fill(mask == 0, 1), mask


def static_cache(model):
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=16)


def whole(model):
    return model(input_ids=batch()[0], use_cache=False).logits


def padded(model):
    ids, mask = batch()
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]


def in_pieces(model, ids, mask, cache, ends):
    pieces, start, given = [], 0, {} if cache is None else {"past_key_values": cache}
    for end in ends:
        whole_mask = None if mask is None else mask[:, :end]
        result = model(input_ids=ids[:, start:end], attention_mask=whole_mask, use_cache=True, **given)
        assert result.past_key_values is not None
        given, start = {"past_key_values": result.past_key_values}, end
        pieces.append(result.logits)
    return torch.cat(pieces, 1)


def cached(model):
    ids, mask = batch()
    return in_pieces(model, ids, mask, None, (7, 8, 9, LENGTH))[mask.bool()]


def cached_in_fixed_size(model):
    return in_pieces(model, batch()[0], None, static_cache(model), (7, 8, LENGTH))


def last_logits(model):
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    ids, mask = batch()
    return torch.cat([
        model(input_ids=ids, attention_mask=given, logits_to_keep=kept, use_cache=False).logits.flatten()
        for kept in (1, 3) for given in (None, mask)
    ])  # fmt: skip


def last_logits_in_fixed_size(model):
    assert "logits_to_keep" in inspect.signature(model.forward).parameters
    return torch.cat([
        model(input_ids=batch()[0], past_key_values=static_cache(model), logits_to_keep=kept).logits.flatten()
        for kept in (1, 3)
    ])  # fmt: skip


def gradients(model):
    ids, mask = batch()
    model.zero_grad()
    with torch.enable_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)) * mask[:, :, None]
        (logits * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


ALWAYS = (whole, padded)
# A model need not know these: what raises in the stock model is left out, and has to be the exception.
WAYS = (*ALWAYS, cached, cached_in_fixed_size, last_logits, last_logits_in_fixed_size, gradients)


def outcomes(model):
    found = {}
    with torch.no_grad():
        for way in WAYS:
            try:
                found[way] = way(model)
            except Exception:
                if way in ALWAYS:
                    raise
                found[way] = None
    return found


@pytest.mark.deep
@pytest.mark.parametrize("kind", causal_models.names())
def test_swapped_against_stock(kind):
    if kind in causal_models.CANNOT_BE_BUILT:
        pytest.skip(f"{kind} cannot be built tiny: {causal_models.CANNOT_BE_BUILT[kind]}")
    model = causal_models.build(kind)
    expected = outcomes(model)
    report = gptkern.swap(model)
    # No model that comes as PyTorch's attention is left alone for what its code asks.
    assert not any("asks for the name" in entry.reason for entry in report.skipped)
    attends = any("attention" in entry.operator for entry in report.replaced)
    # A composite model's text needs none of its other parts.
    chosen = set()
    with dispatch.telling(lambda choice: chosen.add(choice.backend)):
        whole(model)
    assert chosen or not attends
    actual = outcomes(model)
    for way, wanted in expected.items():
        assert (actual[way] is None) == (wanted is None), way.__name__
        if wanted is not None:
            error = (actual[way] - wanted).abs().max() / wanted.abs().max()
            assert error < TOLERANCE, f"{way.__name__}: {error:.1e}"


@pytest.mark.deep
def test_most_models_are_called_in_each_way():
    """What the sweep leaves out is the exception: a sample of what it holds, in each way."""
    for kind in ("gpt2", "llama", "gemma4_text", "deepseek_v32", "qwen3", "mixtral", "opt", "bert"):
        found = outcomes(causal_models.build(kind))
        assert all(value is not None for value in found.values()), (kind, found)
