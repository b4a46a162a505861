"""What the torch backend does to the rows of a chunk, in plain PyTorch and in place; and its way through whole rows.

s = logit_scale * (z + bias),  capped: softcap * tanh(s / softcap)
G = dloss/ds * ds/dz           ds/dz = logit_scale * (1 - (s / softcap)²)
"""

from __future__ import annotations

import torch

from gptkern.backends import vocabulary
from gptkern.backends.losses import first_largest, slopes
from gptkern.operators.linear_cross_entropy import chunks, parallel
from gptkern.operators.linear_cross_entropy.call import Call
from gptkern.operators.linear_cross_entropy.chunks import Known, Statistics


def _scaled(call: Call, z: torch.Tensor, start: int) -> torch.Tensor:
    """logit_scale * (z + bias), over z."""
    if call.linear_bias is not None:
        z.add_(call.linear_bias[start : start + z.shape[1]])
    return z if call.logit_scale == 1.0 else z.mul_(call.logit_scale)


def _capped(call: Call, z: torch.Tensor) -> torch.Tensor:
    """s, over what `_scaled` returned."""
    return z if call.softcap is None else z.div_(call.softcap).tanh_().mul_(call.softcap)


def _place(call: Call, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 1) the target's column in a chunk, 0 where it is in another one, and whether it is in this one."""
    column = call.target - (parallel.first_class(call) + start)
    inside = (column >= 0) & (column < count) & ~chunks.is_ignored(call)
    return column.where(inside, 0)[:, None], inside[:, None]


def _class_weight(call: Call, start: int, like: torch.Tensor) -> torch.Tensor | None:
    """(chunk,) of the chunk's classes."""
    if call.weight is None:
        return None
    first = parallel.first_class(call) + start
    return call.weight[first : first + like.shape[1]].to(like.dtype)


def update(call: Call, statistics: Statistics, z: torch.Tensor, start: int) -> None:
    z = _scaled(call, z, start)
    if statistics.likeliest is not None:
        _compare(call, statistics, z, start)
    _accumulate(call, statistics, _capped(call, z), start)


def _compare(call: Call, statistics: Statistics, z: torch.Tensor, start: int) -> None:
    """The first of the largest logits so far, by what is not capped."""
    if z.shape[1] == 0:
        return
    largest, column = z.amax(1), first_largest(z, 1)
    better = (largest > statistics.largest) | (largest.isnan() & ~statistics.largest.isnan())
    statistics.largest.copy_(torch.where(better, largest, statistics.largest))
    statistics.likeliest.copy_(torch.where(better, column + (parallel.first_class(call) + start), statistics.likeliest))


def _accumulate(call: Call, statistics: Statistics, s: torch.Tensor, start: int) -> None:
    """Leaves exp(s - maximum), 0 at the target, in s."""
    if s.shape[1] == 0:
        return
    maximum, rest, target, moment, smooth, *_ = statistics
    column, inside = _place(call, start, s.shape[1])
    target.add_(torch.where(inside, s.gather(1, column), 0.0)[:, 0])
    if smooth is not None:
        weight = _class_weight(call, start, s)
        smooth.add_(s.sum(1) if weight is None else s @ weight)
    largest = torch.maximum(maximum, s.amax(1))
    # -inf is not subtracted from -inf
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    before = torch.exp(maximum - shift)
    s.sub_(shift[:, None])
    terms = None if moment is None else s.clone()
    e = s.exp_()
    if moment is not None:
        # sum e (s - m): what was summed of another maximum is shifted; of what is impossible nothing is added
        own = torch.where(_is_before(call, start), torch.exp(target - shift), 0.0)
        moved = torch.where(maximum == -torch.inf, 0.0, maximum - shift)
        moment.mul_(before).add_(moved * (rest * before + own))
        moment.add_(terms.mul_(e).masked_fill_(e == 0.0, 0.0).sum(1))
    e.scatter_(1, column, e.gather(1, column).masked_fill_(inside, 0.0))
    rest.mul_(before).add_(e.sum(1))
    maximum.copy_(largest)


def _is_before(call: Call, start: int) -> torch.Tensor:
    """(rows,) whether the target's class stands in a chunk before."""
    first = parallel.first_class(call)
    return (call.target >= first) & (call.target < first + start) & ~chunks.is_ignored(call)


def gradient(call: Call, known: Known, z: torch.Tensor, start: int, out: torch.Tensor) -> None:
    z = _scaled(call, z, start)
    slope = _slope(call, z)
    e = _capped(call, z).sub_(known.maximum[:, None]).exp_()
    g = _derivative(call, known, e, start, slope)
    if g.data_ptr() != out.data_ptr():
        out.copy_(g)


def _slope(call: Call, z: torch.Tensor) -> torch.Tensor | float:
    """ds/dz, of what `_scaled` returned."""
    if call.softcap is None:
        return call.logit_scale
    return slopes(z, 1.0, call.softcap) * call.logit_scale


def _derivative(call: Call, known: Known, e: torch.Tensor, start: int, slope: torch.Tensor | float) -> torch.Tensor:
    """G over e = exp(s - maximum)."""
    column, inside = _place(call, start, e.shape[1])
    # dloss/ds_c = slope * p_c - smooth * weight_c
    g = e.mul_((known.slope / known.total)[:, None])
    if call.label_smoothing:
        weight = _class_weight(call, start, g)
        g.sub_(known.smooth[:, None] if weight is None else torch.outer(known.smooth, weight))
    if g.shape[1]:
        g.scatter_(1, column, torch.where(inside, known.target[:, None], g.gather(1, column)))
    if not isinstance(slope, float) or slope != 1.0:
        g.mul_(slope)
    if not g.is_cpu:
        # A CPU's call has no such rows; 0 * NaN is NaN.
        g.masked_fill_(chunks.is_ignored(call)[:, None], 0.0)
    return g


def forward_with_gradients(call: Call):
    """Whole rows at a time: the gradient is known as soon as a row's logits are, and no logits are computed twice.

    -> RowValues, dinput, dweight, dbias for a grad_output of 1. Sums over tokens are kept in the input's dtype, which
    is float32 or float64.
    """
    x, weight, bias = call.input, call.linear_weight, call.linear_bias
    (rows, width), classes = x.shape, weight.shape[0]
    each = min(max((call.chunk or vocabulary.LEAST_ELEMENTS) // max(classes, 1), 1), max(rows, 1))
    z = torch.empty(each, classes, dtype=x.dtype, device=x.device)
    weights = chunks.row_weight(call)
    grad = 1.0 / weights.sum() if call.reduction == "mean" else 1.0
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device) if call.ahead_input else None
    dweight = torch.zeros(classes, width, dtype=x.dtype, device=x.device) if call.ahead_weight else None
    dbias = torch.zeros(classes, dtype=x.dtype, device=x.device) if call.ahead_bias else None
    values = []
    for start in range(0, rows, each):
        part = slice(start, start + each)
        # The mean's denominator is that of all rows.
        one = call._replace(input=x[part], target=call.target[part], reduction="sum")
        scaled = _scaled(one, torch.mm(one.input, weight.t(), out=z[: one.input.shape[0]]), 0)
        slope, statistics = _slope(one, scaled), chunks.begin(one)
        if one.stats:
            _compare(one, statistics, scaled, 0)
        s = _capped(one, scaled)
        _accumulate(one, statistics, s, 0)
        of_rows = chunks.finish(one, statistics)
        values.append(of_rows)
        known = chunks.known(one, grad, of_rows.maximum, of_rows.total, of_rows.miss)
        g = _derivative(one, known, s, 0, slope)
        if dx is not None:
            torch.mm(g, weight, out=dx[part])
        if dweight is not None:
            dweight.addmm_(g.t(), one.input)
        if bias is not None and dbias is not None:
            dbias.add_(g.sum(0))
    joined = [None if of[0] is None else torch.cat(of) for of in zip(*values)] if values else None
    found = chunks.RowValues(*joined) if joined else chunks.finish(call, chunks.begin(call))
    return found, dx, dweight, dbias
