"""rms_norm on Triton.

    x_hat = x * rstd            rstd = 1 / sqrt(avg(x²) + eps)
    y     = x_hat * weight

Backward, with g = dy * weight and averages over the row:
    dx = rstd * (g - x_hat * avg(g * x_hat))
    dweight = sum over rows of dy * x_hat

Memory is the floor: the forward reads x and writes y (2 widths a row), the backward reads x and dy and writes dx (3).
Up to REGISTER_WIDTH a program holds a tile of whole rows in registers and moves no more than that. Wider rows are
walked in chunks: the forward reads them twice; of the backward one kernel makes dx and reads them twice, mostly from
the L2 cache, and another, of columns, makes dweight.

The weight's gradient is summed per program in float32, over a fixed set of rows each, and the partial sums by one
reduction: no atomics, so it is the same on every run.

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
from gptkern.operators.rms_norm.contract import Call, Gradient


class Tile(NamedTuple):
    """block_rows rows by block_width columns: whole rows, or of wider ones a chunk."""

    block_rows: int
    block_width: int
    num_warps: int


# kernel, the widest row -> tile, from rms_norm.json; None: of a wider row.
TABLE = Table("rms_norm", {"kernel": ("forward", "backward", "weight"), "width": None}, Tile)
# Widest row that is held in registers.
REGISTER_WIDTH = {
    direction: max(width for kernel, width in TABLE.defaults(80) if kernel == direction and width is not None)
    for direction in ("forward", "backward")
}
# Elements of a chunk of a wide row, where it is not the table's: set by tests alone.
WIDE_BLOCK: int | None = None


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, width)   input
    weight_ptr,  # (width,)
    y_ptr,  # (rows, width)   output, contiguous
    rstd_ptr,  # (rows,)         float32, kept for the backward
    x_stride,  # from a row to the next
    rows,
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)

    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    # y = x_hat * weight
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_wide_kernel(
    x_ptr,  # (rows, width)   input
    weight_ptr,  # (width,)
    y_ptr,  # (rows, width)   output, contiguous
    rstd_ptr,  # (rows,)         float32, kept for the backward
    x_stride,  # from a row to the next
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * width

    squares = tl.zeros((BLOCK_WIDTH,), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        squares += x * x
    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        # y = x_hat * weight
        y = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (rows, width)        gradient of y
    x_ptr,  # (rows, width)        input
    weight_ptr,  # (width,)
    rstd_ptr,  # (rows,)              float32
    dx_ptr,  # (rows, width)        gradient of x, contiguous, where NEED_INPUT
    dweight_ptr,  # (programs, width)    partial sums, float32, where NEED_WEIGHT
    dy_stride,  # from a row to the next
    x_stride,
    rows,
    width,
    HAS_WEIGHT: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_WIDTH)
    if NEED_INPUT and HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if NEED_WEIGHT:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)

    # A program takes every num_programs-th tile, so the sums do not depend on the order in which programs run.
    for start in range(program * BLOCK_ROWS, rows, tl.num_programs(0).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        # What is outside is 0, and adds nothing to any sum.
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        x_hat = x * rstd
        if NEED_WEIGHT:
            dweight += dy * x_hat
        if NEED_INPUT:
            g = dy * weight if HAS_WEIGHT else dy
            average = (tl.sum(g * x_hat, axis=1) / width)[:, None]
            # dx = rstd * (g - x_hat * avg(g * x_hat))
            dx = rstd * (g - x_hat * average)
            tl.store(dx_ptr + row[:, None] * width + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)

    if NEED_WEIGHT:
        tl.store(dweight_ptr + program * width + column, tl.sum(dweight, axis=0), mask=column < width)


@triton.jit
def _input_gradient_wide_kernel(
    dy_ptr,  # (rows, width)   gradient of y
    x_ptr,  # (rows, width)   input
    weight_ptr,  # (width,)
    rstd_ptr,  # (rows,)         float32
    dx_ptr,  # (rows, width)   gradient of x, contiguous
    dy_stride,  # from a row to the next
    x_stride,
    width,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * dy_stride
    x_ptr += row * x_stride
    dx_ptr += row * width
    rstd = tl.load(rstd_ptr + row)

    products = tl.zeros((BLOCK_WIDTH,), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        g = tl.load(dy_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        products += g * (tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32) * rstd)
    average = tl.sum(products, axis=0) / width

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        g = tl.load(dy_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        x_hat = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32) * rstd
        # dx = rstd * (g - x_hat * avg(g * x_hat))
        dx = rstd * (g - x_hat * average)
        tl.store(dx_ptr + column, dx.to(dx_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _weight_gradient_wide_kernel(
    dy_ptr,  # (rows, width)      gradient of y
    x_ptr,  # (rows, width)      input
    rstd_ptr,  # (rows,)            float32
    dweight_ptr,  # (splits, width)    partial sums, float32
    dy_stride,  # from a row to the next
    x_stride,
    rows,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    split = tl.program_id(1).to(tl.int64)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    for start in range(split * BLOCK_ROWS, rows, tl.num_programs(1).to(tl.int64) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dweight += dy * (x * rstd)
    tl.store(dweight_ptr + split * width + column, tl.sum(dweight, axis=0), mask=column < width)


# --- Launchers --------------------------------------------------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    input, weight, _ = call
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(call: Call):
    """(…, width) -> output (…, width), rstd (rows,) in float32."""
    input, weight, eps = call
    width = input.shape[-1]
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    x = as_rows(input)
    rows = x.shape[0]
    rstd = torch.empty(rows, dtype=torch.float32, device=input.device)
    if output.numel() == 0:
        return output, rstd
    # An absent tensor is never read; the kernel needs some pointer in its place.
    pointers = x, x if weight is None else weight, output, rstd, x.stride(0)
    if width > REGISTER_WIDTH["forward"]:
        _, block_width, warps = TABLE.find(x.device, math.inf, "forward")
        _forward_wide_kernel[(rows,)](
            *pointers, width, eps, HAS_WEIGHT=weight is not None, BLOCK_WIDTH=WIDE_BLOCK or block_width,
            num_warps=warps,
        )  # fmt: skip
    else:
        block_rows, block_width, warps = TABLE.find(x.device, width, "forward")
        _forward_kernel[(cdiv(rows, block_rows),)](
            *pointers, rows, width, eps, HAS_WEIGHT=weight is not None,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps,
        )  # fmt: skip
    return output, rstd


def backward(gradient: Gradient, call: Call):
    """-> dinput (…, width), dweight (width,) in float32; what is not needed is empty."""
    grad_output, rstd, need_input, need_weight = gradient
    input, weight, _ = call
    width = input.shape[-1]
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    dinput = torch.empty(input.shape, dtype=input.dtype, device=input.device) if need_input else rstd.new_empty(0)
    if input.numel() == 0 or not (need_input or need_weight):
        return dinput, rstd.new_zeros(width if need_weight else 0)
    x, dy = as_rows(input), as_rows(grad_output)
    rows = x.shape[0]
    partial = rstd.new_empty((0, 0))
    # An absent tensor is never read or written; the kernel needs some pointer in its place.
    of_weight = x if weight is None else weight
    if width > REGISTER_WIDTH["backward"]:
        if need_input:
            _, block_width, warps = TABLE.find(x.device, math.inf, "backward")
            _input_gradient_wide_kernel[(rows,)](
                dy, x, of_weight, rstd, dinput, dy.stride(0), x.stride(0), width,
                HAS_WEIGHT=weight is not None, BLOCK_WIDTH=WIDE_BLOCK or block_width, num_warps=warps,
            )  # fmt: skip
        if need_weight:
            block_rows, block_width, warps = TABLE.find(x.device, math.inf, "weight")
            columns = cdiv(width, block_width)
            splits = min(cdiv(rows, block_rows), cdiv(programs_of(x.device), columns))
            partial = rstd.new_empty((splits, width))
            _weight_gradient_wide_kernel[(columns, splits)](
                dy, x, rstd, partial, dy.stride(0), x.stride(0), rows, width,
                BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps,
            )  # fmt: skip
    else:
        block_rows, block_width, warps = TABLE.find(x.device, width, "backward")
        programs = min(cdiv(rows, block_rows), programs_of(x.device))
        if need_weight:
            partial = rstd.new_empty((programs, width))
        _backward_kernel[(programs,)](
            dy, x, of_weight, rstd, dinput if need_input else x, partial if need_weight else rstd,
            dy.stride(0), x.stride(0), rows, width,
            HAS_WEIGHT=weight is not None, NEED_INPUT=need_input, NEED_WEIGHT=need_weight,
            BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps,
        )  # fmt: skip
    return dinput, partial.sum(0)


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the table, with everything that a kernel can be asked for at once."""
    flags = dict.fromkeys(("HAS_WEIGHT", "NEED_INPUT", "NEED_WEIGHT"), True)

    def case(kernel, name, tile):
        constants = flags | dict(BLOCK_ROWS=tile.block_rows, BLOCK_WIDTH=tile.block_width)
        constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}

        def kind(argument):
            if argument in constants:
                return "constexpr"
            if argument.endswith("_ptr"):
                return "*fp32" if argument in ("rstd_ptr", "dweight_ptr") else "*bf16"
            return "fp32" if argument == "eps" else "i32"

        signature = {argument: kind(argument) for argument in kernel.arg_names}
        aligned = tuple(argument for argument in signature if argument.endswith(("stride", "width")))
        return CompileCase(name, kernel, signature, constants, tile.num_warps, 3, aligned)

    held = {"forward": _forward_kernel, "backward": _backward_kernel}
    walked = {
        "forward": (_forward_wide_kernel, "forward wide"),
        "backward": (_input_gradient_wide_kernel, "input gradient wide"),
        "weight": (_weight_gradient_wide_kernel, "weight gradient wide"),
    }
    cases = []
    for device, rows in TABLE.shipped(architecture):
        for (direction, width), row in rows.items():
            if width is not None:
                cases.append(case(held[direction], f"{direction} width {width}{device} bf16", row.configuration))
            else:
                kernel, name = walked[direction]
                cases.append(case(kernel, f"{name}{device} bf16", row.configuration))
    return cases
