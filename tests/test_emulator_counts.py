"""What the emulator counts, against numbers worked out by hand: bytes, sectors, bank conflicts and instructions."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import DEVICE
from cuda_modules import address, aligned, module

from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

ALL = 0xFFFFFFFF


def counted(name: str, *arguments, regions: dict | None = None, seed: int = 1) -> dict:
    kernels = module("counted")
    kernels.set_seed(seed)
    kernels.start_counting({n: (address(array), array.nbytes) for n, array in (regions or {}).items()})
    try:
        getattr(kernels, name)(*arguments)
    finally:
        counts = kernels.stop_counting()
    (kernel,) = counts
    # The kernel that was launched, with its template arguments.
    assert kernel.startswith("testing::") and "_kernel" in kernel
    return counts[kernel]


@pytest.mark.parametrize(
    ("size", "stride", "offset", "mask", "sectors", "size_loaded"),
    [
        (4, 4, 0, ALL, 4, 128),
        (16, 16, 0, ALL, 16, 512),
        (2, 2, 0, ALL, 2, 64),
        (4, 8, 0, ALL, 8, 128),  # every other value
        (4, 4, 4, ALL, 5, 128),  # a row that begins inside a sector
        (16, 16, 16, ALL, 17, 512),
        (16, 16, 32, ALL, 16, 512),
        (4, 32, 0, ALL, 32, 128),  # a sector for each lane
        (1, 1, 0, ALL, 1, 32),
        (4, 0, 0, ALL, 1, 4),  # all lanes read the same value: it moves once
        (4, 4, 0, 0xFF, 1, 32),  # eight lanes
        (8, 8, 0, 0xF, 1, 32),
        (16, 16, 0, 1 << 31, 1, 16),
    ],
)
def test_sectors_and_bytes(size, stride, offset, mask, sectors, size_loaded):
    source, out = aligned(4096, dtype=np.uint8), aligned(4096, dtype=np.uint8)
    arguments = (address(source), address(out), size, stride, offset, mask)
    counts = counted("global_", *arguments, regions={"in": source, "out": out})
    assert counts["load"] == {"requests": 1, "bytes": size_loaded, "sectors": sectors}
    assert counts["store"]["requests"] == 1 and counts["store"]["bytes"] == size * bin(mask).count("1")
    assert counts["regions"]["in"]["loaded"] == size_loaded and counts["regions"]["in"]["stored"] == 0
    assert counts["regions"]["in"]["loaded_sectors"] == sectors
    assert counts["regions"]["out"]["stored"] == counts["store"]["bytes"] and counts["regions"]["out"]["loaded"] == 0


@pytest.mark.parametrize(
    ("size", "stride", "mask", "least", "wavefronts"),
    [
        (4, 4, ALL, 1, 1),
        (4, 8, ALL, 1, 2),  # two lanes a bank
        (4, 32, ALL, 1, 8),
        (4, 128, ALL, 1, 32),
        (4, 132, ALL, 1, 1),  # padded
        (4, 0, ALL, 1, 1),  # one word, handed to all
        (2, 2, ALL, 1, 1),  # two lanes a word
        (2, 4, ALL, 1, 1),
        (2, 128, ALL, 1, 32),
        (8, 8, ALL, 2, 2),  # half a warp in one go
        (8, 16, ALL, 2, 4),
        (8, 64, ALL, 2, 16),
        (16, 16, ALL, 4, 4),  # a quarter of the warp
        (16, 32, ALL, 4, 8),
        (16, 128, ALL, 4, 32),
        (16, 144, ALL, 4, 4),  # rows of 128 bytes, padded by 16
        (16, 128, 0xFF, 1, 8),  # the other quarters take no time
        (16, 16, 0x01010101, 4, 4),  # one lane in each quarter
        (4, 8, 0xFFFF, 1, 1),
    ],
)
def test_bank_conflicts(size, stride, mask, least, wavefronts):
    counts = counted("shared", size, stride, mask)
    expected = {"requests": 1, "wavefronts": wavefronts, "least": least}
    assert counts["shared_load"] == expected
    if stride >= size:
        assert counts["shared_store"] == expected


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (32, 8), (64, 16), (128, 32), (144, 4), (48, 4), (272, 4)])
def test_bank_conflicts_of_ldmatrix(stride, wavefronts):
    assert counted("matrix", stride)["ldmatrix"] == {"requests": 1, "wavefronts": wavefronts, "least": 4}


def test_asynchronous_copies():
    source = aligned(512, dtype=np.uint8)
    counts = counted("async_", address(source), 16, ALL, regions={"in": source})
    assert counts["async"] == {"requests": 1, "bytes": 512, "sectors": 16}
    assert counts["async_store"] == {"requests": 1, "wavefronts": 4, "least": 4}
    assert counts["regions"]["in"]["loaded"] == 512
    # Lanes out of range read nothing and still write zeros.
    counts = counted("async_", address(source), 128, 0xFF)
    assert counts["async"] == {"requests": 1, "bytes": 128, "sectors": 4}
    assert counts["async_store"] == {"requests": 1, "wavefronts": 32, "least": 4}
    counts = counted("async_", address(source), 16, 0)
    assert counts["async"] == {"requests": 0, "bytes": 0, "sectors": 0}


@pytest.mark.parametrize("seed", range(6))
def test_instructions(seed):
    out = aligned(1)
    counts = counted("instructions", address(out), 3, 64, 5, 4, 7, seed=seed)
    assert (counts["launches"], counts["blocks"]) == (1, 3)
    # Of each of 3 blocks' 2 warps; a barrier is the block's.
    assert (counts["mma_16bit"], counts["mma_int8"], counts["shuffles"]) == (3 * 2 * 5, 3 * 2 * 6, 3 * 2 * 7)
    assert counts["barriers"] == 3 * 4
    # All lanes add to one value.
    assert counts["atomic"] == {"requests": 6, "bytes": 24, "sectors": 6}


def test_counts_do_not_depend_on_the_schedule():
    source, out = aligned(4096, dtype=np.uint8), aligned(4096, dtype=np.uint8)
    arguments = (address(source), address(out), 4, 8, 4, 0x0FF00FF3)
    first = counted("global_", *arguments, seed=0)
    assert all(counted("global_", *arguments, seed=seed) == first for seed in range(1, 12))


def test_kernels_are_counted_apart_and_only_while_asked():
    kernels, source = module("counted"), aligned(512, dtype=np.uint8)
    kernels.matrix(16)
    kernels.start_counting({})
    kernels.matrix(16)
    kernels.matrix(16)
    kernels.async_(address(source), 16, ALL)
    counts = kernels.stop_counting()
    kernels.matrix(16)
    assert {name.removeprefix("testing::"): c["launches"] for name, c in counts.items()} == {
        "matrix_kernel": 2,
        "async_kernel": 1,
    }
    kernels.start_counting({})
    assert kernels.stop_counting() == {}
