"""A class's forward again, with some of the functions that it calls replaced, and nothing global touched.

    def forward(self, x):                           the same code, in a function whose globals hold, as `F`,
        return F.softmax(self.scores(x), -1)        torch.nn.functional with another softmax

A Python function looks its names up in the dictionary `__globals__` that it was made with, and in the cells of its
closure. `types.FunctionType` makes another function of the same code with another dictionary: nobody else sees the
change, a call costs what it cost before, and an activation that is computed again in the backward takes the same way.

Followed from forward are: methods of `self`, functions of the class's own package, and the functions that a decorator
closes over. What cannot be read off the code (a function looked up in a table, a tensor's method) is not found.

The new dictionary holds what the code names, as it was; `Rerouted.refresh` brings it up to date where the module's
own globals have changed since.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Replacement(NamedTuple):
    """What is called in place of a function, and the operator that it runs on ("" for none)."""

    operator: str
    function: Callable


# A function that a forward calls -> its replacement, or None.
Find = Callable[[Callable], "Replacement | None"]

_MISSING = object()
# Code that writes its globals, or asks for them, has to keep its own. With a `__name__` in them, torch.compile would
# take the names from the module of that name.
_NEEDS_ITS_GLOBALS = {"globals", "eval", "exec", "__name__"}
_MATRIX_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}


class CannotReroute(Exception):
    """A function's code has to keep its globals; the message says why."""


class _Link(NamedTuple):
    """A function that another one names: by a chain of a name and attributes, as ("F", "softmax")."""

    chain: tuple[str, ...]
    target: Callable
    kind: str  # "global", "cell" or "method"


class Calls(NamedTuple):
    """What a class's forward calls, as far as its code tells.

    Attributes:
        operators: of the replacements that were found.
        explicit_attention: two matrix products around a softmax.
        two_products: two matrix products, and no attention that was found.
        explicit_norm: a mean and a reciprocal square root.
    """

    operators: frozenset[str]
    explicit_attention: bool = False
    explicit_norm: bool = False
    two_products: bool = False


class Rerouted:
    """The methods of a class, from forward on, with what `find` knows replaced.

    Attributes:
        methods: name -> function (or staticmethod), for a subclass's dictionary; without those that change nothing.
        names: of all the methods that were followed.

    Raises:
        CannotReroute: one of the functions has to keep its globals.
    """

    def __init__(self, cls: type, find: Find):
        self._cls = cls
        self._find = find
        self._reachable = _reachable(cls, find)
        self._changed = self._find_changed()
        self._made: dict[Callable, types.FunctionType] = {}
        # (the new globals, the function's own, name -> value as last seen)
        self._scopes: list[tuple[dict, types.FunctionType, dict[str, object]]] = []
        # (the new cell, the function's own, the function, the name): where what the cell holds is replaced
        self._cells: list[tuple[types.CellType, types.CellType, types.FunctionType, str]] = []
        # what the own cell held, as last seen
        self._seen_in_cells: list[object] = []
        self.methods: dict[str, object] = {}
        names = {"forward": _static(cls, "forward")}
        for links in self._reachable.values():
            names.update({link.chain[1]: _static(cls, link.chain[1]) for link in links if link.kind == "method"})
        self.names = set(names)
        for name, found in names.items():
            function = found.__func__ if isinstance(found, staticmethod) else found
            if function in self._changed:
                made = self._again(function)
                self.methods[name] = staticmethod(made) if isinstance(found, staticmethod) else made

    def refresh(self) -> None:
        """Take over what has changed in the globals and replaced closure variables of the functions since."""
        for i, (cell, own, function, name) in enumerate(self._cells):
            value = _contents(own)
            if value is not self._seen_in_cells[i]:
                self._seen_in_cells[i] = value
                _fill(cell, value if value is _MISSING else self._substitute(function, name, value))
        for scope, function, seen in self._scopes:
            names = function.__globals__
            for name, before in seen.items():
                value = names.get(name, _MISSING)
                if value is not before:
                    seen[name] = value
                    if value is _MISSING:
                        del scope[name]
                    else:
                        scope[name] = self._substitute(function, name, value)

    def is_outdated(self) -> bool:
        """Whether the class's forward now calls other functions than those that were found."""
        return _by_chain(_reachable(self._cls, self._find)) != _by_chain(self._reachable)

    def _find_changed(self) -> set[Callable]:
        """The functions that call a replaced one, or one that does."""
        changed: set[Callable] = set()
        while True:
            more = {
                function
                for function, links in self._reachable.items()
                if function not in changed
                and any(self._find(link.target) or (link.target in changed and link.kind != "method") for link in links)
            }
            if not more:
                return changed
            changed |= more

    def _again(self, function: types.FunctionType) -> types.FunctionType:
        """The function made anew; in a cycle of functions, the one that is being made."""
        if function in self._made:
            return self._made[function]
        names = _global_names(function.__code__)
        seen = {name: function.__globals__.get(name, _MISSING) for name in names}
        reroutes_globals = any(link.kind == "global" for link in self._links_to_change(function))
        scope = {"__builtins__": function.__globals__["__builtins__"]} if reroutes_globals else function.__globals__
        if reroutes_globals:
            _check_globals(function)
        # Shared with the function's own code and its decorators', but for the cells that hold what is replaced.
        replaced = {link.chain[0] for link in self._links_to_change(function) if link.kind == "cell"}
        cells = tuple(
            types.CellType() if name in replaced else own
            for name, own in zip(function.__code__.co_freevars, function.__closure__ or ())
        )
        made = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, cells if function.__closure__ else None
        )
        made.__kwdefaults__ = function.__kwdefaults__
        made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
        made.__dict__.update(function.__dict__)
        _copy_annotations(function, made)
        self._made[function] = made
        for name, cell, own in zip(function.__code__.co_freevars, cells, function.__closure__ or ()):
            if cell is not own:
                value = _contents(own)
                self._cells.append((cell, own, function, name))
                self._seen_in_cells.append(value)
                _fill(cell, self._substitute(function, name, value))
        if reroutes_globals:
            self._scopes.append((scope, function, seen))
            scope.update(
                {n: self._substitute(function, n, value) for n, value in seen.items() if value is not _MISSING}
            )
        return made

    def _links_to_change(self, function: Callable) -> list[_Link]:
        return [
            link
            for link in self._reachable[function]
            if link.kind != "method" and (self._find(link.target) or link.target in self._changed)
        ]

    def _substitute(self, function: Callable, name: str, value: object) -> object:
        """What stands for `name` in the new function, where `value` stands in its own."""
        replaced = {link.chain[1:]: self._new_target(link) for link in self._links_to_change(function)
                    if link.chain[0] == name and _attribute(value, link.chain[1:]) is link.target}  # fmt: skip
        return _with_attributes(value, replaced) if replaced else value

    def _new_target(self, link: _Link) -> Callable:
        found = self._find(link.target)
        return found.function if found else self._again(link.target)


def calls(cls: type, find: Find) -> Calls:
    """What the class's forward calls of what `find` knows, itself or through the functions that are followed."""
    reachable = _reachable(cls, find)
    found = {find(link.target) for links in reachable.values() for link in links} - {None}
    operators = frozenset(replacement.operator for replacement in found if replacement.operator)
    products = sum(_matrix_products(function.__code__) for function in reachable)
    names = {name for function in reachable for name in _all_names(function.__code__)}
    two_products = products >= 2 and "attention" not in operators
    return Calls(
        operators,
        explicit_attention=two_products and ("softmax" in operators or bool({"softmax", "Softmax"} & names)),
        explicit_norm={"rsqrt", "mean"} <= names and not operators & {"layer_norm", "rms_norm"},
        two_products=two_products,
    )


def names_in(cls: type) -> set[str]:
    """Every global name and attribute in the code of the class's forward (not in what that calls)."""
    forward = _static(cls, "forward")
    forward = inspect.unwrap(forward) if callable(forward) else forward
    return set(_all_names(forward.__code__)) if isinstance(forward, types.FunctionType) else set()


# --- Reading code -----------------------------------------------------------------------------------------------------


def _reachable(cls: type, find: Find) -> dict[types.FunctionType, list[_Link]]:
    """forward, and each function that is followed from it, with the functions that it names."""
    # Of torch, only the modules' own Python functions: torch.nn, not the whole of the package.
    module = cls.__module__
    package = "torch.nn." if module.startswith("torch.nn.") else module.partition(".")[0] + "."
    found: dict[types.FunctionType, list[_Link]] = {}
    waiting = [_static(cls, "forward")]
    while waiting:
        function = waiting.pop()
        if isinstance(function, staticmethod):
            function = function.__func__
        if not isinstance(function, types.FunctionType) or function in found:
            continue
        links = found[function] = list(_links(function, cls))
        for link in links:
            same_package = f"{getattr(link.target, '__module__', None) or ''}.".startswith(package)
            if find(link.target) is None and (link.kind != "global" or same_package):
                waiting.append(_static(cls, link.chain[1]) if link.kind == "method" else link.target)
    return found


def _links(function: types.FunctionType, cls: type) -> Iterator[_Link]:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    this = function.__code__.co_varnames[:1]
    for chain in set(_attribute_chains(function.__code__)):
        if chain[:1] == this and len(chain) == 2:
            method = _static(cls, chain[1])
            method = method.__func__ if isinstance(method, staticmethod) else method
            if isinstance(method, types.FunctionType):
                yield _Link(chain, method, "method")
            continue
        in_cell = chain[0] in cells
        try:
            first = cells[chain[0]].cell_contents if in_cell else function.__globals__.get(chain[0])
        except ValueError:  # an empty cell
            continue
        target = _attribute(first, chain[1:])
        if isinstance(target, Callable) and not isinstance(target, type):
            yield _Link(chain, target, "cell" if in_cell else "global")


def _static(cls: type, name: str) -> object:
    return inspect.getattr_static(cls, name, None)


def _attribute(value: object, attributes: tuple[str, ...]) -> object:
    """The attribute of an attribute … of a module, or None."""
    for attribute in attributes:
        if not isinstance(value, types.ModuleType):
            return None
        value = getattr(value, attribute, None)
    return value


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
        if (
            instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"))
            or "LOAD_FAST" in instruction.opname
        ):
            names = instruction.argval
            # Python 3.13 loads two locals, or stores one and loads one, at once; attributes are of the second.
            chain = [str(names[-1] if isinstance(names, tuple) else names)]
        elif isinstance(instruction.argval, types.CodeType):
            yield from _attribute_chains(instruction.argval)
    if chain:
        yield tuple(chain)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of the functions and comprehensions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _all_names(code: types.CodeType) -> Iterator[str]:
    for inner in _codes(code):
        yield from inner.co_names


def _global_names(code: types.CodeType) -> set[str]:
    return {
        str(instruction.argval)
        for inner in _codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _check_globals(function: types.FunctionType) -> None:
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise CannotReroute(f"{function.__qualname__} writes the global {instruction.argval}")
    asked_for = _NEEDS_ITS_GLOBALS & set(_all_names(function.__code__))
    if asked_for:
        raise CannotReroute(f"{function.__qualname__} uses {', '.join(sorted(asked_for))}")


def _matrix_products(code: types.CodeType) -> int:
    products = 0
    for inner in _codes(code):
        for instruction in dis.get_instructions(inner):
            is_operator = instruction.opname == "BINARY_MATRIX_MULTIPLY" or (
                instruction.opname == "BINARY_OP" and instruction.argrepr == "@"
            )
            is_call = instruction.opname.startswith("LOAD_") and instruction.argval in _MATRIX_PRODUCTS
            products += is_operator or is_call
    return products


# --- Making things anew -----------------------------------------------------------------------------------------------


def _with_attributes(value: object, replaced: dict[tuple[str, ...], Callable]) -> object:
    """The module with some attributes, or attributes of attributes, replaced; or the one replacement itself."""
    if () in replaced:
        return replaced[()]
    module = types.ModuleType(value.__name__, f"{value.__name__}, with some functions replaced")
    # Python asks a module's own `__getattr__` for what it does not hold: everything else stays as it is and current.
    module.__getattr__ = lambda name: getattr(value, name)
    # A module that is made has these, set to None.
    for name in ("__loader__", "__package__", "__spec__"):
        module.__dict__[name] = getattr(value, name, None)
    for attribute in {path[0] for path in replaced}:
        inner = {path[1:]: function for path, function in replaced.items() if path[0] == attribute}
        setattr(module, attribute, _with_attributes(getattr(value, attribute), inner))
    return module


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return _MISSING


def _fill(cell: types.CellType, value: object) -> None:
    if value is not _MISSING:
        cell.cell_contents = value
    elif _contents(cell) is not _MISSING:
        del cell.cell_contents


def _by_chain(reachable: dict[types.FunctionType, list[_Link]]) -> dict:
    return {function: {link.chain: link for link in links} for function, links in reachable.items()}


def _copy_annotations(function: types.FunctionType, made: types.FunctionType) -> None:
    # Python 3.14 evaluates annotations when they are asked for, which may fail.
    if hasattr(function, "__annotate__"):
        made.__annotate__ = function.__annotate__
    else:
        made.__annotations__ = function.__annotations__


def never_take_the_fast_path() -> bool:
    return False


# torch.nn's encoder and MultiheadAttention leave Python, and so their own submodules, for one fused operator in eval
# mode where this function allows it.
FAST_PATHS = {torch.backends.mha.get_fastpath_enabled: Replacement("", never_take_the_fast_path)}
