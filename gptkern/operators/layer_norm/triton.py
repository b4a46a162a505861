"""layer_norm on Triton; the backward is in gptkern/backends/triton/norms.py.

    s     = x, or x + residual
    x_hat = (s - mean) * rstd            rstd = 1 / sqrt(var + eps)
    y     = x_hat * weight + bias

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
from gptkern.backends.triton.common import CompileCase, cdiv, with_row_stride
from gptkern.backends.triton.direct import jit, keep_plan
from gptkern.backends.triton.norms import held_tile
from gptkern.backends.triton.rows import Tile
from gptkern.operators.layer_norm.contract import Call, Gradient

# kernel -> tile, from triton.json, of the rows that are walked in chunks.
TABLE = Table("layer_norm", {"kernel": ("forward", "backward", "parameters"), "width": None}, Tile)
# Widest row that is held in registers, in elements of at most 4 bytes (a quarter of it for float64). Beyond it ptxas
# spills; the backward, which also keeps the weight and two accumulators, gives way at half the width.
REGISTER_WIDTH = {"forward": 16384, "backward": 8192}
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


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,  # (rows, width)   input
    residual_ptr,  # (rows, width)   added to it, or None
    weight_ptr,  # (width,)         or None
    bias_ptr,  # (width,)         or None
    y_ptr,  # (rows, width)   output, contiguous
    summed_ptr,  # (rows, width)   x + residual, contiguous, or None
    statistics_ptr,  # (2, rows)       float32 (float64): mean, rstd, kept for the backward
    x_stride,  # from a row to the next
    residual_stride,
    rows,
    width,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic = statistics_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    in_row = column[None, :] < width
    inside = (row[:, None] < rows) & in_row

    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    if residual_ptr is not None:
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
    tl.store(statistics_ptr + row, mean, mask=row < rows)
    tl.store(statistics_ptr + rows + row, rstd, mask=row < rows)

    # y = x_hat * weight + bias
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(statistic)[None, :]
    tl.store(y_ptr + row[:, None] * width + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_summed(x_ptr, residual_ptr, column, width, statistic: tl.constexpr, rounded: tl.constexpr):
    """A chunk of a row of s = x + residual, rounded to s's dtype, in the statistics' dtype."""
    x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(statistic)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + column, mask=column < width, other=0.0).to(statistic)
        x = (x + residual).to(rounded).to(statistic)
    return x


@jit
def _forward_wide_kernel(
    x_ptr,  # (rows, width)   input
    residual_ptr,  # (rows, width)   added to it, or None
    weight_ptr,  # (width,)         or None
    bias_ptr,  # (width,)         or None
    y_ptr,  # (rows, width)   output, contiguous
    summed_ptr,  # (rows, width)   x + residual, contiguous, or None
    statistics_ptr,  # (2, rows)       float32 (float64): mean, rstd, kept for the backward
    x_stride,  # from a row to the next
    residual_stride,
    width,
    EPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    statistic: tl.constexpr = statistics_ptr.dtype.element_ty
    rounded: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    y_ptr += row * width
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
        summed_ptr += row * width

    # Chan's update: the mean and the squared deviations m2 of the columns so far, merged with a chunk's own.
    mean = tl.zeros((), dtype=statistic)
    m2 = tl.zeros((), dtype=statistic)
    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        x = _load_summed(x_ptr, residual_ptr, column, width, statistic, rounded)
        if residual_ptr is not None:
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
    tl.store(statistics_ptr + row, mean)
    # A program a row.
    tl.store(statistics_ptr + tl.num_programs(0) + row, rstd)

    for start in range(0, width, BLOCK_WIDTH):
        column = start + tl.arange(0, BLOCK_WIDTH)
        # Added again, not read back from `summed`: another thread may have written it.
        x = _load_summed(x_ptr, residual_ptr, column, width, statistic, rounded)
        # y = x_hat * weight + bias
        y = (x - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=column < width, other=0.0).to(statistic)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(statistic)
        tl.store(y_ptr + column, y.to(rounded), mask=column < width)


# --- Launchers ------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    for tensor in call[:-1]:
        if tensor is not None and tensor.dtype not in _DTYPES:
            name = next(name for name, argument in call._asdict().items() if argument is tensor)
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16, float32 and float64"
    return None


def forward(call: Call):
    """(…, width) -> output (…, width), summed (…, width) or None, statistics (2, rows): mean, rstd."""
    input, residual, weight, bias, eps = call
    shape, plans, plan_key = input.shape, None, None
    width = shape[-1]
    added, added_stride, summed = None, 0, None
    if residual is None and input.is_contiguous():
        dtype, output = input.dtype, torch.empty_like(input)
        plan_key = (
            shape, dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype, eps,
            REGISTER_WIDTH["forward"],
        )  # fmt: skip
        plans = TABLE.kept
        # The kernel, its launch, how many rows, the statistics' dtype.
        plan = plans.get(plan_key)
        if plan is not None and plan[0] is _forward_kernel:
            _, start, rows, statistic = plan
            statistics = output.new_empty(2, rows, dtype=statistic)
            if weight is None or bias is None:
                start(*[tensor for tensor in (input, weight, bias, output, statistics) if tensor is not None])
            else:
                start(input, weight, bias, output, statistics)
            return output, None, statistics
        x, x_stride = input, width
    else:
        dtype = input.dtype if residual is None else torch.result_type(input, residual)
        output = torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
        x, x_stride = with_row_stride(input)
        if residual is not None:
            summed = torch.empty_like(output)
            added, added_stride = with_row_stride(residual)
    statistic = torch.float64 if dtype is torch.float64 else torch.float32
    rows = output.numel() // width if width else input.shape[:-1].numel()
    statistics = output.new_empty(2, rows, dtype=statistic)
    if rows == 0 or width == 0:
        return output, summed, statistics
    if _is_wide("forward", width, statistic):
        _, block_width, warps = _chunk("forward", x.device)
        _forward_wide_kernel[(rows,)](
            x, added, weight, bias, output, summed, statistics, x_stride, added_stride, width,
            EPS=eps, BLOCK_WIDTH=block_width, num_warps=warps,
        )  # fmt: skip
    else:
        block_rows, block_width, warps = held_tile(width)
        grid = (cdiv(rows, block_rows),)
        arguments = x, added, weight, bias, output, summed, statistics, x_stride, added_stride, rows, width
        options = dict(EPS=eps, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=warps)
        _forward_kernel[grid](*arguments, **options)
        if plan_key is not None:
            keep_plan(plans, plan_key, _forward_kernel, (rows, statistic), grid, *arguments, **options)
    return output, summed, statistics


def backward(gradient: Gradient, call: Call):
    """-> dsummed (…, width), dweight (width,), dbias (width,) in the weight's dtype (the statistics'
    without one); what is not needed is empty."""
    grad_output, grad_summed, statistics, *needs = gradient
    mean, rstd = statistics.unbind()
    walked = None
    if _is_wide("backward", call.input.shape[-1], mean.dtype):
        device = call.input.device
        walked = norms.Walked(_chunk("backward", device), TABLE.find(device, math.inf, "parameters"))
    return norms.backward(grad_output, call.input, call.weight, mean, rstd, grad_summed, tuple(needs), walked)


def _is_wide(direction: str, width: int, statistic: torch.dtype) -> bool:
    return width > REGISTER_WIDTH[direction] // (4 if statistic == torch.float64 else 1)


def _chunk(direction: str, device: torch.device) -> Tile:
    tile = TABLE.find(device, math.inf, direction)
    return tile._replace(block_width=WIDE_BLOCK or tile.block_width)


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """With everything that a kernel can be asked for at once; float64 is there to be right: its widest tiles alone."""
    walked = {
        "forward": (_forward_wide_kernel, "forward wide"),
        "backward": (norms.input_gradient_wide_kernel, "input gradient wide"),
        "parameters": (norms.parameter_gradient_wide_kernel, "parameter gradient wide"),
    }
    constants = {"EPS": 1e-5}
    cases, widest = [], REGISTER_WIDTH["forward"]
    for width, dtype in [*((width, "bf16") for width in norms.held_widths(widest)), (widest // 4, "fp64")]:
        cases.append(norms.compile_case(_forward_kernel, f"forward width {width}", dtype, held_tile(width), constants))
    cases += norms.backward_cases(architecture, REGISTER_WIDTH["backward"], {}, doubles=True)
    for device, rows in TABLE.shipped(architecture):
        for (kernel, _), row in rows.items():
            function, name = walked[kernel]
            for dtype in ("bf16", "fp64"):
                cases.append(norms.compile_case(function, f"{name}{device}", dtype, row.configuration, constants))
    return cases
