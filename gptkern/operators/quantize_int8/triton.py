"""quantize_int8 on Triton.

    scale = max|x| / 127        q = clamp(round(x / scale), -127, 127), halves to even

One program holds a tile of whole rows in registers: it reads each element once, and writes one byte for it. Rows
too wide for that are read twice, a block at a time. The quotient is IEEE's, bit for bit that of PyTorch.

For n elements of b bytes in r rows: (b + 1) n + 4 r bytes moved, the least possible; the memory is the limit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.quantization import LARGEST, SMALLEST_SCALE
from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton.common import CompileCase, cdiv, next_power_of_2
from gptkern.operators.quantize_int8.contract import Call

# 1.5 * 2^23: a float32 near it has no fraction bits, so adding it rounds |v| < 2^22 to an integer, halves to even,
# and leaves that integer in the low bits. Rounding functions of the GPU's library differ under the interpreter.
_ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_BITS = tl.constexpr(0x4B400000)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _scale_of(largest, has_nan):
    # scale = max|x| / 127, 1 for a row of zeros. A maximum on the GPU passes over NaN, which has to show.
    scale = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, _LARGEST, tl.float32)), _SMALLEST_SCALE)
    scale = tl.where(largest == 0, 1.0, scale)
    return tl.where(has_nan, float("nan"), scale)


@triton.jit
def _quantized(x, scale):
    # q = clamp(round(x / scale), -127, 127); `x / scale` would be 2 ulp off on a GPU
    shifted = tl.div_rn(x, tl.broadcast_to(scale, x.shape)) + _ROUNDER
    # Reading the integer from the bits leaves no "+ c - c" for a compiler to fold.
    q = shifted.to(tl.int32, bitcast=True) - _ROUNDER_BITS
    return tl.minimum(tl.maximum(q, -_LARGEST), _LARGEST).to(tl.int8)


@triton.jit
def _rows_kernel(
    x_ptr,  # (rows, width)  input, any strides
    q_ptr,  # (rows, width)  int8, contiguous
    scale_ptr,  # (rows,)    float32
    rows,
    width,
    x_row_stride,
    x_column_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # >= width
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x_offsets = row[:, None] * x_row_stride + column.to(tl.int64)[None, :] * x_column_stride
    x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(x), axis=1), tl.max((x != x).to(tl.int32), axis=1) != 0)
    tl.store(q_ptr + row[:, None] * width + column[None, :], _quantized(x, scale[:, None]), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _wide_row_kernel(
    x_ptr,  # (rows, width)  input, any strides
    q_ptr,  # (rows, width)  int8, contiguous
    scale_ptr,  # (rows,)    float32
    width,
    x_row_stride,
    x_column_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row_stride
    q_ptr += row * width
    largest = tl.zeros((BLOCK,), tl.float32)
    has_nan = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column.to(tl.int64) * x_column_stride, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        has_nan |= (x != x).to(tl.int32)
    # One element each, as _rows_kernel has one for each of its rows.
    largest = tl.max(largest, axis=0, keep_dims=True)
    scale = _scale_of(largest, tl.max(has_nan, axis=0, keep_dims=True) != 0)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(x_ptr + column.to(tl.int64) * x_column_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(q_ptr + column, _quantized(x, scale), mask=inside)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


# --- Configuration --------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """Elements of a program's tile of whole rows; of a wider row those that are read at a time."""

    elements: int
    num_warps: int


# The widest row -> configuration, from quantize_int8.json; None: of a wider row, which is read twice.
TABLE = Table("quantize_int8", {"width": None}, Configuration)
# The widest row held in registers.
WIDEST = max(width for (width,) in TABLE.defaults(80) if width is not None)


def _rows_and_warps(configuration: Configuration, block: int, rows: int) -> tuple[int, int]:
    """(rows of a tile, warps): fewer of both where the input has few rows."""
    elements, warps = configuration
    tile_rows = min(max(elements // block, 1), next_power_of_2(rows))
    return tile_rows, max(1, min(warps, warps * tile_rows * block // elements))


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the table at its widest, and one of several rows a tile."""
    strides = {"rows": "i32", "width": "i32", "x_row_stride": "i32", "x_column_stride": "constexpr"}
    pointers = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32"}
    wide = {name: kind for name, kind in strides.items() if name != "rows"}
    narrowest = min(width for (width,) in TABLE.defaults(architecture) if width is not None)
    cases = []
    for device, rows in TABLE.shipped(architecture):
        for (widest,), row in rows.items():
            if widest is None:
                block, warps = row.configuration
                signature = {**pointers, **wide, "BLOCK": "constexpr"}
                shapes = [("quantize wide", _wide_row_kernel, signature, {"BLOCK": block}, warps)]
            else:
                signature = {**pointers, **strides, "ROWS": "constexpr", "BLOCK": "constexpr"}
                shapes = []
                # A quarter of the narrowest row's: a tile of four rows.
                for block in (widest // 4, widest) if widest == narrowest else (widest,):
                    tile_rows, warps = _rows_and_warps(row.configuration, block, widest)
                    constants = {"ROWS": tile_rows, "BLOCK": block}
                    shapes.append((f"quantize width {block}", _rows_kernel, signature, constants, warps))
            for name, kernel, signature, constants, warps in shapes:
                constants = {"x_column_stride": 1, **constants}
                aligned = ("width", "x_row_stride")
                cases.append(CompileCase(f"{name}{device}", kernel, signature, constants, warps, 1, aligned))
    return cases


# --- Launchers ------------------------------------------------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    input = call.input
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"input is {input.dtype}"
    return None


def forward(call: Call):
    """-> q, int8 in the input's shape; scale, float32 in the input's shape without dim."""
    input, dim = call
    moved = input.movedim(dim, -1)  # (…, width)
    width = moved.shape[-1]
    if input.numel() == 0:
        q = torch.empty(input.shape, dtype=torch.int8, device=input.device)
        return q, torch.ones(moved.shape[:-1], dtype=torch.float32, device=input.device)
    x = moved.reshape(-1, width)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rows = x.shape[0]
    if width <= WIDEST:
        block = next_power_of_2(width)
        tile_rows, warps = _rows_and_warps(TABLE.find(x.device, width), block, rows)
        _rows_kernel[(cdiv(rows, tile_rows),)](
            x, q, scale, rows, width, *x.stride(),
            ROWS=tile_rows, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip
    else:
        block, warps = TABLE.find(x.device, math.inf)
        _wide_row_kernel[(rows,)](x, q, scale, width, *x.stride(), BLOCK=block, num_warps=warps, num_stages=1)
    return q.view(moved.shape).movedim(-1, dim).contiguous(), scale.view(moved.shape[:-1])
