"""state_dicts between float and int8: the other kind is refused before anything is loaded; older files load."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from quantized_models import Pair, gpt, logits, on_meta, saved

import gptkern
from gptkern.nn import Int8Linear

QKV = "blocks.0.attention.qkv"


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, before):
    state = module.state_dict()
    return list(state) == list(before) and all(torch.equal(state[name], tensor) for name, tensor in before.items())


def quantised_gpt(**changes):
    model = gpt(**changes)
    gptkern.quantize(model)
    return model


def other_gpt():
    """Of the same sizes, with other weights throughout."""
    model = gpt()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def older(state):
    """As it was written when the codes had the key of a float weight."""
    return {key.replace("int8_weight", "weight"): value for key, value in state.items()}


# --- Float weights into an int8 model ---------------------------------------------------------------------------------


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def swapped_and_back(model):
    gptkern.swap(model)
    gptkern.unswap(model)
    return model


def loaded(model):
    fresh = on_meta(gpt)
    gptkern.load_quantized(fresh, model.state_dict())
    return fresh


def swapped(model):
    gptkern.swap(model)
    return model


AROUND = {
    "itself": lambda model: model,
    "a copy": copy.deepcopy,
    "pickled": through_pickle,
    "swapped": swapped,
    "swapped and back": swapped_and_back,
    "of load_quantized": loaded,
    "a part of another": torch.nn.Sequential,
    "torch.compile": torch.compile,
    "DataParallel": torch.nn.DataParallel,
    "a block": lambda model: model.blocks[0],
    "a list of blocks": lambda model: model.blocks,
    "an attention": lambda model: model.blocks[0].attention,
    "the layer": lambda model: model.blocks[0].attention.qkv,
}


@pytest.mark.parametrize(
    "options", [{}, {"strict": False}, {"assign": True}, {"strict": False, "assign": True}], ids=str
)
@pytest.mark.parametrize(
    "around", [pytest.param(name, marks=pytest.mark.deep) if name == "torch.compile" else name for name in AROUND]
)
def test_float_weights_are_refused_and_nothing_is_loaded(around, options):
    wrap = AROUND[around]
    model = wrap(quantised_gpt())
    state = (other_gpt() if around == "of load_quantized" else wrap(other_gpt())).state_dict()
    before, tensors = copied(model), {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    key = next(key for key in state if key.endswith("qkv.weight") or key == "weight")
    with pytest.raises(RuntimeError, match=rf"{key} is torch.float32; the layer is int8 and needs .*int8_weight"):
        model.load_state_dict(state, **options)
    assert same(model, before)
    assert {id(tensor) for tensor in (*model.parameters(), *model.buffers())} == tensors


def test_float_weights_of_a_distributed_model_are_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(quantised_gpt())
        before = copied(model)
        with pytest.raises(RuntimeError, match=f"module.{QKV}.weight is torch.float32"):
            model.load_state_dict({f"module.{key}": value for key, value in other_gpt().state_dict().items()})
        assert same(model, before)
    finally:
        torch.distributed.destroy_process_group()


def test_float_weights_of_one_layer_among_codes_are_refused():
    model, other = quantised_gpt(), quantised_gpt(layers=2)
    state, before = other_gpt().state_dict(), copied(model)
    mixed = {**copied(other), "blocks.1.perceptron.expand.weight": state["blocks.1.perceptron.expand.weight"]}
    mixed["token_embedding.weight"] = state["token_embedding.weight"]
    with pytest.raises(RuntimeError, match=r"GPT: blocks\.1\.perceptron\.expand\.weight is torch.float32"):
        model.load_state_dict(mixed, strict=False)
    assert same(model, before)


@pytest.mark.parametrize(("key", "dtype"), [("int8_weight", torch.float16), ("weight_scale", torch.bfloat16)])
def test_a_state_dict_that_was_cast_is_refused(key, dtype):
    model = quantised_gpt()
    before = copied(model)
    state = {name: tensor.to(dtype) if name.endswith(key) else tensor for name, tensor in before.items()}
    state["token_embedding.weight"] = torch.zeros(61, 32)
    needed = {"int8_weight": "int8", "weight_scale": "float32"}[key]
    with pytest.raises(RuntimeError, match=rf"{QKV}.{key} is {dtype}; the layer is int8 and needs torch.{needed}"):
        model.load_state_dict(state)
    assert same(model, before)


def test_a_file_of_float_weights_is_refused(tmp_path):
    from safetensors.torch import load_model

    model = quantised_gpt()
    before = copied(model)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"{QKV}.weight is torch.float32"):
            load_model(model, saved(other_gpt(), tmp_path / "model.safetensors"), strict=strict)
        assert same(model, before)


def test_layers_put_in_by_hand_refuse_float_weights_themselves():
    model = Pair()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.second = Int8Linear.from_linear(model.second)
    before = copied(model.second)
    with pytest.raises(RuntimeError, match=r"Int8Linear: second\.weight is torch.float32"):
        model.load_state_dict(state, strict=False)
    assert same(model.second, before)
    # From the next call on the whole model does.
    gptkern.quantize(model)
    before = copied(model)
    with pytest.raises(RuntimeError, match=r"Pair: first\.weight is torch.float32.*; second\.weight is torch.float32"):
        model.load_state_dict(state, strict=False)
    assert same(model, before)


def test_the_error_of_many_layers_names_the_first():
    model = quantised_gpt()
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(gpt().state_dict())
    assert str(caught.value).count("torch.float32;") == 8
    model = quantised_gpt(layers=3)
    with pytest.raises(RuntimeError, match=r"; and 4 more\. Float weights go into a float model") as caught:
        model.load_state_dict(gpt(layers=3).state_dict())
    assert str(caught.value).count("torch.float32;") == 8


def test_what_is_loaded_without_the_layers_still_is():
    model, state = quantised_gpt(), other_gpt().state_dict()
    norms = {key: value for key, value in state.items() if "norm" in key}
    result = model.load_state_dict(norms, strict=False)
    assert not result.unexpected_keys and torch.equal(model.final_norm.weight, state["final_norm.weight"])


def test_calls_do_not_pile_up_hooks():
    model = quantised_gpt()
    state = copied(model)
    count = [len(module._load_state_dict_pre_hooks) for module in model.modules()]
    assert count[0] == 1 and sum(count) == 8  # the model, the blocks' list, two blocks and their parts
    for _ in range(2):
        gptkern.quantize(model)
        gptkern.load_quantized(model, state)
        model = copy.deepcopy(model)
    assert [len(module._load_state_dict_pre_hooks) for module in model.modules()] == count


# --- int8 codes into a float model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, torch.nn.Sequential, lambda m: m.blocks[1], swapped])
def test_codes_are_not_taken_for_weights(wrap, assign):
    model, state = wrap(other_gpt()), wrap(quantised_gpt()).state_dict()
    weights = {name: copied(module) for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    with pytest.raises(RuntimeError, match=r"[Uu]nexpected.*int8_weight"):
        copy.deepcopy(model).load_state_dict(state, assign=assign)
    result = model.load_state_dict(state, strict=False, assign=assign)
    quantised = [key.removesuffix(".int8_weight") for key in state if key.endswith(".int8_weight")]
    assert {f"{name}.weight" for name in quantised} == set(result.missing_keys)
    assert all(torch.equal(model.get_submodule(name).weight, weights[name]["weight"]) for name in quantised)


def test_codes_are_of_the_names_that_buffers_have():
    """What calls a model on tensors by their names knows the codes by the same ones as a state_dict."""
    model = Pair()
    gptkern.quantize(model)
    buffers, x = dict(model.named_buffers()), torch.randn(3, 8)
    assert set(buffers) == {f"{name}.{key}" for name in ("first", "second") for key in ("int8_weight", "weight_scale")}
    state = copied(model) | {"second.int8_weight": torch.zeros(5, 6, dtype=torch.int8)}
    assert torch.equal(torch.func.functional_call(model, state, (x,)), model.second.bias.expand(3, 5))


# --- Files of before --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"assign": True}, {"strict": False}], ids=str)
def test_an_older_state_dict_loads(options):
    expected, model = quantised_gpt(), other_gpt()
    gptkern.quantize(model)
    state = older(copied(expected))
    keys = list(state)
    result = model.load_state_dict(state, **options)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(model, copied(expected)) and torch.equal(logits(model), logits(expected))
    assert list(state) == keys


@pytest.mark.parametrize("quantise_first", [False, True])
@pytest.mark.parametrize("make", [gpt, lambda: on_meta(gpt)], ids=["float", "meta"])
def test_an_older_file_loads(tmp_path, make, quantise_first):
    from safetensors.torch import load_file, save_file

    expected = quantised_gpt()
    state = older(copied(expected))
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    model = make()
    if quantise_first:
        gptkern.quantize(model)
    report = gptkern.load_quantized(model, load_file(tmp_path / "model.safetensors"))
    assert len(report.quantized) == 8
    assert same(model, copied(expected)) and torch.equal(logits(model), logits(expected))


def test_an_older_layer_loads_alone_and_unpickled():
    layer = Int8Linear.from_linear(torch.nn.Linear(8, 6))
    fresh = Int8Linear(8, 6)
    state = older(copied(layer))
    fresh.load_state_dict(state)
    assert same(fresh, copied(layer)) and set(state) == {"weight", "weight_scale", "bias"}
    again = Int8Linear(8, 6)
    gptkern.load_quantized(again, state)
    assert same(again, copied(layer))
    unpickled = copy.deepcopy(layer)
    unpickled.__dict__["_buffers"] = older(unpickled._buffers)
    unpickled = pickle.loads(pickle.dumps(unpickled))
    x = torch.randn(3, 8)
    assert same(unpickled, copied(layer)) and torch.equal(unpickled(x), layer(x))


# --- The weight as models ask for it ----------------------------------------------------------------------------------


def test_the_weight_is_the_codes_to_who_asks():
    layer = Int8Linear.from_linear(torch.nn.Linear(8, 6))
    assert layer.weight is layer.int8_weight
    before, code = copied(layer), torch.zeros(6, 8, dtype=torch.int8)
    for value in (code, torch.zeros(6, 8), torch.nn.Parameter(torch.zeros(6, 8)), torch.nn.Buffer(code), None):
        with pytest.raises(AttributeError, match=r"^Int8Linear\.weight cannot be set: the layer is int8.*from_linear$"):
            layer.weight = value
    assert layer.weight is layer.int8_weight and same(layer, before)
    layer.bias, layer.mode = None, "w8a16"
    assert set(copied(layer)) == {"int8_weight", "weight_scale"}
