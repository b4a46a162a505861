"""`gptkern bench` from end to end on tiny cells, and the same cells on pytest-benchmark. Their times mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptkern import cli, operators
from gptkern.measuring import contention, costs, rates, results, runner

ROOT = Path(__file__).parents[1]


def run(*command):
    # The bench runs as a user's would: on a CPU nothing is interpreted or emulated, and a user's own tables may prefer
    # PyTorch. Nor is it a worker of the tests' own pytest, where pytest-benchmark would do nothing.
    not_a_users = ("TRITON_INTERPRET", "GPTKERN_EMULATE_CUDA", "PYTEST_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(not_a_users)}
    env |= {"GPTKERN_CACHE": str(ROOT / "tests" / "no_such_folder"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=ROOT, env=env)


def test_smoke_run_resumes_and_reports(tmp_path):
    command = ["gptkern", "bench", "--smoke", "--out", str(tmp_path)]
    first = run(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    found = results.load(tmp_path)
    assert {cell["operator"] for cell in found["cells"]} == set(runner.OPERATORS)
    for cell in found["cells"]:
        assert rates.ours(cell) and rates.best_peer(cell), cell["key"]
        assert cell["check"]["error"] <= cell["check"]["bound"]
        assert (cell["implementations"][0]["backend"] == "torch") is (found["machine"]["kind"] == "cpu")
    assert found["ceilings"]["copy"]["value"] > 0 and found["costs"] and found["machine"]["options"] == ["--smoke"]
    before = (tmp_path / "results.json").read_bytes()

    again = run(*command)
    assert again.returncode == 0 and again.stdout.count("there already") == len(found["cells"])
    assert (tmp_path / "results.json").read_bytes() == before, "nothing was measured twice"

    report = run("gptkern", "bench", "report", str(tmp_path))
    assert report.returncode == 0, report.stderr
    written = [Path(line) for line in report.stdout.splitlines()]
    assert {path.suffix for path in written} == {".md", ".svg"} and all(path.stat().st_size for path in written)


def test_the_same_cells_on_pytest_benchmark():
    done = run("pytest", "bench", "--smoke", "-v", "-p", "no:cacheprovider", "-k", "layer_norm")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("gptkern", "eager"):
        assert f"test_cell[layer_norm-forward-16x64-float32-{name}] PASSED" in done.stdout or "cuda" in done.stdout


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs `gptkern bench` in this process on the smoke cells of softmax."""
    monkeypatch.setattr(runner, "ROUNDS", {"smoke": 1, "quick": 1, "full": 1})

    def of(*options):
        status = cli.main(["bench", "--smoke", "--no-costs", "--op", "softmax", "--out", str(tmp_path), *options])
        return status, capsys.readouterr()

    return of


def test_a_wrong_kernel_fails_the_run(bench, monkeypatch, tmp_path):
    softmax = operators.contract("softmax")
    right = softmax.TWIN
    monkeypatch.setattr(softmax, "TWIN", lambda *given, **named: right(*given, **named) * 1.01)
    status, printed = bench()
    assert status == 1 and "FAILED, wrong: forward's worst error" in printed.out
    assert results.load(tmp_path)["cells"], "what failed is on record too"


def test_the_time_is_kept(bench):
    status, printed = bench("--rounds", "9", "--seconds", "0")
    last = printed.out.splitlines()[-1]
    assert status == 3 and last.startswith("partial, the time is up: ") and "nothing of softmax" in last


def test_a_failure_counts_for_more_than_what_is_left(bench, monkeypatch):
    from gptkern.commands import bench as command

    for each in ([0, 1, 3], [0, 3, 1], [3, 0, 1]):
        monkeypatch.setattr(command, "_records", lambda *_, each=each: iter([("a line", status) for status in each]))
        assert bench()[0] == 1
    monkeypatch.setattr(command, "_records", lambda *_: iter([("a line", 0), ("left", 3), ("a line", 0)]))
    assert bench()[0] == 3


def test_what_a_time_is_worth_stands_beside_it(bench, tmp_path, monkeypatch):
    measure = runner.measure

    def doubtful(*args):
        record, samples = measure(*args)
        rates.ours(record).update(noisy="others had the processor", host_bound=True)
        return record, samples

    monkeypatch.setattr(runner, "measure", doubtful)
    monkeypatch.setattr(contention, "busy", lambda shares: "others had it for 50% of the time")
    monkeypatch.setattr(costs, "listed", lambda extent: [("a cost", lambda: costs.record("a cost", "", numbers))])
    numbers = costs.numbers([1e-3])
    status, printed = bench()
    (first,) = (line for line in printed.out.splitlines() if line.startswith("[1/"))
    assert "; noisy: others had the processor; host-bound: the host queues it" in first and status == 0
    assert "NOISY: softmax forward" in printed.out and "HOST-BOUND: softmax forward" in printed.out
    assert "(the times are noisy)" in printed.out
    # What is no kernel too; the command for it names no operator.
    assert cli.main(["bench", "--smoke", "--costs-only", "--out", str(tmp_path)]) == 0
    assert results.load(tmp_path)["costs"][0]["noisy"] == "others had it for 50% of the time"


def test_interrupted_keeps_what_is_done(bench, tmp_path, monkeypatch):
    measure, calls = runner.measure, []

    def interrupted(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return measure(*args)

    monkeypatch.setattr(runner, "measure", interrupted)
    assert bench()[0] == 130
    assert len(results.load(tmp_path)["cells"]) == 1
