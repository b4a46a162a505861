"""The records of linear_cross_entropy: what a checked call is, and what its backward gets besides."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """A checked call with class indices."""

    input: torch.Tensor  # (rows, width)
    linear_weight: torch.Tensor  # (classes, width); of a group this process's part of the vocabulary
    target: torch.Tensor  # (rows,) int64
    linear_bias: torch.Tensor | None  # (classes,)
    weight: torch.Tensor | None  # (classes,); of a group the whole vocabulary's
    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    result_dtype: torch.dtype
    stats: bool  # entropy and correct are wanted
    chunk: int  # elements of the logits in a chunk; 0: by the formula
    group: str | None  # the name of a process group
    ahead_input: bool  # a forward that sees whole rows computes the gradient for a grad_output of 1 as well
    ahead_weight: bool
    ahead_bias: bool


class Gradient(NamedTuple):
    """What the backward gets besides the call; statistics are float32 (float64 for float64)."""

    grad_output: torch.Tensor  # () or (rows,)
    maximum: torch.Tensor  # (rows,)
    total: torch.Tensor  # (rows,)
    miss: torch.Tensor  # (rows,)
    need_input: bool
    need_weight: bool
    need_bias: bool
