"""Checkpoints that do not fit: one line that names the key, what it is and what it needs to be."""

from __future__ import annotations

import json

import pytest
import torch
from quantized_models import SMALL, gpt
from safetensors.torch import load_file, save_file

import gptkern
from gptkern import cli
from gptkern.commands import UserError, checkpoints


def int8(_):
    model = gpt()
    gptkern.quantize(model)
    return {key: value.clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}


PARAMETERS = {
    "int8": (int8, r"blocks\.0\.attention\.project\.int8_weight, .*, and 5 more in .* is int8; .*load_quantized"),
    "int8 of an older file": (
        lambda _: {key.replace("int8_weight", "weight"): value for key, value in int8(_).items()},
        r"blocks\.0\.attention\.project\.weight, .* is int8; .*load_quantized",
    ),
    "one of another shape": (
        lambda state: state | {"final_norm.weight": torch.ones(33)},
        r"final_norm\.weight is \(33,\); it needs \(32,\)$",
    ),
    "one of no float": (
        lambda state: state | {"final_norm.weight": torch.ones(32, dtype=torch.int64)},
        r"final_norm\.weight is I64; it needs floating point$",
    ),
    "scaled float8": (
        lambda state: state | {"final_norm.weight": torch.ones(32).to(torch.float8_e4m3fn)},
        r"final_norm\.weight is F8_E4M3; it needs floating point$",
    ),
    "one too few": (
        lambda state: {key: value for key, value in state.items() if key != "final_norm.bias"},
        r"final_norm\.bias not found in model\.safetensors$",
    ),
    "one too many": (lambda state: state | {"more.weight": torch.ones(3)}, r"more\.weight in .* is none of its"),
}  # fmt: skip

SIZES = {
    "another width": (
        lambda sizes: sizes | {"width": 64},
        r"project\.bias is \(32,\); it needs \(64,\); .*and 25 more$",
    ),
    "a width that no memory holds": (
        lambda sizes: sizes | {"width": 2**24},
        rf"project\.bias is \(32,\); it needs \({2**24},\); .*and 25 more$",
    ),
    "a width that no tensor has": (
        lambda sizes: sizes | {"width": 2**40},
        rf"project\.bias is \(32,\); it needs \({2**40},\); .*and 25 more$",
    ),
    "a vocabulary that no tensor has": (
        lambda sizes: sizes | {"vocab_size": 2**60},
        rf"lm_head\.weight is \(61, 32\); it needs \({2**60}, 32\)$",
    ),
    "a context past 64 bits": (
        lambda sizes: sizes | {"context": 10**30},
        r"context is a number of more than 64 bits; it needs a size that a tensor can have$",
    ),
    "more layers than the parameters": (
        lambda sizes: sizes | {"layers": 10**12},
        rf"layers is {10**12}; it needs to be the number of blocks in model\.safetensors, 2$",
    ),
    "a size too few": (lambda sizes: {"width": 32}, "has no context, heads, layers, and 1 more$"),
    "another model's": (lambda sizes: sizes | {"n_embd": 3}, "is of another model, it has n_embd$"),
    "a text": (lambda sizes: sizes | {"width": "32"}, 'width is "32"; it needs a number, a whole one$'),
    "nothing": (lambda sizes: sizes | {"dropout": None}, "dropout is null; it needs a number$"),
    "a list": (lambda sizes: [32], 'config.json has no "model" with its sizes$'),
}


@pytest.mark.parametrize("what", [*PARAMETERS, *SIZES])
def test_what_does_not_fit_is_named(tmp_path, capsys, what):
    checkpoints.save(gpt(), tmp_path)
    if what in PARAMETERS:
        change, message = PARAMETERS[what]
        save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    else:
        change, message = SIZES[what]
        (tmp_path / "config.json").write_text(json.dumps({"model": change(SMALL | {"dropout": 0.0})}))
    with pytest.raises(UserError, match=rf"is no checkpoint of this GPT: .*{message}"):
        checkpoints.load(tmp_path, torch.device("cpu"))
    assert cli.main(["generate", str(tmp_path), "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


FILES = {
    "parameters cut off": ("model.safetensors", lambda content: content[:-100]),
    "parameters of no byte": ("model.safetensors", lambda content: b""),
    "a header cut off": ("model.safetensors", lambda content: content[:40]),
    "sizes cut off": ("config.json", lambda content: content[:-20]),
    "sizes of no byte": ("config.json", lambda content: b""),
    "sizes that are no text": ("config.json", lambda content: b"\xff\xfe" + content),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, what):
    name, change = FILES[what]
    checkpoints.save(gpt(), tmp_path)
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    assert cli.main(["generate", str(tmp_path), "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is no checkpoint of this GPT: {name} " in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_float_dtype_loads(tmp_path, dtype):
    model = gpt()
    checkpoints.save(model.to(dtype), tmp_path)
    loaded = checkpoints.load(tmp_path, torch.device("cpu"))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.float()), key
