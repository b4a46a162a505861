"""Symmetric int8 quantisation of rows on Triton: an operator of its own, and what int8 products do to their input.

    scale = max|x| / 127        q = clamp(round(x / scale), -127, 127), halves to even

One program holds a tile of whole rows in registers: it reads each element once, and writes one byte for it. Rows
too wide for that are read twice, a block at a time. The quotient is IEEE's, bit for bit that of PyTorch.

For n elements of b bytes in r rows: (b + 1) n + 4 r bytes moved, the least possible; the memory is the limit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptkern.backends.quantization import LARGEST, SMALLEST_SCALE
from gptkern.backends.triton.common import CompileCase, cdiv, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.rows import held_elements

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


@jit(do_not_specialize=["rows"])
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


@jit
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

# 32 float32 a thread, of 4 warps or more: it is one operand, so that twice as many as elsewhere fit. Reasoned, compiled
# without spills under Triton 3.7.1; not measured.
_LEAST_ELEMENTS, _A_THREAD = 4096, 32
# The widest row held in registers: 16 warps; and what is read at a time of a wider one, with its warps.
WIDEST = 16384
WIDE_BLOCK, WIDE_WARPS = 8192, 8


def _tile(width: int, rows: int) -> tuple[int, int, int]:
    """(rows of a tile, its width, warps): fewer rows and warps where the input has few rows."""
    elements, warps = held_elements(width, _LEAST_ELEMENTS, _A_THREAD)
    block = next_power_of_2(width)
    tile_rows = min(elements // block, next_power_of_2(rows))
    return tile_rows, block, max(1, warps * tile_rows * block // elements)


def compile_cases(architecture: int) -> list[CompileCase]:
    """Tiles of four rows and of one, the widest one, and a block of a wider row."""
    strides = {"rows": "i32", "width": "i32", "x_row_stride": "i32", "x_column_stride": "constexpr"}
    pointers = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32"}
    held = {**pointers, **strides, "ROWS": "constexpr", "BLOCK": "constexpr"}
    wide = {name: kind for name, kind in held.items() if name not in ("rows", "ROWS")}
    shapes = [("quantize wide", _wide_row_kernel, wide, {"BLOCK": WIDE_BLOCK}, WIDE_WARPS)]
    for width in (1024, 4096, 16384):
        tile_rows, block, warps = _tile(width, width)
        shapes.append((f"quantize width {width}", _rows_kernel, held, {"ROWS": tile_rows, "BLOCK": block}, warps))
    return [
        CompileCase(name, kernel, signature, {"x_column_stride": 1, **blocks}, warps, 1, ("width", "x_row_stride"))
        for name, kernel, signature, blocks, warps in shapes
    ]


# --- Launcher -------------------------------------------------------------------------------------------------------


def quantized_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) in any strides -> q (rows, width) int8, contiguous; scale (rows,) float32, 1 where width is 0."""
    rows, width = x.shape
    q = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    if x.numel() == 0:
        return q, torch.ones(rows, dtype=torch.float32, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if width <= WIDEST:
        tile_rows, block, warps = _tile(width, rows)
        _rows_kernel[(cdiv(rows, tile_rows),)](
            x, q, scale, rows, width, *x.stride(), ROWS=tile_rows, BLOCK=block, num_warps=warps, num_stages=1
        )
    else:
        _wide_row_kernel[(rows,)](x, q, scale, width, *x.stride(), BLOCK=WIDE_BLOCK, num_warps=WIDE_WARPS, num_stages=1)
    return q, scale
