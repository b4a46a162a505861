"""Signals that would end a training in the middle of what has to be done as a whole."""

from __future__ import annotations

import contextlib
import signal
import threading

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def postponed():
    """What is in the block is done as a whole: the signals that come meanwhile are handled at its end, in order."""
    came = []
    try:
        with handled(lambda number, frame: came.append(number)):
            yield
    finally:
        # The handler of one may raise; the others are handled all the same.
        with contextlib.ExitStack() as stack:
            for number in reversed(came):
                stack.callback(signal.raise_signal, number)


@contextlib.contextmanager
def handled(handler):
    """Inside the block SIGINT, SIGTERM and SIGHUP go to `handler`; SIGHUP where it is not ignored, as under `nohup`.

    A handler that another language has set, which Python could not put back, stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS if not _stays(number)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _stays(number: int) -> bool:
    present = signal.getsignal(number)
    return present is None or (number not in (signal.SIGINT, signal.SIGTERM) and present is signal.SIG_IGN)
