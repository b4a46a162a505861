"""What a number depends on beside the cell: device, driver, versions, sources, clocks."""

from __future__ import annotations

import concurrent.futures
import datetime
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gptkern
from gptkern.backends.tables import user
from gptkern.measuring import peers

PACKAGE = Path(gptkern.__file__).parent
# What is drawn and printed changes no measurement.
_NOT_MEASURED = ("commands/", "formatting.py", *(f"measuring/{name}.py" for name in ("rates", "report", "plots")))
# Seconds that nvidia-smi and git may take.
_PATIENCE = 20
# Seconds of work before the clocks are read: an idle GPU's clocks take some milliseconds to rise.
_RISE_SECONDS = 0.05


def kind() -> str:
    """Where the bench runs: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def identify() -> dict[str, Any]:
    """The `machine` block of a results file."""
    on_gpu = kind() == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else _processor()
    commit, dirty = _commit()
    return {
        "device": device,
        "slug": slug(device),
        "kind": kind(),
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": user.versions()["triton"],
        "cuda": torch.version.cuda,
        "driver": _nvidia_smi("driver_version", _device_id()) if on_gpu else None,
        "gptkern": gptkern.__version__,
        "commit": commit,
        "dirty": dirty,
        "source": source_digest(),
        "date": datetime.date.today().isoformat(),
        "peers": peers.versions(),
        # What changes the choice of a kernel from outside of the sources.
        "backend": os.environ.get("GPTKERN_BACKEND") or None,
        "tables": _user_tables(),
    }


def slug(device: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200": the folder of a device's results."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu|processor", "", device.lower())).strip("-")


def clocks(busy: Callable[[], Any] | None = None) -> dict[str, int] | None:
    """The GPU's clocks at this moment, in MHz, so that a throttled run shows; None without a GPU or nvidia-smi.

    Args:
        busy: queues work on the GPU. It is called again and again from before nvidia-smi is asked until that has
            answered: an idle GPU's clocks say nothing about a run.
    """
    if kind() != "cuda":
        return None
    device, query = _device_id(), "clocks.sm,clocks.mem"
    rise = time.perf_counter() + _RISE_SECONDS
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        asked = None
        while asked is None or (busy is not None and not asked.done()):
            if asked is None and (busy is None or time.perf_counter() >= rise):
                asked = thread.submit(_nvidia_smi, query, device)
            if busy is not None:
                # It waits for the GPU, or a queue of long calls would outlast the question by far.
                busy()
                torch.cuda.synchronize()
    numbers = re.findall(r"\d+", asked.result() or "")
    return {"sm_mhz": int(numbers[0]), "memory_mhz": int(numbers[1])} if len(numbers) == 2 else None


def source_digest(package: Path = PACKAGE) -> str:
    """A short digest of the sources that a measurement depends on: results of other sources are not resumed."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package).as_posix()
        if path.suffix in (".py", ".json", ".so") and not name.startswith(_NOT_MEASURED):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _user_tables() -> str | None:
    """A digest of the user's own tables, where `gptkern tune` has written some for this GPU."""
    if kind() != "cuda":
        return None
    device = user.identify(torch.device("cuda", torch.cuda.current_device()))
    path = None if device is None else user.path(device)
    return None if path is None or not path.exists() else hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _commit() -> tuple[str | None, bool | None]:
    """(the commit that the package is checked out at, whether the checkout differs from it), or (None, None)."""
    git = "git", "-C", str(PACKAGE.parent)
    commit = _output(*git, "rev-parse", "HEAD") if (PACKAGE.parent / ".git").exists() else None
    return commit, None if commit is None else bool(_output(*git, "status", "--porcelain", "--", PACKAGE.name))


def _device_id() -> str:
    """The current device for nvidia-smi: its UUID, because nvidia-smi and CUDA number devices in different orders."""
    # PyTorch's own type of UUID prints the hexadecimal digits alone.
    return f"GPU-{str(torch.cuda.get_device_properties().uuid).removeprefix('GPU-')}"


def _nvidia_smi(query: str, device: str) -> str | None:
    """Asks for a property of a device; changes no setting."""
    return _output("nvidia-smi", f"--id={device}", f"--query-gpu={query}", "--format=csv,noheader,nounits")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
