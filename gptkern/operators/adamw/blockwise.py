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

import functools
from typing import NamedTuple

import torch

from gptkern.backends import tracing

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
    if blocks * BLOCK == x.shape[1]:
        return x.view(rows, blocks, BLOCK)
    return torch.nn.functional.pad(x, (0, blocks * BLOCK - x.shape[1])).view(rows, blocks, BLOCK)


@functools.cache
def _numbers(n: int) -> list[float]:
    levels = [0.0]
    for i in range(n + 1):
        levels += [10.0 ** (i - n) * (0.1 + 0.9 * (k + 0.5) / 2**i) / top(n) for k in range(2**i)]
    return levels


def _levels(n: int, device: torch.device) -> torch.Tensor:
    """(2^(n+1),) float32: x(c) / top of each code."""
    return torch.tensor(_numbers(n), dtype=torch.float32, device=device)


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


class _Cells(NamedTuple):
    """The codes of the magnitudes from 0 to 1 by their float32's upper 16 bits: a cell, in which one code at most ends.

    code = lowest + (x >= next)
    """

    lowest: torch.Tensor  # (2^15,) float32
    next: torch.Tensor  # (2^15,) float32, infinite where there is none


@functools.cache
def _cells(n: int) -> _Cells:
    """As `_codes` says them, of a CPU."""
    cells = torch.arange(2**15, dtype=torch.int32) << 16
    # Above 1 nothing is asked, and NaN's code is 0.
    inside = cells < 0x3F800000

    def codes(bits):
        return torch.where(inside, _codes(bits.view(torch.float32), n), 0)

    lowest = codes(cells)
    lowest[0x3F80] = 2 ** (n + 1) - 1
    # The least magnitude of a cell whose code is the next one, if any is: between `below` and `above`.
    below, above = cells.clone(), cells + 2**16
    for _ in range(16):
        middle = (below + above) >> 1
        is_next = codes(middle) > lowest
        below, above = torch.where(is_next, below, middle), torch.where(is_next, middle, above)
    next = torch.where(above < cells + 2**16, above.view(torch.float32), torch.inf)
    return _Cells(lowest.float(), next.masked_fill_(~inside, torch.inf))


def _codes_on_a_cpu(x: torch.Tensor, n: int) -> torch.Tensor:
    """`_codes` in float32, by a table."""
    cell, (lowest, next) = (x.view(torch.int32) >> 16).long().view(-1), _cells(n)
    is_next = x.view(-1) >= next.index_select(0, cell)
    return lowest.index_select(0, cell).add_(is_next).view(x.shape)


def _relative(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> what is between 0 and 1 (-1 and 1) of each block's largest magnitude, and that."""
    largest = blocks.abs().amax(-1)
    return blocks / largest.masked_fill(largest == 0, 1.0)[..., None], largest


def encoded(m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 -> int8 of the same shape, float32 (rows, blocks)."""
    x, largest = _relative(_in_blocks(m))
    if x.is_cpu and tracing.has_values(x):
        codes = torch.copysign(_codes_on_a_cpu(x.abs(), SIGNED), x)
        return codes.flatten(1)[:, : width_of(m.shape)].reshape(m.shape).to(torch.int8), largest
    codes = torch.where(x < 0, -1, 1) * _codes(x.abs(), SIGNED)
    return codes.flatten(1)[:, : width_of(m.shape)].view(m.shape).to(torch.int8), largest


def encoded_square(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32, none below 0 -> uint8 of the same shape, float32 (rows, blocks)."""
    x, largest = _relative(_in_blocks(v.sqrt()))
    if x.is_cpu and tracing.has_values(x):
        # sqrt may give NaN its sign
        codes = _codes_on_a_cpu(x.abs(), UNSIGNED).clamp_min_(1).mul_((largest != 0)[..., None])
        return codes.flatten(1)[:, : width_of(v.shape)].reshape(v.shape).to(torch.uint8), largest
    codes = _codes(x, UNSIGNED).clamp_min(1) * (largest != 0)[..., None]
    return codes.flatten(1)[:, : width_of(v.shape)].view(v.shape).to(torch.uint8), largest


def _magnitudes(codes: torch.Tensor, largest: torch.Tensor, n: int) -> torch.Tensor:
    """Of codes from 0 up, int64."""
    blocks = _in_blocks(codes)
    levels = _levels(n, codes.device).index_select(0, blocks.view(-1)).view(blocks.shape)
    return levels.mul_(largest[..., None]).flatten(1)[:, : width_of(codes.shape)].reshape(codes.shape)


def decoded(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What `encoded` gave, in float32."""
    # Of the codes the sign: 0 stands for 0.
    return torch.copysign(_magnitudes(codes.to(torch.int64).abs_(), largest, SIGNED), codes.to(torch.float32))


def decoded_square(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """What `encoded_square` gave, in float32."""
    return _magnitudes(codes.to(torch.int64), largest, UNSIGNED).square_()
