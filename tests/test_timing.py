"""Samples are taken in turn, of what they should be; no test here depends on how fast the machine is."""

from __future__ import annotations

import contextlib
import itertools
import types
import weakref

import pytest
import torch

from gptkern import operators
from gptkern.measuring import ceilings, contention, machine, timing


def cuda_has(monkeypatch, **functions):
    """What torch.cuda answers; it is there."""
    for name, value in {"is_available": lambda: True, "synchronize": lambda: None, **functions}.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_spread_is_median_and_quartiles():
    assert timing.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 5)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0, 1)


def test_in_turn_alternates_the_order():
    calls = []
    samplers = [lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"]
    first, second = timing.in_turn(samplers, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert (first, second) == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])


def test_in_turn_ends_when_the_time_is_up(monkeypatch):
    now = [0.0]

    def sample():
        now[0] += 1.0
        return 1.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    assert [len(samples) for samples in timing.in_turn([sample, sample], 50, seconds=19.0)] == [10, 10]
    assert [len(samples) for samples in timing.in_turn([sample], 50, seconds=0.0)] == [timing.FEWEST_ROUNDS]
    assert [len(samples) for samples in timing.in_turn([sample], 3, seconds=0.0)] == [3]


def test_wall_sampler_divides_by_its_calls_and_walks_the_sets(monkeypatch):
    now, seen = [0.0], []

    def function(value):
        seen.append(value)
        now[0] += value

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    one, two = timing.SAMPLE_SECONDS / 10, timing.SAMPLE_SECONDS / 5
    sample = timing.wall_sampler(function, [(one,), (two,)])
    seen.clear()
    assert [sample(), sample(), sample()] == pytest.approx([one, two, one])
    assert seen == [one] * 10 + [two] * 10 + [one] * 10, "as many calls as fill a sample"


def test_sets_exceed_the_cache(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def count(elements, kind="cuda"):
        sets = timing.sets_of_inputs(lambda: (torch.zeros(elements), "no tensor"), kind)
        assert len({id(tensor) for tensor, _ in sets}) == len(sets)
        return len(sets)

    assert count(50) == 15, "15 x 200 bytes are 3 x 1000"
    assert (count(10**6), count(1)) == (2, timing.MOST_SETS) and count(1, "cpu") == timing.CPU_SETS

    # What all sets share is read again and again: 600 bytes of it, and 15 sets of 160 of their own.
    shared = torch.zeros(150)
    sets = timing.sets_of_inputs(lambda: (torch.zeros(40), shared), "cuda")
    assert len(sets) == 15 and timing.memory(sets) == 15 * 160 + 600
    assert len(timing.sets_of_inputs(lambda: (shared,), "cuda")) == 5, "as many as one would need, and no more"


def test_memory_is_what_a_call_can_touch():
    base = torch.zeros(8, 16)
    assert timing.memory((base, base)) == timing.memory([{"a": base}, "b", 3]) == 512
    assert timing.memory((base[:2], base[4:])) == 128 + 256 and timing.memory((base, base.t(), base[1:])) == 512
    assert timing.memory(torch.zeros(16).expand(1000, 16)) == 64, "an expanded dimension is one element"
    query, key, value = torch.zeros(4, 3, 8).unbind(1)
    assert timing.memory((query, key, value)) == 4 * 4 * 3 * 8
    layer = torch.nn.Linear(16, 4)
    assert timing.memory((layer, layer.weight)) == 4 * (64 + 4)
    made = operators.problem("int8_linear").inputs(
        operators.problem("int8_linear").cells("cuda", "smoke")[1].sizes, torch.bfloat16, torch.Generator()
    )
    # 24 x 32 and 48 in bfloat16, 48 x 32 in int8, 48 scales.
    assert timing.memory([made]) == 2 * (24 * 32 + 48) + 48 * 32 + 4 * 48


@pytest.mark.parametrize("samples, taken", [([1.0], 6), ([1.0, 1.04], 6), ([1.0, 2.0], 24)])
def test_what_is_unsteady_is_sampled_longer(samples, taken):
    values = itertools.cycle(samples)
    found = timing.in_turn([lambda: next(values), lambda: 1.0], 6, steady=0.1)
    assert [len(each) for each in found] == [taken, taken]


def test_others_on_the_processor_are_seen(tmp_path, monkeypatch):
    """By the system's own counts, planted: thread 1 waited for 0.3 of 1.5 s."""
    for thread in "12":
        (tmp_path / "task" / thread).mkdir(parents=True)
    group, statistics, now = tmp_path / "cpu.stat", tmp_path / "stat", [10.0]
    for name, path in (("PROCESS", tmp_path / "task"), ("GROUP", group), ("STATISTICS", statistics)):
        monkeypatch.setattr(contention, name, path)
    monkeypatch.setattr(contention.time, "perf_counter", lambda: now[0])

    def planted(waited, throttled, stolen):
        for thread, seconds in zip("12", waited):
            (tmp_path / "task" / thread / "schedstat").write_text(f"5 {int(seconds * 1e9)} 7\n")
        group.write_text(f"nr_throttled 1\nthrottled_usec {int(throttled * 1e6)}\n")
        statistics.write_text(f"cpu  10 0 0 {90 - stolen} 0 0 0 {stolen} 0 0\ncpu0 1\n")

    planted((1.0, 4.0), 2.0, 0)
    others = contention.Contention()
    planted((1.3, 4.0), 2.0, 0)
    now[0] = 11.5
    found = others.shares()
    assert (found["waited"], found["throttled"], found["stolen"]) == (0.2, 0.0, 0.0)
    assert contention.busy(found) == "its threads waited for a processor for 20% of the time"
    planted((1.1, 4.0), 2.3, 0)
    assert contention.busy(others.shares()) == "its quota of the processor was used up for 20% of the time"
    planted((1.0, 4.15), 2.0, 0)
    assert contention.busy(others.shares()) is None, "a tenth"
    monkeypatch.setattr(contention, "PROCESS", tmp_path / "none")
    monkeypatch.setattr(contention, "GROUP", tmp_path / "none")
    statistics.write_text("cpu  40 0 0 110 0 0 0 50 0 0\n")
    # 50 of the 100 that went by since.
    assert contention.busy(others.shares()) == "other machines had 50% of the processors' time"
    monkeypatch.setattr(contention, "STATISTICS", tmp_path / "none")
    assert contention.busy(others.shares()) is None and others.shares()["waited"] is None


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(ceilings, "_seconds", lambda function, inputs: function(*inputs[0]) is None or 0.5)
    found = ceilings.measure("cpu", smoke=True)
    assert found["copy"]["value"] == 2 * 2**20 / 0.5, "bytes read and bytes written"
    assert found["float32"]["value"] == 2 * 64**3 / 0.5
    assert {entry["unit"] for entry in found.values()} == {"B/s", "FLOP/s"}


def test_the_digest_is_that_of_what_is_measured(tmp_path):
    measured = ("a.py", "tables/b.json", "training/optimizers.py", "measuring/timing.py")
    others = ("commands/c.py", "measuring/report.py", "formatting.py", "notes.txt")
    for name in (*measured, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    seen = [machine.source_digest(tmp_path)]
    for name in (*others, *measured):
        (tmp_path / name).write_text(f"two {name}")
        seen.append(machine.source_digest(tmp_path))
        assert (seen[-1] in seen[:-1]) is (name in others), name


# --- A GPU's half, on a GPU that is made up -------------------------------------------------------------------------

LAUNCH_SECONDS = 1e-5


class Device:
    """A host that takes LAUNCH_SECONDS for each launch, and one stream that runs what was launched, in order."""

    def __init__(self):
        self.now, self.free = 0.0, 0.0  # the host's clock, and when the device will have done all
        self.capturing, self.launched = None, 0.0

    def launch(self, seconds):
        if self.capturing is not None:
            self.capturing.append(seconds)
            return
        self.now += LAUNCH_SECONDS
        self.free = max(self.free, self.now) + seconds
        self.launched += seconds

    def synchronize(self):
        assert self.capturing is None, "a capture may not wait"
        self.now = max(self.now, self.free)


class Result:
    pass


class Function:
    """Launches kernels of `seconds`; notes for which sets it was called and how many of its results were alive."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        self.calls, self.alive, self._results = [], [], weakref.WeakSet()

    def __call__(self, index):
        self.calls.append(index)
        self.alive.append(len(self._results))
        self.device.launch(self.seconds)
        result = Result()
        self._results.add(result)
        return result


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.free = max(device.free, device.now)

        def synchronize(self):
            device.now = max(device.now, self.at)

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Graph:
        def __init__(self):
            self.kernels = []

        def replay(self):
            device.launch(sum(self.kernels))

    @contextlib.contextmanager
    def capture(graph, stream):
        device.capturing = graph.kernels
        yield
        device.capturing = None

    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.now)
    cuda_has(
        monkeypatch, Event=Event, CUDAGraph=Graph, graph=capture, current_stream=lambda: "current",
        synchronize=device.synchronize,
        _sleep=lambda cycles: device.launch(cycles / timing.CYCLES_PER_SECOND),
    )  # fmt: skip
    return device


SETS = [(0,), (1,), (2,)]
# How a sampler warms up: the first set several times, then each.
WARM_UP = [0] * timing.WARM_UPS + [0, 1, 2]


@pytest.mark.parametrize("graph, seconds", [(True, 0.0), (True, 1e-6), (True, 1e-2), (False, 1e-4), (False, 1e-6)])
def test_device_time_is_the_kernels_alone(device, graph, seconds):
    function = Function(device, seconds)
    sample = timing.DeviceSampler(function, SETS, graph)
    assert function.calls[: len(WARM_UP)] == WARM_UP
    if graph:
        assert function.calls == [*WARM_UP, 0, 1, 2], "each set once in the graph, after all are warm"
    assert function.alive[-3:] == [0, 1, 2], "each result in memory of its own"
    for _ in range(2):
        device.synchronize()
        device.now += 1.0  # idle before the sample
        before = device.launched
        assert sample() == pytest.approx(seconds), "of one call, without the latency of a launch"
        # Of what the host queues too slowly, as much as the GPU can be kept busy for meanwhile.
        enough = timing.SAMPLE_SECONDS_GPU if graph or seconds > LAUNCH_SECONDS else timing.MOST_BUSY_SECONDS / 2
        assert device.launched - before >= enough or seconds == 0, "long enough for an event"


@pytest.mark.parametrize("seconds, bound", [(1e-4, False), (1.1e-5, False), (0.9e-5, True), (1e-6, True)])
def test_what_the_host_queues_more_slowly_than_the_gpu_runs_is_host_bound(device, seconds, bound):
    sample = timing.DeviceSampler(Function(device, seconds), SETS, graph=False)
    assert sample.host_bound is bound and sample.queueing == pytest.approx(LAUNCH_SECONDS)


def test_a_step_too_long_to_be_queued_behind_the_busy_gpu_counts_the_gaps_and_is_host_bound(device):
    """1000 launches a call: the host takes 10 ms for each of 3 sets, the GPU 1 ms."""

    def step(index):
        for _ in range(1000):
            device.launch(1e-6)

    sample = timing.DeviceSampler(step, SETS, graph=False)
    assert sample() > 2e-3 and sample.host_bound
    # As a graph it is one launch, and its time the GPU's.
    assert timing.DeviceSampler(step, SETS)() == pytest.approx(1e-3)


def test_eager_wall_time_waits_for_the_device(device):
    function = Function(device, 1e-3)
    sample = timing.wall_sampler(function, SETS, "cuda")
    assert function.calls == WARM_UP
    device.free += 1.0  # what others have queued is no part of the sample
    for _ in range(2):
        function.calls, function.alive = [], []
        # The device runs while the host launches: only the first launch is waited for.
        assert sample() == pytest.approx(1e-3 + LAUNCH_SECONDS / 3)
        assert function.calls == function.alive == [0, 1, 2]


def test_host_time_does_not_wait_and_drains_the_queue(device):
    function = Function(device, 1e-3)
    (samples,) = timing.host_durations([lambda: function(0)], 3)
    assert samples == [pytest.approx(LAUNCH_SECONDS)] * 3, "the launch, not the kernel"
    assert device.free <= device.now, "drained: a full queue would make the next sample wait"


def test_peak_bytes_is_what_one_warm_call_adds(monkeypatch):
    held, peak, calls = 1000, [0], []

    def function(size):
        calls.append(size)
        # The first call compiles and tunes, in more memory than a call takes.
        peak[0] = max(peak[0], held + size * (1 if len(calls) > 1 else 100))

    cuda_has(
        monkeypatch, reset_peak_memory_stats=lambda: peak.__setitem__(0, held), memory_allocated=lambda: held,
        max_memory_allocated=lambda: peak[0],
    )  # fmt: skip
    assert timing.peak_bytes(function, (24,)) == 24 and calls == [24, 24]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert timing.peak_bytes(function, (24,)) is None
