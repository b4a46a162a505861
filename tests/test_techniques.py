"""docs/techniques.md: each command, option, function and test that it names is there, and what is planned is not."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

from gptkern import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "techniques.md").read_text(encoding="utf-8")
COUNT = 33
COLUMNS = ("number", "article", "technique", "command", "function", "test")


def rows_of(page: str) -> list[dict[str, str]]:
    lines = [line for line in page.splitlines() if re.match(r"\| *\d+ *\|", line)]
    return [dict(zip(COLUMNS, map(str.strip, line.strip("|").split("|")), strict=True)) for line in lines]


ROWS = rows_of(PAGE)


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def parts_of(cell: str) -> tuple[list[str], list[str]]:
    """(commands that are there, those that are planned): "planned:" holds up to the next semicolon."""
    there, planned = [], []
    for part in cell.split(";"):
        is_planned = part.strip().startswith("planned")
        (planned if is_planned else there).extend(name for name in named(part) if name.startswith("gptkern "))
    return there, planned


def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"gptkern.commands.{command}").add_arguments(parser)
    return set(parser._option_string_actions)


def problems(row: dict[str, str]) -> list[str]:
    """What is wrong with a row, in words."""
    found = []
    there, planned = parts_of(row["command"])
    for text in there:
        command, *options = text.split()[1:]
        if command not in cli.COMMANDS:
            found.append(f"{text}: no command")
        elif missing := set(options) - options_of(command):
            found.append(f"{text}: no {missing}")
        elif not options:
            found.append(f"{text}: it needs an option")
    found += [f"{text} is there, and said to be planned" for text in planned if text.split()[1] in cli.COMMANDS]
    for text in named(row["function"]):
        try:
            _imported(text)
        except (ImportError, AttributeError) as error:
            found.append(f"{text}: {error}")
    for text in named(row["test"]):
        path, _, name = text.partition("::")
        if not (ROOT / path).is_file():
            found.append(f"{text}: no file")
        elif name and name not in _functions(ROOT / path):
            found.append(f"{text}: no test of that name")
    words = row["command"] + row["function"]
    if bool(named(row["function"])) != bool(named(row["test"])):
        found.append("a function has a test, and the other way round")
    if not named(row["function"]) and not re.search(r"planned: \w|planned: `|declined: \w", words):
        found.append("it needs a function and a test, or what is planned, or why it is declined")
    return found


def _imported(name: str) -> object:
    """The thing of a dotted name, of which the last parts may be attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:count]).startswith(error.name or "?"):
                raise
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ImportError(name)


def _functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_technique_has_its_line():
    assert [int(row["number"]) for row in ROWS] == list(range(1, COUNT + 1))
    assert all(row["article"][0] in "AB" and row["technique"] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["number"])
def test_what_a_line_names_is_there(row):
    assert problems(row) == []


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("`gptkern grow --width`", "`gptkern grow --depth`", "no {'--depth'}"),
        ("`gptkern grow --width`", "`gptkern widen --width`", "no command"),
        ("`gptkern grow --width`", "planned: `gptkern grow`", "said to be planned"),
        ("`gptkern.training.grow`", "`gptkern.training.grown`", "grown"),
        ("`gptkern.training.grow`", "`gptkern.trainings.grow`", "trainings"),
        ("`gptkern.training.grow`", "", "a function has a test"),
        ("tests/test_training_growing.py::", "tests/test_training_grow.py::", "no file"),
        ("::test_the_larger_model", "::test_a_larger_model", "no test of that name"),
    ],
)
def test_what_is_not_there_is_seen(old, new, words):
    row = rows_of(next(line for line in PAGE.splitlines() if line.startswith("| 13 |")).replace(old, new))[0]
    assert any(words in problem for problem in problems(row)), problems(row)
