"""The runner on an operator made up here, y = 3·x·w: what is wrong gets no time, what is timed is what is said."""

from __future__ import annotations

import types

import pytest
import torch

from gptkern.measuring import rates, results, runner, timing
from gptkern.measuring.cells import Cell, Implementation, Missing


def cell(direction="forward", rows=6):
    return Cell("product", direction, "float32", (("rows", rows), ("width", 4)), "product", "width")


def right(x, w):
    return 3 * x * w


def operator(**implementations):
    """A module of gptkern.measuring.operators, with these implementations."""

    def inputs(cell, device):
        return torch.randn(cell.size("rows"), 4, device=device), torch.randn(4, device=device)

    return types.SimpleNamespace(
        inputs=inputs,
        differentiable=lambda cell: (0, 1),
        implementations=lambda cell, kind: dict(implementations),
        reference=lambda cell, inputs, precision: 3 * inputs[0] * inputs[1],
        check_cell=lambda cell: cell,
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

    def of(direction="forward", rounds=3, peers=None, module=None, **implementations):
        module = module or operator(**implementations)
        monkeypatch.setattr(runner, "module", lambda name: module)
        return runner.measure(cell(direction), "cpu", rounds, peers)

    return of


def by_name(record):
    return {implementation["name"]: implementation for implementation in record["implementations"]}


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_every_implementation_is_timed_in_one_run(measure, direction):
    record, samples = measure(direction, gptkern=Implementation(right), eager=Implementation(lambda x, w: x * w * 3))
    assert list(by_name(record)) == ["gptkern", "eager"] and set(samples) == {"gptkern", "eager"}
    for implementation in record["implementations"]:
        assert implementation["wall_s"] == {"median": 1.0, "low": 1.0, "high": 1.0, "n": 3}
        assert implementation["device_s"] is None and implementation["timed"] == "wall"
    assert record["key"] == cell(direction).key and record["rounds"] == 3 and record["sizes"] == {"rows": 6, "width": 4}
    assert record["check"]["error"] <= record["check"]["bound"]
    recorded = {"format": 1, "machine": {}, "ceilings": {}, "cells": [record], "costs": []}
    assert results.invalid(recorded) is None


def test_a_wrong_result_gets_no_time(measure):
    record, samples = measure(gptkern=Implementation(lambda x, w: 3 * x * w + 1e-4), eager=Implementation(right))
    assert "worst error is 1.0" in by_name(record)["gptkern"]["skipped"]
    assert "wall_s" not in by_name(record)["gptkern"] and "gptkern" not in samples
    assert rates.ours(record) is None and by_name(record)["eager"]["wall_s"]


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


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_a_wrong_gradient_gets_no_time(measure, direction):
    wrong = Implementation(lambda x, w: _WrongGradient.apply(x, w, 1.0003))
    assert "the gradient of input 1" in by_name(measure(direction, gptkern=wrong)[0])["gptkern"]["skipped"]
    assert by_name(measure("forward", gptkern=wrong)[0])["gptkern"]["wall_s"], "nothing is differentiated there"


def test_nan_is_wrong(measure):
    record, _ = measure(gptkern=Implementation(lambda x, w: x * w * torch.nan))
    assert "wrong" in by_name(record)["gptkern"]["skipped"]
    assert record["check"]["error"] is None, "JSON has no infinity"


def test_a_wrong_peer_is_named_and_not_timed(measure):
    record, samples = measure(
        gptkern=Implementation(right), eager=Implementation(right), other=Implementation(lambda x, w: 3.3 * x * w),
        shape=Implementation(lambda x, w: (3 * x * w)[:2]),
        near=Implementation(lambda x, w: 3.01 * x * w),
    )  # fmt: skip
    found = by_name(record)["other"]["skipped"]
    assert found == "computes something else: its result differs from that of eager by 10.0%"
    assert record["agreement"] == {"worst": 0.0, "with": "eager"}
    assert "computes something else" in by_name(record)["shape"]["skipped"]
    assert set(samples) == {"gptkern", "eager", "near"}, "another precision is no other function"


def test_wrong_at_full_size_alone_is_wrong(measure):
    small = operator(
        gptkern=Implementation(lambda x, w: right(x, w) * (2 if len(x) > 2 else 1)), eager=Implementation(right)
    )
    small.check_cell = lambda whole: cell(whole.direction, rows=2)
    record, _ = measure(module=small)
    assert record["check"]["on"] == "2x4"
    assert "computes something else" in by_name(record)["gptkern"]["skipped"]
    assert by_name(record)["eager"]["wall_s"]


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_a_gradient_wrong_at_full_size_alone_is_wrong(measure, direction):
    def wrong_if_large(x, w):
        return _WrongGradient.apply(x, w, 1.2) if len(x) > 2 else right(x, w)

    small = operator(
        gptkern=Implementation(wrong_if_large),
        eager=Implementation(right),
        peer=Implementation(lambda x, w: _WrongGradient.apply(x, w, 0.5)),
    )
    small.check_cell = lambda whole: cell(whole.direction, rows=2)
    record, _ = measure(direction, module=small)
    assert "its gradient of input 1 differs from that of eager by 20.0%" in by_name(record)["gptkern"]["skipped"]
    assert "its gradient of input 1 differs" in by_name(record)["peer"]["skipped"]
    assert by_name(record)["eager"]["wall_s"] and record["agreement"] is None


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_every_set_has_a_gradient_of_its_own(measure, monkeypatch, direction):
    seen = []
    samplers = runner._samplers

    def spied(function, arguments, *rest):
        seen.extend(id(a) for call in arguments for a in call if isinstance(a, torch.Tensor) and a.shape == (6, 4))
        return samplers(function, arguments, *rest)

    monkeypatch.setattr(runner, "_samplers", spied)
    measure(direction, gptkern=Implementation(right))
    assert len(set(seen)) == len(seen) and len(seen) == 2 * timing.CPU_SETS, "outputs or inputs, and gradients"


def test_failures_and_absences_keep_their_reason(measure, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel image\nand more")

    reason = "failed: RuntimeError: no kernel image"
    record, samples = measure(
        gptkern=Implementation(right), absent=Missing("it is not installed"), broken=Implementation(fails),
        unprepared=Implementation(right, prepare=fails),
    )  # fmt: skip
    assert by_name(record)["absent"] == {"name": "absent", "skipped": "it is not installed"}
    assert by_name(record)["broken"]["skipped"] == by_name(record)["unprepared"]["skipped"] == reason
    assert set(samples) == {"gptkern"}
    record, _ = measure(gptkern=Implementation(fails), eager=Implementation(right))
    assert by_name(record)["gptkern"]["skipped"] == reason and by_name(record)["eager"]["wall_s"]
    monkeypatch.setattr(timing, "in_turn", fails)
    record, samples = measure(gptkern=Implementation(right))
    assert by_name(record)["gptkern"]["skipped"] == f"while sampling, {reason}" and not samples


def test_peers_are_narrowed(measure):
    record, _ = measure(peers=["b"], gptkern=Implementation(right), a=Implementation(right), b=Implementation(right))
    assert list(by_name(record)) == ["gptkern", "b"]


def test_what_is_prepared_is_what_is_called(measure):
    seen = []

    def prepare(x, w):
        seen.append("prepared")
        return x, w, 3.0

    def call(x, w, factor):
        seen.append("called")
        return factor * x * w

    record, _ = measure("both", gptkern=Implementation(call, prepare))
    assert by_name(record)["gptkern"]["wall_s"]
    assert seen.count("prepared") == timing.CPU_SETS + 1, "once for each set and once for the check"


def test_directions_time_what_they_say(measure):
    grad, forwards, modes = [], [], []

    class Spied(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            forwards.append(1)
            ctx.save_for_backward(x, w)
            return 3 * x * w

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            grad.append(1)
            return 3 * dy * w, (3 * dy * x).sum(0)

    def call(x, w):
        modes.append(torch.is_grad_enabled())
        return Spied.apply(x, w)

    counts = {}
    for direction in ("forward", "backward", "both"):
        for rounds in (1, 11):
            grad.clear(), forwards.clear()
            measure(direction, rounds=rounds, gptkern=Implementation(call))
            counts[direction, rounds] = len(forwards), len(grad)
        assert modes[-1] is (direction != "forward"), "only a forward is timed without gradients"
    added = {d: tuple(b - a for a, b in zip(counts[d, 1], counts[d, 11])) for d in ("forward", "backward", "both")}
    assert added == {"forward": (10, 0), "backward": (0, 10), "both": (10, 10)}


def test_cells_are_ordered_by_importance(monkeypatch):
    lists = {"attention": ["a1", "a2", "a3"], "softmax": ["s1"]}
    monkeypatch.setattr(runner, "module", lambda name: types.SimpleNamespace(cells=lambda kind, extent: lists[name]))
    assert runner.cells("cpu", "full", ("attention", "softmax")) == ["a1", "s1", "a2", "a3"]


def test_labels_and_keys():
    causal, full = (
        Cell("attention", "forward", "bfloat16", (("batch", 4), ("head_dim", 64), ("causal", value)), "p", "batch")
        for value in (True, False)
    )
    assert (causal.label, full.label) == ("4x64 causal", "4x64")
    assert len({causal.key, full.key, cell("forward").key, cell("backward").key}) == 4
