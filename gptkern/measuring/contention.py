"""How much of the processor others took while something was timed: a time that was taken beside them says little.

    waited     share of the time for which a thread of this process was ready and did not run, of the worst thread: the
               kernel's own count (/proc/<pid>/task/<thread>/schedstat)
    throttled  the same of a container's quota (cpu.stat of the control group)
    stolen     share of the processors' time that a hypervisor gave to other machines (/proc/stat)
    load       processes that want to run, for each processor (os.getloadavg): for the reader, no verdict hangs on it

What the system does not count is None; elsewhere than on Linux all but the load.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

# Above this share of the time the median of short samples may be one of those that were interrupted: of two threads
# that wait for each other each waits for the other's turn as well.
BUSY = 0.1
PROCESS, GROUP, STATISTICS = Path("/proc/self/task"), Path("/sys/fs/cgroup/cpu.stat"), Path("/proc/stat")
_STEAL = 7  # which number of the line "cpu" of /proc/stat


class Contention:
    """Counts from the moment that it is made until `shares()` is asked for."""

    def __init__(self):
        self._start, self._waited = time.perf_counter(), _waited()
        self._throttled, self._stolen = _throttled(), _stolen()

    def shares(self) -> dict[str, float | None]:
        """{"waited", "throttled", "stolen", "load"}, as above."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        waits = [waited - self._waited.get(thread, 0.0) for thread, waited in _waited().items()]
        found: dict[str, float | None] = {"waited": max(waits) / elapsed if waits else None, "throttled": None}
        throttled, stolen = _throttled(), _stolen()
        if throttled is not None and self._throttled is not None:
            found["throttled"] = (throttled - self._throttled) / elapsed
        found["stolen"] = None
        if stolen is not None and self._stolen is not None:
            of_all = stolen[1] - self._stolen[1]
            found["stolen"] = (stolen[0] - self._stolen[0]) / of_all if of_all > 0 else 0.0
        with contextlib.suppress(OSError, AttributeError):
            found["load"] = os.getloadavg()[0] / (os.cpu_count() or 1)
        return {name: None if value is None else round(value, 3) for name, value in found.items()}


def busy(shares: dict[str, float | None]) -> str | None:
    """What others took, in words, where it was more than BUSY of the time."""
    words = {
        "waited": "its threads waited for a processor for {} of the time",
        "throttled": "its quota of the processor was used up for {} of the time",
        "stolen": "other machines had {} of the processors' time",
    }
    found = [text.format(f"{shares[name]:.0%}") for name, text in words.items() if (shares.get(name) or 0) > BUSY]
    return "; ".join(found) or None


def _waited() -> dict[str, float]:
    """Thread -> seconds for which it was ready and waited, since it began."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(PROCESS):
            # A thread may end meanwhile.
            with contextlib.suppress(OSError, ValueError, IndexError):
                found[thread] = int((PROCESS / thread / "schedstat").read_text().split()[1]) * 1e-9
    return found


def _throttled() -> float | None:
    """Seconds of the control group, since it began."""
    with contextlib.suppress(OSError, ValueError):
        numbers = dict(line.split() for line in GROUP.read_text().splitlines())
        if "throttled_usec" in numbers:
            return int(numbers["throttled_usec"]) * 1e-6
    return None


def _stolen() -> tuple[int, int] | None:
    """(stolen, all) of the processors' time, in the system's own units."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        numbers = [int(number) for number in STATISTICS.read_text().split("\n", 1)[0].split()[1:9]]
        return numbers[_STEAL], sum(numbers)
    return None
