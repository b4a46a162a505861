"""Models whose attention, masks or code are the user's own: what they compute is what they computed before the swap."""

from __future__ import annotations

import contextlib
import itertools
import sys
import types

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from test_models import calls_in
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import gptkern
import gptkern.integrations.transformers

IDS = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[1, :3] = 0
NUMBERS = itertools.count()


@pytest.fixture
def file():
    """Makes a Python module of a source text."""
    names = []

    def make(source, name=None):
        names.append(name or f"kept_{next(NUMBERS)}")
        module = sys.modules[names[-1]] = types.ModuleType(names[-1])
        exec(source, vars(module))
        return module

    yield make
    for name in names:
        del sys.modules[name]


def llama(implementation="sdpa", layer=None, attention=None):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for each in model.model.layers:
        each.__class__ = layer or type(each)
        each.self_attn.__class__ = attention or type(each.self_attn)
    return model


@torch.no_grad()
def logits(model, mask=PADDED):
    return model(IDS, attention_mask=mask, use_cache=False).logits


def reasons(model):
    with pytest.raises(RuntimeError, match="strict"):
        gptkern.swap(model, ops=["attention"], strict=True)
    report = gptkern.swap(model, ops=["attention"])
    assert not report.replaced
    return {skipped.reason for skipped in report.skipped}


def assert_kept(model, monkeypatch, routed):
    """The model gives what it gave, for padded rows and others; its attention runs on gptkern where it is to."""
    masks = PADDED, None
    expected = [logits(model, mask) for mask in masks]
    gptkern.swap(model, ops=["attention"], strict=routed)
    for mask, before in zip(masks, expected):
        torch.testing.assert_close(logits(model, mask), before, rtol=1e-4, atol=1e-4)
    assert calls_in(monkeypatch, lambda: logits(model)) == 2 * routed
    gptkern.unswap(model)
    assert all(torch.equal(logits(model, mask), before) for mask, before in zip(masks, expected))


# --- Another function under the name ----------------------------------------------------------------------------------


def doubled(*args, **kwargs):
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return 2 * output, weights


def without_the_first(*args, **kwargs):
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False}).clone()
    mask[..., 1:, 0] = False
    return mask


@contextlib.contextmanager
def registered(interface, function):
    before = interface._global_mapping["sdpa"]
    interface.register("sdpa", function)
    try:
        yield
    finally:
        interface.register("sdpa", before)


@contextlib.contextmanager
def set_on(table, function, name="sdpa"):
    table[name] = function
    try:
        yield
    finally:
        del table[name]


OTHERS = {
    "registered": lambda: registered(AttentionInterface, doubled),
    "set on the table": lambda: set_on(ALL_ATTENTION_FUNCTIONS, doubled),
    "masks registered": lambda: registered(AttentionMaskInterface, without_the_first),
    "masks set on the table": lambda: set_on(ALL_MASK_ATTENTION_FUNCTIONS, without_the_first),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_function_under_sdpa_is_kept(other, monkeypatch):
    with other():
        assert_kept(llama(), monkeypatch, routed=False)
        [reason] = reasons(llama())
        assert '"sdpa"' in reason and ("doubled" in reason or "without_the_first" in reason)


def test_another_function_under_eager_is_kept(monkeypatch):
    with set_on(ALL_ATTENTION_FUNCTIONS, doubled, "eager"):
        assert_kept(llama("eager"), monkeypatch, routed=False)


ASKS = """
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
class Layer(LlamaDecoderLayer):
    def forward(self, x, **kwargs):
        return super().forward(x / 2 if self.self_attn.config._attn_implementation == "sdpa" else x, **kwargs)
"""


def test_what_is_registered_after_a_swap_counts_where_the_name_stays(file, monkeypatch):
    model, layer = llama(), file(ASKS).Layer
    swapped = llama(layer=layer)
    gptkern.swap(swapped, ops=["attention"], strict=True)
    with registered(AttentionInterface, doubled):
        torch.testing.assert_close(logits(swapped), logits(llama(layer=layer)))
    assert calls_in(monkeypatch, lambda: logits(swapped)) == 2 and calls_in(monkeypatch, lambda: logits(model)) == 0


# --- Another function as eager's --------------------------------------------------------------------------------------

EAGER = """
import torch
from transformers.models.llama.modeling_llama import (
    LlamaAttention, ALL_ATTENTION_FUNCTIONS, apply_rotary_pos_emb, repeat_kv,
)
def {signature}:
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    scores = query @ key.mT * scaling
    {body}
    return (weights @ value).transpose(1, 2).contiguous(), weights

class Attention(LlamaAttention):
    slope = 0.3
    def forward(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
        x = hidden_states
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        found = ALL_ATTENTION_FUNCTIONS.get_interface({looked_up})
        output, weights = found(self, q, k, v, attention_mask, scaling=self.scaling{given})
        return self.o_proj(output.reshape(*x.shape[:-1], -1)), weights
"""
SIGNATURE = "attend(module, query, key, value, mask, scaling, dropout=0.0, **kwargs)"
LOOKED_UP = "self.config._attn_implementation, attend"
PLAIN = "weights = (scores + mask).softmax(-1)"
DISTANCE = "(torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2])[:, None])"
OWN_EAGER = {
    "off by one": "scores = torch.cat([scores + mask, scores.new_zeros(*scores.shape[:-1], 1)], -1); "
    "weights = scores.softmax(-1)[..., :-1]",
    "biased by distance": f"weights = (scores + mask - module.slope * {DISTANCE}.abs()).softmax(-1)",
    "capped": "weights = ((scores / 0.5).tanh() * 0.5 + mask).softmax(-1)",
    "another scale": "weights = (scores * 1.5 + mask).softmax(-1)",
    "sigmoid": "weights = (scores + mask).sigmoid()",
    "causal by itself": "weights = (scores + mask * 0).softmax(-1)",
    "a window": f"weights = (scores + mask).masked_fill({DISTANCE} < -9, -1e9).softmax(-1)",
}


def own_eager(file, body, signature=SIGNATURE, looked_up=LOOKED_UP, given=""):
    source = EAGER.replace("{signature}", signature).replace("{body}", body)
    return file(source.replace("{looked_up}", looked_up).replace("{given}", given)).Attention


@pytest.mark.parametrize("body", OWN_EAGER.values(), ids=OWN_EAGER)
def test_an_eager_function_that_is_not_plain_is_kept(body, file, monkeypatch):
    attention = own_eager(file, body)
    assert_kept(llama("eager", attention=attention), monkeypatch, routed=False)
    assert reasons(llama("eager", attention=attention)) == {
        'attend, its "eager", is not known to be softmax(query key^T scaling + mask) value'
    }


def test_arguments_of_its_own_are_not_ignored(file, monkeypatch):
    body = "weights = (scores + mask + {}).softmax(-1)"
    named = SIGNATURE.replace("**", "bias=0.0, **")
    for text, signature in ((body.format("bias"), named), (body.format("kwargs.get('bias', 0.0)"), SIGNATURE)):
        given = ", bias=torch.arange(x.shape[1]) / 2"
        assert_kept(llama("eager", attention=own_eager(file, text, signature, given=given)), monkeypatch, routed=False)


def test_a_default_that_cannot_be_read_is_kept(file, monkeypatch):
    for looked_up in ("self.config._attn_implementation, (lambda *args, **kw: attend(*args, **kw))",
                      "default=attend, attn_implementation=self.config._attn_implementation"):  # fmt: skip
        assert_kept(llama("eager", attention=own_eager(file, PLAIN, looked_up=looked_up)), monkeypatch, routed=False)


@pytest.mark.parametrize("looked_up", [LOOKED_UP, "self.config._attn_implementation, default=attend"])
def test_a_plain_eager_function_is_replaced(looked_up, file, monkeypatch):
    assert_kept(llama("eager", attention=own_eager(file, PLAIN, looked_up=looked_up)), monkeypatch, routed=True)


def test_a_patched_global_is_kept(file, monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", doubled)
    assert_kept(llama("eager"), monkeypatch, routed=False)


# --- eager's additive masks -------------------------------------------------------------------------------------------

LAYER = """
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
class Layer(LlamaDecoderLayer):
    def forward(self, x, attention_mask=None, **kwargs):
        mask = attention_mask
        {body}
        return super().forward(x, attention_mask=mask, **kwargs)
"""
OWN_MASKS = {
    "a bias": "mask = mask + torch.arange(x.shape[1]).float()",
    "a part set": "mask = mask.clone(); mask[..., 0] = 0.0",
    "its dtype": "x = x / 2 if mask.dtype.is_floating_point else x",
    "none, not causal": "mask = None",
    "compared": "mask = torch.where(mask < 0, -1e9, 0.5 * torch.ones_like(mask))",
}


@pytest.mark.parametrize("body", OWN_MASKS.values(), ids=OWN_MASKS)
def test_code_that_computes_with_eager_s_masks_gets_them(body, file, monkeypatch):
    assert_kept(llama("eager", layer=file(LAYER.replace("{body}", body)).Layer), monkeypatch, routed=True)


def test_a_hook_that_computes_with_eager_s_masks_gets_them(monkeypatch):
    model = llama("eager")

    def biased(module, args, kwargs):
        return args, {**kwargs, "attention_mask": kwargs["attention_mask"] + torch.arange(10).float()}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(biased, with_kwargs=True)
    assert_kept(model, monkeypatch, routed=True)


def test_a_layer_by_itself_is_not_causal_as_eager():
    layers = llama("eager").model.layers
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    positions = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    with torch.no_grad():
        expected = layers[0](x, position_embeddings=positions)
        gptkern.swap(layers, ops=["attention"], strict=True)
        torch.testing.assert_close(layers[0](x, position_embeddings=positions), expected)


def test_transformers_own_eager_models_get_masks_of_sdpa():
    model = llama("eager")
    gptkern.swap(model, ops=["attention"], strict=True)
    assert model.config._attn_implementation == "gptkern"


# --- Built by the name "gptkern" --------------------------------------------------------------------------------------

BUILT = {
    "a layer": (ASKS, lambda module: llama("gptkern", module.Layer)),
    "a model": (
        """
from transformers import LlamaForCausalLM
class Model(LlamaForCausalLM):
    def forward(self, ids, **kwargs):
        return super().forward(ids.flip(1) if self.config._attn_implementation == "sdpa" else ids, **kwargs)
""",
        lambda module: as_class(llama("gptkern"), module.Model),
    ),
    "a wrapper": (
        """
from torch import nn
class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, *args, **kwargs):
        kwargs["use_cache"] = self.model.config._attn_implementation == "sdpa"
        return self.model(*args, **kwargs)
""",
        lambda module: module.Wrapper(llama("gptkern")),
    ),
    "a hook": (
        """
def hook(module, args):
    return args if module.config._attn_implementation == "sdpa" else None
""",
        lambda module: with_hook(llama("gptkern"), module.hook),
    ),
    "construction": (
        """
from transformers import LlamaForCausalLM
class Model(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.scale = 0.5 if config._attn_implementation == "sdpa" else 1.0
""",
        lambda module: module.Model(llama("gptkern").config).eval(),
    ),
}


def as_class(model, cls):
    model.__class__ = cls
    return model


def with_hook(model, hook):
    model.register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize(("source", "build"), BUILT.values(), ids=BUILT)
def test_built_by_the_name_all_of_the_model_is_read(source, build, file):
    logits(llama("gptkern"))  # Llama's own file is known
    model = build(file(source))
    for _ in range(2):
        with pytest.raises(ValueError, match='asks for the name of the attention; build it with "sdpa"'):
            logits(model)
    assert all("asks for the name" in reason for reason in reasons(model))


def test_a_name_that_is_set_later_counts(file):
    model = llama(layer=file(ASKS).Layer)
    logits(model)
    model.set_attn_implementation("gptkern")
    with pytest.raises(ValueError, match=r"Layer.forward .* asks for the name"):
        logits(model)
    model.set_attn_implementation("sdpa")
    assert logits(model).isfinite().all()


# --- Code that a model reaches in other ways --------------------------------------------------------------------------

HELPER = """
def scaled(config, x):
    return x / 2 if config._attn_implementation == "sdpa" else x
"""
REACHING = """
import sys, types, functools, importlib
import kept_package, kept_package.helper
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

FIELD, FIELDS = "_attn_implementation", ("_attn_implementation",)

class Registry:
    def __init__(self):
        self.functions = {"scaled": kept_package.helper.scaled}
REGISTRY, SPACE = Registry(), types.SimpleNamespace(scaled=kept_package.helper.scaled)
BOUND = functools.partial(lambda function, *args: function(*args), kept_package.helper.scaled)

class Layer(LlamaDecoderLayer):
    def forward(self, x, **kwargs):
        config = self.self_attn.config
        {body}
        return super().forward(x, **kwargs)
"""
REACHED = {
    "imported from, inside": "from kept_package.helper import scaled; x = scaled(config, x)",
    "imported as, inside": "import kept_package.helper as found; x = found.scaled(config, x)",
    "a module's module": "x = kept_package.helper.scaled(config, x)",
    "by importlib": 'x = importlib.import_module("kept_package.helper").scaled(config, x)',
    "getattr": 'x = getattr(kept_package.helper, "scaled")(config, x)',
    "a registry": 'x = REGISTRY.functions["scaled"](config, x)',
    "a namespace": "x = SPACE.scaled(config, x)",
    "a field in a global": 'x = x / 2 if getattr(config, FIELD) == "sdpa" else x',
    "fields in a global": 'x = x / 2 if any(getattr(config, field) == "sdpa" for field in FIELDS) else x',
    "an argument that is bound": "x = BOUND(config, x)",
}


@pytest.fixture
def package(file):
    found = file("", "kept_package")
    found.helper = file(HELPER, "kept_package.helper")


@pytest.mark.parametrize("body", REACHED.values(), ids=REACHED)
def test_code_that_is_reached_in_other_ways_asks(body, package, file, monkeypatch):
    assert_kept(llama(layer=file(REACHING.replace("{body}", body)).Layer), monkeypatch, routed=True)


HOOKS = """
class Halving:
    def __init__(self, config):
        self.config, self.functions = config, {"ask": lambda: config._attn_implementation == "sdpa"}
    def asks(self):
        return self.config._attn_implementation == "sdpa"
    def by_a_method(self, module, args):
        return (args[0] / 2,) if self.asks() else None
    def by_what_it_holds(self, module, args):
        return (args[0] / 2,) if self.functions["ask"]() else None
    __call__ = by_a_method
"""


@pytest.mark.parametrize("hook", ["by_a_method", "by_what_it_holds", "__call__"])
def test_hooks_of_objects_ask(hook, file, monkeypatch):
    model = llama()
    helper = file(HOOKS).Halving(model.config)
    for layer in model.model.layers:
        layer.self_attn.config = helper.config = model.config
        layer.mlp.register_forward_pre_hook(helper if hook == "__call__" else getattr(helper, hook))
    gptkern.swap(model, ops=["attention"], strict=True)
    assert model.config._attn_implementation == "sdpa"
    assert calls_in(monkeypatch, lambda: logits(model)) == 2


def test_gpt2_s_question_is_gpt2_s_alone(file, monkeypatch):
    body = """using_eager = config._attn_implementation == "eager"
        if using_eager and getattr(self, "reorder_and_upcast_attn", False) or using_eager:
            self.reorder_and_upcast_attn = True
            x = x / 2"""
    layer = file(REACHING.replace("import kept_package, kept_package.helper\n", "")
                 .replace("kept_package.helper.scaled", "len").replace("{body}", body)).Layer  # fmt: skip
    assert_kept(llama("eager", layer=layer), monkeypatch, routed=True)
    assert_kept(llama("sdpa", layer=layer), monkeypatch, routed=True)
