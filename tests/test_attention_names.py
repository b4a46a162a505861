"""Models whose own code asks for the name of their attention: what they do with the answer is the stock model's."""

from __future__ import annotations

import itertools
import pickle
import sys
import types

import pytest
import torch
from checking import Watched

pytest.importorskip("transformers", reason="transformers is not installed")

import causal_models
from test_models import calls_in
from transformers import StaticCache

import gptkern
import gptkern.integrations.transformers

MODEL = '''
import re, torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

SUPPORTED = ("eager", "sdpa")
WINDOWS = {"sdpa": 2, "eager": 2}

def eager_attention_forward(module, query, key, value, mask, **kwargs):
    scores = query @ key.transpose(2, 3) * module.scaling
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

class AskingConfig(PreTrainedConfig):
    model_type = "asking"

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.scaling, self.is_causal = config, 0.35, True
        self.mix = nn.Linear(16, 48)

    def asks(self):
        {question}

    def forward(self, x):
        rows, length, width = x.shape
        # (rows, length, 48) -> three of (rows, 2 heads, length, 8)
        query, key, value = self.mix(x).view(rows, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if self.asks():
            mask = mask & ~mask.tril(-2)
        attention = {lookup}
        return attention(self, query, key, value, mask, scaling=self.scaling)[0].reshape(rows, length, width)

class AskingModel(PreTrainedModel):
    config_class = AskingConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.attention = Attention(config)
        self.post_init()

    def forward(self, x):
        return self.attention(x)
'''  # fmt: skip
BY_INTERFACE = "ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)"
BY_SUBSCRIPT = "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]"
# What Python 3.10 and later know.
MATCH = """match self.config._attn_implementation:
            case "sdpa" | "eager":
                return True
        return False"""

RAISES = """if self.config is None:
            raise ValueError(f"no attention by {self.config._attn_implementation}")
        return False"""

# Each is true of "sdpa" and false of any other name.
QUESTIONS = {
    "in a tuple": 'return self.config._attn_implementation in ("eager", "sdpa")',
    "equal": 'return self.config._attn_implementation == "sdpa"',
    "the other way round": 'return "sdpa" == self.config._attn_implementation',
    "unequal": 'return not self.config._attn_implementation != "sdpa"',
    "in a set": 'return self.config._attn_implementation in {"sdpa"}',
    "in a global": "return self.config._attn_implementation in SUPPORTED",
    "getattr": 'return getattr(self.config, "_attn_implementation", None) == "sdpa"',
    "the field": 'return self.config._attn_implementation_internal == "sdpa"',
    "a local variable": 'name = self.config._attn_implementation; return name == "sdpa"',
    "the start": 'return self.config._attn_implementation.startswith("sd")',
    "an expression": 'return bool(re.match("s.*a", self.config._attn_implementation))',
    "a match statement": MATCH,
    "a table": "return WINDOWS.get(self.config._attn_implementation) is not None",
    "a helper": "return is_known(self.config)",
    "a property": 'return self.implementation == "sdpa"',
    "the config's property": "return self.config.is_plain",
    "the text's config": 'return self.config.get_text_config()._attn_implementation == "sdpa"',
    "vars": 'return vars(self.config)["_attn_implementation_internal"] == "sdpa"',
    "a text": 'return f"by {self.config._attn_implementation}" == "by sdpa"',
    "a text in a table": 'return {"fast_sdpa": True}.get(f"fast_{self.config._attn_implementation}", False)',
    "a method's name": 'return getattr(self, f"is_{self.config._attn_implementation}", lambda: False)()',
    "a field's name that a class keeps": "return getattr(self.config, self.FIELD) in SUPPORTED",
    "a field's name that an instance is given": "return getattr(self.config, self.field) in SUPPORTED",
    "in a comprehension": 'return any(self.config._attn_implementation == name for name in SUPPORTED)',
}  # fmt: skip
# What is added to the file for a question.
HELPERS = {
    QUESTIONS["a field's name that a class keeps"]: "Attention.FIELD = '_attn_implementation'",
    QUESTIONS["a field's name that an instance is given"]: """
class Attention(Attention):
    def __init__(self, config):
        super().__init__(config)
        self.field = "_attn_implementation"
""",
    QUESTIONS["a method's name"]: "Attention.is_sdpa = lambda self: True",
    QUESTIONS["a helper"]: "def is_known(config): return config._attn_implementation in SUPPORTED",
    QUESTIONS["a property"]: "Attention.implementation = property(lambda self: self.config._attn_implementation)",
    QUESTIONS["the config's property"]: "AskingConfig.is_plain = property(lambda c: c._attn_implementation == 'sdpa')",
}
# What both names answer alike.
NO_QUESTIONS = {
    "flash": 'return self.config._attn_implementation == "flash_attention_2"',
    "not flex": 'return self.config._attn_implementation != "flex_attention"',
    "none": "return self.config._attn_implementation is None",
    "a message": 'print(f"attention by {self.config._attn_implementation}"); return False',
    "an exception": RAISES,
    "masks": "return self.config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping",
    "a function of transformers": "return is_flash_attention_requested(self.config)",
}


NUMBERS = itertools.count()


@pytest.fixture
def written():
    """A model of a file of its own, whose attention asks a question."""
    names = []

    def write(question, implementation="sdpa", lookup=BY_INTERFACE):
        names.append(f"asking_{next(NUMBERS)}")
        module = sys.modules[names[-1]] = types.ModuleType(names[-1])
        exec(MODEL.replace("{question}", question).replace("{lookup}", lookup), vars(module))
        exec(HELPERS.get(question, ""), vars(module))
        torch.manual_seed(1)
        return module.AskingModel(module.AskingConfig(attn_implementation=implementation)).eval()

    yield write
    for name in names:
        del sys.modules[name]


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize("lookup", [BY_INTERFACE, BY_SUBSCRIPT], ids=["interface", "subscript"])
def test_a_question_is_answered_as_before(question, lookup, written, monkeypatch):
    model = written(question, lookup=lookup)
    config, expected = model.config, model(X)
    assert model.attention.asks()
    report = gptkern.swap(model, strict=True)
    assert [entry.operator for entry in report.replaced] == ["attention"]
    assert model.config is config and model.attention.asks()
    assert calls_in(monkeypatch, lambda: model(X)) == 1
    torch.testing.assert_close(model(X), expected)
    gptkern.unswap(model)
    assert calls_in(monkeypatch, lambda: model(X)) == 0


@pytest.mark.parametrize("question", NO_QUESTIONS.values(), ids=NO_QUESTIONS)
def test_what_both_names_answer_alike_is_no_question(question, written):
    model = written(question)
    expected = model(X)
    gptkern.swap(model, strict=True)
    assert model.config._attn_implementation == "gptkern"
    torch.testing.assert_close(model(X), expected)


COMPARISONS = {
    "is": "ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None) is sdpa_attention_forward",
    "by its name": 'ALL_ATTENTION_FUNCTIONS["sdpa"].__name__ == "sdpa_attention_forward"',
    "elsewhere": "is_plain(ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation])",
}


@pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=COMPARISONS)
def test_what_compares_the_function_that_it_looked_up_is_left_alone(comparison, written):
    model = written(f"return {comparison}")
    exec(
        "from transformers.integrations.sdpa_attention import sdpa_attention_forward\n"
        "def is_plain(found): return found == sdpa_attention_forward",
        vars(sys.modules[type(model).__module__]),
    )
    expected = model(X)
    assert model.attention.asks()
    ((_, _, reason),) = gptkern.swap(model).skipped
    assert "may compare what its attention is looked up as" in reason and torch.equal(model(X), expected)
    with pytest.raises(RuntimeError, match="may compare"):
        gptkern.swap(model, strict=True)


def test_eager_asked_for_is_eager(written, monkeypatch):
    model = written('return self.config._attn_implementation == "eager"', "eager")
    expected = model(X)
    report = gptkern.swap(model)
    assert model.attention.asks() and "no output_attentions" in report.replaced[0].replacement
    assert calls_in(monkeypatch, lambda: model(X)) == 1
    torch.testing.assert_close(model(X), expected)


def test_eager_that_is_not_looked_up_is_left_alone(written):
    lookup = f'eager_attention_forward if self.config._attn_implementation == "eager" else {BY_SUBSCRIPT}'
    model = written("return False", "eager", lookup)
    expected = model(X)
    with pytest.raises(
        RuntimeError, match=r"Attention.forward .* asks for the name of the attention, which is \"eager\""
    ):
        gptkern.swap(model, strict=True)
    assert not gptkern.swap(model).replaced and torch.equal(model(X), expected)


def test_a_table_of_the_model_s_own_is_left_alone(written):
    lookup = '{"sdpa": ALL_ATTENTION_FUNCTIONS["sdpa"]}[self.config._attn_implementation]'
    model = written("return False", lookup=lookup)
    expected = model(X)
    gptkern.swap(model)
    torch.testing.assert_close(model(X), expected)


def test_built_by_the_name_it_raises(written):
    model = written(QUESTIONS["equal"], "gptkern")
    with pytest.raises(ValueError, match=r"Attention.asks .* asks for the name .* build it with \"sdpa\" and swap it"):
        model(X)
    assert "asks for the name" in gptkern.swap(model).skipped[0].reason


def test_a_function_set_on_a_module_asks(written):
    model = written("return False")
    asks = eval('lambda: attention.config._attn_implementation == "sdpa"', {"attention": model.attention})
    model.attention.asks = asks
    expected = model(X)
    gptkern.swap(model)
    assert torch.equal(model(X), expected) and model.attention.asks()


def test_compiled_in_one_graph(written):
    model = written(QUESTIONS["in a tuple"])
    expected = model(X)
    gptkern.swap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)


# --- Models of transformers -------------------------------------------------------------------------------------------

IDS = torch.randint(3, causal_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "axk2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_index_mask_is_kept(kind, implementation, monkeypatch):
    model = causal_models.build(kind)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        gptkern.swap(model)
        torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    copied = pickle.loads(pickle.dumps(model))
    assert calls_in(monkeypatch, lambda: copied(IDS)) == calls_in(monkeypatch, lambda: model(IDS)) > 2


@pytest.mark.parametrize("kept", [1, 3])
def test_shared_keys_in_a_cache_of_fixed_size(kept):
    model = causal_models.build("gemma4_text")

    def logits():
        cache = StaticCache(config=model.config, max_cache_len=16)
        return model(IDS, past_key_values=cache, logits_to_keep=kept).logits

    with torch.no_grad():
        expected = logits()
        gptkern.swap(model)
        torch.testing.assert_close(logits(), expected, rtol=1e-4, atol=1e-4)


def test_kernels_run_a_model_that_asks(triton_backend, device):
    """The launches are counted: on a CPU, PyTorch's operators would give the same results."""
    model = causal_models.build("deepseek_v32", qk_nope_head_dim=8).to(device)
    ids = IDS[:1, :5].to(device)
    with gptkern.backend("torch"):
        expected = model(ids, use_cache=False).logits
        expected.sum().backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    gptkern.swap(model)
    with Watched() as watched:
        logits = model(ids, use_cache=False).logits
        logits.sum().backward()
    layers = model.config.num_hidden_layers
    assert watched.names.count("attention_forward") == watched.names.count("attention_backward") == layers
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-4)


def test_gptj_drops_no_attention_weights_in_eval_mode():
    model = causal_models.build("gptj")
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    with torch.no_grad():
        expected = model(IDS).logits
        gptkern.swap(model)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
                module.p = 0.0
        assert not torch.allclose(model(IDS).logits, expected, rtol=1e-2, atol=1e-2)
