"""Measures a cell: checks gptkern's result, then times all implementations in turn, in one run.

The check: gptkern's output, and its gradients where a backward is timed, against the operator's plain mathematics in
float64, as `gptkern check` does it, on a cell small enough for that. At full size the results and the gradients of
every implementation have to agree with the first peer's, loosely, because some compute in another precision. What is
wrong gets no time.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config

from gptkern import operators
from gptkern.backends import dispatch
from gptkern.measuring import machine, timing
from gptkern.measuring.cells import Cell, Implementation, Missing
from gptkern.measuring.rooms import GPTKERN, Room

MODEL = "model"
# What is measured: every operator that has cells, and the whole model.
OPERATORS = (*(name for name in operators.NAMES if operators.problem(name).cells("cpu", "smoke")), MODEL)
# Samples of each implementation: many and short, so that the median is one that nothing interrupted.
ROUNDS = {"smoke": 2, "quick": 20, "full": 50}
# ‖result − first peer's‖ / ‖first peer's‖ at full size. int8 products of random inputs differ from exact ones by
# 1 %, a wrong mask or a wrong scale by tens.
AGREEMENT = 0.05
# The samples of a cell's implementations end soon after this time, be they fewer than wanted.
CELL_SECONDS = 20.0
# Directions that differentiate.
_BACKWARD, _BOTH = "backward", "both"


@functools.cache
def module(operator: str):
    """An operator's cells, inputs, implementations and reference, as rooms.py says; of "model" the module."""
    return importlib.import_module("gptkern.measuring.model") if operator == MODEL else Room(operator)


def cells(kind: str, extent: str, operators: Sequence[str] = OPERATORS) -> list[Cell]:
    """The cells of the operators, most important first: each operator's first, then each one's second, …"""
    lists = [module(operator).cells(kind, extent) for operator in operators]
    longest = max(map(len, lists), default=0)
    return [cells[place] for place in range(longest) for cells in lists if place < len(cells)]


class DeviceLost(RuntimeError):
    """The GPU answers no more: after an illegal access every later call of the process fails."""


def measure(
    cell: Cell, kind: str, rounds: int, peers: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """-> (the cell's record in a results file, the samples of each implementation in seconds).

    Args:
        kind: "cuda" or "cpu". rounds: samples of each implementation. peers: their names; None for all.

    Raises:
        DeviceLost: the GPU answers no more. All else that fails is a reason in the record.
    """
    operator = module(cell.operator)
    record = cell.record() | {"rounds": rounds, "peers_asked": None if peers is None else sorted(peers)}
    record |= {"date": datetime.date.today().isoformat(), "clocks": None, "agreement": None}
    # A backward that is timed again and again keeps its graph, whose buffers compiled code would give away.
    keeps_graph = {"donated_buffer": False} if cell.direction == _BACKWARD else {}
    with timing.own_stream(kind), functorch_config.patch(keeps_graph):
        found = {
            name: implementation
            for name, implementation in operator.implementations(cell, kind).items()
            if name == GPTKERN or peers is None or name in peers
        }
        record["check"], wrong = _checked(operator, cell)
        if wrong:
            found[GPTKERN] = Missing(wrong)
        names = list(found)
        timed = _Timed(operator, cell, kind, found)
        samples = timed.sample(rounds)
        record["clocks"], record["agreement"] = timed.clocks(), timed.agreement
        record["implementations"] = [timed.entries[name] for name in names]
    # The models and graphs go before their memory is handed back.
    del timed, found
    gc.collect()
    if kind == "cuda":
        _alive()
        torch.cuda.empty_cache()
    return record, samples


def _alive() -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"the GPU answers no more: {_first_line(error)}") from error


# --- The check ------------------------------------------------------------------------------------------------------


def _checked(operator, cell: Cell) -> tuple[dict[str, Any], str | None]:
    """({"error", "bound" of what came nearest to its bound, "on": which cell}, what is wrong or None) of gptkern."""
    small = operator.check_cell(cell)
    check = {"error": 0.0, "bound": 0.0, "on": small.label}
    try:
        compared = operator.checked(small)
        what, error, bound = max(compared, key=lambda result: result[1] / max(result[2], 1e-300))
    except Exception as error:
        return check, _failure(error)
    # JSON has no infinity.
    check |= {"error": error if error < float("inf") else None, "bound": bound}
    if error <= bound:
        return check, None
    return check, f"wrong: {what}'s worst error is {error:.3e}, the rule allows {bound:.3e} ({small.label})"


# --- The timing -----------------------------------------------------------------------------------------------------


class _Timed:
    """The implementations of a cell, made ready, compared at full size, and then sampled.

    entries      name -> its part of the record
    agreement    {"worst": gptkern's distance from the first peer, "with": that peer}, or None without a peer
    """

    def __init__(self, operator, cell: Cell, kind: str, found: dict[str, Implementation | Missing]):
        self.cell, self.kind = cell, kind
        self.entries: dict[str, dict[str, Any]] = {}
        self.samplers: dict[str, dict[str, timing.Sampler]] = {}
        self.calls: dict[str, Callable] = {}
        self.agreement: dict[str, Any] | None = None
        # The first peer's name and results.
        self.expected: tuple[str, list[torch.Tensor]] | None = None
        try:
            if hasattr(operator, "SETS"):
                self.sets = [operator.inputs(cell, kind) for _ in range(operator.SETS)]
            else:
                self.sets = timing.sets_of_inputs(lambda: operator.inputs(cell, kind), kind)
        except Exception as error:
            found = dict.fromkeys(found, Missing(_failure(error)))
        self.indices = operator.differentiable(cell) if cell.direction in (_BACKWARD, _BOTH) else ()
        self.gradients: list[torch.Tensor] = []
        # The first peer comes first: it is what the others have to agree with.
        for name, implementation in sorted(found.items(), key=lambda item: item[0] == GPTKERN):
            if isinstance(implementation, Missing):
                self._skip(name, implementation.reason)
                continue
            try:
                self._ready(name, implementation)
            except Exception as error:
                self._skip(name, _failure(error))
                if kind == "cuda":
                    _alive()

    def _skip(self, name: str, reason: str) -> None:
        self.entries[name] = {"name": name, "skipped": reason}

    def _ready(self, name: str, implementation: Implementation) -> None:
        prepared = [_prepared(implementation, inputs, self.indices) for inputs in self.sets]
        with torch.set_grad_enabled(self.cell.direction != "forward"), dispatch.choices_made() as choices:
            output = _output(implementation.call(*prepared[0]))
            if self.indices and not self.gradients:
                # One for each set: shared, it would stay in the L2 cache.
                self.gradients = [torch.randn_like(output) for _ in self.sets]
            leaves = [prepared[0][index] for index in self.indices]
            gradients = torch.autograd.grad(output, leaves, self.gradients[0]) if leaves else ()
            self._compare(name, [output.detach(), *gradients])
            del output, gradients
        function, arguments = _function(implementation, self.cell.direction, prepared, self.indices, self.gradients)
        peak = timing.peak_bytes(function, arguments[0])
        self.samplers[name], timed = _samplers(function, arguments, self.kind, implementation.graph)
        self.calls[name] = lambda: function(*arguments[0])
        backend = ", ".join(sorted({choice.backend for choice in choices})) or None
        self.entries[name] = {"name": name, "timed": timed, "peak_bytes": peak, "backend": backend}

    def _compare(self, name: str, results: list[torch.Tensor]) -> None:
        """The output, and the gradients where they are timed, with the first peer's, at full size."""
        if self.expected is None:
            self.expected = name, results
            return
        first, expected = self.expected
        names = ["result", *(f"gradient of input {index}" for index in self.indices)]
        distances = list(map(_distance, results, expected))
        for what, distance in zip(names, distances):
            if not distance <= AGREEMENT:
                raise _Disagreement(
                    f"computes something else: its {what} differs from that of {first} by {distance:.1%}"
                )
        if name == GPTKERN:
            self.agreement = {"worst": max(distances), "with": first}

    def sample(self, rounds: int) -> dict[str, list[float]]:
        """Fills in each implementation's times; -> the samples of the time that counts."""
        self.expected = None
        counted: dict[str, list[float]] = {}
        # On a GPU the eager wall time is read beside the time that counts.
        columns = {"device_s": 1.0, "wall_s": 0.25} if self.kind == "cuda" else {"wall_s": 1.0}
        for column, share in columns.items():
            names = list(self.samplers)
            try:
                samplers = [self.samplers[name][column] for name in names]
                in_turn = timing.in_turn(samplers, rounds, share * CELL_SECONDS)
            except Exception as error:
                # Whose fault it is cannot be told: they took turns.
                for name in names:
                    self._skip(name, f"while sampling, {_failure(error)}")
                self.samplers.clear()
                return {}
            for name, samples in zip(names, in_turn):
                self.entries[name] |= {"device_s": None, **self.entries[name], column: timing.spread(samples)._asdict()}
                counted.setdefault(name, samples)
        return counted

    def clocks(self) -> dict[str, int] | None:
        """The GPU's clocks while it runs an implementation that could be sampled."""
        return machine.clocks(next((call for name, call in self.calls.items() if name in self.samplers), None))


class _Disagreement(Exception):
    pass


def _function(implementation, direction, prepared, indices, gradients) -> tuple[Callable, list[tuple]]:
    """-> (what is timed, its arguments for each set of inputs)."""

    def backward(output, dy, arguments):
        return torch.autograd.grad(output, [arguments[i] for i in indices], dy, retain_graph=direction == _BACKWARD)

    def both(dy, arguments):
        return backward(_output(implementation.call(*arguments)), dy, arguments)

    def forward(*arguments):
        with torch.no_grad():
            return implementation.call(*arguments)

    if direction == _BACKWARD:
        outputs = [_output(implementation.call(*arguments)) for arguments in prepared]
        return backward, list(zip(outputs, gradients, prepared))
    if direction == _BOTH:
        return both, list(zip(gradients, prepared))
    return forward if direction == "forward" else implementation.call, prepared


def _samplers(function, arguments, kind, may_graph) -> tuple[dict[str, timing.Sampler], str]:
    wall = {"wall_s": timing.wall_sampler(function, arguments, kind)}
    if kind != "cuda":
        return wall, "wall"
    device = timing.device_sampler(function, arguments, may_graph)
    return {"device_s": device} | wall, "graph" if may_graph else "events"


# --- Small parts ----------------------------------------------------------------------------------------------------


def _prepared(implementation: Implementation, inputs: tuple, indices: Sequence[int]) -> tuple:
    """Inputs of its own for an implementation: leaves that require grad where they are differentiated."""
    own = tuple(
        value.detach().clone().requires_grad_() if index in indices else value for index, value in enumerate(inputs)
    )
    return own if implementation.prepare is None else tuple(implementation.prepare(*own))


def _output(result) -> torch.Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def _failure(error: Exception) -> str:
    if isinstance(error, _Disagreement):
        return str(error)
    return f"failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]
