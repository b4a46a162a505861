"""How many warps of a norm's backward a multiprocessor holds, from its machine code: enough to keep memory busy.

By registers, threads and shared memory, as CUDA's occupancy calculator counts them. Held are the rows that registers
hold, of every width and dtype that is compiled ahead of time, on every architecture. Not held: float64 of wider rows,
which is there to be right, and the kernel of dx of wider rows on sm_100, whose 66 registers admit 24 warps.
"""

from __future__ import annotations

import importlib.util

import compile_kernels
import pytest
from compile_kernels import ARCHITECTURES
from disassemble_cuda import Kernel, Limits, occupancy

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

WARPS = 32
# sm_86 and sm_89 run what is compiled for sm_80, with less shared memory and 48 warps.
PARTS = {
    80: [Limits(164 * 1024), Limits(100 * 1024, warps=48, blocks=16)],
    90: [Limits(228 * 1024)],
    100: [Limits(228 * 1024)],
}
FEWER = {("input gradient wide", 100)}


def resident(record: dict, part: Limits) -> int:
    kernel = Kernel(record["case"], "", record["registers"], 0, record["shared"], {})
    return occupancy(kernel, record["num_warps"] * 32, 0, part) * record["num_warps"]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operator", ["layer_norm", "rms_norm"])
def test_a_backward_has_32_warps(operator, architecture):
    seen = 0
    for record in compile_kernels.run(operator, architecture):
        case, _, dtype = record["case"].rpartition(" ")
        if "forward" in case or (case.endswith("wide") and dtype == "fp64") or (case, architecture) in FEWER:
            continue
        seen += 1
        for part in PARTS[architecture]:
            assert resident(record, part) >= WARPS, f"{record['case']}: {record['registers']} registers, {part}"
    assert seen >= 9


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared", "warps"),
    # What the backward had before it was given 32 warps; one register too many; shared memory for one block of two.
    [(4, 96, 4096, 20), (32, 64, 65920, 32), (32, 65, 65920, 0), (8, 64, 100 * 1024, 8)],
)
def test_warps_are_counted(num_warps, registers, shared, warps):
    record = {"case": "", "registers": registers, "shared": shared, "num_warps": num_warps}
    assert resident(record, PARTS[80][0]) == warps
