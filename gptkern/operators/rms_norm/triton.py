"""rms_norm on Triton; the backward is in gptkern/backends/triton/norms.py.

    s     = x, or x + residual
    x_hat = s * rstd            rstd = 1 / sqrt(avg(s²) + eps)
    y     = x_hat * weight

Memory is the floor: the forward reads x and writes y (2 widths a row; with a residual 4). Up to REGISTER_WIDTH a
program holds a tile of whole rows in registers and moves no more than that. Wider rows are walked in chunks and read
twice, mostly from the L2 cache.

Tests reach the variant for wide rows at small widths by lowering REGISTER_WIDTH and WIDE_BLOCK (monkeypatch).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton import norms
from gptkern.backends.triton.common import CompileCase, as_rows, cdiv
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.norms import held_tile
from gptkern.backends.triton.rows import Tile
from gptkern.operators.rms_norm.contract import Call, Gradient

# kernel -> tile, from triton.json, of the rows that are walked in chunks.
TABLE = Table("rms_norm", {"kernel": ("forward", "backward", "weight"), "width": None}, Tile)
# Widest row that is held in registers: 32 elements a thread in the forward. The backward also keeps dy, the weight and
# an accumulator: ptxas spills from 16384 columns on.
REGISTER_WIDTH = {"forward": 32768, "backward": 8192}
# Elements of a chunk of a wide row, where it is not the table's: set by tests alone.
WIDE_BLOCK: int | None = None


@jit(do_not_specialize=["rows", "eps"])
def _forward_kernel(
    x_ptr,  # (rows, width)   input
    residual_ptr,  # (rows, width)   added to it, or None
    weight_ptr,  # (width,)         or None
    y_ptr,  # (rows, width)   output, contiguous
    summed_ptr,  # (rows, width)   x + residual, contiguous, or None
    rstd_ptr,  # (rows,)         float32, kept for the backward
    x_stride,  # from a row to the next
    residual_stride,
    rows,
    width,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        # The sum is rounded to its dtype before it is normalised: the backward sees the same numbers.
        summed = (x + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row[:, None] * width + column[None, :], summed, mask=inside)
        x = summed.to(tl.float32)

    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    # y = x_hat * weight
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_summed(x_ptr, residual_ptr, column, width, rounded: tl.constexpr):
    """A chunk of a row of s = x + residual, rounded to s's dtype, in float32."""
    x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        x = (x + residual).to(rounded).to(tl.float32)
    return x


@jit(do_not_specialize=["eps"])
def _forward_wide_kernel(
    x_ptr,  # (rows, width)   input
    residual_ptr,  # (rows, width)   added to it, or None
    weight_ptr,  # (width,)         or None
    y_ptr,  # (rows, width)   output, contiguous
    summed_ptr,  # (rows, width)   x + residual, contiguous, or None
    rstd_ptr,  # (rows,)         float32, kept for the backward
    x_stride,  # from a row to the next
    residual_stride,
    width,
    eps,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * width
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
        summed_ptr += row * width

    squares = tl.zeros((BLOCK_WIDTH,), dtype=tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        x = _load_summed(x_ptr, residual_ptr, column, width, y_ptr.dtype.element_ty)
        squares += x * x
    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        x = _load_summed(x_ptr, residual_ptr, column, width, y_ptr.dtype.element_ty)
        if residual_ptr is not None:
            tl.store(summed_ptr + column, x.to(summed_ptr.dtype.element_ty), mask=column < width)
        # y = x_hat * weight
        y = x * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=column < width)


# --- Launchers ------------------------------------------------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    for name, tensor in (("input", call.input), ("residual", call.residual), ("weight", call.weight)):
        if tensor is not None and tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(call: Call):
    """-> output (…, width), summed (…, width) or None, rstd (rows,) in float32."""
    input, residual, weight, eps = call
    width = input.shape[-1]
    x = as_rows(input)
    rows = x.shape[0]
    rstd = torch.empty(rows, dtype=torch.float32, device=input.device)
    dtype, summed, residual_stride = input.dtype, None, 0
    if residual is not None:
        dtype = torch.result_type(input, residual)
        summed = torch.empty(input.shape, dtype=dtype, device=input.device)
        residual = as_rows(residual)
        residual_stride = residual.stride(0)
    output = torch.empty(input.shape, dtype=dtype, device=input.device)
    if output.numel() == 0:
        return output, summed, rstd
    pointers = x, residual, weight, output, summed, rstd, x.stride(0), residual_stride
    if width > REGISTER_WIDTH["forward"]:
        _, block_width, warps = _chunk("forward", x.device)
        _forward_wide_kernel[(rows,)](*pointers, width, eps, BLOCK_WIDTH=block_width, num_warps=warps)
    else:
        block_rows, block_width, warps = held_tile(width)
        _forward_kernel[(cdiv(rows, block_rows),)](
            *pointers, rows, width, eps, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps
        )
    return output, summed, rstd


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,) in the weight's dtype; what is not needed is empty."""
    grad_output, grad_summed, rstd, need_input, need_weight = gradient
    summed, weight = call.input, call.weight
    walked = None
    if summed.shape[-1] > REGISTER_WIDTH["backward"]:
        walked = norms.Walked(_chunk("backward", summed.device), TABLE.find(summed.device, math.inf, "weight"))
    needs = need_input, need_weight, False
    dsummed, dweight, _ = norms.backward(grad_output, summed, weight, None, rstd, grad_summed, needs, walked)
    return dsummed, dweight


def _chunk(direction: str, device: torch.device) -> Tile:
    tile = TABLE.find(device, math.inf, direction)
    return tile._replace(block_width=WIDE_BLOCK or tile.block_width)


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """With everything that a kernel can be asked for at once."""
    walked = {
        "forward": (_forward_wide_kernel, "forward wide"),
        "backward": (norms.input_gradient_wide_kernel, "input gradient wide"),
        "weight": (norms.parameter_gradient_wide_kernel, "weight gradient wide"),
    }
    absent = dict.fromkeys(("mean_ptr", "dbias_ptr", "bias_gradient_ptr"))
    cases = [
        norms.compile_case(_forward_kernel, f"forward width {width}", "bf16", held_tile(width), absent)
        for width in norms.held_widths(REGISTER_WIDTH["forward"])
    ]
    cases += norms.backward_cases(architecture, REGISTER_WIDTH["backward"], absent, doubles=False)
    for device, rows in TABLE.shipped(architecture):
        for (kernel, _), row in rows.items():
            function, name = walked[kernel]
            cases.append(norms.compile_case(function, f"{name}{device}", "bf16", row.configuration, absent))
    return cases
