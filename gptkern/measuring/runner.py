"""Measures a cell: checks gptkern's result, then times all implementations in turn, in one run.

The check: gptkern's output, and its gradients where a backward is timed, against the operator's plain mathematics in
float64, as `gptkern check` does it, on a cell small enough for that. At full size the results and the gradients of
every implementation have to agree with the first peer's, loosely, because some compute in another precision. What is
wrong gets no time. A time that says little says so in the record of its implementation:

    noisy           why: its quartiles are far apart after all patience, or others took the processor; else None
    host_bound      the host queued its calls more slowly than the GPU ran them; None where a CUDA graph was timed
    not_captured    why plain calls were timed where a graph was wanted; else None
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
from gptkern.measuring import contention, machine, timing
from gptkern.measuring.cells import Cell, Implementation, Missing
from gptkern.measuring.rooms import GPTKERN, Room
from gptkern.measuring.timing import DeviceLost as DeviceLost

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
# Where the quartiles are further apart than this share of the median there are more samples, and where that does not
# help the time is called noisy: a difference of kernels is smaller.
STEADY, NOISY = 0.05, 0.2
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
        record["clocks"], record["agreement"], record["load"] = timed.clocks(), timed.agreement, timed.load
        record["implementations"] = [timed.entries[name] for name in names]
    # The models and graphs go before their memory is handed back.
    del timed, found
    gc.collect()
    timing.alive(kind)
    if kind == "cuda":
        torch.cuda.empty_cache()
    return record, samples


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
    load         what others had of the processor while it was sampled (contention.py)
    """

    def __init__(self, operator, cell: Cell, kind: str, found: dict[str, Implementation | Missing]):
        self.cell, self.kind = cell, kind
        self.entries: dict[str, dict[str, Any]] = {}
        self.samplers: dict[str, dict[str, timing.Sampler]] = {}
        self.calls: dict[str, Callable] = {}
        self.agreement: dict[str, Any] | None = None
        self.load: dict[str, float | None] = {}
        # The first peer's name and results.
        self.expected: tuple[str, list[torch.Tensor]] | None = None
        # The model's weights are what is large, and they are the same at every call. Its graphs share their memory.
        self.few = hasattr(operator, "SETS")
        self.pool = torch.cuda.graph_pool_handle() if self.few and kind == "cuda" else None
        self.new_set = lambda: operator.inputs(cell, kind)
        try:
            if self.few:
                self.sets = [self.new_set() for _ in range(operator.SETS)]
            else:
                self.sets = timing.sets_of_inputs(self.new_set, kind)
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
                timing.alive(kind)

    def _skip(self, name: str, reason: str) -> None:
        self.entries[name] = {"name": name, "skipped": reason}

    def _ready(self, name: str, implementation: Implementation) -> None:
        prepared = self._all_prepared(implementation)
        with torch.set_grad_enabled(self.cell.direction != "forward"), dispatch.choices_made() as choices:
            output = _output(implementation.call(*prepared[0]))
            if self.indices and not self.gradients:
                self.gradients = [torch.randn_like(output)]
            leaves = [prepared[0][index] for index in self.indices]
            gradients = torch.autograd.grad(output, leaves, self.gradients[0]) if leaves else ()
            self._compare(name, [output.detach(), *gradients])
            del output, gradients
        while self.gradients and len(self.gradients) < len(prepared):
            # One for each set: shared, it would stay in the L2 cache.
            self.gradients.append(torch.randn_like(self.gradients[0]))
        function, arguments = _function(implementation, self.cell.direction, prepared, self.indices, self.gradients)
        peak = timing.peak_bytes(function, arguments[0])
        self.samplers[name], timed = _samplers(function, arguments, self.kind, implementation, self.pool)
        self.calls[name] = lambda: function(*arguments[0])
        backend = ", ".join(sorted({choice.backend for choice in choices})) or None
        self.entries[name] = {"name": name, "peak_bytes": peak, "backend": backend, "sets": len(prepared), **timed}

    def _all_prepared(self, implementation: Implementation) -> list[tuple]:
        """Of each set the inputs that the implementation takes; more sets where it has packed them into fewer bytes."""
        prepared = [_prepared(implementation, inputs, self.indices) for inputs in self.sets]
        while not self.few and (missing := timing.sets_missing(prepared, self.kind)) > 0:
            added = [self.new_set() for _ in range(missing)]
            self.sets += added
            prepared += [_prepared(implementation, inputs, self.indices) for inputs in added]
        return prepared

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
            names, others = list(self.samplers), contention.Contention()
            try:
                samplers = [self.samplers[name][column] for name in names]
                # What is read beside does not have to be steady.
                steady = STEADY if share == 1.0 else float("inf")
                in_turn = timing.in_turn(samplers, rounds, share * CELL_SECONDS, steady)
            except Exception as error:
                # Whose fault it is cannot be told: they took turns.
                for name in names:
                    self._skip(name, f"while sampling, {_failure(error)}")
                self.samplers.clear()
                return {}
            for name, samples in zip(names, in_turn):
                self.entries[name] |= {"device_s": None, **self.entries[name], column: timing.spread(samples)._asdict()}
                counted.setdefault(name, samples)
            if share == 1.0:
                self.load = others.shares()
                for name in names:
                    self.entries[name]["noisy"] = _noise(counted[name], self.entries[name], self.load)
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


def _samplers(
    function, arguments, kind, implementation: Implementation, pool
) -> tuple[dict[str, timing.Sampler], dict[str, Any]]:
    """-> (column -> sampler, "timed", "host_bound" and "not_captured" of the record)."""
    wall = {"wall_s": timing.wall_sampler(function, arguments, kind)}
    record: dict[str, Any] = {"timed": "wall", "host_bound": None, "not_captured": None}
    if kind != "cuda":
        return wall, record
    device = None
    if implementation.graph:
        try:
            device = timing.DeviceSampler(function, arguments, pool=pool)
        except RuntimeError as error:
            if not implementation.or_events:
                raise
            timing.alive(kind)
            record["not_captured"] = _failure(error)
    if device is None:
        device = timing.DeviceSampler(function, arguments, graph=False)
        record["host_bound"] = device.host_bound
    graphed = implementation.graph and record["not_captured"] is None
    return {"device_s": device} | wall, record | {"timed": "graph" if graphed else "events"}


def _noise(samples: list[float], entry: dict[str, Any], load: dict[str, float | None]) -> str | None:
    """Why a time says little, or None."""
    reasons, apart = [], timing.apart(samples)
    if len(samples) >= timing.FEWEST_ROUNDS and apart > NOISY:
        reasons.append(f"the quartiles of {len(samples)} samples are {apart:.0%} of the median apart")
    # What the GPU does by itself does not wait for the host.
    on_the_host = entry["device_s"] is None or entry["host_bound"]
    if on_the_host and (taken := contention.busy(load)) is not None:
        reasons.append(taken)
    return "; ".join(reasons) or None


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
