"""grow(model, width, layers): a larger GPT that computes what the small one does, to be trained on.

Width, from D to W, with k = floor(W / D) copies of each channel of the residual stream and W - k·D more that hold its
mean, all of it times a = sqrt(W / (k·D)). With x the stream of the small model and m the mean over its channels:

    x'          = a · [x, …, x, m, …, m]          mean(x') = a·m,   var(x') = a² · var(x) · k·D / W = var(x)
    LayerNorm:  (x' - mean(x')) / sqrt(var(x') + eps) = a · [x_hat, …, x_hat, 0, …, 0]          with the same eps
                weight' = weight / a, bias' = bias, and for the means' channels a bias of 0
    writes x'   W'[row] = a · W[row], for a mean's channel a · the mean of all rows; biases and embeddings likewise
    reads x'    of each copy of a column its share, W'[:, j] = share_j · W[:, j]; the shares of a column's copies add
                up to 1. What reads a mean's channel gets 0 from it, and may be anything: it is drawn
    logits      the output weight is the embedding, a · [E, …, E, mean]: final_norm has share · weight / a² and
                share · bias / a, so that its k copies give the logits once; a head over labels has the embedding's form

Inside of a block heads and the perceptron's units are copied in turn, the head's size kept: their copies compute the
same, and what reads them has shares. Where W is a multiple of D there are no means, and a = 1.

Copies that learned the same for ever would be no larger model. So shares are not equal: 1/n times a number between 1/2
and 3/2, each row's own. Gradients of the copies differ from the first update on.

Layers: block i of L is followed by copies of itself, of which both output projections are zeros, weights and biases:
x + 0 is x. They read the stream through what their original has learned, and right behind it, where it looks as it
learned to read it; the gradient reaches the zeros at the first update, and through them the rest at the second. Zeroed
blocks of random weights would be as exact and know nothing; copies that are not zeroed know as much and are not exact.

In training mode with dropout both models draw their own numbers: the loss is the same in eval mode.

Sources: copies whose readers share: Chen et al., "Net2Net", 2015 (arXiv:1511.05641), and for transformers "bert2BERT",
2021 (arXiv:2110.07143); unequal shares, and means that keep LayerNorm exact where the width is no multiple: Wang et
al., "LEMON", 2023 (arXiv:2310.07999), who change eps where the factor a is here, since files of GPT-2 have one eps;
copied layers: Du et al., "Stacking Your Transformers", 2024 (arXiv:2405.15319), who do not keep the function.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from gptkern import formatting
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import memory, model_files
from gptkern.training.adapting import HEAD, HEAD_WEIGHT, output_weight
from gptkern.training.errors import UserError

__all__ = ["check_memory", "difference", "grow", "grown"]

_PROJECTIONS = "attention.project.", "perceptron.project."  # of a block: all that it adds to the stream
_AT_ONCE = 2**20  # elements of a weight that are computed at a time, in float64
_TEMPORARIES = 6  # tensors of so many elements, at the most
_SPREAD = 0.5  # of shares around their mean
_TRIED = 64  # tokens of `difference`


def grown(config: GPTConfig, width: int | None = None, layers: int | None = None) -> GPTConfig:
    """The sizes of a grown model: heads of the size that they had, as many as the width holds; the rest stays.

    Raises:
        ValueError: neither is larger than it was, one is smaller, or the width is no whole number of heads. The message
            begins with the argument's name.
    """
    width, layers = config.width if width is None else width, config.layers if layers is None else layers
    for name, value, least in (("width", width, config.width), ("layers", layers, config.layers)):
        if value < least:
            raise ValueError(f"{name} is {value}; it needs to be at least the model's, {least}")
    if width % config.head_dim:
        below = width - width % config.head_dim
        near = " or ".join(str(each) for each in (below, below + config.head_dim) if each >= config.width)
        heads = f"heads of {config.head_dim}, as the model's are"
        raise ValueError(f"width is {width}; it needs to be a whole number of {heads}: {near}")
    if (width, layers) == (config.width, config.layers):
        raise ValueError(f"width is {width} and layers is {layers}, the model's own; one of them needs to be larger")
    return dataclasses.replace(config, width=width, layers=layers, heads=width // config.head_dim)


def check_memory(small: GPTConfig, large: GPTConfig) -> None:
    """Before either model is made.

    Raises:
        UserError: in float32 they need more memory than there is: both at once, or the large one and what is written.
    """
    few, many = (memory.FLOAT32 * memory.parameter_count(config) for config in (small, large))
    # In float64: the largest weight of a block, as it was, and pieces of what a parameter becomes.
    working = 8 * (2 * 4 * small.width**2 + _TEMPORARIES * _AT_ONCE)
    size, free = max(few + many + working, 2 * many), memory.available(torch.device("cpu"))
    if free is not None and size > free:
        raise UserError(f"growing needs {formatting.size(size)} of memory and there are {formatting.size(free)}")


@torch.no_grad()
def grow(
    model: GPT, width: int | None = None, layers: int | None = None, generator: torch.Generator | None = None
) -> GPT:
    """A wider or deeper GPT with the same logits as `model`, within rounding; `model` stays as it is.

    How, and from where: the module's docstring. Training goes on with the larger one; AdamW's averages begin anew.

    Args:
        model: the reference GPT, swapped or not; its parameters in one floating-point dtype.
        width: a whole number of the model's heads, at least its own width; a multiple of it wants no channels of means.
            None: the model's.
        layers: at least the model's own. None: the model's.
        generator: of the CPU, of the shares and of what reads the means; None for PyTorch's default.

    Returns:
        A stock GPT on the CPU, of that dtype, in eval mode.

    Raises:
        ValueError: sizes as `grown` says; or the model's parameters are not the stock GPT's (int8, adapters).
    """
    try:
        config = grown(model.config, width, layers)
    except ValueError as error:
        raise ValueError(f"grow: {error}") from None
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in found.items()}
    head = found.get(HEAD_WEIGHT) if shapes.get(HEAD_WEIGHT, ())[1:] == (model.config.width,) else None
    if head is not None:
        del shapes[HEAD_WEIGHT]
    if other := sorted(shapes.items() ^ model_files.parameter_shapes(model.config).items()):
        name, shape = other[0]
        what = f"the model has {name} of shape {shape}" if name in shapes else f"the model has no {name}"
        raise ValueError(f"grow: {what}; it needs to be the stock GPT, in floating point, without adapters")
    made = model_files.empty_model(config).to(found["token_embedding.weight"].dtype).eval()
    wide = _Wide(model.config, config, generator)
    # Which block each one is of; the first of them is the block itself, the others are copies behind it.
    sources = [block * model.config.layers // config.layers for block in range(config.layers)]
    for name, parameter in made.named_parameters():
        if not name.startswith("blocks."):
            wide.outside(name, found[name].cpu(), parameter)
            continue
        _, block, inside = name.split(".", 2)
        source = sources[int(block)]
        if source in sources[: int(block)] and inside.startswith(_PROJECTIONS):
            parameter.zero_()
        else:
            wide.inside(inside, found[f"blocks.{source}.{inside}"].cpu().double(), parameter)
    if head is not None:
        made.add_module(HEAD, nn.Linear(config.width, len(head), bias=False, device="meta", dtype=head.dtype))
        made.score.to_empty(device="cpu")
        wide.columns(head.cpu(), made.score.weight)
    return made


@torch.no_grad()
def difference(small: GPT, large: GPT) -> tuple[float, float]:
    """(the largest difference between both models' logits, the largest logit), in eval mode on 64 tokens or fewer.

    Where the models have a head over labels, its logits count too.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(_TRIED, small.config.context)
    ids = torch.randint(small.config.vocab_size, (1, length), generator=generator)
    logits = []
    for model in (small, large):
        was_training = model.training
        features = model.eval()(ids.to(model.lm_head.weight.device), head=False)[0]
        # Of a model without a head the same logits twice.
        logits.append(torch.cat([features @ each.T for each in (model.lm_head.weight, output_weight(model))], -1))
        model.train(was_training)
    before, after = (each.cpu().double() for each in logits)
    return float((before - after).abs().max()), float(before.abs().max())


class _Wide:
    """Each kind of parameter, widened: as the module's docstring says it."""

    def __init__(self, small: GPTConfig, large: GPTConfig, generator: torch.Generator | None):
        width = small.width
        self.copies = large.width // width
        self.means = large.width - self.copies * width
        self.factor = math.sqrt(large.width / (self.copies * width))
        self.generator = generator
        # New index -> old one: of the stream's copies, of the heads' outputs side by side, of the perceptron's units.
        self.stream = torch.arange(self.copies * width) % width
        self.heads = torch.arange(large.width) % width
        self.units = torch.arange(4 * large.width) % (4 * width)
        self.qkv = (torch.arange(3)[:, None] * width + self.heads).flatten()

    def outside(self, name: str, value: torch.Tensor, into: torch.Tensor) -> None:
        """Of the embeddings and the final norm."""
        if name.endswith("embedding.weight"):
            return self.columns(value, into)
        # weight' = share · weight / a², bias' = share · bias / a
        value = value.double() / self.factor ** (2 if name == "final_norm.weight" else 1)
        into.copy_(torch.cat([self.shared(value[None], self.stream)[0], self.of_means(name, value / self.copies)]))

    def columns(self, value: torch.Tensor, into: torch.Tensor) -> None:
        """(rows, D) -> (rows, W): an embedding, or a head's weight."""
        for rows in self._some(into):
            into[rows] = self.written(value[rows].double().T).T.to(into.dtype)

    def inside(self, name: str, value: torch.Tensor, into: torch.Tensor) -> None:
        """Of a block's parameter `name`, into that of the larger block."""
        if name.endswith("_norm.weight"):
            into.copy_(torch.cat([value[self.stream] / self.factor, self.of_means(name, value / self.factor)]))
        elif name.endswith("_norm.bias"):
            into.copy_(torch.cat([value[self.stream], self.of_means(name, value)]))
        elif name.endswith("project.bias"):
            into.copy_(self.written(value))
        elif name.endswith("project.weight"):
            self.projected(value, self.heads if name.startswith("attention.") else self.units, into)
        else:
            rows = self.qkv if name.startswith("attention.") else self.units
            into.copy_(value[rows]) if name.endswith("bias") else self.reading(value, rows, into)

    def written(self, value: torch.Tensor) -> torch.Tensor:
        """(D, …) -> (W, …), along the stream's channels: a · [value, …, value, mean, …, mean]"""
        mean = value.mean(0, keepdim=True).expand(self.means, *value.shape[1:])
        return self.factor * torch.cat([value[self.stream], mean])

    def of_means(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """(D,) -> (means,), of a norm's parameter: a weight for what will be there, a bias of 0."""
        return (value.mean() if name.endswith("weight") else value.new_zeros(())).expand(self.means)

    def projected(self, weight: torch.Tensor, source: torch.Tensor, into: torch.Tensor) -> None:
        """(D, in) -> (W, in'): writes the stream, reads copies."""
        # The last row is that of the means' channels.
        written = self.factor * torch.cat([weight, weight.mean(0, keepdim=True)])
        row_of = torch.cat([self.stream, torch.full((self.means,), len(weight))])
        for rows in self._some(into):
            into[rows] = self.shared(written[row_of[rows]], source).to(into.dtype)

    def reading(self, weight: torch.Tensor, row_of: torch.Tensor, into: torch.Tensor) -> None:
        """(out, D) -> (out', W): reads the stream."""
        size = weight.std(correction=0)
        for rows in self._some(into):
            value = self.shared(weight[row_of[rows]], self.stream)
            drawn = torch.randn(len(rows), self.means, dtype=torch.float64, generator=self.generator)
            into[rows] = torch.cat([value, size * drawn], 1).to(into.dtype)

    def shared(self, value: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """(rows, n) float64 -> (rows, n'): column j is share_j · value[:, source[j]]; a column's shares add up to 1."""
        copies = torch.bincount(source, minlength=value.shape[1]).double()
        drawn = torch.rand(len(value), len(source), dtype=torch.float64, generator=self.generator)
        noise = _SPREAD * (2 * drawn - 1)
        mean = torch.zeros_like(value).index_add_(1, source, noise) / copies
        # share = (1 + noise - mean of the copies' noise) / copies
        share = (1 + noise - mean[:, source]) / copies[source]
        return share * value[:, source]

    def _some(self, into: torch.Tensor):
        return torch.arange(len(into)).split(max(1, _AT_ONCE // into.shape[1]))
