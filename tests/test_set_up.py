"""How `make` sets itself up: with a Python that cannot do it, one line says so and nothing is left behind."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def set_up(folder: Path, lacks: str) -> subprocess.CompletedProcess:
    """`make` up to the first pip, with a Python that is this one but for what the code `lacks` changes."""
    python = folder / "python"
    prelude = f"import runpy, sys; {lacks}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    # What the check lets through goes on with -m venv.
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && {{ echo "$@"; exit 9; }}\nexec {sys.executable} -c "{prelude}" "$@"\n'
    )
    python.chmod(0o755)
    return make(folder, python)


def make(folder: Path, python: Path | str) -> subprocess.CompletedProcess:
    venv = folder / "venv"
    command = ["make", "--no-print-directory", f"VENV={venv}", f"PYTHON={python}", f"{venv}/installed"]
    # What `make test` passes on to its children does not reach this one.
    clean = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean)


@pytest.mark.parametrize(
    "lacks, words",
    [
        ("sys.version_info = (3, 10, 13)", "this is Python 3.10 and gptkern needs 3.11 or newer"),
        ("sys.modules['venv'] = None", "no module venv to make an environment"),
        ("sys.modules['ensurepip'] = None", "no module ensurepip to put pip into an environment"),
    ],
    ids=["too old", "no venv", "no pip"],
)
def test_what_cannot_work_is_said_in_one_line(tmp_path, lacks, words):
    done = set_up(tmp_path, lacks)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line and "PYTHON=" in line
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_said_in_one_line(tmp_path):
    done = make(tmp_path, tmp_path / "python9")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "python9: it cannot be run" in line


def test_what_can_work_goes_on(tmp_path):
    done = set_up(tmp_path, "pass")
    assert f"-m venv {tmp_path}/venv" in done.stdout and "PYTHON=" not in done.stderr


def test_the_least_python_is_one_number():
    least = ".".join(map(str, runpy.run_path(str(ROOT / "building" / "obstacle.py"))["LEAST"]))
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^requires-python = ">=(.*)"', project, re.MULTILINE)[1] == least
    assert re.search(r'^target-version = "py(.*)"', project, re.MULTILINE)[1] == least.replace(".", "")
    assert re.findall(r"Python :: (3\.\d+)", project)[0] == least
    assert f"Python >= {least} and make" in (ROOT / "Makefile").read_text()
    for page in ("README.md", "docs/design.md"):
        assert re.findall(r"Python ≥ ([\d.]*\d)", (ROOT / page).read_text()) == [least], page
