"""What the emulator must refuse: each broken kernel of tests/cuda/broken.cu, by the check meant for it.

Beside each stands its sound twin, which runs under many schedules and gives bitwise the same result in all of them.
"""

from __future__ import annotations

import platform
import re
import threading
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from conftest import DEVICE
from cuda_modules import FOLDER, address, aligned, aligned_copy, module, module_by_swapcontext

from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

SEEDS = range(20)
VALUES = np.random.default_rng(0).standard_normal((4096,)).astype(np.float32)


class Kernel(NamedTuple):
    outputs: int  # float32 values that it writes
    takes_input: bool = True
    arguments: tuple[int, ...] = ()  # before `broken`


KERNELS = {
    "transpose": Kernel(1024),
    "staged_sum": Kernel(512, arguments=(5,)),
    "tail": Kernel(300, arguments=(300,)),
    "misaligned": Kernel(128),
    "divergent": Kernel(128, takes_input=False),
    "missing_lane": Kernel(32),
    "unwritten": Kernel(32),
    "beyond_shared": Kernel(128),
    "small_layout": Kernel(32),
    "warp_exchange": Kernel(32),
    "block_total": Kernel(256),
    "halves": Kernel(16, takes_input=False),
}


class Run:
    """One launch: bounds are the arrays that it is given, and beyond each lies memory that nobody may touch."""

    def __init__(self, name: str, broken: int, seed: int, kernels: ModuleType | None = None):
        kernels, (outputs, takes_input, arguments) = kernels or module("broken"), KERNELS[name]
        source = aligned_copy(VALUES[: 300 if name == "tail" else len(VALUES)])
        self.out = aligned(outputs, beyond=64)
        arrays = [source, self.out] if takes_input else [self.out]
        kernels.set_seed(seed)
        kernels.set_bounds([(address(array), address(array) + array.nbytes) for array in arrays])
        try:
            getattr(kernels, name)(*map(address, arrays), *arguments, broken)
        finally:
            kernels.set_bounds([])


@pytest.mark.parametrize("name", KERNELS)
def test_a_sound_kernel_gives_the_same_under_every_schedule(name):
    first = Run(name, 0, 0).out
    if name != "halves":  # whose numbers are not floats
        assert not np.isnan(first).any()
    for seed in SEEDS:
        assert Run(name, 0, seed).out.tobytes() == first.tobytes(), f"seed {seed}"


def place(text: str) -> str:
    """A regular expression for the place of the line of broken.cu that has the text."""
    lines = [i for i, line in enumerate((FOLDER / "broken.cu").read_text().splitlines(), 1) if text in line]
    assert len(lines) == 1, f"{text!r} stands in {len(lines)} lines"
    return rf"broken\.cu:{lines[0]}\b"


RACE = "a race in shared memory: nothing orders the"
# (kernel, broken, what the message says)
CAUGHT = [
    ("transpose", 1, RACE),
    ("staged_sum", 1, r"is writing: no cp_async_wait has covered it"),
    ("staged_sum", 2, r"is writing: no cp_async_wait has covered it"),
    ("staged_sum", 3, RACE + "|is writing: no cp_async_wait has covered it"),
    ("staged_sum", 4, RACE + " cp_async .* and the load|is writing: no cp_async_wait"),
    ("staged_sum", 5, "the thread ends while asynchronous copies are under way: a cp_async_wait is missing"),
    ("tail", 1, "load of 4 bytes at .*: the address is outside of the launcher's tensors"),
    ("tail", 2, "store of 4 bytes at .*: the address is outside of the launcher's tensors"),
    ("tail", 3, "load of 4 bytes at .*: the address is outside of the launcher's tensors"),
    ("tail", 4, "load of 16 bytes at .*: the address is (outside of the launcher's tensors|not aligned)"),
    ("misaligned", 1, "load of 16 bytes at .*: the address is not aligned to them"),
    ("misaligned", 2, "store of 16 bytes at .*: the address is not aligned to them"),
    ("misaligned", 3, "store of 16 bytes at .*: the address is not aligned to them"),
    ("misaligned", 4, "cp_async from global memory of 16 bytes at .*: the address is not aligned to them"),
    ("misaligned", 5, "cp_async to shared memory of 16 bytes at .*: the address is not aligned to them"),
    ("misaligned", 6, "ldmatrix of 16 bytes at .*: the address is not aligned to them"),
    ("divergent", 1, r"divergent barrier: the block's threads wait at broken\.cu:\d+ and at broken\.cu:\d+"),
    (
        "divergent",
        2,
        r"deadlock: 64 threads \(64 … 127\) have finished; 64 threads \(0 … 63\) wait for __syncthr",
    ),
    (
        "divergent",
        3,
        r"deadlock: 1 threads \(70 … 70\) have finished; 127 threads \(0 … 127\) wait for __syncth",
    ),
    ("missing_lane", 1, r"deadlock: 1 threads \(5 … 5\) have finished; 31 threads \(0 … 31\) wait for shuffle_xor at "),
    (
        "missing_lane",
        2,
        r"deadlock: 1 threads \(5 … 5\) wait for shuffle at .*; 31 threads .* wait for shuffle_xor",
    ),
    (
        "missing_lane",
        3,
        r"deadlock: 16 threads \(0 … 15\) wait for shuffle_xor at .*; 16 threads .* for shuffle_xor",
    ),
    ("beyond_shared", 1, "store of 16 bytes at .*: the address is outside of the block's shared memory"),
    ("beyond_shared", 2, "load of 16 bytes at .*: the address is outside of the block's shared memory"),
    ("beyond_shared", 3, "cp_async of 16 bytes at .*: the address is outside of the block's shared memory"),
    ("beyond_shared", 4, "ldmatrix of 16 bytes at .*: the address is outside of the block's shared memory"),
    ("beyond_shared", 5, "load at .*: a global access to shared memory"),
    ("small_layout", 1, "the kernel lays out 4224 bytes of shared memory and was launched with 4223"),
    ("warp_exchange", 1, RACE),
    ("warp_exchange", 2, RACE),
    ("warp_exchange", 3, RACE),
    ("block_total", 1, RACE),
    ("halves", 1, RACE),
]


@pytest.mark.parametrize(("name", "broken", "message"), CAUGHT, ids=[f"{name} {broken}" for name, broken, _ in CAUGHT])
def test_a_broken_kernel_is_caught_under_every_schedule(name, broken, message):
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=message) as raised:
            Run(name, broken, seed)
        # The kernel, its configuration and the schedule that repeats it are named.
        launch = r"testing::\w+_kernel, grid \(\d+, 1, 1\), (32|128) threads, \d+ bytes of shared memory"
        assert re.search(rf"seed {seed} \({launch}\)", str(raised.value))
    # What failed left nothing behind.
    assert Run(name, 0, 1).out.tobytes() == Run(name, 0, 2).out.tobytes()


def test_the_report_names_the_places():
    with pytest.raises(RuntimeError) as raised:
        Run("transpose", 1, 0)
    stored, loaded = place("store_shared(&shared.values[i / 32][i % 32]"), place("load_shared(&shared.values[i % 32]")
    assert re.search(rf"nothing orders the load at {loaded} \(thread \d+\) and the store at {stored} \(thread \d+\)|"
                     rf"nothing orders the store at {stored} \(thread \d+\) and the load at {loaded} \(thread \d+\)",
                     str(raised.value))  # fmt: skip
    with pytest.raises(RuntimeError, match=place("value = shuffle(value, 3);")):
        Run("missing_lane", 2, 3)


def test_shared_memory_that_nobody_wrote_is_nan():
    for seed in SEEDS:
        out = Run("unwritten", 1, seed).out
        assert np.isnan(out[31 - 7]) and np.isnan(out).sum() == 1


# --- Global memory ----------------------------------------------------------------------------------------------------


def global_order(broken: int, seed: int, blocks: int = 3) -> tuple[np.ndarray, float]:
    kernels = module("broken")
    out, total = aligned(blocks, 128), aligned_copy(np.zeros(1, np.float32))
    kernels.set_seed(seed)
    kernels.global_order(address(out), address(total), blocks, broken)
    return out, float(total[0])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (1, "load_global at .*: the kernel itself wrote that memory, at .*; load_global_written reads it"),
        (2, r"a race in global memory: block \d's store at .* and block \d's store at "),
        (3, r"a race in global memory: block \d's load at .* and block \d's store at "),
        (4, "a race in global memory: nothing orders the (load|store) at .* and the store at "),
        (5, "a race in global memory: nothing orders the load at .* and the store at "),
    ],
)
def test_races_in_global_memory(broken, message):
    caught = 0
    for seed in SEEDS:
        out, total = global_order(0, seed)
        assert (out == np.arange(128)).all() and total == 3 * np.arange(128).sum()
        try:
            global_order(broken, seed)
        except RuntimeError as error:
            assert re.search(message, str(error))
            caught += 1
    # Stores are remembered and loads are not: a load that comes before the store needs the schedule's help.
    assert caught == len(SEEDS) if broken != 5 else caught >= len(SEEDS) // 2


# --- Schedules --------------------------------------------------------------------------------------------------------
# With the check of races switched off the schedule alone has to show the fault, in a wrong result.

# (kernel, broken) -> schedules of 100 that show it, as counted when this was written.
SHOWN = {
    ("transpose", 1): 100,
    ("staged_sum", 1): 100,
    ("staged_sum", 2): 100,
    ("staged_sum", 3): 100,
    ("staged_sum", 4): 100,
    ("warp_exchange", 1): 100,
    ("warp_exchange", 3): 100,
    ("halves", 1): 100,
    # A warp has to get ahead of another by a whole reduction: every other seed lets warps run ahead.
    ("block_total", 1): 50,
    # The emulator's shuffle is a meeting of all lanes, so no schedule can show that it orders no memory.
    ("warp_exchange", 2): 0,
}


def shown(name: str, broken: int, seeds) -> int:
    kernels = module("broken")
    expected = Run(name, 0, 0).out.tobytes()
    kernels.check_races(False)
    try:
        return sum(Run(name, broken, seed).out.tobytes() != expected for seed in seeds)
    finally:
        kernels.check_races(True)


@pytest.mark.parametrize(("name", "broken"), SHOWN)
def test_a_schedule_shows_a_missing_barrier(name, broken):
    count = shown(name, broken, range(1, 41))
    assert count >= 0.35 * SHOWN[name, broken]
    if SHOWN[name, broken] == 0:
        assert count == 0


def test_a_seed_repeats_its_schedule():
    kernels = module("broken")
    kernels.check_races(False)
    try:
        results = [[Run("staged_sum", 3, seed).out.tobytes() for seed in range(1, 9)] for _ in range(2)]
    finally:
        kernels.check_races(True)
    assert results[0] == results[1]
    assert len(set(results[0])) > 1  # another seed, another schedule


# --- Other processors -------------------------------------------------------------------------------------------------


def test_the_switch_of_other_processors():
    """swapcontext, built here whatever the processor: the same schedules, results and reports."""
    kernels = module_by_swapcontext("broken")
    assert b"swapcontext" in Path(kernels.__file__).read_bytes()
    if platform.machine() == "x86_64":
        assert b"swapcontext" not in Path(module("broken").__file__).read_bytes()
    for seed in range(4):
        for name in KERNELS:
            assert Run(name, 0, seed, kernels).out.tobytes() == Run(name, 0, seed).out.tobytes(), name
        for name, broken, message in CAUGHT:
            # The fibers of a launch that fails are left where they stand.
            with pytest.raises(RuntimeError, match=message) as here:
                Run(name, broken, seed, kernels)
            with pytest.raises(RuntimeError) as there:
                Run(name, broken, seed)
            assert str(here.value) == str(there.value)


# --- Launching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes"),
    [
        ((1, 1), 33, 0),
        ((1, 1), 0, 0),
        ((1, 1), 1056, 0),
        ((1, 65536), 32, 0),
        ((2**31, 1), 32, 0),
        ((2**32 + 1, 1), 32, 0),
        ((-1, 1), 32, 0),
        ((1, 1), 32, 232449),
    ],
)
def test_an_impossible_launch_is_an_exception(grid, threads, shared_bytes):
    kernels, out = module("broken"), aligned(1)
    with pytest.raises(RuntimeError, match="a launch failed: invalid configuration") as raised:
        kernels.launched_with(address(out), *grid, threads, shared_bytes)
    assert f"(testing::empty_kernel, grid ({grid[0]}, {grid[1]}, 1), {threads} threads, {shared_bytes} bytes" in str(
        raised.value
    )
    kernels.launched_with(address(out), 1, 1, 32, 0)


def test_an_empty_grid_launches_nothing():
    out = aligned(1)
    module("broken").launched_with(address(out), 0, 1, 32, 0)
    assert np.isnan(out[0])


def test_several_threads_may_launch():
    kernels, failures = module("broken"), []

    def work():
        out = aligned(1)
        for _ in range(50):
            out[0] = 0
            kernels.launched_with(address(out), 1, 1, 32, 128)
            if out[0] != 1:
                failures.append(out[0])

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
