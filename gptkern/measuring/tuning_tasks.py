"""What `gptkern tune` measures: for each row of a table and each class of calls a shape, and configurations to try.

    RowTask       a row of a table of configurations: the present one against its neighbours
    ClassTask     a class of calls: the backends, variants included, against each other

What a row or a class stands for, its room says (`row`, `class_tasks`): small, to be checked against float64, and at the
size that is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from gptkern import operators
from gptkern.backends import dispatch
from gptkern.backends.problem import Tuned
from gptkern.backends.tables import configurations, user

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
# A part that a room names and that is not above.
ANY_RANGE = (1, 65536)


@dataclass(frozen=True)
class Task:
    """What is run.

    Args:
        known: whether it was measured on this device before.

    place and path are where what was found is kept: (part of the user's file, table) and the room's file. parts are the
    names of the row's key, and record(chosen, gain) is the row.
    """

    operator: str
    key: tuple
    tuned: Tuned
    known: bool = False

    @property
    def on(self) -> str:
        """What is timed, in words."""
        return f"{operators.problem(self.operator).label(self.tuned.timed)} {str(self.tuned.dtype)[6:]}"


@dataclass(frozen=True)
class RowTask(Task):
    """A row of a table of configurations."""

    backend: str = "triton"
    present: Any = None
    candidates: tuple = ()
    architecture: int | None = None  # of the GPU, which neighbours of a candidate have to fit; None: there are none

    @property
    def table(self) -> configurations.Table:
        return configurations.TABLES[self.operator, self.backend]

    @property
    def name(self) -> str:
        return f"{self.operator} on {self.backend}, {configurations.described(self.table.key, self.key)}"

    def neighbours(self, candidate: Any, tried: Collection) -> tuple:
        """Of a candidate that has won, without those that were tried."""
        if self.architecture is None:
            return ()
        return candidates(self.table, self.key, candidate, self.architecture, tried)

    def backend_of(self, candidate: Any) -> str:
        return self.backend

    @contextlib.contextmanager
    def forcing(self, candidate: Any):
        """The context in which the candidate is used."""
        override = configurations.override(self.operator, self.key, candidate, self.backend)
        with dispatch.backend(self.backend), override if candidate else contextlib.nullcontext():
            yield

    place = property(lambda self: ("configurations", f"{self.operator}, {self.backend}"))
    path = property(lambda self: self.table.path)
    parts = property(lambda self: tuple(self.table.key))

    def record(self, chosen: Any, gain: float) -> dict[str, Any]:
        return self.table.row(self.key, chosen, {"gain": round(gain, 3), "on": self.on})


@dataclass(frozen=True)
class ClassTask(Task):
    """A class of calls."""

    @property
    def name(self) -> str:
        return f"{self.operator}, {operators.problem(self.operator).classes.described(self.key)}"

    def alternatives(self, device: torch.device) -> tuple:
        """The backends that can run here, in the default order."""
        order = dispatch.orders.default(self.operator, user.identify(device)).order
        missing = (dispatch.missing(name, self.operator, device) for name in order)
        return tuple(name for name, why in zip(order, missing) if name == "torch" or why is None)

    def backend_of(self, candidate: str) -> str:
        return candidate

    def forcing(self, candidate: str):
        return dispatch.backend(candidate)

    place = property(lambda self: ("backends", self.operator))
    path = property(lambda self: dispatch.orders.path(self.operator))
    parts = property(lambda self: tuple(operators.problem(self.operator).classes.parts))

    def record(self, chosen: tuple[str, ...], gain: float) -> dict[str, Any]:
        return dict(zip(self.parts, self.key)) | {"order": list(chosen), "ratio": round(gain, 3), "on": self.on}


def tables(names: tuple[str, ...]) -> list[configurations.Table]:
    """The operators' tables of all backends; imports their kernels.

    Raises:
        ImportError: a backend that the operator has tiles for is not installed.
    """
    found = []
    for name in names:
        for backend in dispatch.orders.names(name):
            if backend != "torch" and configurations.has_table(name, backend):
                dispatch.load(backend, name)
                found.append(configurations.TABLES[name, backend])
    return found


def row_tasks(
    table: configurations.Table, architecture: int, rows: dict[tuple, configurations.Row]
) -> Iterator[RowTask]:
    """A task for each row of a table.

    Args:
        rows: those in force, whose configurations are the present ones.
    """
    problem = operators.problem(table.operator)
    for key, row in rows.items():
        yield RowTask(
            table.operator, key, problem.row(table.backend, *key), bool(row.measured), table.backend,
            row.configuration, candidates(table, key, row.configuration, architecture), architecture,
        )  # fmt: skip


def class_tasks(operator: str, known: set[tuple] | frozenset = frozenset()) -> Iterator[ClassTask]:
    """A task for each class of calls that a GPT makes. known: the classes that were measured before."""
    for key, tuned in operators.problem(operator).class_tasks().items():
        yield ClassTask(operator, key, tuned, key in known)


# --- Neighbours of a configuration ------------------------------------------------------------------------------------


def candidates(
    table: configurations.Table, key: tuple, present: Any, architecture: int, tried: Collection = ()
) -> tuple:
    """The neighbours of a configuration that fit the machine, but for those that were tried, at most MOST_CANDIDATES.

    Each part doubled or halved (the stages: one more or less), and with it, for another tile, the warps; of a table
    that lists what may run (`table.instances`), the others of these.
    """
    if table.instances is not None:
        others = (instance for instance in table.instances(*key) if instance != present and instance not in tried)
        return tuple(others)[:MOST_CANDIDATES]
    problem, limit = operators.problem(table.operator), SHARED_MEMORY.get(architecture, LEAST_SHARED_MEMORY)
    found: list[Any] = []
    for changes in _moves(problem, present):
        candidate = present._replace(**{name: _moved(name, getattr(present, name), up) for name, up in changes.items()})
        if (
            candidate != present
            and candidate not in found
            and candidate not in tried
            and all(_in_range(name, getattr(candidate, name)) for name in changes)
            and problem.sensible(key, candidate)
            and problem.shared_memory(table.backend, key, candidate) <= limit
        ):
            found.append(candidate)
    return tuple(found[:MOST_CANDIDATES])


def _moves(problem, present: Any) -> Iterator[dict[str, bool]]:
    """{part: up or down}, for one part or several at once."""
    parts = [name for name in present._fields if getattr(present, name) is not None]
    tile = [name for name in parts if name not in ("num_warps", "num_stages")]
    for name in parts:
        yield {name: True}
        yield {name: False}
    for up in (True, False):
        for name in tile:
            if "num_warps" in parts:
                yield {name: up, "num_warps": up}
        if len(tile) > 1:
            yield dict.fromkeys(tile, up)
    yield from problem.moves(parts, tile)


def _moved(name: str, value: int, up: bool) -> int:
    if name == "num_stages":
        return value + 1 if up else value - 1
    return value * 2 if up else value // 2


def _in_range(name: str, value: int) -> bool:
    low, high = RANGES.get(name.lower(), ANY_RANGE)
    return low <= value <= high
