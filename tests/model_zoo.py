"""The models that people have, small and with random weights: what tests/test_models.py swaps.

Each is called as `logits, loss = case.run(model, ids, targets, padding)`, padding being bool (batch, length), True at a
token, or None. All have LAYERS layers, HEADS heads and a vocabulary of VOCABULARY.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import NamedTuple

# Nothing here may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptkern.models import GPT, GPTConfig

try:
    import transformers
except ImportError:
    transformers = None

LAYERS, WIDTH, HEADS, CONTEXT, VOCABULARY = 2, 32, 4, 32, 61
PADDING, FIRST, LAST = 0, 1, 2  # tokens with a meaning
IGNORED = -100  # the target that no loss is taken of

if transformers is not None:
    transformers.logging.set_verbosity_error()


class Case(NamedTuple):
    """A model, and what a swap is to make of it.

    Attributes:
        build: (dropout probability) -> the model, in training mode.
        run: (model, ids, targets, padding) -> logits, loss.
        calls: operator -> calls in one forward of the swapped model.
        skipped: how many modules the report names as left alone.
        inexact: the operators that round otherwise than what the model computed in their place. With all others, the
            results are those of the same PyTorch operators, bit for bit.
        padding: the side on which a batch may be padded, or None where the model has no argument for it. On the left of
            a causal model, the first queries see no key: PyTorch's encoder gives NaN for the whole row in eval mode.
        grouped: whether query heads share keys and values. Where there is a mask, transformers copies these for each
            query head, and their gradients are then summed in another order.
    """

    name: str
    build: Callable[[float], nn.Module]
    run: Callable
    calls: dict[str, int]
    skipped: int = 0
    inexact: tuple[str, ...] = ()
    padding: str | None = "left"
    grouped: bool = False

    @property
    def is_transformers(self) -> bool:
        return self.run is run_transformers


# --- nanoGPT's style: a LayerNorm of its own without bias, the fused attention called inline --------------------------


class BiaslessLayerNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class InlineAttention(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.project = nn.Linear(WIDTH, WIDTH, bias=False)
        self.dropout = dropout

    def forward(self, x):
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for part in self.qkv(x).split(width, dim=2)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        return self.project(mixed.transpose(1, 2).contiguous().view(batch, length, width))


# --- minGPT's style: the attention written out in Python --------------------------------------------------------------


class ExplicitAttention(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.query, self.key, self.value, self.project = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention_dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x):
        batch, length, width = x.shape
        query, key, value = (
            part(x).view(batch, length, HEADS, width // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(-2, -1)) * (1.0 / math.sqrt(key.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        probabilities = self.attention_dropout(F.softmax(scores, dim=-1))
        return self.project((probabilities @ value).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, norm, attention, dropout: float):
        super().__init__()
        self.first_norm, self.second_norm = norm(WIDTH), norm(WIDTH)
        self.attention = attention(dropout)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attention(self.first_norm(x))
        return x + self.perceptron(self.second_norm(x))


class SmallGPT(nn.Module):
    """The frame around the blocks above."""

    def __init__(self, norm, attention, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(norm, attention, dropout) for _ in range(LAYERS))
        self.final_norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids, targets=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return with_loss(self.head(self.final_norm(x)), targets)


# --- PyTorch's own modules --------------------------------------------------------------------------------------------


class EncoderGPT(nn.Module):
    """nn.TransformerEncoder with a causal mask, as in PyTorch's tutorials."""

    def __init__(self, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, targets=None, padding=None):
        length = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(length, device=ids.device))
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        x = self.encoder(x, mask, None if padding is None else ~padding, is_causal=True)
        return with_loss(self.head(x), targets)


class MultiheadBlock(nn.Module):
    """A block around nn.MultiheadAttention, which asks for no weights."""

    def __init__(self, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout, batch_first=True)

    def forward(self, x, padding=None):
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        hidden = self.norm(x)
        padding = None if padding is None else ~padding
        return x + self.attention(hidden, hidden, hidden, padding, False, mask, is_causal=True)[0]


class MultiheadGPT(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(MultiheadBlock(dropout) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, targets=None, padding=None):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, padding)
        return with_loss(self.head(x), targets)


def with_loss(logits, targets):
    """logits (batch, length, vocabulary), and the mean cross-entropy where there are targets (batch, length)."""
    if targets is None:
        return logits, None
    return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)


# --- Calling them -----------------------------------------------------------------------------------------------------


def run_plain(model, ids, targets=None, padding=None):
    return model(ids, targets)


def run_padded(model, ids, targets=None, padding=None):
    return model(ids, targets, padding)


def run_transformers(model, ids, targets=None, padding=None):
    mask = None if padding is None else padding.long()
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    return with_loss(logits, targets)


def _transformers(config_class: str, attn_implementation: str | None = None, **fields):
    """A builder of a model of transformers; the fields that are None stand for the dropout."""

    def build(dropout: float) -> nn.Module:
        values = {name: dropout if value is None else value for name, value in fields.items()}
        config = getattr(transformers, config_class)(
            vocab_size=VOCABULARY, bos_token_id=FIRST, eos_token_id=LAST, pad_token_id=PADDING, **values
        )
        chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        return transformers.AutoModelForCausalLM.from_config(config, **chosen).train()

    return build


_GPT2 = dict(n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, n_positions=CONTEXT, attn_pdrop=None, resid_pdrop=0.0,
             embd_pdrop=0.0)  # fmt: skip
_LLAMA = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
              max_position_embeddings=CONTEXT, attention_dropout=None)  # fmt: skip

CASES = [
    Case(
        "gpt",
        lambda dropout: GPT(GPTConfig(VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS, dropout)),
        run_plain,
        {"attention": 2, "layer_norm": 5, "nonlinearity": 2, "cross_entropy": 1},
        padding=None,
    ),
    Case(
        "nanogpt",
        lambda dropout: SmallGPT(BiaslessLayerNorm, InlineAttention, dropout),
        run_plain,
        {"attention": 2, "layer_norm": 5, "nonlinearity": 2, "cross_entropy": 1},
        padding=None,
    ),
    Case(
        "mingpt",
        lambda dropout: SmallGPT(nn.LayerNorm, ExplicitAttention, dropout),
        run_plain,
        {"softmax": 2, "layer_norm": 5, "nonlinearity": 2, "cross_entropy": 1},
        skipped=2,
        padding=None,
    ),
    Case("encoder", EncoderGPT, run_padded, {"attention": 2, "layer_norm": 5, "cross_entropy": 1}, padding="right"),
    Case("multihead", MultiheadGPT, run_padded, {"attention": 2, "layer_norm": 2, "cross_entropy": 1}, padding="right"),
    Case(
        "gpt2",
        _transformers("GPT2Config", **_GPT2),
        run_transformers,
        {"attention": 2, "layer_norm": 5, "nonlinearity": 2},
        inexact=("nonlinearity",),
    ),
    Case(
        "gpt2-eager",
        _transformers("GPT2Config", "eager", **_GPT2),
        run_transformers,
        {"attention": 2, "layer_norm": 5, "nonlinearity": 2},
        inexact=("attention", "nonlinearity"),
    ),
    Case(
        "opt",
        _transformers("OPTConfig", hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=2 * WIDTH, dropout=0.0,
                      num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=CONTEXT,
                      attention_dropout=None),
        run_transformers,
        {"attention": 2, "layer_norm": 5},
    ),
    Case(
        "gpt_neox",
        _transformers("GPTNeoXConfig", rotary_pct=0.5, **_LLAMA),
        run_transformers,
        {"attention": 2, "layer_norm": 5, "rotary": 4, "nonlinearity": 2},
        inexact=("rotary",),
    ),
    Case(
        "gptj",
        _transformers("GPTJConfig", rotary_dim=4, **_GPT2),
        run_transformers,
        {"attention": 2, "layer_norm": 3, "rotary": 4, "nonlinearity": 2},
        inexact=("attention", "rotary", "nonlinearity"),
    ),
    Case(
        "gpt_bigcode",
        _transformers("GPTBigCodeConfig", **_GPT2),
        run_transformers,
        {"attention": 2, "layer_norm": 5, "nonlinearity": 2},
        grouped=True,
    ),
    Case(
        "llama",
        _transformers("LlamaConfig", num_key_value_heads=2, **_LLAMA),
        run_transformers,
        {"attention": 2, "rms_norm": 5, "rotary": 4, "nonlinearity": 2},
        inexact=("rotary",),
        grouped=True,
    ),
    Case(
        "qwen2",
        _transformers("Qwen2Config", num_key_value_heads=HEADS, **_LLAMA),
        run_transformers,
        {"attention": 2, "rms_norm": 5, "rotary": 4, "nonlinearity": 2},
        inexact=("rotary",),
    ),
]  # fmt: skip


def parameters(fast: tuple[str, ...]) -> list:
    """What a test is parametrised with: all models; those that are not named run in make test-deep alone."""
    missing = pytest.mark.skipif(transformers is None, reason="transformers is not installed")
    return [
        pytest.param(
            case,
            id=case.name,
            marks=[missing] * case.is_transformers + [pytest.mark.deep] * (case.name not in fast),
        )
        for case in CASES
    ]


PARAMETERS = parameters(fast=tuple(case.name for case in CASES))
# One model of each way in which swap gets at an operator: a module's twin and an inline call, softmax alone, PyTorch's
# encoder, attention by name, a method that is replaced, grouped heads with norm and rotary embedding of known code.
EACH_WAY = parameters(fast=("gpt", "mingpt", "encoder", "gpt2", "gptj", "llama"))
