"""Sums and norms in one call in models of transformers: which are known, in all ways in which they are called."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import causal_models
from residual_models import noted_calls
from sharp import deep, sharp
from test_causal_models import WAYS, batch

import gptkern
from gptkern.swapping import SWAPPABLE

APART = [operator for operator in SWAPPABLE if operator != "residual_norm"]
# Kind -> what is computed together with a sum, of how many norms of two blocks and the last one.
KNOWN = {
    "gpt2": ("layer_norm", 4, 5),
    "llama": ("rms_norm", 4, 5),
    "mistral": ("rms_norm", 4, 5),
    "qwen2": ("rms_norm", 4, 5),
    # The norms of query and key have no sum.
    "qwen3": ("rms_norm", 4, 9),
    "mixtral": ("rms_norm", 4, 5),
    "granite": ("rms_norm", 4, 5),
    # Its residual is parallel: two norms of one sum, of which the first is computed with it.
    "gpt_neox": ("layer_norm", 2, 5),
    "gpt_bigcode": ("layer_norm", 4, 5),
}
FAST = ("gpt2", "llama", "gpt_neox")
kinds = pytest.mark.parametrize("kind", sharp(KNOWN, *FAST))
one_kind = pytest.mark.parametrize("kind", sharp(KNOWN, "llama"))


@pytest.fixture(autouse=True)
def launchers():
    """Where PyTorch's own operators run, nothing is computed together."""
    with gptkern.backend("torch:launchers"):
        yield


def pair(kind, **changes):
    model = causal_models.build(kind, **changes)
    together, apart = copy.deepcopy(model), copy.deepcopy(model)
    gptkern.swap(together)
    gptkern.swap(apart, ops=APART)
    return together, apart


def fused(model, monkeypatch, **arguments) -> list[tuple[str, bool]]:
    ids, mask = batch()
    with gptkern.backend("triton"), noted_calls(monkeypatch) as found, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    return found


@pytest.mark.parametrize("kind", sharp(KNOWN, "llama", "gpt_neox"))
def test_what_is_computed_together(kind, monkeypatch):
    together, apart = pair(kind)
    name, count, norms = KNOWN[kind]
    for model, expected in ((together, count), (apart, 0)):
        found = fused(model, monkeypatch)
        assert len(found) == norms and found.count((name, True)) == expected


@one_kind
@pytest.mark.parametrize("way", [*WAYS[:3], *deep(*WAYS[3:])])
def test_all_ways_give_the_same(kind, way):
    together, apart = pair(kind)
    with torch.no_grad():
        assert torch.equal(way(together), way(apart))


@one_kind
def test_hidden_states_are_sums(kind, monkeypatch):
    together, apart = pair(kind)
    ids, mask = batch()
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            for model in (together, apart)
        )
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs):
        assert torch.equal(mine, other)
    # transformers' hooks stay on the blocks: what passes their borders is then computed apart.
    assert len([of for _, of in fused(together, monkeypatch) if of]) == (0 if kind == "gpt_neox" else 2)


class Saved:
    """How many bytes autograd keeps."""

    def __init__(self):
        self.bytes = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, lambda kept: kept)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def note(self, tensor):
        self.bytes += tensor.nbytes
        return tensor


@one_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind, reentrant):
    """As without the swap: the blocks are computed again, and keep nothing but their input in the meantime."""
    found = []
    for model in pair(kind, attention_dropout=0.0) if kind != "gpt2" else pair(kind):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for attention in model.modules():
            if isinstance(getattr(attention, "attn_dropout", None), float):
                attention.attn_dropout = 0.0
        kept = []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            torch.manual_seed(3)
            with Saved() as saved:
                loss = model(input_ids=batch()[0], labels=batch()[0], use_cache=False).loss
            kept.append(saved.bytes)
            loss.backward()
        found.append(([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], kept))
    (ours, our_bytes), (theirs, their_bytes) = found
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    assert our_bytes[1] < 0.6 * our_bytes[0] and our_bytes == their_bytes


@one_kind
def test_unswap_brings_the_classes_back(kind):
    model = causal_models.build(kind)
    classes = [type(module) for module in model.modules()]
    gptkern.swap(model)
    gptkern.unswap(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.deep
def test_a_model_is_compiled_in_one_graph():
    together, apart = pair("llama")
    graphs = []
    compiled = torch.compile(together, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    with torch.no_grad():
        ours, theirs = (model(input_ids=batch()[0], use_cache=False).logits for model in (compiled, apart))
    torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_norms_of_other_code_are_named():
    report = gptkern.swap(causal_models.build("gemma2"))
    assert ("model.layers.0", "pre_feedforward_layernorm of its sum is a Gemma2RMSNorm, which is left alone") in [
        (entry.name, entry.reason) for entry in report.skipped
    ]
    assert not any("residual_norm" in entry.operator for entry in report.replaced)
