"""Ctrl-C, for the commands that have something to finish when it comes."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading

# Windows has no SIGHUP.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def interruptible():
    """Inside the block SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, also where the shell had SIGINT ignored.

    A shell does so for what a script starts in the background, `timeout` sends SIGTERM, and a terminal that is closed
    SIGHUP. Where SIGHUP is ignored, as under `nohup`, it stays so.

    What is raised within a weak reference's callback or a `__del__` Python prints and drops. It is raised again where
    a loop in the block calls what the block is given.
    """
    came = []

    def interrupt(number, frame):
        came.append(number)
        raise KeyboardInterrupt

    def raise_if_dropped():
        if came:
            raise KeyboardInterrupt

    with _handled(interrupt):
        yield raise_if_dropped


def uninterrupted():
    """Inside the block these signals do nothing: what is written there is written to its end."""
    return _handled(signal.SIG_IGN)


@contextlib.contextmanager
def postponed():
    """What is in the block is done as a whole: a signal that comes meanwhile is handled at its end."""
    came = []
    try:
        with _handled(lambda number, frame: came.append(number)):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def import_torch() -> None:
    """A signal that comes meanwhile is handled afterwards: within the import it ends in tracebacks of others."""
    with postponed():
        importlib.import_module("torch")


@contextlib.contextmanager
def _handled(handler):
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = {number: signal.signal(number, handler) for number in _SIGNALS if not _stays_ignored(number)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _stays_ignored(number: int) -> bool:
    return number not in (signal.SIGINT, signal.SIGTERM) and signal.getsignal(number) is signal.SIG_IGN
