"""load_quantized: the way of a quantised model through a file."""

from __future__ import annotations

import gc

import pytest
import torch
from quantized_models import Pair, gpt, ids, int8_names, logits, on_meta, quantized_names, read, saved
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.nn import Int8Linear


class Made(TorchDispatchMode):
    """The tensors off the meta device that operators gave inside."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.tensors.append(tensor)
        return result


def test_meta_quantise_and_load_state_dict_in_pytorch_s_own_words(tmp_path):
    from safetensors.torch import save_file

    model = Pair()
    gptkern.quantize(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = on_meta(Pair)
    report = gptkern.quantize(fresh)
    assert [layer.error for layer in report.quantized] == [None, None]
    assert {tensor.device.type for tensor in fresh.state_dict().values()} == {"meta"}
    fresh.load_state_dict(read(tmp_path / "model.safetensors"), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("quantise_first", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gpt_comes_back_bit_for_bit_and_its_float_weights_never_exist(tmp_path, swapped, quantise_first):
    def make():
        return gpt(vocab_size=29)  # an embedding smaller than the smallest linear layer's weight, of 32 x 32

    model, tokens = make(), ids() % 29
    gptkern.quantize(model)
    path = saved(model, tmp_path / "model.safetensors")
    fresh = on_meta(make)
    with Made() as made:
        if swapped:
            gptkern.swap(fresh)
        if quantise_first:
            gptkern.quantize(fresh)
        report = gptkern.load_quantized(fresh, read(path))
    assert max(tensor.numel() for tensor in made.tensors if tensor.is_floating_point()) < 32 * 32
    assert int8_names(fresh) == int8_names(model) == quantized_names(report)
    assert fresh.lm_head.weight is fresh.token_embedding.weight
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert all(p.requires_grad for p in fresh.parameters())
    if swapped:
        gptkern.swap(model)
    assert torch.equal(logits(fresh, tokens), logits(model, tokens))
    assert torch.equal(fresh.generate(tokens, 8, temperature=0), model.generate(tokens, 8, temperature=0))


def test_loading_allocates_nothing(tmp_path):
    model = gpt()
    gptkern.quantize(model)
    state = read(saved(model, tmp_path / "model.safetensors"))
    fresh = on_meta(gpt)
    with Made() as made:
        gptkern.load_quantized(fresh, state)
    pointers = {tensor.data_ptr() for tensor in state.values()}
    assert {tensor.data_ptr() for tensor in made.tensors} <= pointers
    assert {tensor.data_ptr() for tensor in fresh.state_dict().values()} == pointers


def state_dict_hooks(layer, seen):
    """One of each kind -> their handles."""
    return [
        layer._register_state_dict_hook(lambda module, *_: seen.append(("saved", type(module)))),
        layer.register_state_dict_pre_hook(lambda module, *_: seen.append(("saving", type(module)))),
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(("loading", type(module)))),
        layer._register_load_state_dict_pre_hook(
            lambda state_dict, *_: seen.append(("loading it", "first.int8_weight" in state_dict))
        ),
        layer.register_load_state_dict_post_hook(lambda module, _: seen.append(("loaded", type(module)))),
    ]


def test_state_dict_hooks_are_kept_and_can_still_be_removed():
    model, seen = Pair(), []
    handles = state_dict_hooks(model.first, seen)
    gptkern.quantize(model)
    gc.collect()
    state = model.state_dict()
    assert seen == [("saving", Int8Linear), ("saved", Int8Linear)]
    model.load_state_dict(state)
    assert seen[2:] == [("loading", Int8Linear), ("loading it", True), ("loaded", Int8Linear)]
    for handle in handles[1:]:
        handle.remove()
    del seen[:]
    model.load_state_dict(model.state_dict())
    assert [event for event, _ in seen] == ["saved"]

    fresh, seen = Pair(), []
    state_dict_hooks(fresh.first, seen)
    with pytest.raises(RuntimeError):
        gptkern.load_quantized(fresh, state | {"more": torch.ones(1)})
    del seen[:]
    gc.collect()
    fresh.load_state_dict(Pair().state_dict())
    assert [kind for event, kind in seen if event != "loading it"] == [torch.nn.Linear] * 2
    gptkern.load_quantized(fresh, state)
    assert [kind for event, kind in seen[3:] if event != "loading it"] == [Int8Linear] * 2


def test_a_model_with_weights_loses_them_and_keeps_the_rest():
    model = gpt()
    gptkern.quantize(model, "w8a16")
    fresh = gpt(dropout=0.1)
    fresh.blocks[0].attention.qkv.bias.requires_grad_(False)
    weights = [StorageWeakRef(block.attention.qkv.weight.untyped_storage()) for block in fresh.blocks]
    gptkern.load_quantized(fresh, model.state_dict(), "w8a16")
    assert all(weight.expired() for weight in weights)
    assert not fresh.blocks[0].attention.qkv.bias.requires_grad
    assert {fresh.get_submodule(name).mode for name in int8_names(fresh)} == {"w8a16"}
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("make", [gpt, lambda: on_meta(gpt)], ids=["float", "meta"])
@pytest.mark.parametrize("quantise_first", [False, True])
def test_training_flags_are_the_model_s(make, quantise_first):
    """All of them: in eval mode, and of one block that trains in it."""
    model, fresh = gpt(), make().eval()
    gptkern.quantize(model.train())
    fresh.blocks[1].train()
    if quantise_first:
        gptkern.quantize(fresh)
    gptkern.load_quantized(fresh, model.state_dict())
    assert {name for name, module in fresh.named_modules() if module.training} == {
        name for name, _ in fresh.named_modules() if name.startswith("blocks.1")
    }
    assert model.training


def test_the_report_says_what_is_int8_and_what_is_not():
    model, fresh = Pair(second=Pair()), Pair(second=Pair())
    gptkern.quantize(model, skip=["second.second"])
    fresh.first = Int8Linear.from_linear(fresh.first)
    report = gptkern.load_quantized(fresh, model.state_dict())
    assert report.quantized == [
        ("first", "Int8Linear", (6, 8), 96, 96, None), ("second.first", "Linear", (6, 8), 216, 96, None),
    ]  # fmt: skip
    assert report.skipped == [("second.second", "Linear", "it is float in the state_dict")]
    assert (report.model_bytes_before, report.model_bytes_after) == (96 + 216 + 140, 96 + 96 + 140)
    assert str(report).splitlines()[0] == "2 layers quantized, 1 skipped"


def test_what_was_skipped_is_float_again(tmp_path):
    model = gpt()
    gptkern.quantize(model, skip=["lm_head", "blocks.1"])
    fresh = on_meta(gpt)
    gptkern.load_quantized(fresh, read(saved(model, tmp_path / "model.safetensors")))
    assert int8_names(fresh) == int8_names(model) and len(int8_names(fresh)) == 4
    assert torch.equal(logits(fresh), logits(model))


def test_shared_layers_come_back_shared(tmp_path):
    def make():
        shared = torch.nn.Linear(6, 6)
        return torch.nn.Sequential(shared, torch.nn.Linear(6, 6), shared)

    model = make()
    gptkern.quantize(model)
    fresh = on_meta(make)
    gptkern.load_quantized(fresh, read(saved(model, tmp_path / "model.safetensors")))
    x = torch.randn(3, 6)
    assert fresh[0] is fresh[2] and torch.equal(fresh(x), model(x))


def test_another_dtype_is_the_file_s(tmp_path):
    model = gpt()
    gptkern.quantize(model)
    model.bfloat16()
    fresh = on_meta(gpt)
    gptkern.load_quantized(fresh, read(saved(model, tmp_path / "model.safetensors")))
    assert fresh.final_norm.weight.dtype == torch.bfloat16
    assert fresh.blocks[0].attention.qkv.weight_scale.dtype == torch.float32
    assert torch.equal(logits(fresh), logits(model))


def state_of_gpt(**changes):
    model = gpt()
    gptkern.quantize(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in (state | changes).items() if tensor is not None}


def quantised_pair():
    model = Pair()
    gptkern.quantize(model)
    return model


class WithBuffer(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(5.0), persistent=False)


REFUSED = {
    "model": (lambda: ("gpt", {}), TypeError, "model is a str"),
    "no mapping": (lambda: (gpt(), "model.safetensors"), TypeError, "state_dict is a str.*load_file"),
    "mode": (lambda: (gpt(), {}, "w4"), ValueError, "mode is 'w4'"),
    "a key too few": (lambda: (gpt(), state_of_gpt(**{"final_norm.bias": None})), RuntimeError, "final_norm.bias"),
    "a key too many": (lambda: (gpt(), state_of_gpt(more=torch.ones(1))), RuntimeError, "more"),
    "another shape": (lambda: (gpt(width=64), state_of_gpt()), RuntimeError, "size mismatch"),
    "no scales": (
        lambda: (gpt(), state_of_gpt(**{"blocks.0.attention.qkv.weight_scale": None})), RuntimeError, "weight_scale",
    ),
    "scales of 16 bits": (
        lambda: (gpt(), state_of_gpt(**{"blocks.0.attention.qkv.weight_scale": torch.ones(96).half()})),
        TypeError, "blocks.0.attention.qkv.weight_scale is torch.float16.*needs torch.float32",
    ),
    "codes that are none": (
        lambda: (gpt(), state_of_gpt(**{"blocks.0.attention.qkv.int8_weight": torch.ones(96, 32)})),
        TypeError, "blocks.0.attention.qkv.int8_weight is torch.float32.*needs torch.int8",
    ),
    "nothing int8": (
        lambda: (Pair(), Pair().state_dict()), ValueError, "nothing in state_dict is int8.*model.load_state_dict loads",
    ),
    "names of a wrapped model": (
        lambda: (gpt(), {f"module.{key}": value for key, value in state_of_gpt().items()}), ValueError,
        r"int8 under other names.*: it has module\.blocks\.0\.attention\.qkv\.int8_weight, and the model "
        r"blocks\.0\.attention\.qkv\.int8_weight; its keys need to be without 'module\.'$",
    ),
    "names of a model wrapped twice, in an older file": (
        lambda: (Pair(), {
            f"module._orig_mod.{key.replace('int8_weight', 'weight')}": value
            for key, value in quantised_pair().state_dict().items()
        }),
        ValueError, r"it has module\._orig_mod\.first\.weight, and the model first\.weight; .* 'module\._orig_mod\.'$",
    ),
    "a wrapped model": (
        lambda: (torch.nn.Sequential(Pair()), quantised_pair().state_dict()), ValueError,
        r"it has first\.int8_weight, and the model no layer of that name; its first is 0\.first$",
    ),
    "a layer's own state_dict": (
        lambda: (Pair(), quantised_pair().first.state_dict()), ValueError,
        r"it has int8_weight, and the model no layer of that name; its first is first$",
    ),
    "a state_dict in a dictionary": (
        lambda: (Pair(), {"optimizer": {"state": {}}, "model": quantised_pair().state_dict(), "step": 3}), ValueError,
        r"state_dict holds an? \w+ under 'model'; it needs .*, which state_dict\['model'\] may be$",
    ),
    "arrays": (
        lambda: (Pair(), {key: value.detach().numpy() for key, value in quantised_pair().state_dict().items()}),
        TypeError, r"first\.int8_weight is a numpy\.ndarray; it needs a tensor; .*scale is a numpy.ndarray; .* tensor$",
    ),
    "arrays of an older file": (
        lambda: (Pair(), {
            key.replace("int8_weight", "weight"): value.detach().numpy()
            for key, value in quantised_pair().state_dict().items()
        }),
        TypeError, r"first\.bias in state_dict is a numpy\.ndarray; it needs a tensor$",
    ),
    "a float weight for an int8 layer": (
        lambda: (quantised_pair(), {**quantised_pair().state_dict(), "second.weight": torch.zeros(5, 6)}),
        TypeError, "second.weight is torch.float32; the layer is int8 and needs second.int8_weight",
    ),
    "no linear layer": (
        lambda: (Pair(torch.nn.Sequential()), {"first.weight": torch.zeros(2, 2, dtype=torch.int8)}),
        TypeError, "first, which is a Sequential",
    ),
    "ties that differ": (
        lambda: (gpt(), state_of_gpt(**{"lm_head.weight": torch.zeros(61, 32)})), ValueError, "the model ties",
    ),
    "a buffer on meta": (
        lambda: (on_meta(WithBuffer), quantised_pair().state_dict()),
        RuntimeError, "table would stay on the meta device",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(what):
    make, error, message = REFUSED[what]
    model, *arguments = make()
    before = model
    if isinstance(model, torch.nn.Module):
        before = [(id(module), {**module._parameters, **module._buffers}) for module in model.modules()]
        before = [(key, {name: id(tensor) for name, tensor in tensors.items()}) for key, tensors in before]
    with pytest.raises(error, match=message):
        gptkern.load_quantized(model, *arguments)
    if isinstance(model, torch.nn.Module):
        after = [(id(module), {**module._parameters, **module._buffers}) for module in model.modules()]
        assert [(key, {name: id(tensor) for name, tensor in tensors.items()}) for key, tensors in after] == before
