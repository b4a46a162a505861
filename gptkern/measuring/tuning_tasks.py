"""What `gptkern tune` measures: for each row of a table and each class of calls a shape, and configurations to try.

    RowTask       a row of a table of configurations: the present one against its neighbours
    ClassTask     a class of calls: the backends against each other

A problem (checking_cases.py) is built twice: small, to be checked against float64, and at the size that is timed.
A row's shape is the widest or longest that it serves, large enough to fill a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkern.backends import dispatch
from gptkern.backends.tables import configurations, shape_classes
from gptkern.measuring import checking_cases

OPERATORS = tuple(shape_classes.CLASSES)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

# Elements of an input that only memory bounds: some tens of microseconds on a large GPU.
ELEMENTS = 2**25
# Neighbours of a configuration that are tried, at most.
MOST_CANDIDATES = 12
# Bytes of shared memory that a block may have (CUDA C++ Programming Guide); other parts have the least.
SHARED_MEMORY = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024, 110: 227 * 1024}
LEAST_SHARED_MEMORY = 99 * 1024
# The least and the most of each part of a configuration that is tried.
RANGES = {
    "block_m": (16, 256), "block_n": (16, 256), "block_k": (32, 512),
    "block_rows": (1, 256), "block_width": (32, 16384), "elements": (256, 65536), "chunk": (32, 32768),
    "pairs": (128, 16384), "heads": (1, 64),
    "num_warps": (1, 32), "num_stages": (1, 6),
}  # fmt: skip
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


@dataclass(frozen=True)
class Shape:
    """A problem: the builder of gptkern.measuring.checking_cases, and its sizes."""

    builder: str
    sizes: tuple
    dtype: torch.dtype

    def build(self, generator: torch.Generator) -> checking_cases.Problem:
        return checking_cases.BUILDERS[self.builder](*self.sizes, self.dtype, generator)


@dataclass(frozen=True)
class Task:
    """What is run.

    Args:
        direction: FORWARD, BACKWARD (the forward is not timed) or BOTH.
        checked: the small shape; timed: the large one, and `on` how it is called.
        wrt: the arguments that a backward differentiates: they choose which kernels run. None: all.
        known: whether it was measured on this device before.
    """

    operator: str
    key: tuple
    direction: str
    checked: Shape
    timed: Shape
    on: str
    wrt: tuple[str, ...] | None = None
    known: bool = False


@dataclass(frozen=True)
class RowTask(Task):
    """A row of a table of configurations."""

    present: Any = None
    candidates: tuple = field(default=())

    @property
    def table(self) -> configurations.Table:
        return configurations.TABLES[self.operator]

    @property
    def name(self) -> str:
        return f"{self.operator} {configurations.described(self.table.key, self.key)}"


@dataclass(frozen=True)
class ClassTask(Task):
    """A class of calls (gptkern.backends.tables.shape_classes)."""

    @property
    def name(self) -> str:
        return f"{self.operator}, {shape_classes.described(self.operator, self.key)}"


# --- Rows of the tables ---------------------------------------------------------------------------------------------


def row_tasks(operator: str, architecture: int, rows: dict[tuple, configurations.Row]) -> list[RowTask]:
    """A task for each row of an operator's table.

    Args:
        rows: those in force, whose configurations are the present ones.
    """
    describe = _ROWS[operator]
    tasks = []
    for key, row in rows.items():
        arguments = describe(rows, *key)
        present = row.configuration
        tried = candidates(operator, key, present, architecture)
        known = bool(row.measured)
        tasks.append(RowTask(operator, key, **arguments, known=known, present=present, candidates=tried))
    return tasks


def _attention_row(rows, kernel, bits, head_dim):
    dtype = BFLOAT16 if bits == 16 else FLOAT32
    batch, heads, length = (4, 16, 2048) if bits == 16 else (1, 16, 1024)
    kind = "additive" if kernel.startswith("masked_") else True
    wrt = {"forward": (), "query": ("query",), "key_value": ("key", "value")}[kernel.removeprefix("masked_")]
    return dict(
        direction=BACKWARD if wrt else FORWARD,
        wrt=wrt,
        checked=Shape("attention", (1, 2, 1, 300, 300, head_dim, kind), dtype),
        timed=Shape("attention", (batch, heads, heads, length, length, head_dim, kind), dtype),
        on=f"{batch}x{heads}x{length}x{head_dim} {'causal' if kind is True else 'additive mask'} {_name(dtype)}",
    )


def _layer_norm_row(rows, kernel, width):
    widest = max(bound for direction, bound in rows if bound is not None and direction == _held(kernel))
    timed = 2 * widest if width is None else width
    checked = timed + 3 if width is None else max(1, width - 1)
    # Beyond the registers two kernels share the backward: what is differentiated says which one runs.
    wrt = {"forward": (), "parameters": ("weight", "bias")}.get(kernel, ("input",) if width is None else None)
    return dict(
        direction=FORWARD if kernel == "forward" else BACKWARD,
        wrt=wrt,
        checked=Shape("layer_norm", (37 if width else 5, checked, False, True), BFLOAT16),
        timed=Shape("layer_norm", (max(1, ELEMENTS // timed), timed, False, True), BFLOAT16),
        on=f"{max(1, ELEMENTS // timed)}x{timed} bfloat16",
    )


def _held(kernel: str) -> str:
    return "backward" if kernel in ("parameters", "weight") else kernel


def _rms_norm_row(rows, kernel, width):
    widest = max(bound for direction, bound in rows if bound is not None and direction == _held(kernel))
    timed = 2 * widest if width is None else width
    checked = timed + 3 if width is None else max(1, width - 1)
    wrt = {"forward": (), "weight": ("weight",)}.get(kernel, ("input",) if width is None else None)
    return dict(
        direction=FORWARD if kernel == "forward" else BACKWARD,
        wrt=wrt,
        checked=Shape("rms_norm", (37 if width else 5, checked, True), BFLOAT16),
        timed=Shape("rms_norm", (max(1, ELEMENTS // timed), timed, True), BFLOAT16),
        on=f"{max(1, ELEMENTS // timed)}x{timed} bfloat16",
    )


def _rotary_row(rows, head_dim):
    timed = 512 if head_dim is None else head_dim
    heads, length = 32, max(1, ELEMENTS // (32 * timed))
    return dict(
        direction=FORWARD,
        checked=Shape("rotary", (2, 5, 37, timed, timed, False, False), BFLOAT16),
        timed=Shape("rotary", (1, heads, length, timed, timed, False, False), BFLOAT16),
        on=f"1x{heads}x{length}x{timed} bfloat16",
    )


def _softmax_row(rows, direction, axis, width):
    widest = max(bound for *kind, bound in rows if bound is not None and kind == [direction, axis])
    timed = 2 * widest if width is None else width
    checked = timed + 3 if width is None else max(1, width - 1)
    if axis == 1:
        small, large, dim = (5, checked), (max(1, ELEMENTS // timed), timed), -1
    else:
        lanes = 1024
        small, large, dim = (2, checked, 70), (max(1, ELEMENTS // (timed * lanes)), timed, lanes), 1
    return dict(
        direction=FORWARD if direction == "forward" else BACKWARD,
        checked=Shape("softmax", (small, dim, 1.0, None, False), BFLOAT16),
        timed=Shape("softmax", (large, dim, 1.0, None, False), BFLOAT16),
        on=f"{'x'.join(map(str, large))} over {'the last' if axis == 1 else 'another'} dimension, bfloat16",
    )


def _int8_linear_row(rows, kernel, most):
    dtype = FLOAT32 if kernel == "w8a32" else BFLOAT16
    mode = "w8a8" if kernel == "w8a8" else "w8a16"
    # Few rows are most often one, of a model that generates.
    timed = 4096 if most is None else 1 if most <= 16 else most
    sizes = 1024 if dtype == FLOAT32 else 4096
    return dict(
        direction=FORWARD,
        checked=Shape("int8_linear", (200 if most is None else most - 1, 300, 200, "gelu_tanh", mode), dtype),
        timed=Shape("int8_linear", (min(timed, sizes), sizes, sizes, None, mode), dtype),
        on=f"M {min(timed, sizes)}, N {sizes}, K {sizes} {_name(dtype)}",
    )


def _quantize_int8_row(rows, width):
    widest = max(bound for (bound,) in rows if bound is not None)
    timed = 2 * widest if width is None else width
    return dict(
        direction=FORWARD,
        checked=Shape("quantize_int8", (19, timed + 3 if width is None else width - 1, -1), BFLOAT16),
        timed=Shape("quantize_int8", (max(1, ELEMENTS // timed), timed, -1), BFLOAT16),
        on=f"{max(1, ELEMENTS // timed)}x{timed} bfloat16",
    )


_ROWS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention": _attention_row,
    "layer_norm": _layer_norm_row,
    "rms_norm": _rms_norm_row,
    "rotary": _rotary_row,
    "softmax": _softmax_row,
    "int8_linear": _int8_linear_row,
    "quantize_int8": _quantize_int8_row,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- Neighbours of a configuration ----------------------------------------------------------------------------------


def candidates(operator: str, key: tuple, present: Any, architecture: int) -> tuple:
    """The neighbours of a configuration that fit the machine, at most MOST_CANDIDATES.

    Each part doubled or halved (the stages: one more or less), and with it, for another tile, the warps.
    """
    limit = SHARED_MEMORY.get(architecture, LEAST_SHARED_MEMORY)
    found: list[Any] = []
    for changes in _moves(operator, key, present):
        candidate = present._replace(**{name: _moved(name, getattr(present, name), up) for name, up in changes.items()})
        if (
            candidate != present
            and candidate not in found
            and all(_in_range(name, getattr(candidate, name)) for name in changes)
            and _sensible(operator, key, candidate)
            and shared_memory(operator, key, candidate) <= limit
        ):
            found.append(candidate)
    return tuple(found[:MOST_CANDIDATES])


def _moves(operator: str, key: tuple, present: Any) -> Iterator[dict[str, bool]]:
    """{part: up or down}, for one part or several at once."""
    parts = [name for name in present._fields if getattr(present, name) is not None and _free(operator, key, name)]
    tile = [name for name in parts if name not in ("num_warps", "num_stages")]
    for name in parts:
        yield {name: True}
        yield {name: False}
    for up in (True, False):
        for name in tile:
            yield {name: up, "num_warps": up}
        if len(tile) > 1:
            yield dict.fromkeys(tile, up)
        if operator == "softmax" and len(tile) > 1:
            yield dict.fromkeys((*tile, "num_warps"), up)


def _free(operator: str, key: tuple, name: str) -> bool:
    """Whether a part of this row's configuration may change: a whole row's tile is as wide as the row."""
    if operator in ("layer_norm", "rms_norm"):
        *_, width = key
        if name == "block_width":
            return width is None
        if name == "block_rows":
            return width is not None or key[0] in ("parameters", "weight")
    return True


def _moved(name: str, value: int, up: bool) -> int:
    if name == "num_stages":
        return value + 1 if up else value - 1
    return value * 2 if up else value // 2


def _in_range(name: str, value: int) -> bool:
    low, high = RANGES[name.lower()]
    return low <= value <= high


def _sensible(operator: str, key: tuple, candidate: Any) -> bool:
    if operator in ("softmax", "quantize_int8"):
        *_, width = key
        # Fewer elements than a row has are the same tile again: one row.
        whole = getattr(candidate, "chunk", None) or (width if width is not None else 0)
        return candidate.elements >= whole
    return True


def shared_memory(operator: str, key: tuple, candidate: Any) -> int:
    """Bytes that the tiles of a matrix product need, by an estimate; what is more, the launch itself refuses."""
    if operator == "attention":
        kernel, bits, head_dim = key
        kernel = kernel.removeprefix("masked_")
        block_m, block_n, _, stages = candidate
        # The forward holds Q; the backward of queries Q and dO, that of keys K and V. What they meet comes in stages.
        held = {"forward": block_m, "query": 2 * block_m, "key_value": 2 * block_n}[kernel]
        loaded = 2 * (block_m if kernel == "key_value" else block_n)
        return bits // 8 * head_dim * (held + stages * loaded)
    if operator == "int8_linear":
        bytes_of_input = {"w8a8": 1, "w8a16": 2, "w8a32": 4}[key[0]]
        block_m, block_n, block_k, _, stages = candidate
        return stages * block_k * (bytes_of_input * block_m + block_n)
    return 0


# --- Classes of calls -----------------------------------------------------------------------------------------------


def class_tasks(operator: str, known: set[tuple] | frozenset = frozenset()) -> list[ClassTask]:
    """A task for each class of 16-bit calls that a GPT makes. known: the classes that were measured before."""
    return [dataclasses.replace(task, known=task.key in known) for task in _CLASSES[operator]()]


def _attention_classes() -> Iterator[ClassTask]:
    for head_dim in (64, 128):
        for length, timed, batch in ((512, 512, 16), (2048, 2048, 4), (8192, 8192, 1), (None, 16384, 1)):
            for causal in (True, False):
                sizes = (batch, 16, 16, timed, timed, head_dim, causal)
                yield ClassTask(
                    "attention", (16, head_dim, length, causal), BOTH,
                    Shape("attention", (1, 2, 2, 300, 300, head_dim, causal), BFLOAT16),
                    Shape("attention", sizes, BFLOAT16),
                    f"{batch}x16x{timed}x{head_dim}{' causal' if causal else ''} bfloat16",
                )  # fmt: skip
        # Generation: one query, many keys, no backward.
        yield ClassTask(
            "attention", (16, head_dim, 16, False), FORWARD,
            Shape("attention", (1, 2, 2, 1, 300, head_dim, False), BFLOAT16),
            Shape("attention", (8, 16, 16, 1, 2048, head_dim, False), BFLOAT16),
            f"8x16x1:2048x{head_dim} bfloat16",
        )  # fmt: skip


def _layer_norm_classes() -> Iterator[ClassTask]:
    for width, timed in ((1024, 768), (4096, 4096), (16384, 8192), (None, 32768)):
        for residual in (False, True):
            rows = ELEMENTS // timed
            yield ClassTask(
                "layer_norm", (16, width, residual), BOTH,
                Shape("layer_norm", (9, timed, residual, True), BFLOAT16),
                Shape("layer_norm", (rows, timed, residual, True), BFLOAT16),
                f"{rows}x{timed}{' residual' if residual else ''} bfloat16",
            )  # fmt: skip


def _rms_norm_classes() -> Iterator[ClassTask]:
    for width, timed in ((1024, 1024), (4096, 4096), (16384, 8192), (None, 32768)):
        rows = ELEMENTS // timed
        yield ClassTask(
            "rms_norm", (16, width), BOTH,
            Shape("rms_norm", (9, timed, True), BFLOAT16), Shape("rms_norm", (rows, timed, True), BFLOAT16),
            f"{rows}x{timed} bfloat16",
        )  # fmt: skip


def _rotary_classes() -> Iterator[ClassTask]:
    for head_dim in (64, 128, 256):
        for interleaved in (False, True):
            heads, length = 32, ELEMENTS // (32 * head_dim)
            yield ClassTask(
                "rotary", (16, head_dim, interleaved), BOTH,
                Shape("rotary", (2, 5, 37, head_dim, head_dim, interleaved, False), BFLOAT16),
                Shape("rotary", (1, heads, length, head_dim, head_dim, interleaved, False), BFLOAT16),
                f"1x{heads}x{length}x{head_dim}{' interleaved' if interleaved else ''} bfloat16",
            )  # fmt: skip


def _softmax_classes() -> Iterator[ClassTask]:
    for width, timed in ((1024, 1024), (4096, 4096), (16384, 16384), (None, 50257)):
        for fused in (False, True):
            rows = ELEMENTS // timed
            scale = 0.125 if fused else 1.0
            yield ClassTask(
                "softmax", (16, width, True, fused), BOTH,
                Shape("softmax", ((9, timed), -1, scale, None, False), BFLOAT16),
                Shape("softmax", ((rows, timed), -1, scale, None, False), BFLOAT16),
                f"{rows}x{timed}{' scaled' if fused else ''} bfloat16",
            )  # fmt: skip


def _int8_linear_classes() -> Iterator[ClassTask]:
    for mode, bounds in (("w8a16", (1, 16, 64)), ("w8a8", (64, 512, None))):
        for most in bounds:
            rows = 4096 if most is None else most
            yield ClassTask(
                "int8_linear", (16, mode, most), FORWARD,
                Shape("int8_linear", (min(rows, 70), 300, 200, None, mode), BFLOAT16),
                Shape("int8_linear", (rows, 4096, 4096, None, mode), BFLOAT16),
                f"M {rows}, N 4096, K 4096 bfloat16",
            )  # fmt: skip


def _quantize_int8_classes() -> Iterator[ClassTask]:
    for width, timed in ((1024, 768), (4096, 4096), (16384, 16384), (None, 32768)):
        rows = ELEMENTS // timed
        yield ClassTask(
            "quantize_int8", (16, width), FORWARD,
            Shape("quantize_int8", (9, timed, -1), BFLOAT16), Shape("quantize_int8", (rows, timed, -1), BFLOAT16),
            f"{rows}x{timed} bfloat16",
        )  # fmt: skip


_CLASSES: dict[str, Callable[[], Iterator[ClassTask]]] = {
    "attention": _attention_classes,
    "layer_norm": _layer_norm_classes,
    "rms_norm": _rms_norm_classes,
    "rotary": _rotary_classes,
    "softmax": _softmax_classes,
    "int8_linear": _int8_linear_classes,
    "quantize_int8": _quantize_int8_classes,
}


def tables(operators: tuple[str, ...]) -> dict[str, configurations.Table]:
    """The operators' tables; imports their kernels.

    Raises:
        ImportError: triton is not installed.
    """
    return {operator: dispatch.load("triton", operator).TABLE for operator in operators}
