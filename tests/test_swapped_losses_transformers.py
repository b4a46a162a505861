"""swap(model, fused_loss=True) on transformers' causal models."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from sharp import sharp

pytest.importorskip("transformers", reason="transformers is not installed")

import causal_models
from test_swapped_losses import LOSS, assert_same, fused, reason, results, told_of

import gptkern

IDS = torch.randint(3, causal_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
LABELS = IDS.masked_fill(torch.arange(12) % 5 == 3, -100)

# A kind of head each, with numbers that show.
HEADS = {
    "llama": {},
    "gpt2": {},  # tied to the embedding
    "gemma2": {"final_logit_softcapping": 0.5},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
    "phi": {},  # with a bias
    "qwen2_moe": {"output_router_logits": True},  # another loss is added
}


def call(model, **keywords):
    return model(input_ids=IDS, use_cache=False, **keywords)


@pytest.mark.parametrize("kind", sharp(HEADS, "gpt2", "gemma2"))
def test_loss_and_gradients(kind):
    model = causal_models.build(kind, **HEADS[kind])
    ways = [
        {"labels": LABELS},
        {"labels": LABELS, "num_items_in_batch": 7},
        {"labels": LABELS, "num_items_in_batch": torch.tensor(7)},
        {"labels": LABELS, "shift_labels": IDS.flip(1)},
        {"labels": IDS, "ignore_index": 5},
    ]
    expected = [results(model, input_ids=IDS, use_cache=False, **way) for way in ways]
    report = gptkern.swap(model, ops=[], fused_loss=True)
    assert fused(report) == ["(model)"]
    assert call(model, labels=LABELS).logits is None
    for way, wanted in zip(ways, expected):
        assert_same(results(model, input_ids=IDS, use_cache=False, **way), wanted)
    gptkern.unswap(model)
    assert call(model, labels=LABELS).logits is not None


def test_without_labels_nothing_changes():
    model = causal_models.build("llama")
    expected = call(model).logits
    gptkern.swap(model, ops=[], fused_loss=True)
    assert torch.equal(call(model).logits, expected)
    assert torch.equal(call(model, logits_to_keep=2).logits, expected[:, -2:])


def test_a_tuple_leaves_the_logits_out():
    model = causal_models.build("llama")
    expected = call(model, labels=LABELS, return_dict=False)
    gptkern.swap(model, ops=[], fused_loss=True)
    (loss,) = call(model, labels=LABELS, return_dict=False)
    torch.testing.assert_close(loss, expected[0], **LOSS)


def test_labels_of_other_positions_are_the_error_that_they_were():
    model = causal_models.build("llama")
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError) as raised:
            call(model, labels=LABELS, logits_to_keep=3)
        errors.append(raised.type)
        gptkern.swap(model, ops=[], fused_loss=True)
    assert errors[0] is errors[1]


def test_a_loss_function_of_ones_own_gets_its_logits():
    model = causal_models.build("llama")
    gptkern.swap(model, ops=[], fused_loss=True)
    shapes = []

    def loss_function(logits, labels, vocab_size, **kwargs):
        shapes.append(logits.shape)
        return logits.square().mean()

    model.loss_function = loss_function
    messages, _ = told_of(lambda: call(model, labels=LABELS).to_tuple()[:2])
    assert shapes == [(2, 12, causal_models.VOCABULARY)] and "its loss function is not transformers'" in messages[0]
    said = reason(gptkern.swap(causal_models.build("bert"), fused_loss=True))
    assert re.match(r"modeling_bert\.py:\d+: its cls is a BertOnlyMLMHead, not a torch\.nn\.Linear", said)


def test_a_loss_that_is_looked_up_is_named_where_it_is_asked_for():
    model = causal_models.build("llama")
    lines, first = inspect.getsourcelines(type(model).forward)
    line = first + next(at for at, text in enumerate(lines) if "self.loss_function(" in text)
    (entry,) = gptkern.swap(model, ops=["cross_entropy"]).skipped
    assert entry.name == "(model)"
    assert entry.reason.startswith(f"modeling_llama.py:{line}: its loss is self.loss_function, which is looked up")
    with pytest.raises(RuntimeError, match=r"its loss is self\.loss_function"):
        gptkern.swap(model, ops=["cross_entropy"], strict=True)
    assert gptkern.swap(model, ops=["cross_entropy"], fused_loss=True).skipped == []


@pytest.mark.deep
def test_compiles_without_a_graph_break():
    model = causal_models.build("llama")
    gptkern.swap(model, fused_loss=True)
    expected = call(model, labels=LABELS).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=IDS, labels=LABELS, use_cache=False).loss, expected, **LOSS)


# What these do between the head and the loss, or what their head is, is of their own.
LEFT_ALONE = {
    "bamba", "beam", "gemma4", "gemma4_unified", "inkling_text", "inkling2_text", "recurrent_gemma", "xlm", "xlstm",
}  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize("kind", causal_models.names())
def test_every_causal_model(kind):
    if kind in causal_models.CANNOT_BE_BUILT:
        pytest.skip(f"{kind} cannot be built tiny: {causal_models.CANNOT_BE_BUILT[kind]}")
    model = causal_models.build(kind)
    given = {"input_ids": IDS, "labels": LABELS, "use_cache": False}
    try:
        expected = results(model, **given)
    except Exception as error:
        pytest.skip(f"the stock model takes no loss so: {type(error).__name__}: {error}"[:200])
    report = gptkern.swap(model, ["nonlinearity"], fused_loss=True)
    reasons = [entry.reason for entry in report.skipped if "its loss" in entry.reason]
    assert bool(fused(report)) != bool(reasons)
    if "loss_function" in type(model).forward.__code__.co_names and kind not in LEFT_ALONE:
        assert fused(report) or "not a torch.nn.Linear" in reasons[0]
    loss, gradients = results(model, **given)
    torch.testing.assert_close(loss, expected[0], **LOSS)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        largest = expected[1][name].abs().max().item()
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-3, atol=1e-4 * largest + 1e-6)
