"""Which backend computes what in a swapped model, by kinds of modules, on a real batch."""

from __future__ import annotations

import dataclasses
import re

import torch

import gptkern
from gptkern.swapping import SwapReport
from gptkern.swapping.explaining import Explained
from gptkern.swapping.twins import RESIDUAL_NORM

# The backend of a module that calls no operator itself.
NOT_CALLED = "-"


@dataclasses.dataclass
class SwappedModules:
    """Modules of one kind: the same class, replacement, operator, backend and reason."""

    names: str  # blocks.*.attention_norm
    count: int
    original: str
    replacement: str
    operator: str
    backend: str
    reason: str


def observed(model: torch.nn.Module, report: SwapReport, *inputs: torch.Tensor) -> list[SwappedModules]:
    """What runs each module that the report lists, seen while the model, swapped, computes `inputs`."""
    calls: dict[str, list[Explained]] = {}
    for call in gptkern.explain(model, *inputs).calls:
        calls.setdefault(call.name, []).append(call)
    rows: dict[tuple, SwappedModules] = {}
    for entry in report.replaced:
        seen = calls.get(entry.name, [])
        backend = ", ".join(dict.fromkeys(call.backend for call in seen)) or NOT_CALLED
        # A sum is computed with the norm that it is for, and that norm's call.
        otherwise = "see its norms" if entry.operator == RESIDUAL_NORM else "not reached"
        reason = "; ".join(dict.fromkeys(call.reason for call in seen)) or otherwise
        names = re.sub(r"\b\d+\b", "*", entry.name)
        row = SwappedModules(names, 0, entry.original, entry.replacement, entry.operator, backend, reason)
        rows.setdefault(dataclasses.astuple(row), row).count += 1
    return list(rows.values())
