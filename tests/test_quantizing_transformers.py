"""quantize and load_quantized on models of transformers."""

from __future__ import annotations

import oracle_quantize_int8
import pytest
import torch
from quantized_models import classes, ids, logits, on_meta, read, saved
from torch.multiprocessing.reductions import StorageWeakRef

import gptkern
from gptkern.nn import Int8Linear


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    module.utils.logging.set_verbosity_error()
    return module


def gpt2(transformers):
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1 and not parameter.is_meta:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def llama(transformers):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=24, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_of_transformers(transformers, tmp_path, make):
    model = make(transformers)
    float_logits, keys = logits(model), list(model.state_dict())
    weights = {name: m.weight for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    conv1d = make is gpt2
    report = gptkern.quantize(model)
    assert len(report.quantized) == len(weights) - 1 == (8 if conv1d else 14)
    assert [s.name for s in report.skipped] == ["lm_head"]
    for layer in report.quantized:
        weight = weights[layer.name].t() if conv1d else weights[layer.name]
        assert layer.shape == tuple(weight.shape) and layer.error < 0.01
        q, scale = oracle_quantize_int8.quantize_int8(weight.detach())
        int8 = model.get_submodule(layer.name)
        assert torch.equal(int8.weight, q) and torch.equal(int8.weight_scale, scale)
    assert 0 < (logits(model) - float_logits).norm() / float_logits.norm() < 0.02
    path = saved(model, tmp_path / "model.safetensors")

    if conv1d:
        fresh = on_meta(make, transformers)
    else:
        # Llama's rotary frequencies are a buffer that no state_dict holds.
        with pytest.raises(RuntimeError, match=r"rotary_emb\.inv_freq.* would stay on the meta device"):
            gptkern.load_quantized(on_meta(make, transformers), read(path))
        fresh = make(transformers)
        for name, parameter in list(fresh.named_parameters()):
            path_of, _, key = name.rpartition(".")
            setattr(fresh.get_submodule(path_of), key, torch.nn.Parameter(parameter.detach().to("meta")))
    gptkern.load_quantized(fresh, read(path))
    assert list(fresh.state_dict()) == list(model.state_dict()) != keys
    assert (fresh.lm_head.weight is fresh.get_input_embeddings().weight) == conv1d
    assert torch.equal(logits(fresh), logits(model))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    generated = fresh.generate(ids(), **options)
    assert generated.shape[1] > ids().shape[1]
    assert torch.equal(generated, model.generate(ids(), **options))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_models_of_transformers_swapped_and_quantised_in_either_order(transformers, make):
    plain, swapped_first, quantised_first = (make(transformers) for _ in range(3))
    gptkern.quantize(plain)
    gptkern.swap(swapped_first)
    gptkern.quantize(swapped_first)
    gptkern.quantize(quantised_first)
    gptkern.swap(quantised_first)
    assert classes(swapped_first) == classes(quantised_first) != classes(plain)
    expected = plain.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0)
    for model in (swapped_first, quantised_first):
        torch.testing.assert_close(logits(model), logits(plain))
        assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False, pad_token_id=0), expected)
        gptkern.unswap(model)
        assert classes(model) == classes(plain)
        assert torch.equal(logits(model), logits(plain))


def test_weights_of_transformers_are_freed_one_by_one(transformers, monkeypatch):
    model = gpt2(transformers)
    storages = [StorageWeakRef(block.mlp.c_fc.weight.untyped_storage()) for block in model.transformer.h]
    alive, from_linear = [], Int8Linear.from_linear
    monkeypatch.setattr(
        Int8Linear, "from_linear",
        lambda module, **o: alive.append(sum(not s.expired() for s in storages)) or from_linear(module, **o),
    )  # fmt: skip
    gptkern.quantize(model)
    # c_fc is the third of a block's four
    assert alive == [2, 2, 2, 1, 1, 1, 1, 0]
