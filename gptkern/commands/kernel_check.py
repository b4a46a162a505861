"""This machine's kernels against float64, in a process of its own and in a limited time.

A process of its own, because TRITON_INTERPRET has to be set before Triton is imported: where there is no GPU the
kernels run in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

# The process may take so long to import PyTorch and Triton before the limit begins to count, and so long to finish the
# case that it is in when the limit is over.
START_SECONDS = 60.0
GRACE_SECONDS = 10.0

LONGEST_NOTE = 300  # characters; an interpreter's error may quote whole tensors


@dataclasses.dataclass
class CheckRow:
    """The comparisons (of results and of gradients) of one operator, backend and dtype."""

    operator: str
    backend: str
    dtype: str
    passed: int = 0
    failed: int = 0
    left_out: int = 0  # cases that were not run
    worst: float = 0.0  # the largest error / bound among them


@dataclasses.dataclass
class KernelCheck:
    """What was reached.

    Args:
        rows: one for each operator, backend and dtype.
        failures: a line for each comparison that failed.
        note: how the kernels ran, and what was left out.
    """

    rows: list[CheckRow]
    failures: list[str]
    note: str
    interpreted: bool
    seconds: float

    @property
    def passed(self) -> int:
        return sum(row.passed for row in self.rows)

    @property
    def failed(self) -> int:
        return sum(row.failed for row in self.rows)

    @property
    def left_out(self) -> int:
        return sum(row.left_out for row in self.rows)


_PROGRAM = """
import dataclasses, json, sys
import torch
from gptkern.measuring import checking
torch.set_num_threads(1)
device, seconds = sys.argv[1], float(sys.argv[2])
print("{}", flush=True)
for result in checking.run(device=device, seconds=seconds):
    print(json.dumps(dataclasses.asdict(result)), flush=True)
"""


def check(device: str, seconds: float) -> KernelCheck:
    """Run `gptkern.measuring.checking` in a process for about `seconds`; a KeyboardInterrupt ends the process too."""
    on_gpu = device.startswith("cuda")
    device = device if on_gpu else "cpu"
    interpreted = not on_gpu and importlib.util.find_spec("triton") is not None
    environment = {**os.environ}
    environment.pop("GPTKERN_BACKEND", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, device, str(seconds)], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    readers = [
        threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True),
        threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True),
    ]
    errors: list[str] = []
    for reader in readers:
        reader.start()
    results, cut = [], False
    start = time.monotonic()
    end = start + START_SECONDS
    try:
        while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            if result := json.loads(line):
                results.append(result)
            else:  # the imports are done
                start = time.monotonic()
                end = start + seconds + GRACE_SECONDS
    except queue.Empty:
        cut = True
    finally:
        _end(process)
    for reader in readers:
        reader.join(timeout=1.0)
    rows, failures = summarised(results)
    note = "in Triton's interpreter, on the CPU" if interpreted else "on the GPU"
    if not interpreted and not on_gpu:
        note = "the PyTorch backend alone, since triton is not installed"
    if cut:
        note += f"; ended after {time.monotonic() - start:.0f} s, before it was done"
    elif process.returncode != 0:
        last_line = (errors[0].strip().splitlines() if errors else [])[-1:]
        failures.append(f"the check ended with status {process.returncode}: {' '.join(last_line)}")
    return KernelCheck(rows, failures, note, interpreted, time.monotonic() - start)


def summarised(results: list[dict]) -> tuple[list[CheckRow], list[str]]:
    """Rows, and a line for each failure, from what gptkern.measuring.checking yields."""
    rows: dict[tuple, CheckRow] = {}
    failures = []
    for result in results:
        key = tuple(result[name] for name in ("operator", "backend", "dtype"))
        row = rows.setdefault(key, CheckRow(*key))
        error, bound = result["error"], result["bound"]
        if result["ok"] is None:
            row.left_out += 1
            continue
        if result["ok"]:
            row.passed += 1
        else:
            row.failed += 1
            what = result["note"][:LONGEST_NOTE] or f"worst error {error:.3e}; the rule allows {bound:.3e}"
            failures.append(f"{' '.join(key)} {result['shape']} {result['direction']}: {what}")
        if error is not None and error > 0:
            row.worst = max(row.worst, error / bound if bound > 0 else float("inf"))
    return sorted(rows.values(), key=lambda row: (row.operator, row.backend)), failures


def _read_lines(stream, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _end(process: subprocess.Popen) -> None:
    """Kill the process if it still runs; it has a session of its own, so its children go with it."""
    if process.poll() is None:
        try:
            process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
