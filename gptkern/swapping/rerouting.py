"""A class's forward again, with some of the functions that it calls replaced, and nothing global touched.

    def forward(self, x):                           the same code, in a function whose globals hold, as `F`,
        return F.softmax(self.scores(x), -1)        torch.nn.functional with another softmax

A Python function looks its names up in the dictionary `__globals__` that it was made with, and in the cells of its
closure. `types.FunctionType` makes another function with another dictionary: nobody else sees the change, a call costs
what it cost before, and an activation that is computed again in the backward takes the same way. Its code is a copy
(`own_code`): what torch.compile makes of a function it keeps by the code object, whatever the globals.

Made anew are the functions that call a replaced one, or one that is made anew (gptkern.swapping.reading says which
calls are seen). The new dictionary holds what the code names, as it was; `Rerouted.refresh` brings it up to date.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable
from typing import NamedTuple

from gptkern.swapping.reading import Chain, contents, followed, global_names, instructions, is_method, method
from gptkern.swapping.writers import ANY, written

_MISSING = object()
# Code that writes its globals, or asks for them, has to keep its own; so has code that reads one which is written while
# it runs (gptkern.swapping.writers). With a `__name__` in them, torch.compile would take the names from the module of
# that name.
_NEEDS_ITS_GLOBALS = {"globals", "eval", "exec", "__name__"}

# How many code objects were copied.
_copies = itertools.count()


class CannotReroute(Exception):
    """A function's code has to keep its globals; the message says why."""


class _Scope(NamedTuple):
    """The globals of a function that was made anew."""

    new: dict[str, object]
    own: dict[str, object]  # those of the function it was made from
    seen: dict[str, object]  # what these held when `new` was last brought up to date
    replaced: frozenset[str]  # the names that stand for something else in `new`


class Rerouted:
    """The methods of a class, from forward on, with what `find` knows replaced.

    Args:
        find: a function that is called -> its Replacement, or None.

    Attributes:
        methods: name -> function (or staticmethod), for a subclass's dictionary; without those that change nothing.
        names: of all the methods that were followed.

    Raises:
        CannotReroute: one of the functions has to keep its globals.
    """

    def __init__(self, cls: type, find: Callable):
        self._cls, self._find = cls, find
        self._links = followed(cls, find)
        self._made: dict[types.FunctionType, types.FunctionType] = {}
        self._scopes: list[_Scope] = []
        self._written: dict[int, dict[str, str]] = {}  # by the id of the globals
        # The cells that hold what is replaced, and those that hold nothing yet: what `contents` gave of each.
        self._cells = [(cell, None) for function in self._links for cell in _empty_cells(function)]
        self._changed: set[Callable] = set()
        while more := {f for f in self._links if f not in self._changed and self._replaced_in(f)}:
            self._changed |= more

        self.names = {chain[1] for f, links in self._links.items() for chain in links if is_method(f, chain)}
        self.names.add("forward")
        self.methods: dict[str, object] = {}
        for name in self.names:
            if method(cls, name) in self._changed:
                made = self._again(method(cls, name))
                is_static = isinstance(inspect.getattr_static(cls, name), staticmethod)
                self.methods[name] = staticmethod(made) if is_static else made

    def refresh(self) -> bool:
        """Take over what has changed in the functions' globals; False where what was replaced is another thing now, and
        all has to be made again."""
        for cell, before in self._cells:
            if contents(cell) is not before:
                return False
        for scope in self._scopes:
            for name, before in scope.seen.items():
                value = scope.own.get(name, _MISSING)
                if value is before:
                    continue
                if name in scope.replaced:
                    return False
                scope.seen[name] = value
                if value is _MISSING:
                    scope.new.pop(name, None)  # another thread may have been faster
                else:
                    scope.new[name] = value
        return True

    def is_outdated(self) -> bool:
        """Whether the class's forward now calls other functions than those that were found."""
        return followed(self._cls, self._find) != self._links

    def _replaced_in(self, function: types.FunctionType) -> dict[Chain, Callable]:
        """The chains in the function's code that have to lead elsewhere; a method is found in the new class."""
        return {
            chain: target
            for chain, target in self._links[function].items()
            # What is no function may have no hash.
            if not is_method(function, chain)
            and (self._find(target) or (isinstance(target, types.FunctionType) and target in self._changed))
        }

    def _check_globals(self, function: types.FunctionType) -> None:
        """A function that writes its globals, or reads what may be written while it runs, cannot have a copy."""
        for instruction in instructions(function.__code__):
            if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise CannotReroute(f"{function.__qualname__} writes the global {instruction.argval}")
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in _NEEDS_ITS_GLOBALS:
                raise CannotReroute(f"{function.__qualname__} uses {instruction.argval}")
        own = function.__globals__
        if id(own) not in self._written:
            self._written[id(own)] = written(own, self._links)
        for name, writer in self._written[id(own)].items():
            if name == ANY:
                raise CannotReroute(f"{writer} may write any global, also of those that {function.__qualname__} reads")
            if name in global_names(function.__code__):
                raise CannotReroute(f"{function.__qualname__} reads the global {name}, which {writer} writes")

    def _again(self, function: types.FunctionType) -> types.FunctionType:
        """The function made anew; in a cycle of functions, the one that is being made."""
        if function in self._made:
            return self._made[function]
        code, own = function.__code__, function.__globals__
        replaced = self._replaced_in(function)
        in_cells = {chain[0] for chain in replaced} & set(code.co_freevars)
        in_globals = {chain[0] for chain in replaced} - in_cells
        new = own
        if in_globals:
            self._check_globals(function)
            seen = {name: own.get(name, _MISSING) for name in ("__builtins__", "__package__", *global_names(code))}
            new = {name: value for name, value in seen.items() if value is not _MISSING}
            self._scopes.append(_Scope(new, own, seen, frozenset(in_globals)))
        # All other cells are shared with the function's own code, and with its decorators'.
        old_cells = function.__closure__ or ()
        cells = tuple(types.CellType() if n in in_cells else cell for n, cell in zip(code.co_freevars, old_cells))
        # torch.compile knows its own wrappers by their code; that they close over something else, its guards see.
        keeps_code = new is own and _is_torchs(function)
        made = types.FunctionType(
            code if keeps_code else own_code(code), new, function.__name__, function.__defaults__, cells
        )
        made.__kwdefaults__ = function.__kwdefaults__
        self._made[function] = functools.update_wrapper(made, function)
        self._take_attributes(made, function)

        def replacement_of(name: str, value: object) -> object:
            paths = {chain[1:]: target for chain, target in replaced.items() if chain[0] == name}
            return _with_attributes(value, {path: self._new_target(target) for path, target in paths.items()})

        for name, cell, old in zip(code.co_freevars, cells, old_cells):
            if name in in_cells:
                self._cells.append((old, old.cell_contents))
                cell.cell_contents = replacement_of(name, old.cell_contents)
        for name in in_globals:
            new[name] = replacement_of(name, own[name])
        return made

    def _take_attributes(self, made: types.FunctionType, function: types.FunctionType) -> None:
        """The attributes of the function, for the one that was made of it.

        A decorator may note the function inside as one, and torch.compile, where it meets its own wrapper in what it
        compiles, takes the function that is noted there.
        """
        del made.__wrapped__  # by functools.update_wrapper: the function itself
        for name, value in vars(function).items():
            if isinstance(value, types.FunctionType) and value in self._changed:
                value = self._again(value)
            # By this torch.compile tells its own wrapper from another decorator's, which copies the attributes.
            elif name == "_torchdynamo_wrapper_id" and value == id(function):
                value = id(made)
            made.__dict__[name] = value

    def _new_target(self, target: Callable) -> Callable:
        found = self._find(target)
        return found.function if found else self._again(target)


def with_own_code(function: types.FunctionType) -> types.FunctionType:
    """Decorator of a function that is made for a class: torch.compile makes only so much of one code object."""
    function.__code__ = own_code(function.__code__)
    return function


def own_code(code: types.CodeType) -> types.CodeType:
    """The same code in an object of its own, which equals no other; so too the functions inside it.

    What a traceback or a profiler shows of it (file, line, name) is the same.
    """
    inner = (own_code(constant) if isinstance(constant, types.CodeType) else constant for constant in code.co_consts)
    # Codes are equal where their constants are: this one is never loaded.
    return code.replace(co_consts=(*inner, ("copy", next(_copies))))


def _empty_cells(function: types.FunctionType) -> list[types.CellType]:
    # An empty cell equals no other than an empty one.
    return [cell for cell in function.__closure__ or () if cell == types.CellType()]


def _is_torchs(function: types.FunctionType) -> bool:
    return f"{function.__globals__.get('__name__')}.".startswith("torch.")


def _with_attributes(value: object, replaced: dict[Chain, Callable]) -> object:
    """The module with some attributes, or attributes of attributes, replaced; or the one replacement itself."""
    if () in replaced:
        return replaced[()]
    module = types.ModuleType(value.__name__)
    # Python asks a module's own `__getattr__` for what it does not hold: everything else stays as it is and current.
    module.__getattr__ = lambda name: getattr(value, name)
    for attribute in {path[0] for path in replaced}:
        inner = {path[1:]: function for path, function in replaced.items() if path[0] == attribute}
        setattr(module, attribute, _with_attributes(getattr(value, attribute), inner))
    return module
