"""`gptkern bench` from end to end on tiny cells, and the same cells on pytest-benchmark. Their times mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptkern import cli
from gptkern.measuring import results, runner
from gptkern.measuring.cells import Missing

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    # The bench runs as a user's would: on a CPU nothing is interpreted.
    # Nor is it a worker of the tests' own pytest, where pytest-benchmark would do nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    env |= environment
    # A user's own tables may prefer PyTorch.
    env["GPTKERN_CACHE"] = str(ROOT / "tests" / "no_such_folder")
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def bench(*options):
    return run(sys.executable, "-m", "gptkern", "bench", *options)


def test_smoke_run_resumes_and_reports(tmp_path):
    first = bench("--smoke", "--out", str(tmp_path))
    assert first.returncode == 0, first.stdout + first.stderr
    found = results.load(tmp_path)
    assert {cell["operator"] for cell in found["cells"]} == set(runner.OPERATORS)
    for cell in found["cells"]:
        assert results.ours(cell) and results.best_peer(cell), cell["key"]
        assert cell["check"]["error"] <= cell["check"]["bound"]
        assert cell["implementations"][0]["backend"] == ("torch" if found["machine"]["kind"] == "cpu" else "triton")
    assert found["ceilings"]["copy"]["value"] > 0 and found["costs"]
    before = (tmp_path / "results.json").read_bytes()

    again = bench("--smoke", "--out", str(tmp_path))
    assert again.returncode == 0 and again.stdout.count("there already") == len(found["cells"])
    assert (tmp_path / "results.json").read_bytes() == before, "nothing was measured twice"

    assert found["machine"]["options"] == ["--smoke"]
    report = bench("report", str(tmp_path))
    assert report.returncode == 0, report.stderr
    written = [Path(line) for line in report.stdout.splitlines()]
    assert {path.suffix for path in written} == {".md", ".svg"} and all(path.stat().st_size for path in written)
    assert "gptkern bench --smoke --out" in next(path for path in written if path.suffix == ".md").read_text()


def test_the_same_cells_on_pytest_benchmark(tmp_path):
    files = ["bench/bench_layer_norm.py", "bench/bench_overhead.py"]
    done = run(sys.executable, "-m", "pytest", "--smoke", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_layer_norm[forward-" in done.stdout and "-gptkern]" in done.stdout and "-eager]" in done.stdout


@pytest.fixture
def quick_bench(tmp_path, monkeypatch, capsys):
    """Runs `gptkern bench` in this process on the smoke cells of softmax."""
    monkeypatch.setattr(runner, "ROUNDS", {"smoke": 1, "quick": 1, "full": 1})

    def of(*options):
        status = cli.main(["bench", "--smoke", "--no-costs", "--op", "softmax", "--out", str(tmp_path), *options])
        return status, capsys.readouterr()

    return of


def test_a_wrong_kernel_fails_the_run(quick_bench, monkeypatch, tmp_path):
    softmax = runner.module("softmax")
    whole = softmax.implementations

    def wrong(cell, kind):
        found = whole(cell, kind)
        return found | {
            "gptkern": type(found["gptkern"])(lambda *inputs: whole(cell, kind)["gptkern"].call(*inputs) * 1.01)
        }

    monkeypatch.setattr(softmax, "implementations", wrong)
    status, printed = quick_bench()
    assert status == 1 and "FAILED, wrong: the output's worst error" in printed.out
    assert results.load(tmp_path)["cells"], "what failed is on record too"
    monkeypatch.undo()


def test_peers_are_narrowed_and_the_time_is_kept(quick_bench, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.module("softmax"), "check_cell", lambda cell: cell)
    status, printed = quick_bench("--peers", "quack")
    assert status == 0 and "no peer" in printed.out
    assert all([i["name"] for i in c["implementations"]] == ["gptkern"] for c in results.load(tmp_path)["cells"])
    status, printed = quick_bench("--rounds", "9", "--seconds", "0")
    assert status == 0 and "The time is up" in printed.out


def test_an_absent_peer_keeps_its_reason(quick_bench, tmp_path, monkeypatch):
    softmax = runner.module("softmax")
    whole = softmax.implementations
    monkeypatch.setattr(softmax, "implementations", lambda *a: whole(*a) | {"quack": Missing("it is not installed")})
    assert quick_bench()[0] == 0
    entry = results.load(tmp_path)["cells"][0]["implementations"][-1]
    assert entry == {"name": "quack", "skipped": "it is not installed"}


def test_interrupted_keeps_what_is_done(quick_bench, tmp_path, monkeypatch):
    measure, calls = runner.measure, []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*args)

    monkeypatch.setattr(runner, "measure", interrupted)
    status, printed = quick_bench()
    assert status == 130 and "interrupted" in printed.err
    assert len(results.load(tmp_path)["cells"]) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--op", "convolution"], "--op convolution: there is no such operator; there are attention"),
        (["report"], "needs the folder of a run"),
        (["report", "/absent"], "/absent"),
        (["run", "folder"], "--out FOLDER"),
        (["--smoke", "--peers", "eager,nobody"], "--peers nobody: there is no such peer; there are eager, compile"),
        (["--rounds", "0"], "--rounds 0: it needs at least 1"),
    ],
)
def test_what_cannot_be_run_is_said(options, says, capsys):
    assert cli.main(["bench", *options]) == 2
    assert says in capsys.readouterr().err


def test_a_file_that_is_no_results_file_is_left_alone(tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine")
    assert cli.main(["bench", "--smoke", "--out", str(tmp_path)]) == 2
    assert "Give another --out" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "mine"
