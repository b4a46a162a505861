"""What the tests of gptkern.measuring.workers have done in other processes: it has to be found there by its name."""

from __future__ import annotations

import os
import time

from gptkern.measuring.workers import Fatal


def work(what: str, value: object = None):
    """-> (the process, value), or what becomes of it instead."""
    if what == "raises":
        raise ValueError(f"no {value}\nand more")
    if what == "loses the GPU":
        raise Fatal("the GPU answers no more: an illegal memory access")
    if what == "is killed":
        os.kill(os.getpid(), value)
    if what == "ends":
        os._exit(7)
    if what == "hangs":
        time.sleep(100)
    return os.getpid(), value
