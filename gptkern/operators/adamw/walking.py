"""How kernels walk the tensors of an update: in which order of their memory, and what of them a table says.

Where stochastic rounding is, the elements of a tensor lie behind one another from a multiple of eight on (IN_A_RUN), or
anywhere. Chunks, or blocks of 8-bit averages, are what a program does at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from gptkern.operators.adamw import blockwise
from gptkern.operators.adamw.contract import DRAWS, Call, is_dense, laid_out_as
from gptkern.operators.adamw.table import Rows, cdiv, is_aligned

NEAREST, IN_A_RUN, ANYWHERE = range(3)
_AVERAGES = "exp_avg", "exp_avg_sq", "max_exp_avg_sq"


class Kind(NamedTuple):
    """What one launch does: tensors that a kernel may treat alike."""

    aligned: bool
    places: int
    whole: bool  # of averages in 8 bits: all blocks have 256 elements


def kinds_of(call: Call, chunk: Callable[[int], int], blocks: int, back: list) -> dict[Kind, Rows]:
    """The rows of the table, by kind.

    Args:
        chunk: elements that a program does, by places. blocks: of 8-bit averages, blocks that it does.
        back: gets (tensor, copy) of what the kernel writes into a copy of.
    """
    kinds: dict[Kind, Rows] = {}
    coded, places = bool(call.exp_avg_scales), NEAREST
    for index, param in enumerate(call.params):
        if param.numel() == 0:
            continue
        tensors = [param, call.grads[index], call.exp_avgs[index], call.exp_avg_sqs[index]]
        if call.max_exp_avg_sqs:
            tensors.append(call.max_exp_avg_sqs[index])
        tensors = _walked(tensors, call.seed is not None or coded, back)
        columns = dict(zip(("param", "grad", *_AVERAGES), tensors), count=param.numel(), step=call.steps[index])
        if call.seed is not None:
            number, start, run, stride = call.places[4 * index : 4 * index + 4]
            places = IN_A_RUN if start % DRAWS == 0 and run >= param.numel() else ANYWHERE
            columns.update(number=number, start=start, run=run, stride=stride, seed=call.seed)
        aligned, programs, whole, each = is_aligned(tensors), None, False, chunk(places)
        if coded:
            shape, each = call.exp_avgs[index].shape, blocks
            rows, in_a_row = blockwise.blocks_of(shape)
            width = blockwise.width_of(shape)
            programs, whole = cdiv(rows * in_a_row, blocks), width % blockwise.BLOCK == 0
            scales = dict(exp_avg_scale=call.exp_avg_scales[index], exp_avg_sq_scale=call.exp_avg_sq_scales[index])
            columns.update(scales, width=width)
        kinds.setdefault(Kind(aligned, places, whole), Rows(each)).add(programs, **columns)
    return kinds


def numbers(call: Call) -> tuple[float, ...]:
    """Of the hyperparameters, what kernels read; differences and logarithms in float64."""
    beta1, beta2 = call.beta1, call.beta2
    logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    return call.lr, 1 - beta1, logarithms[0], beta2, 1 - beta2, logarithms[1], call.eps, call.weight_decay


def of_norm(grads: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The gradients that have elements, without gaps."""
    for grad in grads:
        if grad.numel():
            yield grad if is_dense(grad) else grad.contiguous()


def _walked(tensors: list[torch.Tensor], by_rows: bool, back: list) -> list[torch.Tensor]:
    """The parameter, its gradient and states as a kernel walks them, all in one order of their memory: themselves where
    they are laid out alike, as nearly always; else copies.

    Args:
        by_rows: in row-major order. back: gets (tensor, copy) of what the kernel writes into a copy of.
    """
    param = tensors[0]
    like = param if is_dense(param) and not by_rows else torch.empty(param.shape, device="meta")
    found = []
    for index, tensor in enumerate(tensors):
        if is_dense(tensor) and (tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())):
            found.append(tensor)
            continue
        copy = tensor.contiguous() if like.is_contiguous() else laid_out_as(tensor, like, copy=True)
        found.append(copy)
        if index != 1:
            back.append((tensor, copy))
    return found
