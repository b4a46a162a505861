"""The machine code that nvcc makes of the CUDA kernels, read without a GPU: no spills, the instructions expected.

Read from gptkern._cuda where it was built from these sources; else nvcc compiles them into a cache, which takes minutes
the first time.
"""

from __future__ import annotations

import re
from pathlib import Path

import disassemble_cuda
import pytest
from cuda_modules import FOLDER
from disassemble_cuda import ARCHITECTURES, Kernel, Missing, occupancy, plain

from gptkern.backends.cuda import sources

TABLE = Path(__file__).parents[1] / "docs" / "cuda_resources.md"
# nvcc takes its time where the module is not built.
pytestmark = [pytest.mark.deep, pytest.mark.timeout(900)]

WIDE_LOAD = ("LDG.E.128", "LDG.E.EF.128", "LDG.E.128.CONSTANT")
WIDE_COPY = ("LDGSTS.E.BYPASS.LTC128B.128", "LDGSTS.E.BYPASS.128")
PRODUCT_16 = ("HMMA.16816",)
PRODUCT_8 = ("IMMA.16832",)
FROM_SHARED = ("LDSM.16",)

# (kernels, by a regular expression on the name; what their code has to hold, any of each group)
EXPECTED = [
    (r"layer_norm_(forward|backward)_kernel\b", [WIDE_LOAD]),
    (r"rms_norm_(forward|backward)\w*_kernel\b", [WIDE_LOAD]),
    (r"rotary_kernel<(b?float16, 8|float, 4), ", [WIDE_LOAD]),
    (r"softmax_\w+_kernel\b", [WIDE_LOAD]),
    (r"attention_forward\w*\b", [PRODUCT_16, FROM_SHARED, WIDE_COPY]),
    (r"attention_backward_(key_value|query)\w*\b", [PRODUCT_16, FROM_SHARED, WIDE_COPY]),
    (r"w8a8_kernel\b", [PRODUCT_8, FROM_SHARED, WIDE_COPY]),
    (r"w8a16\w*_kernel\b", [WIDE_LOAD + WIDE_COPY]),
]


@pytest.fixture(scope="module")
def found() -> list[Kernel]:
    try:
        return disassemble_cuda.kernels(disassemble_cuda.objects())
    except Missing as missing:
        pytest.skip(str(missing))


def test_every_source_has_kernels_for_both_architectures(found):
    assert {kernel.architecture for kernel in found} == set(ARCHITECTURES)
    names = {a: {kernel.name for kernel in found if kernel.architecture == a} for a in ARCHITECTURES}
    assert names["sm_80"] == names["sm_90a"]
    # Each source's own kernels, as they are written there.
    for unit in sources.kernel_units(sources.folder()):
        bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
        for name in re.findall(rf"__global__ void\s+(?:{bounds}\s+)?(\w+)\(", unit.source.read_text()):
            assert any(kernel.startswith(name) for kernel in names["sm_80"]), f"{unit.source.name}: {name}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(found, architecture):
    for kernel in found:
        if kernel.architecture == architecture:
            assert kernel.stack == 0 and kernel.local == 0, f"{kernel.name}: {kernel.stack} bytes of stack"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("pattern", "groups"), EXPECTED, ids=[pattern for pattern, _ in EXPECTED])
def test_expected_instructions(found, architecture, pattern, groups):
    matching = [k for k in found if k.architecture == architecture and re.match(pattern, k.name)]
    assert matching, f"no kernel is called {pattern}"
    for kernel in matching:
        for group in groups:
            assert kernel.count(*group), f"{kernel.name} has none of {group}"


def test_every_launch_fits_every_part(found):
    """Registers and shared memory of the launches that count_cuda makes leave room for a block."""
    pytest.importorskip("pybind11", reason="the emulator, which knows the launches, needs pybind11")
    launches = disassemble_cuda.launches()
    known = [kernel for kernel in found if kernel.name in launches]
    assert len(known) >= len(launches), "kernels of the emulator that nvcc's code has under another name"
    for kernel in known:
        assert occupancy(kernel, *launches[kernel.name]) >= 1, kernel.name
        # sm_86 and sm_89 have 100 KB, of which the system takes one.
        assert launches[kernel.name][1] + kernel.shared <= 99 * 1024, kernel.name


def test_the_table_is_up_to_date(found):
    """The same kernels, without spills; and the same numbers where the same compiler made them."""
    text = TABLE.read_text(encoding="utf-8")
    rows = {(match[1], match[2]): match[0] for match in re.finditer(r"^\| `(.+?)` \| (\w+) \| .*$", text, re.MULTILINE)}
    stale = "docs/cuda_resources.md is stale: run `make tables`"
    assert set(rows) == {(kernel.name, kernel.architecture) for kernel in found}, stale
    same_compiler = f"with {disassemble_cuda.compiler_version()}:" in text
    for kernel in found:
        registers, local = map(
            int, re.match(r"\| `.+?` \| \w+ \| (\d+) \| (\d+) \|", rows[kernel.name, kernel.architecture]).groups()
        )
        assert local == kernel.local, stale
        assert not same_compiler or registers == kernel.registers, stale


# --- The reader itself: it has to see what it forbids -----------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> dict[tuple[str, str], Kernel]:
    """tests/cuda/compiled.cu: kernels of which it is known what they are made of."""
    try:
        unit = sources.Unit("test_compiled", FOLDER / "compiled.cu", ())
        path = disassemble_cuda.compiled(unit, sources.folder())
        return {(kernel.name, kernel.architecture): kernel for kernel in disassemble_cuda.kernels([path])}
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reader_sees_what_it_forbids(own, architecture):
    def kernel(name):
        return own[f"testing::{name}", architecture]

    assert kernel("spilling_kernel").local > 0
    assert kernel("indexing_kernel<8>").stack >= 32 and kernel("indexing_kernel<8>").local > 0
    copy = kernel("copy_kernel<4>")
    assert (copy.stack, copy.local, copy.count(*WIDE_LOAD)) == (0, 0, 1)
    narrow = kernel("copy_kernel<1>")
    assert narrow.count(*WIDE_LOAD) == 0 and narrow.count("LDG.E") == 1
    product = kernel("product_kernel<float16, true>")
    assert product.count(*PRODUCT_16) == 1 and product.count(*FROM_SHARED) == 1 and product.count(*WIDE_COPY) == 1
    assert product.count(*PRODUCT_8) == 0 and product.shared == 0
    assert kernel("product_kernel<bfloat16, false>").count(*PRODUCT_16) == 1
    assert kernel("int8_kernel").count(*PRODUCT_8) == 1


def test_names():
    for mangled, name in (
        (
            "void gptkern::(anonymous namespace)::a_kernel<__half, (int)64, (bool)1>(float*, int)",
            "a_kernel<float16, 64, true>",
        ),
        ("gptkern::b_kernel(gptkern::(anonymous namespace)::Call)", "b_kernel"),
        ("void gptkern::c<__nv_bfloat16>(void (*)(int))", "c<bfloat16>"),
    ):
        assert plain(mangled) == name


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "dynamic", "blocks"),
    [
        # By CUDA's occupancy calculator's rules: registers by 256 a warp, a quarter of them each.
        ("sm_80", 32, 256, 0, 8),
        ("sm_80", 255, 256, 0, 1),
        ("sm_80", 128, 128, 0, 4),
        ("sm_80", 129, 128, 0, 3),
        ("sm_80", 168, 128, 0, 3),
        ("sm_80", 32, 32, 0, 32),
        ("sm_80", 32, 128, 80 * 1024, 2),
        ("sm_90a", 32, 128, 80 * 1024, 2),
        ("sm_90a", 32, 128, 75 * 1024, 3),
        ("sm_80", 32, 128, 99 * 1024, 1),
        ("sm_90a", 64, 1024, 0, 1),
        ("sm_90a", 32, 1024, 0, 2),
    ],
)
def test_occupancy(architecture, registers, threads, dynamic, blocks):
    assert occupancy(Kernel("k", architecture, registers, 0, 0, {}), threads, dynamic) == blocks
