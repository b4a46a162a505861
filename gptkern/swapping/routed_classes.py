"""The class of a module whose forward is rerouted: a subclass of its own, made for it and for nobody else.

    cls                     the module's class, whose forward calls F.softmax
    routed(cls, ops)        a subclass with the same name; its forward, and the methods that this calls, are cls's with
                            those calls rerouted (gptkern.swapping.rerouting)

Python knows a class's subclasses, so that one in use is found again, and one that no module has goes away. Methods of
`cls` may be patched at any time: the forward looks, at each eager call, whether it still is what `cls` calls for.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
import sys
import types
from collections.abc import Callable

import torch
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from gptkern.backends import recomputation, tracing
from gptkern.swapping import edits, encoders, reading, residual_code, twins
from gptkern.swapping.reading import Calls
from gptkern.swapping.rerouting import CannotReroute, Rerouted, with_own_code
from gptkern.swapping.residual_norms import BORDER, NORMALISES_SUM, Border, running
from gptkern.swapping.twins import Replacement

_logger = logging.getLogger("gptkern")

# Where a routed class keeps the operators that it routes, and its `_RoutedCode`.
_ROUTED = "_gptkern_routed"
_CODE = "_gptkern_code"
# Costs less than `is_compiling`, at each call.
_is_traced = torch.compiler.is_dynamo_compiling
# What torch.jit.script calls of each module, where there is one.
PREPARE_SCRIPTABLE = "__prepare_scriptable__"


def refuse_scripting(module: torch.nn.Module | None = None) -> None:
    """Stands as `__prepare_scriptable__` in what was swapped: TorchScript cannot read what takes a forward's place."""
    name = "a module" if module is None else f"a {type(module).__name__}"
    raise RuntimeError(
        f"torch.jit.script: {name} of the model was swapped to gptkern, of which TorchScript knows nothing; it needs "
        "the original: call gptkern.unswap(model) first"
    )


class Routing(TorchFunctionMode):
    """Sends the calls of PyTorch's functions made inside it to the operators' twins."""

    block: recomputation.Block | None = None

    def __init__(self, operators: tuple[str, ...]):
        super().__init__()
        self.routes = twins.replacements(operators)
        if not torch.compiler.is_compiling():
            # Not in an `__enter__` of its own: torch.compile breaks no graph under one.
            self.block = recomputation.Block(recomputation.here(), functools.partial(Routing, operators))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # PyTorch has popped this mode for the duration of the call: a twin may call the function that it replaces.
        route = self.routes.get(function)
        if route is None:
            return function(*args, **(kwargs or {}))
        if self.block is not None and not torch.compiler.is_compiling():
            if not recomputation.counts(self.block):
                return function(*args, **(kwargs or {}))
            recomputation.carry(self.block)
        return route(*args, **(kwargs or {}))


def transformers() -> types.ModuleType | None:
    """gptkern.swapping.transformers, where the process has loaded what a model of transformers is made of."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from gptkern.swapping import transformers

    return transformers


def integration(cls: type) -> types.ModuleType | None:
    """The same, for a class that may be of a model of transformers."""
    # A model's code need not be in the package: it may come with a checkpoint.
    return None if cls.__module__.startswith("torch.") else transformers()


def takes_attention_by_name(cls: type) -> bool:
    """Whether the class calls what a config of transformers names."""
    known = integration(cls)
    return known is not None and known.takes_attention_by_name(cls)


def calls(cls: type) -> Calls:
    """The operators that the class's forward runs on, as far as it can be rerouted."""
    if cls in twins.ROUTED_MODULES:
        return Calls(frozenset(twins.ROUTED_MODULES[cls]))
    if _is_left_as_it_is(cls):
        return Calls(frozenset())
    found = reading.calls(cls, _find_for(cls, twins.SWAPPABLE))
    if takes_attention_by_name(cls):
        # What it has of products is that of another implementation than the one chosen.
        found = found._replace(products=0)
    after = becomes(cls)
    later = frozenset() if after in (None, cls) else _operators_of(after)
    operators = found.operators | {r.operator for r in _overrides(cls).values()} | later
    norms, border = sums(cls)
    adds = norms or border.returns_sum or border.has_loop
    return found._replace(operators=operators | ({twins.RESIDUAL_NORM} if adds else frozenset()))


def sums(cls: type) -> tuple[list[str], Border]:
    """The attributes of a module of the class that its forward calls for a sum that it has added before; and what its
    code says of the sums that it takes and gives."""
    if cls.__module__.startswith("torch.nn.") or issubclass(cls, torch.jit.ScriptModule):
        return [], Border()
    functions = list(reading.followed(cls, _find_for(cls, twins.SWAPPABLE)))
    return [norm for norm in residual_code.norms(functions) if norm], residual_code.border(functions)


def normalises_sums(cls: type) -> str | None:
    """The operator of a norm that gptkern can compute together with the sum that it normalises; of its class without a
    swap."""
    for original, (twin, operator) in twins.MODULES.items():
        if cls in (original, twin):
            return operator if NORMALISES_SUM in vars(twin) else None
    replaced = _overrides(cls).get("forward")
    known = integration(cls)
    return replaced.operator if replaced is not None and replaced.function in known.OF_SUMS else None


def is_swapped_norm(cls: type) -> bool:
    """Whether a class is one that a swap has put there, and normalises a sum in one call."""
    return NORMALISES_SUM in vars(cls)


def _is_left_as_it_is(cls: type) -> bool:
    is_torchs, is_ours = cls.__module__.startswith("torch.nn."), cls.__module__ == twins.nn.__name__
    return is_torchs or is_ours or issubclass(cls, torch.jit.ScriptModule)


def calls_by_super(cls: type) -> dict[tuple[type, str], frozenset[str]]:
    """Of each method that the class's forward calls by `super()`, where it is one: the operators that it runs on."""
    if _is_left_as_it_is(cls):
        return {}
    found, find = {}, _find_for(cls, twins.SWAPPABLE)
    for parent, name in reading.inherited(cls, find):
        if name == "forward" and parent in twins.ROUTED_MODULES:
            found[parent, name] = frozenset(twins.ROUTED_MODULES[parent])
        else:
            found[parent, name] = reading.calls(parent, find, name).operators
    return {called: operators - {""} for called, operators in found.items() if operators - {""}}


def becomes(cls: type) -> type | None:
    """The class that a lazy module takes at its first call, when it knows its sizes."""
    return cls.cls_to_become if issubclass(cls, LazyModuleMixin) else None


def _operators_of(cls: type) -> frozenset[str]:
    return frozenset({twins.MODULES[cls][1]}) if cls in twins.MODULES else calls(cls).operators


def _overrides(cls: type) -> dict[str, Replacement]:
    known = integration(cls)
    return {} if known is None else known.overrides(cls)


def _find_for(cls: type, operators: tuple[str, ...]) -> Callable[[Callable], Replacement | None]:
    # Where attention comes by name, the softmax in the code is that of another implementation than the one chosen.
    find = transformers().find if takes_attention_by_name(cls) else twins.find

    def find_wanted(function: Callable) -> Replacement | None:
        found = find(function)
        return found if found is not None and found.operator in ("", *operators) else None

    return find_wanted


def is_routed(cls: type, original: type) -> bool:
    """Whether `cls` is a routed class made of `original`."""
    return _ROUTED in cls.__dict__ and cls.__base__ is original


def routed_operators(cls: type) -> tuple[str, ...]:
    """What a routed class routes; nothing where it is none."""
    return cls.__dict__.get(_ROUTED, ())


def routed(cls: type, operators: tuple[str, ...]) -> type:
    """A subclass of `cls` whose forward is the same with the operators' calls routed to gptkern.

    One that is in use is taken again. Nothing here keeps it alive: Python itself knows a class's subclasses.

    Raises:
        Exception: whatever the class's own `__init_subclass__`, or its metaclass, raises.
    """
    for known in type.__subclasses__(cls):
        if routed_operators(known) == operators:
            if known.__dict__[_CODE].is_outdated():
                known.__dict__[_CODE].make()
            return known

    def __reduce_ex__(self, protocol):
        # The class is made here and not found by its name: pickle and deepcopy make it again.
        reduced = cls.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__:
            return (_new_routed, (cls, operators), *reduced[2:])
        return reduced

    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {_ROUTED: operators, "__reduce_ex__": __reduce_ex__, PREPARE_SCRIPTABLE: refuse_scripting}
    if becomes(cls) not in (None, cls):
        members["cls_to_become"] = _swapped(becomes(cls), operators)
    made = type(cls.__name__, (cls,), members)
    if becomes(cls) is cls:
        type.__setattr__(made, "cls_to_become", made)
    type.__setattr__(made, _CODE, _RoutedCode(made, cls, operators))
    return made


def hidden_on(module: torch.nn.Module, routed: type) -> str | None:
    """The method of a routed class in whose place something was set on the module itself, or None."""
    return next((name for name in vars(routed)[_CODE].members if name in module.__dict__), None)


def _swapped(cls: type, operators: tuple[str, ...]) -> type:
    """What a swap would make of the class, with no more than these operators."""
    wanted = tuple(operator for operator in operators if operator in _operators_of(cls))
    if not wanted:
        return cls
    return twins.MODULES[cls][0] if cls in twins.MODULES else routed(cls, wanted)


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
        self.rerouted: Rerouted | None = None
        self.border: Border | None = None
        if "forward" not in methods:
            methods = {**self.rerouted_methods(), **methods}
        names = {"forward", *methods, *(self.rerouted.names if self.rerouted else ())}
        sources = {name: getattr(cls, name, None) for name in names}
        # What a descriptor makes anew each time it is asked says nothing.
        self.sources = tuple((name, f) for name, f in sources.items() if getattr(cls, name, None) is f)
        known, forward = integration(cls), methods.get("forward", cls.forward)
        bare = cls.forward if known is None else known.without_checkpoints(cls.forward)
        if bare is cls.forward or self.rerouted is None:
            members = {**methods, "forward": self.forward(forward)}
        else:
            forward = self.forward(self.rerouted.made_of(bare))
            members = {**methods, "forward": known.with_checkpoints(forward)}
        if self.border is not None:
            members[BORDER] = self.border
        if self.inner in self.of_sums():
            members[NORMALISES_SUM] = self.normalise_sum(self.of_sums()[self.inner])
        for name in self.members.keys() - members.keys():
            type.__delattr__(self.routed, name)
        for name, member in members.items():
            type.__setattr__(self.routed, name, member)
        self.members = members

    def rerouted_methods(self) -> dict[str, object]:
        """forward, and the methods that it calls, where these change."""
        cls = self.cls
        try:
            find = _find_for(cls, self.operators)
            changed = edits.edits(cls, self.operators)
            self.rerouted = Rerouted(cls, find, twins.RESIDUAL_NORM in self.operators, changed)
            if twins.RESIDUAL_NORM in self.operators:
                self.border = residual_code.border(self.rerouted.functions)
            methods = self.rerouted.methods
            if cls in twins.ROUTED_MODULES:
                return {**methods, "forward": encoders.with_fast_path(cls, methods["forward"], find)}
            return methods
        except CannotReroute as reason:
            _logger.debug("swap: %s: a TorchFunctionMode routes its calls", reason)
        routing, inner = Routing(self.operators), cls.forward
        if changed:
            inner = Rerouted(cls, lambda function: None, edits=changed).methods["forward"]

        @with_own_code
        def routed_forward(*args, **kwargs):
            with routing if torch.compiler.is_compiling() else Routing(self.operators):
                return inner(*args, **kwargs)

        return {"forward": routed_forward}

    def forward(self, inner: Callable | staticmethod) -> Callable | staticmethod:
        """`inner`, after a look at whether it still is what the class's forward calls for."""
        cls, routed = self.cls, self.routed
        is_static = isinstance(inspect.getattr_static(cls, "forward"), staticmethod)
        inner = self.inner = inner.__func__ if isinstance(inner, staticmethod) else inner
        run = inner
        if self.border is not None and self.border.has_loop:
            run = with_own_code(running(self.border, inner))
        watch = self.watcher()

        # At each eager call, and at each trace: the class and the globals may have changed.
        @tracing.constant_while_compiling
        def is_outdated() -> bool:
            if not self.is_current():
                self.make()
            return self.inner is not inner

        @functools.wraps(cls.forward)
        @with_own_code
        def forward(*args, **kwargs):
            if is_outdated():
                return routed.forward(*args, **kwargs)
            if _is_traced():
                watch()
            return run(*args, **kwargs)

        # By these torch.compile would take it for a wrapper of its own, around the original forward.
        for attribute in [name for name in vars(forward) if name.startswith("_torchdynamo_")]:
            delattr(forward, attribute)
        return staticmethod(forward) if is_static else forward

    def of_sums(self) -> dict[Callable, Callable]:
        known = integration(self.cls)
        return {} if known is None else known.OF_SUMS

    def normalise_sum(self, of_sum: Callable) -> Callable:
        """What a sum that the module normalises is computed together with, as long as its forward is what it was."""
        routed, inner = self.routed, self.inner

        @tracing.constant_while_compiling
        def is_current() -> bool:
            return self.inner is inner and self.is_current()

        @with_own_code
        def _gptkern_normalise_sum(module, input, residual):
            return of_sum(module, input, residual) if type(module) is routed and is_current() else None

        return _gptkern_normalise_sum

    def watcher(self) -> Callable[[], None]:
        """For torch.compile to trace: it guards on what it sees, and traces again where that is another."""
        cls, functions = self.cls, self.rerouted.readers if self.rerouted else ()

        def watch() -> None:
            cls.forward is None  # noqa: B015
            for read in functions:
                # By their code alone it would not tell two functions of one factory apart (torch 2.11 still does not).
                id(read())

        return watch

    def is_current(self) -> bool:
        """Whether the class's methods, and what they call that is replaced, are what they were: asked at each call."""
        for name, source in self.sources:
            if getattr(self.cls, name, None) is not source:
                return False
        return self.rerouted is None or self.rerouted.is_current()

    def is_outdated(self) -> bool:
        """Whether the class's code, read again, calls something else: asked at each swap."""
        return not self.is_current() or (self.rerouted is not None and self.rerouted.is_outdated())


def _new_routed(cls: type, operators: tuple[str, ...]) -> torch.nn.Module:
    made = routed(cls, operators)
    return made.__new__(made)
