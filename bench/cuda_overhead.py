"""Host time of the CUDA launchers: what Python of ours adds to the bound function and to the allocations.

    python bench/cuda_overhead.py           a table in microseconds; needs a C++ compiler and no GPU

For each CUDA launcher, on the smallest cells of `gptkern bench`:
    whole           the launcher, as the registered op calls it
    bound           the compiled module's functions with the same arguments; the emulator starts no kernel
    allocations     torch.empty of the same sizes, given one by one, which is the fastest way to call it
    ours            whole - bound - allocations

Each number is the least of many short samples, in which the three are measured in turn: other work on the machine makes
samples longer and none shorter, so the least is what the functions take. Where work never pauses for the milliseconds
that a round takes, what is printed is too much.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

os.environ["GPTKERN_EMULATE_CUDA"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
from gptkern.backends import dispatch
from gptkern.backends.cuda import common, emulated
from gptkern.measuring import costs, runner, timing

# Microseconds of ours that a launch may cost.
LIMIT = 4.0


class Allocations(TorchDispatchMode):
    """Notes what is allocated inside."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple[torch.Size, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if "empty" in function.name():
            self.made.append((result.shape, result.dtype))
        return result


def launched(operator: str, call: Callable[[], torch.Tensor]) -> dict[str, tuple]:
    """Direction -> the arguments that the operator's launcher got."""
    module, found = dispatch.load("cuda", operator), {}

    def noting(direction, launcher):
        def note(*arguments):
            found[direction] = arguments
            return launcher(*arguments)

        return mock.patch.object(module, direction, note)

    with noting("forward", module.forward), noting("backward", module.backward), gptkern.backend("cuda"):
        result = call()
        if result.requires_grad:
            result.backward(torch.ones_like(result))
    return found


def measured(launcher: Callable, arguments: tuple, rounds: int) -> tuple[float, float, float]:
    """(whole, bound, allocations) in microseconds."""
    calls, call = [], common.call

    def noting(name, tensor, *given):
        calls.append((name, given))
        return call(name, tensor, *given)

    with mock.patch.object(common, "call", noting), Allocations() as allocations:
        launcher(*arguments)
    module = emulated.load()
    functions = [(getattr(module, name), (*given, 0)) for name, given in calls]
    options = [(tuple(shape), dtype) for shape, dtype in allocations.made]
    empty = torch.empty

    def bound():
        for function, given in functions:
            function(*given)

    def allocate():
        for shape, dtype in options:
            empty(*shape, dtype=dtype)

    samples = timing.host_durations([lambda: launcher(*arguments), bound, allocate], rounds)
    return tuple(1e6 * min(sample) for sample in samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"{'launcher':44} {'whole':>7} {'bound':>7} {'alloc':>7} {'ours':>7}   µs; the limit of ours is {LIMIT}")
    emulated.load().skip_launches(True)
    operators = [name for name in runner.OPERATORS if name != "model"]
    cells = {f"{cell.operator} {cell.label}": cell for cell in runner.cells("cuda", "smoke", operators)}
    for name, cell in cells.items():
        operator = cell.operator
        try:
            found = launched(operator, costs.calls(cell)[0])
        except (ImportError, gptkern.BackendError) as error:
            print(f"{name:44} not measured: {error}")
            continue
        for direction, arguments in found.items():
            launcher = getattr(dispatch.load("cuda", operator), direction)
            with torch.no_grad():
                whole, bound, allocations = measured(launcher, arguments, rounds)
            ours = whole - bound - allocations
            print(f"{f'{name} {direction}':44} {whole:7.2f} {bound:7.2f} {allocations:7.2f} {ours:7.2f}")


if __name__ == "__main__":
    main()
