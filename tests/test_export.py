"""To transformers' GPT-2 and back: the same logits, the same ids, whatever sizes, dtype and kind of file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from model_folders import (
    BPE,
    TEXTS,
    bpe,
    edited,
    logits,
    model,
    save_run,
    save_text_run,
    some_ids,
    transformers_gpt2,
)
from safetensors.torch import load_file, save_file

from gptkern.formatting import shown
from gptkern.models.gpt import GPT
from gptkern.training import gpt2_layout, model_files
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.errors import UserError
from gptkern.training.exporting import export
from gptkern.training.loading import load_model

# Sums of 48 products in another order: transformers multiplies by the transposed weight.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def same_parameters(a: GPT, b: GPT) -> None:
    for (name, parameter), other in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(parameter, other), name


# --- From transformers ------------------------------------------------------------------------------------------------

SIZES = {
    "one head": {"n_head": 1},
    "a head a number": {"n_head": 48},
    "bytes and an end": {"vocab_size": 257},
    "GPT-2's vocabulary": {"vocab_size": 50257, "n_layer": 1, "n_embd": 8, "n_head": 2},
    "a context of one": {"n_positions": 1},
    "an odd width, and more of everything": {"n_embd": 35, "n_head": 7, "n_layer": 3, "n_positions": 31},
    "an inner width that is said": {"n_inner": 192},
    "the other name of the same GELU": {"activation_function": "gelu_pytorch_tanh"},
    "no dropout": {"resid_pdrop": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.mark.parametrize("what", SIZES)
def test_a_model_of_transformers_gives_the_same_logits(tmp_path, what):
    theirs = transformers_gpt2(**SIZES[what])
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    config = theirs.config
    ids = some_ids(config.vocab_size, min(12, config.n_positions))
    torch.testing.assert_close(logits(loaded.model, ids), logits(theirs, ids), **CLOSE)
    assert loaded.model.config.dropout == config.resid_pdrop and not loaded.model.training
    assert loaded.model.lm_head.weight is loaded.model.token_embedding.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_read_into_float32(tmp_path, dtype):
    theirs = transformers_gpt2()
    theirs.to(dtype).save_pretrained(tmp_path)
    ids = some_ids(BPE)
    torch.testing.assert_close(logits(load_model(tmp_path).model, ids), logits(theirs.float(), ids), **CLOSE)


def test_a_model_in_several_files(tmp_path):
    theirs = transformers_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids = some_ids(BPE)
    torch.testing.assert_close(logits(load_model(tmp_path).model, ids), logits(theirs, ids), **CLOSE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = transformers_gpt2()
    folder = tmp_path_factory.mktemp("written")
    made.save_pretrained(folder)
    return made, folder


@pytest.fixture
def theirs(tmp_path, written):
    """(a model of transformers, a folder of its own with it)."""
    return written[0], shutil.copytree(written[1], tmp_path / "theirs")


def stored(folder, change) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})


def renamed(state: dict) -> dict:
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def with_masks(state: dict) -> dict:
    masks = {}
    for block in range(2):
        masks[f"h.{block}.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24).bool()
        masks[f"h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    return renamed(state) | masks


def head_alone(state: dict) -> dict:
    state = dict(state)
    return state | {"lm_head.weight": state.pop("transformer.wte.weight")}


def both(state: dict) -> dict:
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


LAYOUTS = {
    "no prefix": renamed,
    "the masks of old files": with_masks,
    "with a prefix, the masks of old files": lambda state: {
        f"transformer.{k}": v for k, v in with_masks(state).items()
    },
    "the embedding as the output weight": head_alone,
    "the embedding under both names": both,
    "both names, no prefix": lambda state: renamed(both(state)),
    "the output weight, no prefix": lambda state: renamed(head_alone(state)),
}


@pytest.mark.parametrize("what", LAYOUTS)
def test_every_way_in_which_such_files_are_written(theirs, what):
    made, folder = theirs
    stored(folder, LAYOUTS[what])
    ids = some_ids(BPE)
    torch.testing.assert_close(logits(load_model(folder).model, ids), logits(made, ids), **CLOSE)


def test_the_transformer_without_its_head(tmp_path):
    made = transformers_gpt2()
    made.transformer.save_pretrained(tmp_path)
    assert not any(name.startswith("transformer.") for name in load_file(tmp_path / "model.safetensors"))
    ids = some_ids(BPE)
    torch.testing.assert_close(logits(load_model(tmp_path).model, ids), logits(made, ids), **CLOSE)


TENSORS = {
    "an output weight of its own": (
        lambda state: state | {"lm_head.weight": state["transformer.wte.weight"] + 1},
        "transformer.wte.weight and lm_head.weight differ; they need to be the same",
    ),
    "a head for something else": (
        lambda state: state | {"score.weight": torch.ones(2, 48)},
        "score.weight in model.safetensors is none of its parameters",
    ),
    "one missing": (
        lambda state: {name: tensor for name, tensor in state.items() if "h.1.mlp.c_fc.bias" not in name},
        "transformer.h.1.mlp.c_fc.bias not found in model.safetensors",
    ),
    "no embedding": (
        lambda state: {name: tensor for name, tensor in state.items() if "wte" not in name},
        "transformer.wte.weight not found",
    ),
    "linear in place of Conv1D": (
        lambda state: state | {"transformer.h.0.mlp.c_fc.weight": torch.ones(192, 48)},
        "transformer.h.0.mlp.c_fc.weight is (192, 48); it needs (48, 192)",
    ),
    "int8": (
        lambda state: state | {"transformer.h.0.mlp.c_fc.weight": torch.ones(48, 192, dtype=torch.int8)},
        "transformer.h.0.mlp.c_fc.weight in model.safetensors is int8",
    ),
    "float8": (
        lambda state: state | {"transformer.wpe.weight": torch.ones(24, 48).to(torch.float8_e5m2)},
        "transformer.wpe.weight is F8_E5M2; it needs floating point",
    ),
    "two prefixes": (
        lambda state: state | {"wpe.weight": torch.ones(24, 48)},
        "wpe.weight in model.safetensors is none of its parameters",
    ),
    "a mask of a block that there is not, under another name": (
        lambda state: state | {"transformer.h.x.attn.bias": torch.ones(1)},
        "transformer.h.x.attn.bias in model.safetensors is none of its parameters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_not_this_gpts_are_named(theirs, what):
    change, message = TENSORS[what]
    stored(theirs[1], change)
    with pytest.raises(UserError) as refused:
        load_model(theirs[1], option="--from")
    assert str(refused.value).startswith(f"--from {shown(str(theirs[1]))} is no checkpoint of this GPT: ")
    assert message in str(refused.value)


CONFIG = [
    ({"model_type": "llama"}, 'model_type is "llama"; it needs "gpt2"'),
    ({"model_type": ...}, 'model_type is null; it needs "gpt2"'),
    ({"activation_function": "gelu"}, 'activation_function is "gelu"; this GPT needs gelu_new'),
    ({"activation_function": ["gelu_new"]}, "activation_function is a list; this GPT needs gelu_new"),
    ({"n_inner": 100}, "n_inner is 100; this GPT needs 192, 4 · n_embd"),
    ({"n_inner": True}, "n_inner is true; this GPT needs 192"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; this GPT needs 1e-05"),
    ({"layer_norm_epsilon": "1e-5"}, 'layer_norm_epsilon is "1e-5"; this GPT needs 1e-05'),
    ({"scale_attn_weights": False}, "scale_attn_weights is false; this GPT needs true"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true; this GPT needs false"),
    ({"reorder_and_upcast_attn": 1}, "reorder_and_upcast_attn is 1; this GPT needs false"),
    ({"add_cross_attention": True}, "add_cross_attention is true; this GPT needs false"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is false; this GPT needs true"),
    (
        {"quantization_config": {"quant_method": "gptkern"}},
        "quantization_config is an object; this GPT needs a model in",
    ),
    (
        {"auto_map": {"AutoModel": "evil.Model"}},
        "auto_map is an object; this GPT needs a model that transformers knows",
    ),
    ({"attn_pdrop": 0.2}, "attn_pdrop is 0.2; this GPT needs 0.1, as resid_pdrop"),
    ({"resid_pdrop": 1, "embd_pdrop": 1, "attn_pdrop": 1}, "dropout is 1; it needs to be at least 0 and below 1"),
    ({"resid_pdrop": None}, "resid_pdrop is null; it needs a number"),
    ({"n_embd": "48"}, 'n_embd is "48"; it needs a whole number'),
    ({"n_embd": 48.0}, "n_embd is 48.0; it needs a whole number"),
    ({"n_layer": True}, "n_layer is true; it needs a whole number"),
    ({"n_layer": 0}, "n_layer is 0; it needs to be at least 1"),
    ({"n_head": -1}, "n_head is -1; it needs to be at least 1"),
    ({"n_head": 5}, "n_embd is 48; it needs to be a multiple of n_head, 5"),
    ({"n_layer": 3}, "layers is 3; it needs to be the number of blocks in model.safetensors, 2"),
    ({"n_layer": 10**15}, f"layers is {10**15}; it needs to be the number of blocks"),
    ({"n_layer": 1}, "transformer.h.1.attn.c_attn.bias, transformer.h.1.attn.c_attn.weight, transformer.h.1."),
    ({"n_positions": ...}, "transformer.wpe.weight is (24, 48); it needs (1024, 48)"),
    ({"vocab_size": 10**4000}, "vocab_size is a number of more than 64 bits; it needs to be at least 1"),
    ({"vocab_size": 2**62}, "transformer.wte.weight is (300, 48); it needs (4611686018427387904, 48)"),
    ({"n_embd": 2**61, "n_head": 1}, "and 25 more"),
]


@pytest.mark.parametrize("changes, message", CONFIG, ids=lambda value: str(value)[:40])
def test_what_this_gpt_does_not_compute_is_refused_by_name(theirs, changes, message):
    edited(theirs[1] / "config.json", **changes)
    with pytest.raises(UserError) as refused:
        load_model(theirs[1])
    assert message in str(refused.value) and len(str(refused.value)) < 600


def test_the_other_names_of_sizes_are_read(theirs):
    edited(
        theirs[1] / "config.json", n_embd=..., n_layer=..., n_head=..., n_positions=..., hidden_size=48,
        num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=24,
    )  # fmt: skip
    assert load_model(theirs[1]).model.config.heads == 3


# --- To transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"width": 35, "heads": 7, "layers": 1}, {"vocab_size": 331, "dropout": 0.25}])
def test_transformers_loads_a_run_and_gives_the_same_logits(tmp_path, changes):
    from transformers import AutoModelForCausalLM

    ours = model(**changes)
    save_run(tmp_path / "run", ours)
    export(load_model(tmp_path / "run"), tmp_path / "out")
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    ids = some_ids(ours.config.vocab_size)
    torch.testing.assert_close(logits(theirs.eval(), ids), logits(ours, ids), **CLOSE)
    assert theirs.config.attn_pdrop == ours.config.dropout and theirs.config.eos_token_id == bpe().end_of_text
    # And back: the same bits, by way of what they write themselves.
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        loaded = load_model(tmp_path / folder)
        assert loaded.model.config == ours.config
        same_parameters(loaded.model, ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("planes", [False, True])
def test_16_bits_are_rounded_once_and_kept(tmp_path, dtype, planes):
    ours = model()
    save_run(tmp_path / "run", ours)
    done = export(load_model(tmp_path / "run"), tmp_path / "out", dtype, planes=planes)
    assert done.raw == 2 * ours.parameter_count()
    assert done.stored == (tmp_path / "out" / done.weights).stat().st_size
    assert (done.ratio < 0.95) == planes
    if not planes:
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert {str(tensor.dtype) for tensor in written.values()} == {f"torch.{dtype}"}
    rounded = model().to(getattr(torch, dtype)).float()
    same_parameters(load_model(tmp_path / "out").model, rounded)
    # Once more, and nothing is lost any more.
    export(load_model(tmp_path / "out"), tmp_path / "again", dtype, planes=not planes)
    same_parameters(load_model(tmp_path / "again").model, rounded)


def test_byte_planes_are_no_model_to_transformers(tmp_path):
    """Rather than one of random weights."""
    from transformers import AutoModelForCausalLM

    save_run(tmp_path / "run", model())
    export(load_model(tmp_path / "run"), tmp_path / "out", planes=True)
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "value, dtype, refused", [(7e4, "float16", True), (7e4, "bfloat16", False), (6e4, "float16", False)]
)
def test_what_a_dtype_does_not_hold_is_named(tmp_path, value, dtype, refused):
    ours = model()
    ours.blocks[1].perceptron.project.weight.data[3, 5] = -value
    save_run(tmp_path / "run", ours)
    loaded = load_model(tmp_path / "run")
    if not refused:
        assert export(loaded, tmp_path / "out", dtype).dtype == dtype
        return
    with pytest.raises(
        UserError, match=r"--dtype float16: blocks\.1\.perceptron\.project\.weight holds 70000; it needs at"
    ):
        export(loaded, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_a_place_in_the_file_for_each_parameter():
    """Which the shapes are of, too: nothing is made to know them."""
    ours = model()
    shapes = {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()}
    assert model_files.parameter_shapes(ours.config) == shapes
    names = {name for name, _ in transformers_gpt2().named_parameters()}
    assert {place.names[0] for place in gpt2_layout.places(ours.config).values()} == names


def test_an_empty_model_is_tied_and_draws_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = model_files.empty_model(model().config)
    torch.manual_seed(0)
    assert made.lm_head.weight is made.token_embedding.weight and not made.lm_head.weight.is_meta
    made = model_files.empty_model(made.config)
    assert torch.equal(torch.get_rng_state(), before)


# --- Tokenizers -------------------------------------------------------------------------------------------------------

ODD = [
    "", " ", "  a  b\t\n\r\n", "é e\u0301 ﬁ İ", "😀👩‍👩‍👧🇩🇪", "日本語 한국어 العربية",
    "\x00\x01\x7f", "\u2028\ufeff\ufffd", "a" * 300, "don't we'll I'm 123 4567", "<|endof", *TEXTS[:3],
]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "bytes", "bytes and an end"])
def test_transformers_makes_the_same_ids(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = bpe() if kind == "bpe" else bytes_tokenizer(end_of_text=kind != "bytes")
    ours = model(vocab_size=tokenizer.vocab_size)
    save_run(tmp_path / "run", ours, tokenizer)
    export(load_model(tmp_path / "run"), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ODD:
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist(), text
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == ours.config.context
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text
    if kind != "bpe":
        assert theirs("é")["input_ids"] == [0xC3, 0xA9]
    # Both of ours, from the folder and by way of what they write.
    theirs.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "again" / "model.safetensors").write_bytes((tmp_path / "out" / "model.safetensors").read_bytes())
    for folder in ("out", "again"):
        back = load_model(tmp_path / folder).tokenizer
        assert back.same_ids(tokenizer) and tokenizer.same_ids(back), folder


def test_every_byte_is_a_token_and_none_is_another(tmp_path):
    from tokenizers import Tokenizer

    from gptkern.training import bytes_file

    theirs = Tokenizer.from_str(bytes_file.text(end_of_text=True))
    for code in [*range(0x800), 0xFFFD, 0x10FFFF]:
        assert theirs.encode(chr(code), add_special_tokens=False).ids == list(chr(code).encode())
    assert theirs.encode("<|endoftext|>").ids == [256]
    content = json.loads(bytes_file.text(end_of_text=False))
    assert bytes_file.recognised(content).vocab_size == 256
    changed = json.loads(json.dumps(content))
    changed["model"]["vocab"] |= {"a": 98, "b": 97}
    others = [
        {}, content | {"model": None}, content | {"normalizer": {"type": "NFC"}}, changed,
        content | {"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}},
        content | {"added_tokens": [{"id": 256, "content": "</s>"}]},
        content | {"truncation": {"max_length": 3}},
    ]  # fmt: skip
    assert [bytes_file.recognised(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize("end_of_text", [False, True])
def test_a_run_over_bytes_goes_there_and_back(tmp_path, end_of_text):
    ours = model(vocab_size=256 + end_of_text)
    save_text_run(tmp_path / "run", ours, end_of_text)
    export(load_model(tmp_path / "run"), tmp_path / "out")
    back = load_model(tmp_path / "out")
    assert back.tokenizer.kind == "bytes" and back.tokenizer.end_of_text == (256 if end_of_text else None)
    same_parameters(back.model, ours)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["eos_token_id"] == content["bos_token_id"] == (256 if end_of_text else None)
    assert content["gptkern"]["step"] == 7
