"""The tile of an operator whose programs hold whole rows in registers, by a formula instead of a table."""

from __future__ import annotations

import functools
from typing import NamedTuple

from gptkern.backends.triton.common import next_power_of_2

WARP = 32
MOST_WARPS = 32


class Tile(NamedTuple):
    """block_rows rows by block_width columns: whole rows, or of wider ones a chunk."""

    block_rows: int
    block_width: int
    num_warps: int


@functools.lru_cache
def held_elements(width: int, elements: int, a_thread: int) -> tuple[int, int]:
    """(elements of a tile, warps) where rows of this width are held whole.

    A thread keeps as many elements of each operand whatever the width: enough loads in flight to hide memory's
    latency, few enough for its registers. Narrow rows share a tile of `elements`; a wider one takes more warps, and
    where there are no more, more elements a thread.
    """
    elements = max(elements, next_power_of_2(width))
    return elements, min(elements // (a_thread * WARP), MOST_WARPS)
