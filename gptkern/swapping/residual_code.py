"""Where a function adds two tensors and then normalises their sum, read off its bytecode.

    x = x + self.attention(self.attention_norm(x))              the sum, kept in x
    return x + self.perceptron(self.perceptron_norm(x))         self.perceptron_norm of that sum

Between the addition and the call of `self.NAME(sum)` there may be nothing but names that are loaded and stored,
attributes that are taken from `self`, and a jump where an argument is None (GPT-2's `if encoder_hidden_states is not
None`). So nobody can see in which order the two were computed. All else is no such place: a subtraction, a sum that is
scaled, or changed in place, before it is normalised, a norm of a sum that no variable holds.

What the norm is, the call itself finds out (gptkern.swapping.residual_norms).
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterable
from typing import NamedTuple

from gptkern.swapping.rerouting_code import Instruction, Sum, instructions_of
from gptkern.swapping.residual_norms import Border

_ADD = 0  # BINARY_OP's argument; += has another, since it may write into its operand
_LOADS = {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW"}
_TWO_LOADS = {"LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW"}
_JUMPS_IF_NONE = {"POP_JUMP_IF_NONE": True, "POP_JUMP_FORWARD_IF_NONE": True,
                  "POP_JUMP_IF_NOT_NONE": False, "POP_JUMP_FORWARD_IF_NOT_NONE": False}  # fmt: skip
_NOTHING = {"NOP", "PRECALL", "NOT_TAKEN"}
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

_SUM, _NULL, _OTHER = object(), object(), object()


class _Condition(NamedTuple):
    argument: int
    is_none: bool


def sums(code: types.CodeType) -> list[Sum]:
    """The places of a function, in the order of its code."""
    # Most functions add nothing; to read their instructions takes longer than all the rest of a swap.
    if (dis.opmap["BINARY_OP"], _ADD) not in zip(code.co_code[::2], code.co_code[1::2]):
        return []
    if code.co_flags & _GENERATOR or not code.co_argcount or code.co_varnames[0] in code.co_cellvars:
        return []
    read = instructions_of(code)
    this = code.co_varnames[0]
    if any(_writes(instruction, this) for instruction in read):
        return []
    walk = _Walk(code, read)
    found = (walk.from_sum(place) for place, one in enumerate(read) if (one.name, one.argument) == ("BINARY_OP", _ADD))
    return [place for place in found if place is not None]


def _writes(instruction: Instruction, name: str) -> bool:
    return instruction.name.startswith(("STORE_FAST", "DELETE_FAST")) and name in _names(instruction)


def _names(instruction: Instruction) -> tuple[str, ...]:
    value = instruction.value
    return value if isinstance(value, tuple) else (value,)


class _Walk:
    """What holds a sum, from where it is added on."""

    def __init__(self, code: types.CodeType, read: list[Instruction]):
        self.this, self.read = code.co_varnames[0], read
        self.at = {instruction.offset: place for place, instruction in enumerate(read)}
        arguments = code.co_argcount + code.co_kwonlyargcount
        # What a function inside shares is loaded and stored by other instructions, at which a walk ends.
        self.arguments = {name: place for place, name in enumerate(code.co_varnames[:arguments])}

    def from_sum(self, add: int) -> Sum | None:
        found = self.onwards(add + 1, [_SUM], frozenset(), frozenset(), ())
        return found and Sum(add, *found)

    def onwards(self, place: int, stack: list, holders: frozenset, written: frozenset, conditions: tuple):
        """-> (load, call, norm, conditions) from an instruction on, or None.

        Args:
            stack: what was put on Python's stack since the addition. holders: the variables in which the sum is.
            written: the variables that were stored to since.
        """
        stack = [*stack]
        while place < len(self.read):
            name, argument = self.read[place].name, self.read[place].argument
            if name in _LOADS or name in _TWO_LOADS:
                for variable in _names(self.read[place]):
                    stack.append(self.loaded(variable, holders, written))
            elif name == "STORE_FAST" or name == "STORE_FAST_STORE_FAST" or name == "STORE_FAST_LOAD_FAST":
                variables = _names(self.read[place])
                for variable in variables[:1] if name == "STORE_FAST_LOAD_FAST" else variables:
                    if not stack:
                        return None
                    holders = holders | {variable} if stack.pop() is _SUM else holders - {variable}
                    written |= {variable}
                if name == "STORE_FAST_LOAD_FAST":
                    stack.append(self.loaded(variables[1], holders, written))
            elif name in ("LOAD_METHOD", "LOAD_ATTR") and stack and stack[-1] == (self.this,):
                stack[-1] = (self.this, self.read[place].value, place)
                # LOAD_ATTR has the bit of a method from 3.12 on, and its value says nothing of it.
                if name == "LOAD_METHOD" or self.read[place].is_method:
                    stack.append(_NULL)
            elif name == "CALL":
                norm = stack[-3] if argument == 1 and len(stack) >= 3 and stack[-1] is _SUM else None
                is_norm = stack[-2:-1] == [_NULL] and isinstance(norm, tuple) and len(norm) == 3
                return (norm[2], place, norm[1], conditions) if is_norm and holders else None
            elif name == "RETURN_VALUE":
                return (0, 0, "", conditions) if stack[-1:] == [_SUM] else None
            elif name == "JUMP_FORWARD":
                place = self.at[self.read[place].target]
                continue
            elif name in _JUMPS_IF_NONE and stack and isinstance(stack[-1], _Condition):
                condition = stack.pop()
                jumps = condition._replace(is_none=_JUMPS_IF_NONE[name])
                target = self.at[self.read[place].target]
                passes = jumps._replace(is_none=not jumps.is_none)
                ways = [self.onwards(place + 1, stack, holders, written, (*conditions, passes))]
                if target > place:
                    ways.insert(0, self.onwards(target, stack, holders, written, (*conditions, jumps)))
                found = [way for way in ways if way is not None]
                # Where one way returns the sum, the other may normalise it.
                return next((way for way in found if way[2]), found[0] if found else None)
            elif name not in _NOTHING:
                return None
            place += 1
        return None

    def loaded(self, variable: str, holders: frozenset, written: frozenset) -> object:
        if variable in holders:
            return _SUM
        if variable == self.this:
            return (self.this,)
        if variable in self.arguments and variable not in written:
            return _Condition(self.arguments[variable], True)
        return _OTHER


def norms(functions: Iterable[types.FunctionType]) -> list[str]:
    """The attributes of `self` that are called for a sum, in these functions; "" where the sum is returned."""
    return list(dict.fromkeys(found.norm for function in functions for found in sums(function.__code__)))


def border(functions: Iterable[types.FunctionType]) -> Border:
    """What the functions that a forward consists of say of its border."""
    entry, last, lists, has_loop, returns_sum = [], [], [], False, False
    for function in functions:
        code = function.__code__
        # Methods alone: a function of the package has nothing that the module calls.
        if not code.co_argcount or code.co_varnames[0] != "self":
            continue
        read = [one for one in instructions_of(code) if one.name not in _NOTHING]
        this, argument = code.co_varnames[0], code.co_varnames[1] if code.co_argcount > 1 else None
        is_as_it_came = True
        for place, one in enumerate(read):
            before = _names(read[place - 1])[-1:] if place else ()
            if one.name in ("LOAD_ATTR", "LOAD_METHOD") and before == (this,):
                lists.append(one.value)
                variable = _names(read[place + 1])[0] if read[place + 1].name in _LOADS else None
                if variable and one.is_method and (read[place + 2].name, read[place + 2].argument) == ("CALL", 1):
                    last.append(one.value)
                    if variable == argument and is_as_it_came:
                        entry.append(one.value)
            is_as_it_came = is_as_it_came and not _writes(one, argument)
            has_loop = has_loop or one.name == "FOR_ITER"
        returns_sum = returns_sum or "" in norms([function])
    has_loop = has_loop and bool(last)
    return Border(*(tuple(dict.fromkeys(names)) for names in (entry, last, lists)), has_loop, returns_sum)
