"""docs/recipe.md: what it says of the keys is so, and what it tells people to type does what it says."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptkern import cli
from gptkern.training import recipe_files, run_folder
from gptkern.training.search.space import Space

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import recipe_keys  # noqa: E402

PAGE = recipe_keys.PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_of_keys_is_that_of_the_code():
    assert recipe_keys.written(PAGE) == PAGE, "run `make docs`"


def test_the_files_of_a_run_are_named():
    names = {run_folder.RECIPE, run_folder.METRICS, run_folder.REPORT, run_folder.TOKENIZER, run_folder.LOCK}
    for name in names | {f"{run_folder.TENSORBOARD}/", f"{run_folder.CHECKPOINTS}/step-00000500/"}:
        assert f"| `{name}` |" in PAGE


def test_the_recipe_is_one(tmp_path):
    block, _ = blocks("toml")
    (tmp_path / "my.toml").write_text(block)
    assert recipe_files.completed(recipe_files.read(tmp_path / "my.toml"))["accumulate"] == 4


def test_the_space_is_what_its_options_say(tmp_path):
    _, block = blocks("toml")
    (tmp_path / "space.toml").write_text(block)
    options = re.findall(r"--vary (\S+)$", block, re.MULTILINE)
    assert Space.parsed(options) == Space.read(tmp_path / "space.toml") and len(options) == 4


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks("python"):
            exec(compile(block, "recipe.md", "exec"), {})
    assert "step-00000020" in printed.getvalue()


def test_every_command_is_one_that_there_is():
    lines = [line for language in ("sh", "text") for block in blocks(language) for line in block.splitlines()]
    lines += re.findall(r"`(gptkern [^`\n]+ [^`\n]+)`", PAGE)
    commands = [re.sub(r"^timeout -s KILL \d+ ", "", line) for line in lines]
    commands = [shlex.split(line)[1:] for line in commands if line.startswith("gptkern ")]
    assert len(commands) > 8
    for command, *arguments in commands:
        assert command in cli.COMMANDS
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"gptkern.commands.{command}").add_arguments(parser)
        parser.parse_args(arguments)


@pytest.mark.deep
@pytest.mark.timeout(900)
def test_the_walk_word_by_word(tmp_path):
    """Each line in a shell: killed trainings end with 137, or are done already on a fast machine; the rest with 0."""
    walk, tuning = (block.splitlines() for block in blocks("sh"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment = {name: each for name, each in environment.items() if "TRITON" not in name and "GPTKERN" not in name}
    # Beside another test the two threads of so small a model wait for each other longer than they compute.
    environment["OMP_NUM_THREADS"] = "1"
    printed = []
    for line in walk + tuning:
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
        # The shell becomes the command where it is one, and its status that of the signal.
        assert done.returncode in ((0, 137, -9) if "timeout" in line else (0,)), f"{line}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 2001))
    assert lines[-1]["validation_loss"] < 0.75 * lines[0]["untrained_validation_loss"]
    text = printed[len(walk) - 1]
    assert text.startswith("The ") and len(text) > 200
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Finished: 2,000 updates." in page and "nats per token" in page
    # The labels: most of them found, where a third are of the most frequent one; and one said by itself.
    assert float(re.search(r"accuracy +([\d.]+)", printed[-2])[1]) > 0.6
    assert re.search(r"lowercase\. (comparisons|debugger|string-methods|types)\n", printed[-1])
