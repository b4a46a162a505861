"""What norms over rows share on Triton: their tiles, and the whole backward.

    x_hat = (x - mean) * rstd            without a mean x * rstd

Backward, with g = dy * weight and averages over the row:
    dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))          without a mean rstd * (g - x_hat * avg(g * x_hat))
    dweight = sum over rows of dy * x_hat,  dbias = sum over rows of dy

The forwards, and what mean and rstd are, stand in the operators' rooms. An argument that is not used is None.

Memory is the floor: the backward reads x and dy and writes dx (3 widths a row). Where a program holds a tile of whole
rows in registers it moves no more than that, and sums the parameters' gradients on the way. Wider rows are walked in
chunks: one kernel makes dx and reads the rows twice, mostly from the L2 cache, and another, of columns, makes dweight
and dbias. These are summed per program in the statistics' dtype, over a fixed set of rows each, and the partial sums by
one reduction: no atomics, so they are the same on every run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.triton.common import CompileCase, as_rows, cdiv, next_power_of_2
from gptkern.backends.triton.rows import Tile, held_elements

# --- Backward: rows held in registers -------------------------------------------------------------------------------


@triton.jit
def backward_kernel(
    dy_ptr,  # (rows, width)        gradient of y
    incoming_ptr,  # (rows, width)        gradient that reaches x by another way, added to dx, or None
    x_ptr,  # (rows, width)        what was normalised
    weight_ptr,  # (width,)             or None
    mean_ptr,  # (rows,)              float32 (float64), or None
    rstd_ptr,  # (rows,)              as mean
    dx_ptr,  # (rows, width)        gradient of x, contiguous, or None where it is not needed
    dweight_ptr,  # (programs, width)    partial sums, or None where they are not needed
    dbias_ptr,  # (programs, width)    partial sums, or None where they are not needed
    dy_stride,  # from a row to the next
    incoming_stride,
    x_stride,
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = rstd_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = column[None, :] < width
    if dx_ptr is not None and weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)

    # A program takes every num_programs-th tile, so the sums do not depend on the order in which programs run.
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0).to(tl.int64) * BLOCK_ROWS):
        # int64 like `start`, of which an interpreter makes Python's int
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row[:, None] < rows) & in_row
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(statistic)
        if dx_ptr is not None or dweight_ptr is not None:
            x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(statistic)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
                x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
            else:
                # What is outside is 0, and adds nothing to any sum.
                x_hat = x * rstd
        if dweight_ptr is not None:
            dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy * weight if weight_ptr is not None else dy
            # dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
            average = (tl.sum(g * x_hat, axis=1) / width)[:, None]
            if mean_ptr is not None:
                dx = rstd * (g - (tl.sum(g, axis=1) / width)[:, None] - x_hat * average)
            else:
                dx = rstd * (g - x_hat * average)
            if incoming_ptr is not None:
                incoming = incoming_ptr + row[:, None] * incoming_stride + column[None, :]
                dx += tl.load(incoming, mask=inside, other=0.0).to(statistic)
            tl.store(dx_ptr + row[:, None] * width + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)

    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * width + column, tl.sum(dbias, axis=0), mask=column < width)


# --- Backward: wider rows -------------------------------------------------------------------------------------------


@triton.jit
def _load_g(dy_ptr, weight_ptr, column, width, statistic: tl.constexpr):
    """g = dy * weight of a chunk of a row; 0 beyond the row."""
    g = tl.load(dy_ptr + column, mask=column < width, other=0.0).to(statistic)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)
    return g


@triton.jit
def _load_x_hat(x_ptr, mean, rstd, column, width, statistic: tl.constexpr):
    """x_hat of a chunk of a row; anything beyond the row, where g is 0. mean: None without one."""
    x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(statistic)
    return x * rstd if mean is None else (x - mean) * rstd


@triton.jit
def input_gradient_wide_kernel(
    dy_ptr,  # arguments: as backward_kernel's
    incoming_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_stride,
    incoming_stride,
    x_stride,
    width,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic: tl.constexpr = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_stride
    x_ptr += row * x_stride
    dx_ptr += row * width
    mean = None
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)

    sum_g = tl.zeros((BLOCK_WIDTH,), dtype=statistic)
    sum_gx = tl.zeros((BLOCK_WIDTH,), dtype=statistic)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        g = _load_g(dy_ptr, weight_ptr, column, width, statistic)
        sum_gx += g * _load_x_hat(x_ptr, mean, rstd, column, width, statistic)
        if mean_ptr is not None:
            sum_g += g
    average_g = tl.sum(sum_g, axis=0) / width
    average_gx = tl.sum(sum_gx, axis=0) / width

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        g = _load_g(dy_ptr, weight_ptr, column, width, statistic)
        x_hat = _load_x_hat(x_ptr, mean, rstd, column, width, statistic)
        # dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
        if mean_ptr is not None:
            g -= average_g
        dx = rstd * (g - x_hat * average_gx)
        if incoming_ptr is not None:
            incoming = incoming_ptr + row * incoming_stride + column
            dx += tl.load(incoming, mask=column < width, other=0.0).to(statistic)
        tl.store(dx_ptr + column, dx.to(dx_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def parameter_gradient_wide_kernel(
    dy_ptr,  # arguments: as backward_kernel's, but for
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,  # (splits, width)      partial sums, or None where they are not needed
    dbias_ptr,  # (splits, width)      partial sums, or None where they are not needed
    dy_stride,
    x_stride,
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = rstd_ptr.dtype.element_ty
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    split = tl.program_id(1).to(tl.int64)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    for start in range(split * BLOCK_ROWS, rows, tl.num_programs(1).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(statistic)
        if dbias_ptr is not None:
            dbias += dy
        if dweight_ptr is not None:
            x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(statistic)
            if mean_ptr is not None:
                # dy is 0 outside, so x_hat needs no mask there.
                x -= tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
            dweight += dy * (x * tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None])
    if dweight_ptr is not None:
        tl.store(dweight_ptr + split * width + column, tl.sum(dweight, axis=0), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + split * width + column, tl.sum(dbias, axis=0), mask=column < width)


# --- Tiles and launcher ---------------------------------------------------------------------------------------------

# Elements of a tile of narrow rows, and of a thread: with them ptxas spills nothing up to the widest row that a room
# holds in registers. Reasoned, compiled under Triton 3.7.1; not measured.
_ELEMENTS, _A_THREAD = 2048, 16
# The narrowest tile: narrower ones are rows of so few bytes that nobody waits for them.
_LEAST_WIDTH = 16


@functools.lru_cache
def held_tile(width: int) -> Tile:
    """The tile of rows that are held whole."""
    block_width = max(_LEAST_WIDTH, next_power_of_2(width))
    elements, warps = held_elements(block_width, _ELEMENTS, _A_THREAD)
    return Tile(elements // block_width, block_width, warps)


class Walked(NamedTuple):
    """The tiles of rows that are walked: chunks of a row, and tiles that sum the parameters' gradients."""

    chunk: Tile
    parameters: Tile


# Programs a multiprocessor that share the rows of a backward: enough to hide latency, few
# enough partial sums. Reasoned from occupancy (80 registers a thread); not measured yet.
PROGRAMS_PER_MULTIPROCESSOR = 2


def programs_of(device: torch.device) -> int:
    """How many programs share the rows of a backward. Under the interpreter: a few, so that each has several tiles."""
    if device.type != "cuda":
        return 4
    return PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def partial_sums(rows: int, width: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """(columns of tiles, splits of the rows): the grid of the parameters' gradients, as many programs as share rows."""
    columns = cdiv(width, tile.block_width)
    return columns, min(cdiv(rows, tile.block_rows), cdiv(programs_of(device), columns))


def backward(dy, x, weight, mean, rstd, incoming, needs: tuple[bool, bool, bool], walked: Walked | None):
    """-> dx as x, dweight (width,), dbias (width,) in rstd's dtype; what is not needed is empty.

    Args:
        dy, x, incoming: (…, width), one shape. weight: (width,). mean, rstd: (rows,). All but dy, x, rstd may be None.
        needs: whether dx, dweight, dbias are needed.
        walked: the tiles of rows that registers do not hold; None for those that they do.
    """
    need_input, need_weight, need_bias = needs
    width = x.shape[-1]
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_input else rstd.new_empty(0)
    if x.numel() == 0 or not any(needs):
        return dx, rstd.new_zeros(width if need_weight else 0), rstd.new_zeros(width if need_bias else 0)
    dy, x = as_rows(dy), as_rows(x)
    incoming = None if incoming is None else as_rows(incoming)
    incoming_stride = 0 if incoming is None else incoming.stride(0)
    rows = x.shape[0]
    if walked is None:
        tile = held_tile(width)
        grid = (min(cdiv(rows, tile.block_rows), programs_of(x.device)),)
    else:
        tile = walked.parameters
        grid = partial_sums(rows, width, tile, x.device)
    # The last of a grid shares the rows.
    dweight, dbias = (rstd.new_empty((grid[-1], width)) if needed else None for needed in (need_weight, need_bias))
    blocks = dict(BLOCK_ROWS=tile.block_rows, BLOCK_WIDTH=tile.block_width, num_warps=tile.num_warps)
    if walked is None:
        backward_kernel[grid](
            dy, incoming, x, weight, mean, rstd, dx if need_input else None, dweight, dbias,
            dy.stride(0), incoming_stride, x.stride(0), rows, width, **blocks,
        )  # fmt: skip
    else:
        if need_input:
            input_gradient_wide_kernel[(rows,)](
                dy, incoming, x, weight, mean, rstd, dx, dy.stride(0), incoming_stride, x.stride(0), width,
                BLOCK_WIDTH=walked.chunk.block_width, num_warps=walked.chunk.num_warps,
            )  # fmt: skip
        if need_weight or need_bias:
            parameter_gradient_wide_kernel[grid](
                dy, x, mean, rstd, dweight, dbias, dy.stride(0), x.stride(0), rows, width, **blocks
            )
    # One reduction each: a registered op may not return two views of one tensor.
    return dx, *(rstd.new_empty(0) if partial is None else partial.sum(0) for partial in (dweight, dbias))


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------

_STATISTICS = ("statistics_ptr", "mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr")


def held_widths(widest: int) -> tuple[int, ...]:
    """Of the rows that are held: the least, several of a tile, a whole tile, more warps, and the widest."""
    return tuple(sorted({_LEAST_WIDTH, _ELEMENTS // 8, _ELEMENTS, 2 * _ELEMENTS, widest}))


def compile_case(kernel, name: str, dtype: str, tile: Tile, constants: Mapping[str, Any]) -> CompileCase:
    """The case of a kernel with this tile; constants: of the other arguments those that a launch does not pass on."""
    constants = constants | dict(BLOCK_ROWS=tile.block_rows, BLOCK_WIDTH=tile.block_width)
    constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    statistic = "fp64" if dtype == "fp64" else "fp32"

    def kind(argument):
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return f"*{statistic if argument in _STATISTICS else dtype}"
        return "fp32" if argument == "eps" else "i32"

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = tuple(argument for argument in signature if argument.endswith(("stride", "width")))
    return CompileCase(f"{name} {dtype}", kernel, signature, constants, tile.num_warps, 3, aligned)
