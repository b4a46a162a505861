"""rotary on Triton: pairs of a head's elements turned by the angles of their position.

    y_a = x_a * cos - x_b * sin
    y_b = x_b * cos + x_a * sin

of pair i < HALF: half-split a = i, b = i + HALF; interleaved a = 2 * i, b = 2 * i + 1. Elements from 2 * HALF on are
copied. Backward: the same by the negative angle (INVERSE), so forward and backward are one kernel.

Each element is read once and written once, and nothing moves fewer bytes: at n elements of b bytes 2 * n * b. cos and
sin are 2 * length * HALF values, read anew for every HEADS heads: a program turns several heads of the same positions,
and of a tile (HEADS, BLOCK_L, pairs) the angles are (1, BLOCK_L, pairs). float32 angles of a 16-bit input would be as
many bytes as the elements themselves if each head read its own, from the L2 cache.

Half-split, a tile loads its two halves; interleaved, it loads the pairs as they lie and parts them in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton.common import CompileCase, cdiv, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.operators.rotary.contract import Call, Gradient, result_strides

# --- Forward and backward -------------------------------------------------------------------------------------------


@triton.jit
def _turn(x_a, x_b, cos, sin):
    # y_a = x_a * cos - x_b * sin
    # y_b = x_b * cos + x_a * sin
    return x_a * cos - x_b * sin, x_b * cos + x_a * sin


@jit(do_not_specialize=["length"])
def _rotary_kernel(
    x_ptr,  # (batch, heads, length, HEAD_DIM), any strides with a contiguous last dimension
    cos_ptr,  # (batch, length, HALF), any strides
    sin_ptr,  # (batch, length, HALF), any strides
    y_ptr,  # (batch, heads, length, HEAD_DIM), as x
    heads,
    length,
    x_stride_batch,
    x_stride_head,
    x_stride_row,
    y_stride_batch,
    y_stride_head,
    y_stride_row,
    cos_stride_batch,
    cos_stride_row,
    cos_stride_pair,
    sin_stride_batch,
    sin_stride_row,
    sin_stride_pair,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,  # whether the angles are negative
    COMPUTE: tl.constexpr,
    HEADS: tl.constexpr,  # the tile: of a program's heads, positions, and pairs or copied elements
    BLOCK_L: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # Head groups of the same positions are neighbours: they share angles.
    groups = tl.cdiv(heads, HEADS)
    blocks = tl.cdiv(length, BLOCK_L)
    group = tl.program_id(0) % groups
    block = tl.program_id(0) // groups % blocks
    batch = (tl.program_id(0) // groups // blocks).to(tl.int64)

    head = (group * HEADS + tl.arange(0, HEADS))[:, None, None]
    row = (block * BLOCK_L + tl.arange(0, BLOCK_L))[None, :, None]
    inside = (head < heads) & (row < length)
    # int64 from here on: tensors may have more than 2^31 elements
    row_64, head_64 = row.to(tl.int64), head.to(tl.int64)
    x_rows = x_ptr + batch * x_stride_batch + head_64 * x_stride_head + row_64 * x_stride_row
    y_rows = y_ptr + batch * y_stride_batch + head_64 * y_stride_head + row_64 * y_stride_row
    cos_rows = cos_ptr + batch * cos_stride_batch + row_64 * cos_stride_row
    sin_rows = sin_ptr + batch * sin_stride_batch + row_64 * sin_stride_row

    for start in tl.static_range(0, HALF, BLOCK_PAIRS):
        pair = start + tl.arange(0, BLOCK_PAIRS)[None, None, :]
        has_angle = (row < length) & (pair < HALF)
        cos = tl.load(cos_rows + pair * cos_stride_pair, mask=has_angle, other=0.0).to(COMPUTE)
        sin = tl.load(sin_rows + pair * sin_stride_pair, mask=has_angle, other=0.0).to(COMPUTE)
        if INVERSE:
            sin = -sin
        if INTERLEAVED:
            column = 2 * start + tl.arange(0, 2 * BLOCK_PAIRS)[None, None, :]
            in_row = inside & (column < 2 * HALF)
            x = tl.load(x_rows + column, mask=in_row, other=0.0).to(COMPUTE)
            x_a, x_b = tl.split(tl.reshape(x, (HEADS, BLOCK_L, BLOCK_PAIRS, 2)))
            y_a, y_b = _turn(x_a, x_b, cos, sin)
            y = tl.reshape(tl.join(y_a, y_b), (HEADS, BLOCK_L, 2 * BLOCK_PAIRS))
            tl.store(y_rows + column, y.to(y_ptr.dtype.element_ty), mask=in_row)
        else:
            in_half = inside & (pair < HALF)
            x_a = tl.load(x_rows + pair, mask=in_half, other=0.0).to(COMPUTE)
            x_b = tl.load(x_rows + HALF + pair, mask=in_half, other=0.0).to(COMPUTE)
            y_a, y_b = _turn(x_a, x_b, cos, sin)
            tl.store(y_rows + pair, y_a.to(y_ptr.dtype.element_ty), mask=in_half)
            tl.store(y_rows + HALF + pair, y_b.to(y_ptr.dtype.element_ty), mask=in_half)

    for start in tl.static_range(2 * HALF, HEAD_DIM, BLOCK_REST):
        column = start + tl.arange(0, BLOCK_REST)[None, None, :]
        in_rest = inside & (column < HEAD_DIM)
        tl.store(y_rows + column, tl.load(x_rows + column, mask=in_rest, other=0.0), mask=in_rest)


# --- Configurations -------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """A row of rotary.json: pairs that a program turns together, of so many heads at most."""

    pairs: int
    heads: int
    num_warps: int


class Tile(NamedTuple):
    """The sizes of a program's tile, as the kernel names them."""

    heads: int
    block_l: int
    block_pairs: int
    block_rest: int


# The largest head_dim -> configuration.
TABLE = Table("rotary", {"head_dim": None}, Configuration)


def tile(configuration: Configuration, heads: int, length: int, head_dim: int, half: int) -> Tile:
    """The tile of a call: never larger than the configuration's, nor than the tensors ask for."""
    pairs, most_heads, _ = configuration
    most_heads = min(most_heads, pairs, next_power_of_2(heads))
    # What is copied counts as pairs too.
    rest = head_dim - 2 * half
    widest = min(next_power_of_2(max(half, cdiv(rest, 2), 1)), pairs // most_heads)
    block_l = min(pairs // (most_heads * widest), next_power_of_2(length))
    return Tile(
        most_heads, block_l, min(next_power_of_2(max(half, 1)), widest), min(next_power_of_2(max(rest, 1)), 2 * widest)
    )


# --- Launchers ------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Heads and positions are counted in int32 and run over by less than a tile; so are programs.
_MAX_COUNT = 2**31 - 2**20


def unsupported(call: Call) -> str | None:
    input, cos, sin, *_ = call
    for name, tensor in (("input", input), ("cos", cos)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}; the kernels cover float16, bfloat16, float32 and float64"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos or sin requires a gradient, which the kernels do not compute"
    batch, heads, length, _ = input.shape
    if batch * heads * length > _MAX_COUNT:
        return f"the input has shape {tuple(input.shape)}; the kernels count its rows in 32 bits"
    return None


def angle_strides(angles: torch.Tensor, rotary_dim: int, interleaved: bool) -> tuple[int, int, int]:
    """(stride_batch, stride_row, stride_pair) of cos or sin; 0 where one serves the whole batch."""
    *batch, row, pair = angles.stride()
    stride_batch = batch[0] if batch and angles.shape[0] > 1 else 0
    # In an entry for each element, both of a pair have the same: interleaved they are neighbours.
    return stride_batch, row, pair * 2 if interleaved and angles.shape[-1] == rotary_dim else pair


def _launch(input, cos, sin, rotary_dim, interleaved, inverse):
    shape = input.shape
    dense = result_strides(shape, input.stride())
    output = torch.empty_strided(shape, dense, dtype=input.dtype, device=input.device)
    if output.numel() == 0:
        return output
    if input.stride(3) != 1:
        input = input.contiguous()
    batch, heads, length, head_dim = shape
    half = rotary_dim // 2
    configuration = TABLE.find(input.device, head_dim)
    most_heads, block_l, block_pairs, block_rest = tile(configuration, heads, length, head_dim, half)
    _rotary_kernel[(batch * cdiv(length, block_l) * cdiv(heads, most_heads),)](
        input, cos, sin, output, heads, length, *input.stride()[:3], *dense[:3],
        *angle_strides(cos, rotary_dim, interleaved), *angle_strides(sin, rotary_dim, interleaved),
        HALF=half, HEAD_DIM=head_dim, INTERLEAVED=interleaved, INVERSE=inverse,
        COMPUTE=tl.float64 if input.dtype == torch.float64 else tl.float32,
        HEADS=most_heads, BLOCK_L=block_l, BLOCK_PAIRS=block_pairs, BLOCK_REST=block_rest,
        num_warps=configuration.num_warps,
    )  # fmt: skip
    return output


def forward(call: Call):
    """-> output (batch, heads, length, head_dim), of the input's dtype and order in memory."""
    return _launch(*call, False)


def backward(gradient: Gradient, call: Call):
    """-> dx (batch, heads, length, head_dim), of the gradient's dtype and order in memory."""
    return _launch(gradient.grad_output, *call[1:], True)


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every row of the table in both layouts, and partial, float32, float64 and backward ones of one row."""

    def case(rows, widest, rotary_dim=None, interleaved=False, inverse=False, dtype="bf16", angles="fp32", device=""):
        head_dim = widest or 512
        half = (rotary_dim or head_dim) // 2
        configuration = rows[(widest,)].configuration
        shape = tile(configuration, 32, 4096, head_dim, half)
        constants = {
            "HALF": half, "HEAD_DIM": head_dim, "INTERLEAVED": interleaved, "INVERSE": inverse,
            "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
            **dict(zip(("HEADS", "BLOCK_L", "BLOCK_PAIRS", "BLOCK_REST"), shape)),
            "cos_stride_pair": 1, "sin_stride_pair": 1,
        }  # fmt: skip
        types = {"cos_ptr": f"*{angles}", "sin_ptr": f"*{angles}"}
        signature = {
            name: "constexpr" if name in constants
            else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
            for name in _rotary_kernel.arg_names
        }  # fmt: skip
        words = ["backward" if inverse else "forward", "interleaved" if interleaved else "half-split"]
        words += [f"hd{head_dim}", *([f"of which {rotary_dim}"] if rotary_dim else []), dtype, f"angles {angles}"]
        aligned = tuple(name for name in signature if "_stride_" in name and name not in constants)
        return CompileCase(
            " ".join(words) + device, _rotary_kernel, signature, constants, configuration.num_warps, 3, aligned
        )

    cases = [
        case(rows, widest, interleaved=interleaved, device=device)
        for device, rows in TABLE.shipped(architecture)
        for (widest,) in rows
        for interleaved in (False, True)
    ]
    rows = TABLE.defaults(architecture)
    return [
        *cases,
        case(rows, 64, rotary_dim=16),
        case(rows, 256, rotary_dim=64, interleaved=True),
        case(rows, 128, inverse=True, angles="bf16"),
        case(rows, 128, dtype="fp32"),
        case(rows, 128, interleaved=True, dtype="fp64", angles="fp64"),
    ]
