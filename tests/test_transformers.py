"""transformers: attention by the name "gptkern", and what swap does to configs."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from model_zoo import CASES
from test_models import LOGITS, batch, built, calls_in
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import gptkern
import gptkern.swapping.transformers as integration
from gptkern.swapping import known_code


def case(name):
    return next(case for case in CASES if case.name == name)


def gpt2(**fields):
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=4, n_positions=32, vocab_size=61, bos_token_id=1, eos_token_id=2, **fields
    )
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config).eval()


def in_a_new_process(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_here_imports_transformers_itself():
    in_a_new_process(
        "import sys, torch, gptkern\n"
        "model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))\n"
        "gptkern.swap(model)\n"
        "gptkern.load_quantized(model, gptkern.quantize(model) and model.state_dict())\n"
        "assert 'transformers' not in sys.modules and 'safetensors' not in sys.modules\n"
    )


def test_the_import_adds_one_name_and_changes_nothing_else():
    in_a_new_process(
        "from transformers import AttentionInterface as A, AttentionMaskInterface as M\n"
        "before = dict(A._global_mapping), dict(M._global_mapping)\n"
        "import gptkern.integrations.transformers\n"
        "for was, now in zip(before, (A._global_mapping, M._global_mapping)):\n"
        "    assert now.keys() - was.keys() == {'gptkern'}\n"
        "    assert all(now[name] is was[name] for name in was)\n"
    )


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gpt_bigcode", "llama", "qwen2"])
def test_by_name_without_a_swap(name, monkeypatch, tmp_path):
    stock = built(case(name)).eval()
    stock.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="gptkern").eval()
    assert model.config._attn_implementation == "gptkern"
    ids, _, padding = batch(side="left")
    with torch.no_grad():
        assert calls_in(monkeypatch, lambda: model(ids)) == 2
        for mask in (None, padding.long()):
            visible = slice(None) if mask is None else padding
            actual, expected = (m(ids, attention_mask=mask).logits[visible] for m in (model, stock))
            assert torch.equal(actual, expected)
    config = copy.deepcopy(stock.config)
    assert (
        AutoModelForCausalLM.from_config(config, attn_implementation="gptkern").config._attn_implementation == "gptkern"
    )
    model.set_attn_implementation("sdpa")
    assert calls_in(monkeypatch, lambda: model(ids)) == 0


def test_a_model_that_was_built_by_name_keeps_it():
    model = transformers.GPT2LMHeadModel(gpt2(attn_implementation="gptkern").config)
    config = model.config
    report = gptkern.swap(model)
    assert "attention" in {entry.operator for entry in report.replaced}
    gptkern.unswap(model)
    assert model.config is config and config._attn_implementation == "gptkern"


# --- Configs ----------------------------------------------------------------------------------------------------------


def test_another_model_of_the_same_config_is_not_swapped(monkeypatch):
    first = gpt2()
    config = first.config
    second = transformers.GPT2LMHeadModel(config).eval()
    assert second.config is config
    ids, _, _ = batch()
    gptkern.swap(first)
    assert config._attn_implementation == "sdpa"
    assert calls_in(monkeypatch, lambda: second(ids)) == 0
    assert calls_in(monkeypatch, lambda: first(ids)) == 5
    # One copy in place of one config, in all its places.
    assert first.config is first.transformer.config is first.transformer.h[0].attn.config is not config
    assert type(first.config) is type(config)
    gptkern.swap(second)
    gptkern.unswap(first)
    assert calls_in(monkeypatch, lambda: first(ids)) == 0
    assert calls_in(monkeypatch, lambda: second(ids)) == 5
    gptkern.unswap(second)
    assert first.config is second.config is second.transformer.h[0].attn.config is config


def test_what_is_set_on_a_swapped_model_s_config_outlives_the_swap():
    model = gpt2()
    config = model.config
    before = dict(vars(config))
    gptkern.swap(model)
    model.config.use_cache = False
    model.config.note = "new"
    del model.config.summary_type
    gptkern.unswap(model)
    assert model.config is config
    assert vars(config) == {
        **{k: v for k, v in before.items() if k != "summary_type"},
        "use_cache": False,
        "note": "new",
    }


def test_an_implementation_chosen_after_the_swap_stays(monkeypatch):
    model = gpt2()
    gptkern.swap(model)
    model.set_attn_implementation("eager")
    ids, _, _ = batch()
    assert calls_in(monkeypatch, lambda: model(ids)) == 4
    gptkern.unswap(model)
    assert model.config._attn_implementation == "eager"


def test_a_config_put_there_after_the_swap_stays():
    model = gpt2()
    gptkern.swap(model)
    other = model.config = copy.deepcopy(model.config)
    gptkern.unswap(model)
    assert model.config is other


def test_a_saved_config_says_nothing_of_the_swap(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "stock")
    gptkern.swap(model)
    model.save_pretrained(tmp_path / "swapped")
    stock, swapped = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "swapped"))
    assert stock == swapped


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_copies_stay_swapped_and_find_their_way_back(name, copied, monkeypatch):
    model = built(case(name)).eval()
    config = model.config
    ids, _, _ = batch()
    gptkern.swap(model)
    twin = copied(model)
    assert twin.config is twin.base_model.config is not model.config
    calls = sum(case(name).calls.values())
    assert calls_in(monkeypatch, lambda: twin(ids)) == calls
    assert torch.equal(twin(ids).logits, model(ids).logits)
    gptkern.unswap(twin)
    assert calls_in(monkeypatch, lambda: twin(ids)) == 0
    assert vars(twin.config) == vars(config) and twin.config is twin.base_model.config
    assert calls_in(monkeypatch, lambda: model(ids)) == calls


def test_only_a_part_of_a_model(monkeypatch):
    model = built(case("gpt2")).eval()
    config, ids = model.config, batch()[0]
    expected = model(ids).logits
    gptkern.swap(model.transformer.h[1])
    assert calls_in(monkeypatch, lambda: model(ids)) == 4
    torch.testing.assert_close(model(ids).logits, expected, **LOGITS)  # GPT-2 writes its GELU out
    gptkern.swap(model)
    assert calls_in(monkeypatch, lambda: model(ids)) == 9
    gptkern.unswap(model.transformer.h[1])
    assert model.transformer.h[1].attn.config is config
    assert calls_in(monkeypatch, lambda: model(ids)) == 5
    gptkern.unswap(model)
    assert model.config is config


def test_a_second_swap_takes_back_what_was_chosen_in_between(monkeypatch):
    model = gpt2()
    config, ids = model.config, batch()[0]
    gptkern.swap(model)
    copied = model.config
    model.set_attn_implementation("sdpa")
    gptkern.swap(model)
    assert model.config is copied and calls_in(monkeypatch, lambda: model(ids)) == 5
    gptkern.unswap(model)
    assert model.config is config is model.transformer.h[0].attn.config
    assert config._attn_implementation == "sdpa"


def test_a_wider_swap_takes_the_copy_of_the_narrower_one(monkeypatch):
    model = built(case("llama")).eval()
    config, ids = model.config, batch()[0]
    gptkern.swap(model.model.layers[0])
    gptkern.swap(model)
    assert model.config is model.model.layers[0].self_attn.config is model.model.layers[1].self_attn.config
    calls = calls_in(monkeypatch, lambda: model(ids))
    model.set_attn_implementation("eager")
    assert calls_in(monkeypatch, lambda: model(ids)) == calls - 2
    gptkern.unswap(model)
    assert model.config is config is model.model.layers[0].self_attn.config


def test_a_model_built_with_eager_is_told_of_its_attention_weights():
    model = gpt2(attn_implementation="eager")
    report = gptkern.swap(model)
    assert 'was "eager": no output_attentions' in str(report) and str(gptkern.swap(model)) == str(report)
    assert "output_attentions" not in str(gptkern.swap(gpt2(attn_implementation="sdpa")))


def test_without_attention_the_config_stays():
    model = gpt2()
    config = model.config
    report = gptkern.swap(model, ops=["layer_norm", "softmax"])
    assert model.config is config
    assert {entry.operator for entry in report.replaced} == {"layer_norm"}


# --- What is left alone -----------------------------------------------------------------------------------------------


def reasons(model):
    return {entry.reason for entry in gptkern.swap(model).skipped}


def test_an_implementation_asked_for_by_name_is_left_alone():
    model = built(case("llama"))
    model.set_attn_implementation("flex_attention")
    assert 'attn_implementation="flex_attention" was asked for by name' in reasons(model)
    assert model.config._attn_implementation == "flex_attention"


def test_attention_weights_in_the_config_are_left_alone():
    model = gpt2(attn_implementation="eager")
    model.config.output_attentions = True
    assert "weights" in reasons(model).pop()
    assert model(batch()[0]).attentions[0] is not None


def test_attention_weights_in_a_call_are_none_and_said(monkeypatch):
    said = []
    monkeypatch.setattr(integration._logger, "warning_once", said.append)
    query = torch.randn(1, 2, 3, 8)
    _, weights = integration.attention_forward(torch.nn.Module(), query, query, query, None, output_attentions=True)
    assert weights is None and "output_attentions" in said[0]


def test_capped_scores_are_left_alone():
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert "its scores are capped, which the kernels cannot" in reasons(model)
    assert model.config._attn_implementation == "eager"


def test_a_part_of_a_model_with_sinks_is_left_alone():
    config = transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert "GptOssPreTrainedModel cannot run on scaled_dot_product_attention" in reasons(model.model.layers)
    assert model.model.layers[0].self_attn.config is model.config


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_the_kernels_cannot_raises(name):
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=name):
        integration.attention_forward(torch.nn.Module(), query, query, query, None, **{name: 1.0})


def test_a_bias_of_the_model_s_own_is_left_to_transformers():
    query, bias = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 3)
    arguments = torch.nn.Module(), query, query, query, None
    expected = AttentionInterface._global_mapping["sdpa"](*arguments, position_bias=bias)[0]
    assert torch.equal(integration.attention_forward(*arguments, position_bias=bias)[0], expected)


# --- Norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_in_16_bits_is_rounded_once(dtype):
    """Llama's rounds twice: the two differ by no more than that, and ours is the closer one."""
    norm = LlamaRMSNorm(64).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64) + 0.5)
    x = torch.randn(32, 64).to(dtype)
    exact = norm.weight.double() * F.rms_norm(x.double(), (64,), eps=norm.variance_epsilon)
    stock = norm(x)
    gptkern.swap(norm)
    swapped = norm(x)
    assert swapped.dtype == stock.dtype == dtype
    ulp = torch.finfo(dtype).eps * exact.abs()
    assert ((swapped - exact).abs() <= 0.501 * ulp).all()
    assert ((stock.double() - swapped).abs() <= 1.5 * ulp).all()
    assert (swapped - exact).abs().sum() < (stock - exact).abs().sum()


def test_a_norm_whose_weight_is_wider_than_its_input_widens_it():
    norm, x = LlamaRMSNorm(8), torch.randn(3, 8).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(8))
    expected = norm(x)
    gptkern.swap(norm)
    assert expected.dtype == torch.float32
    assert torch.equal(norm(x), expected)


class OtherRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return (1 + self.weight) * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


def test_a_norm_of_other_code_is_named():
    report = gptkern.swap(OtherRMSNorm(8))
    assert report.replaced == [] and report.skipped[0].reason == "its norm is written out in Python"
    assert gptkern.swap(OtherRMSNorm(8), ops=["layer_norm"]).skipped == []


# --- Rotary embeddings ------------------------------------------------------------------------------------------------


def test_a_rotary_embedding_is_known_by_its_code():
    llama, qwen2, cohere = (
        importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in ("llama", "qwen2", "cohere")
    )
    assert integration.find(llama.apply_rotary_pos_emb).operator == "rotary"
    assert integration.find(qwen2.apply_rotary_pos_emb).operator == "rotary"
    # The same name, other pairs.
    assert integration.find(cohere.apply_rotary_pos_emb) is None
    assert integration.find(llama.rotate_half) is None


def with_other_pairs(function):
    """The function, whose rotate_half turns other pairs: its own code stays the same."""
    names = {**function.__globals__, "rotate_half": lambda x: torch.cat((x[..., 1::2], x[..., ::2]), -1)}
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def test_the_functions_that_a_rotary_embedding_calls_count(monkeypatch):
    other = with_other_pairs(modeling_llama.apply_rotary_pos_emb)
    assert integration.find(other) is None
    model = built(case("llama"))
    attention = type("OtherAttention", (modeling_llama.LlamaAttention,), {})
    forward = modeling_llama.LlamaAttention.forward
    attention.forward = types.FunctionType(forward.__code__, {**forward.__globals__, "apply_rotary_pos_emb": other})
    for layer in model.model.layers:
        layer.self_attn.__class__ = attention
    ids = batch()[0]
    expected = model(ids).logits
    report = gptkern.swap(model)
    assert {(entry.original, entry.reason) for entry in report.skipped} == {
        ("OtherAttention", "its rotary embedding is of a form of its own")
    }
    assert torch.equal(model(ids).logits, expected)


def test_the_defaults_and_constants_of_a_rotary_embedding_count():
    """The same code does something else with another default, constant or global."""
    stock = modeling_llama.apply_rotary_pos_emb
    other = types.FunctionType(stock.__code__, stock.__globals__, stock.__name__, (2,))
    assert integration.find(other) is None

    def scaled(text, factor):
        names = {"FACTOR": factor}
        exec(f"def f(x):\n    'Words, {factor}.'\n    return x[{text!r}] * FACTOR", names)
        return names["f"]

    assert known_code.same_code(scaled("a", 2.0), scaled("a", 2.0))
    assert not known_code.same_code(scaled("a", 2.0), scaled("b", 2.0))
    assert not known_code.same_code(scaled("a", 2.0), scaled("a", 3.0))
    assert not known_code.same_code(scaled("a", torch.ones(2)), scaled("a", torch.ones(2)))


def test_masked_groups_on_pytorch_s_own_operator_are_repeated(monkeypatch):
    """On a GPU, PyTorch has only its slowest kernel for a mask together with enable_gqa."""
    query, mask = torch.randn(1, 4, 3, 8), torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
    assert integration._runs_on_torch(query, key, value, (mask, 0.0, False, None))
    expected = integration.attention_forward(torch.nn.Module(), query, key, value, mask)[0]
    calls, sdpa = [], integration.F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        calls.append((args[1].shape[1], kwargs["enable_gqa"]))
        return sdpa(*args, **kwargs)

    class OnGPU(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(integration.F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(integration, "_runs_on_torch", lambda *call: True)
    actual = integration.attention_forward(torch.nn.Module(), query.as_subclass(OnGPU), key, value, mask)[0]
    assert calls == [(4, False)]
    torch.testing.assert_close(actual.as_subclass(torch.Tensor), expected)
    integration.attention_forward(torch.nn.Module(), query.as_subclass(OnGPU), key, value, None)
    assert calls[1:] == [(2, True)]


def test_rotary_of_heads_behind_the_positions():
    query, key = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    angles = torch.rand(2, 5, 4).repeat(1, 1, 2)
    stock = modeling_llama.apply_rotary_pos_emb
    swapped = integration.find(stock).function
    for arguments in ((query, key), (query.transpose(1, 2), key.transpose(1, 2))):
        call = *arguments, angles.cos(), angles.sin(), 2 if arguments[0] is query else 1
        for actual, expected in zip(swapped(*call), stock(*call)):
            torch.testing.assert_close(actual, expected)


# --- Caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("side", [None, "left"], ids=["whole", "padded"])
def test_a_query_shorter_than_its_keys_sees_the_past(name, side):
    """The prompt in chunks of several tokens: the last query sees every key, the first one all but the last."""
    model = built(case(name)).eval()
    ids, _, padding = batch(side=side)
    mask = torch.ones_like(ids) if padding is None else padding.long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        gptkern.swap(model)
        cache = DynamicCache()
        pieces, seen = [], 0
        for length in (5, 4, 1, 2):
            piece = ids[:, seen : seen + length]
            seen += length
            # As generate does: the mask is that of all tokens so far.
            whole = None if side is None else mask[:, :seen]
            pieces.append(model(piece, attention_mask=whole, past_key_values=cache, use_cache=True).logits)
    visible = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[visible], expected[visible], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_a_cache_of_fixed_size(name):
    """Its keys are longer than the queries from the first call on, and not yet filled."""
    model = built(case(name)).eval()
    ids = batch()[0]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        gptkern.swap(model)
        cache = StaticCache(config=model.config, max_cache_len=16)
        pieces = [
            model(ids[:, first:last], past_key_values=cache, use_cache=True).logits
            for first, last in ((0, 7), (7, 8), (8, 12))
        ]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-5)
