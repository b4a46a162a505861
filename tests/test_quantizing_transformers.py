"""quantize and load_quantized on models of transformers."""

from __future__ import annotations

import json
import warnings

import oracle_quantize_int8
import pytest
import torch
from quantized_models import classes, ids, int8_names, logits, on_meta, read, saved
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


# --- save_pretrained and from_pretrained ------------------------------------------------------------------------------


def whisper(transformers):
    torch.manual_seed(1)
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=10,
        max_target_positions=24, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def equal(model, other):
    first, second = model.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("make", [gpt2, llama, whisper])
@pytest.mark.parametrize("shard", ["50GB", "10kB"])
def test_save_pretrained_and_from_pretrained(transformers, tmp_path, make, shard):
    model = make(transformers)
    gptkern.quantize(model, "w8a16")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = type(model).from_pretrained(tmp_path)
    assert classes(loaded) == classes(model) and equal(loaded, model)
    assert {loaded.get_submodule(name).mode for name in int8_names(loaded)} == {"w8a16"}
    assert not any(module.training for module in loaded.modules())
    if make is not whisper:
        assert torch.equal(logits(loaded), logits(model))
    # What was loaded is what quantize makes: it can be cast, loads nothing of the other kind, and is saved again.
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    other = {key: value + 1 for key, value in make(transformers).state_dict().items()}
    with pytest.raises(RuntimeError, match="the layer is int8"):
        loaded.load_state_dict(other, strict=False)
    assert all(torch.equal(value, before[key]) for key, value in loaded.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert equal(again, model.bfloat16())
    assert equal(again.float(), model.float())


def test_a_part_is_saved_and_loaded_as_the_whole(transformers, tmp_path):
    model = llama(transformers)
    gptkern.quantize(model)
    model.save_pretrained(tmp_path / "whole")
    part, told = transformers.LlamaModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert equal(part, model.model)
    assert not told["missing_keys"] and told["unexpected_keys"] == {"lm_head.weight"}
    model.model.save_pretrained(tmp_path / "part")
    whole = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "part")
    assert equal(whole.model, model.model)
    whole.model.save_pretrained(tmp_path / "part of it")
    assert equal(transformers.LlamaModel.from_pretrained(tmp_path / "part of it"), model.model)
    # Who does not know the name is told so of a part, too.
    assert read(tmp_path / "part of it" / "model.safetensors")["layers.0.mlp.up_proj.weight"].shape == (1,)


def test_the_names_of_layers_are_those_of_the_moment(transformers, tmp_path):
    """Saved is what the model is, not what an earlier quantize made of it; a swap in between changes nothing."""
    model = gpt2(transformers)
    gptkern.quantize(model, skip=["h.1"])
    model.save_pretrained(tmp_path)
    gptkern.swap(model)
    gptkern.quantize(model, "w8a16", skip=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert equal(loaded, model)
    assert [loaded.get_submodule(name).mode for name in int8_names(loaded)] == ["auto"] * 4 + ["w8a16"] * 4
    gptkern.unswap(model)
    model.save_pretrained(tmp_path)
    assert equal(transformers.GPT2LMHeadModel.from_pretrained(tmp_path), model)


def test_a_float_model_of_the_same_config_stays_float(transformers, tmp_path):
    model = gpt2(transformers)
    other = transformers.GPT2LMHeadModel(model.config)
    gptkern.quantize(model)
    model.save_pretrained(tmp_path / "int8")
    other.save_pretrained(tmp_path / "float")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "float")
    assert int8_names(loaded) == [] and equal(loaded, other)
    loaded.save_pretrained(tmp_path / "again")
    assert equal(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again"), other)


def test_load_quantized_takes_what_save_pretrained_wrote(transformers, tmp_path):
    model, filled, quantised = (gpt2(transformers) for _ in range(3))
    gptkern.quantize(model)
    model.save_pretrained(tmp_path)
    state = read(tmp_path / "model.safetensors")
    assert len(gptkern.load_quantized(filled, state).quantized) == 8
    gptkern.quantize(quantised)
    result = quantised.load_state_dict(state, strict=False)
    assert result.missing_keys == ["lm_head.weight"] and not result.unexpected_keys
    for other in (filled, quantised):
        assert equal(other, model)
    # What load_quantized filled is saved as what quantize made.
    filled.save_pretrained(tmp_path / "again")
    assert equal(transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again"), model)


def test_the_config_alone_says_nothing_until_the_model_is_saved(transformers):
    model = gpt2(transformers)
    before = model.config.to_dict()
    gptkern.quantize(model)
    assert model.config.to_dict() == before


@pytest.mark.parametrize("method", ["another", None])
def test_where_the_method_is_not_known_it_is_an_error(transformers, tmp_path, method):
    """transformers without gptkern's name: a warning, and then random weights, if the file did not forbid it."""
    model = llama(transformers)
    gptkern.quantize(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if method is None:
        del config["quantization_config"]
    else:
        config["quantization_config"]["quant_method"] = method
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["int8_weight", "weight_scale"])
def test_codes_that_the_checkpoint_has_not_are_an_error(transformers, tmp_path, key):
    from safetensors.torch import save_file

    model = llama(transformers)
    gptkern.quantize(model)
    model.save_pretrained(tmp_path)
    state, name = read(tmp_path / "model.safetensors"), f"model.layers.1.mlp.up_proj.{key}"
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint has no {name}; config.json says"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_float_state_dict_for_an_int8_config_is_an_error(transformers, tmp_path):
    model = llama(transformers)
    floats = {key: value.clone() for key, value in model.state_dict().items()}
    gptkern.quantize(model)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no model\.layers\.0\.self_attn\.q_proj\.int8_weight, "):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=floats)
    codes = model.state_dict()
    assert equal(transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=codes), model)


def test_a_float_model_is_not_quantised_by_from_pretrained(transformers, tmp_path):
    from gptkern.quantizing.transformers import Int8Config

    gpt2(transformers).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gptkern does require the model to be pre-quantized"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=Int8Config())


def test_what_another_method_has_quantised_is_refused(transformers):
    model = gpt2(transformers)
    model.hf_quantizer = transformers.quantizers.AutoHfQuantizer.from_config(
        transformers.QuantoConfig(weights="int8"), pre_quantized=False
    )
    with pytest.raises(ValueError, match="transformers has quantised the model by 'quanto'; it needs one"):
        gptkern.quantize(model)
    assert int8_names(model) == []


# --- A part was quantised, and the whole is saved ---------------------------------------------------------------------


def by_hand(model, transformers):
    model.model.layers[1].mlp.up_proj = Int8Linear.from_linear(model.model.layers[1].mlp.up_proj)


def filled(model, transformers):
    quantised = llama(transformers).model
    gptkern.quantize(quantised)
    gptkern.load_quantized(model.model, quantised.state_dict())


def moved(model, transformers):
    other = transformers.LlamaForSequenceClassification(model.config)
    gptkern.quantize(other)
    model.model = other.model


PARTS = {
    "the backbone": lambda model, _: gptkern.quantize(model.model),
    "the layers": lambda model, _: gptkern.quantize(model.model.layers),
    "each layer's mlp": lambda model, _: [gptkern.quantize(layer.mlp) for layer in model.model.layers],
    "through another module": lambda model, _: gptkern.quantize(torch.nn.Sequential(model.model.layers)),
    "load_quantized": filled,
    "by hand": by_hand,
    "moved": moved,
}


@pytest.mark.parametrize("part", PARTS)
def test_the_whole_of_which_a_part_was_quantised(transformers, tmp_path, part):
    """What config.json does not name is an error at load; what was saved is whole."""
    model = llama(transformers)
    PARTS[part](model, transformers)
    names = int8_names(model)
    with pytest.warns(UserWarning) as caught:
        model.save_pretrained(tmp_path)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(
        "save_pretrained: LlamaForCausalLM holds int8 layers that gptkern.quantize made in a part"
    )
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    fresh = llama(transformers)
    gptkern.load_quantized(fresh, read(tmp_path / "model.safetensors"))
    assert int8_names(fresh) == names and equal(fresh, model)
    # What the warning tells to do.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gptkern.quantize(model, filter=lambda name, layer: False)
        model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert int8_names(loaded) == names and equal(loaded, model)


@pytest.mark.filterwarnings("error")
def test_a_state_dict_of_one_s_own_has_the_names_of_int8_layers_alone(transformers, tmp_path):
    model = llama(transformers)
    gptkern.quantize(model.model)
    codes = {key for key in model.state_dict() if "mlp.up_proj" in key}
    names = ("int8_weight", "weight_scale")
    assert codes == {f"model.layers.{i}.mlp.up_proj.{name}" for i in (0, 1) for name in names}
