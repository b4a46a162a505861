"""GPT-2 as transformers has it: names, transposed weights and config.json, to and from this GPT.

    transformers                                  here
    transformer.wte.weight, lm_head.weight        token_embedding.weight, which is lm_head.weight too
    transformer.wpe.weight                        position_embedding.weight
    transformer.h.N.ln_1, .ln_2                   blocks.N.attention_norm, .perceptron_norm
    transformer.h.N.attn.c_attn, .c_proj          blocks.N.attention.qkv, .project         weights transposed
    transformer.h.N.mlp.c_fc, .c_proj             blocks.N.perceptron.expand, .project     weights transposed
    transformer.ln_f                              final_norm

A weight of transformers' Conv1D is (in, out) where that of a linear layer is (out, in). Files of GPT2Model have no
"transformer.", and old ones hold the causal mask of each block, attn.bias and attn.masked_bias, which nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.model_files import LARGEST, Place, parameter_shapes
from gptkern.training.tensor_files import said

PREFIX = "transformer."

_OUTSIDE = {
    "token_embedding.weight": "wte.weight", "position_embedding.weight": "wpe.weight",
    "final_norm.weight": "ln_f.weight", "final_norm.bias": "ln_f.bias",
}  # fmt: skip
_INSIDE = {
    "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.project": "attn.c_proj",
    "perceptron_norm": "ln_2", "perceptron.expand": "mlp.c_fc", "perceptron.project": "mlp.c_proj",
}  # fmt: skip
_WITH_HEAD, _HEAD = "GPT2ForSequenceClassification", "score.weight"
_MASK = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")

# What this GPT computes, of what a GPT2Config can say: key -> (values that are this, in words).
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_function": (("gelu_new", "gelu_pytorch_tanh"), "gelu_new, GELU in its tanh form"),
    "layer_norm_epsilon": ((1e-5,), "1e-05"),
    "scale_attn_weights": ((True,), "true"),
    "scale_attn_by_inverse_layer_idx": ((False,), "false"),
    "reorder_and_upcast_attn": ((False,), "false"),
    "add_cross_attention": ((False,), "false"),
    "tie_word_embeddings": ((True,), "true: the output weight is the embedding's"),
    "is_encoder_decoder": ((False,), "false"),
    "pruned_heads": (({}, None), "none"),
    "quantization_config": ((None,), "a model in floating point"),
    "auto_map": ((None,), "a model that transformers knows, for code of others is not run"),
}
# GPT2Config's defaults, of the values that are read here: a config.json may leave them out.
_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
_OTHER_NAMES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_DROPOUT = 0.1


def is_config(content: dict[str, Any]) -> bool:
    """Whether a config.json is one of transformers."""
    return "model_type" in content or "architectures" in content


def config_of(content: dict[str, Any]) -> GPTConfig:
    """The sizes that a config.json of transformers says.

    Raises:
        ValueError, TypeError: it is of another model than GPT-2, or of one that this GPT does not compute; the message
            names the key, what it is and what it needs to be.
    """
    if content.get("model_type") != "gpt2":
        raise ValueError(f'config.json: model_type is {said(content.get("model_type"))}; it needs "gpt2"')
    content = {_OTHER_NAMES.get(key, key): value for key, value in content.items()}
    sizes = {}
    for name, default in _SIZES.items():
        value = sizes[name] = content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"config.json: {name} is {said(value)}; it needs a whole number")
    for key, (values, needs) in _NEEDED.items():
        if key in content and content[key] not in values:
            raise ValueError(f"config.json: {key} is {said(content[key])}; this GPT needs {needs}")
    inner = content.get("n_inner")
    if inner is not None and inner != 4 * sizes["n_embd"]:
        raise ValueError(f"config.json: n_inner is {said(inner)}; this GPT needs {4 * sizes['n_embd']}, 4 · n_embd")
    dropouts = {name: content.get(name, _DROPOUT) for name in _DROPOUTS}
    for name, value in dropouts.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"config.json: {name} is {said(value)}; it needs a number")
        if value != dropouts[_DROPOUTS[0]]:
            needs = f"{said(dropouts[_DROPOUTS[0]])}, as {_DROPOUTS[0]}: there is one dropout"
            raise ValueError(f"config.json: {name} is {said(value)}; this GPT needs {needs}")
    # As GPTConfig itself would say it, but in the file's words.
    for name, value in sizes.items():
        if not 1 <= value <= LARGEST:
            raise ValueError(f"config.json: {name} is {said(value)}; it needs to be at least 1, and a tensor's size")
    width, heads = sizes["n_embd"], sizes["n_head"]
    if width % heads:
        raise ValueError(f"config.json: n_embd is {width}; it needs to be a multiple of n_head, {said(heads)}")
    return GPTConfig(
        sizes["vocab_size"], sizes["n_positions"], sizes["n_layer"], width, heads, dropout=dropouts[_DROPOUTS[0]]
    )


def labels_of(content: dict[str, Any]) -> tuple[str, ...]:
    """Of a GPT2ForSequenceClassification's config.json, in their order; none of them of another model.

    Raises:
        ValueError: they are none.
    """
    if content.get("architectures") != [_WITH_HEAD]:
        return ()
    given = content.get("id2label")
    labels = [given.get(str(number)) for number in range(len(given))] if isinstance(given, dict) else []
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise ValueError(f"config.json: id2label is {said(given)}; it needs a label for each number from 0 on")
    return tuple(labels)


def config_json(config: GPTConfig, dtype: str, end_of_text: int | None, labels: Sequence[str] = ()) -> dict[str, Any]:
    """What transformers' config.json of a GPT says; `labels` of one with a head."""
    numbers = {label: number for number, label in enumerate(labels)}
    head = {
        "id2label": {str(number): label for label, number in numbers.items()}, "label2id": numbers,
        # Which of a padded row's tokens is the last one, transformers tells by it.
        "pad_token_id": end_of_text,
    }  # fmt: skip
    return (head if labels else {}) | {
        "architectures": [_WITH_HEAD if labels else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **{name: config.dropout for name in _DROPOUTS},
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
    }


def places(config: GPTConfig, prefix: str = PREFIX) -> dict[str, Place]:
    """Parameter of this GPT -> where files of transformers have it."""
    found = {}
    for name in parameter_shapes(config):
        if name in _OUTSIDE:
            found[name] = Place((prefix + _OUTSIDE[name],))
            continue
        _, block, inside = name.split(".", 2)
        module, part = inside.rsplit(".", 1)
        transposed = part == "weight" and not module.endswith("norm")
        found[name] = Place((f"{prefix}h.{block}.{_INSIDE[module]}.{part}",), transposed)
    embedding = found["token_embedding.weight"].names
    return found | {"token_embedding.weight": Place((*embedding, "lm_head.weight"))}


def prefix_of(names: Any) -> str:
    """What a file's names of the transformer's tensors begin with."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def is_mask(name: str) -> bool:
    """Whether a tensor is a block's causal mask, which older files hold."""
    return _MASK.fullmatch(name) is not None


def tensors_of(model: GPT, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters as transformers has them, on the CPU; the embedding once, as wte.

    Raises:
        ValueError: a value is finite, and not in that dtype; the message names the parameter.
    """
    where = places(model.config) | {_HEAD: Place((_HEAD,))}
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu")
        cast = (value.T if where[name].transposed else value).to(dtype).contiguous()
        if bool((cast.isinf() & (value.T if where[name].transposed else value).isfinite()).any()):
            largest = float(value[value.isfinite()].abs().max())
            raise ValueError(
                f"{name} holds {largest:g}; it needs at most {torch.finfo(dtype).max:g}, {dtype}'s largest"
            )
        tensors[where[name].names[0]] = cast
    return tensors
