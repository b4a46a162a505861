"""layer_norm on Triton.

    s     = x, or x + residual
    x_hat = (s - mean) * rstd            rstd = 1 / sqrt(var + eps)
    y     = x_hat * weight + bias

Backward, with g = dy * weight and averages over the row:
    ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))  (+ the gradient that reaches s by itself)
    dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy

Memory is the floor: the forward reads x and writes y (2 widths a row; with a residual 4), the backward reads s and dy
and writes ds (3). Up to REGISTER_WIDTH a program holds a tile of whole rows in registers and moves no more than that.
Wider rows are walked in chunks: the forward reads them twice and the backward three times, mostly from the L2 cache.

The weight and bias gradients are summed per program in float32, over a fixed set of rows each, and the partial sums
by one reduction: no atomics, so they are the same on every run.

Tests reach the variant for wide rows at small widths by lowering REGISTER_WIDTH and WIDE_BLOCK (monkeypatch).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton.common import CompileCase, as_rows, cdiv, programs_of
from gptkern.operators.layer_norm.contract import Call, Gradient


class Tile(NamedTuple):
    """block_rows rows by block_width columns: whole rows, or of wider ones a chunk."""

    block_rows: int
    block_width: int
    num_warps: int


# kernel, the widest row -> tile, from layer_norm.json; None: of a wider row.
TABLE = Table("layer_norm", {"kernel": ("forward", "backward", "parameters"), "width": None}, Tile)
# Widest row that is held in registers, in elements of at most 4 bytes (a quarter of it for float64).
REGISTER_WIDTH = {
    direction: max(width for kernel, width in TABLE.defaults(80) if kernel == direction and width is not None)
    for direction in ("forward", "backward")
}
# Elements of a chunk of a wide row, where it is not the table's: set by tests alone.
WIDE_BLOCK: int | None = None


@triton.jit
def _quotient(a, b):
    """a / b rounded once; b is one number. `/` may be 2 ulp off on a GPU: too much for a mean far above the spread."""
    divisor = tl.full(a.shape, b, a.dtype)
    if a.dtype == tl.float64:
        return a / divisor
    else:
        return tl.div_rn(a, divisor)


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, width)   input
    residual_ptr,  # (rows, width)   added to it, where HAS_RESIDUAL
    weight_ptr,  # (width,)
    bias_ptr,  # (width,)
    y_ptr,  # (rows, width)   output, contiguous
    summed_ptr,  # (rows, width)   x + residual, contiguous, where HAS_RESIDUAL
    mean_ptr,  # (rows,)         float32, kept for the backward
    rstd_ptr,  # (rows,)         float32
    x_stride,  # from a row to the next
    residual_stride,
    rows,
    width,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = column[None, :] < width
    inside = (row[:, None] < rows) & in_row

    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        # The sum is rounded to its dtype before it is normalised: the backward sees the same numbers.
        summed = (x.to(statistic) + residual.to(statistic)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row[:, None] * width + column[None, :], summed, mask=inside)
        x = summed
    x = x.to(statistic)

    mean = _quotient(tl.sum(x, axis=1), width)
    # var = avg((x - mean)²): a second pass over registers, not E[x²] - mean², which cancels at |mean| >> std
    centred = tl.where(in_row, x - mean[:, None], 0.0)
    var = tl.sum(centred * centred, axis=1) / width
    # rstd = 1 / sqrt(var + eps)
    rstd = 1.0 / tl.sqrt(var + EPS)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    # y = x_hat * weight + bias
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_summed(x_ptr, residual_ptr, column, width, statistic: tl.constexpr, rounded: tl.constexpr, HAS_RESIDUAL):
    """A chunk of a row of s = x + residual, rounded to s's dtype, in the statistics' dtype."""
    x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(statistic)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + column, mask=column < width, other=0.0).to(statistic)
        x = (x + residual).to(rounded).to(statistic)
    return x


@triton.jit
def _forward_wide_kernel(
    x_ptr,  # (rows, width)   input
    residual_ptr,  # (rows, width)   added to it, where HAS_RESIDUAL
    weight_ptr,  # (width,)
    bias_ptr,  # (width,)
    y_ptr,  # (rows, width)   output, contiguous
    summed_ptr,  # (rows, width)   x + residual, contiguous, where HAS_RESIDUAL
    mean_ptr,  # (rows,)         float32, kept for the backward
    rstd_ptr,  # (rows,)         float32
    x_stride,  # from a row to the next
    residual_stride,
    width,
    EPS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic: tl.constexpr = mean_ptr.dtype.element_ty
    rounded: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    y_ptr += row * width
    summed_ptr += row * width

    # Chan's update: the mean and the squared deviations m2 of the columns so far, merged with a chunk's own.
    mean = tl.zeros((), dtype=statistic)
    m2 = tl.zeros((), dtype=statistic)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        x = _load_summed(x_ptr, residual_ptr, column, width, statistic, rounded, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(summed_ptr + column, x.to(rounded), mask=column < width)
        count = tl.minimum(width - start, BLOCK_WIDTH).to(statistic)
        chunk_mean = _quotient(tl.sum(x, axis=0), count)
        centred = tl.where(column < width, x - chunk_mean, 0.0)
        delta = chunk_mean - mean
        share = _quotient(count, start + count)
        # mean += delta * n_b / n        m2 += m2_b + delta² * n_a * n_b / n
        mean += delta * share
        m2 += tl.sum(centred * centred, axis=0) + delta * delta * start * share
    rstd = 1.0 / tl.sqrt(m2 / width + EPS)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        # Added again, not read back from `summed`: another thread may have written it.
        x = _load_summed(x_ptr, residual_ptr, column, width, statistic, rounded, HAS_RESIDUAL)
        # y = x_hat * weight + bias
        y = (x - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)
        if HAS_BIAS:
            y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(statistic)
        tl.store(y_ptr + column, y.to(rounded), mask=column < width)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (rows, width)        gradient of y
    dsummed_in_ptr,  # (rows, width)        gradient that reaches s by itself, where HAS_GRAD_SUMMED
    s_ptr,  # (rows, width)        what was normalised
    weight_ptr,  # (width,)
    mean_ptr,  # (rows,)              float32
    rstd_ptr,  # (rows,)              float32
    ds_ptr,  # (rows, width)        gradient of s, contiguous, where NEED_INPUT
    dweight_ptr,  # (programs, width)    partial sums, where NEED_WEIGHT
    dbias_ptr,  # (programs, width)    partial sums, where NEED_BIAS
    dy_stride,  # from a row to the next
    dsummed_in_stride,
    s_stride,
    rows,
    width,
    HAS_GRAD_SUMMED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = mean_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = column[None, :] < width
    if NEED_INPUT and HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    if NEED_WEIGHT:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    if NEED_BIAS:
        dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)

    # A program takes every num_programs-th tile, so the sums do not depend on the order in which programs run.
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row[:, None] < rows) & in_row
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(statistic)
        if NEED_INPUT or NEED_WEIGHT:
            s = tl.load(s_ptr + row[:, None] * s_stride + column[None, :], mask=inside, other=0.0).to(statistic)
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
            x_hat = tl.where(inside, (s - mean) * rstd, 0.0)
        if NEED_WEIGHT:
            dweight += dy * x_hat
        if NEED_BIAS:
            dbias += dy
        if NEED_INPUT:
            g = dy * weight if HAS_WEIGHT else dy
            average_g = (tl.sum(g, axis=1) / width)[:, None]
            average_gx = (tl.sum(g * x_hat, axis=1) / width)[:, None]
            # ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
            ds = rstd * (g - average_g - x_hat * average_gx)
            if HAS_GRAD_SUMMED:
                incoming = dsummed_in_ptr + row[:, None] * dsummed_in_stride + column[None, :]
                ds += tl.load(incoming, mask=inside, other=0.0).to(statistic)
            tl.store(ds_ptr + row[:, None] * width + column[None, :], ds.to(ds_ptr.dtype.element_ty), mask=inside)

    if NEED_WEIGHT:
        tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=column < width)
    if NEED_BIAS:
        tl.store(dbias_ptr + program * width + column, tl.sum(dbias, axis=0), mask=column < width)


@triton.jit
def _input_gradient_wide_kernel(
    dy_ptr,  # (rows, width)   gradient of y
    dsummed_in_ptr,  # (rows, width)   gradient that reaches s by itself, where HAS_GRAD_SUMMED
    s_ptr,  # (rows, width)   what was normalised
    weight_ptr,  # (width,)
    mean_ptr,  # (rows,)         float32
    rstd_ptr,  # (rows,)         float32
    ds_ptr,  # (rows, width)   gradient of s, contiguous
    dy_stride,  # from a row to the next
    dsummed_in_stride,
    s_stride,
    width,
    HAS_GRAD_SUMMED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = mean_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_stride
    dsummed_in_ptr += row * dsummed_in_stride
    s_ptr += row * s_stride
    ds_ptr += row * width
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)

    sum_g = tl.zeros((BLOCK_WIDTH,), dtype=statistic)
    sum_gx = tl.zeros((BLOCK_WIDTH,), dtype=statistic)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        g = tl.load(dy_ptr + column, mask=column < width, other=0.0).to(statistic)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)
        s = tl.load(s_ptr + column, mask=column < width, other=0.0).to(statistic)
        sum_g += g
        # g is 0 beyond the row, so x_hat needs no mask there.
        sum_gx += g * ((s - mean) * rstd)
    average_g = tl.sum(sum_g, axis=0) / width
    average_gx = tl.sum(sum_gx, axis=0) / width

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        g = tl.load(dy_ptr + column, mask=column < width, other=0.0).to(statistic)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)
        x_hat = (tl.load(s_ptr + column, mask=column < width, other=0.0).to(statistic) - mean) * rstd
        # ds = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
        ds = rstd * (g - average_g - x_hat * average_gx)
        if HAS_GRAD_SUMMED:
            ds += tl.load(dsummed_in_ptr + column, mask=column < width, other=0.0).to(statistic)
        tl.store(ds_ptr + column, ds.to(ds_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _parameter_gradient_wide_kernel(
    dy_ptr,  # (rows, width)      gradient of y
    s_ptr,  # (rows, width)      what was normalised
    mean_ptr,  # (rows,)            float32
    rstd_ptr,  # (rows,)            float32
    dweight_ptr,  # (splits, width)    partial sums, where NEED_WEIGHT
    dbias_ptr,  # (splits, width)    partial sums, where NEED_BIAS
    dy_stride,  # from a row to the next
    s_stride,
    rows,
    width,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = mean_ptr.dtype.element_ty
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    split = tl.program_id(1).to(tl.int64)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    for start in range(split * BLOCK_ROWS, rows, tl.num_programs(1).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(statistic)
        dbias += dy
        if NEED_WEIGHT:
            s = tl.load(s_ptr + row[:, None] * s_stride + column[None, :], mask=inside, other=0.0).to(statistic)
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
            # dy is 0 outside, so x_hat needs no mask there.
            dweight += dy * ((s - mean) * rstd)
    if NEED_WEIGHT:
        tl.store(dweight_ptr + split * width + column, tl.sum(dweight, axis=0), mask=column < width)
    if NEED_BIAS:
        tl.store(dbias_ptr + split * width + column, tl.sum(dbias, axis=0), mask=column < width)


# --- Launchers --------------------------------------------------------------------------------------------------------


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    for name, tensor in call._asdict().items():
        if isinstance(tensor, torch.Tensor) and tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16, float32 and float64"
    return None


def forward(call: Call):
    """(…, width) -> output (…, width), summed (…, width) or empty, mean (rows,), rstd (rows,)."""
    input, residual, weight, bias, eps = call
    width = input.shape[-1]
    dtype = input.dtype if residual is None else torch.result_type(input, residual)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    summed = output.new_empty(0) if residual is None else torch.empty_like(output)
    x = as_rows(input)
    rows = x.shape[0]
    mean = torch.empty(rows, dtype=statistic, device=input.device)
    rstd = torch.empty_like(mean)
    if output.numel() == 0:
        return output, summed, mean, rstd
    added = x if residual is None else as_rows(residual)
    flags = dict(
        EPS=eps, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None
    )  # fmt: skip
    # An absent tensor is never read; the kernel needs some pointer in its place.
    pointers = (
        x, added, _some(weight, x), _some(bias, x), output, _some(summed, output), mean, rstd,
        x.stride(0), added.stride(0),
    )  # fmt: skip
    if _is_wide("forward", width, statistic):
        _, block_width, warps = TABLE.find(x.device, math.inf, "forward")
        _forward_wide_kernel[(rows,)](
            *pointers, width, **flags, BLOCK_WIDTH=WIDE_BLOCK or block_width, num_warps=warps
        )  # fmt: skip
    else:
        block_rows, block_width, warps = TABLE.find(x.device, width, "forward")
        grid = (cdiv(rows, block_rows),)
        _forward_kernel[grid](
            *pointers, rows, width, **flags, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps
        )
    return output, summed, mean, rstd


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,), dbias (width,) in the statistics' dtype; what is not needed is empty."""
    grad_output, grad_summed, mean, rstd, need_input, need_weight, need_bias = gradient
    summed, weight = call.input, call.weight
    width = summed.shape[-1]
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    dsummed = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device) if need_input else mean.new_empty(0)
    if summed.numel() == 0:
        return dsummed, mean.new_zeros(width if need_weight else 0), mean.new_zeros(width if need_bias else 0)
    s, dy = as_rows(summed), as_rows(grad_output)
    incoming = dy if grad_summed is None else as_rows(grad_summed)
    rows = s.shape[0]
    wanted = need_weight + need_bias
    if _is_wide("backward", width, mean.dtype):
        if need_input:
            _, block_width, warps = TABLE.find(s.device, math.inf, "backward")
            _input_gradient_wide_kernel[(rows,)](
                dy, incoming, s, _some(weight, s), mean, rstd, dsummed, dy.stride(0), incoming.stride(0), s.stride(0),
                width, HAS_GRAD_SUMMED=grad_summed is not None, HAS_WEIGHT=weight is not None,
                BLOCK_WIDTH=WIDE_BLOCK or block_width, num_warps=warps,
            )  # fmt: skip
        block_rows, block_width, warps = TABLE.find(s.device, math.inf, "parameters")
        columns = cdiv(width, block_width)
        splits = min(cdiv(rows, block_rows), cdiv(programs_of(s.device), columns))
        partial = mean.new_empty((wanted, splits, width))
        if wanted:
            _parameter_gradient_wide_kernel[(columns, splits)](
                dy, s, mean, rstd, partial[0], partial[-1], dy.stride(0), s.stride(0), rows, width,
                NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
                BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps,
            )  # fmt: skip
    else:
        block_rows, block_width, warps = TABLE.find(s.device, width, "backward")
        programs = min(cdiv(rows, block_rows), programs_of(s.device))
        partial = mean.new_empty((wanted, programs, width))
        some = partial if wanted else mean[None]
        _backward_kernel[(programs,)](
            dy, incoming, s, _some(weight, s), mean, rstd, _some(dsummed, s), some[0], some[-1],
            dy.stride(0), incoming.stride(0), s.stride(0), rows, width,
            HAS_GRAD_SUMMED=grad_summed is not None, HAS_WEIGHT=weight is not None,
            NEED_INPUT=need_input, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps,
        )  # fmt: skip
    # One reduction each: a registered op may not return two views of one tensor.
    dweight = partial[0].sum(0) if need_weight else mean.new_empty(0)
    dbias = partial[-1].sum(0) if need_bias else mean.new_empty(0)
    return dsummed, dweight, dbias


def _some(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None or tensor.numel() == 0 else tensor


def _is_wide(direction: str, width: int, statistic: torch.dtype) -> bool:
    return width > REGISTER_WIDTH[direction] // (4 if statistic == torch.float64 else 1)


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the table, with everything that a kernel can be asked for at once."""
    every_flag = (
        "HAS_RESIDUAL", "HAS_GRAD_SUMMED", "HAS_WEIGHT", "HAS_BIAS", "NEED_INPUT", "NEED_WEIGHT", "NEED_BIAS"
    )  # fmt: skip
    statistics = ("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr")

    def case(kernel, name, dtype, num_warps, **blocks):
        constants = dict.fromkeys(every_flag, True) | dict(EPS=1e-5) | blocks
        constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
        statistic = "fp64" if dtype == "fp64" else "fp32"

        def kind(argument):
            if argument in constants:
                return "constexpr"
            if argument.endswith("_ptr"):
                return f"*{statistic if argument in statistics else dtype}"
            return "i32"

        signature = {argument: kind(argument) for argument in kernel.arg_names}
        aligned = tuple(argument for argument in signature if argument.endswith(("stride", "width")))
        return CompileCase(f"{name} {dtype}", kernel, signature, constants, num_warps, 3, aligned)

    def tiled(kernel, name, dtype, tile):
        blocks = dict(BLOCK_ROWS=tile.block_rows, BLOCK_WIDTH=tile.block_width)
        return case(kernel, name, dtype, tile.num_warps, **blocks)

    held = {"forward": _forward_kernel, "backward": _backward_kernel}
    walked = {
        "forward": (_forward_wide_kernel, "forward wide"),
        "backward": (_input_gradient_wide_kernel, "input gradient wide"),
        "parameters": (_parameter_gradient_wide_kernel, "parameter gradient wide"),
    }
    cases = []
    for device, rows in TABLE.shipped(architecture):
        for (direction, width), row in rows.items():
            if width is not None:
                name = f"{direction} width {width}{device}"
                cases.append(tiled(held[direction], name, "bf16", row.configuration))
                # float64 is there to be right, not fast: its widest tiles alone.
                if width == REGISTER_WIDTH[direction] // 4:
                    cases.append(tiled(held[direction], name, "fp64", row.configuration))
            else:
                kernel, name = walked[direction]
                cases += [tiled(kernel, f"{name}{device}", dtype, row.configuration) for dtype in ("bf16", "fp64")]
    return cases
