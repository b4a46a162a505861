"""How long a function takes, and how much memory: samples taken in turn, on one machine, in one process.

    sampler    a function without arguments that runs what is measured once and returns the seconds of one call
    graph      GPU: device time, by CUDA events around replays of a CUDA graph that holds a call for each set of inputs
    events     GPU: device time of calls that a graph cannot capture, by CUDA events around plain calls
    wall       the host's clock around calls, waiting for the device: what an eager user sees
    host       the host's clock around calls, not waiting for the device

Sets of inputs are together larger than the GPU's L2 cache, so that it serves none of them, by the bytes that a call is
handed (`memory`); each set has results of its own. Between two events stands only what the GPU does: it is kept busy
until all of it is queued. Where the host queues plain calls more slowly than the GPU runs them, the calls are
`host_bound`: what is slow is the host, and beyond MOST_BUSY_SECONDS its time counts. `in_turn` takes samples of several
functions alternately, so that what slows the machine down slows all of them, and goes on where they are unsteady;
`Contention` says how much of the processor others took meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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
# Samples that a median and its quartiles need at least; and how many times the rounds asked for are taken at most of
# what is unsteady.
FEWEST_ROUNDS, PATIENT_ROUNDS = 5, 4


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
    sets = [make() for _ in range(1 if torch.device(device).type == "cuda" else CPU_SETS)]
    while (missing := sets_missing(sets, device)) > 0:
        sets += [make() for _ in range(missing)]
    return sets


def sets_missing(sets: Sequence[Any], device: torch.device | str) -> int:
    """How many more sets like these a GPU's L2 cache asks for; on a CPU none."""
    if torch.device(device).type != "cuda":
        return 0
    wanted = CACHE_FACTOR * torch.cuda.get_device_properties(device).L2_cache_size
    # What sets share, such as a mask that is made once, is read again and again: it counts once.
    there, of_first = memory(sets), memory(sets[:1])
    of_another = max((there - of_first) / max(len(sets) - 1, 1), 0) if len(sets) > 1 else of_first
    needed = max(2 - len(sets), math.ceil((wanted - there) / of_another) if of_another else 0)
    return max(0, min(needed, MOST_SETS - len(sets)))


def memory(values: Any) -> int:
    """Bytes of the tensors in nested tuples, lists, dictionaries and modules: of each piece of memory once.

    Of a view the elements that it has, and at most what it is a view of; a tensor subclass (torchao's quantised weight)
    is what it is made of.
    """
    found: dict[Any, list] = {}
    _collect(values, found)
    return sum(min(views, whole) for views, whole, _ in found.values())


def _collect(value: Any, found: dict[Any, list]) -> None:
    """found: an address -> [bytes of the distinct views of that memory, bytes of all of it, these views]."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            _collect([getattr(value, name) for name in value.__tensor_flatten__()[0]], found)
            return
        storage = value.untyped_storage()
        # Dimensions of stride 0 are one element in memory.
        strides = zip(value.shape, value.stride())
        elements = math.prod(size for size, stride in strides if stride != 0)
        place = (value.device, storage.data_ptr())
        known = found.setdefault(place, [0, storage.nbytes(), set()])
        view = (value.storage_offset(), tuple(value.shape), tuple(value.stride()))
        if view not in known[2]:
            known[2].add(view)
            known[0] += elements * value.element_size()
    elif isinstance(value, torch.nn.Module):
        _collect([*value.parameters(), *value.buffers()], found)
    elif isinstance(value, Mapping):
        _collect(list(value.values()), found)
    elif isinstance(value, (tuple, list)):
        for each in value:
            _collect(each, found)


def in_turn(
    samplers: Sequence[Sampler], rounds: int, seconds: float = float("inf"), steady: float = float("inf")
) -> list[list[float]]:
    """`rounds` samples of each; every second round in reverse order.

    Args:
        seconds: what takes longer ends after FEWEST_ROUNDS rounds, or with the round in which the time is up.
        steady: where the quartiles of one are further apart than this share of its median, there are more rounds, up
            to PATIENT_ROUNDS times as many.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    order = list(range(len(samplers)))
    start = time.perf_counter()
    for done in range(rounds * (PATIENT_ROUNDS if steady < float("inf") else 1)):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        if done >= rounds and (done < FEWEST_ROUNDS or all(apart(each) <= steady for each in samples)):
            break
        for index in order:
            samples[index].append(samplers[index]())
        order.reverse()
    return samples


def apart(samples: Sequence[float]) -> float:
    """The distance of the quartiles as a share of the median."""
    median, low, high, _ = spread(samples)
    return (high - low) / median if median > 0 else 0.0


def durations(functions: Sequence[Callable], inputs: Sequence[tuple], rounds: int) -> list[list[float]]:
    """Seconds of one call of each function on the same sets of inputs: device time on a GPU, wall time on a CPU."""
    on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs[0])
    sampler = DeviceSampler if on_gpu else wall_sampler
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


class DeviceSampler:
    """Device time of one call; short samples are repeated. A backward runs on its forward's stream: enter `own_stream`
    before the forward. Without a graph, where calls are short, the gaps between launches count as well.

    Args:
        graph: captures a call for each set in a CUDA graph, and times its replays.
        pool: torch.cuda.graph_pool_handle(): graphs that never run at once may share their memory.

    queueing     seconds that the host takes to queue one call, or its share of a replay
    host_bound   whether that is longer than the GPU works on it
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[tuple], graph: bool = True, pool: Any = None):
        self._sets = len(inputs)
        _warm_up(function, inputs)
        torch.cuda.synchronize()

        def run():
            return _run_all(function, inputs)

        self._run = run
        if graph:
            captured = torch.cuda.CUDAGraph()
            shared = {} if pool is None else {"pool": pool}
            with torch.cuda.graph(captured, stream=torch.cuda.current_stream(), **shared):
                # The results' memory remains the graph's until the graph is released.
                run()
            captured.replay()
            self._run = captured.replay
        queueing = min(self._queued() for _ in range(WARM_UPS))
        one = self._seconds(1, queueing)
        self.host_bound = queueing > one
        self.queueing = queueing / self._sets
        runs = min(MOST_RUNS, math.ceil(SAMPLE_SECONDS_GPU / one)) if one > 0 else MOST_RUNS
        # No more than can be queued while the GPU is kept busy.
        self._runs = max(1, min(runs, int(MOST_BUSY_SECONDS / (BUSY_FACTOR * queueing)) if queueing > 0 else runs))

    def __call__(self) -> float:
        return self._seconds(self._runs, self._runs * self.queueing * self._sets) / (self._runs * self._sets)

    def _queued(self) -> float:
        """Seconds until the host has queued a run, on a GPU that waits for it."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self._run()
        queueing = time.perf_counter() - begin
        torch.cuda.synchronize()
        return queueing

    def _seconds(self, runs: int, queueing: float) -> float:
        """Of so many runs, where the host takes `queueing` seconds to queue them."""
        busy = min(max(BUSY_FACTOR * queueing, LEAST_BUSY_SECONDS), MOST_BUSY_SECONDS)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # An idle GPU would pass `start` at once and wait for the first launch, which would count as time of the call.
        torch.cuda._sleep(round(busy * CYCLES_PER_SECOND))
        start.record()
        for _ in range(runs):
            self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


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


class DeviceLost(RuntimeError):
    """The GPU answers no more: after an illegal access every later call of the process fails."""


def alive(device: torch.device | str) -> None:
    """Waits for what a GPU has been given; nothing on a CPU.

    Raises:
        DeviceLost: it failed in a way that this process cannot go on from.
    """
    if torch.device(device).type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        first = next(iter(str(error).strip().splitlines()), "")[:200]
        raise DeviceLost(f"the GPU answers no more: {first}") from error
