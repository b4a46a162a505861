"""gptkern.measuring.costs: whole records, the right number in the right place, reasons in the place of numbers."""

from __future__ import annotations

import importlib.util
import subprocess
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gptkern
import gptkern.functional as G
from gptkern import operators
from gptkern.backends import dispatch
from gptkern.measuring import costs, machine, timing

FUNCTIONS_OF_PYTORCH = ("attention", "layer_norm", "rms_norm", "softmax")


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


@pytest.fixture
def processes(monkeypatch):
    """What new processes print, by a word of their program: numbers, or a CompletedProcess's stderr as a str."""
    answers = {}

    def run(command, **options):
        assert "TRITON_INTERPRET" not in options["env"]
        word = next((word for word in answers if word in command[-1]), None)
        assert word is not None, f"nobody expected {command[-1]}"
        answer = answers[word]
        if isinstance(answer, str):
            return subprocess.CompletedProcess(command, 1, "", answer)
        return subprocess.CompletedProcess(command, 0, f"a warning\n{answer.pop(0)}\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return answers


def assert_whole(record: dict) -> None:
    """The record has the form that results files promise."""
    assert set(record) == {"key", "what", "unit", "gptkern", "peers", "limit", "limit_to"}
    for found in (record["gptkern"], *record["peers"].values()):
        assert "skipped" in found or 0 < found["low"] <= found["median"] <= found["high"]
    assert record["limit_to"] is None or (record["limit_to"] in record["peers"] and record["limit"])


# --- Which ------------------------------------------------------------------------------------------------------------


def test_larger_extents_hold_the_smaller_ones():
    smoke, quick, full = ([key for key, _ in costs.listed(extent)] for extent in costs.EFFORTS)
    assert full[: len(quick)] == quick and quick[: len(smoke)] == smoke and len(set(full)) == len(full)
    assert full[len(smoke) :] == ["host time, swapped step", "import", "first call", "build", "wheel"]


def test_the_smoke_extent_is_whole():
    records = [measure() for _, measure in costs.listed("smoke")]
    for record in records:
        assert_whole(record)
        assert "skipped" not in record["gptkern"] or importlib.util.find_spec("triton") is None
    assert [record["key"] for record in records] == [key for key, _ in costs.listed("smoke")]
    limited = {record["key"]: record["limit"] for record in records if record["limit"]}
    assert limited == {f"host time, {name}": costs.HOST_LIMIT for name in FUNCTIONS_OF_PYTORCH}


# --- Host time --------------------------------------------------------------------------------------------------------


def test_a_slow_twin_shows_in_its_own_place(monkeypatch, clock):
    monkeypatch.setattr(costs, "calls", lambda cell: (clock.taking(3e-3), clock.taking(1e-3), "eager"))
    record = costs.host_time("softmax", rounds=5)
    assert_whole(record)
    assert record["gptkern"] == pytest.approx({"median": 3e-3, "low": 3e-3, "high": 3e-3, "n": 5})
    assert record["peers"][record["limit_to"]]["median"] == pytest.approx(1e-3)


@pytest.mark.parametrize("operator", FUNCTIONS_OF_PYTORCH)
def test_calls_have_gradients_on(operator):
    ours, theirs, _ = costs.calls(costs.smallest(operator))
    assert ours().requires_grad and theirs().requires_grad


def test_the_path_to_the_launch_is_measured_without_the_launch(monkeypatch, clock):
    kernels = pytest.importorskip("gptkern.operators.layer_norm.triton", reason="triton is not installed")
    real = kernels._forward_kernel
    monkeypatch.setattr(kernels, "forward", clock.taking(5e-3, kernels.forward))
    monkeypatch.setattr(F, "layer_norm", clock.taking(1e-3))
    record = costs.kernels_path("layer_norm", "triton", rounds=3)
    assert_whole(record)
    assert record["gptkern"]["median"] == pytest.approx(5e-3)
    assert record["peers"]["eager"]["median"] == pytest.approx(1e-3)
    # Everything is as it was.
    assert kernels._forward_kernel is real
    if not torch.cuda.is_available():
        assert gptkern.explain(G.layer_norm, torch.ones(2, 4), (4,)).backend == "torch"


@pytest.mark.parametrize(
    "operator", [key.partition(", ")[2] for key, _ in costs.listed("smoke") if "launch" not in key]
)
def test_every_path_ends_at_a_kernel_that_is_not_launched(monkeypatch, operator):
    assert operator in operators.NAMES
    pytest.importorskip("triton", reason="triton is not installed")
    launched = []
    monkeypatch.setattr(costs, "_nothing", lambda *arguments, **named: launched.append(arguments))
    ours, *_ = costs.calls(costs.smallest(operator))
    with costs._without_launches(dispatch.load("triton", operator)), gptkern.backend("triton"):
        ours()
    assert len(launched) == 1


def test_without_triton_the_path_to_the_launch_is_skipped(monkeypatch):
    def load(name, operator):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch, "load", load)
    record = costs.kernels_path("layer_norm", "triton", rounds=2)
    assert_whole(record)
    assert "No module named 'triton'" in record["gptkern"]["skipped"]


def test_a_swapped_step_is_held_against_stock(monkeypatch, clock):
    clock.process_time = clock.perf_counter
    swap = gptkern.swap

    def slower(model):
        swap(model)
        monkeypatch.setattr(model, "forward", clock.taking(3e-3, model.forward))

    monkeypatch.setattr(gptkern, "swap", slower)
    monkeypatch.setattr(costs.GPT, "forward", clock.taking(1e-3, costs.GPT.forward))
    record = costs.swapped_step(2)
    assert_whole(record)
    assert (record["gptkern"]["median"], record["peers"]["stock"]["median"]) == pytest.approx((4e-3, 1e-3))
    assert record["peers"]["stock again"] == record["peers"]["stock"] and record["limit"] == 1.05


# --- New processes ----------------------------------------------------------------------------------------------------


def test_import(processes):
    processes |= {"import gptkern": [0.1, 0.3, 0.2], "import liger": [3, 1, 2]}
    record = costs.import_time(3)
    assert_whole(record)
    assert record["gptkern"] == pytest.approx({"median": 0.2, "low": 0.15, "high": 0.25, "n": 3})
    assert record["peers"]["Liger-Kernel"]["median"] == 2
    assert (record["limit"], record["limit_to"]) == (0.3, None)


def test_first_call(processes, monkeypatch):
    processes |= {"torch.compile": [9], "import gptkern": [1], "import liger": [7], "(F.layer_norm)": [2]}
    monkeypatch.setattr(machine, "kind", lambda: "cuda")
    record = costs.first_call(1)
    assert_whole(record)
    assert record["gptkern"]["median"] == 1
    found = {name: peer["median"] for name, peer in record["peers"].items()}
    assert found == {"F.layer_norm": 2, "torch.compile": 9, "Liger-Kernel": 7}


def test_a_peer_that_fails_or_is_not_there_is_skipped_with_the_reason(processes, monkeypatch):
    processes |= {"import gptkern": [0.1, 0.1], "import liger": "Traceback …\nImportError: libcuda.so\n"}
    assert costs.import_time(1)["peers"] == {"Liger-Kernel": {"skipped": "failed: ImportError: libcuda.so"}}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert costs.import_time(1)["peers"] == {"Liger-Kernel": {"skipped": "liger_kernel is not installed"}}


def test_gptkern_that_fails_is_an_error_with_all_it_wrote(processes):
    processes |= {"import gptkern": "Traceback …\nSyntaxError: here\n", "import liger": [1]}
    with pytest.raises(costs.CostError, match=r"(?s)ended with 1:.*Traceback …\nSyntaxError: here"):
        costs.import_time(1)


def test_a_process_that_does_not_end_is_an_error():
    with pytest.raises(costs.CostError, match=r"did not end within 0\.05 s"):
        costs._run([costs.sys.executable, "-c", "import time\ntime.sleep(60)"], 0.05)


def test_a_real_process_is_clean_and_has_gptkern(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = """
import importlib.util, os, pathlib
folder = pathlib.Path(importlib.util.find_spec("gptkern").origin).parents[1]
assert folder == pathlib.Path(FOLDER), folder
assert "TRITON_INTERPRET" not in os.environ
assert not os.path.exists(os.environ["TRITON_CACHE_DIR"])
print("noise")
print(0.5)
""".replace("FOLDER", repr(str(Path(gptkern.__file__).parents[1])))
    assert costs.in_new_processes(program, 1) == [0.5]


# --- Build and wheel --------------------------------------------------------------------------------------------------


def test_build_and_wheel(tmp_path, monkeypatch, clock):
    for name in ("pyproject.toml", "setup.py", "gptkern/__init__.py", "build/old.py", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(costs, "gptkern", types.SimpleNamespace(__file__=str(tmp_path / "gptkern" / "__init__.py")))
    builds = []

    def pip(command, **options):
        *_, folder, source = command
        builds.append(options["env"]["GPTKERN_CUDA"])
        seen = {path.relative_to(source).as_posix() for path in Path(source).rglob("*")}
        assert seen == {"pyproject.toml", "setup.py", "gptkern", "gptkern/__init__.py"}
        Path(folder, "a.whl").write_bytes(bytes(1000))
        clock.now += 4.0
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    records = [measure() for key, measure in costs.listed("full") if key in ("build", "wheel")]
    for record in records:
        assert_whole(record)
    assert [(r["gptkern"]["median"], r["unit"]) for r in records] == [(4.0, "s"), (1000, "B")]
    assert builds == ["1" if torch.cuda.is_available() else "0"], "both records are of the same build"
    (tmp_path / "setup.py").unlink()
    assert "the source tree is not here" in costs.build_time(costs.build())["gptkern"]["skipped"]
