"""The runner on an operator made up here, y = 3·x·w: what is wrong gets no time, what is timed is what is said."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

from gptkern.measuring import rates, runner, timing
from gptkern.measuring.cells import Cell, Implementation, Missing


def cell(direction="forward", rows=6):
    return Cell("product", direction, "float32", (("rows", rows), ("width", 4)), "product", "width")


def right(x, w):
    return 3 * x * w


def operator(**implementations):
    """What runner.module gives of an operator with these implementations."""

    def inputs(cell, device):
        return torch.randn(cell.size("rows"), 4, device=device), torch.randn(4, device=device)

    return types.SimpleNamespace(
        inputs=inputs,
        differentiable=lambda cell: (0, 1),
        implementations=lambda cell, kind: dict(implementations),
        check_cell=lambda whole: cell(whole.direction, rows=2),
        checked=lambda cell: [("forward", 1e-7, 4e-7), ("grad w", 3e-7, 4e-7), ("grad x", 0.0, 0.0)],
    )


@pytest.fixture
def measure(monkeypatch):
    """Measures a cell of the operator that `implementations` make up, on a clock that ticks once for each reading."""
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", tick)
    monkeypatch.setattr(runner, "CELL_SECONDS", float("inf"))

    def of(direction="forward", rounds=3, peers=None, checked=None, **implementations):
        module = operator(**implementations)
        module.checked = checked or module.checked
        monkeypatch.setattr(runner, "module", lambda name: module)
        record, samples = runner.measure(cell(direction), "cpu", rounds, peers)
        return record, samples, {each["name"]: each for each in record["implementations"]}

    return of


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_every_implementation_is_timed_in_one_run(measure, direction):
    times_three = Implementation(lambda x, w: x * w * 3)
    record, samples, by_name = measure(direction, gptkern=Implementation(right), eager=times_three)
    assert list(by_name) == ["gptkern", "eager"] and set(samples) == {"gptkern", "eager"}
    for implementation in record["implementations"]:
        assert implementation["wall_s"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
        assert implementation["device_s"] is None and implementation["timed"] == "wall"
    assert record["key"] == cell(direction).key and record["rounds"] == 3 and record["sizes"] == {"rows": 6, "width": 4}
    assert record["check"] == {"error": 3e-7, "bound": 4e-7, "on": "2x4"}, "what came nearest to its bound"


@pytest.mark.parametrize("error", [5e-7, float("inf")])
def test_what_float64_refuses_gets_no_time(measure, error):
    compared = [("forward", 3.9e-7, 4e-7), ("grad w", error, 4e-7)]
    record, samples, by_name = measure(
        checked=lambda cell: compared, gptkern=Implementation(right), eager=Implementation(right)
    )
    assert "wrong: grad w's worst error" in by_name["gptkern"]["skipped"] and "wall_s" not in by_name["gptkern"]
    assert record["check"]["error"] == (None if error == float("inf") else error), "JSON has no infinity"
    assert rates.ours(record) is None and by_name["eager"]["wall_s"] and set(samples) == {"eager"}


class _WrongGradient(torch.autograd.Function):
    """3·x·w with a gradient of w that is `factor` times the right one."""

    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return 3 * x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return 3 * dy * w, ctx.factor * (3 * dy * x).sum(0), None


def test_what_differs_from_the_first_peer_at_full_size_is_named_and_not_timed(measure):
    record, samples, by_name = measure(
        gptkern=Implementation(right), eager=Implementation(right), other=Implementation(lambda x, w: 3.3 * x * w),
        shape=Implementation(lambda x, w: (3 * x * w)[:2]), nan=Implementation(lambda x, w: x * w * torch.nan),
        near=Implementation(lambda x, w: 3.01 * x * w),
    )  # fmt: skip
    assert by_name["other"]["skipped"] == "computes something else: its result differs from that of eager by 10.0%"
    assert record["agreement"] == {"worst": 0.0, "with": "eager"}
    assert all("computes something else" in by_name[name]["skipped"] for name in ("shape", "nan"))
    assert set(samples) == {"gptkern", "eager", "near"}, "another precision is no other function"


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_a_gradient_wrong_at_full_size_is_wrong(measure, direction):
    record, _, by_name = measure(
        direction,
        gptkern=Implementation(lambda x, w: _WrongGradient.apply(x, w, 1.2)),
        eager=Implementation(right),
        peer=Implementation(lambda x, w: _WrongGradient.apply(x, w, 0.5)),
    )
    assert "its gradient of input 1 differs from that of eager by 20.0%" in by_name["gptkern"]["skipped"]
    assert "its gradient of input 1 differs" in by_name["peer"]["skipped"]
    assert by_name["eager"]["wall_s"] and record["agreement"] is None


def test_failures_and_absences_keep_their_reason(measure, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image\nand more")

    reason = "failed: RuntimeError: no kernel image"
    _, samples, by_name = measure(
        gptkern=Implementation(right), absent=Missing("it is not installed"), broken=Implementation(fails),
        unprepared=Implementation(right, prepare=fails),
    )  # fmt: skip
    assert by_name["absent"] == {"name": "absent", "skipped": "it is not installed"}
    assert by_name["broken"]["skipped"] == by_name["unprepared"]["skipped"] == reason
    assert set(samples) == {"gptkern"}
    monkeypatch.setattr(timing, "in_turn", fails)
    _, samples, by_name = measure(gptkern=Implementation(right))
    assert by_name["gptkern"]["skipped"] == f"while sampling, {reason}" and not samples


def test_peers_are_narrowed_and_what_is_prepared_is_what_is_called(measure):
    seen = []

    def prepare(x, w):
        seen.append("prepared")
        return x, w, 3.0

    prepared = Implementation(lambda x, w, factor: factor * x * w, prepare)
    _, _, by_name = measure("both", peers=["b"], gptkern=prepared, a=Implementation(right), b=Implementation(right))
    assert list(by_name) == ["gptkern", "b"] and by_name["gptkern"]["wall_s"]
    assert len(seen) == timing.CPU_SETS, "once for each set"


@pytest.mark.parametrize("bytes_of_weight", [4, 1])
def test_a_packed_weight_gets_as_many_sets_as_its_own_bytes_need(monkeypatch, bytes_of_weight):
    """On a GPU with an L2 cache of 1000 bytes: sets of 24 + 200 bytes, of which `prepare` makes 24 + 50."""
    module = operator(gptkern=Implementation(right))
    module.inputs = lambda cell, device: (torch.randn(6), torch.randn(50))
    module.differentiable = lambda cell: ()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(timing, "alive", lambda kind: None)
    timed = runner._Timed(module, cell(), "cuda", {})

    def prepare(x, w):
        return (x, w if bytes_of_weight == 4 else w.to(torch.int8))

    prepared = timed._all_prepared(Implementation(right, prepare))
    assert len(prepared) == -(-3000 // (24 + 50 * bytes_of_weight)) == {4: 14, 1: 41}[bytes_of_weight]
    assert timing.memory(prepared) >= 3 * 1000
    # Peers that pack less do with what is there.
    assert len(timed._all_prepared(Implementation(right))) == len(timed.sets) == len(prepared)


def test_a_noisy_time_says_why(measure, monkeypatch):
    quiet = dict(waited=0.05, throttled=0.0, stolen=None, load=3.0)
    busy = quiet | dict(waited=0.5)
    for load, ticks, words in (
        (quiet, [1.0], None), (busy, [1.0], "its threads waited for a processor for 50% of the time"),
        (quiet, [1.0, 1.0, 9.0], "the quartiles of 24 samples are"),
    ):  # fmt: skip
        monkeypatch.setattr(runner.contention.Contention, "shares", lambda self, load=load: load)
        values = itertools.cycle(ticks)
        monkeypatch.setattr(timing, "wall_sampler", lambda *_, values=values: lambda: next(values))
        record, samples, by_name = measure(gptkern=Implementation(right), rounds=6)
        assert record["load"] == load and len(samples["gptkern"]) == (6 if len(ticks) == 1 else 24)
        found = by_name["gptkern"]["noisy"]
        assert found is None if words is None else found.startswith(words)
        # The host does not disturb what a graph holds; it does what it queues too slowly.
        for bound, disturbed in ((None, False), (False, False), (True, True)):
            entry = {"device_s": {}, "host_bound": bound}
            assert (runner._noise([1.0] * 6, entry, busy) is not None) is disturbed
    assert runner._noise([1.0, 9.0], {"device_s": {}, "host_bound": None}, quiet) is None, "two samples tell nothing"


@pytest.mark.parametrize("or_events", [True, False])
def test_what_cannot_be_captured_is_timed_without_a_graph_where_it_may_be(monkeypatch, or_events):
    asked = []

    def sampler(function, arguments, graph=True, pool=None):
        asked.append((graph, pool))
        if graph:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return types.SimpleNamespace(host_bound=True)

    monkeypatch.setattr(timing, "DeviceSampler", sampler)
    monkeypatch.setattr(timing, "wall_sampler", lambda *_: None)
    monkeypatch.setattr(timing, "alive", lambda kind: None)
    step = Implementation(right, or_events=or_events)
    if not or_events:
        with pytest.raises(RuntimeError, match="capturing"):
            runner._samplers(right, [], "cuda", step, "a pool")
        return
    _, record = runner._samplers(right, [], "cuda", step, "a pool")
    assert asked == [(True, "a pool"), (False, None)]
    reason = "failed: RuntimeError: operation not permitted when stream is capturing"
    assert record == {"timed": "events", "host_bound": True, "not_captured": reason}


def test_directions_time_what_they_say(measure):
    gradients, forwards, modes = [], [], []

    class Spied(_WrongGradient):
        @staticmethod
        def backward(ctx, dy):
            gradients.append(1)
            return _WrongGradient.backward(ctx, dy)

    def call(x, w):
        forwards.append(1)
        modes.append(torch.is_grad_enabled())
        return Spied.apply(x, w, 1.0)

    added = {}
    for direction in ("forward", "backward", "both"):
        counts = []
        for rounds in (1, 11):
            gradients.clear(), forwards.clear()
            measure(direction, rounds=rounds, gptkern=Implementation(call))
            counts.append((len(forwards), len(gradients)))
        added[direction] = tuple(more - few for few, more in zip(*counts))
        assert modes[-1] is (direction != "forward"), "only a forward is timed without gradients"
    assert added == {"forward": (10, 0), "backward": (0, 10), "both": (10, 10)}


def test_cells_are_ordered_by_importance(monkeypatch):
    lists = {"attention": ["a1", "a2", "a3"], "softmax": ["s1"]}
    monkeypatch.setattr(runner, "module", lambda name: types.SimpleNamespace(cells=lambda kind, extent: lists[name]))
    assert runner.cells("cpu", "full", ("attention", "softmax")) == ["a1", "s1", "a2", "a3"]
