"""Layers of which a module's own code reads the weight, read off its bytecode.

    x @ self.fc.weight.t()                      ("fc",)
    x.to(self.mlp[0].weight.dtype)              ("mlp", ANY)
    for block in self.blocks:
        x = x.to(block.fc.weight)               ("blocks", ANY, "fc")

The code is walked once from top to bottom with a stack of where each value comes from: an attribute of `self`, or
something inside one (subscripted, looped over, given back by a call that got it). Branches are taken one after another,
and a local variable is all that was ever put into it: too many layers are named rather than too few.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import types
from collections.abc import Iterator

import torch

from gptkern.swapping import reading

ANY = "*"  # in a path: anything below, at any depth
Path = tuple[str, ...]
# Where a value comes from: paths from `self`, () for itself.
_Sources = frozenset[Path]

_NOTHING: _Sources = frozenset()
# Of the tensors' attributes, those that an int8 weight has as well as the float one.
_SAME_FOR_INT8 = {"device", "is_cuda"}
# Methods of torch.nn.Module and its containers that give modules inside.
_GIVE_MODULES = {
    "modules", "named_modules", "children", "named_children", "get_submodule", "values", "items", "get", "__getattr__",
}  # fmt: skip

_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_NO_INSTRUCTIONS = ("EXTENDED_ARG", "CACHE")
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_LEAVES = (
    "JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS",
    "RERAISE",
)  # fmt: skip
_GIVE_NOTHING = ("STORE_", "DELETE_", "POP_", "RETURN_", "RAISE", "RERAISE", "END_", "JUMP_")
_TAKE_ONE = ("YIELD_VALUE", "LIST_TO_TUPLE", "GET_YIELD_FROM_ITER", "BUILD_TUPLE", "BUILD_LIST", "BUILD_SET")


def weights_read(cls: type) -> set[Path]:
    """The paths of what has a weight that a class's forward reads, or a method or property that is used from there."""
    waiting = [function for function in reading.followed(cls) if function.__code__.co_argcount]
    functions: dict[types.FunctionType, set[str]] = {}  # -> the attributes in it
    while waiting:
        function = waiting.pop()
        names = {found.argval for found in reading.instructions(function.__code__) if found.opname in _ATTRIBUTES}
        functions[function] = names
        getters = [getattr(inspect.getattr_static(cls, name, None), "fget", None) for name in sorted(names)]
        waiting += [getter for getter in getters if isinstance(getter, types.FunctionType) and getter not in functions]
    if not any("weight" in names for names in functions.values()):
        return set()
    # What a method of `self` gives back; a second round for those that call one another.
    given: dict[str, _Sources] = {}
    found: set[Path] = set()
    for _ in range(2):
        for function in functions:
            walk = _Walk(given)
            walk.put(function.__code__.co_varnames[0], frozenset([()]))
            walk.code(function.__code__)
            found |= walk.found
            given[function.__name__] = walk.given
    return found


def modules_at(module: torch.nn.Module, path: Path) -> Iterator[torch.nn.Module]:
    """The modules that a path leads to, none where an attribute is no module."""
    if not path:
        yield module
        return
    name, rest = path[0], path[1:]
    if name == ANY:
        for inner in module.modules():
            yield from modules_at(inner, rest)
        return
    if name in _GIVE_MODULES and rest[:1] == (ANY,):
        yield from modules_at(module, rest)
        return
    value = module._modules[name] if name in module._modules else vars(module).get(name)
    # Modules in a list or a dict that PyTorch does not know of.
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    for inner in values:
        if isinstance(inner, torch.nn.Module):
            yield from modules_at(inner, rest)


def _inside(sources: _Sources) -> _Sources:
    """Of something inside each; whatever is inside that is too."""
    return frozenset((*path[: path.index(ANY)], ANY) if ANY in path else (*path, ANY) for path in sources)


class _Walk:
    """Through one function, with the functions and comprehensions inside it.

    Attributes:
        found: the paths whose weight was read.
        given: where what it returns comes from.
        locals: name -> where what was ever put into it comes from.
    """

    def __init__(self, of_methods: dict[str, _Sources]):
        self.of_methods = of_methods
        self.found: set[Path] = set()
        self.given = _NOTHING
        self.locals: dict[str, _Sources] = {}

    def put(self, name: str, sources: _Sources) -> None:
        self.locals[name] = self.locals.get(name, _NOTHING) | sources

    def code(self, code: types.CodeType, outermost: bool = True) -> None:
        # Twice: what a loop puts into a variable at its end is there at its start.
        for _ in range(2):
            self._once(code, outermost)
        for inner in code.co_consts:
            if isinstance(inner, types.CodeType):
                self.code(inner, outermost=False)

    def _once(self, code: types.CodeType, outermost: bool) -> None:
        stack: list[_Sources] = []
        stacks: dict[int, list[_Sources]] = {}  # at an instruction, from the jumps to it
        reached = True
        instructions = [found for found in dis.get_instructions(code) if found.opname not in _NO_INSTRUCTIONS]
        for instruction, following in itertools.zip_longest(instructions, instructions[1:]):
            if (jumped := stacks.get(instruction.offset)) is not None:
                if not reached:
                    stack = list(jumped)
                elif len(stack) == len(jumped):
                    stack = [one | other for one, other in zip(stack, jumped)]
            if instruction.opname == "RETURN_VALUE" and outermost and stack:
                self.given |= stack[-1]
            before = list(stack)
            self._step(instruction, following, stack)
            if instruction.opcode in _JUMPS:
                # Others take nothing where they jump.
                pops = instruction.opname.startswith("POP_")
                stacks.setdefault(instruction.argval, list(stack) if pops else before)
            reached = instruction.opname not in _LEAVES

    def _step(self, instruction: dis.Instruction, following: dis.Instruction | None, stack: list[_Sources]) -> None:
        operation, name, argument = instruction.opname, instruction.argval, instruction.arg or 0

        def pop(count: int = 1) -> _Sources:
            return frozenset().union(*(stack.pop() for _ in range(min(count, len(stack)))))

        if operation in _ATTRIBUTES:
            sources = pop()
            same = following and following.opname in _ATTRIBUTES and following.argval in _SAME_FOR_INT8
            if name == "weight" and not same:
                self.found |= sources - {()}
            stack.append(self._attribute(sources, name))
            # A method comes with a second value, `self` or nothing.
            if dis.stack_effect(instruction.opcode, instruction.arg) == 1:
                stack.append(_NOTHING)
        elif operation == "STORE_FAST_LOAD_FAST":
            self.put(name[0], pop())
            stack.append(self.locals.get(name[1], _NOTHING))
        elif "LOAD_FAST" in operation or operation == "LOAD_DEREF":
            # Python 3.13 loads two at once, and stores two.
            stack.extend(self.locals.get(one, _NOTHING) for one in (name if isinstance(name, tuple) else (name,)))
        elif "STORE_FAST" in operation or operation == "STORE_DEREF":
            for one in name if isinstance(name, tuple) else (name,):
                self.put(one, pop())
        elif operation == "COPY":
            stack.append(stack[-argument] if argument <= len(stack) else _NOTHING)
        elif operation == "SWAP":
            if argument <= len(stack):
                stack[-1], stack[-argument] = stack[-argument], stack[-1]
        elif operation == "GET_ITER":
            sources = _inside(pop())
            self.put(".0", sources)  # what a comprehension calls it
            stack.append(sources)
        elif operation == "FOR_ITER":
            stack.append(stack[-1] if stack else _NOTHING)
        elif operation in ("UNPACK_SEQUENCE", "UNPACK_EX"):
            stack.extend([_inside(pop())] * (1 + dis.stack_effect(instruction.opcode, argument)))
        elif operation in ("LIST_APPEND", "LIST_EXTEND", "SET_ADD", "SET_UPDATE"):
            sources = pop()
            if argument <= len(stack):
                stack[-argument] |= sources
        elif operation in ("CALL", "CALL_KW"):
            # The function and its `self`, and the keywords' names.
            stack.append(_inside(pop(argument + (3 if operation == "CALL_KW" else 2))))
        elif operation != "PRECALL":
            effect = dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
            if effect > 0:
                stack.extend([_NOTHING] * effect)
            elif operation.startswith(_GIVE_NOTHING):
                pop(-effect)
            elif effect < 0 or operation in _TAKE_ONE:
                stack.append(_inside(pop(1 - effect)))

    def _attribute(self, sources: _Sources, name: str) -> _Sources:
        given = self.of_methods.get(name, _NOTHING) if () in sources else _NOTHING
        return given | {(*path, name) for path in sources}
