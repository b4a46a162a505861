"""What the benchmarks share: where they run, what is checked before it is timed, how two functions are compared.

A benchmark compares one function of gptkern with one peer:

    comparison = harness.Comparison(name, shape, peer)
    comparison.check(actual, reference, yardstick)      once for each result
    comparison.time(benchmark, ours, theirs, inputs, bytes_moved)

`time` runs both in turn, in one process and on the same inputs, so that what slows the machine down slows both, and
compares medians. A sample is
    on a GPU:   the device time of one replay of a CUDA graph that holds a call for every set of inputs, by CUDA
                events; the sets are together larger than the L2 cache, so that it serves none of them
    on a CPU:   the wall time of one call, or of as many as last SAMPLE_SECONDS, over sets of inputs in turn

The table of all comparisons is printed when pytest ends. Files are written by pytest-benchmark alone, when asked
(--benchmark-json).
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import gptkern
from gptkern import tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Samples of each of the two functions: many and short, so that the median is one that nothing interrupted.
ROUNDS = int(os.environ.get("GPTKERN_BENCH_ROUNDS", "100"))
# A sample on a CPU lasts about this long at least: a thousand times what reading the clock takes, and well below the
# slice of time that an operating system gives a process.
SAMPLE_SECONDS = 2e-4
# How much larger than the L2 cache the inputs are together.
CACHE_FACTOR = 3
# Sets of inputs on a CPU, and at most on a GPU.
CPU_SETS, MOST_SETS = 3, 64


class Row(NamedTuple):
    """A line of the table that is printed at the end."""

    benchmark: str
    shape: str
    peer: str
    seconds: float
    peer_seconds: float
    limit: float | None  # the ratio that is promised, or None
    gigabytes_per_second: float | None
    teraflops: float | None = None


ROWS: list[Row] = []


class _Clock:
    """A timer for pytest-benchmark that tells durations measured before: it cannot take turns between functions."""

    __name__ = "harness.clock"

    def __init__(self):
        self.durations: list[float] = []
        self._now = 0.0
        self._running = False

    def __call__(self) -> float:
        if self._running and self.durations:
            self._now += self.durations.pop(0)
        self._running = not self._running
        return self._now

    def replay(self, benchmark, durations: list[float]) -> None:
        self.durations, self._running = list(durations), False
        benchmark.pedantic(_nothing, rounds=len(durations), iterations=1)


def _nothing() -> None:
    pass


clock = _Clock()


# --- Where ----------------------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """What a number depends on, beside the code: recorded with every benchmark."""
    try:
        import triton
    except ImportError:
        triton = None
    found = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": None if triton is None else triton.__version__,
        "gptkern": gptkern.__version__,
    }
    if DEVICE == "cuda":
        found["cuda"] = torch.version.cuda
        found["multiprocessors"] = torch.cuda.get_device_properties().multi_processor_count
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sets_of_inputs(make: Callable[[], tuple], bytes_of_one: int) -> list[tuple]:
    """`make()` several times: on a GPU, until the sets together exceed its L2 cache by CACHE_FACTOR."""
    count = CPU_SETS
    if DEVICE == "cuda":
        wanted = CACHE_FACTOR * torch.cuda.get_device_properties().L2_cache_size
        count = min(MOST_SETS, max(2, -(-wanted // bytes_of_one)))
    return [make() for _ in range(count)]


# --- Timing ---------------------------------------------------------------------------------------------------------


def durations(functions: list[Callable], inputs: list[tuple], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of one call of each function, `rounds` samples each, in turn; every second round in reverse order."""
    samplers = [(_gpu_sampler if DEVICE == "cuda" else _cpu_sampler)(function, inputs) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    order = list(range(len(functions)))
    for _ in range(rounds):
        for index in order:
            samples[index].append(samplers[index]())
        order.reverse()
    return samples


def host_durations(functions: list[Callable], rounds: int = ROUNDS) -> list[list[float]]:
    """As `durations`, of functions without arguments: the time that the host takes, not waiting for the device."""
    samplers = [_cpu_sampler(function, [()]) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for index, sample in enumerate(samplers):
            samples[index].append(sample())
            if DEVICE == "cuda":
                # Outside of the sample: a full queue would make the next one wait.
                torch.cuda.synchronize()
    return samples


def _cpu_sampler(function: Callable, inputs: list[tuple]) -> Callable[[], float]:
    function(*inputs[0])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        function(*inputs[0])
        seconds.append(time.perf_counter() - start)
    calls = max(1, round(SAMPLE_SECONDS / min(seconds)))
    turn = 0

    def sample() -> float:
        nonlocal turn
        arguments = inputs[turn % len(inputs)]
        turn += 1
        start = time.perf_counter()
        for _ in range(calls):
            function(*arguments)
        return (time.perf_counter() - start) / calls

    return sample


if DEVICE == "cuda":
    # The default stream cannot be captured: everything here runs on one of its own.
    torch.cuda.set_stream(torch.cuda.Stream())


def _gpu_sampler(function: Callable, inputs: list[tuple]) -> Callable[[], float]:
    # Compiling and autotuning happen before the capture.
    for _ in range(3):
        function(*inputs[0])
    graph = torch.cuda.CUDAGraph()
    # A backward runs on its forward's stream, so both have to be on the stream that is captured (see below).
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for arguments in inputs:
            function(*arguments)
    graph.replay()

    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(inputs)

    return sample


# --- Comparing ------------------------------------------------------------------------------------------------------


class Comparison:
    """One function of gptkern against one peer.

    Args:
        benchmark: what is compared, "layer_norm forward". shape: of what, "4096x1024 float32". peer: with whom.
        limit: the ratio of medians, ours over the peer's, that is promised; it is printed, not enforced.
    """

    def __init__(self, benchmark: str, shape: str, peer: str, limit: float | None = None):
        self.benchmark, self.shape, self.peer, self.limit = benchmark, shape, peer, limit
        self.checked = False

    def check(
        self,
        actual: torch.Tensor,
        reference: torch.Tensor,
        yardstick: torch.Tensor,
        factor: float = tolerance.FORWARD_FACTOR,
    ) -> None:
        """Judges a result by the rule of gptkern.tolerance. Nothing that is wrong gets a time."""
        tolerance.assert_close(f"{self.benchmark} {self.shape}", actual, reference, yardstick, factor)
        self.checked = True

    def time(
        self,
        benchmark,
        ours: Callable,
        theirs: Callable,
        inputs: list[tuple],
        bytes_moved: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Times ours(*inputs[i]) and theirs(*inputs[i]).

        Args:
            benchmark: pytest-benchmark's fixture; it is told our samples, and the peer's in its extra_info.
            bytes_moved: the least that has to be read and written in a call, for the GB/s.
            flops: the operations of a call, for the TFLOP/s.
        """
        self.record(benchmark, *durations([ours, theirs], inputs), bytes_moved, flops)

    def record(
        self,
        benchmark,
        samples: list[float],
        peer_samples: list[float],
        bytes_moved: int | None = None,
        flops: float | None = None,
    ) -> None:
        """Takes the samples, in seconds, where `time` is not what is wanted."""
        if not self.checked:
            raise RuntimeError("a result is checked before its time is taken: call check first")
        seconds, peer_seconds = statistics.median(samples), statistics.median(peer_samples)
        rate = None if bytes_moved is None else bytes_moved / seconds * 1e-9
        teraflops = None if flops is None else flops / seconds * 1e-12
        benchmark.extra_info.update(
            environment(),
            shape=self.shape,
            peer=self.peer,
            peer_median=peer_seconds,
            peer_samples=peer_samples,
            ratio=seconds / peer_seconds,
            gigabytes_per_second=rate,
            teraflops=teraflops,
        )
        clock.replay(benchmark, samples)
        ROWS.append(Row(self.benchmark, self.shape, self.peer, seconds, peer_seconds, self.limit, rate, teraflops))


def peer_or_reason(peer: str, eager: Callable, liger: str | None = None) -> tuple[Callable | None, str]:
    """(the peer's function, "") or (None, why it does not run here).

    Args:
        peer: "eager": `eager` itself; "torch.compile": the same, compiled; "liger": the function of Liger-Kernel's
            `liger_kernel.transformers.functional` that `liger` names.
    """
    if peer == "eager":
        return eager, ""
    if DEVICE != "cuda":
        return None, f"{peer} is a peer on GPUs alone"
    if peer == "torch.compile":
        return torch.compile(eager, dynamic=False), ""
    try:
        from liger_kernel.transformers import functional
    except ImportError as error:
        return None, f"liger-kernel cannot be imported: {error}"
    return getattr(functional, liger), ""


def table() -> list[str]:
    """The lines of the table of all comparisons."""
    head = ("benchmark", "shape", "peer", "gptkern", "peer's", "ratio", "limit", "GB/s", "TFLOP/s")
    lines = [head]
    for row in ROWS:
        lines.append(
            (
                row.benchmark,
                row.shape,
                row.peer,
                _time(row.seconds),
                _time(row.peer_seconds),
                f"{row.seconds / row.peer_seconds:.3f}",
                "" if row.limit is None else f"{row.limit:.2f}",
                "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.1f}",
                "" if row.teraflops is None else f"{row.teraflops:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"
