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
one kernel, which writes the weight's dtype: no atomics, so they are the same on every run.

What feeds memory is bytes under way. A multiprocessor has 32 warps, and while they compute a tile the next one or two
come into shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.triton.common import CompileCase, as_rows, cdiv, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.rows import WARP, Tile, held_elements

# --- Backward: rows held in registers -------------------------------------------------------------------------------


@jit(do_not_specialize=["rows", "mean_ptr", "rstd_ptr"])
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
    STAGES: tl.constexpr,  # tiles under way, with the one that is computed
):
    statistic = rstd_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = column[None, :] < width
    # Of a tile's first row the offsets are the same in all threads, of the others in all tiles.
    of_tile = tl.arange(0, BLOCK_ROWS)
    below = of_tile[:, None].to(tl.int64)
    if dx_ptr is not None and weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)

    # A program takes every num_programs-th tile, so the sums do not depend on the order in which programs run.
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in tl.range(program * BLOCK_ROWS, rows, step, num_stages=STAGES):
        # An interpreter makes Python's int of it.
        first = tl.cast(start, tl.int64)
        in_tile = of_tile < rows - first
        inside = in_tile[:, None] & in_row
        dy_tile = dy_ptr + first * dy_stride + (below * dy_stride + column[None, :])
        dy = tl.load(dy_tile, mask=inside, other=0.0).to(statistic)
        if dx_ptr is not None or dweight_ptr is not None:
            x_tile = x_ptr + first * x_stride + (below * x_stride + column[None, :])
            x = tl.load(x_tile, mask=inside, other=0.0).to(statistic)
            rstd = tl.load(rstd_ptr + first + of_tile, mask=in_tile, other=0.0)[:, None]
            # What is outside is of dy 0, and adds nothing to any sum.
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + first + of_tile, mask=in_tile, other=0.0)[:, None]
                x_hat = (x - mean) * rstd
            else:
                x_hat = x * rstd
        if dweight_ptr is not None:
            dweight += dy * x_hat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy * weight if weight_ptr is not None else dy
            # dx = rstd * (g - avg(g) - x_hat * avg(g * x_hat))
            if mean_ptr is not None:
                # Both averages of a row by one reduction: warps meet once.
                average_gx, average_g = tl.split(tl.sum(tl.join(g * x_hat, g), axis=1) / width)
                dx = rstd * (g - average_g[:, None] - x_hat * average_gx[:, None])
            else:
                dx = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=1) / width)[:, None])
            if incoming_ptr is not None:
                incoming_tile = incoming_ptr + first * incoming_stride + (below * incoming_stride + column[None, :])
                dx += tl.load(incoming_tile, mask=inside, other=0.0).to(statistic)
            dx_tile = dx_ptr + first * width + (below * width + column[None, :])
            tl.store(dx_tile, dx.to(dx_ptr.dtype.element_ty), mask=inside)

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


@jit(do_not_specialize=["mean_ptr", "rstd_ptr"])
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


@jit(do_not_specialize=["rows", "mean_ptr", "rstd_ptr"])
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
    STAGES: tl.constexpr,
):
    statistic = rstd_ptr.dtype.element_ty
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    split = tl.program_id(1).to(tl.int64)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=statistic)
    step = tl.num_programs(1).to(tl.int64) * BLOCK_ROWS
    for start in tl.range(split * BLOCK_ROWS, rows, step, num_stages=STAGES):
        # int64 like `start`, of which an interpreter makes Python's int
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


# --- Backward: the partial sums -------------------------------------------------------------------------------------


@jit(do_not_specialize=["programs"])
def reduction_kernel(
    dweight_ptr,  # (programs, width)    partial sums in the statistics' dtype, or None where they are not needed
    dbias_ptr,  # (programs, width)    or None
    weight_gradient_ptr,  # (width,)             their sum, or None
    bias_gradient_ptr,  # (width,)             or None
    programs,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=dweight_ptr.dtype.element_ty)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=dbias_ptr.dtype.element_ty)
    for start in range(0, programs, BLOCK_ROWS):
        program = start + tl.arange(0, BLOCK_ROWS)
        inside = (program[:, None] < programs) & (column[None, :] < width)
        place = program[:, None].to(tl.int64) * width + column[None, :]
        if dweight_ptr is not None:
            dweight += tl.load(dweight_ptr + place, mask=inside, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_ptr + place, mask=inside, other=0.0)
    if dweight_ptr is not None:
        total = tl.sum(dweight, axis=0).to(weight_gradient_ptr.dtype.element_ty)
        tl.store(weight_gradient_ptr + column, total, mask=column < width)
    if dbias_ptr is not None:
        total = tl.sum(dbias, axis=0).to(bias_gradient_ptr.dtype.element_ty)
        tl.store(bias_gradient_ptr + column, total, mask=column < width)


# --- Tiles and launcher ---------------------------------------------------------------------------------------------

# Elements of a tile of narrow rows, and of a thread: with them ptxas spills nothing up to the widest row that a forward
# holds in registers. Reasoned, compiled under Triton 3.7.1; not measured.
_ELEMENTS, _A_THREAD = 2048, 16
# The narrowest tile: narrower ones are rows of so few bytes that nobody waits for them.
_LEAST_WIDTH = 16
# Warps of a multiprocessor that share the rows of a backward, and of a program that holds rows whole: all. A block of
# 1024 threads has at most 64 registers a thread, and one program a multiprocessor writes the fewest partial sums.
RESIDENT_WARPS = 32
# Bytes of an operand that a thread of such a program has in a tile: one load, or two of the widest rows. ptxas holds
# them, the weight and both sums in 64 registers.
_BYTES_A_THREAD = 16
# Of the tiles on their way to a program: of the 99 KB that a block has on every part, with room for its sums.
_BYTES_UNDER_WAY = 96 * 1024
# Partial sums of a tile, whose rows are programs. Reasoned: all of a multiprocessor's in few trips; not measured.
_REDUCTION = Tile(64, 32, 4)


@functools.lru_cache
def held_tile(width: int) -> Tile:
    """The tile of rows that a forward holds whole."""
    block_width = max(_LEAST_WIDTH, next_power_of_2(width))
    elements, warps = held_elements(block_width, _ELEMENTS, _A_THREAD)
    return Tile(elements // block_width, block_width, warps)


@functools.lru_cache
def backward_tile(width: int, dtype: torch.dtype) -> Tile:
    """The tile of rows that a backward holds whole."""
    block_width = max(_LEAST_WIDTH, next_power_of_2(width))
    elements = max(RESIDENT_WARPS * WARP * _BYTES_A_THREAD // dtype.itemsize, block_width)
    return Tile(elements // block_width, block_width, RESIDENT_WARPS)


def stages(tile: Tile, dtype: torch.dtype, has_incoming: bool) -> int:
    """Tiles of a backward that are computed or under way. For three of three operands 64 registers are too few."""
    if has_incoming:
        return 2
    return min(3, 1 + _BYTES_UNDER_WAY // (2 * tile.block_rows * tile.block_width * dtype.itemsize))


def sum_partials(dweight, dbias, weight_gradient, bias_gradient) -> None:
    """Writes the sums over the rows of dweight and of dbias, (programs, width) each, or None with its gradient."""
    programs, width = (dbias if dweight is None else dweight).shape
    reduction_kernel[(cdiv(width, _REDUCTION.block_width),)](
        dweight, dbias, weight_gradient, bias_gradient, programs, width,
        BLOCK_ROWS=_REDUCTION.block_rows, BLOCK_WIDTH=_REDUCTION.block_width, num_warps=_REDUCTION.num_warps,
    )  # fmt: skip


class Walked(NamedTuple):
    """The tiles of rows that are walked: chunks of a row, and tiles that sum the parameters' gradients."""

    chunk: Tile
    parameters: Tile


def programs_of(device: torch.device, num_warps: int) -> int:
    """How many programs share the rows of a backward. Under the interpreter: a few, so that each has several tiles."""
    if device.type != "cuda":
        return 4
    return RESIDENT_WARPS // num_warps * torch.cuda.get_device_properties(device).multi_processor_count


def partial_sums(rows: int, width: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """(columns of tiles, splits of the rows): the grid of the parameters' gradients, as many programs as share rows."""
    columns = cdiv(width, tile.block_width)
    return columns, min(cdiv(rows, tile.block_rows), cdiv(programs_of(device, tile.num_warps), columns))


def parameters_dtype(weight: torch.Tensor | None, rstd: torch.Tensor) -> torch.dtype:
    """Of the parameters' gradients: the weight's, which the bias shares; without a weight the statistics'."""
    return rstd.dtype if weight is None else weight.dtype


def backward(dy, x, weight, mean, rstd, incoming, needs: tuple[bool, bool, bool], walked: Walked | None):
    """-> dx as x, dweight (width,), dbias (width,) in `parameters_dtype`; what is not needed is empty.

    Args:
        dy, x, incoming: (…, width), one shape. weight: (width,). mean, rstd: (rows,). All but dy, x, rstd may be None.
        needs: whether dx, dweight, dbias are needed.
        walked: the tiles of rows that registers do not hold; None for those that they do.
    """
    need_input, need_weight, need_bias = needs
    width, dtype = x.shape[-1], parameters_dtype(weight, rstd)
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_input else rstd.new_empty(0)
    gradients = [rstd.new_empty(width if needed else 0, dtype=dtype) for needed in (need_weight, need_bias)]
    if x.numel() == 0 or not any(needs):
        return dx, *(gradient.zero_() for gradient in gradients)
    dy, x = as_rows(dy), as_rows(x)
    incoming = None if incoming is None or not need_input else as_rows(incoming)
    incoming_stride = 0 if incoming is None else incoming.stride(0)
    rows = x.shape[0]
    if walked is None:
        tile = backward_tile(width, x.dtype)
        grid = (min(cdiv(rows, tile.block_rows), programs_of(x.device, tile.num_warps)),)
    else:
        tile = walked.parameters
        grid = partial_sums(rows, width, tile, x.device)
    # The last of a grid shares the rows.
    dweight, dbias = (rstd.new_empty((grid[-1], width)) if needed else None for needed in (need_weight, need_bias))
    blocks = dict(
        BLOCK_ROWS=tile.block_rows, BLOCK_WIDTH=tile.block_width, STAGES=stages(tile, x.dtype, incoming is not None),
        num_warps=tile.num_warps,
    )  # fmt: skip
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
    if need_weight or need_bias:
        sum_partials(dweight, dbias, *(gradient if gradient.numel() else None for gradient in gradients))
    return dx, *gradients


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------

_STATISTICS = ("statistics_ptr", "mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr")
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# On sm_100 ptxas wants float32 in even pairs of registers, and keeps addresses that do not change from tile to tile in
# local memory: at most 4 loads from the L1 cache among a tile's 250 instructions. Half the warps would cost more.
_SPILL_OF_BACKWARD = {100: 24}


def held_widths(widest: int) -> tuple[int, ...]:
    """Of the rows that are held: the least, several of a tile, a whole tile, more warps, and the widest."""
    return tuple(sorted({_LEAST_WIDTH, _ELEMENTS // 8, _ELEMENTS, 2 * _ELEMENTS, widest}))


def compile_case(
    kernel, name: str, dtype: str, tile: Tile, constants: Mapping[str, Any], spill: int = 0
) -> CompileCase:
    """The case of a kernel with this tile; constants: of the other arguments those that a launch does not pass on."""
    has_incoming = "incoming_ptr" in kernel.arg_names and "incoming_ptr" not in constants
    constants = dict(STAGES=stages(tile, _DTYPES[dtype], has_incoming)) | dict(constants)
    constants |= dict(BLOCK_ROWS=tile.block_rows, BLOCK_WIDTH=tile.block_width)
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
    return CompileCase(
        f"{name} {dtype}", kernel, signature, constants, tile.num_warps, 3, aligned, allowed_spill_bytes=spill
    )


def backward_cases(architecture: int, widest: int, absent: Mapping[str, Any], doubles: bool) -> list[CompileCase]:
    """The cases of the backward of rows that are held, and of the reduction. absent: arguments that are never passed.

    A gradient that reaches x by another way comes through shared memory too: two stages, and more addresses. doubles:
    whether there are float64 rows, of which the widest are compiled.
    """
    alone = dict.fromkeys(("incoming_ptr", "incoming_stride"))
    spill = _SPILL_OF_BACKWARD.get(architecture, 0)
    dtypes = [*((width, "bf16") for width in held_widths(widest)), (_LEAST_WIDTH, "fp32"), (widest, "fp32")]
    cases = []
    for width, dtype in dtypes + ([(widest // 4, "fp64")] if doubles else []):
        tile = backward_tile(width, _DTYPES[dtype])
        name = f"backward width {width}"
        cases.append(compile_case(backward_kernel, name, dtype, tile, alone | dict(absent), spill))
        if "incoming_ptr" not in absent:
            name = f"backward beside another gradient, width {width}"
            cases.append(compile_case(backward_kernel, name, dtype, tile, absent, spill))
    return [*cases, compile_case(reduction_kernel, "reduction", "bf16", _REDUCTION, absent)]
