"""The emulator and csrc/device: each wrapper against arithmetic written here, from the PTX ISA, in numpy.

What the emulator must refuse is in test_emulator_broken.py, what it counts in test_emulator_counts.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DEVICE
from cuda_modules import address, aligned, aligned_copy, module

from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

# 0: threads in their order, copies last. Of four neighbours each runs another policy of switches.
SEEDS = (0, 1, 2, 3, 4)

RANDOM = np.random.default_rng(0)


@pytest.fixture(params=SEEDS)
def kernels(request):
    kernels = module("instructions")
    kernels.set_seed(request.param)
    yield kernels
    kernels.check_races(True)


# --- mma --------------------------------------------------------------------------------------------------------------
# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k32": where lane `lane` holds
# element `i` of its fragment. Written as the ISA writes it, and not as csrc/device/ptx.cuh does.


def a_place(lane, i, elements):
    """(row, column) of a_i; `elements`: of one register, 2 or 4."""
    group, thread = lane >> 2, lane % 4
    register = i // elements
    row = group if register in (0, 2) else group + 8
    column = thread * elements + (i % elements) + (0 if register < 2 else 4 * elements)
    return row, column


def b_place(lane, i, elements):
    group, thread = lane >> 2, lane % 4
    return thread * elements + (i % elements) + (0 if i // elements == 0 else 4 * elements), group


def c_place(lane, i):
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def fragments(matrix, place, count, *arguments):
    """(32, count): what each lane holds of the matrix."""
    return np.array([[matrix[place(lane, i, *arguments)] for i in range(count)] for lane in range(32)])


def numpy_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_of_16_bits(kernels, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = RANDOM.standard_normal((16, 8)).astype(np.float32)
    expected = d.astype(np.float64) + a.double().numpy() @ b.double().numpy()
    a_held = aligned_copy(fragments(numpy_bits(a), a_place, 8, 2))
    b_held = aligned_copy(fragments(numpy_bits(b), b_place, 4, 2))
    d_held = aligned_copy(fragments(d, c_place, 4))
    kernels.mma_16bit(address(a_held), address(b_held), address(d_held), dtype == torch.bfloat16)
    np.testing.assert_allclose(d_held, fragments(expected, c_place, 4), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_puts_every_product_in_its_place(kernels, dtype):
    # Small integers, exact in every type: A[m][k] = 1 alone, B[k][n] different everywhere.
    b = (torch.arange(128) + 1).view(16, 8).to(dtype)
    b_held = aligned_copy(fragments(numpy_bits(b), b_place, 4, 2))
    for m, k in [(0, 0), (3, 5), (8, 8), (15, 15), (7, 10), (12, 1)]:
        a = torch.zeros(16, 16, dtype=dtype)
        a[m, k] = 1
        d_held = aligned_copy(np.zeros((32, 4), np.float32))
        a_held = aligned_copy(fragments(numpy_bits(a), a_place, 8, 2))
        kernels.mma_16bit(address(a_held), address(b_held), address(d_held), dtype == torch.bfloat16)
        expected = np.zeros((16, 8), np.float32)
        expected[m] = b[k].float().numpy()
        np.testing.assert_array_equal(d_held, fragments(expected, c_place, 4))


def int8_operands():
    yield "random", RANDOM.integers(-128, 128, (16, 32)), RANDOM.integers(-128, 128, (32, 8))
    # All 256 values meet; the largest sum, 32 · 2^14, and the lowest.
    values = np.arange(-128, 128)
    yield "every value", np.resize(values, (16, 32)), np.resize(values[::-1], (32, 8))
    yield "largest", np.full((16, 32), -128), np.full((32, 8), -128)
    yield "lowest", np.full((16, 32), -128), np.full((32, 8), 127)


@pytest.mark.parametrize(("a", "b"), [pytest.param(a, b, id=name) for name, a, b in int8_operands()])
@pytest.mark.parametrize("start", [0, 2**31 - 5])
def test_mma_of_int8(kernels, a, b, start):
    expected = (start + a @ b).astype(np.int64).astype(np.uint64).astype(np.uint32).view(np.int32)  # wraps
    a_held = aligned_copy(fragments(a.astype(np.int8), a_place, 16, 4))
    b_held = aligned_copy(fragments(b.astype(np.int8), b_place, 8, 4))
    d_held = aligned_copy(np.full((32, 4), start, np.int32))
    kernels.mma_int8(address(a_held), address(b_held), address(d_held))
    np.testing.assert_array_equal(d_held, fragments(expected, c_place, 4))


# --- ldmatrix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_ldmatrix(kernels, matrices, transposed, shuffled):
    rows = aligned_copy(RANDOM.integers(0, 65536, (32, 8)).astype(np.uint16))
    order = aligned_copy((RANDOM.permutation(32) if shuffled else np.arange(32)).astype(np.int32))
    out = aligned(32, 4, 2, dtype=np.uint16)
    kernels.load_matrices(address(rows), address(order), address(out), matrices, transposed)
    for m in range(4):
        matrix = rows[order[8 * m : 8 * m + 8]]
        # "each thread receives": row lane / 4, elements 2 (lane % 4) and the next
        for lane in range(32):
            row = (matrix.T if transposed else matrix)[lane // 4]
            expected = row[2 * (lane % 4) : 2 * (lane % 4) + 2] if m < matrices else [0, 0]
            assert out[lane, m].tolist() == list(expected)


# --- Lanes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [1, 2, 3, 16, 31])
def test_shuffles(kernels, mask):
    values = aligned_copy(RANDOM.standard_normal(32).astype(np.float32))
    lanes = aligned_copy(RANDOM.integers(0, 32, 32).astype(np.int32))
    out = aligned(32, 2)
    kernels.shuffles(address(values), address(lanes), address(out), mask)
    np.testing.assert_array_equal(out[:, 0], values[np.arange(32) ^ mask])
    np.testing.assert_array_equal(out[:, 1], values[lanes])


@pytest.mark.parametrize("votes", [0, 1, 0x80000000, 0xFFFFFFFF, 0x1234ABCD])
def test_ballot(kernels, votes):
    predicates = aligned_copy(np.array([votes >> lane & 1 for lane in range(32)], np.int32))
    out = aligned(32, dtype=np.uint32)
    kernels.ballots(address(predicates), address(out))
    assert (out == votes).all()


def test_reductions(kernels):
    values = aligned_copy(RANDOM.standard_normal(128).astype(np.float32))
    out = aligned(128, 5)
    kernels.reductions(address(values), address(out))
    warps, groups = values.astype(np.float64).reshape(4, 32), values.astype(np.float64).reshape(16, 8)
    np.testing.assert_allclose(out[:, 0], np.repeat(warps.sum(1), 32), atol=1e-5)
    np.testing.assert_allclose(out[:, 1], np.repeat(groups.sum(1), 8), atol=1e-5)
    np.testing.assert_array_equal(out[:, 2], np.repeat(warps.max(1), 32).astype(np.float32))
    np.testing.assert_allclose(out[:, 3], values.astype(np.float64).sum(), atol=2e-5)
    np.testing.assert_array_equal(out[:, 4], values.max())
    assert len(set(out[:, 3].tolist())) == 1  # every thread got the same


# --- cp.async ---------------------------------------------------------------------------------------------------------

POISON = 0xFFFFFFFF


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("in_range", [0xFFFFFFFF, 0x0F0F1234, 0])
@pytest.mark.parametrize(("stages", "ahead"), [(1, 0), (3, 0), (3, 1), (4, 2)])
def test_cp_async_brings_what_was_waited_for(kernels, size, in_range, stages, ahead):
    source = aligned_copy(RANDOM.integers(0, 255, (stages, 32, 16)).astype(np.uint8))
    out = aligned(stages, 32, 16, dtype=np.uint8)
    kernels.copy_groups(address(source), address(out), size, in_range, stages, ahead)
    inside = np.array([in_range >> lane & 1 for lane in range(32)], np.uint8)
    landed = stages - ahead
    np.testing.assert_array_equal(out[:landed], (source * inside[:, None])[:landed])
    assert (out[landed:] == 0xFF).all()


def test_cp_async_promises_nothing_before_the_wait():
    kernels = module("instructions")
    source = aligned_copy(np.arange(32, dtype=np.uint32) + 100)
    seen: list[set] = [set(), set()]
    kernels.check_races(False)
    try:
        for seed in range(20):
            kernels.set_seed(seed)
            out = aligned(32, 3, dtype=np.uint32)
            kernels.before_the_wait(address(source), address(out), 3)
            np.testing.assert_array_equal(out[:, 2], source)
            for place in range(2):
                # The old value, 7, is never there to be relied upon.
                landed, poison = out[:, place] == source, out[:, place] == POISON
                assert (landed | poison).all()
                seen[place] |= {"landed"} if landed.any() else set()
                seen[place] |= {"poison"} if poison.any() else set()
            if seed == 0:
                assert (out[:, :2] == POISON).all()
    finally:
        kernels.check_races(True)
    assert seen == [{"landed", "poison"}] * 2


# --- Conversions and arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_pattern_becomes_its_float(dtype):
    kernels = module("instructions")
    patterns = aligned_copy(np.arange(65536, dtype=np.uint16))
    out, pairs = aligned(65536), aligned(65536)
    kernels.to_floats(address(patterns), address(out), address(pairs), 65536, dtype == torch.bfloat16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).float().numpy()
    for result in (out, pairs):
        np.testing.assert_array_equal(result, expected)  # NaN where NaN is expected
        np.testing.assert_array_equal(np.signbit(result), np.signbit(expected))


def floats_to_round(dtype):
    """All finite values of the type, the ties between neighbours, and what lies just beside those."""
    values = torch.arange(65536).to(torch.int16).view(dtype).double()
    values = values[values.isfinite()].unique()
    ties = (values[1:] + values[:-1]) / 2
    ties = ties[ties.float().double() == ties].float()
    largest, infinity = values.max().float(), torch.tensor(float("inf"))
    beyond = largest * torch.tensor([1.0, 1.0009765625, 1.001953125, 1.00390625, 1.0078125, 2.0])
    special = torch.tensor([0.0, -0.0, float("nan"), 1e-45, -1e-45, 2.0**-25, 2.0**-24, 3e38, -3e38])
    inputs = [values.float(), ties, torch.nextafter(ties, infinity), torch.nextafter(ties, -infinity)]
    inputs += [beyond, -beyond, special, torch.stack([infinity, -infinity]), torch.randn(4096) * 1e-5]
    inputs = torch.cat(inputs)
    return inputs[: len(inputs) // 2 * 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floats_round_as_pytorch_rounds_them(dtype):
    kernels = module("instructions")
    inputs = floats_to_round(dtype)
    assert len(inputs) > 100_000
    source = aligned_copy(inputs.numpy())
    out, pairs = aligned(len(source), dtype=np.uint16), aligned(len(source), dtype=np.uint16)
    kernels.of_floats(address(source), address(out), address(pairs), len(source), dtype == torch.bfloat16)
    expected = inputs.to(dtype)
    for result in (out, pairs):
        result = torch.from_numpy(result.view(np.int16)).view(dtype)
        assert torch.equal(result.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert torch.equal(result.view(torch.int16)[kept], expected.view(torch.int16)[kept])


def test_arithmetic():
    kernels = module("instructions")
    edges = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.0, 127.5, 128.0, 1e30, -125.5, -126.0, -126.5, -149.0]
    values = [*edges, -150.0, -1e30, float("inf"), float("-inf"), *np.linspace(-130, 130, 1000).tolist()]
    source = aligned_copy(np.array(values, np.float32))
    count = len(source)
    powers, rounded, quotients = aligned(count), aligned(count, dtype=np.int32), aligned(count)
    kernels.arithmetic(address(source), address(powers), address(rounded), address(quotients), count)
    with np.errstate(all="ignore"):
        exact = np.exp2(source.astype(np.float64))
        expected = np.where(exact < 2.0**-126, 0.0, exact).astype(np.float32)
        np.testing.assert_allclose(powers, expected, rtol=2 * 2.0**-23)
        # Results below the smallest normal number are flushed to zero.
        assert (powers[exact < 2.0**-126] == 0).all() and powers[values.index(-126.0)] == np.float32(2.0**-126)
        assert powers[values.index(float("inf"))] == np.inf and powers[values.index(128.0)] == np.inf
        np.testing.assert_array_equal(rounded, np.rint(np.clip(source, -1e6, 1e6)).astype(np.int32))
        np.testing.assert_array_equal(quotients, np.float32(1) / source)


# --- Tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(("rows", "missing_columns"), [(64, 0), (41, 8), (0, 0)])
def test_tile(head_dim, rows, missing_columns):
    kernels = module("instructions")
    columns, stride = head_dim - missing_columns, head_dim + 24
    source = aligned_copy(RANDOM.integers(0, 65536, (64, stride)).astype(np.uint16))
    expected = np.zeros((64, head_dim), np.uint16)
    expected[:rows, :columns] = source[:rows, :columns]
    copied, pairs = aligned(64, head_dim, dtype=np.uint16), aligned(64, head_dim, dtype=np.uint16)
    shape = (4, head_dim // 16, 32, 8)
    a, a_transposed, b, b_transposed = (aligned(*shape, dtype=np.uint16) for _ in range(4))
    # Nothing else of the source may be read.
    start = address(source)
    inside = [(start + row * stride * 2, start + row * stride * 2 + columns * 2) for row in range(rows)]
    outputs = (copied, a, a_transposed, b, b_transposed, pairs)
    kernels.set_bounds([*inside, *((address(array), address(array) + array.nbytes) for array in outputs)])
    kernels.set_seed(1)
    kernels.start_counting({})
    try:
        kernels.tile(head_dim, start, *map(address, outputs), stride, rows, columns)
    finally:
        kernels.set_bounds([])
        (counts,) = kernels.stop_counting().values()
    np.testing.assert_array_equal(copied, expected)
    np.testing.assert_array_equal(pairs, expected)
    for i in range(4):
        for j in range(head_dim // 16):
            block = expected[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
            np.testing.assert_array_equal(a[i, j], fragments(block, a_place, 8, 2))
            np.testing.assert_array_equal(a_transposed[i, j], fragments(block.T, a_place, 8, 2))
            for half in range(2):
                held = slice(4 * half, 4 * half + 4)
                # B[k][n] = tile[8 half + n][k], and the tile as it is, columns 8 half and on
                down, across = block[8 * half : 8 * half + 8].T, block[:, 8 * half : 8 * half + 8]
                np.testing.assert_array_equal(b[i, j][:, held], fragments(down, b_place, 4, 2))
                np.testing.assert_array_equal(b_transposed[i, j][:, held], fragments(across, b_place, 4, 2))
    for kind in ("ldmatrix", "shared_load", "async_store"):
        assert counts[kind]["requests"] > 0
        assert counts[kind]["wavefronts"] == counts[kind]["least"], kind
