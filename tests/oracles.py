"""The oracles: every operator as plain mathematics on float64 tensors. They share no code with gptkern.

Each oracle takes its tensors and converts them to `precision` first:

    precision=torch.float64    the oracle
    precision=torch.float32    the yardstick: the same mathematics with float32 internals. gptkern.tolerance
                               rounds it to the dtype of the result that is judged.

Gradients come from PyTorch's autograd through these few lines of arithmetic (`gradients`), not from a second
formula, so a wrong derivation in an operator's backward cannot be repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

ORACLE = torch.float64
YARDSTICK = torch.float32


def gradients(function: Callable, tensors: Sequence[torch.Tensor], grad_output, precision: torch.dtype) -> tuple:
    """The gradients of `function(*tensors)` with respect to every tensor, computed in `precision`.

    Args:
        function: one tensor, or a tuple of them, from the tensors; called with their copies in `precision`.
        grad_output: the gradient that comes in, or a tuple of them.
    """
    leaves = [tensor.detach().to(precision, copy=True).requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    if isinstance(outputs, torch.Tensor):
        outputs, grad_output = (outputs,), (grad_output,)
    return torch.autograd.grad(outputs, leaves, [grad.to(precision) for grad in grad_output])


def _softmax(scores: torch.Tensor, takes_part: torch.Tensor | bool, zero_if_empty: bool) -> torch.Tensor:
    """softmax over the last dimension, of the entries where takes_part is True; the others are 0.

    A row of which nothing takes part is 0 with zero_if_empty, else NaN (0 / 0), as in PyTorch.
    """
    scores = torch.where(torch.as_tensor(takes_part, device=scores.device), scores, -math.inf)
    if scores.shape[-1] == 0:
        return scores
    # Shifting a row changes nothing in exact arithmetic: the largest score is a constant to the gradient.
    largest = scores.detach().max(-1, keepdim=True).values
    empty = largest == -math.inf
    exponentials = torch.exp(scores - largest.masked_fill(empty, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / (total.masked_fill(empty, 1.0) if zero_if_empty else total)


# --- attention ------------------------------------------------------------------------------------------------------


def attention(
    query: torch.Tensor,  # (batch, heads, length_q, head_dim)
    key: torch.Tensor,  # (batch, kv_heads, length_k, head_dim)
    value: torch.Tensor,  # (batch, kv_heads, length_k, head_dim of value)
    *,
    is_causal: bool = False,
    scale: float | None = None,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """softmax(scale * query @ keyᵀ) @ value; is_causal: query i sees key j if j <= i. A query that sees none: 0."""
    query, key, value = (tensor.to(precision) for tensor in (query, key, value))
    group = query.shape[1] // key.shape[1]
    # query head h reads key/value head h // group
    head_of = torch.arange(query.shape[1], device=query.device) // group
    key, value = key[:, head_of], value[:, head_of]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.transpose(-1, -2))
    row = torch.arange(query.shape[2], device=query.device)[:, None]
    column = torch.arange(key.shape[2], device=query.device)[None, :]
    takes_part = column <= row if is_causal else (column >= 0)
    return _softmax(scores, takes_part, zero_if_empty=True) @ value


# --- softmax --------------------------------------------------------------------------------------------------------


def softmax(
    input: torch.Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """softmax of scale * input + mask over `dim`, of the entries that a bool mask and is_causal let take part.

    A row of which nothing takes part is 0 where there is a mask or is_causal, else NaN.
    """
    scores = input.to(precision) * scale
    takes_part = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        takes_part = takes_part & mask
    elif mask is not None:
        scores = scores + mask.to(precision)
    if is_causal:
        takes_part = takes_part.tril()  # element j of row i takes part if j <= i
    if scores.dim() == 0:
        return _softmax(scores[None], takes_part[None], zero_if_empty=mask is not None)[0]
    scores, takes_part = scores.transpose(dim, -1), takes_part.transpose(dim, -1)
    y = _softmax(scores, takes_part, zero_if_empty=mask is not None or is_causal)
    return y.transpose(dim, -1)
