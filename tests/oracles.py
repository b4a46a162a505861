"""What the oracles share. An oracle is an operator as plain mathematics on float64 tensors, without code of gptkern.

Each stands beside its operator's tests, as operators/oracle_<operator>.py. It takes tensors and converts them to
`precision` first:

    precision=torch.float64    the oracle
    precision=torch.float32    the yardstick: the same mathematics with float32 internals. gptkern.measuring.tolerance
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


def masked_softmax(scores: torch.Tensor, takes_part: torch.Tensor | bool, zero_if_empty: bool) -> torch.Tensor:
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
