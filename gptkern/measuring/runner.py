"""Measures a cell: checks gptkern's result, then times all implementations in turn, in one run.

The check: gptkern's output, and its gradients where a backward is timed, against the operator's plain mathematics in
float64, by the rule of tolerance.py, on a cell small enough for that. At full size the results and the gradients
of every implementation have to agree with the first peer's, loosely, because some compute in another precision. What
is wrong gets no time.
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
from gptkern.measuring import machine, rounding, timing, tolerance
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
# Of the inputs of the check.
CHECK_SEED = 0
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
        check = _checked(operator, cell, kind, found.get(GPTKERN))
        record["check"] = {name: check[name] for name in ("error", "bound", "on")}
        if check["wrong"]:
            found[GPTKERN] = Missing(check["wrong"])
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


def _checked(operator, cell: Cell, kind: str, implementation) -> dict[str, Any]:
    """{"error", "bound", "on": which cell, "wrong": what is wrong or None} of gptkern's implementation."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if kind == "cuda" else []):
        # The same verdict on the same sources: a check at its bound does not change from run to run.
        torch.manual_seed(CHECK_SEED)
        return _compared(operator, cell, kind, implementation)


def _compared(operator, cell: Cell, kind: str, implementation) -> dict[str, Any]:
    small = operator.check_cell(cell)
    worst = {"error": 0.0, "bound": 0.0, "on": small.label, "wrong": None}
    if isinstance(implementation, Missing) or implementation is None:
        return worst | {"wrong": "gptkern is not measured here"}
    nearest = -1.0
    try:
        implementation = operator.implementations(small, kind)[GPTKERN]
        inputs = operator.inputs(small, kind)
        indices = operator.differentiable(small) if small.direction in (_BACKWARD, _BOTH) else ()
        names = ["the output", *(f"the gradient of input {index}" for index in indices)]
        prepared = _prepared(implementation, inputs, indices)
        actual = _output(implementation.call(*prepared))
        dy = torch.randn_like(actual) if indices else None
        results = [actual, *_gradients(actual, prepared, indices, dy)]
        expected = [_reference(operator, small, inputs, indices, dy, precision) for precision in _PRECISIONS]
        noises = functools.cache(
            lambda: rounding.noise(lambda: _reference(operator, small, inputs, indices, dy, torch.float64))
        )
        for place, (name, result, reference, yardstick) in enumerate(zip(names, results, *expected)):
            factor = tolerance.FORWARD_FACTOR if place == 0 else tolerance.GRADIENT_FACTOR
            error, bound = tolerance.verdict(result, reference, yardstick, factor, lambda place=place: noises()[place])
            if not error <= bound:
                what = f"wrong: {name}'s worst error is {error:.3e}, the rule allows {bound:.3e} ({small.label})"
                return worst | {"error": _finite(error), "bound": bound, "wrong": what}
            if error >= nearest * bound:
                nearest = error / bound if bound else 0.0
                worst |= {"error": error, "bound": bound}
    except Exception as error:
        return worst | {"wrong": _failure(error)}
    return worst


_PRECISIONS = (torch.float64, torch.float32)


def _reference(operator, cell, inputs, indices, dy, precision) -> list[torch.Tensor]:
    """The output and the gradients of the plain mathematics, in `precision`."""
    converted = tuple(
        value.detach().to(precision) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in inputs
    )
    for index in indices:
        converted[index].requires_grad_()
    output = _output(operator.reference(cell, converted, precision))
    gradients = _gradients(output, converted, indices, None if dy is None else dy.to(precision))
    return [output.detach(), *gradients]


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
        self.expected: list[torch.Tensor] | None = None
        self.expected_of = ""
        try:
            if hasattr(operator, "SETS"):
                self.sets = [operator.inputs(cell, kind) for _ in range(operator.SETS)]
            else:
                self.sets = timing.sets_of_inputs(lambda: operator.inputs(cell, kind), kind)
        except Exception as error:
            reason = _failure(error)
            self.entries = {name: {"name": name, "skipped": reason} for name in found}
            return
        self.indices = operator.differentiable(cell) if cell.direction in (_BACKWARD, _BOTH) else ()
        self.gradients: list[torch.Tensor | None] = [None] * len(self.sets)
        # The first peer comes first: it is what the others have to agree with.
        for name, implementation in sorted(found.items(), key=lambda item: item[0] == GPTKERN):
            if isinstance(implementation, Missing):
                self.entries[name] = {"name": name, "skipped": implementation.reason}
                continue
            try:
                self._ready(name, implementation)
            except Exception as error:
                self.entries[name] = {"name": name, "skipped": _failure(error)}
                if kind == "cuda":
                    _alive()

    def _ready(self, name: str, implementation: Implementation) -> None:
        prepared = [_prepared(implementation, inputs, self.indices) for inputs in self.sets]
        with torch.set_grad_enabled(self.cell.direction != "forward"), dispatch.choices_made() as choices:
            output = _output(implementation.call(*prepared[0]))
            if self.indices and self.gradients[0] is None:
                # One for each set: shared, it would stay in the L2 cache.
                self.gradients = [torch.randn_like(output) for _ in self.sets]
            self._compare(name, [output.detach(), *_gradients(output, prepared[0], self.indices, self.gradients[0])])
            del output
        function, arguments = _function(implementation, self.cell.direction, prepared, self.indices, self.gradients)
        peak = timing.peak_bytes(function, arguments[0])
        self.samplers[name], timed = _samplers(function, arguments, self.kind, implementation.graph)
        self.calls[name] = lambda: function(*arguments[0])
        self.entries[name] = {"name": name, "timed": timed, "peak_bytes": peak}
        self.entries[name]["backend"] = ", ".join(sorted({choice.backend for choice in choices})) or None

    def _compare(self, name: str, results: list[torch.Tensor]) -> None:
        """The output, and the gradients where they are timed, with the first peer's, at full size."""
        if self.expected is None:
            self.expected, self.expected_of = results, name
            return
        names = ["result", *(f"gradient of input {index}" for index in self.indices)]
        distances = [_distance(actual, expected) for actual, expected in zip(results, self.expected)]
        for what, distance in zip(names, distances):
            if not distance <= AGREEMENT:
                raise _Disagreement(
                    f"computes something else: its {what} differs from that of {self.expected_of} by {distance:.1%}"
                )
        if name == GPTKERN:
            self.agreement = {"worst": max(distances), "with": self.expected_of}

    def sample(self, rounds: int) -> dict[str, list[float]]:
        """Fills in each implementation's times; -> the samples of the time that counts."""
        self.expected = None
        counted: dict[str, list[float]] = {}
        for column, seconds in (("device_s", CELL_SECONDS), ("wall_s", CELL_SECONDS / 4)):
            names = [name for name in self.samplers if column in self.samplers[name]]
            if self.kind != "cuda":
                seconds = CELL_SECONDS
            try:
                in_turn = timing.in_turn([self.samplers[name][column] for name in names], rounds, seconds)
            except Exception as error:
                # Whose fault it is cannot be told: they took turns.
                for name in names:
                    self.entries[name] = {"name": name, "skipped": f"while sampling, {_failure(error)}"}
                    del self.samplers[name]
                continue
            for name, samples in zip(names, in_turn):
                self.entries[name][column] = timing.spread(samples)._asdict()
                counted.setdefault(name, samples)
            for name in self.samplers:
                self.entries[name].setdefault(column, None)
        return {name: samples for name, samples in counted.items() if name in self.samplers}

    def clocks(self) -> dict[str, int] | None:
        """The GPU's clocks while it runs an implementation that could be sampled."""
        return machine.clocks(next((call for name, call in self.calls.items() if name in self.samplers), None))


class _Disagreement(Exception):
    pass


def _function(implementation, direction, prepared, indices, gradients) -> tuple[Callable, list[tuple]]:
    """-> (what is timed, its arguments for each set of inputs)."""
    if direction == _BACKWARD:
        graphs = [
            (_output(implementation.call(*arguments)), dy, arguments) for arguments, dy in zip(prepared, gradients)
        ]

        def backward(output, dy, arguments):
            leaves = [arguments[index] for index in indices]
            return torch.autograd.grad(output, leaves, dy, retain_graph=True)

        return backward, graphs
    if direction == _BOTH:

        def both(dy, *arguments):
            output = _output(implementation.call(*arguments))
            return torch.autograd.grad(output, [arguments[index] for index in indices], dy)

        return both, [(dy, *arguments) for arguments, dy in zip(prepared, gradients)]
    if direction == "forward":

        def forward(*arguments):
            with torch.no_grad():
                return implementation.call(*arguments)

        return forward, prepared
    return implementation.call, prepared


def _samplers(function, arguments, kind, may_graph) -> tuple[dict[str, timing.Sampler], str]:
    if kind != "cuda":
        return {"wall_s": timing.wall_sampler(function, arguments)}, "wall"
    timed = "graph" if may_graph else "events"
    device = (timing.graph_sampler if may_graph else timing.event_sampler)(function, arguments)
    return {"device_s": device, "wall_s": timing._eager_gpu_sampler(function, arguments)}, timed


# --- Small parts ----------------------------------------------------------------------------------------------------


def _prepared(implementation: Implementation, inputs: tuple, indices: Sequence[int]) -> tuple:
    """Inputs of its own for an implementation: leaves that require grad where they are differentiated."""
    own = tuple(
        value.detach().clone().requires_grad_() if index in indices else value for index, value in enumerate(inputs)
    )
    return own if implementation.prepare is None else tuple(implementation.prepare(*own))


def _output(result) -> torch.Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _gradients(output, inputs, indices, dy) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output, [inputs[index] for index in indices], dy) if indices else ()


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


def _finite(number: float) -> float | None:
    return number if number < float("inf") else None
