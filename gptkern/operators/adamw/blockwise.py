"""Averages in 8 bits: dynamic quantisation in blocks, the map of Dettmers et al. as a formula.

A block is at most 256 elements of one row of dimension 0, all that follows of which counts as one row: a shard of rows
has the blocks of the whole tensor. Of each block the largest magnitude is kept in float32. A code c from 1 on stands
for the magnitude

    i = floor(log2 c)        x(c) = 10^(i − n) · (0.1 + 0.9 · (c − 2^i + 0.5) / 2^i)        n = 6 signed, 7 unsigned

relative to x of the largest code, which so is the block's largest itself: seven (eight) decades, each with twice the
levels of the one below. Code 0 is 0.

exp_avg is signed, ±c in an int8. Of exp_avg_sq the root is kept, without a sign, in a uint8: the update divides by the
root, whose relative error is then that of the level, and whose decades are twice as many of the square's. Where a block
is not all zeros no root is coded 0: the update would divide by eps alone.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", 2022 (arXiv:2110.02861).
"""

from __future__ import annotations

import torch

BLOCK = 256
# Decades below the largest one: 2^7 − 1 and 2^8 − 1 codes.
SIGNED, UNSIGNED = 6, 7
# Narrower rows would hardly be smaller than their scales: they keep float32.
LEAST_ROW = 64


def top(n: int) -> float:
    """x of the largest code."""
    return 0.1 + 0.9 * (2**n - 0.5) / 2**n


def width_of(shape) -> int:
    """Elements of a row of dimension 0."""
    return shape[1:].numel()


def blocks_of(shape) -> tuple[int, int]:
    """(rows, blocks of a row): the shape of the scales of a tensor of two dimensions or more."""
    return shape[0], -(-width_of(shape) // BLOCK)


def is_coded(shape) -> bool:
    """Whether a (whole) tensor's averages are held in 8 bits, where its group asks for it."""
    return width_of(shape) >= LEAST_ROW


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    """(rows, …) -> (rows, blocks, 256), zeros behind the end of each row."""
    rows, blocks = blocks_of(x.shape)
    x = x.reshape(rows, -1)
    return torch.nn.functional.pad(x, (0, blocks * BLOCK - x.shape[1])).view(rows, blocks, BLOCK)


def _levels(n: int, device: torch.device) -> torch.Tensor:
    """(2^(n+1),) float32: x(c) / top of each code."""
    levels = [0.0]
    for i in range(n + 1):
        levels += [10.0 ** (i - n) * (0.1 + 0.9 * (k + 0.5) / 2**i) / top(n) for k in range(2**i)]
    return torch.tensor(levels, dtype=torch.float32, device=device)


def _codes(x: torch.Tensor, n: int) -> torch.Tensor:
    """The code of each magnitude x from 0 to 1, relative to the block's largest: int32; 0 below the least decade."""
    x = x * top(n)
    # i: how many of the decades' lower ends lie below
    i, scale = torch.full_like(x, -1.0), torch.full_like(x, 10.0**n)
    for decade in range(n + 1):
        above = x >= 10.0 ** (decade - n - 1)
        i = torch.where(above, float(decade), i)
        scale = torch.where(above, 10.0 ** (n - decade), scale)
    width = torch.exp2(i)
    # c = 2^i + floor(2^i (x / 10^(i−n) − 0.1) / 0.9)
    k = torch.floor((x * scale - 0.1) * (width * (1 / 0.9))).clamp_min(0).minimum(width - 1)
    return torch.where(i >= 0, width + k, 0.0).to(torch.int32)


def _relative(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> what is between 0 and 1 (-1 and 1) of each block's largest magnitude, and that."""
    largest = blocks.abs().amax(-1)
    return blocks / torch.where(largest == 0, 1.0, largest)[..., None], largest


def encoded(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 -> int8 of the same shape, float32 (rows, blocks)."""
    x, largest = _relative(_in_blocks(m))
    codes = torch.where(x < 0, -1, 1) * _codes(x.abs(), SIGNED)
    return codes.flatten(1)[:, : width_of(m.shape)].view(m.shape).to(torch.int8), largest


def encoded_square(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32, none below 0 -> uint8 of the same shape, float32 (rows, blocks)."""
    x, largest = _relative(_in_blocks(v.sqrt()))
    codes = _codes(x, UNSIGNED).clamp_min(1) * (largest != 0)[..., None]
    return codes.flatten(1)[:, : width_of(v.shape)].view(v.shape).to(torch.uint8), largest


def _magnitudes(codes: torch.Tensor, largest: torch.Tensor, n: int) -> torch.Tensor:
    levels = _levels(n, codes.device)[_in_blocks(codes.to(torch.int32))]
    return (levels * largest[..., None]).flatten(1)[:, : width_of(codes.shape)].view(codes.shape)


def decoded(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What `encoded` gave, in float32."""
    return torch.where(codes < 0, -1.0, 1.0) * _magnitudes(codes.to(torch.int32).abs(), largest, SIGNED)


def decoded_square(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What `encoded_square` gave, in float32."""
    return _magnitudes(codes, largest, UNSIGNED).square()
