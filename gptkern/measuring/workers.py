"""Processes that try something each, at the same time, and may die of it.

A kernel that reaches memory which is not its own takes the GPU from its process, for good, and one that waits for what
never comes does not end: what is not known to be right runs in a process of its own. Nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

# A process has so long to end by itself before it is killed.
GRACE_SECONDS = 2.0


class Died(NamedTuple):
    """In place of a result: the process ended, or was ended, while it worked."""

    reason: str


class Raised(NamedTuple):
    """In place of a result: the function raised, and the process goes on."""

    reason: str


class Fatal(Exception):
    """What the function raises where its process is of no more use; the message is the reason of `Died`."""


class Workers:
    """`count` processes, started when they are first needed, each with a call of `function` at a time; close them.

    Args:
        function: found by its module and name; it and its results travel by pickle.
        patience: seconds that one call may take, the start of its process included.
    """

    def __init__(self, function: Callable[..., Any], count: int, patience: float):
        self._function, self._count, self._patience = function, count, patience
        # New interpreters: a copy of a process that has a CUDA context cannot use the GPU.
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[_Worker] = []
        self._busy: dict[int, tuple[_Worker, float]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, calls: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
        """(place in `calls`, the result, or Died or Raised) of each call of the function, as they end."""
        waiting = list(reversed(range(len(calls))))
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self._count:
                    worker, place = self._free(), waiting.pop()
                    self._busy[place] = worker, time.monotonic() + self._patience
                    worker.give(calls[place])
                yield from self._ended()
        finally:
            # Left early: what still works is on a call that nobody waits for.
            for worker, _ in self._busy.values():
                worker.end()
            self._busy.clear()

    def _free(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            # What one that has nothing to do can send is its end, of which the next call is innocent.
            if not worker.pipe.poll():
                return worker
            worker.end()
        return _Worker(self._context, self._function)

    def _ended(self) -> list[tuple[int, Any]]:
        """Waits until a call ends, or its time."""
        until = min(deadline for _, deadline in self._busy.values())
        pipes = [worker.pipe for worker, _ in self._busy.values()]
        multiprocessing.connection.wait(pipes, max(0.0, until - time.monotonic()))
        found = []
        for place, (worker, deadline) in list(self._busy.items()):
            if worker.pipe.poll():
                result = worker.take()
            elif time.monotonic() >= deadline:
                result = Died(f"it did not end within {self._patience:g} s")
            else:
                continue
            del self._busy[place]
            found.append((place, result))
            if isinstance(result, Died):
                worker.end()
            else:
                self._idle.append(worker)
        return found

    def close(self) -> None:
        # All are told before the first is waited for.
        for worker in self._idle:
            worker.pipe.close()
        for worker in self._idle:
            worker.end(politely=True)
        self._idle.clear()


class _Worker:
    """A process and this end of its pipe."""

    def __init__(self, context, function: Callable[..., Any]):
        self.pipe, theirs = context.Pipe()
        # A daemon goes when this process does.
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        with _no_interrupt():
            self._process.start()
        theirs.close()

    def give(self, arguments: tuple) -> None:
        # A process that is dead already is found out by `take`.
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self.pipe.send(arguments)

    def take(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(GRACE_SECONDS)
            status = self._process.exitcode
            if status is None:
                return Died("its process answers no more")
            if status < 0:
                known = {each.value: each.name for each in signal.Signals}  # none of the real-time ones
                return Died(f"its process was ended by {known.get(-status, f'signal {-status}')}")
            return Died(f"its process ended with status {status}")

    def end(self, politely: bool = False) -> None:
        self.pipe.close()
        if politely:
            self._process.join(GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _no_interrupt():
    """What is started inside never sees Ctrl-C, not while it imports either; for this thread it waits for the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    # multiprocessing starts this one with the first process, and unblocks the signal afterwards.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe, function: Callable[..., Any]) -> None:
    """What a process does: a call after another, until the other end is closed."""
    # Ctrl-C in a terminal goes to this process too, and to compilers that it starts: the one that started it decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        while True:
            arguments = pipe.recv()
            try:
                result = function(*arguments)
            except Fatal as error:
                pipe.send(Died(_line(error)))
                return
            except Exception as error:  # a compiler's and a driver's errors are of many types
                result = Raised(f"{type(error).__name__}: {_line(error)}")
            pipe.send(result)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
