"""softmax on Triton.

    z_j = scale * x_j  (+ mask_j)        -inf where a bool mask or the causal limit hides j
    y_j = exp(z_j - m) / sum_k exp(z_k - m)        m = max(z)

Backward, with dy the gradient of y:
    dx_j = scale * y_j * (dy_j - sum_k dy_k * y_k)
A y of 16 bits is divided by its own sum first. Rounding moves that sum away from 1, and with it the weighted mean of
dy, which nearly cancels dy where one y_j is nearly 1.

Forward and backward have two kernels each. One holds whole rows in registers and touches every byte once: the
input read, the output written (the backward: y and dy read, dx written), and nothing moves fewer. The other walks
a wider row in chunks, twice: the first walk keeps a running maximum and sum, the second writes. It reads twice
what the first kind reads, so a row between the two costs half as many bytes again (the backward: two thirds).
Right of the causal limit nothing is read and 0 is written.

The input is seen as (size_0, size_1, lanes, width), in any strides: `width` is the dimension that sums to 1, `lanes`
the one whose neighbours a program computes together. Where the softmax is over the last dimension a lane is a row,
and the tile is (lanes, width), with AXIS = 1; else the lanes are what lies inside of the dimension, and the tile is
(width, lanes), with AXIS = 0, so that neighbouring threads read neighbouring addresses in both. Nothing is
transposed, and the mask is read through its broadcast strides.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton.common import CompileCase, cdiv, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.rows import held_elements
from gptkern.backends.triton.strides import Layout, layout
from gptkern.operators.softmax.contract import Call, Gradient
from gptkern.operators.softmax.triton_tiles import (
    ADDITIVE_MASK,
    BOOL_MASK,
    NO_MASK,
    contiguous,
    finite,
    indices_from,
    last_visible,
    limits_of,
    load_y_and_dy,
    position_of,
    reciprocal_of,
    scores_of,
    store_zeros,
)

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def scale_of(scale, COMPUTE: tl.constexpr):
    if COMPUTE.is_fp64():
        return scale.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return scale


# --- Forward --------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["scale", "causal_rows"])
def _forward_kernel(
    x_ptr,  # (size_0, size_1, lanes, width) in any strides
    mask_ptr,  # broadcast to the same: uint8 (0 hides) or floating point; anything where MASK is NO_MASK
    y_ptr,  # contiguous: (size_0, size_1, lanes, width) where AXIS is 1, (size_0, size_1, width, lanes) where it is 0
    scale,  # float32, which is how a float arrives; where COMPUTE is float64, its bits
    size_1, lanes, width,
    causal_rows,  # lane % causal_rows is the last element that is visible
    x_stride_0, x_stride_1, x_stride_lane, x_stride_n,
    mask_stride_0, mask_stride_1, mask_stride_lane, mask_stride_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= width
):  # fmt: skip
    i_0, i_1, group, lane = position_of(lanes, size_1, LANES, AXIS)
    x_lane = x_ptr + i_0 * x_stride_0 + i_1 * x_stride_1 + lane.to(tl.int64) * x_stride_lane
    mask_lane = mask_ptr + i_0 * mask_stride_0 + i_1 * mask_stride_1 + lane.to(tl.int64) * mask_stride_lane
    y_lane, y_stride_n = contiguous(group, lane, lanes, width, AXIS)
    scale = scale_of(scale, COMPUTE)
    CONVERTED: tl.constexpr = y_ptr.dtype.element_ty

    n = indices_from(0, BLOCK_N, AXIS)
    in_row = (n < width) & (lane < lanes)
    readable, visible = limits_of(in_row, n, lane, causal_rows, CAUSAL)
    z = scores_of(x_lane, mask_lane, n, x_stride_n, mask_stride_n, readable, visible, scale, CONVERTED, COMPUTE, MASK)
    # y = exp(z - m) / sum(exp(z - m)). The maximum is subtracted before the change of base: folded into one
    # multiply-add, max * log2(e) would be rounded at the size of |max| wherever that is not fused.
    m = finite(tl.max(z, axis=AXIS, keep_dims=True))
    p = tl.exp2((z - m) * LOG2E)
    y = p * reciprocal_of(tl.sum(p, axis=AXIS, keep_dims=True), CAUSAL or MASK != NO_MASK)
    if CAUSAL:
        # Also in a row whose visible part holds NaN.
        y = tl.where(visible, y, 0.0)
    tl.store(y_ptr + y_lane + n.to(tl.int64) * y_stride_n, y.to(CONVERTED), mask=in_row)


@jit(do_not_specialize=["scale", "causal_rows"])
def _forward_chunked_kernel(
    x_ptr,  # arguments: as _forward_kernel's
    mask_ptr,
    y_ptr,
    scale,
    size_1, lanes, width, causal_rows,
    x_stride_0, x_stride_1, x_stride_lane, x_stride_n,
    mask_stride_0, mask_stride_1, mask_stride_lane, mask_stride_n,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # any: the chunk
):  # fmt: skip
    i_0, i_1, group, lane = position_of(lanes, size_1, LANES, AXIS)
    x_lane = x_ptr + i_0 * x_stride_0 + i_1 * x_stride_1 + lane.to(tl.int64) * x_stride_lane
    mask_lane = mask_ptr + i_0 * mask_stride_0 + i_1 * mask_stride_1 + lane.to(tl.int64) * mask_stride_lane
    y_lane, y_stride_n = contiguous(group, lane, lanes, width, AXIS)
    scale = scale_of(scale, COMPUTE)
    CONVERTED: tl.constexpr = y_ptr.dtype.element_ty

    limit = last_visible(lane, width, causal_rows, CAUSAL)

    m = tl.full(lane.shape, float("-inf"), COMPUTE)
    total = tl.zeros(lane.shape, COMPUTE)
    for start in range(0, limit, BLOCK_N):
        n = indices_from(start, BLOCK_N, AXIS)
        readable, visible = limits_of((n < width) & (lane < lanes), n, lane, causal_rows, CAUSAL)
        z = scores_of(
            x_lane, mask_lane, n, x_stride_n, mask_stride_n, readable, visible, scale, CONVERTED, COMPUTE, MASK
        )
        # total = total * exp(m - m') + sum(exp(z - m'))        m' = max(m, max(z))
        new_m = tl.maximum(m, tl.max(z, axis=AXIS, keep_dims=True))
        subtracted = finite(new_m)
        total = total * tl.exp2((m - subtracted) * LOG2E)
        total += tl.sum(tl.exp2((z - subtracted) * LOG2E), axis=AXIS, keep_dims=True)
        m = new_m

    m = finite(m)
    reciprocal = reciprocal_of(total, CAUSAL or MASK != NO_MASK)
    for start in range(0, limit, BLOCK_N):
        n = indices_from(start, BLOCK_N, AXIS)
        in_row = (n < width) & (lane < lanes)
        readable, visible = limits_of(in_row, n, lane, causal_rows, CAUSAL)
        z = scores_of(
            x_lane, mask_lane, n, x_stride_n, mask_stride_n, readable, visible, scale, CONVERTED, COMPUTE, MASK
        )
        # y = exp(z - m) / total
        y = tl.exp2((z - m) * LOG2E) * reciprocal
        if CAUSAL:
            y = tl.where(visible, y, 0.0)
        tl.store(y_ptr + y_lane + n.to(tl.int64) * y_stride_n, y.to(CONVERTED), mask=in_row)
    if CAUSAL:
        store_zeros(y_ptr + y_lane, y_stride_n, lane, lanes, limit, width, BLOCK_N, AXIS)


# --- Backward -------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["scale", "causal_rows"])
def _backward_kernel(
    dy_ptr,  # (size_0, size_1, lanes, width) in any strides
    y_ptr,  # contiguous, as the forward wrote it
    dx_ptr,  # as y
    scale,
    size_1, lanes, width, causal_rows,
    dy_stride_0, dy_stride_1, dy_stride_lane, dy_stride_n,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= width
):  # fmt: skip
    i_0, i_1, group, lane = position_of(lanes, size_1, LANES, AXIS)
    dy_lane = dy_ptr + i_0 * dy_stride_0 + i_1 * dy_stride_1 + lane.to(tl.int64) * dy_stride_lane
    y_lane, y_stride_n = contiguous(group, lane, lanes, width, AXIS)
    scale = scale_of(scale, COMPUTE)

    n = indices_from(0, BLOCK_N, AXIS)
    in_row = (n < width) & (lane < lanes)
    readable, visible = limits_of(in_row, n, lane, causal_rows, CAUSAL)
    y, dy = load_y_and_dy(y_ptr + y_lane, dy_lane, n, y_stride_n, dy_stride_n, readable, visible, COMPUTE)
    if y_ptr.dtype.element_ty.primitive_bitwidth == 16:
        y *= reciprocal_of(tl.sum(y, axis=AXIS, keep_dims=True), True)
    # dx = scale * y * (dy - sum(dy * y))
    dx = scale * y * (dy - tl.sum(dy * y, axis=AXIS, keep_dims=True))
    if CAUSAL:
        # Also in a row whose visible part holds NaN.
        dx = tl.where(visible, dx, 0.0)
    tl.store(dx_ptr + y_lane + n.to(tl.int64) * y_stride_n, dx.to(dx_ptr.dtype.element_ty), mask=in_row)


@jit(do_not_specialize=["scale", "causal_rows"])
def _backward_chunked_kernel(
    dy_ptr,  # arguments: as _backward_kernel's
    y_ptr,
    dx_ptr,
    scale,
    size_1, lanes, width, causal_rows,
    dy_stride_0, dy_stride_1, dy_stride_lane, dy_stride_n,
    CAUSAL: tl.constexpr, COMPUTE: tl.constexpr, AXIS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # any: the chunk
):  # fmt: skip
    i_0, i_1, group, lane = position_of(lanes, size_1, LANES, AXIS)
    dy_lane = dy_ptr + i_0 * dy_stride_0 + i_1 * dy_stride_1 + lane.to(tl.int64) * dy_stride_lane
    y_lane, y_stride_n = contiguous(group, lane, lanes, width, AXIS)
    scale = scale_of(scale, COMPUTE)
    limit = last_visible(lane, width, causal_rows, CAUSAL)

    # dot = sum(dy * y)
    dot = tl.zeros(lane.shape, COMPUTE)
    total = tl.zeros(lane.shape, COMPUTE)
    for start in range(0, limit, BLOCK_N):
        n = indices_from(start, BLOCK_N, AXIS)
        readable, visible = limits_of((n < width) & (lane < lanes), n, lane, causal_rows, CAUSAL)
        y, dy = load_y_and_dy(y_ptr + y_lane, dy_lane, n, y_stride_n, dy_stride_n, readable, visible, COMPUTE)
        dot += tl.sum(dy * y, axis=AXIS, keep_dims=True)
        total += tl.sum(y, axis=AXIS, keep_dims=True)
    if y_ptr.dtype.element_ty.primitive_bitwidth == 16:
        reciprocal = reciprocal_of(total, True)
        dot *= reciprocal
        scale = scale * reciprocal

    for start in range(0, limit, BLOCK_N):
        n = indices_from(start, BLOCK_N, AXIS)
        in_row = (n < width) & (lane < lanes)
        readable, visible = limits_of(in_row, n, lane, causal_rows, CAUSAL)
        y, dy = load_y_and_dy(y_ptr + y_lane, dy_lane, n, y_stride_n, dy_stride_n, readable, visible, COMPUTE)
        # dx = scale * y * (dy - dot)
        dx = scale * y * (dy - dot)
        if CAUSAL:
            dx = tl.where(visible, dx, 0.0)
        tl.store(dx_ptr + y_lane + n.to(tl.int64) * y_stride_n, dx.to(dx_ptr.dtype.element_ty), mask=in_row)
    if CAUSAL:
        store_zeros(dx_ptr + y_lane, y_stride_n, lane, lanes, limit, width, BLOCK_N, AXIS)


# --- Configurations -------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How a program is cut: LANES x BLOCK_N elements on `warps` warps, the whole row in it or a chunk of it."""

    lanes: int
    block_n: int
    warps: int
    chunked: bool


class Configuration(NamedTuple):
    """Elements of a tile, and the chunk of those rows that are walked in chunks, else None: a row of triton.json."""

    elements: int
    chunk: int | None
    num_warps: int


# direction, AXIS, the widest row -> configuration, where the formula below does not say it.
TABLE = Table(
    "softmax", {"direction": ("forward", "backward"), "axis": (0, 1), "width": None}, Configuration, optional=("chunk",)
)  # fmt: skip

# A softmax over the last dimension: elements of a tile of narrow rows and of a thread, and the widest row that is held.
# Up to it ptxas spills nothing; the backward has two operands. Reasoned, compiled under Triton 3.7.1; not measured.
_ELEMENTS, _A_THREAD = 2048, 16
_WIDEST_ROW = {"forward": 32768, "backward": 16384}

# The widest row that is held in registers where it is less than the table's, and the chunk of the wider ones. Set by
# tests alone, to 16 say: the chunked kernels then run on rows that an interpreter gets through.
ONE_PASS_LIMIT: int | None = None

# Lanes and widths are counted in int32 and run over by less than a tile.
_MAX_COUNT = 2**31 - 2**20


def tile(direction: str, axis: int, width: int, lanes: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of a call. `dtype` is the one that it computes in: a float64 row counts as one of twice its width."""
    double = 2 if dtype == torch.float64 else 1
    counted = width * double if ONE_PASS_LIMIT is None or width <= ONE_PASS_LIMIT else math.inf
    if axis == 1 and counted <= _WIDEST_ROW[direction]:
        configuration = _held_row(counted)
    else:
        configuration = TABLE.find(device, counted, direction, axis)
    return _tile(configuration, width, lanes, double)


def _held_row(width: int) -> Configuration:
    elements, warps = held_elements(width, _ELEMENTS, _A_THREAD)
    return Configuration(elements, None, warps)


def _tile(configuration: Configuration, width: int, lanes: int, double: int) -> Tile:
    elements, chunk, warps = configuration
    most_lanes = next_power_of_2(lanes)
    if chunk is None:
        block_n = next_power_of_2(width)
        return Tile(min(max(1, elements // (block_n * double)), most_lanes), block_n, warps, False)
    chunk_lanes = max(1, elements // chunk)
    chunk = max(1, chunk // double)
    if ONE_PASS_LIMIT is not None:
        chunk = min(chunk, next_power_of_2(ONE_PASS_LIMIT))
    return Tile(min(chunk_lanes, most_lanes), chunk, warps, True)


# --- Launchers ------------------------------------------------------------------------------------------------------


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _walked(input, dim, mask) -> tuple[Layout, torch.Tensor, torch.Tensor]:
    """The layout of input and mask, and both as it describes them: copied where no strides do, which is seldom."""
    mask = input if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    found = layout(dim, input, mask.expand(input.shape))
    if found is None or (found.axis == 1 and found.strides[0][3] != 1 and input.shape[dim] > 1):
        shared = mask is input
        input = input.contiguous()
        mask = input if shared else mask
        found = layout(dim, input, mask.expand(input.shape))
    if found is None:
        # Written out over the dimensions inside of `dim` and over the outer ones but the last, not over these two.
        mask = mask[(None,) * (input.dim() - mask.dim())]
        sizes = [mask.shape[i] if i in (dim, dim - 1) else size for i, size in enumerate(input.shape)]
        mask = mask.expand(sizes).contiguous()
        found = layout(dim, input, mask.expand(input.shape))
    return found, input, mask


def _argument(scale: float, compute) -> float | int:
    """What the kernels take for it. A float64 in a float32 kernel would ask for units of which most parts have few."""
    return struct.unpack("q", struct.pack("d", scale))[0] if compute == tl.float64 else scale


def _compute(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def unsupported(call: Call) -> str | None:
    input, dim, dtype, mask = call.input, call.dim, call.dtype, call.mask
    for name, of in (("input", input.dtype), ("dtype", dtype), ("mask", None if mask is None else mask.dtype)):
        if of is not None and of not in _DTYPES and not (name == "mask" and of == torch.bool):
            return f"{name} is {of}; the kernels cover float16, bfloat16, float32 and float64"
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "the mask requires a gradient, which the kernels do not compute"
    width = input.shape[dim] if input.dim() else 1
    if width > _MAX_COUNT or input.numel() > max(width, 1) * _MAX_COUNT:
        return f"the input has shape {tuple(input.shape)}; the kernels count its width and its rows in 32 bits"
    return None


def forward(call: Call):
    """(…) -> output (…), contiguous, of `dtype` or the input's."""
    input, dim, dtype, scale, mask, is_causal = call
    output = torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)
    if output.numel() == 0:
        return output
    if input.dim() == 0:
        input = input[None]
    dim %= input.dim()
    width = input.shape[dim]
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK
    walk, input, mask = _walked(input, dim, mask)
    lanes, block_n, warps, chunked = tile("forward", walk.axis, width, walk.lanes, output.dtype, input.device)
    kernel = _forward_chunked_kernel if chunked else _forward_kernel
    compute = _compute(output.dtype)
    kernel[(walk.size_0 * walk.size_1 * cdiv(walk.lanes, lanes),)](
        input, mask, output, _argument(scale, compute), walk.size_1, walk.lanes, width,
        input.shape[-2] if is_causal else 1, *walk.strides[0], *walk.strides[1],
        MASK=kind, CAUSAL=is_causal, COMPUTE=compute, AXIS=walk.axis, LANES=lanes, BLOCK_N=block_n,
        num_warps=warps,
    )  # fmt: skip
    return output


def backward(gradient: Gradient, call: Call):
    """-> dx (…), contiguous, of `dtype`."""
    grad_output, output, dtype = gradient
    dim, scale, is_causal = call.dim, call.scale, call.is_causal
    dx = torch.empty(output.shape, dtype=dtype, device=output.device)
    if dx.numel() == 0:
        return dx
    output = output.contiguous()
    if output.dim() == 0:
        grad_output = grad_output[None]
    dim %= grad_output.dim()
    width = grad_output.shape[dim]
    walk = layout(dim, grad_output)
    if walk is None:
        grad_output = grad_output.contiguous()
        walk = layout(dim, grad_output)
    lanes, block_n, warps, chunked = tile("backward", walk.axis, width, walk.lanes, output.dtype, output.device)
    kernel = _backward_chunked_kernel if chunked else _backward_kernel
    compute = _compute(output.dtype)
    kernel[(walk.size_0 * walk.size_1 * cdiv(walk.lanes, lanes),)](
        grad_output, output, dx, _argument(scale, compute), walk.size_1, walk.lanes, width,
        grad_output.shape[-2] if is_causal else 1, *walk.strides[0],
        CAUSAL=is_causal, COMPUTE=compute, AXIS=walk.axis, LANES=lanes, BLOCK_N=block_n,
        num_warps=warps,
    )  # fmt: skip
    return dx


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Tiles of rows, and every row of the table, with what asks most: causal, and an additive mask in the forward."""

    def case(direction, axis, widest, configuration, dtype="bf16", mask=ADDITIVE_MASK, causal=True, device=""):
        double = 2 if dtype == "fp64" else 1
        # Only a row's tile counts here, not how wide the row is beyond its chunk.
        width = (widest or 1) // double
        lanes, block_n, warps, chunked = _tile(configuration, width, 4096, double)
        kernel = {
            "forward": (_forward_kernel, _forward_chunked_kernel),
            "backward": (_backward_kernel, _backward_chunked_kernel),
        }[direction][chunked]
        constants = {"CAUSAL": causal and axis == 1, "AXIS": axis, "LANES": lanes, "BLOCK_N": block_n}
        constants["COMPUTE"] = tl.float64 if dtype == "fp64" else tl.float32
        if direction == "forward":
            constants["MASK"] = mask
        # The stride along the dimension that neighbouring threads walk is 1, and a launch makes it a constant.
        unit = "stride_n" if axis == 1 else "stride_lane"
        constants |= {name: 1 for name in kernel.arg_names if name.endswith(unit)}
        types = {"scale": "i64" if dtype == "fp64" else "fp32", "mask_ptr": "*u8" if mask == BOOL_MASK else f"*{dtype}"}
        signature = {
            name: "constexpr" if name in constants
            else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
            for name in kernel.arg_names
        }  # fmt: skip
        words = [direction, "rows" if axis == 1 else "columns", "chunked" if chunked else str(width)]
        if direction == "forward" and mask != NO_MASK:
            words.append("bool mask" if mask == BOOL_MASK else "additive mask")
        if constants["CAUSAL"]:
            words.append("causal")
        name = " ".join([*words, dtype]) + device
        aligned = ("lanes", "width", *(n for n in kernel.arg_names if "_stride_" in n and n not in constants))
        return CompileCase(name, kernel, signature, constants, warps, num_stages=3, aligned=aligned)

    # Several rows of a tile, a whole tile, more warps, and the widest.
    cases = [
        case(direction, 1, width, _held_row(width))
        for direction, widest in _WIDEST_ROW.items()
        for width in (64, _ELEMENTS, 2 * _ELEMENTS, widest)
    ]
    for device, rows in TABLE.shipped(architecture):
        for (direction, axis, widest), row in rows.items():
            cases.append(case(direction, axis, widest, row.configuration, device=device))
            if axis == 1:
                cases.append(case(direction, axis, widest, row.configuration, "fp64", device=device))
    plain = _held_row(_ELEMENTS)
    return [
        *cases,
        case("forward", 1, _ELEMENTS, plain, mask=NO_MASK, causal=False),
        case("forward", 1, _ELEMENTS, plain, mask=BOOL_MASK, causal=False),
        case("backward", 1, _ELEMENTS, plain, causal=False),
    ]
