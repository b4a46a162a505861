"""The batches of a training: rows of a split, divided among processes and read ahead by a thread.

    update u takes the rows  u · batch … (u + 1) · batch − 1,  of which process r of `world` has the r-th part

so that a batch depends on its number alone: not on the number of processes, nor on where a run was continued.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from gptkern.training.data.rows import check_length
from gptkern.training.errors import UserError

if TYPE_CHECKING:
    from gptkern.training.data.store import Shuffled, Tokens


class Batch(NamedTuple):
    """What a process computes of an update.

    Args:
        ids, targets: (rows, length) int64; a target is the id behind the one at its place, or -100, which is none.
        tokens: targets that count in the whole update, over all processes. read: ids of it that are no padding.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    tokens: int
    read: int


class Batches:
    """The batches of one process, one update after another.

    `update` is the number of the next one, and all of the state: set it, and `next` goes on from there. The thread ends
    with `close`, with the object, or with the program. A process that was forked reads on with a thread of its own.

    Args:
        rows: of the split. batch: rows of an update, over all processes.
        rank, world: this process and how many there are.
        prefetch: batches that a thread reads ahead; 0 reads them in `next`.

    Raises:
        UserError: the processes cannot have equal parts of the batch.
    """

    def __init__(
        self,
        rows: Shuffled,
        batch: int,
        *,
        update: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        prefetch: int = 4,
    ):
        if batch < 1 or batch % world:
            raise UserError(
                f"--batch {batch} cannot be divided among {world} processes; it needs a multiple of {world}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"Batches got rank={rank}; it needs 0 to {world - 1}")
        self.update = update
        self.device = torch.device(device)
        self.prefetch = prefetch
        self._make = _Maker(rows, batch, rank, world, pinned=self.device.type == "cuda")
        self._ahead: _Ahead | None = None
        self._closed = False

    def next(self) -> Batch:
        """The batch of update number `update`, on the device.

        Raises:
            UserError: a part of the data that it needs is damaged. Calling it again raises it again.
        """
        if self._closed:
            raise RuntimeError("these batches were closed")
        update = self.update
        batch = self._make(update) if self.prefetch < 1 else self._taken(update)
        # The copy of pinned memory does not wait; the next ones are read meanwhile.
        ids, targets = (part.to(self.device, non_blocking=True) for part in (batch.ids, batch.targets))
        self.update = update + 1
        return Batch(ids, targets, batch.tokens, batch.read)

    def _taken(self, update: int) -> Batch:
        if self._ahead is None or not self._ahead.reaches(update):
            self._stop()
            self._ahead = _Ahead(self._make, update, self.prefetch)
        return self._ahead.take(update)

    def _stop(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.stop()

    def close(self) -> None:
        """End the thread and wait for it. A second call changes nothing."""
        self._closed = True
        self._stop()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Maker:
    """Makes the batch of an update, on the CPU."""

    def __init__(self, rows: Shuffled, batch: int, rank: int, world: int, pinned: bool):
        self.rows, self.batch, self.pinned = rows, batch, pinned
        self.share = batch // world
        self.first = rank * self.share

    def __call__(self, update: int) -> Batch:
        part = self.rows.part(update, self.batch, self.first, self.share)
        ids, targets = (torch.from_numpy(np.ascontiguousarray(each)) for each in (part.ids, part.targets))
        if self.pinned:
            ids, targets = ids.pin_memory(), targets.pin_memory()
        return Batch(ids, targets, part.tokens, part.read)


class _Ahead:
    """Batches that a thread makes ahead, in order. The thread ends with this object, or with the program."""

    def __init__(self, make: Callable[[int], Batch], first: int, most: int):
        self._first = first  # the number of the first one that is there or comes
        self._failed = False
        self._process = os.getpid()
        # The thread knows the line alone: an interrupt may drop this object at any moment, this one included.
        self._line = _Line(make, first, most)
        thread = threading.Thread(target=self._line.fill, args=(first,), name="gptkern batches", daemon=True)
        self.stop = functools.partial(_end, self._line, thread, self._process)
        weakref.finalize(self, self.stop)
        thread.start()

    def reaches(self, number: int) -> bool:
        """Whether `take` can have that number. What failed is tried again, with another thread."""
        return self._process == os.getpid() and not self._failed and self._first <= number <= self._first + 1

    def take(self, number: int) -> Batch:
        line, self._first = self._line, number
        while line.ready and line.ready[0][0] < number:
            line.ready.popleft()
        line.allow(number)
        _emptied(line.made)
        while not line.ready:
            if line.stopped:
                raise RuntimeError("these batches were closed")
            line.made.get()
        batch = line.ready[0][1]
        if isinstance(batch, BaseException):
            self._failed = True
            raise batch
        return batch


class _Line:
    """What a thread has made, and what is waited for.

    Without a lock: one that an interrupt leaves held, between its taking and the block that gives it back, would keep
    thread and program waiting for ever. What the two tell each other are single operations of CPython's, and a wake-up
    that is lost or too many changes nothing: who was woken looks again.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, most: int):
        self._make, self._most = make, most
        # (number, batch or what was raised). The first one stays until the one behind it is asked for: an interrupt
        # between its taking and its use must not lose it.
        self.ready: collections.deque[tuple[int, Batch | BaseException]] = collections.deque()
        self._last = first + most  # what may be made
        self.stopped = False
        self.made: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._allowed: queue.SimpleQueue[None] = queue.SimpleQueue()

    def allow(self, number: int) -> None:
        """That one is being used, and counts for nothing among those that are made ahead."""
        self._last = number + self._most
        self._allowed.put(None)

    def stop(self) -> None:
        self.stopped = True
        self._allowed.put(None)
        self.made.put(None)

    def fill(self, first: int) -> None:
        for number in itertools.count(first):
            _emptied(self._allowed)
            while number > self._last and not self.stopped:
                self._allowed.get()
            if self.stopped:
                return
            try:
                batch = self._make(number)
            except BaseException as error:
                batch = error
            self.ready.append((number, batch))
            self.made.put(None)
            if isinstance(batch, BaseException):
                return


def _emptied(wakes: queue.SimpleQueue[None]) -> None:
    """What woke nobody goes, or there would be more of it with every update. Who calls looks for what changed after."""
    while not wakes.empty():
        wakes.get()


def _end(line: _Line, thread: threading.Thread, process: int) -> None:
    # In a process that was forked there is no such thread.
    if process != os.getpid():
        return
    line.stop()
    # The garbage collector may run in the thread itself; an interrupt may have kept it from starting.
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()


class Windows:
    """The rows of a held-out split in order: each begins on the last token of the one before.

    A sequence of (length + 1,) int64.

    Args:
        most: so many rows, evenly spread over all of the split; None for all of them.

    Raises:
        UserError: there are fewer than length + 1 tokens.
    """

    def __init__(self, tokens: Tokens, length: int, most: int | None = None, split: str = "held-out"):
        check_length(tokens, length, split)
        if most is not None and most < 1:
            raise ValueError(f"Windows got most={most}; it needs at least 1")
        self.tokens, self.length = tokens, length
        self._all = (len(tokens) - 1) // length
        self._rows = self._all if most is None else min(most, self._all)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._rows:
            raise IndexError(f"window {index} of {self._rows}")
        start = index * self._all // self._rows * self.length
        return self.tokens.read(start, start + self.length + 1).astype(np.int64)

    def batches(self, rows: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """All of them, at most so many rows at a time; `tokens` are those of the batch."""
        for first in range(0, self._rows, rows):
            ids = np.stack([self[index] for index in range(first, min(first + rows, self._rows))])
            ids = torch.from_numpy(ids).to(device)
            targets = ids[:, 1:].contiguous()
            yield Batch(ids[:, :-1].contiguous(), targets, targets.numel(), targets.numel())


def windows(tokens: Tokens, length: int, most: int | None = None) -> Windows:
    """The rows of a held-out split in order; see `Windows`."""
    return Windows(tokens, length, most)
