"""A call that is like one before is not checked again: what is remembered changes no launch and no error."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sharp import deep

from gptkern import operators
from gptkern.backends.cuda import emulated

PROGRAM = Path(__file__).with_name("remembered_calls.py")
# Operators whose twins remember: losses look at more than a signature says, and an optimizer's call is new each time.
REMEMBERING = {name for name in operators.NAMES if "dispatch.remember(" in inspect.getsource(operators.contract(name))}


@pytest.mark.parametrize("by", [*deep("compiled"), "python"])
def test_a_call_is_what_it_is_whatever_came_before(by):
    if by == "compiled" and emulated.compiler() is None:
        pytest.skip("there is no C++ compiler for csrc/, whose launchers the calls start")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GPTKERN_BACKEND", "TRITON_"))}
    done = subprocess.run([sys.executable, "-W", "ignore", str(PROGRAM), by], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert set(report) == REMEMBERING
    for name, found in report.items():
        assert found["wrong"] == [], (name, found["wrong"])
        # Else nothing would show whether it is remembered at all.
        assert 5 <= found["kept"] <= found["calls"] / 2, (name, found["kept"])
