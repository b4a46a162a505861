"""Ctrl-C, for the commands that have something to finish when it comes."""

from __future__ import annotations

import contextlib
import importlib
import signal

from gptkern.training.interrupting import handled, postponed

__all__ = ["import_torch", "interruptible", "noted", "postponed", "uninterrupted"]


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

    with handled(interrupt):
        yield raise_if_dropped


@contextlib.contextmanager
def noted():
    """Inside the block the first SIGINT, SIGTERM or SIGHUP is but noted, for a loop that ends itself; the next raises.

    Yields what says whether one came. Which signals, and where they are ignored: as `interruptible`.
    """
    came = []

    def note(number, frame):
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    with handled(note):
        yield lambda: bool(came)


def uninterrupted():
    """Inside the block these signals do nothing: what is written there is written to its end."""
    return handled(signal.SIG_IGN)


def import_torch() -> None:
    """A signal that comes meanwhile is handled afterwards: within the import it ends in tracebacks of others."""
    with postponed():
        importlib.import_module("torch")
