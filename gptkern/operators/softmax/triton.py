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
from gptkern.backends.triton.strides import Layout, layout
from gptkern.operators.softmax.contract import Call, Gradient

LOG2E = tl.constexpr(math.log2(math.e))
# Loads end at the causal limit rounded up to this many elements, and what is past the limit is thrown away: a limit at
# any element would leave the compiler no two neighbours that it knows to load together.
GRANULE = tl.constexpr(16)
# What `mask_ptr` holds (MASK).
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDITIVE_MASK = tl.constexpr(2)


# --- Shared by the kernels ------------------------------------------------------------------------------------------


@triton.jit
def _position(lanes, size_1, LANES: tl.constexpr, AXIS: tl.constexpr):
    """What this program computes: its place in (size_0, size_1), both indices flattened into one, and its lanes."""
    blocks = tl.cdiv(lanes, LANES)
    group = tl.program_id(0) // blocks
    lane = (tl.program_id(0) % blocks) * LANES + tl.arange(0, LANES)
    return (group // size_1).to(tl.int64), (group % size_1).to(tl.int64), group.to(tl.int64), tl.expand_dims(lane, AXIS)


@triton.jit
def _indices(start, BLOCK_N: tl.constexpr, AXIS: tl.constexpr):
    """start … start + BLOCK_N - 1 along the tile's softmax axis."""
    return tl.expand_dims(start + tl.arange(0, BLOCK_N), 1 - AXIS)


@triton.jit
def _limits(in_row, n, lane, causal_rows, CAUSAL: tl.constexpr):
    """(readable, visible) of a tile: n <= lane % causal_rows is visible, and a little more is readable."""
    if CAUSAL:
        last = lane % causal_rows
        return in_row & (n < (last // GRANULE + 1) * GRANULE), in_row & (n <= last)
    else:
        return in_row, in_row


@triton.jit
def _contiguous(group, lane, lanes, width, AXIS: tl.constexpr):
    """Offsets of the lanes' first elements in a contiguous tensor, and the stride along the row."""
    if AXIS == 1:
        return (group * lanes + lane) * width, 1
    else:
        return group * lanes * width + lane, lanes


@triton.jit
def _scores(
    x_lane,  # pointers to the lanes' first elements
    mask_lane,
    n,
    x_stride_n,
    mask_stride_n,
    readable,
    visible,
    scale,
    CONVERTED: tl.constexpr,
    COMPUTE: tl.constexpr,
    MASK: tl.constexpr,
):
    """z of a tile; -inf where it is hidden or past the tensor's end."""
    n = n.to(tl.int64)
    # The input is converted to the result's dtype first, as PyTorch does.
    x = tl.load(x_lane + n * x_stride_n, mask=readable, other=0.0).to(CONVERTED).to(COMPUTE)
    # z = scale * x (+ mask)
    z = x * scale
    if MASK == ADDITIVE_MASK:
        z += tl.load(mask_lane + n * mask_stride_n, mask=readable, other=0.0).to(COMPUTE)
    if MASK == BOOL_MASK:
        visible = visible & (tl.load(mask_lane + n * mask_stride_n, mask=readable, other=0) != 0)
    return tl.where(visible, z, float("-inf"))


@triton.jit
def _y_and_dy(
    y_lane,  # pointers to the lanes' first elements
    dy_lane,
    n,
    y_stride_n,
    dy_stride_n,
    readable,
    visible,
    COMPUTE: tl.constexpr,
):
    """A tile of y and of its gradient; where it is hidden y is 0 already, and dy, which might be infinite, made so."""
    n = n.to(tl.int64)
    y = tl.load(y_lane + n * y_stride_n, mask=readable, other=0.0).to(COMPUTE)
    dy = tl.load(dy_lane + n * dy_stride_n, mask=readable, other=0.0).to(COMPUTE)
    return y, tl.where(visible, dy, 0.0)


@triton.jit
def _finite(m):
    """The maximum to subtract: 0 for a row of -inf, as -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _reciprocal(total, MAY_BE_EMPTY: tl.constexpr):
    """1 / sum. A row of which nothing takes part is 0 under a mask, and PyTorch's NaN (0 * inf) without one."""
    if MAY_BE_EMPTY:
        return tl.where(total == 0.0, 0.0, 1.0 / total)
    else:
        return 1.0 / total


# --- Forward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["scale_bits"])
def _forward_kernel(
    x_ptr,  # (size_0, size_1, lanes, width) in any strides
    mask_ptr,  # broadcast to the same: uint8 (0 hides) or floating point; anything where MASK is NO_MASK
    y_ptr,  # contiguous: (size_0, size_1, lanes, width) where AXIS is 1, (size_0, size_1, width, lanes) where it is 0
    scale_bits,  # the bits of a float64: a float argument would arrive rounded to float32
    size_1,
    lanes,
    width,
    causal_rows,  # lane % causal_rows is the last element that is visible
    x_stride_0,
    x_stride_1,
    x_stride_lane,
    x_stride_n,
    mask_stride_0,
    mask_stride_1,
    mask_stride_lane,
    mask_stride_n,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    AXIS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= width
):
    i_0, i_1, group, lane = _position(lanes, size_1, LANES, AXIS)
    x_lane = x_ptr + i_0 * x_stride_0 + i_1 * x_stride_1 + lane.to(tl.int64) * x_stride_lane
    mask_lane = mask_ptr + i_0 * mask_stride_0 + i_1 * mask_stride_1 + lane.to(tl.int64) * mask_stride_lane
    y_lane, y_stride_n = _contiguous(group, lane, lanes, width, AXIS)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    CONVERTED: tl.constexpr = y_ptr.dtype.element_ty

    n = _indices(0, BLOCK_N, AXIS)
    in_row = (n < width) & (lane < lanes)
    readable, visible = _limits(in_row, n, lane, causal_rows, CAUSAL)
    z = _scores(x_lane, mask_lane, n, x_stride_n, mask_stride_n, readable, visible, scale, CONVERTED, COMPUTE, MASK)
    # y = exp(z - m) / sum(exp(z - m)). The maximum is subtracted before the change of base: folded into one
    # multiply-add, max * log2(e) would be rounded at the size of |max| wherever that is not fused.
    m = _finite(tl.max(z, axis=AXIS, keep_dims=True))
    p = tl.exp2((z - m) * LOG2E)
    y = p * _reciprocal(tl.sum(p, axis=AXIS, keep_dims=True), CAUSAL or MASK != NO_MASK)
    if CAUSAL:
        # Also in a row whose visible part holds NaN.
        y = tl.where(visible, y, 0.0)
    tl.store(y_ptr + y_lane + n.to(tl.int64) * y_stride_n, y.to(CONVERTED), mask=in_row)


@triton.jit(do_not_specialize=["scale_bits"])
def _forward_chunked_kernel(
    x_ptr,  # arguments: as _forward_kernel's
    mask_ptr,
    y_ptr,
    scale_bits,
    size_1,
    lanes,
    width,
    causal_rows,
    x_stride_0,
    x_stride_1,
    x_stride_lane,
    x_stride_n,
    mask_stride_0,
    mask_stride_1,
    mask_stride_lane,
    mask_stride_n,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    AXIS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # any: the chunk
):
    i_0, i_1, group, lane = _position(lanes, size_1, LANES, AXIS)
    x_lane = x_ptr + i_0 * x_stride_0 + i_1 * x_stride_1 + lane.to(tl.int64) * x_stride_lane
    mask_lane = mask_ptr + i_0 * mask_stride_0 + i_1 * mask_stride_1 + lane.to(tl.int64) * mask_stride_lane
    y_lane, y_stride_n = _contiguous(group, lane, lanes, width, AXIS)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    CONVERTED: tl.constexpr = y_ptr.dtype.element_ty

    # One past the last element that any lane sees.
    limit = width
    if CAUSAL:
        limit = tl.minimum(width, tl.max(lane % causal_rows) + 1)

    m = tl.full(lane.shape, float("-inf"), COMPUTE)
    total = tl.zeros(lane.shape, COMPUTE)
    for start in range(0, limit, BLOCK_N):
        n = _indices(start, BLOCK_N, AXIS)
        readable, visible = _limits((n < width) & (lane < lanes), n, lane, causal_rows, CAUSAL)
        z = _scores(x_lane, mask_lane, n, x_stride_n, mask_stride_n, readable, visible, scale, CONVERTED, COMPUTE, MASK)
        # total = total * exp(m - m') + sum(exp(z - m'))        m' = max(m, max(z))
        new_m = tl.maximum(m, tl.max(z, axis=AXIS, keep_dims=True))
        subtracted = _finite(new_m)
        total = total * tl.exp2((m - subtracted) * LOG2E)
        total += tl.sum(tl.exp2((z - subtracted) * LOG2E), axis=AXIS, keep_dims=True)
        m = new_m

    m = _finite(m)
    reciprocal = _reciprocal(total, CAUSAL or MASK != NO_MASK)
    for start in range(0, limit, BLOCK_N):
        n = _indices(start, BLOCK_N, AXIS)
        in_row = (n < width) & (lane < lanes)
        readable, visible = _limits(in_row, n, lane, causal_rows, CAUSAL)
        z = _scores(x_lane, mask_lane, n, x_stride_n, mask_stride_n, readable, visible, scale, CONVERTED, COMPUTE, MASK)
        # y = exp(z - m) / total
        y = tl.exp2((z - m) * LOG2E) * reciprocal
        if CAUSAL:
            y = tl.where(visible, y, 0.0)
        tl.store(y_ptr + y_lane + n.to(tl.int64) * y_stride_n, y.to(CONVERTED), mask=in_row)
    if CAUSAL:
        for start in range(tl.cdiv(limit, BLOCK_N) * BLOCK_N, width, BLOCK_N):
            n = _indices(start, BLOCK_N, AXIS)
            zero = tl.zeros((n + lane).shape, CONVERTED)
            tl.store(y_ptr + y_lane + n.to(tl.int64) * y_stride_n, zero, mask=(n < width) & (lane < lanes))


# --- Backward -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["scale_bits"])
def _backward_kernel(
    dy_ptr,  # (size_0, size_1, lanes, width) in any strides
    y_ptr,  # contiguous, as the forward wrote it
    dx_ptr,  # as y
    scale_bits,
    size_1,
    lanes,
    width,
    causal_rows,
    dy_stride_0,
    dy_stride_1,
    dy_stride_lane,
    dy_stride_n,
    CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    AXIS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= width
):
    i_0, i_1, group, lane = _position(lanes, size_1, LANES, AXIS)
    dy_lane = dy_ptr + i_0 * dy_stride_0 + i_1 * dy_stride_1 + lane.to(tl.int64) * dy_stride_lane
    y_lane, y_stride_n = _contiguous(group, lane, lanes, width, AXIS)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)

    n = _indices(0, BLOCK_N, AXIS)
    in_row = (n < width) & (lane < lanes)
    readable, visible = _limits(in_row, n, lane, causal_rows, CAUSAL)
    y, dy = _y_and_dy(y_ptr + y_lane, dy_lane, n, y_stride_n, dy_stride_n, readable, visible, COMPUTE)
    if y_ptr.dtype.element_ty.primitive_bitwidth == 16:
        y *= _reciprocal(tl.sum(y, axis=AXIS, keep_dims=True), True)
    # dx = scale * y * (dy - sum(dy * y))
    dx = scale * y * (dy - tl.sum(dy * y, axis=AXIS, keep_dims=True))
    if CAUSAL:
        # Also in a row whose visible part holds NaN.
        dx = tl.where(visible, dx, 0.0)
    tl.store(dx_ptr + y_lane + n.to(tl.int64) * y_stride_n, dx.to(dx_ptr.dtype.element_ty), mask=in_row)


@triton.jit(do_not_specialize=["scale_bits"])
def _backward_chunked_kernel(
    dy_ptr,  # arguments: as _backward_kernel's
    y_ptr,
    dx_ptr,
    scale_bits,
    size_1,
    lanes,
    width,
    causal_rows,
    dy_stride_0,
    dy_stride_1,
    dy_stride_lane,
    dy_stride_n,
    CAUSAL: tl.constexpr,
    COMPUTE: tl.constexpr,
    AXIS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,  # any: the chunk
):
    i_0, i_1, group, lane = _position(lanes, size_1, LANES, AXIS)
    dy_lane = dy_ptr + i_0 * dy_stride_0 + i_1 * dy_stride_1 + lane.to(tl.int64) * dy_stride_lane
    y_lane, y_stride_n = _contiguous(group, lane, lanes, width, AXIS)
    scale = scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(COMPUTE)
    limit = width
    if CAUSAL:
        limit = tl.minimum(width, tl.max(lane % causal_rows) + 1)

    # dot = sum(dy * y)
    dot = tl.zeros(lane.shape, COMPUTE)
    total = tl.zeros(lane.shape, COMPUTE)
    for start in range(0, limit, BLOCK_N):
        n = _indices(start, BLOCK_N, AXIS)
        readable, visible = _limits((n < width) & (lane < lanes), n, lane, causal_rows, CAUSAL)
        y, dy = _y_and_dy(y_ptr + y_lane, dy_lane, n, y_stride_n, dy_stride_n, readable, visible, COMPUTE)
        dot += tl.sum(dy * y, axis=AXIS, keep_dims=True)
        total += tl.sum(y, axis=AXIS, keep_dims=True)
    if y_ptr.dtype.element_ty.primitive_bitwidth == 16:
        reciprocal = _reciprocal(total, True)
        dot *= reciprocal
        scale = scale * reciprocal

    for start in range(0, limit, BLOCK_N):
        n = _indices(start, BLOCK_N, AXIS)
        in_row = (n < width) & (lane < lanes)
        readable, visible = _limits(in_row, n, lane, causal_rows, CAUSAL)
        y, dy = _y_and_dy(y_ptr + y_lane, dy_lane, n, y_stride_n, dy_stride_n, readable, visible, COMPUTE)
        # dx = scale * y * (dy - dot)
        dx = scale * y * (dy - dot)
        if CAUSAL:
            dx = tl.where(visible, dx, 0.0)
        tl.store(dx_ptr + y_lane + n.to(tl.int64) * y_stride_n, dx.to(dx_ptr.dtype.element_ty), mask=in_row)
    if CAUSAL:
        for start in range(tl.cdiv(limit, BLOCK_N) * BLOCK_N, width, BLOCK_N):
            n = _indices(start, BLOCK_N, AXIS)
            zero = tl.zeros((n + lane).shape, dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + y_lane + n.to(tl.int64) * y_stride_n, zero, mask=(n < width) & (lane < lanes))


# --- Configurations -------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How a program is cut: LANES x BLOCK_N elements on `warps` warps, the whole row in it or a chunk of it."""

    lanes: int
    block_n: int
    warps: int
    chunked: bool


class Configuration(NamedTuple):
    """A row of softmax.json: elements of a tile, and the chunk of those rows that are walked in chunks, else None."""

    elements: int
    chunk: int | None
    num_warps: int


# direction, AXIS, the widest row -> configuration. A float64 row counts as one of twice its width.
TABLE = Table(
    "softmax", {"direction": ("forward", "backward"), "axis": (0, 1), "width": None}, Configuration, optional=("chunk",)
)  # fmt: skip

# The widest row that is held in registers where it is less than the table's, and the chunk of the wider ones. Set by
# tests alone, to 16 say: the chunked kernels then run on rows that an interpreter gets through.
ONE_PASS_LIMIT: int | None = None

# Lanes and widths are counted in int32 and run over by less than a tile.
_MAX_COUNT = 2**31 - 2**20


def tile(direction: str, axis: int, width: int, lanes: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The configuration of a call. `dtype` is the one that it computes in."""
    double = 2 if dtype == torch.float64 else 1
    narrow = ONE_PASS_LIMIT is None or width <= ONE_PASS_LIMIT
    return _tile(TABLE.find(device, width * double if narrow else math.inf, direction, axis), width, lanes, double)


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


def _bits(scale: float) -> int:
    return struct.unpack("q", struct.pack("d", scale))[0]


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
    kernel[(walk.size_0 * walk.size_1 * cdiv(walk.lanes, lanes),)](
        input, mask, output, _bits(scale), walk.size_1, walk.lanes, width, input.shape[-2] if is_causal else 1,
        *walk.strides[0], *walk.strides[1],
        MASK=kind, CAUSAL=is_causal, COMPUTE=_compute(output.dtype), AXIS=walk.axis, LANES=lanes, BLOCK_N=block_n,
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
    kernel[(walk.size_0 * walk.size_1 * cdiv(walk.lanes, lanes),)](
        grad_output, output, dx, _bits(scale), walk.size_1, walk.lanes, width,
        grad_output.shape[-2] if is_causal else 1, *walk.strides[0],
        CAUSAL=is_causal, COMPUTE=_compute(output.dtype), AXIS=walk.axis, LANES=lanes, BLOCK_N=block_n,
        num_warps=warps,
    )  # fmt: skip
    return dx


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the tables with what asks most of it: causal, and an additive mask in the forward."""

    def case(rows, direction, axis, widest, dtype="bf16", mask=ADDITIVE_MASK, causal=True, device=""):
        double = 2 if dtype == "fp64" else 1
        # Only a row's tile counts here, not how wide the row is beyond its chunk.
        width = (widest or 1) // double
        lanes, block_n, warps, chunked = _tile(rows[direction, axis, widest].configuration, width, 4096, double)
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
        types = {"scale_bits": "i64", "mask_ptr": "*u8" if mask == BOOL_MASK else f"*{dtype}"}
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
        aligned = ("lanes", "width", *(n for n in kernel.arg_names if "_stride_" in n and n not in constants))
        return CompileCase(
            " ".join([*words, dtype]) + device, kernel, signature, constants, warps, num_stages=3, aligned=aligned
        )

    cases = []
    for device, rows in TABLE.shipped(architecture):
        for direction, axis, widest in rows:
            cases.append(case(rows, direction, axis, widest, device=device))
            if axis == 1 and widest is None:
                cases.append(case(rows, direction, axis, widest, "fp64", device=device))
    rows = TABLE.defaults(architecture)
    return [
        *cases,
        case(rows, "forward", 1, 2048, mask=NO_MASK, causal=False),
        case(rows, "forward", 1, 2048, mask=BOOL_MASK, causal=False),
        case(rows, "backward", 1, 2048, causal=False),
    ]
