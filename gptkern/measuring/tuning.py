"""Chooses tiles and backends by measurement: what `gptkern tune` does.

For each row of the tables of configurations: the present configuration and its neighbours are checked against float64
by the rule of tolerance.py, what is wrong or does not run is dropped, and the rest is timed in turn. For each
class of calls: the same with the backends. A neighbour wins if its median is below the present one's by more than

    margin = max(LEAST_GAIN * median of the present one, the wider of the two interquartile ranges)

so that noise changes no table. Its own neighbours are tried against it then, until none wins. What was found is handed
to `keep` at once; nothing is lost where a run ends early.

Candidates are compiled and checked several at a time, in processes of their own (`Trials`): Triton's cache hands what
was compiled to this process, and a kernel that costs its process the GPU, or does not end, is dropped with that reason
and costs nothing else. Only what came back right is timed, in this process, alone on the GPU.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import torch

from gptkern import operators as rooms
from gptkern.backends import dispatch
from gptkern.backends.problem import BACKWARD, FORWARD, Inputs
from gptkern.backends.tables import files, orders, user
from gptkern.measuring import checking, timing, workers
from gptkern.measuring.tuning_tasks import ClassTask, RowTask, Task, class_tasks, row_tasks, tables

# timer(functions, inputs, rounds) -> seconds of one call of each function, `rounds` samples each; measuring.timing's.
Timer = Callable[[Sequence[Callable], Sequence[tuple], int], list[list[float]]]
# keep(task, row, key): writes a row of the table that a task is about.
Keep = Callable[[Task, dict[str, Any], tuple[str, ...]], None]

# Samples of each candidate.
ROUNDS = 30
# Seconds that a candidate may take to be compiled, checked and run, with the start of its process.
PATIENCE = 300.0
# Less than this part of the present one's time is no gain that is worth a change.
LEAST_GAIN = 0.02


class Dropped(NamedTuple):
    """A candidate that gets no time, and why.

    Args:
        lost: it cost its process the GPU, or did not end: more than a wrong result.
    """

    candidate: Any
    reason: str
    lost: bool = False


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
    trials: Trials | None = None,
) -> Iterator[Outcome | Left]:
    """Measures the tasks in order, and yields what became of each as soon as it is known and kept.

    Args:
        seconds: starts no new task, and no new step of one, after so long.
        trials: where candidates are tried before they are timed; None: in this process, one after another.

    Raises:
        DeviceLost: a kernel cost this process the GPU; the message names the task, and the candidate where it is known.
    """
    start = time.monotonic()

    def over() -> bool:
        return seconds is not None and time.monotonic() - start > seconds

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), timing.own_stream(device.type):
        for task in tasks:
            if over():
                yield Left(task)
                continue
            measured = functools.partial(_measured, task, device=device, rounds=rounds, timer=timer, trials=trials)
            outcome = _climbed(task, measured, over) if isinstance(task, RowTask) else _ordered(task, measured, device)
            if outcome.chosen is not None:
                keep(task, task.record(outcome.chosen, outcome.gain), task.parts)
                dispatch.forget()
            yield outcome


# --- One task -------------------------------------------------------------------------------------------------------


def _ordered(task: ClassTask, measured: Callable, device: torch.device) -> Outcome:
    """The backends of a class of calls, the fastest first."""
    candidates = task.alternatives(device)
    spreads, dropped = measured(candidates)
    medians = {candidate: spread.median for candidate, spread in spreads.items()}
    by_time = sorted(medians, key=medians.get)
    if len(by_time) < 2:
        return Outcome(task, medians, None, 1.0, dropped, "fewer than two backends can be timed")
    # Within the margin of the fastest the first that stands before it is as good, and stays.
    best = next(name for name in candidates if name in by_time and not wins(spreads[by_time[0]], spreads[name]))
    order = tuple(sorted(by_time, key=lambda name: name != best))
    won = wins(spreads[order[0]], spreads[order[1]])
    return Outcome(task, medians, order, medians[order[1]] / medians[order[0]] if won else 1.0, dropped)


def _climbed(task: RowTask, measured: Callable, over: Callable[[], bool]) -> Outcome:
    """From the present configuration to the best of its neighbours, and on from there until none wins."""
    best, around, gain = task.present, task.candidates, 1.0
    tried, medians, dropped = {best, *around}, {}, []
    while True:
        # The best again beside its neighbours: what slows the machine down slows all of them.
        spreads, not_timed = measured((best, *around))
        dropped += not_timed
        medians |= {candidate: spread.median for candidate, spread in spreads.items()}
        if best not in spreads:
            reason = next(drop.reason for drop in not_timed if drop.candidate == best)
            if best == task.present:
                return Outcome(task, medians, None, 1.0, dropped, f"the present configuration: {reason}")
            return Outcome(task, medians, best, gain, dropped, f"it ended early: {reason}")
        fastest = min(spreads, key=lambda candidate: spreads[candidate].median)
        if not wins(spreads[fastest], spreads[best]):
            return Outcome(task, medians, best, gain, dropped)
        gain *= spreads[best].median / spreads[fastest].median
        best, around = fastest, task.neighbours(fastest, tried)
        tried.update(around)
        if not around:
            return Outcome(task, medians, best, gain, dropped)
        if over():
            return Outcome(task, medians, best, gain, dropped, "the time was up before its own neighbours were tried")


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
    task: Task, candidates: Sequence[Any], *, device: torch.device, rounds: int, timer: Timer, trials: Trials | None
) -> tuple[dict[Any, timing.Spread], list[Dropped]]:
    """({candidate: its times}, what was dropped): what is wrong or fails gets no time."""
    found = _tried(task, candidates, device) if trials is None else trials.of(task, candidates, device)
    dropped = [drop for drop in map(found.get, candidates) if drop is not None]
    runnable, inputs = [], None
    generator = torch.Generator(device).manual_seed(0)
    for variant in (Variant(task, candidate) for candidate in candidates if found[candidate] is None):
        try:
            inputs = inputs or timing.sets_of_inputs(lambda variant=variant: variant.inputs(generator), device)
            variant(*inputs[0])
        except Exception as error:
            dropped.append(Dropped(variant.candidate, _line(error)))
        else:
            runnable.append(variant)
        _still_there(device, task, variant.candidate)
    try:
        samples = timer(runnable, inputs, rounds) if runnable else []
    except RuntimeError as error:
        _still_there(device, task)
        return {}, [*dropped, *(Dropped(variant.candidate, _line(error)) for variant in runnable)]
    return {variant.candidate: timing.spread(values) for variant, values in zip(runnable, samples)}, dropped


def _still_there(device: torch.device, task: Task, candidate: Any = None) -> None:
    """Raises DeviceLost with what ran, where the GPU answers no more."""
    try:
        timing.alive(device)
    except timing.DeviceLost as error:
        which = "while its candidates were timed" if candidate is None else f"after {candidate}"
        raise timing.DeviceLost(f"{task.name}, {which}: {error}") from error


# --- Trials -----------------------------------------------------------------------------------------------------------


def _tried(task: Task, candidates: Sequence[Any], device: torch.device) -> dict[Any, Dropped | None]:
    """{candidate: why it was dropped, or None}, in this process."""
    found = {}
    for candidate in candidates:
        try:
            reason = wrong(Variant(task, candidate), device)
        except Exception as error:  # a compiler's and a driver's errors are of many types
            reason = _line(error)
        _still_there(device, task, candidate)
        found[candidate] = None if reason is None else Dropped(candidate, reason)
    return found


def trial(task: Task | None, candidate: Any, device: str) -> str | None:
    """What `Trials` runs in a process of its own: what is wrong with a candidate, or None. Without a task: nothing.

    It is compiled for and run on the task's small shape, checked, and then on the one that is timed.

    Raises:
        workers.Fatal: the GPU answers this process no more.
    """
    device = torch.device(device)
    # What was found since this process began.
    dispatch.forget()
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if task is None:
                torch.zeros(1, device=device)
                return None
            dispatch.load(task.backend_of(candidate), task.operator)
            variant = Variant(task, candidate)
            reason = wrong(variant, device)
            if reason is None:
                variant(*variant.inputs(torch.Generator(device).manual_seed(0)))
            timing.alive(device)
            return reason
    except timing.DeviceLost as lost:
        raise workers.Fatal(str(lost)) from lost
    except Exception as error:
        try:
            timing.alive(device)
        except timing.DeviceLost as lost:
            raise workers.Fatal(str(lost)) from error
        raise
    finally:
        # The others need the memory as well.
        if device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.empty_cache()


class Trials(workers.Workers):
    """Processes in which candidates are tried, `jobs` at a time."""

    def __init__(self, jobs: int):
        super().__init__(trial, jobs, PATIENCE)

    def refused(self, device: torch.device) -> str | None:
        """Why a process of its own cannot use the device (a GPU may be for one process alone), or None."""
        ((_, result),) = self.run([(None, None, str(device))])
        return None if result is None else result.reason

    def of(self, task: Task, candidates: Sequence[Any], device: torch.device) -> dict[Any, Dropped | None]:
        """{candidate: why it was dropped, or None}."""
        found = {}
        for place, result in self.run([(task, candidate, str(device)) for candidate in candidates]):
            candidate = candidates[place]
            if isinstance(result, workers.Died):
                found[candidate] = Dropped(candidate, result.reason, lost=True)
            else:
                reason = result.reason if isinstance(result, workers.Raised) else result
                found[candidate] = None if reason is None else Dropped(candidate, reason)
        return found


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
