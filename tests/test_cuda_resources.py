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
from disassemble_cuda import ARCHITECTURES, OTHER_ARCHITECTURES, Kernel, Missing, occupancy, plain

from building import toolchain
from gptkern.backends.cuda import sources

TABLE = Path(__file__).parents[1] / "docs" / "cuda_resources.md"
OTHER_TABLE = TABLE.with_name("cuda_other_architectures.md")
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
    (r"cross_entropy_(forward|backward)_kernel\b", [WIDE_LOAD]),
    (r"adamw_(update|squares)_kernel\b", [WIDE_LOAD]),
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


# --- The other architectures that a build offers --------------------------------------------------------------------

# Instructions that reach local memory inside a loop: (kernels, architecture) -> the most. The rule is none. These are
# about 1 % of loops that wait for memory, on architectures that the default build serves by PTX, under launch bounds
# that are right for sm_80 and sm_90a; what they cost is not measured. A few outside of loops are allowed.
SPILLS_IN_LOOPS = {
    (r"w8a16_kernel<", "sm_100"): 1,
    (r"layer_norm_input_gradient_kernel<", "sm_100"): 9,
    (r"layer_norm_input_gradient_kernel<", "sm_120"): 5,
    (r"softmax_forward_long_kernel<4, 2>", "sm_120"): 17,
}


def test_every_architecture_that_a_build_offers_is_read():
    offered = {f"sm_{name}" for name in toolchain.DEFAULT_ARCHITECTURES.split(";") if not name.endswith("+PTX")}
    assert offered | {"sm_100", "sm_120"} == {*ARCHITECTURES, *OTHER_ARCHITECTURES}


def test_the_table_of_other_architectures():
    """It is of these sources, and what spills in a loop is known."""
    text = OTHER_TABLE.read_text(encoding="utf-8")
    stale = "docs/cuda_other_architectures.md is stale: run `make tables`"
    assert f"from the sources {sources.digest(sources.folder())[:16]}:" in text, stale
    assert f"| kernel | {' | '.join(OTHER_ARCHITECTURES)} |" in text, stale
    rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", text, re.MULTILINE)
    known = set(re.findall(r"^\| `(.+?)` \| sm_80 \|", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name for name, _ in rows} == known, stale
    seen = set()
    for name, cells in rows:
        for architecture, cell in zip(OTHER_ARCHITECTURES, cells.split(" | "), strict=True):
            spilt = re.fullmatch(r"\d+(?:, \d+ \((\d+) in loops\))?", cell)
            in_loops = int(spilt[1] or 0)
            allowed = {key: most for key, most in SPILLS_IN_LOOPS.items() if key[1] == architecture}
            allowed = {key: most for key, most in allowed.items() if re.match(key[0], name)}
            assert in_loops <= max(allowed.values(), default=0), f"{name} on {architecture}: {cell}"
            seen |= {key for key, most in allowed.items() if in_loops == most}
    assert seen == set(SPILLS_IN_LOOPS), "less spills than is allowed"


def test_the_forward_of_attention_spills_nowhere():
    """Of head_dim 128, which has all 255 registers: a tile of keys takes as long as its matrix products."""
    try:
        found = disassemble_cuda.other_kernels("attention_forward_128")
    except Missing as missing:
        pytest.skip(str(missing))
    assert {kernel.architecture for kernel in found} == set(OTHER_ARCHITECTURES)
    for kernel in found:
        assert kernel.local == 0 and kernel.stack == 0, f"{kernel.name} on {kernel.architecture}: {kernel.local}"


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

    assert kernel("spilling_kernel").local > 0 and kernel("spilling_kernel").local_in_loops == 0
    assert kernel("indexing_kernel<8>").local_in_loops > 0
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
