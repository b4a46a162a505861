"""What the forward and the backward of attention share on Triton: loads and stores of a tile, and configurations."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.tables.configurations import Table
from gptkern.triton_kernels.common import INTERPRETED, CompileCase, float32_precision, next_power_of_2

LOG2E = math.log2(math.e)
_LARGEST_BLOCK = 256
_INT32_RANGE = 2**31

# --- Tiles of a sequence --------------------------------------------------------------------------------------------


@triton.jit
def load_tile(
    tile_ptr,  # pointer to the tile's first element
    row_stride,
    rows,  # (BLOCK,) numbers of the tile's rows within the sequence, for the mask
    length,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK, BLOCK_D), zero beyond head_dim and, where MASKED, beyond the sequence's length."""
    columns = tl.arange(0, BLOCK_D)
    pointers = tile_ptr + tl.arange(0, BLOCK)[:, None] * row_stride + columns[None, :]
    if MASKED:
        inside = rows[:, None] < length
        if HEAD_DIM != BLOCK_D:
            inside = inside & (columns[None, :] < HEAD_DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    elif HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=columns[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(
    tile_ptr,
    row_stride,
    rows,
    length,
    tile,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes what lies inside head_dim and the sequence's length, rounded to the pointer's dtype."""
    columns = tl.arange(0, BLOCK_D)
    inside = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        inside = inside & (columns[None, :] < HEAD_DIM)
    pointers = tile_ptr + tl.arange(0, BLOCK)[:, None] * row_stride + columns[None, :]
    tl.store(pointers, tile.to(tile_ptr.dtype.element_ty), mask=inside)


# --- Configurations -------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys at a time, by a program of num_warps, loads num_stages tiles ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# kernel, bits of an element, the largest padded head_dim -> tiles, from attention.json.
TABLE = Table(
    "attention", {"kernel": ("forward", "key_value", "query"), "bits": (16, 32), "head_dim": None}, Tiles
)  # fmt: skip
_forced_tiles: Tiles | None = None


@contextlib.contextmanager
def forced_tiles(block_m: int, block_n: int, num_warps: int = 4, num_stages: int = 1):
    """For tests: every attention kernel started inside the `with` block uses these tiles.

    Small ones (16 at least: tl.dot's least) bring many tiles, diagonals and tails out of short sequences.
    """
    global _forced_tiles
    before, _forced_tiles = _forced_tiles, Tiles(block_m, block_n, num_warps, num_stages)
    try:
        yield
    finally:
        _forced_tiles = before


def tiles_of(kernel: str, device: torch.device, block_d: int, element_size: int) -> Tiles:
    return _forced_tiles or TABLE.find(device, block_d, kernel, 8 * element_size)


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds head_dim, 16 at least: tl.dot's least."""
    return max(16, next_power_of_2(head_dim))


# --- What a launch needs --------------------------------------------------------------------------------------------


def readable(tensor):
    """The tensor itself, or a copy where its head_dim is not contiguous or a tile would pass the int32 range."""
    if tensor.stride(3) == 1 and tensor.stride(2) * _LARGEST_BLOCK < _INT32_RANGE:
        return tensor
    return tensor.contiguous()


def constants_of(query, head_dim, block_d, tiles):
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        # IEEE for 16 bits: the option is for float32 operands alone.
        "INPUT_PRECISION": float32_precision() if query.dtype == torch.float32 else "ieee",
        "WIDEN": INTERPRETED,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


# --- What ships, for the compile tests ------------------------------------------------------------------------------


def shipped_tiles(architecture: int, kernel: str) -> list[tuple[Tiles, str, str, int]]:
    """(tiles, the device that they were measured on or "", dtype, head_dim) of every row that serves an architecture.

    The one table of float32 is compiled whole for 80: its products are the same scalar instructions on every part.
    """
    found = []
    for device, rows in TABLE.shipped(architecture):
        # 80 fills 128 columns with masked ones, which costs registers: its rows are the 128s.
        shapes = [("bf16", head_dim) for head_dim in (64, 80, 128, 256)] + [("fp32", 64)]
        if architecture == 80 or device:
            shapes += [("fp32", 128), ("fp32", 256)]
        for dtype, head_dim in shapes:
            row = rows.get((kernel, 16 if dtype == "bf16" else 32, max(padded_head_dim(head_dim), 64)))
            if row is not None:
                found.append((row.configuration, device, dtype, head_dim))
    return found


def compile_case(function, name, tiles, device, dtype, head_dim, **constants) -> CompileCase:
    """The case of a kernel with these tiles, "*bf16" or "*fp32" being its tensors."""
    constants |= {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "INPUT_PRECISION": "ieee",
        "WIDEN": False,
    }
    types, aligned = signature(function, dtype, constants)
    causal = " causal" if constants["CAUSAL"] else ""
    return CompileCase(
        f"{name} hd{head_dim}{causal} {dtype}{device}", function, types, constants,
        tiles.num_warps, tiles.num_stages, aligned, matrix_product=dtype == "bf16",
    )  # fmt: skip


def signature(kernel, dtype, constants):
    """The types of a kernel's arguments by their names, and which of them are multiples of 16: the strides."""
    types = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32", "scale_log2e": "fp32"}
    found = {
        name: "constexpr" if name in constants else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return found, tuple(name for name in kernel.arg_names if name.endswith("_stride"))
