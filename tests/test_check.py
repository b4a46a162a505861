"""measuring/checking.py and `gptkern check`: what passes, what fails, what is left out, and what is said about it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sharp import sharp

from gptkern import cli, operators
from gptkern.backends import dispatch
from gptkern.commands import PARTIAL, check, interrupts
from gptkern.measuring import checking
from gptkern.measuring.checking import LAUNCHERS, cases_of


@pytest.mark.parametrize("operator", operators.NAMES)
def test_every_operator_has_cases_of_every_dtype(operator):
    for size in checking.SIZES:
        cases = cases_of(operator, (size,))
        assert {case.dtype for case in cases} >= {torch.float32, torch.float16, torch.bfloat16}
        assert len({(case.shape_class, case.dtype) for case in cases}) == len(cases)


@pytest.mark.parametrize("operator", operators.NAMES)
def test_the_launchers_in_plain_pytorch_pass(operator):
    results = list(checking.run([operator], device="cpu", backends=[LAUNCHERS], sizes=["small"]))
    assert results and not [result for result in results if not result.ok]
    directions = {result.direction for result in results}
    tensors = {
        f"grad {name}"
        for case in cases_of(operator)
        for name in operators.problem(operator).inputs(case.sizes, case.dtype, torch.Generator()).tensors
    }
    assert "forward" in directions
    # Whatever the room differentiates has a gradient that was compared; int8 values and an optimizer's have none.
    assert operator in ("quantize_int8", "adamw") or directions >= tensors


def languages(operator):
    """The kernel backends that a room has."""
    room = Path(importlib.import_module(f"gptkern.operators.{operator}").__file__).parent
    return [name for name in ("triton", "cuda") if (room / f"{name}.py").is_file()]


@pytest.mark.parametrize("operator", sharp(operators.NAMES, *(name for name in operators.NAMES if "norm" not in name)))
def test_the_kernels_pass(operator, device, kernel_backend):
    results = list(
        checking.run([operator], device=device, backends=[kernel_backend], sizes=["small"], dtypes=[torch.bfloat16])
    )
    if kernel_backend not in languages(operator):
        assert {result.ok for result in results} == {None} and all("ModuleNotFound" in one.note for one in results)
        return
    # The cuda backend leaves some calls to Triton's kernels, and says so.
    left = {result.shape_class for result in results if result.ok is None and "not covered" in result.note}
    of_triton = {
        "attention": {"key padding", "additive mask", "more keys than queries, additive mask", "lower right"},
        "cross_entropy": {"positions", "probabilities"},
    }
    assert left == (of_triton.get(operator, set()) if kernel_backend == "cuda" else set())
    assert results and not [result for result in results if not result.ok and result.shape_class not in left]
    assert {result.backend for result in results} == {kernel_backend}


def test_a_variant_is_checked_where_an_operator_has_it(monkeypatch):
    checked = []
    monkeypatch.setattr(
        checking, "check", lambda case, backend, device, seed: checked.append(case.operator) or iter(())
    )
    list(checking.run(device="cpu", backends=["torch:cudnn"]))
    assert set(checked) == {name for name in operators.NAMES if "torch:cudnn" in dispatch.orders.names(name)} != set()


def _launcher(direction: str):
    return importlib.import_module("gptkern.operators.softmax.contract"), direction


def _only(results):
    return {result.direction: result for result in results}


@pytest.fixture
def case():
    return cases_of("softmax", ("small",))[0]


@pytest.mark.parametrize(
    "direction, result_name", [("forward", "forward"), ("backward", "grad input")], ids=["forward", "backward"]
)
@pytest.mark.parametrize("wrong", [lambda y: y * 1.01, lambda y: y * torch.nan, lambda y: y + torch.inf])
def test_a_wrong_result_fails(monkeypatch, case, direction, result_name, wrong):
    module, name = _launcher(direction)
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *call: wrong(right(*call)))
    results = _only(checking.check(case, LAUNCHERS, torch.device("cpu")))
    assert results[result_name].ok is False
    assert results[result_name].error > results[result_name].bound
    if direction == "backward":
        assert results["forward"].ok


def test_an_exception_fails_with_its_text(monkeypatch, case):
    def raises(*call):
        raise RuntimeError("the tile has no rows")

    monkeypatch.setattr(*_launcher("forward"), raises)
    (result,) = checking.check(case, LAUNCHERS, torch.device("cpu"))
    assert result.ok is False and "RuntimeError: the tile has no rows" in result.note


def test_a_case_that_is_not_covered_is_no_failure(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (result,) = checking.check(case, "triton", torch.device("cpu"))
    assert result.ok is None and "not covered" in result.note and "TRITON_INTERPRET" in result.note


def test_no_new_case_after_the_seconds():
    results = list(checking.run(["softmax"], device="cpu", backends=[LAUNCHERS], seconds=-1))
    assert len(results) == len(cases_of("softmax", ("small",)))
    assert all(result.ok is None and "left out" in result.note for result in results)


def test_cases_of_the_operators_take_turns():
    results = checking.run(["softmax", "layer_norm"], device="cpu", backends=[LAUNCHERS], seconds=-1)
    assert [next(results).operator for _ in range(4)] == ["softmax", "layer_norm"] * 2


@pytest.mark.parametrize("name", ["operators", "backends", "sizes"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"{name} has 'none such'; it takes"):
        next(checking.run(**{name: ["none such"]}))


def test_the_callers_settings_do_not_count_and_stay(case):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            results = list(checking.check(cases_of("attention", ("small",))[0], LAUNCHERS, torch.device("cpu")))
        assert all(result.ok for result in results)
        assert len(results) > 1, "the gradients were not looked at"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a machine with no GPU where nothing is interpreted or emulated."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("GPTKERN_EMULATE_CUDA", raising=False)
    monkeypatch.setattr(checking, "default_device", lambda: "cpu")


def test_command_without_gpu_says_so_and_passes(without_kernels, capsys):
    assert cli.main(["check", "--op", "softmax"]) == 0
    output = capsys.readouterr().out
    assert "There is no GPU here" in output and "--interpret" in output
    assert LAUNCHERS in output and "0 failed" in output
    first, *_, last = output.splitlines()
    assert first.startswith("Checking plain PyTorch on the CPU, no kernel.")
    assert last.endswith(" cases not run: plain PyTorch on the CPU, no kernel")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_command_that_requires_a_gpu_fails_without_one(capsys, monkeypatch):
    monkeypatch.setattr(checking, "run", lambda *_, **__: pytest.fail("it checked"))
    assert cli.main(["check", "--require-gpu"]) == 2
    assert capsys.readouterr().err == "gptkern check: --require-gpu: PyTorch sees no GPU here\n"


def test_command_that_requires_a_gpu_fails_where_no_kernel_runs_on_it(capsys, monkeypatch):
    monkeypatch.setattr(checking, "default_device", lambda: "cuda")
    monkeypatch.setattr(dispatch, "unavailable", lambda name, device: f"there is no {name}")
    assert cli.main(["check", "--require-gpu"]) == 2
    error = capsys.readouterr().err
    assert "--require-gpu: no kernel can run on this GPU; " in error and "there is no triton" in error


@pytest.mark.parametrize("switch, words", [("TRITON_INTERPRET", "triton (interpreted)"), (None, "plain PyTorch")])
def test_first_and_last_line_say_what_ran(without_kernels, capsys, monkeypatch, switch, words):
    if switch is not None:
        monkeypatch.setenv(switch, "1")
    assert cli.main(["check", "--op", "quantize_int8", "--seconds", "0"]) == PARTIAL
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Checking {words} on the CPU, no kernel") and f"{words} on the CPU, no kernel" in last


def test_command_reports_failures(without_kernels, capsys, monkeypatch, tmp_path):
    module, name = _launcher("forward")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *call: right(*call) * 1.01)
    report = tmp_path / "report.json"
    assert cli.main(["check", "--op", "softmax", "--json", str(report)]) == 1
    output = capsys.readouterr().out
    assert "FAILED softmax forward on torch:launchers, float32, tail (7x33): worst error" in output
    assert output.splitlines()[-1].endswith("plain PyTorch on the CPU, no kernel")
    results = json.loads(report.read_text())["results"]
    assert set(results[0]) == {field.name for field in dataclasses.fields(checking.Result)}
    assert any(result["ok"] is False for result in results)


def test_command_that_had_time_for_nothing_is_partial(without_kernels, capsys):
    assert cli.main(["check", "--op", "softmax", "--seconds", "0"]) == PARTIAL
    output = capsys.readouterr().out
    assert "Nothing was compared." in output and "left out" in output


@pytest.mark.parametrize("wrong, status", [(False, 3), (True, 1)], ids=["right", "wrong"])
def test_command_that_leaves_cases_out_says_partial(without_kernels, capsys, monkeypatch, tmp_path, wrong, status):
    module, name = _launcher("forward")
    forward, now = getattr(module, name), [0.0]

    def one_second(*call):
        now[0] += 1.0
        return forward(*call) * (1.01 if wrong else 1)

    monkeypatch.setattr(checking.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module, name, one_second)
    report, cases = tmp_path / "report.json", len(cases_of("softmax", ("small",)))
    command = ["check", "--op", "softmax", "--json", str(report)]
    assert cli.main([*command, "--seconds", "2.5"]) == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"partial, {cases - 3} cases left out for want of time: ")
    written = json.loads(report.read_text())
    assert written["partial"] is True and [each["left_out"] for each in written["results"]].count(True) == cases - 3
    # A case that no kernel covers, or a whole run, is not partial.
    assert cli.main([*command, "--seconds", "1e6"]) == int(wrong)
    assert "partial" not in capsys.readouterr().out and json.loads(report.read_text())["partial"] is False


def test_command_shows_every_comparison_when_asked(without_kernels, capsys):
    assert cli.main(["check", "--op", "quantize_int8", "--all"]) == 0
    output = capsys.readouterr().out
    assert output.count(LAUNCHERS) == 2 * len(cases_of("quantize_int8", ("small",)))  # q and scale of each


def test_an_operator_that_is_given_twice_is_checked_once(without_kernels, capsys):
    last = set()
    for names in (["softmax"], ["softmax"] * 2):
        assert cli.main(["check", *(word for name in names for word in ("--op", name))]) == 0
        last.add(capsys.readouterr().out.splitlines()[-1])
    assert len(last) == 1


def test_command_rejects_an_unknown_operator(capsys):
    assert cli.main(["check", "--op", "convolution"]) == 2
    assert "--op convolution" in capsys.readouterr().err


def test_command_prints_plain_text_without_rich(without_kernels, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["check", "--op", "quantize_int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(line for line in lines if line.startswith("operator"))
    row = next(line for line in lines if line.startswith("quantize_int8"))
    assert row.index(LAUNCHERS) == heading.index("backend")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_command_that_is_interrupted_shows_what_it_has_compared(without_kernels, capsys, monkeypatch, tmp_path, number):
    run = checking.run

    def interrupted(*arguments, **options):
        for index, result in enumerate(run(*arguments, **options)):
            if index == 3:
                signal.raise_signal(getattr(signal, number))
            yield result

    monkeypatch.setattr(checking, "run", interrupted)
    report = tmp_path / "report.json"
    report.write_text("of a whole run")
    assert cli.main(["check", "--op", "softmax", "--json", str(report)]) == 130
    printed = capsys.readouterr()
    assert "3 passed, 0 failed" in printed.out.splitlines()[-1]
    assert printed.err == "gptkern check: interrupted\n" and report.read_text() == "of a whole run"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_command_refuses_a_forced_backend_that_cannot_run(without_kernels, capsys, monkeypatch, backend):
    monkeypatch.setenv("GPTKERN_BACKEND", backend)
    assert cli.main(["check", "--op", "softmax"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"gptkern check: GPTKERN_BACKEND is {backend}: the input is on the CPU and ")
    assert printed.out == "" and printed.err.count("\n") == 1


def test_command_checks_the_forced_backend_alone(without_kernels, capsys, monkeypatch):
    monkeypatch.setattr(checking, "available", lambda device: ("triton", "cuda", "torch:cudnn"))
    asked = []
    monkeypatch.setattr(checking, "run", lambda *_, backends, **__: asked.append(backends) or iter(()))
    for forced in ("cuda", "torch:cudnn", "torch"):
        monkeypatch.setenv("GPTKERN_BACKEND", forced)
        cli.main(["check"])
    assert asked == [("cuda",), ("torch:cudnn",), ("torch:cudnn",)]


@pytest.mark.deep
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("whom", ["the process", "its group"])
def test_command_that_interprets_says_once_that_it_was_interrupted(whom):
    switches = ("TRITON_INTERPRET", "GPTKERN_EMULATE_CUDA")
    process = subprocess.Popen(
        [sys.executable, "-m", "gptkern", "check", "--interpret"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={name: value for name, value in os.environ.items() if name not in switches},
    )  # fmt: skip
    assert process.stdout.readline().startswith("Checking triton (interpreted)")
    time.sleep(1)
    (os.kill if whom == "the process" else os.killpg)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "gptkern check: interrupted\n"
    assert " passed, 0 failed, " in out.splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_command_interprets_in_a_process_of_its_own(tmp_path):
    report = tmp_path / "report.json"
    switches = ("TRITON_INTERPRET", "GPTKERN_EMULATE_CUDA")
    environment = {name: value for name, value in os.environ.items() if name not in switches}
    done = subprocess.run(
        [sys.executable, "-m", "gptkern", "check", "--interpret", "--op", "quantize_int8", "--json", str(report)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())["results"]
    assert {result["backend"] for result in results} == {"triton"}
    assert all(result["ok"] for result in results)


def test_process_that_a_signal_ended_was_interrupted():
    assert check._in_a_process([sys.executable, "-c", "raise KeyboardInterrupt"]) == 130
    assert check._in_a_process([sys.executable, "-c", "raise SystemExit(2)"]) == 2


def test_interruption_that_python_drops_comes_again(monkeypatch):
    class Interrupting:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))
    with interrupts.interruptible() as raise_if_dropped:
        raise_if_dropped()
        Interrupting()
        assert dropped == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            raise_if_dropped()
