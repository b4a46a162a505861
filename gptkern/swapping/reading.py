"""What a class's forward calls, read off its bytecode.

    class Block(nn.Module):                     chains of forward:   ("self", "attend"), ("helper",), ("F", "softmax")
        def forward(self, x):                   they lead to:        Block.attend, helper, torch.nn.functional.softmax
            x = helper(self.attend(x))
            return F.softmax(x, -1)             followed:            forward, Block.attend, helper

Followed are methods of `self`, functions of the class's own package, and the functions that a decorator closes over.
What cannot be read off the code (a function looked up in a table, a tensor's method) is not found.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

# A name that code loads, and the attributes that it takes from it.
Chain = tuple[str, ...]
# A function -> where the chains of its code lead to.
Links = dict[types.FunctionType, dict[Chain, Callable]]

LOADS_OF_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_NO_OPERATION = {"EXTENDED_ARG", "CACHE", "PRECALL", "PUSH_NULL", "RESUME", "NOP"}
_MATRIX_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "@"}


class Calls(NamedTuple):
    """What a class's forward calls, as far as its code tells.

    Attributes:
        operators: of the replacements that were found.
        names: every global name and attribute in the code.
        products: how many matrix products.
    """

    operators: frozenset[str]
    names: frozenset[str] = frozenset()
    products: int = 0


def calls(cls: type, find: Callable, start: str = "forward") -> Calls:
    """What the class's forward calls of what `find` knows, itself or through the functions that are followed."""
    links = followed(cls, find, start)
    found = [find(target) for chains in links.values() for target in chains.values()]
    loaded = [name for function in links for name in _names(function.__code__)]
    return Calls(
        frozenset(replacement.operator for replacement in found if replacement),
        frozenset(loaded),
        sum(name in _MATRIX_PRODUCTS for name in loaded),
    )


def names_in(cls: type) -> set[str]:
    """Every global name and attribute in the code of the class's forward, not in what that calls."""
    forward = inspect.unwrap(method(cls, "forward"))
    return set(_names(forward.__code__)) if isinstance(forward, types.FunctionType) else set()


def asks_for_its_type(cls: type) -> bool:
    """Whether the class's forward, or what is followed from it, does with the module's exact class something else than
    taking an attribute from it: a subclass's would get another answer."""
    return any(_asks_for_type(function.__code__) for function in followed(cls) if function.__code__.co_argcount)


def _asks_for_type(code: types.CodeType) -> bool:
    this = code.co_varnames[0]
    found = [instruction for instruction in dis.get_instructions(code) if instruction.opname not in _NO_OPERATION]
    for place, instruction in enumerate(found):
        name, operation = instruction.argval, instruction.opname
        before = found[place - 1] if place else instruction
        if "LOAD_FAST" in operation and name == this and before.argval == "type" and before.opname == "LOAD_GLOBAL":
            after = found[place + 2 : place + 3]  # behind the call
        elif operation == "LOAD_ATTR" and name == "__class__" and before.argval == this:
            after = found[place + 1 : place + 2]
        else:
            continue
        if not after or after[0].opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return True
    return False


def inherited(cls: type, find: Callable) -> list[tuple[type, str]]:
    """The methods that the class's forward, or what is followed from it, calls by `super()`, which is not followed;
    and those that they call by it: a class of the method resolution order and the method's name in it."""
    found: dict[tuple[type, str], None] = {}
    waiting = [(cls, "forward")]
    while waiting:
        start = waiting.pop()
        for function in followed(start[0], find, start[1]):
            names = set(_names_of_super(function.__code__)) if "super" in function.__code__.co_names else ()
            # The class in whose body the function stands.
            holds = (place for place, c in enumerate(cls.__mro__) if any(f is function for f in _functions_of(c)))
            place = next(holds, None) if names else None
            for name in sorted(names) if place is not None else ():
                parent = next((c for c in cls.__mro__[place + 1 :] if name in vars(c)), None)
                if parent is not None and (parent, name) not in found:
                    found[parent, name] = None
                    waiting.append((parent, name))
    return list(found)


def _names_of_super(code: types.CodeType) -> Iterator[str]:
    is_next = False
    for instruction in instructions(code):
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval == "super":
            is_next = True
        elif is_next and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            yield instruction.argval
            is_next = False


def _functions_of(cls: type) -> list[types.FunctionType]:
    """The functions in a class's body, and those under a decorator there."""
    values = [value.__func__ if isinstance(value, staticmethod) else value for value in vars(cls).values()]
    functions = [value for value in values if isinstance(value, types.FunctionType)]
    return [*functions, *map(inspect.unwrap, functions)]


def followed(cls: type, find: Callable = lambda function: None, start: str = "forward") -> Links:
    """forward, and each function that is followed from it, but not into those that `find` replaces."""
    # Of torch, only the modules' own Python functions: torch.nn, not the whole of the package.
    package = "torch.nn." if cls.__module__.startswith("torch.nn.") else cls.__module__.partition(".")[0] + "."
    links: Links = {}
    waiting = [method(cls, start)]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or function in links:
            continue
        links[function] = dict(_links(function, cls, find))
        for chain, target in links[function].items():
            is_global = not is_method(function, chain) and chain[0] not in function.__code__.co_freevars
            same_package = f"{getattr(target, '__module__', None) or ''}.".startswith(package)
            if not find(target) and (same_package or not is_global):
                waiting.append(target)
    return links


def method(cls: type, name: str) -> object:
    """A method's function; of a static method, the function inside."""
    found = inspect.getattr_static(cls, name, None)
    return found.__func__ if isinstance(found, staticmethod) else found


def is_method(function: types.FunctionType, chain: Chain) -> bool:
    """Whether a chain in the function's code is one attribute of its first argument."""
    return len(chain) == 2 and chain[:1] == function.__code__.co_varnames[:1]


def _links(function: types.FunctionType, cls: type, find: Callable) -> Iterator[tuple[Chain, Callable]]:
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or ()))
    for chain in chains(code):
        if is_method(function, chain):
            target = method(cls, chain[1])
            if isinstance(target, types.FunctionType):
                yield chain, target
        elif chain[0] not in (*code.co_varnames, *code.co_cellvars):
            first = contents(cells[chain[0]]) if chain[0] in cells else function.__globals__.get(chain[0])
            target = _attribute(first, chain[1:])
            if callable(target):
                yield chain, target
                continue
            # A table in which functions are looked up by a name, `TABLE[name]` or `TABLE.get(name)`.
            for end in range(1, len(chain) + 1):
                target = _attribute(first, chain[1:end])
                if isinstance(target, Mapping) and find(target):
                    yield chain[:end], target


def contents(cell: types.CellType) -> object:
    """What a closure's cell holds; None where it is empty still."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _attribute(value: object, attributes: tuple[str, ...]) -> object:
    """The attribute of an attribute … of a module, or None."""
    for attribute in attributes:
        if not isinstance(value, types.ModuleType):
            return None
        value = getattr(value, attribute, None)
    return value


def chains(code: types.CodeType) -> Iterator[Chain]:
    """Every name that the code loads, with the attributes taken from it."""
    chain: list[str] = []
    for instruction in instructions(code):
        name, operation = instruction.argval, instruction.opname
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and chain:
            chain.append(name)
            continue
        if chain:
            yield tuple(chain)
            chain = []
        if operation in (*LOADS_OF_GLOBALS, "LOAD_DEREF") or "LOAD_FAST" in operation:
            # Python 3.13 loads two locals, or stores one and loads one, at once; attributes are of the second.
            chain = [name[-1] if isinstance(name, tuple) else name]


def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Those of the code, and of the functions and comprehensions inside it."""
    # EXTENDED_ARG is the first half of the instruction behind it.
    yield from (found for found in dis.get_instructions(code) if found.opname != "EXTENDED_ARG")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from instructions(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    """Each loaded name and attribute, as often as it is loaded, and "@" for each such product."""
    for instruction in instructions(code):
        if instruction.opname in (*LOADS_OF_GLOBALS, "LOAD_ATTR", "LOAD_METHOD"):
            yield instruction.argval
        elif instruction.opname == "BINARY_OP" and instruction.argrepr == "@":
            yield "@"
