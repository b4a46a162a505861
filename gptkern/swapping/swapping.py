"""swap(model), unswap(model), kernels(): gptkern's operators in a model that was written without them.

    torch.nn.LayerNorm, RMSNorm, Softmax    change their class to the twin in gptkern.nn
    a module whose forward calls F.scaled_dot_product_attention, F.layer_norm, F.rms_norm or F.softmax inline
                                            changes its class to a subclass of its own, whose forward is the
                                            original one with those calls rerouted (gptkern.swapping.rerouting)
    a module of transformers (gptkern.swapping.transformers)
                                            gets its attention by the name "gptkern"; a rotary embedding or a norm in
                                            code that is known is rerouted as above

A swapped module is the same object with the same parameters, buffers, hooks and state_dict keys; its original class
and config are noted in its `__dict__`, from where `unswap` takes them back. No global is touched.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable

import torch
from torch.overrides import TorchFunctionMode

from gptkern import nn
from gptkern.backends.dispatch import TWINS
from gptkern.swapping.report import Replaced, Skipped, SwapReport
from gptkern.swapping.rerouting import FAST_PATHS, Calls, CannotReroute, Replacement, Rerouted, calls

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
# Where a routed class keeps the operators that it routes, and its `_RoutedCode`.
_ROUTED = "_gptkern_routed"
_CODE = "_gptkern_code"


def swap(model: torch.nn.Module, ops: Iterable[str] | None = None, strict: bool = False) -> SwapReport:
    """Put gptkern's operators into a model, in place.

    Replaced are modules of exactly the type `torch.nn.LayerNorm`, `RMSNorm` or `Softmax`; modules whose forward calls
    `F.scaled_dot_product_attention`, `F.layer_norm`, `F.rms_norm` or `F.softmax`, itself, in a method of its own, or in
    a function of its own package; `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder`, which then keep to
    Python in eval mode; and of transformers' models the attention, the rotary embedding and Llama's norm. A call that
    cannot be read off the code (a function looked up in a table, a tensor's method) is not found: `gptkern.kernels()`
    reaches it. Attention or a norm that is written out in Python is named as skipped.

    A rerouted module gets a subclass of its class, so a class's own `__init_subclass__` runs; where that raises, the
    module is skipped. A method that is patched on the class later counts, routed again, from the next call in eager
    mode on; what torch.compile has traced stays.

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
        bare, original = _bare(type(module)), module.__dict__[_ORIGINAL]
        # A class with a __reduce__ of its own gives copies of its own class, with the note.
        if bare is not original and not _is_replacement(bare, original):
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
        # Found out once per swap, and not kept: a class's methods may be patched at any time.
        self.found: dict[type, Calls] = {}
        self.made: dict[tuple[type, tuple[str, ...]], type | str] = {}
        transformers = _transformers()
        self.attention = transformers.Attention(model, _original_class, _noted_configs) if transformers else None

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
            wanted = tuple(o for o in asked_for if o in self.calls_of(original).operators and o not in refused)
            replacement = self.routed(original, wanted) if wanted and "forward" not in module.__dict__ else None
            wanted = wanted if set(wanted) & set(self.operators) else ()
            shown = f"{original.__name__}, routed"
            self.name_what_is_written_out(name, module, original)
        by_its_name = 'attn_implementation="gptkern"'
        if by_name and self.attention.was_eager(module):
            by_its_name += ' (was "eager": no output_attentions)'
        if wanted and isinstance(replacement, str):
            self.skip(name, original, replacement)
            wanted = ()
        if wanted and "forward" in module.__dict__:
            self.skip(name, original, "a forward was set on the instance itself")
        elif wanted:
            if current is not replacement:
                self.classes.append((module, replacement))
            wanted = tuple(o for o in SWAPPABLE if o in wanted or o in by_name)
            shown = f"{shown}, {by_its_name}" if by_name else shown
            self.report.replaced.append(Replaced(name, original.__name__, shown, ", ".join(wanted)))
        elif by_name:
            self.report.replaced.append(Replaced(name, original.__name__, by_its_name, ", ".join(by_name)))
        else:
            reason = _reason_to_skip(original, self.operators)
            if reason is not None:
                self.skip(name, original, reason)

    def calls_of(self, cls: type) -> Calls:
        if cls not in self.found:
            self.found[cls] = _calls(cls)
        return self.found[cls]

    def routed(self, cls: type, operators: tuple[str, ...]) -> type | str:
        """The routed class, or why there can be none."""
        if (cls, operators) not in self.made:
            try:
                self.made[cls, operators] = _routed(cls, operators)
            except Exception as error:  # of the user's own __init_subclass__ or metaclass
                self.made[cls, operators] = f"no subclass of it can be made: {type(error).__name__}: {error}"
        return self.made[cls, operators]

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

    def name_what_is_written_out(self, name: str, module: torch.nn.Module, original: type) -> None:
        found = self.calls_of(original)
        has_softmax = any(isinstance(child, torch.nn.Softmax) for child in module.children())
        explicit_attention = found.explicit_attention or (found.two_products and has_softmax)
        if explicit_attention and "attention" in self.operators:
            self.skip(name, original, "its attention is written out as matrix products around a softmax")
        if found.explicit_norm and "rms_norm" in self.operators:
            self.skip(name, original, "its norm is written out in Python")
        if "rotary" in self.operators and _brings_its_own_rotary(original):
            self.skip(name, original, "its rotary embedding is of a form of its own")

    def skip(self, name: str, cls: type, reason: str) -> None:
        self.report.skipped.append(Skipped(name, cls.__name__, reason))

    def carry_out(self) -> None:
        before = []
        try:
            for module, replacement in self.classes:
                cls = type(module)
                module.__class__ = _in_place_of(cls, replacement)
                before.append((module, cls, _ORIGINAL in module.__dict__))
                module.__dict__.setdefault(_ORIGINAL, _bare(cls))
        except BaseException:
            # A class may refuse another one: then no module changes.
            for module, cls, was_swapped in before:
                module.__class__ = cls
                if not was_swapped:
                    module.__dict__.pop(_ORIGINAL, None)
            raise
        for module, attribute, config in self.attention.changes() if self.attention else ():
            module.__dict__.setdefault(_CONFIGS, {})[attribute] = config
            module.__dict__[attribute] = config.current


def _original_class(module: torch.nn.Module) -> type:
    return module.__dict__.get(_ORIGINAL, _bare(type(module)))


def _noted_configs(module: torch.nn.Module) -> dict:
    return module.__dict__.get(_CONFIGS, {})


def _reason_to_skip(cls: type, operators: tuple[str, ...]) -> str | None:
    """Why a module that one of the operators might serve is left alone, or None where none would."""
    bases = {base: ((operator,), twin) for base, (twin, operator) in _MODULE_TWINS.items()}
    bases |= {base: (of, base) for base, of in _REROUTED_TORCH_MODULES.items()}
    for base, (of, twin) in bases.items():
        if set(of) & set(operators) and issubclass(cls, base) and cls not in (base, twin):
            if cls.forward is base.forward:
                return f"a subclass of torch.nn.{base.__name__}: only that class itself is replaced"
            return f"a subclass of torch.nn.{base.__name__} with a forward of its own, in which no call was found"
    if issubclass(cls, torch.jit.ScriptModule):
        return "a TorchScript module has no Python forward"
    return None


def _is_replacement(cls: type, original: type) -> bool:
    """Whether `cls` is what a swap makes of `original`."""
    return cls is _MODULE_TWINS.get(original, (None,))[0] or (_ROUTED in cls.__dict__ and cls.__base__ is original)


# --- fully_shard, where it is in use ----------------------------------------------------------------------------------


def _bare(cls: type) -> type:
    """The class that a module had before torch.distributed.fsdp.fully_shard made one of FSDPModule and it.

    That is the one to swap: the other has no code of its own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or len(cls.__bases__) != 2 or not issubclass(cls.__bases__[0], fsdp.FSDPModule):
        return cls
    return cls.__bases__[1]


def _in_place_of(cls: type, replacement: type) -> type:
    """`replacement`; where fully_shard has made `cls`, what it would make of `replacement`."""
    if _bare(cls) is cls:
        return replacement
    bases = cls.__bases__[0], replacement
    for known in type.__subclasses__(replacement):
        if known.__bases__ == bases:
            return known
    # its __deepcopy__, which says that there is none
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, own)


# --- transformers, where it is in use ---------------------------------------------------------------------------------


def _transformers():
    """The integration, where the process has loaded what a model of transformers is made of; None otherwise."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from gptkern.swapping import transformers

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


def _calls(cls: type) -> Calls:
    """The operators that the class's forward runs on, as far as it can be rerouted."""
    if cls.__module__.startswith("torch.nn.") and cls not in _REROUTED_TORCH_MODULES:
        return Calls(frozenset())
    if issubclass(cls, torch.jit.ScriptModule):
        return Calls(frozenset())
    if cls in _REROUTED_TORCH_MODULES:
        return Calls(frozenset(_REROUTED_TORCH_MODULES[cls]))
    found, overridden = calls(cls, _find_for(cls, SWAPPABLE)), _overridden_operators(cls)
    by_name = _takes_attention_by_name(cls)
    return found._replace(
        operators=found.operators | overridden,
        explicit_attention=found.explicit_attention and not by_name,
        two_products=found.two_products and not by_name,
        explicit_norm=found.explicit_norm and "rms_norm" not in overridden,
    )


def _routed(cls: type, operators: tuple[str, ...]) -> type:
    """A subclass of `cls` whose forward is the same with the operators' calls routed to gptkern.

    One that is in use is taken again. Nothing here keeps it alive: Python itself knows a class's subclasses.

    Raises:
        Exception: whatever the class's own `__init_subclass__`, or its metaclass, raises.
    """
    for known in type.__subclasses__(cls):
        if known.__dict__.get(_ROUTED) == operators:
            if known.__dict__[_CODE].is_outdated():
                known.__dict__[_CODE].make()
            return known

    def __reduce_ex__(self, protocol):
        # The class is made here and not found by its name: pickle and deepcopy make it again.
        reduced = cls.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:
            return (_new_routed, (cls, operators), *reduced[2:])
        return reduced

    routed = type(
        cls.__name__,
        (cls,),
        {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            _ROUTED: operators,
            "__reduce_ex__": __reduce_ex__,
        },
    )
    type.__setattr__(routed, _CODE, _RoutedCode(routed, cls, operators))
    return routed


class _RoutedCode:
    """The methods of a routed class, and what they were made from: a class's methods may be patched at any time."""

    def __init__(self, routed: type, cls: type, operators: tuple[str, ...]):
        self.routed, self.cls, self.operators = routed, cls, operators
        self.members: dict[str, object] = {}
        self.make()

    def make(self) -> None:
        """Gives the routed class the methods that its original class now calls for."""
        cls = self.cls
        methods = {name: r.function for name, r in _overrides(cls).items() if r.operator in self.operators}
        self.rerouted = None
        if "forward" not in methods:
            methods = {**self.rerouted_methods(), **methods}
        names = {"forward", *methods, *(self.rerouted.names if self.rerouted else ())}
        sources = {name: getattr(cls, name, None) for name in names}
        # What a descriptor makes anew each time it is asked says nothing.
        self.sources = tuple((name, f) for name, f in sources.items() if getattr(cls, name, None) is f)
        members = {**methods, "forward": self.forward(methods.get("forward", cls.forward))}
        for name in self.members.keys() - members.keys():
            type.__delattr__(self.routed, name)
        for name, member in members.items():
            type.__setattr__(self.routed, name, member)
        self.members = members

    def rerouted_methods(self) -> dict[str, object]:
        """forward, and the methods that it calls, where these change."""
        cls = self.cls
        try:
            self.rerouted = Rerouted(cls, _find_for(cls, self.operators))
            return self.rerouted.methods
        except CannotReroute as reason:
            _logger.debug("swap: %s: a TorchFunctionMode routes its calls", reason)
        routing = _Routing(self.operators)

        def routed_forward(*args, **kwargs):
            with routing:
                return cls.forward(*args, **kwargs)

        return {"forward": routed_forward}

    def forward(self, inner: Callable | staticmethod) -> Callable | staticmethod:
        """`inner`, after a look at whether it still is what the class's forward calls for."""
        cls, routed, rerouted, sources = self.cls, self.routed, self.rerouted, self.sources
        is_static = isinstance(inspect.getattr_static(cls, "forward"), staticmethod)
        inner = inner.__func__ if isinstance(inner, staticmethod) else inner

        @functools.wraps(cls.forward)
        def forward(*args, **kwargs):
            # torch.compile keeps what it has traced; in eager mode the class and the globals may have changed.
            if not torch.compiler.is_compiling():
                for name, source in sources:
                    if getattr(cls, name, None) is not source:
                        self.make()
                        return routed.forward(*args, **kwargs)
                if rerouted is not None:
                    rerouted.refresh()
            return inner(*args, **kwargs)

        return staticmethod(forward) if is_static else forward

    def is_outdated(self) -> bool:
        if any(getattr(self.cls, name, None) is not source for name, source in self.sources):
            return True
        return self.rerouted is not None and self.rerouted.is_outdated()


def _new_routed(cls: type, operators: tuple[str, ...]) -> torch.nn.Module:
    routed = _routed(cls, operators)
    return routed.__new__(routed)
