"""The sum over the vocabulary in chunks: what every backend of linear_cross_entropy walks through.

    pass 1   for each chunk of classes:  z = x W_c^T, and of each row a running maximum and sums         (1 product)
    pass 2   for each chunk of classes:  z again, turned into G = dloss/dz;  dW_c = G^T x,  dx += G W_c   (3 products)

The tokens are not cut: dW_c is one product, whose sum over all tokens is float32 inside it, so that no float32 copy of
dW is needed. Only dx is summed over chunks, in float32 memory. A backend brings what is done to a chunk's rows
(`Rows`): plain PyTorch's are in rows.py, Triton's in triton.py.

On a CPU the rows whose target is ignored are left out before the first product. On a GPU their number is not known to
the host, so products multiply all rows; kernels skip these rows, and their G is 0. PyTorch's products that read a count
from the device (torch.nn.functional.grouped_mm with offsets) give 16 bits alone: logits would be rounded to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from gptkern.backends import vocabulary
from gptkern.backends.vocabulary import compute_dtype
from gptkern.operators.linear_cross_entropy import parallel
from gptkern.operators.linear_cross_entropy.call import Call, Gradient


class Statistics(NamedTuple):
    """Of each row, in float32 (float64 for float64), while chunks go by: s are the logits after scale and cap."""

    maximum: torch.Tensor  # (rows,)  max s, -inf before the first chunk
    rest: torch.Tensor  # (rows,)  sum of exp(s - maximum) over all classes but the target
    target: torch.Tensor  # (rows,)  the target's s; NaN of a target that no class has
    moment: torch.Tensor | None  # (rows,)  sum of exp(s - maximum) * (s - maximum), for the entropy
    smooth: torch.Tensor | None  # (rows,)  sum of weight_c * s_c, for label smoothing
    largest: torch.Tensor | None  # (rows,)  of logit_scale * z, before the cap, which may make ties
    likeliest: torch.Tensor | None  # (rows,) int64  its class, of equal ones the first


class RowValues(NamedTuple):
    """Of each row, after all chunks."""

    loss: torch.Tensor  # (rows,)  0 where ignored
    maximum: torch.Tensor  # (rows,)
    total: torch.Tensor  # (rows,)  sum of exp(s - maximum): lse = maximum + log(total)
    miss: torch.Tensor  # (rows,)  1 - p of the target, summed from the other classes
    entropy: torch.Tensor | None  # (rows,)
    correct: torch.Tensor | None  # (rows,) bool


class Known(NamedTuple):
    """What the gradient of a row needs beside its logits: dloss/ds_c = slope * p_c - smooth * weight_c, c no target."""

    maximum: torch.Tensor  # (rows,)
    total: torch.Tensor  # (rows,)
    slope: torch.Tensor  # (rows,)
    smooth: torch.Tensor  # (rows,)  incoming gradient * label_smoothing / classes
    target: torch.Tensor  # (rows,)  dloss/ds of the target


class Rows(NamedTuple):
    """What a backend does to the rows of a chunk.

    update(call, statistics, z, start)         takes z (rows, chunk) = x W_c^T, whose first class is `start`, into the
                                               statistics; may write over z
    gradient(call, known, z, start, out)       G (rows, chunk), the loss's derivative by z, into `out`, perhaps z
    """

    update: Callable[[Call, Statistics, torch.Tensor, int], None]
    gradient: Callable[[Call, Known, torch.Tensor, int, torch.Tensor], None]


def is_ignored(call: Call) -> torch.Tensor:
    return call.target == call.ignore_index


def row_weight(call: Call) -> torch.Tensor:
    """(rows,) the weight of each row's target; 0 where it is ignored."""
    dtype = compute_dtype(call.input.dtype)
    ignored = is_ignored(call)
    if call.weight is None:
        return (~ignored).to(dtype)
    # A target that no class has reads class 0's, and its loss is NaN all the same.
    inside = ~ignored & (call.target >= 0) & (call.target < call.weight.shape[0])
    return call.weight.to(dtype)[call.target.where(inside, 0)].masked_fill(ignored, 0.0)


def whole_weight(call: Call) -> torch.Tensor | float:
    """The sum of the classes' weights."""
    if call.weight is None:
        return float(parallel.all_classes(call))
    return call.weight.to(compute_dtype(call.input.dtype)).sum()


def begin(call: Call) -> Statistics:
    rows, dtype = call.input.shape[0], compute_dtype(call.input.dtype)

    def of(value):
        return torch.full((rows,), value, dtype=dtype, device=call.input.device)

    there = is_ignored(call) | ((call.target >= 0) & (call.target < parallel.all_classes(call)))
    return Statistics(
        of(-torch.inf), of(0.0), torch.where(there, of(0.0), torch.nan),
        of(0.0) if call.stats else None, of(0.0) if call.label_smoothing else None,
        of(-torch.inf) if call.stats else None,
        torch.full((rows,), parallel.first_class(call), device=call.input.device) if call.stats else None,
    )  # fmt: skip


def finish(call: Call, statistics: Statistics) -> RowValues:
    """loss = weight_y * ((1 - e) * (lse - s_y) + z_loss * lse²) + e / classes * sum_c weight_c * (lse - s_c)"""
    m, rest, target, moment, smooth, _, likeliest = statistics
    total = rest + torch.exp(target - m)
    log_total = torch.log(total)
    lse = m + log_total
    # lse - s_y of a target that is the likeliest: log1p keeps the digits that 1 + rest would lose
    nll = torch.where(target == m, torch.log1p(rest), (m - target) + log_total)
    weight = row_weight(call)
    loss = weight * ((1.0 - call.label_smoothing) * nll + call.z_loss * lse * lse)
    if smooth is not None:
        loss = loss + call.label_smoothing / parallel.all_classes(call) * (whole_weight(call) * lse - smooth)
    ignored = is_ignored(call)
    loss = loss.masked_fill(ignored, 0.0)
    entropy = correct = None
    if moment is not None:
        # H = lse - sum p s = log(total) - sum p (s - m)
        entropy = (log_total - moment / total).masked_fill(ignored, 0.0)
        correct = (likeliest == call.target) & ~ignored
    # An ignored row counts no class: it is 1 in lse's place, so that its logarithm is 0.
    m, total = m.masked_fill(ignored, 0.0), total.masked_fill(ignored, 1.0)
    return RowValues(loss, m, total, (rest / total).masked_fill(ignored, 0.0), entropy, correct)


def reduced(call: Call, loss: torch.Tensor) -> torch.Tensor:
    """() or (rows,) in the result's dtype."""
    if call.reduction == "mean":
        loss = loss.sum() / row_weight(call).sum()
    elif call.reduction == "sum":
        loss = loss.sum()
    return loss.to(call.result_dtype)


def known(call: Call, grad_output: torch.Tensor | float, maximum, total, miss) -> Known:
    """What the gradients of the rows are made of.

    Args:
        grad_output: () or (rows,), the gradient of what `reduced` returned.
    """
    weight, smoothing = row_weight(call), call.label_smoothing
    dy = torch.as_tensor(grad_output, device=weight.device).to(weight.dtype)
    if call.reduction == "mean":
        dy = dy / weight.sum()
    dy = dy.expand_as(weight).masked_fill(is_ignored(call), 0.0)
    lse = maximum + torch.log(total)
    smooth = dy * (smoothing / parallel.all_classes(call))
    # What p multiplies beside the target's own (1 - e) * weight_y: the smoothed classes' and the z-loss's.
    shared = smooth * whole_weight(call) + dy * weight * (2.0 * call.z_loss) * lse
    own = dy * weight * (1.0 - smoothing)
    # dloss/ds_y = own * (p_y - 1) + shared * p_y - smooth * weight_y: p_y - 1 is -miss, never a difference
    target = shared * (1.0 - miss) - own * miss - smooth * (1.0 if call.weight is None else weight)
    return Known(maximum, total, own + shared, smooth, target)


def forward(call: Call, rows: Rows) -> RowValues:
    """Pass 1."""
    chunks, statistics = vocabulary.chunks_of(call.input, call.linear_weight.shape[0], call.chunk), begin(call)
    x = chunks.widened(call.input)
    for start, stop in chunks:
        weight = call.linear_weight.narrow(0, start, stop - start)
        rows.update(call, statistics, vocabulary.logits(chunks, x, weight), start)
    if call.group is not None:
        statistics = parallel.reduced(call, statistics)
    return finish(call, statistics)


def backward(gradient: Gradient, call: Call, rows: Rows, is_without_ignored: bool = False):
    """Pass 2: -> dinput (rows, width), dweight (classes, width), dbias (classes,), None where it is not needed.

    Args:
        is_without_ignored: whether ignored rows were left out.
    """
    grad_output, maximum, total, miss, need_input, need_weight, need_bias = gradient
    weight, bias, dtype = call.linear_weight, call.linear_bias, call.input.dtype
    chunks = vocabulary.chunks_of(call.input, weight.shape[0], call.chunk)
    of_rows = known(call, grad_output, maximum, total, miss)
    wide, x = chunks.z.dtype, chunks.widened(call.input)
    # 0 times what an ignored row holds, NaN too, is 0.
    counted = x.masked_fill(is_ignored(call)[:, None], 0.0) if need_weight and not is_without_ignored else x
    dx = torch.empty(call.input.shape, dtype=wide, device=x.device) if need_input else None
    dweight = torch.empty(weight.shape, dtype=dtype, device=x.device) if need_weight else None
    dbias = torch.empty(chunks.classes, dtype=wide, device=x.device) if need_bias else None
    buffer, unit = chunks.buffer_of_g(dtype), None
    if buffer.dtype == torch.float16:
        unit = vocabulary.float16_unit(of_rows.slope * call.logit_scale, of_rows.target * call.logit_scale)
        slope, smooth, target = (one / unit for one in (of_rows.slope, of_rows.smooth, of_rows.target))
        of_rows = of_rows._replace(slope=slope, smooth=smooth, target=target)
    for start, stop in chunks:
        g, part = buffer.narrow(1, 0, stop - start), weight.narrow(0, start, stop - start)
        rows.gradient(call, of_rows, vocabulary.logits(chunks, x, part), start, g)
        if need_weight:
            vocabulary.weight_gradient(chunks, g, counted, dweight.narrow(0, start, stop - start), unit)
        if need_bias:
            torch.sum(g, 0, dtype=wide, out=dbias.narrow(0, start, stop - start))
        if need_input:
            vocabulary.add_input_gradient(chunks, dx, g, part, start == 0)
    # The result in 16 bits takes their place.
    del buffer, g, chunks
    if need_input:
        if call.group is not None:
            parallel.sum_over(call.group, dx)
        dx = vocabulary.times(dx, unit).to(dtype)
    return dx, dweight, vocabulary.times(dbias, unit).to(bias.dtype) if need_bias else None
