"""What cross_entropy's Triton kernels share: what is summed along a row, the loss of it, and the gradient of a tile.

Sums along a row are kept relative to the largest score so far, and moved where that grows:
    others   sum of exp(s_c - m) of all classes but the target's (of probabilities: of all)
    total    the same of all;  product  sum of exp(s_c - m) * (s_c - m)       where stats are asked for
    spread   sum of rest_c * (s_c - m);  rest  sum of rest_c                  where the target is spread over classes
    best, first   the largest logit_scale * x_c, and the first class that has it
"""

from __future__ import annotations

import triton
import triton.language as tl

from gptkern.backends.triton.logits import exponential, finite, log1p, scores, slopes

# Of no class yet.
NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def load_scores(pointers, inside, logit_scale, softcap, SOFTCAP: tl.constexpr):
    """x, and its scores, -inf outside of the row."""
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return x, tl.where(inside, scores(x, logit_scale, softcap, SOFTCAP), float("-inf"))


@triton.jit
def load_rest(
    target_pointers,  # to probabilities; anything where there are none
    weight_ptr,
    n,
    inside,
    smoothing,
    classes,
    SPREAD: tl.constexpr,
    PROBABILITIES: tl.constexpr,
):
    """rest_c of a tile: what of the target is not one class, times the classes' weights; 0 outside."""
    if SPREAD:
        rest = tl.where(inside, smoothing / classes, 0.0)
        if PROBABILITIES:
            rest += (1.0 - smoothing) * tl.load(target_pointers, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            rest *= tl.load(weight_ptr + n, mask=inside, other=0.0).to(tl.float32)
        return rest
    else:
        return 0.0


@triton.jit
def accumulated(
    m, others, total, product, spread, rest, best, first,  # without the dimension AXIS
    x, s, n, inside, rest_n,  # of the tile
    y, logit_scale,
    CLASSES: tl.constexpr, SPREAD: tl.constexpr, STATS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The sums with a tile more in them."""
    new_m = tl.maximum(m, tl.max(s, axis=AXIS))
    subtracted = finite(new_m)
    moved = finite(m) - subtracted
    difference = s - tl.expand_dims(subtracted, AXIS)
    e = exponential(difference)
    # others = others * exp(m - m') + sum(exp(s - m'))        m' = max(m, max(s))
    factor = exponential(m - subtracted)
    others = others * factor + tl.sum(tl.where(n == y, 0.0, e) if CLASSES else e, axis=AXIS)
    if STATS:
        product = (product + moved * total) * factor + tl.sum(tl.where(e == 0.0, 0.0, e * difference), axis=AXIS)
        total = total * factor + tl.sum(e, axis=AXIS)
        z = x * logit_scale
        # NaN counts as the largest.
        z = tl.where(inside, tl.where(z != z, float("inf"), z), float("-inf"))
        tiles_best = tl.max(z, axis=AXIS)
        tiles_first = tl.min(tl.where(inside & (z == tl.expand_dims(tiles_best, AXIS)), n, NO_CLASS), axis=AXIS)
        is_better = (tiles_best > best) | (first == NO_CLASS)
        best, first = tl.where(is_better, tiles_best, best), tl.where(is_better, tiles_first, first)
    if SPREAD:
        spread += rest * moved + tl.sum(tl.where(inside, rest_n * difference, 0.0), axis=AXIS)
        rest += tl.sum(rest_n, axis=AXIS)
    return new_m, others, total, product, spread, rest, best, first


@triton.jit
def gathered(
    m, others, total, product, spread, rest,  # (groups,), each relative to its own m
    row_m,
    SPREAD: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """The sums of all groups, relative to row_m."""
    subtracted = finite(row_m)
    moved = finite(m) - subtracted
    factor = exponential(m - subtracted)
    others = tl.sum(others * factor, axis=0)
    if STATS:
        product = tl.sum((product + moved * total) * factor, axis=0)
        total = tl.sum(total * factor, axis=0)
    else:
        product, total = 0.0, 0.0
    if SPREAD:
        spread = tl.sum(spread + rest * moved, axis=0)
        rest = tl.sum(rest, axis=0)
    else:
        spread, rest = 0.0, 0.0
    return others, total, product, spread, rest


@triton.jit
def load_class(
    x_pointers,  # to the rows' first logits
    target_ptr,
    weight_ptr,
    row,
    in_rows,
    x_stride_n,
    classes,
    ignore_index,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
):
    """y, whether the row counts, s_y and w_y; both NaN of a class that there is none of, of which nothing is read."""
    y = tl.load(target_ptr + row, mask=in_rows, other=0).to(tl.int64)
    counts = in_rows & (y != ignore_index)
    is_class = counts & (y >= 0) & (y < classes)
    x = tl.load(x_pointers + y * x_stride_n, mask=is_class, other=0.0).to(tl.float32)
    s_y = tl.where(is_class, scores(x, logit_scale, softcap, SOFTCAP), float("nan"))
    own = tl.where(is_class, 1.0, float("nan"))
    if weight_ptr is not None:
        own *= tl.load(weight_ptr + y, mask=is_class, other=0.0).to(tl.float32)
    return y.to(tl.int32), counts, s_y, tl.where(counts, own, 0.0)


@triton.jit
def store_row(
    loss_ptr,  # (rows,)
    own_ptr,  # (rows,) or None
    statistics_ptr,  # (4, rows)
    lse_ptr, entropy_ptr, correct_ptr,  # (rows,), where STATS
    row, rows, in_rows, counts, y, s_y, own, likeliest,
    m, others, total, product, spread, rest,
    smoothing, z_loss,
    CLASSES: tl.constexpr, SPREAD: tl.constexpr, Z_LOSS: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """The loss of each row and what is kept of it, of its sums."""
    if CLASSES:
        # lse - s_y, with the digits of a loss near 0: where s_y is the largest, exp(s_y - m) is 1
        distance = m - s_y
        log_total = tl.where(distance == 0.0, log1p(others), tl.log(others + exponential(-distance)))
        loss = (1.0 - smoothing) * own * (distance + log_total)
    else:
        log_total = tl.log(others)
        loss = tl.zeros_like(log_total)
    if SPREAD:
        # sum of rest_c * (lse - s_c)
        loss += rest * log_total - spread
    lse = m + log_total
    if Z_LOSS:
        loss += z_loss * lse * lse * own
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0).to(loss_ptr.dtype.element_ty), mask=in_rows)
    if own_ptr is not None:
        tl.store(own_ptr + row, own, mask=in_rows)
    rows = rows.to(tl.int64)
    tl.store(statistics_ptr + row, tl.where(counts, m, 0.0), mask=in_rows)
    tl.store(statistics_ptr + rows + row, tl.where(counts, log_total, 0.0), mask=in_rows)
    tl.store(statistics_ptr + 2 * rows + row, tl.where(counts, tl.log(others), 0.0), mask=in_rows)
    tl.store(statistics_ptr + 3 * rows + row, tl.where(counts, rest, 0.0), mask=in_rows)
    if STATS:
        # -sum p_c log p_c = log_total - sum exp(s_c - m) * (s_c - m) / total
        entropy = log_total - product / total
        tl.store(lse_ptr + row, tl.where(counts, lse, 0.0), mask=in_rows)
        tl.store(entropy_ptr + row, tl.where(counts, entropy, 0.0), mask=in_rows)
        tl.store(correct_ptr + row, counts & (likeliest == y) if CLASSES else likeliest, mask=in_rows)


@triton.jit
def load_row(
    grad_ptr,  # (rows,) where EACH, else one number
    denominator_ptr,  # one number, or None
    statistics_ptr,  # (4, rows)
    target_ptr, weight_ptr,
    row, rows, in_rows, classes, ignore_index, smoothing, z_loss, divisor,
    CLASSES: tl.constexpr, Z_LOSS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of each row what its gradient is made of: y, counts, g, m, log_total, the factors of p_j and of p_y - [j = y],
    and p_y - 1."""
    rows = rows.to(tl.int64)
    y = tl.zeros_like(row).to(tl.int32)
    counts, own, target_factor = in_rows, 1.0, 0.0
    if CLASSES:
        y = tl.load(target_ptr + row, mask=in_rows, other=0).to(tl.int64)
        counts = in_rows & (y != ignore_index)
        is_class = counts & (y >= 0) & (y < classes)
        own = tl.where(is_class, 1.0, float("nan"))
        if weight_ptr is not None:
            own *= tl.load(weight_ptr + y, mask=is_class, other=0.0).to(tl.float32)
        target_factor = (1.0 - smoothing) * own
        y = y.to(tl.int32)
    g = tl.load(grad_ptr + row, mask=counts, other=0.0) if EACH else tl.load(grad_ptr)
    g = g.to(tl.float32) / divisor
    if denominator_ptr is not None:
        g /= tl.load(denominator_ptr)
    m = tl.load(statistics_ptr + row, mask=counts, other=0.0)
    log_total = tl.load(statistics_ptr + rows + row, mask=counts, other=0.0)
    log_others = tl.load(statistics_ptr + 2 * rows + row, mask=counts, other=0.0)
    # rest + 2 * z_loss * lse * own
    factor = tl.load(statistics_ptr + 3 * rows + row, mask=counts, other=0.0)
    if Z_LOSS:
        factor += 2.0 * z_loss * (m + log_total) * own
    # p_y - 1 = -exp(log_others - log_total)
    return y, counts, g, m, log_total, factor, target_factor, -exponential(log_others - log_total)


@triton.jit
def gradient_of(
    x, s, n, rest_n,  # of the tile
    y, g, m, log_total, factor, target_factor, of_target,  # of its rows, broadcast to it
    logit_scale, softcap,
    SOFTCAP: tl.constexpr, CLASSES: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """dx of a tile."""
    p = exponential((s - m) - log_total)
    # p_j * (rest + 2 * z_loss * lse * own) - rest_j + (1 - e) * w_y * (p_j - [j = y])
    ds = p * factor
    if SPREAD:
        ds -= rest_n
    if CLASSES:
        ds += target_factor * tl.where(n == y, of_target, p)
    return g * ds * slopes(x, logit_scale, softcap, SOFTCAP)
