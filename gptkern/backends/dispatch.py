"""Which backend runs a call, and why.

    backend   what it is                 runs tensors on
    torch     PyTorch's own operators    every device: the fallback
    triton    Triton's kernels           NVIDIA GPUs from sm_80; the CPU while TRITON_INTERPRET=1
    cuda      CUDA C++                   NVIDIA GPUs from sm_80; the CPU while GPTKERN_EMULATE_CUDA=1

A backend may have variants of an operator, "cuda:sm90" or "torch:cudnn": kernels of their own, chosen, timed and told
apart by that name. "torch:launchers" is there of every operator: the launchers in plain PyTorch that kernels are
compared with.

A call is one record, the contract's NamedTuple `Call`. The module of a backend stands in the operator's room, by the
backend's name ("cuda:sm90": cuda_sm90.py; of "torch" and "torch:launchers" it is the contract). It is imported when it
is first chosen, and has

    unsupported(call) -> str | None    why this call is not covered, or None
    forward(call)                      bare launchers, which registration.py starts, by a registered op or not
    backward(gradient, call)
    unavailable(device) -> str | None  of a variant alone, if it needs more than its backend: why not on this device

The order in which they are tried on a GPU is data (gptkern.backends.tables): by operator, device and class of shapes
where it was measured, and one default where it was not. PyTorch may come first.

`chosen` is called once per call of an operator, at the public boundary; the backward uses the backend
that its forward used. On the `torch` backend a twin calls PyTorch's own operator, with PyTorch's autograd:
the registered op and the autograd.Function cost more host time than a small layer_norm itself takes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from gptkern import operators
from gptkern.backends import recomputation, tracing, unseen
from gptkern.backends.tables import configurations, orders, user
from gptkern.backends.tracing import constant_while_compiling

BACKENDS = orders.FAMILIES
# The launchers in plain PyTorch, of every operator.
LAUNCHERS = "torch:launchers"

# PyTorch's function -> its twin in gptkern.functional. Filled by `twin_of`.
TWINS: dict[Callable, Callable] = {}


class Choice(NamedTuple):
    """The backend that runs a call, and the reason that it was chosen."""

    backend: str
    reason: str


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call."""


class _Explained(Exception):
    """Carries a choice out of a twin that `explain` called, before anything has run."""

    def __init__(self, choice: Choice):
        self.choice = choice


# Of a thread whose innermost block asks for the automatic choice where GPTKERN_BACKEND forces one.
_AUTOMATIC = "automatic"


class _State(threading.local):
    # What the innermost block asks for; None, which is all that an ordinary call looks at, is the automatic choice.
    forced: str | None = None
    # Told of each choice before anything runs: `explain` and `telling` set it.
    observer: Callable[[Choice], None] | None = None


_state = _State()
# What torch.compile sees: Dynamo can guard on a global, not on a thread's local. Eager calls never read it.
_forced_while_compiling: str | None = None
# (identity, name) of every `backend` block that is open, in any thread, the newest last.
_open_blocks: list[tuple[object, str | None]] = []
_lock = threading.Lock()

# The reason of a choice that a `backend` block or GPTKERN_BACKEND made.
BY_NAME = "asked for by name"
_ON_CPU = Choice("torch", "the input is on the CPU")
_FORCED_TORCH = Choice("torch", BY_NAME)
_NOT_DENSE = Choice("torch", "the input is a nested or sparse tensor, which kernels cannot read")
_TRACED = Choice("torch", "torch.jit.trace records it, whose graphs hold PyTorch's operators alone")
_modules: dict[tuple[str, str], Any] = {}
_warned: set[tuple[str, str]] = set()
_Tensor, _strided = torch.Tensor, torch.strided


def checked_name(name: str | None, where: str) -> str | None:
    """The name, if it is a backend's or a variant's, or None; else a ValueError that says where it was given."""
    if name is not None and name not in BACKENDS and name != LAUNCHERS and name not in orders.variants():
        known = (*BACKENDS, LAUNCHERS, *orders.variants())
        raise ValueError(f"{where} got {name!r}; it needs one of {', '.join(map(repr, known))}")
    return name


_default = checked_name(os.environ.get("GPTKERN_BACKEND") or None, "GPTKERN_BACKEND")
_State.forced = _forced_while_compiling = _default


@contextlib.contextmanager
def backend(name: str | None):
    """Force a backend for the calls made inside the `with` block, in this thread.

    Args:
        name: "cuda", "triton" or "torch"; a variant ("torch:cudnn"), which the operators that do not have it refuse;
            "torch:launchers", plain PyTorch; or None for the automatic choice.

    Raises:
        ValueError: the name is none of these.
        BackendError: (by the operators called inside) the backend cannot run the call; the message says why.

    A backward runs where its forward ran, whatever is forced by then, and so do activations that torch.utils.checkpoint
    recomputes for it. The environment variable GPTKERN_BACKEND, read when gptkern is imported, does the same for a
    process.
    """
    global _forced_while_compiling
    checked_name(name, "backend(name)")
    before = _state.forced
    block = (object(), name)
    again = recomputation.Block(recomputation.here(), functools.partial(backend, name), name)
    with _lock:
        _open_blocks.append(block)
        _forced_while_compiling = name
        _state.forced = _AUTOMATIC if name is None and _default is not None else name
    try:
        with recomputation.opened(again):
            yield
    finally:
        with _lock:
            # Blocks of several threads need not end in the order in which they began.
            _open_blocks.remove(block)
            _state.forced = before
            _forced_while_compiling = _open_blocks[-1][1] if _open_blocks else _default


def twin_of(*torch_functions: Callable) -> Callable:
    """Decorator: the function is the twin of these PyTorch functions."""

    def register(twin: Callable) -> Callable:
        for function in torch_functions:
            TWINS[function] = twin
        return twin

    return register


def explain(function: Callable, *args, **kwargs) -> Choice:
    """The backend that `function(*args, **kwargs)` would run on, and the reason, without running it.

    Args:
        function: an operator of gptkern.functional, or the PyTorch function whose twin it is.

    Raises:
        ValueError: gptkern has no kernels for `function`.
        BackendError: a backend is forced and cannot run the call.
    """
    twin = TWINS.get(function, function)
    if getattr(twin, "__module__", "").partition(".")[0] != "gptkern":
        raise ValueError(f"explain: function is {function!r}; it needs an operator of gptkern.functional or its twin")
    before, _state.observer = _state.observer, _raise_explained
    try:
        twin(*args, **kwargs)
    except _Explained as explained:
        return explained.choice
    finally:
        _state.observer = before
    raise ValueError(f"explain: {function!r} chooses no backend; it runs on PyTorch as it is")


def _raise_explained(choice: Choice) -> None:
    raise _Explained(choice)


@contextlib.contextmanager
def telling(observer: Callable[[Choice], None]):
    """`observer` is told of each choice made inside the `with` block, in this thread, before the call runs."""
    before, _state.observer = _state.observer, observer
    try:
        yield
    finally:
        _state.observer = before


@contextlib.contextmanager
def choices_made():
    """Yields a list to which each choice made inside the `with` block, in this thread, is added."""
    choices: list[Choice] = []
    with telling(choices.append):
        yield choices


def settled(tensor: Any) -> Choice | None:
    """The choice where the call need not be looked at: PyTorch, which then checks the input itself.

    None where kernels may run: the twin then checks its input and calls `chosen`.
    """
    if torch.compiler.is_compiling():
        forced = _forced_while_compiling
    elif (forced := _state.forced) is not None and recomputation.blocks_are_open():
        recomputation.carry()
        forced = _forced_here()
    is_tensor = isinstance(tensor, _Tensor)
    if forced is None:
        # `is_cpu` takes a tenth of the host time of `device.type`.
        if not is_tensor or tensor.is_cpu:
            return _announced(_ON_CPU)
    elif forced == "torch":
        return _announced(_FORCED_TORCH)
    # A nested or sparse tensor has no shape or strides that a check could read.
    if is_tensor and (tensor.is_nested or tensor.layout != _strided):
        if forced is not None:
            raise BackendError(f"backend {forced!r} was asked for and cannot run a nested or sparse tensor")
        return _announced(_NOT_DENSE)
    if tracing.in_jit_trace():
        return _announced(_while_traced(forced))
    return None


def is_pytorchs(tensor: torch.Tensor) -> bool:
    """Whether PyTorch runs each call on the tensor, so that nothing is gained by computing more in one of them."""
    forced = _forced_while_compiling if torch.compiler.is_compiling() else _state.forced
    return tensor.is_cpu if forced is None else forced == "torch"


def _while_traced(forced: str | None) -> Choice:
    if forced is not None:
        raise BackendError(f"backend {forced!r} was asked for and cannot run: {_TRACED.reason}")
    _warn_once("an operator", _TRACED.reason)
    return _TRACED


def on_pytorch(operator: str, reason: str, *, warns: bool = True) -> Choice:
    """The choice of a call that is PyTorch's whatever kernels cover.

    Args:
        warns: whether somebody who expects a kernel would want to know.

    Raises:
        BackendError: kernels are forced.
    """
    forced = _forced()
    if forced not in (None, "torch"):
        raise BackendError(f"backend {forced!r} was asked for and cannot run {operator}: {reason}")
    if warns:
        _warn_once(operator, reason)
    return _announced(Choice("torch", reason))


def choose(operator: str, call: tuple) -> Choice:
    """The backend for a checked call of an operator: the record that its launchers would get."""
    return chosen(operator, call)[0]


def chosen(operator: str, call: tuple) -> tuple[Choice, bool | None]:
    """What twins call: the choice, and whether a launcher may be called as it is (unseen.is_unseen), or None where
    that is not known. Each tensor of most calls is looked at here, once.
    """
    if torch.compiler.is_compiling():
        return _decide(operator, _forced_while_compiling, call), None
    forced = None if _state.forced is None else _forced_here()
    first = call[0]
    # Most calls begin with a tensor; the look for one costs more than all of this.
    device = first.device if isinstance(first, _Tensor) else first_tensor(call).device
    known, is_unseen = _known.get((operator, forced, device)), None
    if known is None:
        choice = _decide(operator, forced, call)
    else:
        choice, unsupported = known
        if unsupported is not None:
            is_unseen = unseen.look(call, device)
            if is_unseen:
                reason = unsupported(call)
            else:
                reason, is_unseen = _uncovered(choice.backend, operator, call), None
            if reason is not None:
                choice, is_unseen = _decide(operator, forced, call), None
    if _state.observer is not None:
        _state.observer(choice)
    return choice, is_unseen


# operator -> what unseen.signature says of its twin's arguments -> what the twin has found out about such calls: of
# GPUs, where nobody forces a backend.
_remembered: dict[str, dict[bytes, Any]] = {}
# A model has a few hundred at most; of what grows with every token no more than this is kept.
_REMEMBERED_AT_MOST = 4096


def recalled(operator: str, arguments: tuple) -> Any | None:
    """What a twin has had remembered of a call with such arguments: it need not be checked again, and is unseen."""
    if torch.compiler.is_compiling() or not (known := _remembered.get(operator)):
        return None
    # A CPU's calls, of a process that has a GPU too, are not to pay for it.
    if _state.forced is not None or _state.observer is not None or not getattr(arguments[0], "is_cuda", False):
        return None
    return known.get(unseen.signature(arguments))


def remember(operator: str, arguments: tuple, found: Any) -> None:
    """`recalled` returns `found` for such arguments from now on.

    For a twin whose checks have passed, and of whose call `chosen` has said that it is unseen. What it does with
    `found` may hang on nothing else that a signature does not tell apart: whether gradients are needed, say.
    """
    if _state.forced is not None or not arguments[0].is_cuda or (key := unseen.signature(arguments)) is None:
        return
    known = _remembered.setdefault(operator, {})
    if len(known) >= _REMEMBERED_AT_MOST:
        known.clear()
    known[key] = found


def first_tensor(arguments: Iterable[Any]) -> torch.Tensor:
    """The tensor that says on which device a call runs; it may stand in a list."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            return argument
        if isinstance(argument, (list, tuple)) and argument:
            return argument[0]
    raise ValueError("the call has no tensor")


def forced() -> str | None:
    """The backend that is forced here, or None."""
    return _forced()


def is_left_to_compiler() -> bool:
    """Whether torch.compile compiles what runs, and nobody forces a backend: an operator that Inductor writes into the
    kernel of what stands around it may then stay PyTorch's."""
    return torch.compiler.is_compiling() and _forced_while_compiling is None


def _forced() -> str | None:
    if torch.compiler.is_compiling():
        return _forced_while_compiling
    return None if _state.forced is None else _forced_here()


def _forced_here() -> str | None:
    """What the innermost block asks for that counts here: what is recomputed knows its own blocks alone."""
    if not recomputation.blocks_are_open():
        return _default
    blocks = recomputation.blocks()
    return blocks[-1].backend if blocks else _default


def _announced(choice: Choice) -> Choice:
    if not torch.compiler.is_compiling() and _state.observer is not None:
        _state.observer(choice)
    return choice


def _decide(operator: str, forced: str | None, call: tuple) -> Choice:
    if forced == "torch":
        return _FORCED_TORCH
    device = first_tensor(call).device
    # Read once: each makes a Python object.
    kind, index = device.type, device.index
    if forced is None and kind == "cpu":
        return _ON_CPU
    if forced is not None:
        reason = _unable(forced, operator, kind, index) or _uncovered(forced, operator, call)
        if reason is not None:
            raise BackendError(f"backend {forced!r} was asked for and cannot run {operator}: {reason}")
        return _kept(operator, forced, kind, index, Choice(forced, BY_NAME))
    preference = _unmeasured_order(operator, kind, index)
    is_measured = preference is None
    if is_measured:
        preference = _preference(operator, index, _class_of[operator](call))
    if preference.order[0] == "torch":
        choice = Choice("torch", preference.reason)
        return choice if is_measured else _kept(operator, forced, kind, index, choice)
    reasons, looked_at = [], is_measured
    for name in preference.order:
        if name == "torch":
            break
        reason = _unable(name, operator, kind, index)
        if reason is None:
            reason = _uncovered(name, operator, call)
            if reason is None:
                because = [f"the input is on {kind}", *reasons] if reasons else [preference.reason]
                choice = Choice(name, "; ".join(because))
                return choice if looked_at else _kept(operator, forced, kind, index, choice)
            looked_at = True
        reasons.append(f"not {name}: {reason}")
    choice = Choice("torch", "; ".join(reasons))
    if kind != "meta":
        _warn_once(operator, choice.reason)
    return choice


# (operator, the forced backend or None, a GPU) -> the choice for each call that its backend covers, and the backend's
# `unsupported` (None of PyTorch). Only of GPUs: a CPU's depends on environment variables, which may change. What was
# measured by classes of calls is not in it.
_known: dict[tuple[str, str | None, torch.device], tuple[Choice, Callable | None]] = {}


def _kept(operator: str, forced: str | None, device_type: str, device_index: int | None, choice: Choice) -> Choice:
    """The choice; later calls of the operator are looked at for what the backend's kernels cover, and no more."""
    if device_type == "cuda" and not torch.compiler.is_compiling():
        unsupported = None if choice.backend == "torch" else load(choice.backend, operator).unsupported
        _known[operator, forced, torch.device(device_type, device_index)] = choice, unsupported
    return choice


def _uncovered(name: str, operator: str, call: tuple) -> str | None:
    """Why the backend's kernels do not cover this call, or None."""
    if tracing.in_torch_func():
        return "a torch.func transform is active, and the kernels' autograd.Functions have no rules for it"
    device = first_tensor(call).device
    for argument in call:
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            reason = _unreadable(tensor, device) if isinstance(tensor, torch.Tensor) else None
            if reason is not None:
                return reason
    return _modules[name, operator].unsupported(call)


def _unreadable(tensor: torch.Tensor, device: torch.device) -> str | None:
    """Why no kernel that runs on the device reads this tensor, or None."""
    if type(tensor) not in unseen.PLAIN_TENSORS:
        return f"{type(tensor).__name__} is a tensor subclass, which kernels cannot read"
    if tensor.device != device:
        return f"tensors are on {device} and {tensor.device}"
    if tracing.is_dual(tensor):
        return "a tensor carries a tangent (torch.autograd.forward_ad), which kernels do not see"
    return None


# (operator, index of a GPU) -> class of calls -> preference; what was measured on that GPU, most often nothing.
_preferences: dict[tuple[str, int | None], dict[tuple, orders.Preference]] = {}
# (operator, type and index of a device) -> the default order, or None where something was measured.
_unmeasured: dict[tuple[str, str, int | None], orders.Preference | None] = {}
# operator -> what finds the class of its calls; of every operator as soon as one has been measured: torch.compile
# traces it, cannot trace an import, and does not see what is added to a global that it has read.
_class_of: dict[str, Callable[[tuple], tuple]] = {}


# A file cannot be read while tracing.
@constant_while_compiling
def _unmeasured_order(operator: str, device_type: str, device_index: int | None) -> orders.Preference | None:
    """The architecture's order where nothing was measured for the operator on the device, else None.

    Host time counts: this is a look-up, and only where it gives None is a call's class found out.
    """
    try:
        return _unmeasured[operator, device_type, device_index]
    except KeyError:
        device = user.identify(torch.device(device_type, device_index))
        found = orders.preferences(operator, device)
        if found:
            _preferences[operator, device_index] = found
            every = {name: operators.problem(name).classes for name in operators.NAMES}
            _class_of.update({name: classes.of for name, classes in every.items() if classes is not None})
        order = _unmeasured[operator, device_type, device_index] = None if found else orders.default(operator, device)
        return order


@constant_while_compiling
def _preference(operator: str, device_index: int | None, shape_class: tuple) -> orders.Preference:
    """The order where something was measured on this GPU, perhaps not for this class."""
    found = _preferences.get((operator, device_index), {}).get(shape_class)
    return found or orders.default(operator, user.identify(torch.device("cuda", device_index)))


def forget() -> None:
    """The tables are read anew at the next call: after one of them was written."""
    orders.forget()
    configurations.forget()
    _preferences.clear()
    _unmeasured.clear()
    _class_of.clear()
    forget_choices()


def forget_choices() -> None:
    """What backends can run on which GPU is found out anew, tables apart."""
    _known.clear()
    _missing.clear()
    _remembered.clear()


# (backend or variant, operator, index of a GPU) -> `missing`: the answer does not change within a process.
_missing: dict[tuple[str, str, int | None], str | None] = {}


# An import cannot be traced.
@constant_while_compiling
def _unable(name: str, operator: str, device_type: str, device_index: int | None) -> str | None:
    """Why the backend cannot run anything on this device, or None. Imports the backend's module."""
    if device_type != "cuda":
        return missing(name, operator, torch.device(device_type, device_index))
    try:
        return _missing[name, operator, device_index]
    except KeyError:
        reason = _missing[name, operator, device_index] = missing(name, operator, torch.device("cuda", device_index))
        return reason


def missing(name: str, operator: str, device: torch.device) -> str | None:
    """Why a backend, or a variant of one, has no kernels of the operator for a device in this process, or None."""
    if ":" in name and name != LAUNCHERS and name not in orders.names(operator):
        return f"{operator} has no such variant; it has {', '.join(orders.names(operator))}"
    reason = unavailable(name, device)
    if reason is None:
        try:
            module = load(name, operator)
        except ImportError as error:
            return f"{type(error).__name__}: {error}"
        if ":" in name and hasattr(module, "unavailable"):
            reason = module.unavailable(device)
    return reason


def load(name: str, operator: str):
    """The module that holds a backend's launchers for an operator."""
    module = _modules.get((name, operator))
    if module is None:
        basename = "contract" if name in ("torch", LAUNCHERS) else name.replace(":", "_")
        module = _modules[name, operator] = importlib.import_module(f"gptkern.operators.{operator}.{basename}")
    return module


@functools.cache
def _installed(module: str) -> bool:
    """Looked up once: the search for a module that is not there costs more than a small layer_norm."""
    return importlib.util.find_spec(module) is not None


@functools.cache
def _emulator_missing() -> str | None:
    from gptkern.backends.cuda import emulated

    return emulated.missing()


def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend has no kernels for a device in this process, or None where it has."""
    name = name.partition(":")[0]
    if name == "torch":
        return None
    if name == "triton" and not _installed("triton"):
        return "triton is not installed"
    if device.type == "cpu":
        switch = "TRITON_INTERPRET" if name == "triton" else "GPTKERN_EMULATE_CUDA"
        if os.environ.get(switch) != "1":
            return f"the input is on the CPU and {switch}=1 is not set"
        return _emulator_missing() if name == "cuda" else None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels are for NVIDIA GPUs and the input is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"kernels need compute capability 8.0 or newer and this GPU has {major}.{minor}"
    if name == "cuda":
        from gptkern.backends.cuda import common

        return common.unavailable(device.index)
    from gptkern.backends.triton import launching

    return launching.missing()


def expected(operator: str, device: torch.device) -> Choice:
    """The choice for calls that the kernels cover, where no call is at hand: of a model that was not yet called."""
    forced = _forced()
    if forced is not None:
        reason = _unable(forced, operator, device.type, device.index)
        return Choice(forced, BY_NAME if reason is None else f"asked for by name, and cannot: {reason}")
    if device.type == "cpu":
        return _ON_CPU._replace(reason="the model is on the CPU")
    preference = _unmeasured_order(operator, device.type, device.index)
    if preference is None:
        return Choice("by size", "measured on this GPU: `gptkern tune --show`")
    reasons = []
    for name in preference.order:
        reason = None if name == "torch" else _unable(name, operator, device.type, device.index)
        if reason is None:
            return Choice(name, "; ".join(reasons) or preference.reason)
        reasons.append(f"not {name}: {reason}")
    raise AssertionError(f"{operator} has no order that ends with torch")


# A warning is no part of the graph.
@constant_while_compiling
def _warn_once(operator: str, reason: str) -> None:
    # Sizes and probabilities vary from call to call; the kind of reason does not.
    kind = operator, re.sub(r"[\d.]+", "#", reason)
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(f"gptkern: {operator} runs on PyTorch's own operator ({reason})", stacklevel=5)
