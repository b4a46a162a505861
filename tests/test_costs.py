"""gptkern.measuring.costs: whole records, the right number in the right place, reasons in the place of numbers."""

from __future__ import annotations

import subprocess
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.measuring import costs, timing


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
    """What new processes print, by a word of their program: a number, or a CompletedProcess's stderr as a str."""
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
    return answers


@pytest.fixture
def with_liger(monkeypatch):
    monkeypatch.setattr(costs, "installed", lambda module: True)


@pytest.fixture
def without_liger(monkeypatch):
    found = costs.installed
    monkeypatch.setattr(costs, "installed", lambda module: module != costs.LIGER_MODULE and found(module))


def assert_whole(record: dict) -> None:
    """The record has the form that results files promise."""
    assert set(record) == {"key", "what", "unit", "gptkern", "peers", "limit", "limit_to", "limit_is"}
    assert record["unit"] in ("s", "B")
    assert len(record["what"].split()) >= 4, "no words that a reader understands"
    assert record["peers"]
    for found in (record["gptkern"], *record["peers"].values()):
        if "skipped" in found:
            assert set(found) == {"skipped"} and len(found["skipped"]) > 5
        else:
            assert set(found) == {"median", "low", "high", "n"}
            assert 0 < found["low"] <= found["median"] <= found["high"]
    assert record["limit_is"] == ("ratio" if record["limit_to"] else "value")
    assert record["limit_to"] is None or record["limit_to"] in record["peers"]
    assert record["limit"] is not None or record["limit_to"] is None


# --- Which ------------------------------------------------------------------------------------------------------------


def test_an_unknown_extent():
    with pytest.raises(ValueError, match="extent is 'most'; it needs one of 'smoke', 'quick', 'full'"):
        costs.costs("most")


def test_larger_extents_hold_the_smaller_ones():
    smoke, quick, full = ([key for key, _ in costs.listed(extent)] for extent in costs.EXTENTS)
    assert full[: len(quick)] == quick and quick[: len(smoke)] == smoke
    assert [key for key in full if not key.startswith("host time")] == [
        "import", "first call", "compile, layer_norm", "build", "wheel",
    ]  # fmt: skip
    assert len(set(full)) == len(full)
    for operator in dispatch.OPERATORS:
        assert f"host time, {operator}" in smoke


def test_the_smoke_extent_is_whole():
    records = list(costs.costs("smoke"))
    for record in records:
        assert_whole(record)
    assert [record["key"] for record in records] == [key for key, _ in costs.listed("smoke")]
    limited = {record["key"]: record["limit"] for record in records if record["limit"]}
    assert limited == {f"host time, {name}": 3.0 for name in ("layer_norm", "rms_norm", "softmax", "attention")}


# --- Host time --------------------------------------------------------------------------------------------------------


def test_a_slow_twin_shows_in_its_own_place(monkeypatch, clock):
    monkeypatch.setattr(G, "softmax", clock.taking(3e-3))
    monkeypatch.setattr(F, "softmax", clock.taking(1e-3))
    record = costs.host_time("softmax", rounds=5)
    assert_whole(record)
    assert record["gptkern"] == pytest.approx({"median": 3e-3, "low": 3e-3, "high": 3e-3, "n": 5})
    assert record["peers"]["F.softmax"]["median"] == pytest.approx(1e-3)
    assert (record["limit"], record["limit_to"]) == (3.0, "F.softmax")


def test_calls_have_gradients_on():
    for name, call in costs.CALLS.items():
        for function in call.build():
            assert function().requires_grad, name


def test_the_path_to_the_launch_is_measured_without_the_launch(monkeypatch, clock):
    kernels = pytest.importorskip("gptkern.operators.layer_norm.triton", reason="triton is not installed")
    real = kernels._forward_kernel
    monkeypatch.setattr(kernels, "forward", clock.taking(5e-3, kernels.forward))
    monkeypatch.setattr(F, "layer_norm", clock.taking(1e-3))
    record = costs.kernels_path("layer_norm", rounds=3)
    assert_whole(record)
    assert record["gptkern"]["median"] == pytest.approx(5e-3)
    assert record["peers"]["F.layer_norm"]["median"] == pytest.approx(1e-3)
    # Everything is as it was.
    assert kernels._forward_kernel is real
    assert gptkern.explain(G.layer_norm, torch.ones(2, 4), (4,)).backend == "torch"


@pytest.mark.parametrize("operator", dispatch.OPERATORS)
def test_every_path_ends_at_a_kernel_that_is_not_launched(monkeypatch, operator):
    kernels = pytest.importorskip(f"gptkern.backends.triton.{operator}", reason="triton is not installed")
    launched = []
    monkeypatch.setattr(costs, "_nothing", lambda *arguments, **named: launched.append(arguments))
    ours, _ = costs.CALLS[operator].build()
    with costs.without_launches(kernels), gptkern.backend("triton"):
        assert ours().requires_grad
    assert len(launched) == 1


def test_without_triton_the_path_to_the_launch_is_skipped(monkeypatch):
    def load(name, operator):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch, "load", load)
    record = costs.kernels_path("layer_norm", rounds=2)
    assert_whole(record)
    assert "No module named 'triton'" in record["gptkern"]["skipped"]


# --- New processes ----------------------------------------------------------------------------------------------------


def test_import(processes, with_liger):
    processes |= {"import gptkern": [0.1, 0.3, 0.2], "import liger": [3, 1, 2]}
    record = costs.import_time(3)
    assert_whole(record)
    assert record["gptkern"] == pytest.approx({"median": 0.2, "low": 0.15, "high": 0.25, "n": 3})
    assert record["peers"]["Liger-Kernel"]["median"] == 2
    assert (record["limit"], record["limit_is"]) == (0.3, "value")


def test_first_call(processes, with_liger, monkeypatch):
    processes |= {"torch.compile": [9], "import gptkern": [1], "as L": [7], "(F.layer_norm)": [2]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record = costs.first_call(1)
    assert_whole(record)
    assert record["gptkern"]["median"] == 1
    found = {name: peer["median"] for name, peer in record["peers"].items()}
    assert found == {"F.layer_norm": 2, "torch.compile": 9, "Liger-Kernel": 7}


def test_a_peer_that_needs_a_gpu(processes, with_liger, monkeypatch):
    processes |= {"torch.compile": [9], "import gptkern": [1], "(F.layer_norm)": [2]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert costs.first_call(1)["peers"]["Liger-Kernel"] == {"skipped": "its kernels run on a GPU alone"}


@pytest.mark.parametrize("measure", [costs.import_time, costs.first_call, costs.compile_time])
def test_a_peer_that_is_not_there_is_skipped(processes, without_liger, monkeypatch, measure):
    monkeypatch.setattr(costs, "in_new_processes", lambda program, count: [1.0] * count)
    record = measure(2)
    assert_whole(record)
    assert record["peers"]["Liger-Kernel"] == {"skipped": "liger-kernel is not installed"}


def test_a_peer_that_fails_is_skipped_with_the_last_line_of_its_error(processes, with_liger):
    processes |= {"import gptkern": [0.1], "import liger": "Traceback …\nImportError: libcuda.so\n"}
    record = costs.import_time(1)
    assert_whole(record)
    assert record["peers"]["Liger-Kernel"] == {"skipped": "failed: ImportError: libcuda.so"}


def test_gptkern_that_fails_is_an_error_with_all_it_wrote(processes, with_liger):
    processes |= {"import gptkern": "Traceback …\nSyntaxError: here\n"}
    with pytest.raises(costs.CostError, match=r"(?s)ended with 1:.*Traceback …\nSyntaxError: here"):
        costs.import_time(1)


def test_a_process_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(costs, "PATIENCE", 0.05)
    with pytest.raises(costs.CostError, match=r"did not end within 0\.05 s"):
        costs.in_new_processes("import time\ntime.sleep(60)", 1)


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


def test_the_kernels_are_compiled_and_the_program_is_timed():
    pytest.importorskip("triton", reason="triton is not installed")
    record = costs.compile_time(1)
    assert_whole(record)
    assert record["gptkern"]["median"] > 0 and "skipped" not in record["gptkern"]


# --- Build and wheel --------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A source tree, with things that a build must not see."""
    for name in ("pyproject.toml", "setup.py", "gptkern/__init__.py", "build/old.py", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(costs, "gptkern", types.SimpleNamespace(__file__=str(tmp_path / "gptkern" / "__init__.py")))
    return tmp_path


@pytest.fixture
def pip(monkeypatch, clock):
    """In the place of pip: builds a wheel of 1000 bytes, then 1001, in 4 s; downloads one of 5000, or fails."""
    state = types.SimpleNamespace(builds=0, download=5000)

    def run(command, **options):
        arguments = command[3:]
        assert command[1:3] == ["-m", "pip"]
        if arguments[0] == "wheel":
            assert options["env"]["GPTKERN_CUDA"] == ("1" if torch.cuda.is_available() else "0")
            seen = {path.relative_to(options["cwd"]).as_posix() for path in Path(options["cwd"]).rglob("*")}
            assert seen == {"pyproject.toml", "setup.py", "gptkern", "gptkern/__init__.py"}
            Path(arguments[arguments.index("--wheel-dir") + 1], "a.whl").write_bytes(bytes(1000 + state.builds))
            state.builds += 1
            clock.now += 4.0
        elif state.download is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING\nERROR: no such host\n")
        else:
            Path(arguments[arguments.index("--dest") + 1], "b.whl").write_bytes(bytes(state.download))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return state


def test_build_and_wheel(source, pip):
    build = costs.Build(2)
    build.count = 2  # with a GPU it is one
    seconds, size = build.time(), build.size()
    for record in (seconds, size):
        assert_whole(record)
    assert seconds["gptkern"] == {"median": 4.0, "low": 4.0, "high": 4.0, "n": 2}
    assert (size["gptkern"]["median"], size["unit"]) == (1000.5, "B")
    assert size["peers"] == {"Liger-Kernel": {"median": 5000, "low": 5000, "high": 5000, "n": 1}}
    assert pip.builds == 2, "both records are of the same builds"


def test_without_the_source_tree_nothing_is_built(source, pip):
    (source / "setup.py").unlink()
    build = costs.Build(2)
    for record in (build.time(), build.size()):
        assert_whole(record)
        assert "the source tree is not here" in record["gptkern"]["skipped"]
    assert pip.builds == 0


def test_a_wheel_that_cannot_be_downloaded(source, pip, monkeypatch):
    pip.download = None

    def nowhere(name):
        raise costs.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(costs.importlib.metadata, "distribution", nowhere)
    record = costs.Build(1).size()
    assert_whole(record)
    assert record["peers"]["Liger-Kernel"]["skipped"].endswith("pip download failed: ERROR: no such host")
    # Installed, its files are counted instead, under another name.
    files = [types.SimpleNamespace(size=size) for size in (10, None, 5)]
    monkeypatch.setattr(costs.importlib.metadata, "distribution", lambda name: types.SimpleNamespace(files=files))
    assert costs.Build(1).size()["peers"] == {"Liger-Kernel, unpacked": {"median": 15, "low": 15, "high": 15, "n": 1}}
