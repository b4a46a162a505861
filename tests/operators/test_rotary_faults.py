"""rotary: alignments of each operand, lengths beside tiles, through every kernel."""

from __future__ import annotations

import pytest
import torch
from layouts import apart, guarded
from rotary_calls import angles, check_rotary, layouts, random


# input, cos, sin, dy; and each of their dimensions but the last, whose rows a kernel takes whole vectors of.
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.deep)], ids=str)
@pytest.mark.parametrize(
    ("which", "dim"), [*((i, d) for i in (0, 3) for d in (0, 1, 2)), *((i, d) for i in (1, 2) for d in (0, 1))]
)
def test_one_dimension_of_one_operand_is_not_aligned(kernel_backend, device, dtype, which, dim, interleaved):
    input, dy = (guarded(random(2, 3, 5, 32, device=device, dtype=dtype)) for _ in range(2))
    operands = [input, *angles(2, 5, 16, device=device, dtype=dtype), dy]
    operands[which] = apart(operands[which], dim)
    input, cos, sin, dy = operands
    check_rotary(input, cos, sin, interleaved, grad_output=dy)


# Positions of a Triton tile (32 where there are 32 pairs), and slots of a CUDA block (positions of one pair).
@pytest.mark.parametrize("length", [31, 32, 33, 255, 256, 257])
def test_lengths_beside_tiles(kernel_backend, device, poisoned_memory, length):
    for pairs in (1, 32):
        check_rotary(guarded(random(1, 2, length, 2 * pairs, device=device)), *angles(length, pairs, device=device))


# Heads of a block, and those that are under way at a time.
@pytest.mark.deep
@layouts
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17])
def test_heads_beside_tiles(kernel_backend, device, poisoned_memory, heads, interleaved):
    check_rotary(guarded(random(1, heads, 3, 32, device=device)), *angles(3, 16, device=device), interleaved)


@pytest.mark.deep
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("edge", [16, 32, 64, 128, 256, 512])
def test_widths_beside_tiles(kernel_backend, device, poisoned_memory, edge, dtype, interleaved):
    for head_dim in (edge - 2, edge, edge + 2, edge + 1):
        pairs = head_dim // 2
        check_rotary(guarded(random(2, 3, 3, head_dim, device=device, dtype=dtype)),
                     *angles(3, pairs, device=device), interleaved, rotary_dim=2 * pairs)  # fmt: skip
