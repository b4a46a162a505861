"""A class's forward again, with some of the functions that it calls replaced, and nothing global touched.

    def forward(self, x):                           the same code with the same globals, but where F.softmax leads to
        return F.softmax(self.scores(x), -1)        torch's own another softmax takes its place, from a cell

The code is made anew (gptkern.swapping.rerouting_code), in an object of its own (`own_code`): what torch.compile makes
of a function it keeps by the code object. Nobody else sees the change, an activation that is computed again in the
backward takes the same way, and a global that is written counts as it does for the original, while the code runs, too.
Where a chain no longer leads to what was replaced, the code goes where it leads.

Made anew are the functions that call a replaced one, or one that is made anew (gptkern.swapping.reading says which
calls are seen).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Mapping

from gptkern.swapping import residual_code, residual_norms
from gptkern.swapping.edited_code import Edit
from gptkern.swapping.reading import Chain, contents, followed, instructions, is_method, method
from gptkern.swapping.rerouting_code import CannotReroute, cell_names, rerouted, sum_cell_names

# Code that asks for its variables would see cells that are not its own; text that it runs may call what is replaced.
_LOOKS_AT_ITSELF = {"locals", "vars", "dir", "eval", "exec"}

# Where torch.compile's wrapper of a function, as a decorator, notes what to trace in its place.
_INLINE = "_torchdynamo_inline"
# How many code objects were copied.
_copies = itertools.count()


class Rerouted:
    """The methods of a class, from forward on, with what `find` knows replaced.

    Args:
        find: a function that is called -> its Replacement, or None.
        sums: whether a sum that is normalised next is computed together with its norm.
        edits: a function -> other code that it has, before names in it are replaced.

    Attributes:
        methods: name -> function (or staticmethod), for a subclass's dictionary; without those that change nothing.
        names: of all the methods that were followed.
        readers: each gives, as the globals are now, what leads to a function that another was made of.

    Raises:
        CannotReroute: one of the functions has to keep its code.
    """

    def __init__(
        self,
        cls: type,
        find: Callable,
        sums: bool = False,
        edits: Mapping[types.FunctionType, Edit] | None = None,
    ):
        self._cls, self._find = cls, find
        self._links = followed(cls, find)
        self._edits = {function: edit for function, edit in (edits or {}).items() if function in self._links}
        self._sums = {f: residual_code.sums(self._code_of(f)) if sums else [] for f in self._links}
        self._made: dict[types.FunctionType, types.FunctionType] = {}
        # The globals that a replaced chain begins with: whose, the name, what it was.
        self._globals: list[tuple[dict[str, object], str, object]] = []
        # The cells that hold what is replaced, and those that hold nothing yet: what `contents` gave of each.
        self._cells = [(cell, None) for function in self._links for cell in _empty_cells(function)]
        self._changed: set[Callable] = {*self._edits, *(function for function, found in self._sums.items() if found)}
        self.readers: tuple[Callable, ...] = ()
        while more := {f for f in self._links if f not in self._changed and self._replaced_in(f)}:
            self._changed |= more

        self.names = {chain[1] for f, links in self._links.items() for chain in links if is_method(f, chain)}
        self.names.add("forward")
        self.methods: dict[str, object] = {}
        for name in self.names:
            if method(cls, name) in self._changed:
                made = self._again(method(cls, name))
                made = _behind_a_function(made) if name != "forward" and _INLINE in vars(made) else made
                is_static = isinstance(inspect.getattr_static(cls, name), staticmethod)
                self.methods[name] = staticmethod(made) if is_static else made

    @property
    def functions(self) -> list[types.FunctionType]:
        """Those that were followed, as they were."""
        return list(self._links)

    def made_of(self, function: types.FunctionType) -> types.FunctionType:
        """What was made of a function; the function itself where nothing in it changes."""
        return self._made.get(function, function)

    def is_current(self) -> bool:
        """Whether the globals and cells that lead to what is replaced hold what they did; if not, all has to be made
        again for it to be replaced."""
        for cell, before in self._cells:
            if contents(cell) is not before:
                return False
        for own, name, before in self._globals:  # noqa: SIM110  a generator costs at each call
            if own.get(name) is not before:
                return False
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

    def _again(self, function: types.FunctionType) -> types.FunctionType:
        """The function made anew; in a circle of functions, the one that is being made."""
        if function in self._made:
            return self._made[function]
        code = self._code_of(function)
        replaced = self._replaced_in(function)
        # All cells are shared with the function's own code, and with its decorators'.
        old_cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
        edit = self._edits.get(function)
        new_cells = {name: types.CellType(value) for name, value in edit.cells.items()} if edit else {}
        cells = {name: (old_cells | new_cells)[name] for name in code.co_freevars}
        # torch.compile knows its own wrappers by their code; that they close over something else, its guards see.
        keeps_code = _is_torchs(function) and all(len(chain) == 1 and chain[0] in cells for chain in replaced)
        if keeps_code:
            cells |= {chain[0]: types.CellType() for chain in replaced}
        else:
            code = self._code_again(function, replaced)
            cells |= {name: types.CellType() for name in cell_names(replaced)}
            sums = self._sums[function]
            for name, norm in zip(sum_cell_names(sums), dict.fromkeys(found.norm for found in sums)):
                cells[name] = types.CellType(residual_norms.adding(norm))
        made = types.FunctionType(
            code, function.__globals__, function.__name__, function.__defaults__, tuple(cells.values())
        )
        made.__kwdefaults__ = function.__kwdefaults__
        self._made[function] = functools.update_wrapper(made, function)
        self._take_attributes(made, function)
        for chain, target in replaced.items():
            first, another = chain[0], self._new_target(target)
            if first in old_cells:
                self._cells.append((old_cells[first], old_cells[first].cell_contents))
            else:
                self._globals.append((function.__globals__, first, function.__globals__[first]))
            if keeps_code:
                cells[first].cell_contents = another
                continue
            known, instead = (cells[name] for name in cell_names([chain]))
            known.cell_contents, instead.cell_contents = target, another
            if not self._find(target):
                self.readers = (*self.readers, _reader(chain, function.__globals__, old_cells.get(first)))
        return made

    def _code_of(self, function: types.FunctionType) -> types.CodeType:
        return self._edits[function].code if function in self._edits else function.__code__

    def _code_again(self, function: types.FunctionType, chains: dict[Chain, Callable]) -> types.CodeType:
        code = self._code_of(function)
        for instruction in instructions(code):
            if instruction.opname == "LOAD_GLOBAL" and instruction.argval in _LOOKS_AT_ITSELF:
                raise CannotReroute(f"{function.__qualname__} uses {instruction.argval}")
        return own_code(rerouted(code, chains, self._sums[function]))

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


def _reader(chain: Chain, own: dict[str, object], cell: types.CellType | None) -> types.FunctionType:
    """A function that gives what the chain leads to, from these globals or from this cell on."""
    code = compile(f"lambda {chain[0] if cell else ''}: lambda: {'.'.join(chain)}", __file__, "eval")
    for _ in range(2):
        code = next(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return types.FunctionType(code, own, closure=(cell,) if cell else ())


def _empty_cells(function: types.FunctionType) -> list[types.CellType]:
    # An empty cell equals no other than an empty one.
    return [cell for cell in function.__closure__ or () if cell == types.CellType()]


def _behind_a_function(compiled: types.FunctionType) -> types.FunctionType:
    """A plain function that calls it: of a compiled method that has a closure torch.compile would guard on the
    wrapper's cells in place of the method's."""

    @functools.wraps(compiled)
    @with_own_code
    def behind(*args, **kwargs):
        return compiled(*args, **kwargs)

    for attribute in [name for name in vars(behind) if name.startswith("_torchdynamo_")]:
        delattr(behind, attribute)
    return behind


def _is_torchs(function: types.FunctionType) -> bool:
    return f"{function.__globals__.get('__name__')}.".startswith("torch.")
