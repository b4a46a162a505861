"""Chooses tiles and backends by measurement: what `gptkern tune` does.

For each row of the tables of configurations: the present configuration and its neighbours are checked against float64
by the rule of tolerance.py, what is wrong or does not run is dropped, and the rest is timed in turn. For each
class of calls: the same with the backends. A neighbour wins if its median is below the present one's by more than

    margin = max(LEAST_GAIN * median of the present one, the wider of the two interquartile ranges)

so that noise changes no table. What was found is handed to `keep` at once; nothing is lost where a run ends early.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from gptkern import operators as rooms
from gptkern.backends import dispatch
from gptkern.backends.problem import BACKWARD, FORWARD, Inputs
from gptkern.backends.tables import files, orders, user
from gptkern.measuring import checking, timing
from gptkern.measuring.tuning_tasks import ClassTask, RowTask, Task, class_tasks, row_tasks, tables

# timer(functions, inputs, rounds) -> seconds of one call of each function, `rounds` samples each; measuring.timing's.
Timer = Callable[[Sequence[Callable], Sequence[tuple], int], list[list[float]]]
# keep(task, row, key): writes a row of the table that a task is about.
Keep = Callable[[Task, dict[str, Any], tuple[str, ...]], None]

# Samples of each candidate.
ROUNDS = 30
# Less than this part of the present one's time is no gain that is worth a change.
LEAST_GAIN = 0.02


class Dropped(NamedTuple):
    """A candidate that gets no time, and why."""

    candidate: Any
    reason: str


class Outcome(NamedTuple):
    """What became of a task.

    Args:
        seconds: {candidate: the median}, the present one or the default first.
        chosen: the configuration, or the order of the backends; None where nothing could be measured.
        gain: the time of the present configuration (of the second backend) over that of the chosen one; 1 where
            nothing wins by more than the margin.
        note: why nothing was chosen.
    """

    task: Task
    seconds: dict[Any, float]
    chosen: Any
    gain: float
    dropped: list[Dropped]
    note: str = ""


class Left(NamedTuple):
    """A task that was not begun, because the time was up."""

    task: Task


def plan(operators: Sequence[str], device: torch.device) -> list[Task]:
    """The tasks on a device: the rows of every operator before the classes, whose kernels run with what was found.

    What was measured on the device before comes last, so that a run that was cut short is gone on with.
    """
    found = user.identify(device)
    architecture = 80 if found is None else found.architecture
    tasks: list[Task] = []
    for table in tables(tuple(operators)):
        if dispatch.missing(table.backend, table.operator, device) is not None:
            continue
        tasks += row_tasks(table, architecture, table.in_force(device))
    for operator in operators:
        tasks += class_tasks(operator, set(orders.preferences(operator, found)))
    return sorted(tasks, key=lambda task: task.known)


def tune(
    tasks: Sequence[Task],
    device: torch.device,
    keep: Keep,
    *,
    seconds: float | None = None,
    rounds: int = ROUNDS,
    timer: Timer = timing.durations,
) -> Iterator[Outcome | Left]:
    """Measures the tasks in order, and yields what became of each as soon as it is known and kept.

    Args:
        seconds: starts no new task after so long.
    """
    start = time.monotonic()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), timing.own_stream(device.type):
        for task in tasks:
            if seconds is not None and time.monotonic() - start > seconds:
                yield Left(task)
                continue
            outcome = _outcome(task, device, rounds, timer)
            if outcome.chosen is not None:
                keep(task, task.record(outcome.chosen, outcome.gain), task.parts)
                dispatch.forget()
            yield outcome


# --- One task -------------------------------------------------------------------------------------------------------


def _outcome(task: Task, device: torch.device, rounds: int, timer: Timer) -> Outcome:
    candidates = task.alternatives(device)
    samples, dropped = _measured(task, candidates, device, rounds, timer)
    spreads = {candidate: timing.spread(values) for candidate, values in samples.items()}
    medians = {candidate: spread.median for candidate, spread in spreads.items()}
    by_time = sorted(medians, key=medians.get)
    # Within the margin of the fastest the first that stands before it is as good, and stays.
    best = next((name for name in candidates if name in by_time and not wins(spreads[by_time[0]], spreads[name])), None)
    if isinstance(task, ClassTask):
        order = tuple(sorted(by_time, key=lambda name: name != best))
        if len(order) < 2:
            return Outcome(task, medians, None, 1.0, dropped, "fewer than two backends can be timed")
        won = wins(spreads[order[0]], spreads[order[1]])
        return Outcome(task, medians, order, medians[order[1]] / medians[order[0]] if won else 1.0, dropped)
    if task.present not in spreads:
        reason = next(drop.reason for drop in dropped if drop.candidate == task.present)
        return Outcome(task, medians, None, 1.0, dropped, f"the present configuration: {reason}")
    if not wins(spreads[by_time[0]], spreads[task.present]):
        return Outcome(task, medians, task.present, 1.0, dropped)
    return Outcome(task, medians, by_time[0], medians[task.present] / medians[by_time[0]], dropped)


def wins(challenger: timing.Spread, present: timing.Spread) -> bool:
    """Whether the challenger is faster by more than the margin."""
    ranges = (challenger.high - challenger.low, present.high - present.low)
    return present.median - challenger.median > max(LEAST_GAIN * present.median, *ranges)


class Variant:
    """One way to run a task, by a configuration or a backend's name: what the timer calls."""

    def __init__(self, task: Task, candidate: Any):
        self.task, self.candidate = task, candidate

    def __call__(self, made: Inputs, outputs: int, *tensors: torch.Tensor) -> Any:
        direction = self.task.tuned.direction
        if direction == FORWARD:
            with self.task.forcing(self.candidate), torch.no_grad():
                return self._call(made, tensors)
        if direction == BACKWARD:
            results, gradients, leaves = tensors[:outputs], tensors[outputs : 2 * outputs], tensors[2 * outputs :]
            with self.task.forcing(self.candidate):
                wanted = [leaf for leaf in leaves if leaf.requires_grad]
                return torch.autograd.grad(results, wanted, gradients, retain_graph=True)
        gradients, leaves = tensors[:outputs], tensors[outputs:]
        with self.task.forcing(self.candidate), torch.enable_grad():
            return torch.autograd.grad(_tuple(self._call(made, leaves)), leaves, gradients)

    def _call(self, made: Inputs, tensors) -> Any:
        twin = rooms.contract(self.task.operator).TWIN
        return twin(**dict(zip(made.tensors, tensors)), **made.constants, **made.options)

    def inputs(self, generator: torch.Generator) -> tuple:
        """(the call, the number of its outputs, tensors…) as `__call__` takes them, new and random."""
        tuned = self.task.tuned
        made = rooms.problem(self.task.operator).inputs(tuned.timed, tuned.dtype, generator)
        if tuned.direction == FORWARD:
            return made, 1, *made.tensors.values()
        wrt = tuple(made.tensors) if tuned.wrt is None else tuned.wrt
        leaves = [tensor.detach().requires_grad_(name in wrt) for name, tensor in made.tensors.items()]
        with self.task.forcing(self.candidate), torch.set_grad_enabled(tuned.direction == BACKWARD):
            results = _tuple(self._call(made, leaves))
        gradients = [
            torch.randn(result.shape, generator=generator, device=result.device).to(result.dtype) for result in results
        ]
        kept = results if tuned.direction == BACKWARD else ()
        return made, len(results), *kept, *gradients, *leaves


def _tuple(results: Any) -> tuple:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _measured(
    task: Task, candidates: Sequence[Any], device: torch.device, rounds: int, timer: Timer
) -> tuple[dict[Any, list[float]], list[Dropped]]:
    """({candidate: samples in seconds}, what was dropped): what is wrong or fails gets no time."""
    runnable, inputs, dropped = [], None, []
    generator = torch.Generator(device).manual_seed(0)
    for variant in (Variant(task, candidate) for candidate in candidates):
        try:
            reason = wrong(variant, device)
            if reason is None:
                inputs = inputs or timing.sets_of_inputs(lambda variant=variant: variant.inputs(generator), device)
                variant(*inputs[0])
        except Exception as error:  # a compiler's and a driver's errors are of many types
            reason = _line(error)
        if reason is None:
            runnable.append(variant)
        else:
            dropped.append(Dropped(variant.candidate, reason))
    try:
        samples = timer(runnable, inputs, rounds) if runnable else []
    except RuntimeError as error:
        return {}, [*dropped, *(Dropped(variant.candidate, _line(error)) for variant in runnable)]
    return {variant.candidate: values for variant, values in zip(runnable, samples)}, dropped


def wrong(variant: Variant, device: torch.device) -> str | None:
    """What the rule of tolerance.py says against a variant on the task's small shape, or None; PyTorch is not asked."""
    task, backend = variant.task, variant.task.backend_of(variant.candidate)
    if backend == "torch":
        return None
    case = checking.Case(task.operator, "tune", task.tuned.dtype, task.tuned.checked)
    with task.forcing(variant.candidate):
        for result in checking.check(case, backend, device):
            if not result.ok:
                said = result.note or f"worst error {result.error:.3e}, the rule allows {result.bound:.3e}"
                return f"{result.direction}: {said}".splitlines()[0]
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --- Where the results go -------------------------------------------------------------------------------------------


def today() -> str:
    return datetime.date.today().isoformat()


def keep_for_user(device: user.Device) -> Keep:
    """Into the user's file of the device."""
    return lambda task, row, key: user.put(device, *task.place, row, key, today())


def keep_shipped(device: user.Device) -> Keep:
    """Into the files of this package: what others get with the next version."""

    def keep(task: Task, row: dict[str, Any], key: tuple[str, ...]) -> None:
        with files.locked(task.path):
            content = files.read(task.path)
            user.replace_row(_entry(content["entries"], device)["rows"], row, key)
            files.write(task.path, content)
        if isinstance(task, RowTask):
            task.table.read_again()

    return keep


def _entry(entries: list[dict[str, Any]], device: user.Device) -> dict[str, Any]:
    """The device's entry, at today's date; what was measured with other versions is not kept beside this."""
    fresh = {"device": device.name, "architecture": device.architecture, "date": today(), "versions": user.versions()}
    fresh |= {"source": "measured by gptkern tune", "rows": []}
    for place, entry in enumerate(entries):
        if (entry.get("device"), entry["architecture"]) == tuple(device):
            if entry["versions"] == fresh["versions"]:
                fresh["rows"] = entry["rows"]
            entries[place] = fresh
            return fresh
    entries.append(fresh)
    return fresh
