"""The operators: one room each, and the only list of them.

    <operator>/
        contract.py      the call (a NamedTuple), its checks, the PyTorch backend, registration, autograd.Function, twin
        problem.py       all that is known of the operator besides: PROBLEM, a gptkern.backends.problem.Problem
        triton*.py       kernels and launchers of a backend; cuda.py: launchers over csrc/<operator>/
        <backend>.json   tiles, where no formula in the kernel's file says them
        backends.json    the order in which backends are tried, by architecture, and what was measured

Nothing is imported before it is asked for: what looks at one operator does not load the others.
"""

from __future__ import annotations

import functools
import importlib

# In the order in which people see them.
NAMES = (
    "attention",
    "layer_norm",
    "rms_norm",
    "rotary",
    "softmax",
    "nonlinearity",
    "cross_entropy",
    "linear_cross_entropy",
    "distillation_loss",
    "linear_distillation_loss",
    "int8_linear",
    "quantize_int8",
    "adamw",
)


@functools.cache
def problem(name: str):
    """What is known of an operator: PROBLEM of its problem.py.

    Raises:
        ValueError: there is no such operator.
    """
    if name not in NAMES:
        raise ValueError(f"operator is {name!r}; it needs one of {', '.join(map(repr, NAMES))}")
    return importlib.import_module(f"gptkern.operators.{name}.problem").PROBLEM


def contract(name: str):
    """The module of an operator's contract, with `Call`, `OPERATOR` and `TWIN`."""
    return importlib.import_module(f"gptkern.operators.{name}.contract")
