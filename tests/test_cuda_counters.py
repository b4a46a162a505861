"""The limits of what the CUDA kernels do, as the emulator counts it: least bytes, no bank conflicts, the triangle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import DEVICE

from gptkern import operators
from gptkern.backends.cuda import emulated
from gptkern.backends.problem import FORWARD

if DEVICE != "cpu":
    pytest.skip("the emulator counts, and there is a GPU: CUDA's own profilers do there", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

import count_cuda
from count_cuda import CASES, PRODUCTS, counted, rows_of

TABLE = Path(__file__).parents[1] / "docs" / "cuda_counters.md"


# More products or elements than these take the emulator too long for what they show beyond the small cases.
MOST_PRODUCTS, MOST_ELEMENTS = 10**7, 10**5


def is_deep(index: int) -> bool:
    case = CASES[index]
    made = case.problem.inputs(case.of.sizes, case.of.dtype, torch.Generator())
    elements = max(tensor.numel() for tensor in made.tensors.values())
    return elements > MOST_ELEMENTS or (case.products(FORWARD) or 0) > MOST_PRODUCTS


def cases(having=lambda case: True):
    """The indices of CASES that `having` says yes to."""
    return [
        pytest.param(index, id=f"{case.operator} {case.shape}", marks=[pytest.mark.deep] if is_deep(index) else [])
        for index, case in enumerate(CASES)
        if having(case)
    ]


def find(operator: str, shape: str) -> int:
    return next(i for i, case in enumerate(CASES) if case.operator == operator and case.shape == shape)


def test_every_operator_with_bytes_of_its_own_is_counted():
    """And by a case that `make test` has time for."""
    counted_here = {case.operator for index, case in enumerate(CASES) if not is_deep(index)}
    timed = {name for name in count_cuda.WITH_KERNELS if operators.problem(name).cells("cuda", "quick")}
    assert counted_here == timed


@pytest.mark.parametrize("index", cases(lambda case: case.of.limit))
def test_no_more_bytes_than_needed(index):
    ratios = [record.bytes_ratio for record in counted(index) if record.large_least]
    assert ratios
    for ratio in ratios:
        # Less than the least would mean that the count, or the case, is wrong.
        assert 0.999 <= ratio <= CASES[index].of.limit


@pytest.mark.parametrize("index", cases(lambda case: case.products(FORWARD) is None))
def test_full_requests(index):
    """Sixteen bytes a lane, side by side: where rows are long enough, a request moves 16 sectors of 32 bytes."""
    if CASES[index].operator == "rotary" and CASES[index].of.sizes.rotary_dim % 16:
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
        if CASES[index].products(FORWARD) is None:
            assert record.conflicts() == 0, record.launcher
        else:
            least = sum(record.total(kind, "least") for kind in count_cuda.SHARED)
            assert record.conflicts() <= 0.02 * least, record.launcher


@pytest.mark.parametrize("index", cases(lambda case: case.products(FORWARD)))
def test_matrix_instructions(index):
    """No fewer than the operator's products take, or somebody else computes them; and nothing is computed twice over.

    Between the two: tiles that are not full, and two more of the backward's five products, for dQ by itself.
    """
    executed: dict[str, int] = {}
    for record in counted(index):
        done = sum(record.total(kind) * each for kind, each in PRODUCTS.items())
        executed[record.direction] = executed.get(record.direction, 0) + done
    for direction, done in executed.items():
        products = CASES[index].products(direction)
        # A product with few rows fills no instruction: bytes are its limit.
        if CASES[index].of.limit is None:
            assert products <= done < 2 * products


@pytest.mark.deep
@pytest.mark.parametrize(
    ("causal", "square", "most"),
    [
        ("1x1x1024x64 bfloat16, causal", "1x1x1024x64 bfloat16, full", 0.5 + 128 / 1024),
        ("1x1x512x128 bfloat16, causal", "1x1x512x128 bfloat16, full", 0.5 + 128 / 512),
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
