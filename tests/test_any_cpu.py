"""The rule of tolerance.py holds on processors of every kind: PyTorch's sums have another order on each.

ATEN_CPU_CAPABILITY is read once in a process, so each kind is one. The seeds are what makes luck show: a rule without
room for honest roundings fails for one in some hundred inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from gptkern.measuring.checking import LAUNCHERS

CAPABILITIES = ("default", "avx2", "avx512")  # each CPU has those before its own
SEEDS = 20
ELEMENTS = 4096

# argv: backend, seeds, elements. The last line is JSON: the capability, the number of comparisons, those that failed.
COMPARISONS = """
import json, sys
import torch
from gptkern import operators as rooms
from gptkern.measuring import checking

torch.set_num_threads(1)
backend, seeds, elements = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
count, failed, operators = 0, [], set()
for seed in range(seeds):
    for result in checking.run(device="cpu", backends=[backend], sizes=["small"], seed=seed, elements=elements):
        count += 1
        operators.add(result.operator)
        if result.ok is not True:
            failed.append(f"seed {seed}: {result}")
assert operators == set(rooms.NAMES), operators
print(json.dumps([torch.backends.cpu.get_cpu_capability().lower(), count, failed]))
"""


def python(*arguments: str, capability: str | None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment |= {"TRITON_INTERPRET": "1"} | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
    command = [sys.executable, "-W", "ignore", "-c", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


@functools.cache
def own_capability() -> str:
    """What PyTorch finds here by itself; asked for more, it would not look whether the CPU has it."""
    return python("import torch; print(torch.backends.cpu.get_cpu_capability())", capability=None).lower()


@pytest.mark.deep
@pytest.mark.timeout(1800)  # a minute of one core; more where others use it too
@pytest.mark.parametrize("backend", [LAUNCHERS, "triton"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_operator_is_right_on(capability, backend):
    own = own_capability()
    if capability not in CAPABILITIES[: CAPABILITIES.index(own) + 1 if own in CAPABILITIES else 1]:
        pytest.skip(f"PyTorch finds {own.upper()} on this CPU, which has no {capability.upper()}")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    ran_on, count, failed = json.loads(python(COMPARISONS, backend, str(SEEDS), str(ELEMENTS), capability=capability))
    assert ran_on == capability
    assert count >= SEEDS * 100, "the cases have gone elsewhere"
    assert not failed, f"{len(failed)} of {count} comparisons:\n" + "\n".join(failed)
