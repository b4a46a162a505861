"""swap(model), unswap(model), kernels(): gptkern's operators in a model that was written without them.

    torch.nn.LayerNorm, RMSNorm, Softmax    change their class to the twin in gptkern.nn
    a module whose forward calls F.scaled_dot_product_attention, F.layer_norm, F.rms_norm or F.softmax inline
                                            changes its class to a subclass of its own, whose forward is the
                                            original one with those calls rerouted (gptkern.rerouting)
    a module of transformers (gptkern.integrations.transformers)
                                            gets its attention by the name "gptkern"; a rotary embedding or a norm in
                                            code that is known is rerouted as above

A swapped module is the same object with the same parameters, buffers, hooks and state_dict keys; its original class
and config are noted in its `__dict__`, from where `unswap` takes them back. No global is touched.
"""

from __future__ import annotations

import copyreg
import functools
import logging
import sys
from collections.abc import Callable, Iterable

import torch
from torch.overrides import TorchFunctionMode

from gptkern import nn
from gptkern.dispatch import TWINS
from gptkern.rerouting import FAST_PATHS, Calls, CannotReroute, Replacement, Rerouted, calls
from gptkern.swap_report import Replaced, Skipped, SwapReport

_logger = logging.getLogger("gptkern")


def _operator_of(function: Callable) -> str:
    """The operator that a PyTorch function's twin belongs to: the basename of its module."""
    return TWINS[function].__module__.rpartition(".")[2]


# PyTorch has no function for the rotary embedding: models bring their own.
SWAPPABLE = tuple(sorted({_operator_of(function) for function in TWINS} | {"rotary"}))

# Exact type -> (its twin, the operator that the twin runs on).
_MODULE_TWINS: dict[type, tuple[type, str]] = {
    torch.nn.LayerNorm: (nn.LayerNorm, "layer_norm"),
    torch.nn.RMSNorm: (nn.RMSNorm, "rms_norm"),
    torch.nn.Softmax: (nn.Softmax, "softmax"),
}
# PyTorch's own modules whose forward is rerouted as that of a model's is, and what they run on. In eval mode the two
# encoders bypass their submodules, LayerNorms included.
_REROUTED_TORCH_MODULES: dict[type, tuple[str, ...]] = {
    torch.nn.MultiheadAttention: ("attention", "softmax"),
    torch.nn.TransformerEncoderLayer: ("attention", "layer_norm"),
    torch.nn.TransformerEncoder: ("attention", "layer_norm"),
}
# Where a swapped module's `__dict__` keeps its original class, and the configs that stood under its attributes.
_ORIGINAL = "_gptkern_original"
_CONFIGS = "_gptkern_configs"
# Where a routed class keeps the operators that it routes.
_ROUTED = "_gptkern_routed"


def swap(model: torch.nn.Module, ops: Iterable[str] | None = None, strict: bool = False) -> SwapReport:
    """Put gptkern's operators into a model, in place.

    Replaced are modules of exactly the type `torch.nn.LayerNorm`, `RMSNorm` or `Softmax`; modules whose forward calls
    `F.scaled_dot_product_attention`, `F.layer_norm`, `F.rms_norm` or `F.softmax`, itself, in a method of its own, or in
    a function of its own package; `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder`, which then keep to
    Python in eval mode; and of transformers' models the attention, the rotary embedding and Llama's norm. A call that
    cannot be read off the code (a function looked up in a table, a tensor's method) is not found: `gptkern.kernels()`
    reaches it. Attention or a norm that is written out in Python is named as skipped.

    Parameters stay the same objects, state_dict keys stay the same; dropout, eps, hooks, requires_grad and the
    training flag are not looked at. A second call changes nothing. `gptkern.unswap` takes it back.

    Args:
        model: any module; shared submodules are swapped once.
        ops: the operators to put in, of `gptkern.swapping.SWAPPABLE`; all by default.
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
    plan = _Plan(model, operators)
    for name, module in model.named_modules():
        plan.decide(name or "(model)", module)
    report = plan.report
    if strict and report.skipped:
        left_alone = SwapReport([], report.skipped)
        raise RuntimeError(f"swap: strict, and modules had to be skipped; the model is unchanged\n{left_alone}")
    plan.carry_out()
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
        if not _is_replacement(_bare(type(module)), module.__dict__[_ORIGINAL]):
            raise RuntimeError(
                f"unswap: {name or '(model)'} became a {type(module).__name__} after it was swapped (a "
                "parametrisation, say); undo that first. The model is unchanged"
            )
    for _, module in swapped:
        module.__class__ = _in_place_of(type(module), module.__dict__.pop(_ORIGINAL))
    for module in model.modules():
        for attribute, config in module.__dict__.pop(_CONFIGS, {}).items():
            # Another config that was put there since stays.
            if module.__dict__.get(attribute) is config.current:
                module.__dict__[attribute] = config.restore()
    return model


def kernels(ops: Iterable[str] | None = None) -> TorchFunctionMode:
    """`with gptkern.kernels():` routes the calls of PyTorch's functions made inside it to gptkern's operators.

    Routed are F.scaled_dot_product_attention, F.layer_norm, F.rms_norm, F.softmax, torch.softmax and Tensor.softmax
    (what PyTorch's own modules call inside their C++ or composite functions, as torch.nn.MultiheadAttention does, is
    not seen; nor is a rotary embedding, for which PyTorch has no function). It holds in the thread that enters it, and
    nests.

    Args:
        ops: the operators to route, of `gptkern.swapping.SWAPPABLE`; all by default.

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


# --- The plan ---------------------------------------------------------------------------------------------------------


class _Plan:
    """What to do with each module of a model; nothing is changed before `carry_out`."""

    def __init__(self, model: torch.nn.Module, operators: tuple[str, ...]):
        self.operators = operators
        self.report = SwapReport([], [])
        self.classes: list[tuple[torch.nn.Module, type]] = []
        transformers = _transformers()
        self.attention = transformers.Attention(model, _original_class) if transformers else None

    def decide(self, name: str, module: torch.nn.Module) -> None:
        """Adds the module to the report, and its class and config to what is to change."""
        original, current = _original_class(module), _bare(type(module))
        if original is not current and not _is_replacement(current, original):
            self.skip(name, type(module), "its class was changed after it was swapped")
            return
        by_name, refused = self.decide_attention(name, module, original)
        twin, operator = _MODULE_TWINS.get(original, (None, ""))
        if twin is not None:
            replacement, wanted = twin, (operator,) if operator in self.operators else ()
            shown = f"gptkern.nn.{twin.__name__}"
        else:
            # What an earlier call routed stays routed.
            before = current.__dict__.get(_ROUTED, ())
            asked_for = tuple(o for o in SWAPPABLE if o in self.operators or o in before)
            wanted = tuple(o for o in asked_for if o in _calls(original).operators and o not in refused)
            replacement = _routed(original, wanted) if wanted else None
            wanted = wanted if set(wanted) & set(self.operators) else ()
            shown = f"{original.__name__}, routed"
            self.name_what_is_written_out(name, original)
        if wanted and "forward" in module.__dict__:
            self.skip(name, original, "a forward was set on the instance itself")
        elif wanted:
            if current is not replacement:
                self.classes.append((module, replacement))
            wanted = tuple(o for o in SWAPPABLE if o in wanted or o in by_name)
            shown = f'{shown}, attn_implementation="gptkern"' if by_name else shown
            self.report.replaced.append(Replaced(name, original.__name__, shown, ", ".join(wanted)))
        elif by_name:
            shown = 'attn_implementation="gptkern"'
            self.report.replaced.append(Replaced(name, original.__name__, shown, ", ".join(by_name)))
        else:
            reason = _reason_to_skip(original, self.operators)
            if reason is not None:
                self.skip(name, original, reason)

    def decide_attention(self, name: str, module: torch.nn.Module, original: type) -> tuple[tuple, tuple]:
        """-> ("attention",), () where the module's attention comes by a name in its config; (), ("attention",) where it
        would and cannot."""
        if self.attention is None or "attention" not in self.operators or not _takes_attention_by_name(original):
            return (), ()
        reason = self.attention.reason_against(module)
        if reason is not None:
            self.skip(name, original, reason)
            return (), ("attention",)
        self.attention.want(module)
        return ("attention",), ()

    def name_what_is_written_out(self, name: str, original: type) -> None:
        found = _calls(original)
        if found.explicit_attention and "attention" in self.operators:
            self.skip(name, original, "its attention is written out as matrix products around a softmax")
        if found.explicit_norm and "rms_norm" in self.operators:
            self.skip(name, original, "its norm is written out in Python")
        if "rotary" in self.operators and _brings_its_own_rotary(original):
            self.skip(name, original, "its rotary embedding is of a form of its own")

    def skip(self, name: str, cls: type, reason: str) -> None:
        self.report.skipped.append(Skipped(name, cls.__name__, reason))

    def carry_out(self) -> None:
        for module, replacement in self.classes:
            module.__dict__.setdefault(_ORIGINAL, _bare(type(module)))
            module.__class__ = _in_place_of(type(module), replacement)
        for module, attribute, config in self.attention.changes() if self.attention else ():
            module.__dict__.setdefault(_CONFIGS, {})[attribute] = config
            module.__dict__[attribute] = config.current


def _original_class(module: torch.nn.Module) -> type:
    return module.__dict__.get(_ORIGINAL, _bare(type(module)))


def _reason_to_skip(cls: type, operators: tuple[str, ...]) -> str | None:
    """Why a module that one of the operators might serve is left alone, or None where none would."""
    for base, (twin, operator) in _MODULE_TWINS.items():
        if operator in operators and issubclass(cls, base) and cls not in (base, twin):
            return f"a subclass of torch.nn.{base.__name__} with a forward of its own, in which no call was found"
    for base, of in _REROUTED_TORCH_MODULES.items():
        if set(of) & set(operators) and issubclass(cls, base) and cls is not base:
            return f"a subclass of torch.nn.{base.__name__} with a forward of its own, in which no call was found"
    if issubclass(cls, torch.jit.ScriptModule):
        return "a TorchScript module has no Python forward"
    return None


def _is_replacement(cls: type, original: type) -> bool:
    """Whether `cls` is what a swap makes of `original`."""
    return cls is _MODULE_TWINS.get(original, (None,))[0] or (_ROUTED in cls.__dict__ and cls.__base__ is original)


# --- fully_shard, where it is in use ----------------------------------------------------------------------------------

# (FSDPModule, a class) -> the class of both, which fully_shard made, or `_in_place_of`.
_sharded: dict[tuple[type, ...], type] = {}


def _bare(cls: type) -> type:
    """The class that a module had before torch.distributed.fsdp.fully_shard made one of FSDPModule and it.

    That is the one to swap: the other has no code of its own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or len(cls.__bases__) != 2 or not issubclass(cls.__bases__[0], fsdp.FSDPModule):
        return cls
    _sharded.setdefault(cls.__bases__, cls)
    return cls.__bases__[1]


def _in_place_of(cls: type, replacement: type) -> type:
    """`replacement`; where fully_shard has made `cls`, what it would make of `replacement`."""
    if _bare(cls) is cls:
        return replacement
    bases = cls.__bases__[0], replacement
    if bases not in _sharded:
        # its __deepcopy__, which says that there is none
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        _sharded[bases] = type(cls.__name__, bases, own)
    return _sharded[bases]


# --- transformers, where it is in use ---------------------------------------------------------------------------------


def _transformers():
    """The integration, where the process has loaded what a model of transformers is made of; None otherwise."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from gptkern.integrations import transformers

    return transformers


def _is_from_transformers(cls: type) -> bool:
    # A model's code need not be in the package: it may come with a checkpoint.
    return _transformers() is not None and not cls.__module__.startswith("torch.")


def _takes_attention_by_name(cls: type) -> bool:
    return _is_from_transformers(cls) and (
        _transformers().calls_interface(cls) or "attention" in _overridden_operators(cls)
    )


def _brings_its_own_rotary(cls: type) -> bool:
    return _is_from_transformers(cls) and _transformers().names_other_rotary(cls)


def _overrides(cls: type) -> dict[str, Replacement]:
    return _transformers().overrides(cls) if _is_from_transformers(cls) else {}


def _overridden_operators(cls: type) -> set[str]:
    return {replacement.operator for replacement in _overrides(cls).values()}


# --- Modules that call an operator inline -----------------------------------------------------------------------------


def _find(operators: tuple[str, ...], function: Callable) -> Replacement | None:
    """What takes the place of a function that a forward calls."""
    try:
        if function in FAST_PATHS:
            return FAST_PATHS[function]
        twin = TWINS.get(function)
    except TypeError:  # not hashable
        return None
    if twin is None or _operator_of(function) not in operators:
        return None
    return Replacement(_operator_of(function), twin)


def _find_for(cls: type, operators: tuple[str, ...]) -> Callable[[Callable], Replacement | None]:
    if not _takes_attention_by_name(cls):
        return functools.partial(_find, operators)
    # The softmax that its code names is that of another implementation than the one chosen.
    return _transformers().find if "rotary" in operators else lambda function: None


@functools.cache
def _calls(cls: type) -> Calls:
    """The operators that the class's forward runs on, as far as it can be rerouted."""
    if cls.__module__.startswith("torch.nn.") and cls not in _REROUTED_TORCH_MODULES:
        return Calls(frozenset())
    if issubclass(cls, torch.jit.ScriptModule):
        return Calls(frozenset())
    if cls in _REROUTED_TORCH_MODULES:
        return Calls(frozenset(_REROUTED_TORCH_MODULES[cls]))
    found, overridden = calls(cls, _find_for(cls, SWAPPABLE)), _overridden_operators(cls)
    return found._replace(
        operators=found.operators | overridden,
        explicit_attention=found.explicit_attention and "attention" not in overridden,
        explicit_norm=found.explicit_norm and "rms_norm" not in overridden,
    )


@functools.cache
def _routed(cls: type, operators: tuple[str, ...]) -> type:
    """A subclass of `cls` whose forward is the same with the operators' calls routed to gptkern."""
    members = {name: r.function for name, r in _overrides(cls).items() if r.operator in operators}
    if "forward" not in members:
        members = {**_rerouted_members(cls, operators), **members}

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
            **members,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            _ROUTED: operators,
            "__reduce_ex__": __reduce_ex__,
        },
    )


def _rerouted_members(cls: type, operators: tuple[str, ...]) -> dict[str, object]:
    """forward, and the methods that it calls where these change too."""
    try:
        rerouted = Rerouted(cls, _find_for(cls, operators))
    except CannotReroute as reason:
        _logger.debug("swap: %s: a TorchFunctionMode routes its calls", reason)
        routing = _Routing(operators)

        @functools.wraps(cls.forward)
        def routed_forward(self, *args, **kwargs):
            with routing:
                return cls.forward(self, *args, **kwargs)

        return {"forward": routed_forward}
    inner = rerouted.methods.get("forward", cls.forward)

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        # torch.compile keeps what it has traced; in eager mode the forward's globals may have changed.
        if not torch.compiler.is_compiling():
            rerouted.refresh()
        return inner(self, *args, **kwargs)

    return {**rerouted.methods, "forward": forward}


def _new_routed(cls: type, operators: tuple[str, ...]) -> torch.nn.Module:
    routed = _routed(cls, operators)
    return routed.__new__(routed)
