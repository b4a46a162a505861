"""rms_norm on Triton; the backward is in gptkern/backends/triton/norms.py.

    x_hat = x * rstd            rstd = 1 / sqrt(avg(x²) + eps)
    y     = x_hat * weight

Memory is the floor: the forward reads x and writes y (2 widths a row). Up to REGISTER_WIDTH a program holds a tile of
whole rows in registers and moves no more than that. Wider rows are walked in chunks and read twice, mostly from the L2
cache.

Tests reach the variant for wide rows at small widths by lowering REGISTER_WIDTH and WIDE_BLOCK (monkeypatch).
"""

from __future__ import annotations

import math

import torch
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
    weight_ptr,  # (width,)         or None
    y_ptr,  # (rows, width)   output, contiguous
    rstd_ptr,  # (rows,)         float32, kept for the backward
    x_stride,  # from a row to the next
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

    # rstd = 1 / sqrt(avg(x²) + eps)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    # y = x_hat * weight
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["eps"])
def _forward_wide_kernel(
    x_ptr,  # (rows, width)   input
    weight_ptr,  # (width,)         or None
    y_ptr,  # (rows, width)   output, contiguous
    rstd_ptr,  # (rows,)         float32, kept for the backward
    x_stride,  # from a row to the next
    width,
    eps,
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
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=column < width)


# --- Launchers ------------------------------------------------------------------------------------------------------


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
    pointers = x, weight, output, rstd, x.stride(0)
    if width > REGISTER_WIDTH["forward"]:
        _, block_width, warps = _chunk("forward", x.device)
        _forward_wide_kernel[(rows,)](*pointers, width, eps, BLOCK_WIDTH=block_width, num_warps=warps)
    else:
        block_rows, block_width, warps = held_tile(width)
        _forward_kernel[(cdiv(rows, block_rows),)](
            *pointers, rows, width, eps, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps
        )
    return output, rstd


def backward(gradient: Gradient, call: Call):
    """-> dinput (…, width), dweight (width,) in the weight's dtype; what is not needed is empty."""
    grad_output, rstd, need_input, need_weight = gradient
    input, weight, _ = call
    walked = None
    if input.shape[-1] > REGISTER_WIDTH["backward"]:
        walked = norms.Walked(_chunk("backward", input.device), TABLE.find(input.device, math.inf, "weight"))
    needs = need_input, need_weight, False
    dinput, dweight, _ = norms.backward(grad_output, input, weight, None, rstd, None, needs, walked)
    return dinput, dweight


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
    absent = dict.fromkeys(("mean_ptr", "incoming_ptr", "incoming_stride", "dbias_ptr", "bias_gradient_ptr"))
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
