"""The demo and the commands beside it: text, training, checkpoints, the report, and what makes the demo fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from gptkern import cli
from gptkern.commands import UserError, checkpoints, kernel_check
from gptkern.commands.demo_report import render
from gptkern.commands.findings import Curve, Findings, Int8
from gptkern.commands.observing import SwappedModules
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.data import text
from gptkern.training.loop import Trainer, new_model
from gptkern.training.recipe import Recipe

SIZES = ["--preset", "nano", "--context", "16", "--batch", "2", "--device", "cpu"]
TINY = GPTConfig(vocab_size=256, context=16, layers=1, width=32, heads=2)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A kernel runs on the device; an operator is what it computes.\n" * 40)
    return str(path)


RECIPE = Recipe(steps=6, batch=2, length=16, lr=1e-2)


# --- text -------------------------------------------------------------------------------------------------------------


def test_the_default_text_repeats_no_long_paragraph():
    paragraphs = [" ".join(p.split()) for p in text.default_text().split("\n\n")]
    long = [p for p in paragraphs if len(p) >= text.REPEATED_PARAGRAPH_CHARACTERS]
    assert len(long) > 1000
    assert len(long) == len(set(long))


def test_split_holds_out_a_tenth_and_loses_nothing():
    data = bytes(range(256)) * 400
    train, validation = text.split(data)
    assert len(train) + len(validation) == len(data)
    assert len(validation) / len(data) == pytest.approx(0.1, abs=0.05)
    # the tenth block, byte for byte
    start = 9 * text.BLOCK_BYTES
    assert bytes(validation[: text.BLOCK_BYTES].tolist()) == data[start : start + text.BLOCK_BYTES]


def test_a_text_that_is_missing_or_too_short(tmp_path, capsys):
    assert cli.main(["train", "--text", str(tmp_path / "none.txt")]) == 2
    assert "No such file" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UserError, match="9 bytes"):
        text.load(str(short), shortest=17)


# --- training ---------------------------------------------------------------------------------------------------------


def test_one_recipe_gives_one_training(text_file):
    data = text.text_store(text.load(text_file, shortest=17))
    runs = []
    for _ in range(2):
        torch.rand(3)  # the seed is the recipe's, not the process's
        trainer = Trainer(new_model(TINY, RECIPE.seed), data, RECIPE)
        trainer.run(6)
        runs.append(trainer.losses)
    assert runs[0] == runs[1] and len(runs[0]) == 6
    assert runs[0][-1] < runs[0][0]


# --- checkpoints, train, generate -------------------------------------------------------------------------------------


def test_train_then_generate(text_file, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert cli.main(["train", "--text", text_file, "--out", folder, "--steps", "4", *SIZES]) == 0
    assert "modules replaced" in capsys.readouterr().out
    assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "step-00000004"
    outputs = []
    for extra in ([], ["--stock"], ["--int8"]):
        options = ["--tokens", "12", "--prompt", "A ker", "--seed", "3", "--device", "cpu", *extra]
        assert cli.main(["generate", folder, *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert all(output.startswith("A ker") for output in outputs)


def test_a_checkpoint_keeps_every_parameter(tmp_path):
    model = GPT(TINY)
    checkpoints.save(model, tmp_path)
    loaded = checkpoints.load(tmp_path, torch.device("cpu"))
    assert loaded.config == TINY and loaded.lm_head.weight is loaded.token_embedding.weight
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"config\.json and model\.safetensors not found"):
        checkpoints.load(tmp_path, torch.device("cpu"))
    checkpoints.save(GPT(TINY), tmp_path)
    (tmp_path / "config.json").write_text('{"model": {"width": 3}}')
    with pytest.raises(UserError, match="no checkpoint of this GPT"):
        checkpoints.load(tmp_path, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["train", "--device", "cuda:99"], "--device cuda:99"),
        (["train", "--device", "abacus"], "--device abacus"),
        (["train", "--dropout", "1.5", "--device", "cpu"], "dropout is 1.5"),
        (["generate", "nowhere"], "nowhere is no checkpoint"),
        (["generate", "nowhere", "--prompt", ""], "--prompt is empty"),
    ],
)
def test_user_errors(options, message, capsys):
    assert cli.main(options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# --- the kernels' check -----------------------------------------------------------------------------------------------


def _result(**changes) -> dict:
    result = dict(operator="softmax", direction="forward", backend="triton", dtype="float32", shape_class="",
                  shape="2x3", ok=True, error=1e-7, bound=2e-7, note="", seconds=0.1)  # fmt: skip
    return {**result, **changes}


def test_check_results_are_summed_up():
    rows, failures = kernel_check.summarised(
        [
            _result(),
            _result(direction="grad input", ok=False, error=5e-7),
            _result(direction="all", ok=None, error=None, bound=None, note="left out"),
            _result(direction="all", ok=False, error=None, bound=None, note="ValueError: broken"),
            _result(dtype="float16", error=0.0, bound=0.0),
        ]
    )
    first, second = rows
    assert (first.passed, first.failed, first.left_out) == (1, 2, 1)
    assert first.worst == pytest.approx(2.5)
    assert (second.dtype, second.passed, second.worst) == ("float16", 1, 0.0)
    assert len(failures) == 2 and "ValueError: broken" in failures[1] and "grad input" in failures[0]


@pytest.mark.deep
def test_check_runs_in_a_process_and_ends_in_time():
    start = time.monotonic()
    # No time at all: one case may begin, the others are left out.
    result = kernel_check.check("cpu", seconds=0.0)
    assert result.interpreted and result.left_out > 0
    assert time.monotonic() - start < kernel_check.START_SECONDS + kernel_check.GRACE_SECONDS + 30


def test_a_check_that_breaks_is_a_failure(monkeypatch):
    monkeypatch.setattr(kernel_check, "_PROGRAM", "raise SystemExit('no kernels here')")
    result = kernel_check.check("cpu", seconds=1.0)
    assert result.failures == ["the check ended with status 1: no kernels here"]


def test_a_check_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(kernel_check, "_PROGRAM", "import time; print('{}', flush=True); time.sleep(600)")
    monkeypatch.setattr(kernel_check, "GRACE_SECONDS", 0.2)
    result = kernel_check.check("cpu", seconds=0.1)
    assert "before it was done" in result.note and result.seconds < 30


# --- the verdict and the report ---------------------------------------------------------------------------------------


@pytest.fixture
def findings() -> Findings:
    curve = Curve([3.0, 2.5, 2.0], [(3, 2.1)], 1000.0)
    return Findings(
        text="a <text>", text_bytes=(900, 100), model="GPT", parameters=1234, device="CPU", steps=3, tokens_per_step=32,
        swapped_modules=[SwappedModules("blocks.*.norm", 2, "LayerNorm", "gptkern.nn.LayerNorm", "layer_norm",
                                        "triton", "the input is on cuda")],
        stock=curve, swapped=dataclasses.replace(curve, losses=[3.0, 2.5, 2.001], tokens_per_second=1500.0),
        int8=Int8(16, 2.105, 2.1, 4000, 1000, 5000, 2000),
        environment=[("gptkern", "0")],
    )  # fmt: skip


def test_all_is_well(findings):
    assert findings.problems() == [] and findings.exit_status(130) == 0
    assert findings.largest_difference == pytest.approx(0.001)
    page = render(findings)
    assert "All is well" in page and "1.50 times the stock" in page and "a &lt;text&gt;" in page


def test_a_difference_beyond_the_bound_fails(findings):
    findings.swapped.losses[1] += 0.06
    assert findings.exit_status(130) == 1
    assert "differ by 0.06" in findings.problems()[0]
    assert "Something is wrong" in render(findings)
    findings.dtype = "bfloat16"  # which rounds more coarsely
    assert findings.exit_status(130) == 0


def test_a_validation_loss_beyond_the_bound_fails(findings):
    findings.swapped.validations = [(3, 2.2)]
    assert findings.exit_status(130) == 1


def test_nan_fails(findings):
    findings.swapped.losses[1] = math.nan
    assert findings.exit_status(130) == 1
    findings.swapped.losses[1] = 2.5
    findings.int8.loss = math.nan
    assert findings.exit_status(130) == 1


@pytest.mark.parametrize("change", [0.03, -0.03])
def test_int8_beyond_the_bound_fails(findings, change):
    findings.int8.loss = findings.int8.full_loss + change
    assert findings.exit_status(130) == 1
    assert "int8" in findings.problems()[0]


def test_a_failed_kernel_fails_the_demo(findings):
    rows, failures = kernel_check.summarised([_result(ok=False)])
    findings.kernel_check = kernel_check.KernelCheck(rows, failures, "on the GPU", False, 1.0)
    assert findings.exit_status(130) == 1
    assert "softmax triton float32" in render(findings)


def test_an_empty_report_renders():
    page = render(Findings(interrupted="during: start"))
    assert "Nothing was trained" in page and "Interrupted" in page


# --- the demo ---------------------------------------------------------------------------------------------------------


def _demo(text_file, out, *extra) -> list[str]:
    sizes = [*SIZES, "--sample-bytes", "8", "--check-seconds", "0"]
    return ["demo", "--text", text_file, "--out", str(out), *sizes, *extra]


def test_demo_from_end_to_end(text_file, tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(_demo(text_file, out, "--steps", "8")) == 0
    terminal = capsys.readouterr().out
    assert "step 8/8" in terminal and "\x1b" not in terminal
    results = json.loads((out / "results.json").read_text())
    assert len(results["stock"]["losses"]) == len(results["swapped"]["losses"]) == 8
    # on a CPU both run PyTorch's own operators
    assert results["stock"]["losses"] == results["swapped"]["losses"]
    assert results["int8"]["layers"] == 16
    assert results["int8"]["linear_bytes"] / results["int8"]["linear_bytes_int8"] > 3.5
    rows = [(row["names"], row["count"], row["operator"], row["backend"]) for row in results["swapped_modules"]]
    assert sorted(rows) == sorted([
        ("(model)", 1, "cross_entropy, residual_norm", "torch"),
        # of the last block the sum is the model's norm's; sums are computed in the norms' calls
        ("blocks.*", 3, "residual_norm", "-"), ("blocks.*", 1, "residual_norm", "-"),
        ("blocks.*.attention_norm", 4, "layer_norm", "torch"), ("blocks.*.attention", 4, "attention", "torch"),
        ("blocks.*.perceptron_norm", 4, "layer_norm", "torch"),
        ("blocks.*.perceptron.activation", 4, "nonlinearity", "torch"), ("final_norm", 1, "layer_norm", "torch"),
    ])  # fmt: skip
    reasons = {row["reason"] for row in results["swapped_modules"] if row["backend"] == "-"}
    assert reasons == {"see its norms"}
    page = (out / "report.html").read_text()
    assert "No kernels ran in the swapped model here" in page
    assert page.count("<svg") == 1
    # nothing is loaded from anywhere
    training = (out / "training.html").read_text()
    for content in (page, training):
        assert "http" not in content and not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", content)
    assert '<a href="training.html">' in page and "training.html" in terminal
    assert "Finished: 8 of 8 updates" in training and f"{results['swapped']['validations'][-1][1]:.4f}" in training
    assert cli.main(["generate", str(out / "checkpoint"), "--tokens", "4", "--device", "cpu"]) == 0


def test_demo_fails_where_the_swapped_model_learns_something_else(text_file, tmp_path, monkeypatch, capsys):
    import gptkern.nn

    def wrong(self, input):
        return torch.nn.LayerNorm.forward(self, input) * 1.5

    monkeypatch.setattr(gptkern.nn.LayerNorm, "forward", wrong)
    assert cli.main(_demo(text_file, tmp_path / "demo", "--steps", "4")) == 1
    assert "stock and swapped differ" in capsys.readouterr().out


@pytest.mark.deep
def test_demo_picks_its_steps_by_the_clock(text_file, tmp_path, capsys):
    assert cli.main(_demo(text_file, tmp_path / "demo", "--seconds", "1.5")) == 0
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["steps"] >= 1
    assert len(results["stock"]["losses"]) == len(results["swapped"]["losses"]) <= results["steps"]


@pytest.mark.deep
@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process on Windows")
def test_ctrl_c_ends_the_demo_with_a_report(text_file, tmp_path):
    out = tmp_path / "demo"
    process = subprocess.Popen(
        [sys.executable, "-m", "gptkern", *_demo(text_file, out, "--steps", "1000000")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # as a shell starts what runs in the background: with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    output += process.stdout.readlines()
    assert process.wait(timeout=120) == 130, "".join(output)
    assert "Traceback" not in "".join(output)
    assert "Interrupted" in (out / "report.html").read_text()
    results = json.loads((out / "results.json").read_text())
    assert results["interrupted"] == "during: training, stock and swapped in turn"
    assert abs(len(results["stock"]["losses"]) - len(results["swapped"]["losses"])) <= 10
