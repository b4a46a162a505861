"""Measures a cell: checks gptkern's result, then times all implementations in turn, in one run.

The check: gptkern's output, and its gradients where a backward is timed, against the operator's plain mathematics in
float64, by the rule of gptkern.tolerance, on a cell small enough for that. At full size every implementation has to
agree with the first peer, loosely, because some compute in another precision. What is wrong gets no time.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch import config as functorch_config

from gptkern import dispatch, tolerance
from gptkern.measuring import machine, timing
from gptkern.measuring.cells import Cell, Implementation, Missing

OPERATORS = ("attention", "layer_norm", "softmax", "int8_linear", "model")
GPTKERN = "gptkern"
# Samples of each implementation: many and short, so that the median is one that nothing interrupted.
ROUNDS = {"smoke": 2, "quick": 20, "full": 50}
# ‖result − first peer's‖ / ‖first peer's‖ at full size. int8 products of random inputs differ from exact ones by
# 1 %, a wrong mask or a wrong scale by tens.
AGREEMENT = 0.05
# The samples of a cell's implementations end soon after this time, be they fewer than wanted.
CELL_SECONDS = 20.0
# Directions that differentiate.
_BACKWARD, _BOTH = "backward", "both"


def module(operator: str):
    """gptkern.measuring.operators.<operator>: its cells, inputs, implementations and reference."""
    return importlib.import_module(f"gptkern.measuring.operators.{operator}")


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
    """
    operator = module(cell.operator)
    timing.use_own_stream()
    # A backward that is timed again and again keeps its graph, whose buffers compiled code would give away.
    with functorch_config.patch(donated_buffer=False):
        found = {
            name: implementation
            for name, implementation in operator.implementations(cell, kind).items()
            if name == GPTKERN or peers is None or name in peers
        }
        record = cell.record() | {"rounds": rounds, "clocks": None, "check": None, "implementations": []}
        check = _checked(operator, cell, kind, found.get(GPTKERN))
        record["check"] = {name: check[name] for name in ("error", "bound", "on")}
        if check["wrong"]:
            found[GPTKERN] = Missing(check["wrong"])
        entries, samples = _timed(operator, cell, kind, rounds, found)
        record["clocks"] = machine.clocks()
        record["implementations"] = entries
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()
    return record, samples


# --- The check ------------------------------------------------------------------------------------------------------


def _checked(operator, cell: Cell, kind: str, implementation) -> dict[str, Any]:
    """{"error", "bound", "on": which cell, "wrong": what is wrong or None} of gptkern's implementation."""
    small = operator.check_cell(cell)
    worst = {"error": 0.0, "bound": 0.0, "on": small.label, "wrong": None}
    if isinstance(implementation, Missing) or implementation is None:
        return worst | {"wrong": "gptkern is not measured here"}
    implementation = operator.implementations(small, kind)[GPTKERN]
    inputs = operator.inputs(small, kind)
    indices = operator.differentiable(small) if small.direction in (_BACKWARD, _BOTH) else ()
    names = ["the output", *(f"the gradient of input {index}" for index in indices)]
    prepared = _prepared(implementation, inputs, indices)
    dy = None
    nearest = -1.0
    try:
        actual = _output(implementation.call(*prepared))
        dy = torch.randn_like(actual) if indices else None
        results = [actual, *_gradients(actual, prepared, indices, dy)]
        expected = [_reference(operator, small, inputs, indices, dy, precision) for precision in _PRECISIONS]
        for place, (name, result, reference, yardstick) in enumerate(zip(names, results, *expected)):
            factor = tolerance.FORWARD_FACTOR if place == 0 else tolerance.GRADIENT_FACTOR
            error = tolerance.worst_error(result, reference)
            bound = tolerance.bound(reference, yardstick, result.dtype, factor)
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


def _timed(operator, cell, kind, rounds, found) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    indices = operator.differentiable(cell) if cell.direction in (_BACKWARD, _BOTH) else ()
    if hasattr(operator, "SETS"):
        sets = [operator.inputs(cell, kind) for _ in range(operator.SETS)]
    else:
        sets = timing.sets_of_inputs(lambda: operator.inputs(cell, kind), kind)
    entries: dict[str, dict[str, Any]] = {}
    samplers: dict[str, dict[str, timing.Sampler]] = {}
    expected = dy = None
    # The first peer comes first: it is what the others have to agree with.
    for name, implementation in sorted(found.items(), key=lambda item: item[0] == GPTKERN):
        if isinstance(implementation, Missing):
            entries[name] = {"name": name, "skipped": implementation.reason}
            continue
        try:
            prepared = [_prepared(implementation, inputs, indices) for inputs in sets]
            with torch.set_grad_enabled(cell.direction != "forward"), dispatch.choices_made() as choices:
                output = _output(implementation.call(*prepared[0])).detach()
                if expected is None:
                    expected = output
                    dy = torch.randn_like(output) if indices else None
                elif _distance(output, expected) > AGREEMENT:
                    distance = _distance(output, expected)
                    raise _Disagreement(f"computes something else: its result differs by {distance:.1%}")
            del output
            function, arguments = _function(implementation, cell.direction, prepared, indices, dy)
            peak = timing.peak_bytes(function, arguments[0])
            samplers[name], timed = _samplers(function, arguments, kind, implementation.graph)
        except Exception as error:
            entries[name] = {"name": name, "skipped": _failure(error)}
            continue
        entries[name] = {"name": name, "timed": timed, "peak_bytes": peak}
        entries[name]["backend"] = ", ".join(sorted({choice.backend for choice in choices})) or None
    samples = _spread_of_all(entries, samplers, rounds)
    return [entries[name] for name in found], samples


class _Disagreement(Exception):
    pass


def _function(implementation, direction, prepared, indices, dy) -> tuple[Callable, list[tuple]]:
    """-> (what is timed, its arguments for each set of inputs)."""
    if direction == _BACKWARD:
        graphs = [(_output(implementation.call(*arguments)), arguments) for arguments in prepared]

        def backward(output, arguments):
            leaves = [arguments[index] for index in indices]
            return torch.autograd.grad(output, leaves, dy, retain_graph=True)

        return backward, graphs
    if direction == _BOTH:

        def both(*arguments):
            output = _output(implementation.call(*arguments))
            return torch.autograd.grad(output, [arguments[index] for index in indices], dy)

        return both, prepared
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


def _spread_of_all(entries, samplers, rounds) -> dict[str, list[float]]:
    """Fills in each implementation's times; -> the samples of the time that counts."""
    counted: dict[str, list[float]] = {}
    for column in ("device_s", "wall_s"):
        names = [name for name in samplers if column in samplers[name]]
        in_turn = timing.in_turn([samplers[name][column] for name in names], rounds, CELL_SECONDS)
        for name, samples in zip(names, in_turn):
            entries[name][column] = timing.spread(samples)._asdict()
            counted.setdefault(name, samples)
        for name in samplers:
            entries[name].setdefault(column, None)
    return counted


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
    first = next(iter(str(error).strip().splitlines()), "")
    return f"failed: {type(error).__name__}: {first[:200]}"


def _finite(number: float) -> float | None:
    return number if number < float("inf") else None
