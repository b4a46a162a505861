"""Ctrl-C, for the commands that have something to finish when it comes."""

from __future__ import annotations

import contextlib
import signal
import threading


def interruptible():
    """Inside the block SIGINT and SIGTERM raise KeyboardInterrupt, also where the shell had SIGINT ignored.

    A shell does so for what a script starts in the background, and `timeout` sends SIGTERM.
    """
    return _handled(signal.default_int_handler)


def uninterrupted():
    """Inside the block SIGINT and SIGTERM do nothing: what is written there is written to its end."""
    return _handled(signal.SIG_IGN)


@contextlib.contextmanager
def _handled(handler):
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
