"""The reference GPT, in stock PyTorch: a decoder-only transformer as in GPT-2 and GPT-3.

    x = token_embedding[ids] + position_embedding[0 … length-1]
    for each block:
        x = x + project(attention(LayerNorm(x)))        causal self-attention, heads side by side
        x = x + project(GELU(expand(LayerNorm(x))))     the perceptron, four times as wide inside
    logits = LayerNorm(x) @ token_embedding^T           the output weight is the embedding's

It imports nothing of gptkern: it is the model that `gptkern.swap` is shown and tested on.

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019 (GPT-2); Brown et al.,
"Language Models are Few-Shot Learners", 2020 (GPT-3, arXiv:2005.14165), table 2.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02  # GPT-2's

BYTES = 256  # a vocabulary of bytes needs no tokenizer
GPT2_VOCABULARY = 50257


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The sizes of a GPT.

    Args:
        vocab_size: number of tokens.
        context: the most tokens that the model sees at once.
        layers: number of blocks. width: size of a token's vector. heads: attention heads; heads divide the width.
        dropout: of the embeddings, the attention weights and both residual branches, while training.

    Raises:
        ValueError: a size is not positive, the heads do not divide the width, or the dropout is not in [0, 1).
    """

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    dropout: float = 0.0

    def __post_init__(self):
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)}; it needs to be at least 1")
        if self.width % self.heads != 0:
            raise ValueError(f"GPTConfig: width is {self.width}; it needs to be a multiple of heads, {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"GPTConfig: dropout is {self.dropout}; it needs to be at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def preset(cls, name: str, **changes) -> GPTConfig:
        """The sizes of a known model, `changes` applied: `GPTConfig.preset("gpt2", vocab_size=256)`.

        Raises:
            ValueError: no preset has this name.
        """
        if name not in PRESETS:
            raise ValueError(f"GPTConfig.preset got {name!r}; it needs one of {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)


def _gpt2(layers: int, width: int, heads: int) -> GPTConfig:
    return GPTConfig(GPT2_VOCABULARY, context=1024, layers=layers, width=width, heads=heads)


def _gpt3(layers: int, heads: int, head_dim: int) -> GPTConfig:
    return GPTConfig(GPT2_VOCABULARY, context=2048, layers=layers, width=heads * head_dim, heads=heads)


# The GPT-3 sizes are those of table 2.1, all attention dense (the paper alternates dense and banded layers).
# Two of its rows contradict themselves, as heads x head_dim is not the width there. 1.3B is printed with 24 heads of
# 128 and width 2048: 16 heads are meant, which give 1.3e9 parameters. 13B is printed with width 5140 and 40 heads of
# 128: 5120 is taken here, as the public models of that size do.
PRESETS = {
    "nano": GPTConfig(BYTES, context=256, layers=4, width=128, heads=4),
    "gpt2": _gpt2(layers=12, width=768, heads=12),
    "gpt2-medium": _gpt2(layers=24, width=1024, heads=16),
    "gpt2-large": _gpt2(layers=36, width=1280, heads=20),
    "gpt2-xl": _gpt2(layers=48, width=1600, heads=25),
    "gpt3-125M": _gpt3(layers=12, heads=12, head_dim=64),
    "gpt3-350M": _gpt3(layers=24, heads=16, head_dim=64),
    "gpt3-760M": _gpt3(layers=24, heads=16, head_dim=96),
    "gpt3-1.3B": _gpt3(layers=24, heads=16, head_dim=128),
    "gpt3-2.7B": _gpt3(layers=32, heads=32, head_dim=80),
    "gpt3-6.7B": _gpt3(layers=32, heads=32, head_dim=128),
    "gpt3-13B": _gpt3(layers=40, heads=40, head_dim=128),
    "gpt3-175B": _gpt3(layers=96, heads=96, head_dim=128),
}


class Attention(nn.Module):
    """Causal self-attention: a token attends to itself and to those before it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads = config.heads
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim)
        # three views, each (batch, heads, length, head_dim): nothing is copied
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout_p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout_p)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)  # (batch, length, width), heads side by side
        return self.residual_dropout(self.project(mixed))


class Perceptron(nn.Module):
    """Two linear layers with GELU (the tanh form, as in GPT-2) between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.activation = nn.GELU(approximate="tanh")
        self.project = nn.Linear(4 * config.width, config.width)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual_dropout(self.project(self.activation(self.expand(x))))


class Block(nn.Module):
    """Attention, then the perceptron, each on a normalised input and added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.perceptron_norm = nn.LayerNorm(config.width)
        self.perceptron = Perceptron(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.perceptron(self.perceptron_norm(x))


class GPT(nn.Module):
    """The language model: token ids in, logits of the next token out."""

    recompute_every: int | None = None  # set by `recompute`

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = self.token_embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Two residual branches a block are summed up, so that many times the variance of one.
        for block in self.blocks:
            for project in (block.attention.project, block.perceptron.project):
                nn.init.normal_(project.weight, std=INIT_STD / math.sqrt(2 * self.config.layers))

    def parameter_count(self) -> int:
        """Number of parameters; the embedding that is also the output weight counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def recompute(self, every: int | None) -> None:
        """Keep of the first block and every `every`-th after it the input alone; the backward computes the rest again.

        Less memory for more time; dropout draws the same numbers again, so that loss and gradients stay bit for bit
        what they are. 1 is every block, None is none of them.

        Raises:
            ValueError: it is below 1.
        """
        if every is not None and every < 1:
            raise ValueError(f"GPT.recompute: every is {every}; it needs to be at least 1, or None")
        self.recompute_every = every

    def forward(
        self, ids: torch.Tensor, targets: torch.Tensor | None = None, *, head: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits of the next token at each position, and the loss where targets are given.

        Args:
            ids: (batch, length), integer, length at most the context.
            targets: (batch, length), the token that follows each; -100 is left out of the loss.
            head: False: in place of the logits what `lm_head` would be given, (batch, length, width), for a loss that
                makes the logits itself; without targets.

        Returns:
            logits (batch, length, vocab_size), and the mean cross-entropy in nats (float32) or None.

        Raises:
            ValueError: ids are not two-dimensional, longer than the context, or of another shape than the targets;
                targets are given, and no head.
        """
        if targets is not None and not head:
            raise ValueError("GPT: head is False and targets are given; their loss needs the head")
        if targets is not None and targets.shape != ids.shape:
            raise ValueError(f"GPT: targets have shape {tuple(targets.shape)}; they need ids', {tuple(ids.shape)}")
        hidden = self.features(ids)
        if not head:
            return hidden, None
        logits = self.lm_head(hidden)  # (batch, length, vocab_size)
        if targets is None:
            return logits, None
        # (batch * length, vocab_size) against (batch * length,)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """The final norm's output, (batch, length, width). Raises as `forward`."""
        if ids.dim() != 2:
            raise ValueError(f"GPT: ids have shape {tuple(ids.shape)}; they need two dimensions, (batch, length)")
        length = ids.shape[1]
        if length > self.config.context:
            raise ValueError(f"GPT: ids have length {length}; the context is {self.config.context}")
        positions = torch.arange(length, device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (batch, length, width)
        x = self.embedding_dropout(x)
        every = self.recompute_every if torch.is_grad_enabled() else None
        for index, block in enumerate(self.blocks):
            recomputed = every is not None and index % every == 0
            x = checkpoint(block, x, use_reentrant=False) if recomputed else block(x)
        return self.final_norm(x)

    @torch.no_grad()
    def generate(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue each row of ids, a token at a time, in eval mode (the mode is put back afterwards).

        Args:
            ids: (batch, length), length at least 1; what lies further back than the context is not seen.
            max_new_tokens: how many tokens are added.
            temperature: the logits are divided by it; 0 takes the likeliest token each time.
            top_k: only the k likeliest tokens can be drawn; None for all.
            generator: the source of randomness, on the device of ids; None for PyTorch's default.

        Returns:
            (batch, length + max_new_tokens).

        Raises:
            ValueError: ids are empty, or temperature, top_k or max_new_tokens is out of range.
        """
        return torch.cat([ids, *self.stream(ids, max_new_tokens, temperature, top_k, generator)], dim=1)

    def stream(
        self,
        ids: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """As `generate`, of which the arguments and errors are: each token, (batch, 1), as soon as it is drawn.

        The model is in eval mode from the first token until the iterator is exhausted or closed.
        """
        if ids.dim() != 2 or ids.shape[1] < 1:
            raise ValueError(f"generate: ids have shape {tuple(ids.shape)}; they need (batch, length), length >= 1")
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; it needs to be at least 0")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"generate: temperature is {temperature}; it needs to be at least 0 and finite")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}; it needs to be at least 1, or None for all tokens")
        return self._tokens(ids, max_new_tokens, temperature, top_k, generator)

    @torch.no_grad()
    def _tokens(self, ids, max_new_tokens, temperature, top_k, generator) -> Iterator[torch.Tensor]:
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                ids = ids[:, -self.config.context :]
                logits, _ = self(ids)
                chosen = _draw(logits[:, -1].float(), temperature, top_k, generator)
                ids = torch.cat([ids, chosen], dim=1)
                yield chosen
        finally:
            self.train(was_training)


# Below the first, a quotient of logits may be infinite; below the second, one by the temperature itself.
SMALL_TEMPERATURE, SMALLEST_TEMPERATURE = 1e-6, torch.finfo(torch.float32).tiny


def _draw(logits, temperature, top_k, generator) -> torch.Tensor:
    """(batch, vocab_size) -> (batch, 1), one token for each row."""
    if temperature < SMALLEST_TEMPERATURE:
        return logits.argmax(-1, keepdim=True)
    if temperature < SMALL_TEMPERATURE:
        logits = logits - logits.amax(-1, keepdim=True)  # (batch, vocab_size), the same softmax
    if top_k is not None and top_k < logits.shape[-1]:
        # Drawn among the k best themselves: a threshold would let ties in.
        best, tokens = logits.topk(top_k)  # (batch, top_k), both
        drawn = torch.multinomial(torch.softmax(best / temperature, -1), 1, generator=generator)
        return tokens.gather(1, drawn)
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
