"""gptkern.measuring.costs: whole records, the right number in the right place, reasons in the place of numbers."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess

import pytest
import torch
import torch.nn.functional as F

import gptkern
from gptkern.backends import dispatch
from gptkern.measuring import costs, runner, timing

FUNCTIONS_OF_PYTORCH = ["attention", "cross_entropy", "layer_norm", "nonlinearity", "rms_norm", "softmax"]
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # from 2.13 on
    FUNCTIONS_OF_PYTORCH.append("linear_cross_entropy")


class Clock:
    """In the place of the time module: a clock that stands still but for what the functions under it take."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float, function=lambda *arguments, **named: None):
        def call(*arguments, **named):
            self.now += seconds
            return function(*arguments, **named)

        return call


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(costs, "time", clock)
    return clock


def test_the_extents_and_what_the_smallest_measures():
    smoke, quick, full = (costs.listed(extent) for extent in costs.EFFORTS)
    assert [key for key, _ in full] == [key for key, _ in quick] and len(dict(full)) == len(full)
    assert [key for key, _ in full[len(smoke) :]] == ["host time, swapped step", "import"]
    records = [measure() for _, measure in smoke]
    assert [record["key"] for record in records] == [key for key, _ in smoke]
    for record in records:
        assert record["gptkern"].get("n") or importlib.util.find_spec("triton") is None
        assert record["limit_to"] is None or (record["limit_to"] in record["peers"] and record["limit"])
    limited = {record["key"]: record["limit"] for record in records if record["limit"]}
    assert limited == {f"host time, {name}": costs.HOST_LIMIT for name in FUNCTIONS_OF_PYTORCH}


def test_the_path_to_the_launch_is_measured_without_the_launch(monkeypatch, clock):
    kernels = pytest.importorskip("gptkern.operators.layer_norm.triton", reason="triton is not installed")
    real = kernels._forward_kernel
    monkeypatch.setattr(kernels, "forward", clock.taking(5e-3, kernels.forward))
    monkeypatch.setattr(F, "layer_norm", clock.taking(1e-3))
    record = costs.kernels_path("layer_norm", "triton", rounds=3)
    assert record["gptkern"]["median"] == pytest.approx(5e-3)
    assert record["peers"]["eager"]["median"] == pytest.approx(1e-3)
    assert kernels._forward_kernel is real, "everything is as it was"
    monkeypatch.setattr(dispatch, "load", lambda *_: importlib.import_module("no_triton"))
    assert "No module named 'no_triton'" in costs.kernels_path("layer_norm", "triton", 2)["gptkern"]["skipped"]


@pytest.mark.parametrize("operator", [name for name in runner.OPERATORS if name != "model"])
def test_every_path_ends_at_a_kernel_that_is_not_launched(monkeypatch, operator):
    pytest.importorskip("triton", reason="triton is not installed")
    launched = []
    monkeypatch.setattr(costs, "_nothing", lambda *arguments, **named: launched.append(arguments))
    ours, theirs, _ = costs.calls(costs.smallest(operator))
    for result in map(runner._output, (ours(), theirs())):
        assert result.requires_grad is result.is_floating_point(), "gradients are on; int8 has none"
    with costs._without_launches(dispatch.load("triton", operator)), gptkern.backend("triton"):
        ours()
    # The loss sums its rows with a kernel of its own.
    assert len(launched) == (2 if operator == "cross_entropy" else 1)


def test_a_swapped_step_is_held_against_stock(monkeypatch, clock):
    clock.process_time = clock.perf_counter
    swap = gptkern.swap

    def slower(model, **options):
        swap(model)
        monkeypatch.setattr(model, "forward", clock.taking(3e-3, model.forward))

    monkeypatch.setattr(gptkern, "swap", slower)
    monkeypatch.setattr(costs.GPT, "forward", clock.taking(1e-3, costs.GPT.forward))
    record = costs.swapped_step(2)
    assert (record["gptkern"]["median"], record["peers"]["stock"]["median"]) == pytest.approx((4e-3, 1e-3))
    assert record["peers"]["stock again"] == record["peers"]["stock"] and record["limit"] == 1.05


def test_import_is_timed_in_new_processes(monkeypatch):
    answers = {"import gptkern": ["0.1", "0.3", "0.2"], "import liger": []}

    def run(command, **options):
        answer = next(answers[word] for word in answers if word in command[-1])
        if not answer:
            return subprocess.CompletedProcess(command, 1, "", "Traceback …\nImportError: libcuda.so\n")
        return subprocess.CompletedProcess(command, 0, f"a warning\n{answer.pop(0)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    record = costs.import_time(3)
    assert record["gptkern"] == pytest.approx({"median": 0.2, "low": 0.15, "high": 0.25, "n": 3})
    assert (record["limit"], record["limit_to"]) == (0.3, None)
    assert record["peers"] == {"Liger-Kernel": {"skipped": "failed: ImportError: libcuda.so"}}
    with pytest.raises(costs.CostError, match=r"(?s)ended with 1:.*Traceback"):
        costs.import_time(1)


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(costs, "PATIENCE", 0.05)
    with pytest.raises(costs.CostError, match=r"did not end within 0\.05 s"):
        costs._seconds("import time\ntime.sleep(60)")
