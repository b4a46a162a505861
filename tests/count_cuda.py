"""Counts what the CUDA kernels do, under the emulator: bytes, sectors, bank conflicts and matrix instructions.

    python tests/count_cuda.py      the table docs/cuda_counters.md, on the standard output

These are facts of the kernels as they are written, not measurements: they need no GPU, and hold on every one. The cases
are those that the rooms' problems name (`counted`); each is a call of the twin, forward and backward, and what the
launchers ran is counted.

What is counted:
    bytes       that a warp's request touches in global memory, each once. What is read again later counts again.
    least       of the large tensors, which have as many elements as the largest of the call: each byte of them that the
                result depends on, once. Weights, biases, statistics and scales are small, are read by every block, and
                count apart. (Of int8_linear with few rows the weight is what is large.)
    sectors     32 bytes each, what a request moves; a full request of 16 bytes a lane has 16
    conflicts   rounds of shared memory beyond those that the request's bytes take
    matrix      instructions, over the products of the operator divided by the products of one instruction
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

import gptkern
from gptkern import operators
from gptkern.backends.cuda import common, emulated, sources
from gptkern.backends.problem import BACKWARD, FORWARD, Counted

# Products (multiply and add) of one instruction: m16n8k16 and m16n8k32.
PRODUCTS = {"mma_16bit": 16 * 8 * 16, "mma_int8": 16 * 8 * 32}
ACCESSES = ("load", "store", "atomic", "async")
SHARED = ("shared_load", "shared_store", "ldmatrix", "async_store")


class Case(NamedTuple):
    operator: str
    of: Counted

    @property
    def problem(self):
        return operators.problem(self.operator)

    @property
    def shape(self) -> str:
        """As the table shows it: "1x1x512x128 bfloat16, causal"."""
        sizes, dtype = self.of.sizes, str(self.of.dtype).removeprefix("torch.")
        return f"{self.problem.label(sizes)} {', '.join([dtype, *_words(sizes)])}"

    def products(self, direction: str) -> int | None:
        """Multiplications of the operator."""
        return self.problem.products(self.of.sizes, direction)


def _words(sizes: NamedTuple) -> Iterator[str]:
    """What the numbers of a label do not say: "causal", "bool mask", "w8a8", "not packed", "dim 1"."""
    defaults = sizes._field_defaults
    for name, value in sizes._asdict().items():
        name, default = name.removeprefix("is_"), defaults.get(name)
        if isinstance(value, str):
            yield f"{value} {name}" if name in defaults else value
        elif isinstance(value, bool):
            if value != bool(default):
                yield name if value else f"not {name}"
        elif default is not None and value != default:
            yield f"{name} {value}"


# Of the operators that have kernels in CUDA C++.
WITH_KERNELS = [name for name in operators.NAMES if (sources.folder() / name / "launchers.h").is_file()]
CASES = [Case(name, counted) for name in WITH_KERNELS for counted in operators.problem(name).counted]


class Record(NamedTuple):
    """What one call of a launcher did."""

    launcher: str
    direction: str
    kernels: dict[str, dict[str, Any]]
    large_moved: int  # bytes of large tensors, loaded and stored
    large_least: int

    def total(self, *keys: str) -> int:
        found = 0
        for counts in self.kernels.values():
            value = counts
            for key in keys:
                value = value[key]
            found += value
        return found

    @property
    def bytes_ratio(self) -> float | None:
        return self.large_moved / self.large_least if self.large_least else None

    def conflicts(self, *kinds: str) -> int:
        return sum(self.total(kind, "wavefronts") - self.total(kind, "least") for kind in kinds or SHARED)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


@contextlib.contextmanager
def _counting(calls: list) -> Iterator[None]:
    """Adds (launcher, kernels, tensors) to `calls` for every launcher that runs; tensors: name -> tensor."""
    address, call = common.address, common.call
    tensors: dict[int, torch.Tensor] = {}

    def note(tensor):
        if tensor is not None and tensor.numel():
            known = tensors.get(tensor.data_ptr())
            if known is None or known.numel() < tensor.numel():
                tensors[tensor.data_ptr()] = tensor

    def noted_address(tensor):
        note(tensor)
        return address(tensor)

    def counted_call(name, tensor, *arguments):
        module = common.library(tensor)
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                note(argument)
        named = {f"{i}": tensor for i, tensor in enumerate(tensors.values())}
        tensors.clear()
        module.start_counting({name: _extent(tensor) for name, tensor in named.items()})
        try:
            return call(name, tensor, *arguments)
        finally:
            calls.append((name, module.stop_counting(), named))

    common.address, common.call = noted_address, counted_call
    try:
        yield
    finally:
        common.address, common.call = address, call


@functools.cache
def counted(index: int) -> list[Record]:
    """`count` of CASES[index], once in a process."""
    return count(CASES[index])


def count(case: Case) -> list[Record]:
    """One record for each launcher that the case's forward and backward called."""
    sizes, dtype, limit, backward = case.of
    made = case.problem.inputs(sizes, dtype, torch.Generator().manual_seed(0))
    tensors = {name: tensor.detach().requires_grad_(backward) for name, tensor in made.tensors.items()}
    large = None if limit is None else max(tensor.numel() for tensor in made.arguments)
    records = []
    emulated.load().set_seed(1)
    with gptkern.backend("cuda"):
        for direction in (FORWARD, BACKWARD) if backward else (FORWARD,):
            calls: list = []
            with _counting(calls):
                if direction == FORWARD:
                    result = operators.contract(case.operator).TWIN(**tensors, **made.constants, **made.options)
                    result = result[0] if isinstance(result, tuple) else result
                else:
                    result.backward(torch.randn_like(result))
            for launcher, kernels, touched in calls:
                moved, least = _large(large, kernels, touched) if large else (0, 0)
                if large and (of_the_problem := case.problem.least(sizes, dtype.itemsize, direction)) is not None:
                    least = of_the_problem
                records.append(Record(launcher, direction, kernels, moved, least))
    return records


def _large(elements: int, kernels: dict, tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """(bytes moved of tensors with so many elements or more, bytes that they have)"""
    moved = least = 0
    for name, tensor in tensors.items():
        if tensor.numel() < elements:
            continue
        for counts in kernels.values():
            region = counts["regions"].get(name, {"loaded": 0, "stored": 0})
            moved += region["loaded"] + region["stored"]
        least += tensor.numel() * tensor.element_size()
    return moved, least


# --- The table --------------------------------------------------------------------------------------------------------


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def rows_of(index: int) -> Iterator[str]:
    """The table's lines of CASES[index]."""
    case = CASES[index]
    for record in counted(index):
        products = case.products(record.direction)
        executed = sum(record.total(kind) * each for kind, each in PRODUCTS.items())
        # A backward may be several launchers: each does its part of the products.
        for place, (kernel, counts) in enumerate(record.kernels.items()):
            requests = sum(counts[kind]["requests"] for kind in ACCESSES)
            sectors = sum(counts[kind]["sectors"] for kind in ACCESSES)
            size = sum(counts[kind]["bytes"] for kind in ACCESSES)
            conflicts = sum(counts[kind]["wavefronts"] - counts[kind]["least"] for kind in SHARED)
            matrix = sum(counts[kind] for kind in PRODUCTS)
            cells = [
                case.shape if place == 0 else "",
                f"`{kernel}`",
                f"{size:,}",
                ratio(record.bytes_ratio) if place == 0 else "",
                f"{sectors / requests:.1f}" if requests else "",
                f"{conflicts:,}",
                f"{matrix:,}" if matrix else "",
                ratio(executed / products) if products and executed and place == 0 else "",
            ]
            yield f"| {' | '.join(cells)} |"


def table() -> str:
    columns = ("shape", "kernel", "bytes", "over the least", "sectors per request", "bank conflicts",
               "matrix instructions", "over the least")  # fmt: skip
    lines = [
        "# What the CUDA kernels do",
        "",
        "Made by `make tables`. The emulator counts these while it runs the kernels on a CPU; they are facts of the",
        "code, the same on every GPU, and `tests/test_cuda_counters.py` holds their limits. Caches are not part of it.",
        "",
        "- Bytes are all that a kernel's requests touch in global memory.",
        "- Over the least: bytes of the large tensors (input, output and their gradients; W8A16: the weight), over",
        "  each of their bytes once. Weights, biases and statistics are not among them.",
        "- A request is an instruction of a warp and a sector 32 bytes: 16 bytes a lane, side by side, are 16 sectors.",
        "- Bank conflicts are rounds of shared memory beyond those that the bytes take.",
        "- Matrix instructions over the least: against the operator's multiplications; under a causal mask, those",
        "  of the triangle.",
        "",
        "What is over the least is that of all kernels of a launcher together, and stands in the line of the first.",
    ]
    for operator in dict.fromkeys(case.operator for case in CASES):
        lines += ["", f"## {operator}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for index, case in enumerate(CASES):
            if case.operator == operator:
                lines += rows_of(index)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    os.environ["GPTKERN_EMULATE_CUDA"] = "1"
    print(table(), end="")
