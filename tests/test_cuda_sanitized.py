"""The CUDA kernels on the emulator, built with AddressSanitizer and UndefinedBehaviorSanitizer: nothing to report.

The sanitizers see what the helpers of csrc/device do not: pointers that are followed past them, arrays in registers,
overflowing integers, shifts. Each kind of fault is made on purpose, and has to be reported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import DEVICE

from gptkern import operators
from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

PROGRAM = Path(__file__).parent / "sanitized_cuda.py"
# The build of all kernels with the sanitizers takes minutes, the first time.
pytestmark = [pytest.mark.deep, pytest.mark.timeout(600)]


def sanitized(*arguments: str) -> subprocess.CompletedProcess:
    try:
        environment = os.environ | emulated.sanitizer_environment()
    except emulated.CompilerError as error:
        pytest.skip(str(error))
    environment["PYTHONPATH"] = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_operators_are_clean():
    names = [name for name in operators.NAMES if find_spec(f"gptkern.operators.{name}.cuda")]
    done = sanitized("operators", *names)
    assert done.returncode == 0, done.stderr[-6000:]
    ran = json.loads(done.stdout)
    for name in names:
        # What the CUDA kernels leave to Triton's does not run; the first class of an operator is never among it.
        classes = list(operators.problem(name).checks()["small"])
        assert ran[name][0] == classes[0] and 2 * len(ran[name]) > len(classes), f"{name}: {ran[name]}"


FAULTS = [
    ("an element past the input is loaded", r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size 4"),
    ("an element past the output is stored", r"AddressSanitizer: heap-buffer-overflow[\s\S]*WRITE of size 4"),
    ("an integer overflows", r"runtime error: signed integer overflow: .*cannot be represented"),
    ("an address is not aligned", r"runtime error: load of misaligned address \w+ for type 'const float'"),
    ("a copy starts past the input", r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size"),
    ("a shift is too long", r"runtime error: shift exponent \d+ is too large"),
    ("an index is beyond its array", r"runtime error: index [4-7] out of bounds for type 'float \[4\]'"),
]


def test_every_fault_is_reported():
    done = sanitized("faults", str(1 + len(FAULTS)))
    assert done.returncode == 0, done.stderr[-6000:]
    (status, said), *faults = json.loads(done.stdout)
    assert (status, said) == (0, "")
    for (name, report), (status, said) in zip(FAULTS, faults):
        assert status not in (0, 2, 3), name
        assert re.search(report, said), f"{name}: {said[-3000:]}"
        # Where it happened: a line of the kernel.
        assert "sanitized.cu:" in said, name
