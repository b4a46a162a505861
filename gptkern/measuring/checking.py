"""Runs this machine's kernels against plain mathematics in float64: what `gptkern check` prints.

A case is an operator on one shape and dtype, of its room's `checks`. Its result and every gradient are judged by the
rule of tolerance.py: the reference is the operator as plain PyTorch in float64, differentiated by PyTorch's autograd;
the yardstick is the same lines in float32. int8 values have to be equal.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gptkern import operators as rooms
from gptkern.backends import dispatch
from gptkern.backends.dispatch import LAUNCHERS
from gptkern.backends.problem import Inputs
from gptkern.measuring import rounding, tolerance

SIZES = ("small", "realistic")
KERNELS = tuple(name for name in dispatch.BACKENDS if name != "torch")


class Case(NamedTuple):
    """An operator on one shape and dtype."""

    operator: str
    shape_class: str
    dtype: torch.dtype
    sizes: Any  # as the operator's problem has them

    @property
    def shape(self) -> str:
        return rooms.problem(self.operator).label(self.sizes)


@dataclass(frozen=True)
class Result:
    """One comparison: the result of a case, or one of its gradients."""

    operator: str
    direction: str  # "forward", or "grad " and the argument's name
    backend: str
    dtype: str
    shape_class: str
    shape: str
    ok: bool | None  # None: not run, and `note` says why
    error: float | None = None
    bound: float | None = None
    note: str = ""
    seconds: float = 0.0  # of the whole case
    left_out: bool = False  # not run because the time was up: there is no verdict on it


def cases_of(operator: str, sizes: Iterable[str] = SIZES[:1]) -> list[Case]:
    """The cases of an operator, of these of SIZES."""
    checks = rooms.problem(operator).checks()
    return [
        Case(operator, name, dtype, check.sizes)
        for size in sizes
        for name, check in checks[size].items()
        for dtype in check.dtypes
    ]


def run(
    operators: Iterable[str] | None = None,
    *,
    device: str | torch.device | None = None,
    backends: Iterable[str] | None = None,
    sizes: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    seconds: float | None = None,
    seed: int = 0,
    elements: int | None = None,
) -> Iterator[Result]:
    """Check the kernels, and yield each result as soon as it is there.

    Args:
        operators: names in gptkern.operators.NAMES; all by default.
        device: the current GPU where there is one, else the CPU.
        backends: of KERNELS, variants of theirs, or LAUNCHERS; by default what `available(device)` says.
        sizes: of SIZES; by default the small shapes, and on a GPU the realistic ones too.
        dtypes: only the cases of these dtypes.
        seconds: starts no new case after so long; the cases left out are yielded with ok=None.
        seed: of the random tensors.
        elements: only the cases whose tensors have at most so many each.

    Raises:
        ValueError: a name that does not exist.
    """
    device = torch.device(default_device() if device is None else device)
    operators = rooms.NAMES if operators is None else tuple(operators)
    backends = available(device) if backends is None else tuple(backends)
    sizes = (SIZES if device.type == "cuda" else SIZES[:1]) if sizes is None else tuple(sizes)
    for name, given, known in (
        ("operators", operators, rooms.NAMES),
        ("backends", backends, (*KERNELS, *dispatch.orders.variants(), LAUNCHERS)),
        ("sizes", sizes, SIZES),
    ):
        unknown = [value for value in given if value not in known]
        if unknown:
            raise ValueError(f"{name} has {', '.join(map(repr, unknown))}; it takes {', '.join(map(repr, known))}")
    start = time.monotonic()
    wanted = None if dtypes is None else set(dtypes)
    for case in _interleaved([cases_of(operator, sizes) for operator in operators]):
        for backend in backends:
            if (wanted is not None and case.dtype not in wanted) or not _has(case.operator, backend):
                continue
            if elements is not None and _most_elements(case, device) > elements:
                continue
            if seconds is not None and time.monotonic() - start > seconds:
                note = f"left out: {seconds:g} s were over"
                yield _result(case, backend, "all", ok=None, note=note, left_out=True)
                continue
            yield from check(case, backend, device, seed=seed)


def available(device: torch.device) -> tuple[str, ...]:
    """The backends and variants with kernels for a device; where there is none, the launchers in plain PyTorch."""
    names = (*KERNELS, *dispatch.orders.variants()) if device.type == "cuda" else KERNELS
    return tuple(name for name in names if dispatch.unavailable(name, device) is None) or (LAUNCHERS,)


def _has(operator: str, backend: str) -> bool:
    """A variant is one of some operators alone."""
    return backend == LAUNCHERS or ":" not in backend or backend in dispatch.orders.names(operator)


def _most_elements(case: Case, device: torch.device) -> int:
    inputs = rooms.problem(case.operator).inputs(case.sizes, case.dtype, torch.Generator(device))
    return max(tensor.numel() for tensor in inputs.tensors.values())


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(case: Case, backend: str, device: torch.device, *, seed: int = 0) -> Iterator[Result]:
    """One case on one backend: a result for each output and each gradient."""
    start = time.monotonic()
    try:
        with dispatch.backend(backend):
            comparisons = list(compared(case, device, seed=seed))
    except dispatch.BackendError as error:
        yield _result(case, backend, "all", ok=None, note=f"not covered: {error}")
    except torch.cuda.OutOfMemoryError:
        yield _result(case, backend, "all", ok=None, note="not run: too little GPU memory for the reference")
    except Exception as error:  # whatever a kernel raises is a failure of the check, with its text
        yield _result(case, backend, "all", ok=False, note=f"{type(error).__name__}: {error}")
    else:
        elapsed = time.monotonic() - start
        for direction, error, bound in comparisons:
            yield _result(case, backend, direction, ok=error <= bound, error=error, bound=bound, seconds=elapsed)


def _result(case: Case, backend: str, direction: str, **values) -> Result:
    dtype = str(case.dtype).removeprefix("torch.")
    return Result(case.operator, direction, backend, dtype, case.shape_class, case.shape, **values)


def compared(
    case: Case, device: torch.device, *, seed: int = 0, backward: bool = True
) -> Iterator[tuple[str, float, float]]:
    """(direction, worst error, bound) of every output and gradient of the twin, on the backend that it then chooses.

    Args:
        backward: whether gradients are taken; without, the call is that of inference.
    """
    generator = torch.Generator(device).manual_seed(seed)
    with _plain_numerics(device):
        inputs = rooms.problem(case.operator).inputs(case.sizes, case.dtype, generator)
        twin = rooms.contract(case.operator).TWIN

        def function(*tensors):
            return twin(**dict(zip(inputs.tensors, tensors)), **inputs.constants, **inputs.options)

        gradients = None
        outputs, leaves = _outputs(function, inputs, None, backward)
        if outputs[0].requires_grad:
            gradients = [
                torch.randn(output.shape, generator=generator, device=device).to(output.dtype) for output in outputs
            ]
            actual = torch.autograd.grad(outputs, leaves, gradients)
        (reference, reference_gradients), (yardstick, yardstick_gradients) = (
            _evaluated(inputs, precision, gradients) for precision in (torch.float64, torch.float32)
        )

    @functools.cache
    def noises() -> tuple[float, ...]:
        """Of the outputs and then of the gradients."""
        return rounding.noise(lambda: [*itertools.chain(*_evaluated(inputs, torch.float64, gradients))])

    for index, (output, right, plain) in enumerate(zip(outputs, reference, yardstick)):
        name = "forward" if index == 0 else f"forward, result {index + 1}"
        if inputs.exact and index == 0:
            error, bound = tolerance.worst_error(output, right), 0.0
        else:
            error, bound = tolerance.verdict(output, right, plain, noise=lambda index=index: noises()[index])
        yield name, error, bound
    if gradients is not None:
        judged = zip(inputs.tensors, actual, reference_gradients, yardstick_gradients)
        for index, (name, gradient, right, plain) in enumerate(judged, len(outputs)):
            error, bound = tolerance.verdict(
                gradient, right, plain, tolerance.GRADIENT_FACTOR, lambda index=index: noises()[index]
            )
            yield f"grad {name}", error, bound


def _evaluated(inputs: Inputs, precision: torch.dtype, gradients):
    """The reference's outputs and gradients, in a precision."""
    outputs, leaves = _outputs(inputs.reference, inputs, precision, gradients is not None)
    if gradients is None:
        return outputs, ()
    return outputs, torch.autograd.grad(outputs, leaves, [gradient.to(precision) for gradient in gradients])


def _outputs(function, inputs: Inputs, precision: torch.dtype | None, backward: bool):
    """(the tuple of outputs, the leaves that they were computed from)"""
    tensors = inputs.tensors.values()
    leaves = [tensor.detach().to(precision or tensor.dtype).requires_grad_(backward) for tensor in tensors]
    with torch.set_grad_enabled(backward):
        outputs = function(*leaves)
    return (outputs,) if isinstance(outputs, torch.Tensor) else outputs, leaves


@contextlib.contextmanager
def _plain_numerics(device: torch.device):
    """IEEE float32 products and no autocast, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _interleaved(lists: list[list[Case]]) -> Iterator[Case]:
    """One of each in turn: where time is short, every operator has been looked at."""
    for turn in itertools.zip_longest(*lists):
        yield from (case for case in turn if case is not None)
