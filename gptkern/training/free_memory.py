"""How much memory there is for this process: of the machine, of the control groups around it, of its own limits."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")

# The files of a control group, in version 2 and in version 1: the limit, what is used, and the key of memory.stat for
# pages of files that the system would give up first.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(device: torch.device) -> int | None:
    """Bytes that this process can still have on a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    return min((max(0, bytes_) for bytes_ in (*_free(), *_of_groups(), *_of_limits())), default=None)


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say."""
    return _status("VmRSS") or 0


def peak() -> int:
    """The most that `resident` has been; 0 where the system does not say."""
    return _status("VmHWM") or 0


def forget_peak() -> None:
    """Let `peak` begin anew, where the system allows it (Linux, of one's own process)."""
    with contextlib.suppress(OSError):
        (PROC / "self/clear_refs").write_text("5")


def _free() -> list[int]:
    """What the system could hand out without swapping."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return [1024 * int(line.split()[1])]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return []


def _of_groups() -> list[int]:
    """What each control group that this process is in, from its own up to the root, leaves of its limit."""
    found = []
    for folder, names in _groups():
        with contextlib.suppress(OSError, ValueError, StopIteration):
            limit, used, stat = (folder / name for name in (*names[:2], "memory.stat"))
            most = int(limit.read_text())  # "max" is no number, and no limit
            lines = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
            found.append(most - int(used.read_text()) + int(lines.get(names[2], 0)))
    return found


def _groups():
    """(folder, names of its files); inside of a container the group's own folder may be the root of the mount."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root, names = (CGROUPS, _VERSION_2) if controllers == "" else (CGROUPS / "memory", _VERSION_1)
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:depth]), names


def _of_limits() -> list[int]:
    """What `ulimit -v` (address space) and `ulimit -d` (data) leave."""
    found = []
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY:
                found.append(most - (_status(used) or 0))
    return found


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (PROC / "self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return 1024 * int(line.split()[1])
    return None
