"""How attention's kernels are launched on Triton: their tables, what mask and dropout hand to them, compile cases."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch

from gptkern.backends.tables.configurations import Table
from gptkern.backends.triton.common import INTERPRETED, CompileCase, float32_precision, next_power_of_2
from gptkern.operators.attention.triton_tiles import ADDITIVE_MASK, BOOL_MASK, NO_MASK

LOG2E = math.log2(math.e)
_LARGEST_BLOCK = 256
_INT32_RANGE = 2**31

# --- Configurations -------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys at a time, by a program of num_warps, loads num_stages tiles ahead."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_KERNELS = ("forward", "key_value", "query")
# kernel, bits of an element, the largest padded head_dim -> tiles, from triton.json. With a mask or dropout, which
# take registers, a kernel has the rows of masked_…
TABLE = Table(
    "attention", {"kernel": (*_KERNELS, *(f"masked_{name}" for name in _KERNELS)), "bits": (16, 32), "head_dim": None},
    Tiles,
)  # fmt: skip
_forced_tiles: Tiles | None = None


@contextlib.contextmanager
def forced_tiles(block_m: int, block_n: int, num_warps: int = 4, num_stages: int = 1):
    """For tests: every attention kernel started inside the `with` block uses these tiles.

    Small ones (16 at least: tl.dot's least) bring many tiles, diagonals and tails out of short sequences.
    """
    global _forced_tiles
    before, _forced_tiles = _forced_tiles, Tiles(block_m, block_n, num_warps, num_stages)
    TABLE.find_anew()
    try:
        yield
    finally:
        _forced_tiles = before
        TABLE.find_anew()


def tiles_of(kernel: str, query: torch.Tensor, block_d: int, extras: Extras) -> Tiles:
    if _forced_tiles is not None:
        return _forced_tiles
    kernel = kernel if extras is _NO_EXTRAS else f"masked_{kernel}"
    return TABLE.find(query.device, block_d, kernel, 8 * query.element_size())


def padded_head_dim(head_dim: int) -> int:
    """The power of two that holds head_dim, 16 at least: tl.dot's least."""
    return max(16, next_power_of_2(head_dim))


# --- What a launch needs --------------------------------------------------------------------------------------------


class Extras(NamedTuple):
    """What mask and dropout hand to a kernel; None where there is none."""

    constants: dict[str, int]
    mask: torch.Tensor | None = None  # (batch, heads, length_q, length_k), uint8 or floating point
    mask_strides: tuple = (None, None, None, None)
    seed: torch.Tensor | None = None
    drop_below: int | None = None
    keep_scale: float | None = None

    @property
    def is_additive(self) -> bool:
        return self.constants["MASK"] == ADDITIVE_MASK.value


_NO_EXTRAS = Extras({"MASK": NO_MASK.value, "MASK_BY_KEY": False, "DROPOUT": False})


def extras_of(query, key, attn_mask, dropout_p, seed) -> Extras:
    if attn_mask is None and seed is None:
        return _NO_EXTRAS
    kind, mask, strides = NO_MASK.value, None, (None, None, None, None)
    if attn_mask is not None:
        mask = _broadcast(attn_mask, (*query.shape[:3], key.shape[2]))
        strides = mask.stride()
        kind = BOOL_MASK.value if mask.dtype == torch.bool else ADDITIVE_MASK.value
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    constants = {"MASK": kind, "MASK_BY_KEY": strides[2] == 0, "DROPOUT": seed is not None}
    if seed is None:
        return Extras(constants, mask, strides)
    # All is dropped at 1: 1 / (1 - dropout_p) has no use, and the threshold no int32.
    drop_below = min(round(dropout_p * 2**32), 2**32 - 1) - 2**31
    return Extras(constants, mask, strides, seed, drop_below, 1 / (1 - dropout_p) if dropout_p < 1 else 0.0)


def _broadcast(mask, shape):
    """The mask in four dimensions, by strides of 0; a copy of what it holds where a tile would pass the int32 range.

    A tile lies in one batch and head, whose offset is 64 bits wide: rows and columns alone decide.
    """
    if max(mask.stride()[-2:]) * _LARGEST_BLOCK >= _INT32_RANGE:
        for dim, stride in enumerate(mask.stride()):
            mask = mask.narrow(dim, 0, 1) if stride == 0 else mask
        mask = mask.contiguous()
    return mask.expand(shape)


def unreadable_mask(query, key, mask) -> str | None:
    """Why the kernels cannot take an attn_mask, or None."""
    if mask is None:
        return None
    if mask.requires_grad and torch.is_grad_enabled():
        return "attn_mask requires a gradient, which the kernels do not compute"
    if not 2 <= mask.dim() <= 4:
        return f"attn_mask has {mask.dim()} dimensions; kernels need 2 to 4"
    wanted = (*query.shape[:3], key.shape[2])
    if any(size not in (1, whole) for size, whole in zip(reversed(mask.shape), reversed(wanted))):
        return f"attn_mask has shape {tuple(mask.shape)}; kernels need one that broadcasts to {wanted}"
    return None


def read(tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """The tensor itself, or a copy where its head_dim is not contiguous or a tile would pass the int32 range; and the
    strides of its batches, heads and rows.
    """
    strides = tensor.stride()
    if strides[3] != 1 or strides[2] * _LARGEST_BLOCK >= _INT32_RANGE:
        tensor = tensor.contiguous()
        strides = tensor.stride()
    return tensor, strides[:3]


def input_precision(query) -> str:
    """tl.dot's: IEEE for 16 bits, since the option is for float32 operands alone."""
    return float32_precision() if query.dtype is torch.float32 else "ieee"


def constants_of(query, head_dim, block_d, tiles):
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "INPUT_PRECISION": input_precision(query),
        "WIDEN": INTERPRETED,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


# --- What ships, for the compile tests ------------------------------------------------------------------------------


class Shipped(NamedTuple):
    """A row of the table, for one head_dim that it serves."""

    tiles: Tiles
    spill: int  # the bytes that the row says may spill
    device: str  # that it was measured on, or ""
    dtype: str
    head_dim: int


def shipped_tiles(architecture: int, kernel: str) -> list[Shipped]:
    """Every row that serves an architecture; the one table of float32 serves all."""
    found = []
    for device, rows in TABLE.shipped(architecture):
        # 80 fills 128 columns with masked ones, which costs registers: its rows are the 128s.
        shapes = [("bf16", head_dim) for head_dim in (64, 80, 128, 256)]
        shapes += [("fp32", head_dim) for head_dim in (64, 128, 256)]
        for dtype, head_dim in shapes:
            row = rows.get((kernel, 16 if dtype == "bf16" else 32, max(padded_head_dim(head_dim), 64)))
            if row is not None:
                found.append(Shipped(row.configuration, row.measured.get("spill", 0), device, dtype, head_dim))
    return found


# What a kernel is compiled with beside the plain causal case, and how that is called.
VARIANTS = {
    "": {},
    " lower-right": {"LOWER_RIGHT": True},
    " bool mask": {"MASK": BOOL_MASK.value},
    " bool mask by key": {"MASK": BOOL_MASK.value, "MASK_BY_KEY": True},
    " additive mask": {"MASK": ADDITIVE_MASK.value},
    " additive mask by key": {"MASK": ADDITIVE_MASK.value, "MASK_BY_KEY": True},
    " dropout": {"DROPOUT": True},
    " bool mask dropout": {"MASK": BOOL_MASK.value, "DROPOUT": True},
    " additive mask dropout": {"MASK": ADDITIVE_MASK.value, "DROPOUT": True},
}


def compile_case(function, name, row: Shipped, variant="", rows="queries", **constants) -> CompileCase:
    """The case of a kernel with a row's tiles, "*bf16" or "*fp32" being its tensors; rows: of its first product.

    Causal; with a mask not, since the two exclude one another. What a case does not use is None, as in a launch.
    """
    tiles, spill, device, dtype, head_dim = row
    constants = {
        "CAUSAL": "mask" not in variant,
        "LOWER_RIGHT": False,
        "MASK": NO_MASK.value,
        "MASK_BY_KEY": False,
        "DROPOUT": False,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "INPUT_PRECISION": "ieee",
        "WIDEN": False,
    } | VARIANTS[variant] | constants  # fmt: skip
    unused = []
    if constants["MASK"] == NO_MASK.value:
        unused += [argument for argument in function.arg_names if argument.startswith("mask_")]
    if constants["MASK"] != ADDITIVE_MASK.value:
        unused.append("row_max_ptr")
    if not constants["DROPOUT"]:
        unused += ["seed_ptr", "drop_below", "keep_scale"]
    constants = dict.fromkeys(unused) | constants
    types, aligned = signature(function, dtype, constants)
    if constants["MASK"] != NO_MASK.value:
        # A row of the mask is dense: a stride of 1 is a constant, as Triton specialises it.
        types["mask_ptr"] = "*u8" if constants["MASK"] == BOOL_MASK.value else "*fp32"
        constants["mask_column_stride"], types["mask_column_stride"] = 1, "constexpr"
    causal = " causal" if constants["CAUSAL"] else ""
    return CompileCase(
        f"{name} hd{head_dim}{causal}{variant} {dtype}{device}", function, types, constants,
        tiles.num_warps, tiles.num_stages, tuple(name for name in aligned if types[name] != "constexpr"),
        # Below 64 rows the products are mma.sync on every part.
        matrix_product=dtype == "bf16" and (tiles.block_m if rows == "queries" else tiles.block_n) >= 64,
        allowed_spill_bytes=spill,
    )  # fmt: skip


def extra_cases(architecture: int, kernel: str) -> list[tuple[str, Shipped]]:
    """(variant, row) of the kernel with mask, dropout and the other alignment.

    Every row is compiled with what takes the most registers, all else at head_dim 64. Masks of float32 take the most.
    For 90 every row has every dense mask: what ptxas serialises does not follow the registers.
    """
    found = [
        (" lower-right", row)
        for row in shipped_tiles(architecture, kernel)
        if (row.dtype, row.head_dim, row.device) == ("bf16", 64, "")
    ]
    for row in shipped_tiles(architecture, f"masked_{kernel}"):
        if row.head_dim == 80:
            continue
        found.append((" additive mask dropout", row))
        if row.dtype == "bf16" and architecture == 90:
            found += [(variant, row) for variant in (" bool mask", " bool mask dropout", " dropout")]
            if row.head_dim == 64:
                found += [
                    (variant, row) for variant in (" bool mask by key", " additive mask", " additive mask by key")
                ]
    return found


def signature(kernel, dtype, constants):
    """The types of a kernel's arguments by their names, and which of them are multiples of 16: the strides."""
    types = {"lse_ptr": "*fp32", "row_max_ptr": "*fp32", "delta_ptr": "*fp32", "seed_ptr": "*i64"}
    types |= dict.fromkeys(("scale", "score_scale", "keep_scale"), "fp32")
    found = {
        name: "constexpr" if name in constants else types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    return found, tuple(name for name in kernel.arg_names if name.endswith("_stride"))
