"""Which backend computes what in a model: asks gptkern for each call that the model makes, on a real batch."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import torch
from torch.overrides import TorchFunctionMode

import gptkern
from gptkern.swapping import SwapReport


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


class _Observer(TorchFunctionMode):
    """Asks `gptkern.explain` about each call that has a twin, then lets PyTorch run it."""

    def __init__(self):
        super().__init__()
        self.modules: list[str] = []  # the path of the module under way, after those of the modules around it
        self.choices: dict[str, tuple[str, str]] = {}  # module path -> (backend, reason)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # ValueError: not an operator of gptkern.
        with contextlib.suppress(ValueError):
            self.choices[self.modules[-1]] = tuple(gptkern.explain(function, *args, **kwargs))
        return function(*args, **kwargs)


@torch.no_grad()
def observed(stock: torch.nn.Module, report: SwapReport, *inputs: torch.Tensor) -> list[SwappedModules]:
    """What runs each module that the report lists, seen while the *stock* model computes `inputs`.

    A swapped module makes the calls of the stock one on the same tensors, so what `explain` says of these holds.
    """
    observer = _Observer()
    handles = []
    for name, module in stock.named_modules():

        def enter(*_, name=name):
            observer.modules.append(name)

        def leave(*_):
            observer.modules.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with observer:
            stock(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    rows: dict[tuple, SwappedModules] = {}
    for entry in report.replaced:
        backend, reason = observer.choices.get(entry.name, ("-", "not reached"))
        names = re.sub(r"\b\d+\b", "*", entry.name)
        row = SwappedModules(names, 0, entry.original, entry.replacement, entry.operator, backend, reason)
        rows.setdefault(dataclasses.astuple(row), row).count += 1
    return list(rows.values())
