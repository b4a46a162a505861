"""cross_entropy in plain PyTorch: the bare launchers of the `torch` backend. The mathematics are the contract's.

On a CPU rows go in blocks that stay in its caches, and each step is done in place: of a vocabulary's logits a temporary
tensor costs more than the arithmetic.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gptkern.backends.losses import scores, slopes, stats_of

if TYPE_CHECKING:
    from gptkern.operators.cross_entropy.contract import Call, Gradient

# Elements of a block: 2 MB of float32. Of 2^14 to 2^22 the fastest are 2^18 to 2^20 (bfloat16, 1024 x 4096: 57 ms, with
# 2^17 72 and with 2^22 74; seen on one core of an AMD EPYC, others working beside).
BLOCK = 2**19


def unsupported(call: Call) -> str | None:
    for name, tensor in (("weight", call.weight), ("target", call.target)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            return f"the {name} requires a gradient, which the backward does not compute"
    return None


def row_shape(call: Call) -> tuple[int, ...]:
    """(N, d1, …)"""
    return *call.input.shape[:1], *call.input.shape[2:]


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(N, C, d1, …) -> (rows, C)."""
    moved = tensor.movedim(1, -1)
    # Of no classes a reshape to (-1, 0) does not know the rows.
    return moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])


def _blocks(x: torch.Tensor) -> list[slice]:
    rows, classes = x.shape
    each = max(BLOCK // max(classes, 1), 1) if x.is_cpu else max(rows, 1)
    return [slice(start, start + each) for start in range(0, rows, each)]


def _scores(x: torch.Tensor, call: Call) -> torch.Tensor:
    """s, in memory of its own."""
    s = scores(x, call.logit_scale, call.softcap)
    return s.clone() if s.data_ptr() == x.data_ptr() else s


def _rest(target: torch.Tensor | None, w: torch.Tensor | None, call: Call) -> torch.Tensor | float:
    """rest_c of rows: what of the target is not one class, times the classes' weights. (rows, C), (C,) or a number."""
    rest = call.label_smoothing / max(call.input.shape[1], 1)
    if target is not None:
        rest = target * (1.0 - call.label_smoothing) + rest
    return rest if w is None else rest * w


def _classes(call: Call, w: torch.Tensor | None, dtype: torch.dtype):
    """Of each row: whether it counts, the place of its class (rows, 1), w_y; NaN of a class that there is none of."""
    y = call.target.reshape(-1).long()
    counts, is_class = y != call.ignore_index, (y >= 0) & (y < call.input.shape[1])
    at = torch.where(is_class, y, 0)
    own = torch.where(is_class, 1.0 if w is None or not len(w) else w[at], math.nan).to(dtype)
    return counts, at[:, None], torch.where(counts, own, 0.0)


def forward(call: Call):
    """-> loss, statistics (4, rows), denominator, and where they are needed lse, entropy, correct (N, d1, …).

    What a call does not have is None: the denominator of sums and of probabilities, stats.
    """
    x, shape = _as_rows(call.input), row_shape(call)
    rows = x.shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = x.new_empty((4, rows), dtype=dtype)
    losses = x.new_empty(rows, dtype=dtype)
    w = None if call.weight is None else call.weight.to(dtype)
    is_class = not call.target.is_floating_point()
    target = None if is_class else _as_rows(call.target)
    counts, at, own = _classes(call, w, dtype) if is_class else (None, None, None)
    for block in _blocks(x):
        t = None if target is None else target[block].to(dtype)
        part = [None, None, None] if at is None else [tensor[block] for tensor in (counts, at, own)]
        losses[block] = _forward_block(call, x[block], t, w, *part, statistics[:, block])
    denominator = own.sum() if is_class and call.reduction == "mean" else None
    loss = losses.view(shape) if call.reduction == "none" else losses.sum()
    if call.reduction == "mean":
        loss = loss / (denominator if is_class else rows or math.nan)
    stats = (None, None, None)
    if call.need_stats:
        stats = stats_of(call.input, call.target, call.ignore_index, call.logit_scale, call.softcap)
    return loss.to(call.dtype), statistics, denominator, *stats


def _forward_block(call: Call, x, t, w, counts, at, own, statistics):
    """The losses of some rows; their statistics are written."""
    # Of rows without classes, as PyTorch has it, everything is summed over nothing.
    s = _scores(x, call)
    m = s.amax(1, keepdim=True) if s.shape[1] else s.new_full((len(s), 1), -math.inf)
    below = s.sub_(m)
    spread, rest = 0.0, torch.zeros_like(m[:, 0])
    if t is not None or call.label_smoothing:
        rests = _rest(t, w, call)
        # sum_c rest_c * (s_c - m)
        spread, rest = (below * rests).sum(1), rest + torch.as_tensor(rests, dtype=s.dtype).expand_as(s).sum(1)
    if at is None:
        log_others = log_total = torch.log(below.exp_().sum(1))
        losses = 0.0
    else:
        # sum_{c != y} exp(s_c - m): p_y - 1 and a loss near 0 have their digits from it
        distance = torch.where(own.isnan(), math.nan, -below.gather(1, at)[:, 0] if s.shape[1] else math.nan)
        others = (below.exp_().scatter_(1, at, 0.0) if s.shape[1] else below).sum(1)
        log_others = torch.log(others)
        log_total = torch.where(distance == 0.0, torch.log1p(others), torch.log(others + torch.exp(-distance)))
        # (1 - e) * w_y * (lse - s_y)
        losses = (1.0 - call.label_smoothing) * own * (distance + log_total)
    # + sum_c rest_c * (lse - s_c)
    if t is not None or call.label_smoothing:
        losses = losses + rest * log_total - spread
    if call.z_loss:
        # + z_loss * lse² * own
        losses = losses + call.z_loss * (m[:, 0] + log_total).square() * (1.0 if own is None else own)
    found = torch.stack((m[:, 0], log_total, log_others, rest))
    statistics.copy_(found if counts is None else torch.where(counts, found, 0.0))
    return losses if counts is None else torch.where(counts, losses, 0.0)


def backward(gradient: Gradient, call: Call):
    """-> dinput (N, C, d1, …) in the input's strides, or None where it was written over the logits."""
    grad_output, statistics, denominator, written = gradient
    dtype, x = statistics.dtype, _as_rows(call.input)
    rows, classes = x.shape
    w = None if call.weight is None else call.weight.to(dtype)
    is_class = not call.target.is_floating_point()
    target = None if is_class else _as_rows(call.target)
    counts, at, own = _classes(call, w, dtype) if is_class else (None, None, None)
    g = grad_output.to(dtype).reshape(-1)  # (rows,) or (1,)
    if call.reduction == "mean":
        g = g / (max(rows, 1) if denominator is None else denominator)
    g = g.expand(rows)
    # Past the version counter, which is moved on where the launcher was started.
    dx = torch.empty_like(call.input) if written is None else written.data
    by_rows = dx.movedim(1, -1)
    in_place = by_rows.view(rows, classes) if by_rows.is_contiguous() else x.new_empty(x.shape)
    for block in _blocks(x):
        t = None if target is None else target[block].to(dtype)
        part = [None, None, None] if at is None else [tensor[block] for tensor in (counts, at, own)]
        in_place[block] = _backward_block(call, x[block], t, w, *part, g[block], statistics[:, block])
    if not by_rows.is_contiguous():
        by_rows.copy_(in_place.view(by_rows.shape))
    return dx if written is None else None


def _backward_block(call: Call, x, t, w, counts, at, own, g, statistics):
    m, log_total, log_others, rest = statistics.unbind()
    s = _scores(x, call)
    p = s.sub_(m[:, None]).sub_(log_total[:, None]).exp_()
    # p_j * (rest + 2 * z_loss * lse * own)
    factor = rest
    if call.z_loss:
        factor = rest + 2.0 * call.z_loss * (m + log_total) * (1.0 if own is None else own)
    if at is None:
        ds = p.mul_(factor[:, None])
    else:
        # + (1 - e) * w_y * (p_j - [j = y]), of which p_y - 1 = -exp(log_others - log_total)
        of_class = (1.0 - call.label_smoothing) * own
        at_y = factor * (p.gather(1, at)[:, 0] if p.shape[1] else 0.0) - of_class * torch.exp(log_others - log_total)
        ds = p.mul_((factor + of_class)[:, None])
        ds = ds.scatter_(1, at, at_y[:, None]) if p.shape[1] else ds
    if t is not None or call.label_smoothing:
        ds = ds.sub_(_rest(t, w, call))
    dx = ds.mul_(g[:, None])
    slope = slopes(x, call.logit_scale, call.softcap)
    if isinstance(slope, torch.Tensor) or slope != 1.0:
        dx = dx.mul_(slope)
    return dx if counts is None else dx.masked_fill_(~counts[:, None], 0.0)
