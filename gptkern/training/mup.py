"""µP, the maximal update parametrisation: the learning rate that is best for a small GPT is best for a wide one.

With m = width / base width, beside the standard parametrisation of models/gpt.py, which it is at m = 1:

    parameter                       first weights       learning rate       weight decay
    matrices of the blocks          std / √m            lr / m              decay · m
    embeddings                      as they are         lr                  decay
    biases, norms of the blocks     as they are         lr                  none
    final_norm                      weight 1 / m        lr / m              none
    logits                          divided by m: by final_norm, see below
    attention                       scores / √head_dim, unchanged

That is table 8 of Yang et al., the form for tied embeddings: the one weight has the variance and the learning rate of
an input weight, and the logits, as an output, are multiplied by 1 / m. That factor is not in the model but in
final_norm's weight and bias, which the logits are linear in: held m times smaller, and trained by Adam, which does not
see the size of a gradient, with an m times smaller learning rate, they and all the rest become what they would with the
factor outside (but for AdamW's eps). So a model under µP is a plain GPT, for whoever exports it or goes on with it.

Scores are to be divided by head_dim where it grows with the width. Here a wider model has more heads of one size
(`check` holds the base width against it), and 1 / √head_dim is a constant.

AdamW's decay of an update is lr · decay: with decay · m it is the same for all matrices and widths, as in the authors'
own package and in Wang, Aitchison, 2024.

Sources: Yang, Hu, et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", 2022
(arXiv:2203.03466), table 8; Wang, Aitchison, 2024 (arXiv:2405.13698).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.errors import UserError


class Scale(NamedTuple):
    """What a parameter's learning rate and weight decay are multiplied by."""

    lr: float = 1.0
    weight_decay: float = 1.0


def check(config: GPTConfig, base_width: int) -> None:
    """Whether a model of these sizes has a smaller one of that width, with heads of the same size.

    Raises:
        UserError: it has none.
    """
    if base_width < 1 or base_width % config.head_dim:
        raise UserError(
            f"mup is {base_width}; it needs a multiple of {config.head_dim}, the size of a head, which is the same in "
            "both models"
        )


@torch.no_grad()
def initialise(model: GPT, base_width: int) -> None:
    """Make µP's first weights of those that GPT draws, in place. Raises as `check`."""
    check(model.config, base_width)
    m = model.config.width / base_width
    for name, parameter in model.named_parameters():
        if _is_hidden(name, parameter):
            # variance ~ 1 / fan_in: std / √m
            parameter.mul_(1 / math.sqrt(m))
    model.final_norm.weight.mul_(1 / m)


def scales(model: GPT, base_width: int) -> dict[str, Scale]:
    """Parameter's name -> Scale, for optimizers.optimizer_of; those that it lacks have 1. Raises as `check`."""
    check(model.config, base_width)
    m = model.config.width / base_width
    hidden, output = Scale(lr=1 / m, weight_decay=m), Scale(lr=1 / m)
    found = {name: hidden for name, parameter in model.named_parameters() if _is_hidden(name, parameter)}
    return found | {f"final_norm.{name}": output for name, _ in model.final_norm.named_parameters()}


def _is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """Whether both of its dimensions grow with the width."""
    return name.startswith("blocks.") and parameter.dim() >= 2
