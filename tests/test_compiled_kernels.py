"""Every shipped configuration compiles for sm_80, sm_90 and sm_100, without a GPU, and fits the machine.

What is held, for each kernel that a module's `compile_cases` lists:
- ptxas notes no lost performance: no wgmma waits for the one before (sm_90; of tcgen05 ptxas has no such note);
- no registers spill to local memory, or as few bytes as its configuration table says, with the reason, and those not in
  the loops that compute;
- what is not float64 computes nothing in float64;
- shared memory fits one block of the part, and tensor memory fits sm_100;
- a matrix product runs on the part's own matrix instruction;
- a kernel that streams memory loads 16 bytes at a time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import compile_kernels
import pytest
from compile_kernels import ARCHITECTURES, SHARED_LIMIT, TENSOR_MEMORY_LIMIT, cases_of, kernel_names, modules, run

from gptkern import operators

pytestmark = [
    pytest.mark.deep,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

FULL_LOAD = 16  # bytes: one thread's widest load that all three parts have
# A few bytes spilled outside of the loops that compute cost once what a smaller tile costs at every trip.
MOST_SPILL = 128  # bytes: what a table may allow, 1% of what a program of attention's backward moves at length 2048
SPILLS_IN_A_LOOP = 0.02  # of its instructions: inside they are paid at every trip
# wgmma and tcgen05 take tiles of at least 64 rows and 4 warps; smaller products, and int8 products on sm_100 before
# Triton 3.9, are lowered to mma.sync, which every part has: such a case does not say matrix_product.
MATRIX_INSTRUCTIONS = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma"}}


def broken_rules(record: dict) -> list[str]:
    """What a record of compile_kernels breaks, as sentences with the numbers."""
    if "error" in record:
        return [f"it does not compile: {record['error']}"]
    architecture, broken = record["architecture"], []
    broken += [f"ptxas: {note}" for note in record["notes"]]
    if record["spill"] > record["allowed_spill"]:
        broken.append(
            f"{record['spill']} bytes of registers spill ({record['registers']} registers); "
            f"{record['allowed_spill']} are allowed"
        )
    if record["allowed_spill"] > MOST_SPILL:
        broken.append(f"its table allows {record['allowed_spill']} bytes of spills; it may allow {MOST_SPILL}")
    for loop in record["loops"]:
        if loop["spills"] > SPILLS_IN_A_LOOP * loop["instructions"]:
            broken.append(
                f"a loop of {loop['instructions']} instructions reaches spilled registers in {loop['spills']} of them; "
                f"{SPILLS_IN_A_LOOP:.0%} are allowed"
            )
    if not record["is_float64"]:
        if record["float64"]:
            broken.append(f"its PTX computes in float64: {record['float64']}")
        if "fp64" in record["scalars"]:
            broken.append("a scalar argument is fp64; Triton hands a Python float over as fp32")
    if record["shared"] > SHARED_LIMIT[architecture]:
        broken.append(f"{record['shared']} bytes of shared memory; a block may have {SHARED_LIMIT[architecture]}")
    if record["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        broken.append(f"{record['tensor_memory']} columns of tensor memory; there are {TENSOR_MEMORY_LIMIT}")
    if record["matrix_product"]:
        if not MATRIX_INSTRUCTIONS[architecture] & set(record["instructions"]):
            broken.append(f"the PTX has {record['instructions']}; it needs {MATRIX_INSTRUCTIONS[architecture]}")
    elif record["aligned"] and record["widest_load"] < FULL_LOAD:
        broken.append(f"its widest load from global memory is {record['widest_load']} bytes; it needs {FULL_LOAD}")
    return broken


# With an empty cache a minute for the largest operator, several on a machine that is shared.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operator", modules())
def test_compiles_within_the_limits(operator, architecture):
    records = run(operator, architecture)
    failures = [f"{record['case']}: {rule}" for record in records for rule in broken_rules(record)]
    assert not failures, f"{operator} on sm_{architecture}:\n" + "\n".join(failures)
    names = [record["case"] for record in records]
    assert len(set(names)) == len(names), f"two cases of {operator} have the same name"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_has_a_case(architecture):
    listed = {case.kernel.fn.__name__ for operator in modules() for case in cases_of(operator, architecture)}
    assert kernel_names() == listed


def test_every_operator_lists_its_cases():
    assert set(operators.NAMES) == set(modules())


# --- The reader itself: it has to see what it forbids -----------------------------------------------------------------

SELF_TEST = """
import json, pathlib, sys
sys.path.insert(0, {folder!r})
import compile_kernels
compile_kernels.CACHE = pathlib.Path({cache!r})
import triton
import triton.language as tl
from compile_kernels import compiled
from gptkern.backends.triton.common import CompileCase

@triton.jit
def spilling_kernel(x_ptr, y_ptr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    # COUNT sums of WIDTH values live at once in one warp: 32 * 255 registers cannot hold them.
    column = tl.arange(0, WIDTH)
    sums = tl.zeros((COUNT, WIDTH), tl.float32)
    for start in range(0, 64):
        x = tl.load(x_ptr + start * WIDTH + column)
        sums += tl.exp(x)[None, :] * (tl.arange(0, COUNT)[:, None] + start)
    tl.store(y_ptr + tl.arange(0, COUNT)[:, None] * WIDTH + column[None, :], sums)

@triton.jit
def copying_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index, mask=index < count), mask=index < count)

@triton.jit
def product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(0, STEPS):
        x = tl.load(x_ptr + (step * BLOCK + row) * BLOCK + column)
        sums = tl.dot(x, tl.trans(x), sums)
    tl.store(y_ptr + row * BLOCK + column, sums)

@triton.jit
def doubling_kernel(x_ptr, y_ptr, scale, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index) * scale)

copy = dict(x_ptr="*bf16", y_ptr="*bf16", count="i32", BLOCK="constexpr")
scaled = dict(x_ptr="*bf16", y_ptr="*bf16", scale="fp32", BLOCK="constexpr")
product = dict(x_ptr="*bf16", y_ptr="*fp32", BLOCK="constexpr", STEPS="constexpr")
cases = [
    CompileCase("spills", spilling_kernel, dict(x_ptr="*fp32", y_ptr="*fp32", COUNT="constexpr", WIDTH="constexpr"),
                dict(COUNT=64, WIDTH=256), 1, 2),
    CompileCase("aligned copy", copying_kernel, copy, dict(BLOCK=1024), 4, 2, ("count",)),
    CompileCase("copy of any count", copying_kernel, copy, dict(BLOCK=1024), 4, 2),
    CompileCase("product", product_kernel, product, dict(BLOCK=64, STEPS=8), 4, 3),
    # Eight stages or more of 128 * 128 bfloat16, 32 KB each: more shared memory than any part has.
    CompileCase("too many stages", product_kernel, product, dict(BLOCK=128, STEPS=16), 8, 9),
    # The sums alone take the 256 registers that a thread of 8 warps may have.
    CompileCase("wgmma without registers", product_kernel, product, dict(BLOCK=256, STEPS=8), 8, 2),
    CompileCase("scaled by a float", doubling_kernel, scaled, dict(BLOCK=1024), 4, 1),
    CompileCase("scaled by a double", doubling_kernel, scaled | dict(scale="fp64"), dict(BLOCK=1024), 4, 1),
]
records = [compiled(case, {architecture}) for case in cases]

def refused(*args, **kwargs):
    raise PermissionError
triton.compile = refused
again = compiled(cases[1], {architecture})
try:
    # The same kernel by another name, with other options.
    compiled(cases[1]._replace(num_warps=8), {architecture})
    again = None
except PermissionError:
    pass
print(json.dumps([*records, again]))
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reader_sees_what_it_forbids(architecture, tmp_path):
    # Triton reads a kernel's source from its file.
    program = tmp_path / "self_test.py"
    folder = str(Path(compile_kernels.__file__).parent)
    program.write_text(SELF_TEST.format(folder=folder, cache=str(tmp_path / "kept"), architecture=architecture))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    spills, copy, unaligned, product, stages, full, scaled, doubled, again = json.loads(done.stdout.splitlines()[-1])
    assert again == copy, "what was read of a case is kept, and of that case alone"
    plain = dict(architecture=architecture, allowed_spill=0, matrix_product=False, aligned=True)
    plain |= dict(is_float64=False, scalars=["fp32"])
    assert spills["spill"] > 0
    assert "spill" in " ".join(broken_rules(spills | plain))
    assert "it may allow" in " ".join(broken_rules(spills | plain | dict(allowed_spill=1 << 20)))
    assert "a loop of" in " ".join(broken_rules(spills | plain | dict(allowed_spill=1 << 20)))
    # Serialised wgmma are sm_90's alone.
    assert any("serialized" in note for note in full["notes"]) == (architecture == 90)
    assert ("ptxas: C75" in " ".join(broken_rules(full | plain))) == (architecture == 90)
    assert not scaled["float64"] and doubled["float64"]
    assert "computes in float64" in " ".join(broken_rules(doubled | plain))
    assert "float64" not in " ".join(broken_rules(doubled | plain | dict(is_float64=True)))
    assert "fp64" in " ".join(broken_rules(scaled | plain | dict(scalars=["fp64"])))
    assert copy["spill"] == 0 and copy["registers"] > 0
    assert not broken_rules(copy | plain)
    assert unaligned["widest_load"] < FULL_LOAD
    assert "widest load" in " ".join(broken_rules(unaligned | plain))
    assert not broken_rules(product | plain | dict(matrix_product=True))
    assert "the PTX has []" in " ".join(broken_rules(copy | plain | dict(matrix_product=True)))
    assert "shared memory" in " ".join(broken_rules(stages | plain | dict(matrix_product=True)))
