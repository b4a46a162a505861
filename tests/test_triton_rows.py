"""The tiles that a formula gives to rows held in registers, and the grids that the Triton kernels are launched with."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from gptkern import operators
from gptkern.backends import dispatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CPU = torch.device("cpu")
# (the widest row, rows of a tile, its width, warps): each serves the widths above the one before it.
NORM_TILES = [
    (16, 128, 16, 4), (32, 64, 32, 4), (64, 32, 64, 4), (128, 16, 128, 4), (256, 8, 256, 4), (512, 4, 512, 4),
    (1024, 2, 1024, 4), (2048, 1, 2048, 4), (4096, 1, 4096, 8), (8192, 1, 8192, 16), (16384, 1, 16384, 32),
    (32768, 1, 32768, 32),
]  # fmt: skip
# The widest row that each direction holds.
NORM_WIDEST = {
    "layer_norm": {"forward": 16384, "backward": 8192},
    "rms_norm": {"forward": 32768, "backward": 8192},
}
# (the widest row, elements of a tile, warps).
SOFTMAX_TILES = [(2048, 2048, 4), (4096, 4096, 8), (8192, 8192, 16), (16384, 16384, 32), (32768, 32768, 32)]
SOFTMAX_WIDEST = {"forward": 32768, "backward": 16384}
SOFTMAX_CHUNKS = (8192, 16)
QUANTIZE_TILES = [(4096, 4096, 4), (8192, 8192, 8), (16384, 16384, 16)]


def boundaries(rows):
    """(width, row) around each bound, where a row serves the widths from the bound before it on."""
    bounds = [row[0] for row in rows]
    for width in sorted({1, *(bound + step for bound in bounds for step in (-1, 0, 1))}):
        if width <= bounds[-1]:
            yield width, next(row for row in rows if width <= row[0])


def test_the_tiles_of_norms():
    from gptkern.backends.triton.norms import backward_tile, held_tile

    for width, (_, *expected) in boundaries(NORM_TILES):
        assert held_tile(width) == tuple(expected), width
    # 16 bytes of an operand for each of 1024 threads, and whole rows of what is wider.
    for dtype, elements in ((torch.bfloat16, 8192), (torch.float32, 4096), (torch.float64, 2048)):
        for width in (1, 16, 17, 1024, 1025, 2048, 4096, 8192):
            block = max(16, 1 << (width - 1).bit_length())
            assert backward_tile(width, dtype) == (max(elements // block, 1), block, 32), (width, dtype)
    for operator, widest in NORM_WIDEST.items():
        assert widest == dispatch.load("triton", operator).REGISTER_WIDTH


def test_the_tiles_of_a_softmax_over_rows():
    tile = dispatch.load("triton", "softmax").tile
    for direction, widest in SOFTMAX_WIDEST.items():
        for width, (bound, elements, warps) in boundaries(SOFTMAX_TILES):
            for dtype, double in ((torch.float32, 1), (torch.float64, 2)):
                # A float64 row counts as one of twice its width.
                if width % double or bound > widest:
                    continue
                block = 1 << (width // double - 1).bit_length()
                expected = (max(1, elements // (block * double)), block, warps, False)
                assert tile(direction, 1, width // double, 2**20, dtype, CPU) == expected, (direction, width)
        for width, dtype, double in ((widest + 1, torch.float32, 1), (widest // 2 + 1, torch.float64, 2)):
            chunk, warps = SOFTMAX_CHUNKS
            assert tile(direction, 1, width, 2**20, dtype, CPU) == (1, chunk // double, warps, True)


def test_the_tiles_of_quantized_rows():
    from gptkern.backends.triton import quantize

    assert QUANTIZE_TILES[-1][0] == quantize.WIDEST
    for width, (_, elements, warps) in boundaries(QUANTIZE_TILES):
        block = 1 << (width - 1).bit_length()
        assert quantize._tile(width, 2**20) == (elements // block, block, warps), width
    # Few rows take fewer warps.
    assert quantize._tile(1024, 1) == (1, 1024, 1)
    assert quantize._tile(8192, 1) == (1, 8192, 8)


# --- Grids ------------------------------------------------------------------------------------------------------------

# Of a grid's first dimension and of its others (CUDA C++ Programming Guide).
GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Watched:
    """Takes the place of a kernel: notes the grid, and starts nothing."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


@pytest.fixture
def grids(monkeypatch):
    """grids(operator) -> the grids of what is launched from then on, on a GPU of more multiprocessors than any has."""
    from gptkern.backends.triton import norms, quantize

    monkeypatch.setattr(norms, "programs_of", lambda device, num_warps: 1000)

    def watch(operator):
        found = []
        kernels = dispatch.load("triton", operator)
        modules = [kernels, norms, quantize, getattr(kernels, "triton_backward", None)]
        for module in filter(None, modules):
            for name in vars(module):
                if name.endswith("_kernel"):
                    monkeypatch.setattr(module, name, Watched(found))
        return found

    return watch


def meta(*shape, dtype=torch.bfloat16):
    """A tensor of a shape that no memory holds."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(operator, rows, width, dtype=torch.bfloat16):
    contract = operators.contract(operator)
    x, weight = meta(rows, width, dtype=dtype), meta(width, dtype=dtype)
    if operator == "layer_norm":
        call = contract.Call(x, x, weight, weight, 1e-5)
        return call, contract.Gradient(x, x, meta(2, rows, dtype=torch.float32), True, True, True)
    gradient = contract.Gradient(x, x, meta(rows, dtype=torch.float32), True, True)
    return contract.Call(x, x, weight, 1e-5), gradient


def _softmax(shape, dim):
    contract = operators.contract("softmax")
    x = meta(*shape)
    return contract.Call(x, dim, None, 1.0, None, False), contract.Gradient(x, x, torch.bfloat16)


def _int8_linear(M, N, K, mode):
    contract = operators.contract("int8_linear")
    call = contract.Call(
        meta(M, K), meta(N, K, dtype=torch.int8), meta(N, dtype=torch.float32), meta(N), "gelu", mode
    )  # fmt: skip
    return call, contract.Gradient(meta(M, N), True, True)


def _quantize_int8(rows, width):
    return operators.contract("quantize_int8").Call(meta(rows, width), 1), None


def _rotary(batch, heads, length):
    contract = operators.contract("rotary")
    x, angles = meta(batch, heads, length, 64), meta(length, 32)
    return contract.Call(x, angles, angles, 64, False), contract.Gradient(x)


def _attention(batch, heads, length_q, length_k):
    contract = operators.contract("attention")
    query, key = meta(batch, heads, length_q, 64), meta(batch, heads, length_k, 64)
    lse = meta(batch, heads, length_q, dtype=torch.float32)
    call = contract.Call(query, key, key, True, 0.125, None, 0.0, False, None)
    return call, contract.Gradient(query, query, lse, True, True, True)


# More rows, columns, heads or sequences than a grid's second dimension counts tiles of, each in turn.
MANY = 2**23
LAUNCHES = {
    "layer_norm, rows": ("layer_norm", _norm("layer_norm", 128 * MANY, 8)),
    "layer_norm, wide rows": ("layer_norm", _norm("layer_norm", MANY, 65536)),
    "layer_norm, width": ("layer_norm", _norm("layer_norm", 3, 256 * MANY - 8192)),
    "rms_norm, rows": ("rms_norm", _norm("rms_norm", 128 * MANY, 8)),
    "rms_norm, wide rows": ("rms_norm", _norm("rms_norm", MANY, 65536)),
    "rms_norm, width": ("rms_norm", _norm("rms_norm", 3, 256 * MANY - 8192, torch.float32)),
    "softmax, rows": ("softmax", _softmax((128 * MANY, 8), 1)),
    "softmax, width": ("softmax", _softmax((2, 128 * MANY), 1)),
    "softmax, columns": ("softmax", _softmax((8, 128 * MANY), 0)),
    "softmax, outer": ("softmax", _softmax((MANY, 8, 16), 1)),
    "int8_linear, rows": ("int8_linear", _int8_linear(MANY, 64, 64, "w8a8")),
    "int8_linear, columns": ("int8_linear", _int8_linear(64, MANY, 64, "w8a16")),
    "quantize_int8, rows": ("quantize_int8", _quantize_int8(128 * MANY, 8)),
    "quantize_int8, wide rows": ("quantize_int8", _quantize_int8(MANY, 65536)),
    "rotary, length": ("rotary", _rotary(1, 8, 8 * MANY)),
    "rotary, batch": ("rotary", _rotary(MANY, 8, 8)),
    "attention, length": ("attention", _attention(1, 2, 64 * MANY, 64 * MANY)),
    "attention, batch": ("attention", _attention(MANY, 8, 8, 8)),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_no_grid_passes_cudas_limits(grids, name):
    operator, (call, gradient) = LAUNCHES[name]
    kernels = dispatch.load("triton", operator)
    assert kernels.unsupported(call) is None
    found = grids(operator)
    kernels.forward(call)
    if gradient is not None:
        kernels.backward(gradient, call)
    assert found and all(math.prod(grid) > 0 for grid in found)
    for grid in found:
        assert all(size <= limit for size, limit in zip(grid, GRID_LIMITS)), f"{name}: {grid}"
