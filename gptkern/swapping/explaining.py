"""explain: which backend would run a call of an operator, or each operator that a model calls, and why."""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from gptkern.backends import dispatch
from gptkern.backends.dispatch import Choice
from gptkern.nn import Int8Linear
from gptkern.swapping.report import grouped, table, where

_ROOM = re.compile(r"gptkern\.operators\.(\w+)\.")


class Explained(NamedTuple):
    """What runs one operator in one module."""

    name: str  # the module's path in the model
    module: str  # its class
    operator: str
    backend: str
    reason: str


class ExplainReport:
    """What would run each operator that a model calls; `print(report)` shows it as a table.

    Attributes:
        calls: the operators called, each module's once for each backend and reason, in the order of the first calls.
    """

    def __init__(self, calls: list[Explained]):
        self.calls = calls

    def __repr__(self) -> str:
        return f"ExplainReport({len(self.calls)} calls)"

    def __str__(self) -> str:
        if not self.calls:
            return (
                "no operator of gptkern was called in this thread: all of it runs on PyTorch. gptkern.swap(model) puts "
                "them in"
            )
        rows = [
            (operator, backend, cls, where(names), reason)
            for (operator, backend, cls, reason), names in grouped(
                (call.name, (call.operator, call.backend, call.module, call.reason)) for call in self.calls
            ).items()
        ]
        return "\n".join(table(("operator", "backend", "module", "where", "why"), rows))


def explain(function: Callable, *args, **kwargs) -> Choice | ExplainReport:
    """The backend that runs `function(*args, **kwargs)`, and the reason; of a model, of each operator that it calls.

        gptkern.explain(F.layer_norm, x, (768,)).backend        "torch"
        print(gptkern.explain(model, tokens))                    a table

    A function is not run. A model is: one forward, as it is (training or not, swapped or not, with gradients where they
    are on), outside torch.compile; its buffers and PyTorch's random numbers are then as they were. What its own Python
    code keeps (a counter, a cache among the arguments) is not. Calls that it makes in other threads are not seen, and a
    function that these compile in the meantime stays eager for that call.

    Args:
        function: an operator of gptkern.functional, or the PyTorch function whose twin it is; or a torch.nn.Module.
        args, kwargs: what it would be called with.

    Returns:
        Choice(backend, reason) of a function; an ExplainReport of a model.

    Raises:
        ValueError: gptkern has no kernels for `function`; or a parameter of the model is not there yet (lazy, meta).
        BackendError: a backend is forced and cannot run a call.

    What the call itself would raise is raised here, too.
    """
    if isinstance(function, torch.nn.Module):
        return _explained(function, args, kwargs)
    return dispatch.explain(function, *args, **kwargs)


def _explained(model: torch.nn.Module, args: tuple, kwargs: dict) -> ExplainReport:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            state = "lazy: call the model once" if is_lazy(tensor) else "on the meta device: load the model first"
            raise ValueError(f"explain: {name} of the model is {state}. A model is explained by running it")
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        names[id(module)] = name or "(model)"
    seen: dict[Explained, None] = {}

    def note(choice: Choice) -> None:
        operator, module = _calling(names)
        seen[Explained(names[id(module)], type(module).__name__, operator, *choice)] = None

    # With gradients where they are on: an argument that requires one may be none for kernels.
    with _unchanged(model), _not_compiled(), dispatch.telling(note):
        model(*args, **kwargs)
    return ExplainReport(list(seen))


def _calling(names: dict[int, str]) -> tuple[str, torch.nn.Module]:
    """The operator that is choosing its backend, and the innermost of the modules that is calling it."""
    operator = None
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        room = _ROOM.match(f"{frame.f_globals.get('__name__')}.")
        if room and operator is None:
            operator = room[1]
        code = frame.f_code
        this = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(this) in names and isinstance(this, torch.nn.Module):
            return operator or "", this
        frame = frame.f_back
    raise AssertionError("an operator chose a backend outside of the model")


@contextlib.contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """What running a model changes by itself is then as it was."""
    held = [(module, dict(module._buffers)) for module in model.modules()]
    # Not those of int8 layers: they are the model's weights, which a forward leaves alone and a copy would double.
    quantized = {
        id(buffer) for module in model.modules() if isinstance(module, Int8Linear) for buffer in module.buffers()
    }
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if id(buffer) not in quantized]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            # A forward may have put another tensor into a buffer's place, or given it another size.
            for module, before in held:
                module._buffers.clear()
                module._buffers.update(before)
            with torch.no_grad():
                for buffer, before in buffers:
                    if buffer.shape != before.shape:
                        buffer.resize_(before.shape)
                    # What was not written stays unwritten: a backward that is still to come may need it. PyTorch counts
                    # no version for what batch_norm writes.
                    if not torch.equal(buffer.isnan(), before.isnan()) or (buffer != before)[~before.isnan()].any():
                        buffer.copy_(before)


def _not_compiled():
    """A compiled graph has its backends chosen already, and tells of none."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
