"""The limits of what the CUDA kernels do, as the emulator counts it: least bytes, no bank conflicts, the triangle."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DEVICE

from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("the emulator counts, and there is a GPU: CUDA's own profilers do there", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

import count_cuda
from count_cuda import CASES, PRODUCTS, counted, rows_of

TABLE = Path(__file__).parents[1] / "docs" / "cuda_counters.md"


def cases(*operators: str):
    return [
        pytest.param(index, id=f"{case.operator} {case.shape}")
        for index, case in enumerate(CASES)
        if not operators or case.operator in operators
    ]


def find(operator: str, shape: str) -> int:
    return next(i for i, case in enumerate(CASES) if case.operator == operator and case.shape == shape)


@pytest.mark.parametrize("index", cases("layer_norm", "rms_norm", "rotary", "softmax", "int8_linear"))
def test_no_more_bytes_than_needed(index):
    for record in counted(index):
        if record.large_least:
            # Less than the least would mean that the count, or the case, is wrong.
            assert 0.999 <= record.bytes_ratio <= CASES[index].limit, record.launcher


@pytest.mark.parametrize("index", cases("layer_norm", "rms_norm", "rotary", "softmax"))
def test_full_requests(index):
    """Sixteen bytes a lane, side by side: where rows are long enough, a request moves 16 sectors of 32 bytes."""
    if "×96 (24) " in CASES[index].shape:
        # Halves of 12 elements are no whole vectors: lanes of 4 bytes, and pieces of 24.
        return
    for record in counted(index):
        sectors, size = (sum(record.total(kind, what) for kind in count_cuda.ACCESSES) for what in ("sectors", "bytes"))
        # Rows that begin in the middle of a sector fetch little that they do not use.
        assert sectors * 32 <= 1.2 * size, record.launcher


@pytest.mark.parametrize("index", cases())
def test_no_bank_conflicts(index):
    for record in counted(index):
        # What a main loop does: copies into shared memory, and operands from it.
        assert record.conflicts("ldmatrix", "async_store") == 0, record.launcher
        if CASES[index].operator in ("layer_norm", "rms_norm", "softmax"):
            assert record.conflicts() == 0, record.launcher
        else:
            least = sum(record.total(kind, "least") for kind in count_cuda.SHARED)
            assert record.conflicts() <= 0.02 * least, record.launcher


@pytest.mark.parametrize("index", cases("attention", "int8_linear"))
def test_matrix_instructions(index):
    """No fewer than the operator's products take, or somebody else computes them; and nothing is computed twice over.

    Between the two: tiles that are not full, and two more of the backward's five products, for dQ by itself.
    """
    executed: dict[str, int] = {}
    for record in counted(index):
        done = sum(record.total(kind) * each for kind, each in PRODUCTS.items())
        executed[record.direction] = executed.get(record.direction, 0) + done
    for direction, products in (CASES[index].products or {}).items():
        if "w8a16" not in CASES[index].shape:
            assert products <= executed[direction] < 2 * products


@pytest.mark.parametrize(
    ("causal", "square", "most"),
    [
        ("1×1×1024×64 bfloat16, causal", "1×1×1024×64 bfloat16", 0.5 + 128 / 1024),
        ("1×1×512×128 bfloat16, causal", "1×1×512×128 bfloat16", 0.5 + 128 / 512),
    ],
)
def test_causal_attention_computes_the_triangle(causal, square, most):
    """Half of the square's instructions, and half a tile of 128 more along the diagonal."""
    triangle, whole = (
        {record.launcher: record.total("mma_16bit") for record in counted(find("attention", shape))}
        for shape in (causal, square)
    )
    assert triangle.keys() == whole.keys()
    for launcher, instructions in whole.items():
        if instructions:
            assert 0.5 < triangle[launcher] / instructions <= most, launcher


@pytest.mark.parametrize("index", cases())
def test_the_table_is_up_to_date(index):
    text = TABLE.read_text(encoding="utf-8")
    for line in rows_of(index):
        assert line in text, "docs/cuda_counters.md is stale: run `make tables`"
