"""How long a function takes, and how much memory: samples taken in turn, on one machine, in one process.

    sampler    a function without arguments that runs what is measured once and returns the seconds of one call
    graph      GPU: device time, by CUDA events around replays of a CUDA graph that holds a call for each set of inputs
    events     GPU: device time of calls that a graph cannot capture, by CUDA events around plain calls
    wall       the host's clock around calls, waiting for the device: what an eager user sees
    host       the host's clock around calls, not waiting for the device

Sets of inputs are together larger than the GPU's L2 cache, so that it serves none of them; each set has results of its
own. Between two events stands only what the GPU does: it is kept busy until all of it is queued. `in_turn` takes
samples of several functions alternately, so that what slows the machine down slows all of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

Sampler = Callable[[], float]

# A sample on a CPU lasts about this long at least: a thousand times what reading the clock takes, and well below the
# slice of time that an operating system gives a process.
SAMPLE_SECONDS = 2e-4
# A sample of device time lasts about this long at least: four thousand times what an event resolves (0.5 us).
SAMPLE_SECONDS_GPU = 2e-3
# Runs in a sample at most, for what is shorter than an event resolves.
MOST_RUNS = 1000
# Before a sample the GPU is kept busy for BUSY_FACTOR times as long as the host takes to queue the sample, so that an
# unlucky host is fast enough as well. At most so long: a call that waits for the GPU cannot be queued ahead of it.
BUSY_FACTOR = 2
LEAST_BUSY_SECONDS, MOST_BUSY_SECONDS = 5e-4, 2e-2
# torch.cuda._sleep counts the multiprocessors' cycles. About the highest clock of a data-centre GPU (H200: 1980 MHz).
CYCLES_PER_SECOND = 2e9
# How much larger than the L2 cache the sets of inputs are together.
CACHE_FACTOR = 3
# Sets of inputs on a CPU, and at most on a GPU.
CPU_SETS, MOST_SETS = 3, 256
# Calls before the first sample: compiling, autotuning and the allocator's first blocks happen in them.
WARM_UPS = 3
# Samples that a median and its quartiles need at least.
FEWEST_ROUNDS = 5


class Spread(NamedTuple):
    """Of samples in seconds: the median, the quartiles and the number."""

    median: float
    low: float
    high: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    if len(samples) < 2:
        return Spread(samples[0], samples[0], samples[0], len(samples))
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high, len(samples))


def sets_of_inputs(make: Callable[[], tuple], device: torch.device | str) -> list[tuple]:
    """`make()` several times: on a GPU until the sets' tensors together exceed its L2 cache by CACHE_FACTOR."""
    first = make()
    count = CPU_SETS
    if torch.device(device).type == "cuda":
        bytes_of_one = sum(value.numel() * value.element_size() for value in first if isinstance(value, torch.Tensor))
        wanted = CACHE_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
        count = min(MOST_SETS, max(2, -(-wanted // max(bytes_of_one, 1))))
    return [first, *(make() for _ in range(count - 1))]


def in_turn(samplers: Sequence[Sampler], rounds: int, seconds: float = float("inf")) -> list[list[float]]:
    """`rounds` samples of each; every second round in reverse order.

    Args:
        seconds: what takes longer ends after FEWEST_ROUNDS rounds, or with the round in which the time is up.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    order = list(range(len(samplers)))
    start = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for index in order:
            samples[index].append(samplers[index]())
        order.reverse()
    return samples


def durations(functions: Sequence[Callable], inputs: Sequence[tuple], rounds: int) -> list[list[float]]:
    """Seconds of one call of each function on the same sets of inputs: device time on a GPU, wall time on a CPU."""
    on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs[0])
    sampler = device_sampler if on_gpu else wall_sampler
    return in_turn([sampler(function, inputs) for function in functions], rounds)


def wall_sampler(function: Callable[..., Any], inputs: Sequence[tuple], kind: str = "cpu") -> Sampler:
    """The host's time of one call, over the sets in turn; on "cuda" of one call in a queue of one for each set."""
    _warm_up(function, inputs)

    def waiting() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        _run_all(function, inputs)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(inputs)

    if kind == "cuda":
        return waiting
    seconds = []
    for _ in range(WARM_UPS):
        start = time.perf_counter()
        function(*inputs[0])
        seconds.append(time.perf_counter() - start)
    calls = max(1, round(SAMPLE_SECONDS / max(min(seconds), 1e-9)))
    sets = itertools.cycle(inputs)

    def sample() -> float:
        arguments = next(sets)
        start = time.perf_counter()
        for _ in range(calls):
            function(*arguments)
        return (time.perf_counter() - start) / calls

    return sample


def _warm_up(function: Callable[..., Any], inputs: Sequence[tuple]) -> None:
    """The first set WARM_UPS times, then every set as a sample runs them."""
    for _ in range(WARM_UPS):
        function(*inputs[0])
    _run_all(function, inputs)


def _run_all(function: Callable[..., Any], inputs: Sequence[tuple]) -> list[Any]:
    """A call for each set. All results live until the last call: one that was freed would give the next its memory,
    and what is written to the same place again and again stays in the cache."""
    return [function(*arguments) for arguments in inputs]


def host_durations(functions: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """As `durations`, of functions without arguments: the host's time, not waiting for the device."""

    def then_drained(sample: Sampler) -> float:
        seconds = sample()
        if torch.cuda.is_available():
            # Outside of the sample: a full queue would make the next one wait.
            torch.cuda.synchronize()
        return seconds

    samplers = [wall_sampler(function, [()]) for function in functions]
    return in_turn([functools.partial(then_drained, sample) for sample in samplers], rounds)


def device_sampler(function: Callable[..., Any], inputs: Sequence[tuple], graph: bool = True) -> Sampler:
    """Device time of one call; short samples are repeated. A backward runs on its forward's stream: enter `own_stream`
    before the forward. Without a graph, where calls are short, the gaps between launches count as well.
    """
    _warm_up(function, inputs)
    torch.cuda.synchronize()

    def run():
        return _run_all(function, inputs)

    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
            # The results' memory remains the graph's until the graph is released.
            run()
        captured.replay()
        run = captured.replay

    def seconds(runs: int, queueing: float) -> float:
        """Of so many runs, where the host takes `queueing` seconds to queue them."""
        busy = min(max(BUSY_FACTOR * queueing, LEAST_BUSY_SECONDS), MOST_BUSY_SECONDS)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # An idle GPU would pass `start` at once and wait for the first launch, which would count as time of the call.
        torch.cuda._sleep(round(busy * CYCLES_PER_SECOND))
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    queueing = time.perf_counter() - begin
    torch.cuda.synchronize()
    one = seconds(1, queueing)
    runs = min(MOST_RUNS, math.ceil(SAMPLE_SECONDS_GPU / one)) if one > 0 else MOST_RUNS
    return lambda: seconds(runs, runs * queueing) / (runs * len(inputs))


@contextlib.contextmanager
def own_stream(kind: str) -> Iterator[None]:
    """On "cuda", a stream other than the default is the current one: the default cannot be captured in a graph."""
    if kind != "cuda" or not torch.cuda.is_available():
        yield
        return
    former, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(former)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        former.wait_stream(stream)


def peak_bytes(function: Callable[..., Any], arguments: tuple) -> int | None:
    """The most GPU memory that one call holds at a time beyond what was held before it; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    function(*arguments)  # compiles and tunes, in memory that is not the call's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*arguments)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
