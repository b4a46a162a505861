"""What the commands print: text as it is drawn, and output that no terminal's encoding ends."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch
from command_runs import TINY, train
from rich.console import Console

from gptkern import cli
from gptkern.commands import checkpoints, display
from gptkern.models import gpt
from gptkern.models.gpt import GPT
from gptkern.training.run import Progress

# --- Generation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(folder):
    torch.manual_seed(0)
    checkpoints.save(GPT(TINY), folder / "run")
    return "run"


def generated(*arguments: str) -> int:
    return cli.main(["generate", "run", "--device", "cpu", *arguments])


@torch.no_grad()
def test_a_stream_is_what_generate_returns_and_its_errors_come_at_once():
    model = GPT(TINY)
    ids = torch.randint(256, (2, 11))
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    stream = model.stream(ids, 9, 0.8, 20, seeded())
    tokens = [next(stream), next(stream)]
    assert not model.training
    tokens += stream
    assert model.training and {token.shape for token in tokens} == {(2, 1)}
    assert torch.equal(torch.cat([ids, *tokens], 1), model.generate(ids, 9, 0.8, 20, seeded()))
    stream = model.stream(ids, 9)
    next(stream)
    stream.close()
    assert model.training
    for wrong in ({"temperature": torch.nan}, {"temperature": torch.inf}, {"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match=f"generate: {next(iter(wrong))} is"):
            model.stream(ids, 1, **wrong)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-40, 1.2e-38, 1e-30, 1e-7])
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_small_temperature_takes_the_likeliest(temperature, top_k):
    logits = 1e4 * torch.randn(64, 256)
    assert torch.equal(gpt._draw(logits, temperature, top_k, None), logits.argmax(-1, keepdim=True))


def test_a_temperature_that_is_small_still_draws():
    """Of logits as close as the temperature."""
    logits = torch.tensor([[0.0, 1e-9, -1.0]]).repeat(4000, 1)
    share = (gpt._draw(logits, 1e-9, None, torch.Generator().manual_seed(0)) == 1).float().mean().item()
    assert share == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)


def test_text_is_printed_as_it_is_drawn_and_kept_at_ctrl_c(checkpoint, capsys, monkeypatch):
    seen = []
    stream = GPT.stream

    def interrupted(self, *given):
        for token in stream(self, *given):
            yield token
            seen.append(capsys.readouterr().out)
            if len(seen) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(GPT, "stream", interrupted)
    # The first of the three bytes of a character alone is not printed yet.
    assert generated("--prompt", "aé", "--tokens", "100000", "--temperature", "0") == 130
    printed = capsys.readouterr()
    assert len(seen) == 3 and seen[0].startswith("aé")
    assert printed.out.endswith("\n") and "[3 tokens of 100000, interrupted in " in printed.err


def test_a_pipe_has_each_byte_before_the_next_is_drawn(checkpoint, monkeypatch):
    pipe = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(pipe, encoding="utf-8"))
    seen = []

    def stream(self, *_):
        for byte in b"xyz":
            seen.append(pipe.getvalue())
            yield torch.tensor([[byte]])

    monkeypatch.setattr(GPT, "stream", stream)
    assert generated("--prompt", "a", "--tokens", "3") == 0
    assert seen == [b"a", b"ax", b"axy"]


def test_what_is_printed_is_the_text_whatever_its_bytes(checkpoint, capsys, monkeypatch):
    data = "A … é".encode() + b"\xff\xe2\x80"
    monkeypatch.setattr(GPT, "stream", lambda self, *_: (torch.tensor([[byte]]) for byte in data))
    assert generated("--prompt", "\udce2\udc82", "--tokens", "9") == 0
    assert capsys.readouterr().out == (b"\xe2\x82" + data).decode(errors="replace") + "\n"


# --- Output -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stdout(monkeypatch):
    """stdout(encoding): a pipe of that encoding in place of standard output; what it got, decoded."""

    def install(encoding: str):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        monkeypatch.setattr(sys, "stdout", stream)

        def read() -> str:
            stream.flush()
            assert stream.errors == "strict", "the stream is as it was"
            return stream.buffer.getvalue().decode(encoding)

        return read

    return install


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_has_something_for_every_character(checkpoint, stdout, encoding):
    read = stdout(encoding)
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as exit:
            cli.main([command, "--help"])
        assert exit.value.code == 0
    assert train("--out", "ré[sumé]\udcff…") == 0
    assert generated("--prompt", "aé€\udcff", "--tokens", "8") == 0
    assert cli.main(["info"]) == 0
    printed = read()
    # A path that no encoding has is shown all the same, its brackets included.
    path = "ré[sumé]\udcff…".encode(encoding, errors="backslashreplace").decode(encoding)
    assert f"(gptkern generate {path})" in printed
    assert ("aé€" in printed) == (encoding in ("cp1252", "utf-8"))


@pytest.mark.parametrize("columns", ["0", "²"])
def test_a_width_that_is_none(folder, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert train("--out", "run") == 0
    assert "(gptkern generate run)" in capsys.readouterr().out


def test_without_standard_output_the_work_is_done(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert train("--out", "run") == 0 and (folder / "run" / "report.html").exists()
    assert generated("--tokens", "2") == 0 and cli.main(["info"]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_standard_output_is_one_line(folder, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "gptkern info: No space left on device\n"


@pytest.mark.parametrize(
    "arguments, status", [(["--help"], 0), pytest.param(["info"], 2, marks=pytest.mark.deep)], ids=["help", "info"]
)
def test_a_wrong_backend_in_the_environment_is_no_traceback(arguments, status):
    done = subprocess.run(
        [sys.executable, "-m", "gptkern", *arguments],
        capture_output=True, text=True, env={**os.environ, "GPTKERN_BACKEND": "foo"},
    )  # fmt: skip
    assert done.returncode == status
    if status == 0:
        assert done.stdout.startswith("usage: gptkern") and done.stderr == ""
        return
    assert done.stderr.startswith("gptkern info: GPTKERN_BACKEND got 'foo'; it needs one of 'cuda', 'triton', 'torch'")
    assert done.stderr.count("\n") == 1


# --- A run's display --------------------------------------------------------------------------------------------------


def progress(step: int, **changes) -> Progress:
    figures = {"loss": 2.5, "grad_norm": 0.75, "lr": 1e-3, "validation": 3.25, "tokens_per_second": 12345.6}
    figures |= {"share": 0.314, "seconds_left": 3725.0, "saved": 40}
    return Progress(step, 100, **figures | changes)


def displayed(terminal: bool, *seen: Progress) -> str:
    written = io.StringIO()
    with display.RunDisplay(Console(file=written, force_terminal=terminal, width=120, highlight=False)) as shown:
        for each in seen:
            shown.update(each)
    return written.getvalue()


def test_a_run_in_a_log_has_a_line_now_and_then(monkeypatch):
    nothing = {"loss": None, "grad_norm": None, "lr": None, "share": None, "seconds_left": None, "saved": None}
    printed = displayed(False, progress(0, tokens_per_second=0.0, **nothing), progress(50), progress(60)).splitlines()
    assert printed == [
        "step 0/100: loss –, validation 3.2500, gradient norm –, learning rate –, tokens/s –, checkpoint –",
        "step 60/100: loss 2.5000, validation 3.2500, gradient norm 0.75, learning rate 0.001, tokens/s 12,346, "
        "of the peak 31%, checkpoint 40, 1:02:05 left",
    ]
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.0)
    assert len(displayed(False, progress(50), progress(60), progress(60)).splitlines()) == 2


def test_a_run_in_a_terminal_is_live():
    printed = displayed(True, progress(50), progress(60))
    for words in ("60/100", "1:02:05 left", "gradient norm", "31%", "12,346"):
        assert words in printed
    assert displayed(True) == displayed(False) == ""
