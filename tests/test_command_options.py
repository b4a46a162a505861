"""Options that make no sense: refused before any work, with status 2 and one line that names the option."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from gptkern import cli
from gptkern.commands import checkpoints, stages
from gptkern.formatting import cut, shown
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import devices, recipe_files, values
from gptkern.training.data import text
from gptkern.training.data.tokenizers import bytes_tokenizer

TINY = GPTConfig(vocab_size=256, context=16, layers=1, width=32, heads=2)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(*arguments): the one line that a command ends with before it has begun, and wrote nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 50)

    def run(*arguments):
        before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert cli.main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert (
            printed.out == "" and printed.err.count("\n") == 1 and printed.err.startswith(f"gptkern {arguments[0]}: ")
        )
        assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return printed.err.partition(": ")[2]

    return run


NUMBERS = {
    ("train", "--lr"): ("nan", "inf", "-1", "0", "1e400", "abc", ""),
    ("train", "--dropout"): ("nan", "-0.1", "1", "inf", "x"),
    ("train", "--steps"): ("0", "-1", "1.5", "nan", 10**23, "", "9" * 5000),
    ("train", "--batch"): ("0", "1e3"),
    ("train", "--context"): ("-1", "0x10"),
    ("train", "--seed"): (10**23, 2**64, -(2**63) - 1, "1.0", "abc"),
    ("demo", "--lr"): ("0", "nan"),
    ("demo", "--seconds"): ("0", "nan", "-1", "inf", "1e23"),
    ("demo", "--check-seconds"): ("-1", "nan", "1e23"),
    ("demo", "--sample-bytes"): ("0", "x"),
    ("generate", "--tokens"): ("-1", "nan", 10**23),
    ("generate", "--temperature"): ("nan", "-1", "inf", "warm"),
    ("generate", "--top-k"): ("0", "-1", "1.5"),
    ("check", "--seconds"): ("nan", "-1", "inf", "soon"),
    ("bench", "--seconds"): ("nan", "-1"),
    ("bench", "--rounds"): ("0", "2.5", 10**23),
    ("tune", "--seconds"): ("nan", "-1"),
    ("tune", "--architecture"): ("75", "nan", 10**23),
}


def test_a_long_value_is_repeated_by_both_of_its_ends():
    assert cut("a" * 80) == "a" * 80 and cut("a" * 50 + "b" * 50) == "a" * 39 + "…" + "b" * 40
    assert shown("/" + "x" * 200 + "/my file.txt").endswith("xxx/my file.txt'")


@pytest.mark.parametrize(
    "command, option, value",
    [(*key, value) for key, values in NUMBERS.items() for value in values],
    ids=lambda value: str(value)[:12],
)
def test_numbers(refused, command, option, value):
    folder = ["anywhere"] if command == "generate" else []
    line = refused(command, *folder, option, value)
    assert line.startswith(f"{option} is {shown(str(value))}; ") and "it needs a" in line


@pytest.mark.parametrize("key", recipe_files.KEYS.values(), ids=lambda key: key.name)
def test_every_key_of_a_recipe(refused, tmp_path, key):
    """As an option and in a file; tests/test_recipe_files.py has more of each kind."""
    if isinstance(key.kind, values.Switch):
        assert f"{key.option}" in refused("train", f"{key.option}=nonsense")
    elif isinstance(key.kind, values.Text):
        assert refused("train", f"{key.option}=").startswith(key.option)
    else:
        assert refused("train", key.option, "nonsense").startswith(key.option)
    (tmp_path / "my.toml").write_text(f"{key.name} = [1]\n")
    assert f"--recipe my.toml: {key.name} is a list; it needs " in refused("train", "--recipe", "my.toml")


@pytest.mark.parametrize("name", ["meta", "mps", "cuda:7", "gpu", "", "cpu:3", "mkldnn", "cuda:99999999999", "a\nb"])
@pytest.mark.parametrize("command", ["train", "demo", "generate"])
def test_devices(refused, command, name):
    if name == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has such a GPU")
    line = refused(command, *(["anywhere"] if command == "generate" else []), "--device", name)
    assert line.startswith("--device ") and "it needs auto, cpu, cuda or cuda:N" in line and len(line) < 150


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "my.txt"], "unrecognized argument my.txt; did you mean --text my.txt?"),
        (["generate", "anywhere", "Hello\nyou"], r"did you mean --prompt Hello\nyou?"),
        (["check", "softmax"], "did you mean --op softmax?"),
        (["generate", "anywhere", "hello world"], "did you mean --prompt 'hello world'?"),
        (["train", "my text.txt"], "did you mean --text 'my text.txt'?"),
        (["generate", "anywhere", "it's"], """did you mean --prompt 'it'"'"'s'?"""),
        (["info", "--jsn"], "did you mean --json?"),
        (["train", "--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["train", "--save_every", "3"], "did you mean --save-every?"),
        (["train", "--recipe", "none.toml"], "--recipe none.toml: No such file or directory; it needs a TOML file"),
        (["train", "--recipe", ""], "--recipe is empty; it needs a TOML file"),
        (["train", "--resume"], "--out out/train holds no run that --resume could go on with"),
        (["train", "--resume", "--overwrite"], "--overwrite has no effect on --resume"),
        (["train", "--data", "none"], "--data none: there is no such folder"),
        (["train", "--data", "text.txt"], "--data text.txt: it is a file; it needs a folder"),
        (["train", "--data", "."], "--data .: it has no manifest.json"),
        (["train", "--text", "text.txt", "--data", "."], "--text and --data: a training has one of them"),
        (["train", "--context", "4000", "--text", "text.txt"], "each needs at least 4001"),
        (["train", "--accumulate", "3"], "--accumulate is 3; it needs to divide batch, 8"),
        (["check", "--op", "convolution"], "--op convolution: there is no such operator"),
        (["check", "--require-gpu", "--interpret"], "--interpret runs kernels on the CPU"),
        (["bench", "--op", ""], "--op '': there is no such name"),
        (["bench", "--peers", "eager,,x"], "--peers '': there is no such name"),
        (["bench", "report"], "bench report needs the folder"),
        (["bench", "report", "anywhere", "--quick"], "--quick is of a run"),
        (["bench", "--costs-only", "--op", "softmax"], "--op is of kernels, of which --costs-only measures none"),
        (["bench", "--costs-only", "--peers", "eager"], "--peers is of kernels"),
        (["bench", "--costs-only", "--rounds", "3"], "--rounds is of kernels"),
        (["tune", "--op", "x"], "--op is x; it needs one of attention"),
        (["tune", "--show", "--seconds", "5"], "--seconds has no effect on --show"),
        (["tune", "--architecture", "90"], "--architecture needs --dry-run or --show"),
        (["tune", "--reset", "--op", "softmax"], "--op has no effect on --reset"),
        (["generate", "anywhere", "--prompt", "\ud800"], "--prompt '\\ud800': it needs to be text"),
        (["generate", "anywhere", "--top-k", "0"], "the number of tokens of the model, or more, leaves none out"),
    ],
)
def test_words(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize("command", ["train", "demo", "bench"])
def test_out_is_tried_before_anything_else(refused, tmp_path, monkeypatch, command):
    os.symlink("text.txt", tmp_path / "link")
    os.symlink("nowhere", tmp_path / "dangling")
    # Whatever else is wrong, this is said first; and PyTorch is not asked for anything.
    for module in (devices, stages):
        monkeypatch.setattr(module, "resolve_device", lambda name: pytest.fail("the device was looked for"))
    for out in ("text.txt", "text.txt/below", "link", "dangling", "/dev/full", "x" * 300, "", "/proc/nothing", "a\0b"):
        line = refused(command, "--out", out)
        assert line.startswith("--out ") and "it needs a folder that can be written" in line, out


def test_check_tries_its_file_first(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    for path in ("folder", "text.txt/below", "nowhere/x.json", "x" * 300, "", "/proc/nothing"):
        line = refused("check", "--op", "softmax", "--json", path)
        assert line.startswith("--json ") and "it needs a file that can be written" in line, path


@pytest.mark.parametrize("command", ["train", "demo"])
def test_texts(refused, tmp_path, command):
    (tmp_path / "empty").touch()
    reasons = {
        ".": "Is a directory",
        "empty": "0 bytes",
        "none": "No such file",
        "text.txt/x": "Not a directory",
        "/dev/zero": "it is a device",
        "": "is empty",
        "x" * 300: "too long",
        "a\0b": "null",
    }
    for path, why in reasons.items():
        line = refused(command, "--text", path)
        assert line.startswith("--text ") and why in line, path


@pytest.mark.parametrize("command", ["train", "demo"])
@pytest.mark.parametrize(
    "sizes", [("--preset", "gpt3-175B"), ("--batch", 10**15), ("--preset", "gpt3-175B", "--batch", 1, "--context", 16)]
)
def test_what_does_not_fit_into_memory_is_said_before_it_is_allocated(refused, monkeypatch, command, sizes):
    monkeypatch.setattr(GPT, "__init__", lambda *_: pytest.fail("a model was made"))
    line = refused(command, "--device", "cpu", *sizes)
    for words in ("of memory on cpu and there are", "parameters", "gradients", "AdamW", "activations"):
        assert words in line


@pytest.mark.parametrize("cells, machine", [([1], {"device": "x"}), ([], {}), ([{}], {"device": "x"})])
def test_results_that_no_bench_wrote(refused, tmp_path, cells, machine):
    content = {"format": 1, "machine": machine, "ceilings": {}, "cells": cells, "costs": []}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert "results.json is not as `gptkern bench` writes it" in refused("bench", "report", ".")


@pytest.mark.parametrize("part", ["machine", "ceilings", "cells", "costs"])
def test_a_part_that_results_have_not_is_named(refused, tmp_path, part):
    content = {"format": 1, "machine": {}, "ceilings": {}, "cells": [], "costs": []}
    del content[part]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert f"it needs 1, with machine, ceilings, cells, costs; it has no {part}\n" in refused("bench", "report", ".")


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000])
def test_results_that_are_nested_too_deeply_are_one_line(refused, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    line = refused("bench", "report", ".")
    assert "results.json: " in line and "it needs to be a file that `gptkern bench` wrote" in line and len(line) < 250


@pytest.mark.parametrize("command", [["generate"], ["bench", "report"]])
@pytest.mark.parametrize("name", ["", "x" * 300, "below/" * 2000, "a\0b"])
def test_a_folder_that_can_have_no_such_name(refused, command, name):
    line = refused(*command, name)
    assert line.startswith("FOLDER ") and "; it needs a folder that `gptkern " in line and len(line) < 230


# --- Folders of checkpoints -------------------------------------------------------------------------------------------


def test_what_is_beside_a_checkpoint_is_told_from_one(refused, tmp_path):
    checkpoints.save(GPT(TINY), tmp_path / "demo" / "checkpoint")
    assert "did you mean demo/checkpoint?" in refused("generate", "demo")
    assert "did you mean demo/checkpoint?" in refused("generate", "demo/checkpoint/config.json")
    broken = GPT(TINY)
    broken.blocks[0].perceptron.expand.bias.data[3] = torch.nan
    checkpoints.save(broken, tmp_path / "broken")
    assert "NaN or an infinity in blocks.0.perceptron.expand.bias" in refused("generate", "broken")
    checkpoints.save(GPT(GPTConfig(100, 16, 1, 32, 2)), tmp_path / "small")
    assert "a model of 100 tokens; it needs one of 256" in refused("generate", "small")


# --- The environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        *(("GPTKERN_EMULATE_CUDA", value) for value in ("yes", "2")),
        ("TRITON_INTERPRET", "true"),
        *(("GPTKERN_CACHE", value) for value in ("text.txt", "text.txt/below", "x" * 300)),
        *(("GPTKERN_EMULATE_CUDA_SEED", value) for value in ("-1", "one", "9" * 30)),
    ],
)
@pytest.mark.parametrize("command", ["info", "check"])
def test_variables_that_mean_nothing(refused, monkeypatch, command, name, value):
    monkeypatch.setenv(name, value)
    assert refused(command).startswith(f"{name} is {cut(value)!r}; it needs ")


@pytest.mark.parametrize("name", ["foo", "torch:", " torch", "Triton"])
def test_a_backend_that_there_is_not(refused, monkeypatch, name):
    monkeypatch.setenv("GPTKERN_BACKEND", name)
    assert refused("info").startswith(f"GPTKERN_BACKEND got {name!r}; it needs one of 'cuda', 'triton', 'torch'")


@pytest.mark.parametrize("started", [["gptkern"], ["/usr/bin/gptkern", "info"], ["gptkern.exe"], ["-m", "info"]])
def test_the_command_line_knows_itself(monkeypatch, started):
    """It says itself that GPTKERN_BACKEND means nothing; an import of gptkern raises."""
    import gptkern

    monkeypatch.setattr(sys, "argv", started)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "gptkern", *started[1:]])
    assert gptkern._is_command_line()
    monkeypatch.setattr(sys, "argv", ["-m" if started[0] == "-m" else "/usr/bin/pytest", *started[1:]])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", *started[1:]])
    assert not gptkern._is_command_line()


def test_a_file_name_that_is_no_text(tmp_path):
    assert text.printable("a\udcffb") == "a?b"
    # Bytes of the command line that are no text are the bytes that they were.
    assert bytes_tokenizer(False).encode("é\udcff").tolist() == [0xC3, 0xA9, 0xFF]
