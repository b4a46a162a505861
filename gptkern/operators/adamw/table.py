"""What a kernel over many tensors is told of them: a row of a table on the device for each, and whose each chunk is.

Both are made on the host and copied without waiting. A table is kept by everything that is in it, the memory's
addresses included: gradients that come back where they were cost no copy. What a CUDA graph captures, it owns: it reads
the pinned copy at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

# Columns of the table, a row for each tensor. Addresses are of memory, sizes in elements.
NAMES = (
    "param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "exp_avg_scale", "exp_avg_sq_scale",
    "count", "width", "first_chunk", "number", "start", "run", "stride", "seed",
)  # fmt: skip
COLUMNS = len(NAMES)
_COLUMN = {name: column for column, name in enumerate(NAMES)}
# Tables and maps of chunks that are kept; a model has a few.
_MOST = 64

_kept: dict[Hashable, torch.Tensor] = {}
# (device, bytes) -> pinned buffers for captures, which may allocate none: as many as there were tables of that size.
_spare: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
# What captures have taken of these since the last step outside of one, which puts others in their place.
_taken: list[tuple[torch.device, int]] = []
# What captured graphs read at their replays, for good.
_owned: list[torch.Tensor] = []


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Rows:
    """The rows of a table, one for each tensor that has elements, and the chunks of all of them."""

    def __init__(self, chunk: int):
        self._chunk = chunk
        self._rows: list[int] = []
        self._counts: list[int] = []
        self.held: list[torch.Tensor] = []
        self.chunks = 0

    def add(self, chunks: int | None = None, **columns: int | torch.Tensor) -> None:
        """A tensor.

        Args:
            chunks: of it; None: as many as its `count` needs.
            columns: by name; of a tensor the address.
        """
        row = [0] * COLUMNS
        for name, value in columns.items():
            if isinstance(value, torch.Tensor):
                self.held.append(value)
                value = value.data_ptr()
            row[_COLUMN[name]] = value
        row[_COLUMN["first_chunk"]] = self.chunks
        if chunks is None:
            chunks = cdiv(row[_COLUMN["count"]], self._chunk)
        self._rows += row
        self._counts.append(chunks)
        self.chunks += chunks

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the table (tensors, COLUMNS) int64, the tensor of each chunk (chunks,) int32."""
        where = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        table = _found((*where, tuple(self._rows)), device, lambda: torch.tensor(self._rows).view(-1, COLUMNS))
        counts = self._counts

        def of_chunks():
            tensors = torch.arange(len(counts), dtype=torch.int32)
            return torch.repeat_interleave(tensors, torch.tensor(counts), output_size=self.chunks)

        chunk_map = _found((*where, "chunks", tuple(counts)), device, of_chunks)
        if device.type == "cpu":
            # Interpreted: tests look addresses up among the tensors that a launch may reach.
            table.reached = self.held
        return table, chunk_map


def _found(key: Hashable, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _kept.get(key)
    if capturing:
        if found is None:
            # It lies in the graph's memory: nobody else may read it before a replay.
            return _captured(make(), device)
        _owned.append(found)
        return found
    if _taken:
        for size in _taken:
            _spare[size].append(_pinned(size[1]))
        _taken.clear()
    if found is None:
        found = _copied(make(), device)
        if len(_kept) >= _MOST:
            _kept.pop(next(iter(_kept)))
        _kept[key] = found
    return found


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _copied(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return host
    size = device, host.numel() * host.element_size()
    spares = _spare.setdefault(size, [])
    if len(spares) < _MOST:
        spares.append(_pinned(size[1]))
    return _sent(host, _pinned(size[1]), device)


def _captured(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    size = device, host.numel() * host.element_size()
    if not _spare.get(size):
        raise RuntimeError("AdamW: the step is captured in a CUDA graph before its first; run one step, then capture")
    pinned = _spare[size].pop()
    _taken.append(size)
    _owned.append(pinned)
    return _sent(host, pinned, device)


def _sent(host: torch.Tensor, pinned: torch.Tensor, device: torch.device) -> torch.Tensor:
    values = pinned.view(host.dtype).view(host.shape)
    values.copy_(host)
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(values, non_blocking=True)


def forget() -> None:
    """Drop what is kept: of tests."""
    _kept.clear()
    _spare.clear()
    _taken.clear()


def is_aligned(tensors: Sequence[Any]) -> bool:
    """Whether each begins at a multiple of the 16 bytes that a thread loads at once."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
