"""swap(model), unswap(model), kernels(): gptkern's operators in a model that was written without them.

    torch.nn.LayerNorm, torch.nn.Softmax    change their class to the twin in gptkern.nn
    a module whose forward calls F.scaled_dot_product_attention, F.layer_norm or F.softmax inline
                                            changes its class to a subclass of its own, whose forward is the
                                            original one with those calls routed to gptkern.functional

A swapped module is the same object with the same parameters, buffers, hooks and state_dict keys; its original class
is noted in its `__dict__`, from where `unswap` takes it back. No global is touched.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from gptkern import nn
from gptkern.dispatch import TWINS

_logger = logging.getLogger("gptkern")


def _operator_of(function: Callable) -> str:
    """The operator that a PyTorch function's twin belongs to: the basename of its module."""
    return TWINS[function].__module__.rpartition(".")[2]


SWAPPABLE = tuple(sorted({_operator_of(function) for function in TWINS}))

# Exact type -> (its twin, the operator that the twin runs on).
_MODULE_TWINS: dict[type, tuple[type, str]] = {
    torch.nn.LayerNorm: (nn.LayerNorm, "layer_norm"),
    torch.nn.RMSNorm: (nn.RMSNorm, "rms_norm"),
    torch.nn.Softmax: (nn.Softmax, "softmax"),
}
# Where a swapped module's `__dict__` keeps its original class.
_ORIGINAL = "_gptkern_original"
# Where a routed class keeps the operators that it routes.
_ROUTED = "_gptkern_routed"


class Replaced(NamedTuple):
    """A module that runs on gptkern's operators."""

    name: str  # its path in the model
    original: str  # its class before
    replacement: str  # and now
    operator: str  # what it runs on, comma-separated


class Skipped(NamedTuple):
    """A module that an operator might have served and that was left alone."""

    name: str
    original: str
    reason: str


class SwapReport:
    """What `swap` did; `print(report)` shows it as a table.

    Attributes:
        replaced: the modules that were replaced, by this call or an earlier one.
        skipped: the modules that were left alone although one of the operators asked for computes what they do.
    """

    def __init__(self, replaced: list[Replaced], skipped: list[Skipped]):
        self.replaced = replaced
        self.skipped = skipped

    def __repr__(self) -> str:
        return f"SwapReport({len(self.replaced)} replaced, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        rows = [(r.name, r.original, f"-> {r.replacement}", r.operator) for r in self.replaced]
        rows += [(s.name, s.original, "left alone", s.reason) for s in self.skipped]
        title = f"{len(self.replaced)} modules replaced, {len(self.skipped)} skipped"
        if not rows:
            return title
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([title, *lines])


def swap(model: torch.nn.Module, ops: Iterable[str] | None = None, strict: bool = False) -> SwapReport:
    """Put gptkern's operators into a model, in place.

    Replaced are modules of exactly the type `torch.nn.LayerNorm` or `torch.nn.Softmax`, and modules whose forward
    calls `F.scaled_dot_product_attention`, `F.layer_norm` or `F.softmax`: itself, in a method of its own, or in a
    function of its own package. All such calls made while that forward runs are routed, its submodules' too. A call
    that cannot be read off the code (a function looked up in a table, a tensor's method) is not found:
    `gptkern.kernels()` reaches it.

    Parameters stay the same objects, state_dict keys stay the same; dropout, eps, hooks, requires_grad and the
    training flag are not looked at. A second call changes nothing. `gptkern.unswap` takes it back.

    Args:
        model: any module; shared submodules are swapped once.
        ops: the operators to put in, of "attention", "layer_norm" and "softmax"; all by default.
        strict: raise where anything asked for has to be skipped.

    Returns:
        The report: what was replaced, and what was left alone and why.

    Raises:
        TypeError: model is no torch.nn.Module, or ops is a string.
        ValueError: ops names an unknown operator.
        RuntimeError: strict, and something was skipped; the model is then unchanged.
    """
    operators = _checked_operators(ops)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}; it needs a torch.nn.Module")
    report = SwapReport([], [])
    changes: list[tuple[torch.nn.Module, type]] = []
    for name, module in model.named_modules():
        _plan(name or "(model)", module, operators, report, changes)
    if strict and report.skipped:
        left_alone = SwapReport([], report.skipped)
        raise RuntimeError(f"swap: strict, and modules had to be skipped; the model is unchanged\n{left_alone}")
    for module, replacement in changes:
        module.__dict__.setdefault(_ORIGINAL, type(module))
        module.__class__ = replacement
    _logger.info("swap: %s", report)
    return report


def unswap(model: torch.nn.Module) -> torch.nn.Module:
    """Take gptkern's operators out of a model again, in place: each swapped module gets its original class back.

    Modules that were built as gptkern.nn modules stay. A model that was never swapped is left as it is.

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: a module's class was changed again after the swap; the model is then unchanged.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"unswap: model is a {type(model).__name__}; it needs a torch.nn.Module")
    swapped = [(name, module) for name, module in model.named_modules() if _ORIGINAL in module.__dict__]
    for name, module in swapped:
        if not _is_replacement(type(module), module.__dict__[_ORIGINAL]):
            raise RuntimeError(
                f"unswap: {name or '(model)'} became a {type(module).__name__} after it was swapped (a "
                "parametrisation, say); undo that first. The model is unchanged"
            )
    for _, module in swapped:
        module.__class__ = module.__dict__.pop(_ORIGINAL)
    return model


def kernels(ops: Iterable[str] | None = None) -> TorchFunctionMode:
    """`with gptkern.kernels():` routes the calls of PyTorch's functions made inside it to gptkern's operators.

    Routed are F.scaled_dot_product_attention, F.layer_norm, F.softmax, torch.softmax and Tensor.softmax (what
    PyTorch's own modules call inside their C++ or composite functions, as torch.nn.MultiheadAttention does, is not
    seen). It holds in the thread that enters it, and nests.

    Args:
        ops: the operators to route, of "attention", "layer_norm" and "softmax"; all by default.

    Raises:
        TypeError: ops is a string. ValueError: ops names an unknown operator.
    """
    return _Routing(_checked_operators(ops))


class _Routing(TorchFunctionMode):
    def __init__(self, operators: tuple[str, ...]):
        super().__init__()
        self.routes = {function: twin for function, twin in TWINS.items() if _operator_of(function) in operators}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # PyTorch has popped this mode for the duration of the call: a twin may call the function that it replaces.
        return self.routes.get(function, function)(*args, **(kwargs or {}))


def _checked_operators(ops: Iterable[str] | None) -> tuple[str, ...]:
    if ops is None:
        return SWAPPABLE
    if isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"ops is {ops!r}; it needs a list of operators, as ['layer_norm']")
    ops = tuple(ops)
    for operator in ops:
        if operator not in SWAPPABLE:
            raise ValueError(f"ops holds {operator!r}; it needs any of {', '.join(map(repr, SWAPPABLE))}")
    # One order, so that the same request gives the same class.
    return tuple(operator for operator in SWAPPABLE if operator in ops)


def _plan(name: str, module: torch.nn.Module, operators: tuple[str, ...], report: SwapReport, changes: list) -> None:
    """Decide on one module: adds to the report, and to `changes` where its class is to change."""
    original = module.__dict__.get(_ORIGINAL, type(module))
    if original is not type(module) and not _is_replacement(type(module), original):
        report.skipped.append(Skipped(name, type(module).__name__, "its class was changed after it was swapped"))
        return
    replacement, operator = _MODULE_TWINS.get(original, (None, ""))
    if replacement is None:
        inline = _inline_operators(original)
        # What an earlier call routed stays routed.
        before = type(module).__dict__.get(_ROUTED, ())
        wanted = tuple(o for o in SWAPPABLE if o in inline and (o in operators or o in before))
        if wanted:
            replacement, operator = _routed(original, wanted), ", ".join(wanted)
    if replacement is None or not set(operator.split(", ")) & set(operators):
        reason = _reason_to_skip(original, operators)
        if reason is not None:
            report.skipped.append(Skipped(name, original.__name__, reason))
    elif "forward" in module.__dict__:
        report.skipped.append(Skipped(name, original.__name__, "a forward was set on the instance itself"))
    else:
        if type(module) is not replacement:
            changes.append((module, replacement))
        shown = f"gptkern.nn.{replacement.__name__}" if original in _MODULE_TWINS else f"{original.__name__}, routed"
        report.replaced.append(Replaced(name, original.__name__, shown, operator))


def _reason_to_skip(cls: type, operators: tuple[str, ...]) -> str | None:
    """Why a module that one of the operators might serve is left alone, or None where none would."""
    for base, (twin, operator) in _MODULE_TWINS.items():
        if operator in operators and issubclass(cls, base) and cls not in (base, twin):
            return f"a subclass of torch.nn.{base.__name__} with a forward of its own, in which no call was found"
    if "attention" in operators and issubclass(cls, torch.nn.MultiheadAttention):
        return "torch.nn.MultiheadAttention calls its attention inside PyTorch, where it cannot be routed"
    if issubclass(cls, torch.jit.ScriptModule):
        return "a TorchScript module has no Python forward"
    return None


def _is_replacement(cls: type, original: type) -> bool:
    """Whether `cls` is what a swap makes of `original`."""
    return cls is _MODULE_TWINS.get(original, (None,))[0] or (_ROUTED in cls.__dict__ and cls.__base__ is original)


# --- Modules that call an operator inline -----------------------------------------------------------------------------


def _inline_operators(cls: type) -> set[str]:
    """The operators whose PyTorch functions the class's forward calls.

    Itself, through methods of `self`, or through functions of the package that the class comes from.
    """
    if cls.__module__.startswith("torch.nn.") or issubclass(cls, torch.jit.ScriptModule):
        return set()
    return _inline_operators_of(cls)


@functools.cache
def _inline_operators_of(cls: type) -> frozenset[str]:
    package = cls.__module__.partition(".")[0]
    found: set[str] = set()
    seen: set[Callable] = set()
    waiting: list = [cls.forward]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        for chain in _attribute_chains(function.__code__):
            called = getattr(cls, chain[1], None) if chain[0] == "self" and len(chain) == 2 else None
            called = called or _resolved(chain, function.__globals__)
            if not isinstance(called, Callable) or isinstance(called, type):
                continue
            if called in TWINS:
                found.add(_operator_of(called))
            elif (getattr(called, "__module__", None) or "").partition(".")[0] == package:
                waiting.append(called)
    return frozenset(found)


def _attribute_chains(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """Every name that the code loads, with the attributes taken from it: ("F", "softmax"), ("self", "attend")."""
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and chain:
            chain.append(str(instruction.argval))
            continue
        if chain:
            yield tuple(chain)
        chain = []
        if instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF")):
            names = instruction.argval
            # Python 3.13 loads two locals in one instruction; attributes are taken from the second.
            chain = [str(names[-1] if isinstance(names, tuple) else names)]
        elif isinstance(instruction.argval, types.CodeType):
            yield from _attribute_chains(instruction.argval)
    if chain:
        yield tuple(chain)


def _resolved(chain: tuple[str, ...], names: dict) -> object:
    """What a chain of names, a global and attributes of modules, stands for, or None."""
    value = names.get(chain[0])
    for attribute in chain[1:]:
        if not isinstance(value, types.ModuleType):
            return None
        value = getattr(value, attribute, None)
    return value


@functools.cache
def _routed(cls: type, operators: tuple[str, ...]) -> type:
    """A subclass of `cls` whose forward is the same with the operators' calls routed to gptkern."""
    routing = _Routing(operators)

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        with routing:
            return cls.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The class is made here and not found by its name: pickle and deepcopy make it again.
        reduced = cls.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:
            return (_new_routed, (cls, operators), *reduced[2:])
        return reduced

    return type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            _ROUTED: operators,
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
        },
    )


def _new_routed(cls: type, operators: tuple[str, ...]) -> torch.nn.Module:
    routed = _routed(cls, operators)
    return routed.__new__(routed)
