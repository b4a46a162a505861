"""Samples are taken in turn, of what they should be; no test here depends on how fast the machine is."""

from __future__ import annotations

import pytest
import torch

from gptkern.measuring import ceilings, machine, timing


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
    sets = [(timing.SAMPLE_SECONDS / 10,), (timing.SAMPLE_SECONDS / 5,)]
    sample = timing.wall_sampler(function, sets)
    seen.clear()
    assert sample() == pytest.approx(sets[0][0]) and seen == [sets[0][0]] * 10, "as many calls as fill a sample"
    seen.clear()
    assert sample() == pytest.approx(sets[1][0]) and set(seen) == {sets[1][0]}
    assert sample() == pytest.approx(sets[0][0])


def test_a_long_call_is_sampled_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = []

    def function():
        calls.append(1)
        now[0] += 1.0

    sample = timing.wall_sampler(function, [()])
    calls.clear()
    assert sample() == 1.0 and len(calls) == 1


class _Properties:
    L2_cache_size = 1000


def test_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    made = []

    def make():
        made.append(torch.zeros(50))  # 200 bytes
        return made[-1], "no tensor"

    sets = timing.sets_of_inputs(make, "cuda")
    assert len(sets) == 15 and len(made) == 15, "15 x 200 bytes are 3 x 1000"
    assert len({id(tensor) for tensor, _ in sets}) == 15
    assert len(timing.sets_of_inputs(make, "cpu")) == timing.CPU_SETS
    assert len(timing.sets_of_inputs(lambda: (torch.zeros(10**6),), "cuda")) == 2, "one set alone is in the cache"
    assert len(timing.sets_of_inputs(lambda: (torch.zeros(1),), "cuda")) == timing.MOST_SETS


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.setattr(ceilings, "_seconds", lambda function, inputs: function(*inputs[0]) is None or 0.5)
    found = ceilings.measure("cpu", smoke=True)
    assert found["copy"]["value"] == 2 * 2**20 / 0.5, "bytes read and bytes written"
    assert found["float32"]["value"] == 2 * 64**3 / 0.5
    assert {entry["unit"] for entry in found.values()} == {"B/s", "FLOP/s"}
    assert "64x64x64" in found["bfloat16"]["how"] and "copy" in found["copy"]["how"]


def test_ceilings_leave_out_what_the_device_cannot(monkeypatch):
    def refuses(*_):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch, "_int_mm", refuses)
    assert "int8" not in ceilings.measure("cpu", smoke=True)


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD EPYC 9B45 64-Core Processor", "amd-epyc-9b45-64-core"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon-2-20ghz"),
    ],
)
def test_slug(device, slug):
    assert machine.slug(device) == slug


def test_the_machine_is_identified():
    found = machine.identify()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["slug"] == machine.slug(found["device"]) and found["kind"] == machine.kind()
    assert found["commit"] is None or len(found["commit"]) == 40


def test_the_digest_is_that_of_what_is_measured(tmp_path):
    for name in ("a.py", "tables/b.json", "commands/c.py", "measuring/report.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    before = machine.source_digest(tmp_path)
    for name in ("commands/c.py", "measuring/report.py", "notes.txt"):
        (tmp_path / name).write_text("two")
        assert machine.source_digest(tmp_path) == before, name
    for name in ("a.py", "tables/b.json"):
        (tmp_path / name).write_text(f"three {name}")
        assert machine.source_digest(tmp_path) != before, name
        before = machine.source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "d.py")
    assert machine.source_digest(tmp_path) != before
