"""A function's code again, in which some names lead elsewhere.

    LOAD_GLOBAL F, LOAD_ATTR softmax        is followed by:     where this is what is in the cell "F.softmax, known",
                                                                the content of "F.softmax, rerouted" takes its place

The globals stay the function's own: what is written to them counts at once, while the code runs too, and torch.compile
guards on them. So it does on cells (of constants it takes only numbers and the like). The functions and comprehensions
inside the code get at the cells through their closures, as Python's own compiler has it.

A sum that is normalised next (gptkern.swapping.residual_code finds it) gets its norm in the same call:

    BINARY_OP +             becomes a call of what is in a cell, with the function's first argument and both operands:
                            it gives the norm's result, or None, which a variable of its own keeps, and the sum
    CALL of the norm        is left out where that variable holds something

Python says how its bytecode looks in `dis`, anew in each version; known here are 3.11 to 3.14.
"""

from __future__ import annotations

import dis
import itertools
import opcode
import sys
import types
from collections.abc import Collection, Iterator
from typing import NamedTuple

from gptkern.swapping.reading import LOADS_OF_GLOBALS, Chain

_NEWEST = (3, 14)
# What CALL takes: NULL and the function up to 3.12, the function and NULL from 3.13 on.
_NULL_COMES_LAST = sys.version_info >= (3, 13)
# Whether LOAD_ATTR does what LOAD_METHOD did, by a bit as LOAD_GLOBAL's.
_HAS_CALL_BIT = sys.version_info >= (3, 12)
_CLOSURE = 8  # flag of MAKE_FUNCTION up to 3.12, argument of SET_FUNCTION_ATTRIBUTE from 3.13 on
_HAS_FLAGS = sys.version_info < (3, 13)
_LOAD_CELL = "LOAD_CLOSURE" if _HAS_FLAGS else "LOAD_FAST"
_HAS_PRECALL = sys.version_info < (3, 12)
_JUMP_IF_NONE = "POP_JUMP_FORWARD_IF_NONE" if _HAS_PRECALL else "POP_JUMP_IF_NONE"
_SUPERINSTRUCTIONS = ("LOAD_FAST_", "STORE_FAST_")
# What an addition that was replaced leaves for the norm's call.
_NORMALISED = "_normalised_sum"
_JUMP_IF_FALSE = "POP_JUMP_IF_FALSE" if sys.version_info >= (3, 12) else "POP_JUMP_FORWARD_IF_FALSE"


class Sum(NamedTuple):
    """An addition, and the call of `self.NAME` for its result.

    Attributes:
        add, load, call: which of the code's instructions; `load` takes NAME from `self`.
        norm: NAME; "" where the sum is returned, and there is no call.
        conditions: (an argument, whether it has to be None) for the call to be what comes next.
    """

    add: int
    load: int
    call: int
    norm: str
    conditions: tuple[tuple[int, bool], ...] = ()


class CannotReroute(Exception):
    """A function's code has to stay as it is; the message says why."""


class _Step(NamedTuple):
    """One instruction to be written; a jump's argument is found when all places are known."""

    operation: str
    argument: int = 0
    target: int | None = None  # which of the instructions that were read
    is_backward: bool = False


class Instruction(NamedTuple):
    """One instruction of the code, EXTENDED_ARG included."""

    name: str
    argument: int
    value: object
    offset: int
    target: int | None  # an offset
    position: dis.Positions

    @property
    def is_method(self) -> bool:
        """Whether an attribute is loaded to be called: NULL comes with it, or the object itself."""
        return self.name == "LOAD_METHOD" or (self.name == "LOAD_ATTR" and _HAS_CALL_BIT and bool(self.argument & 1))


def cell_names(chains: Collection[Chain]) -> list[str]:
    """The cells, of each chain in turn, that `rerouted` adds: what it led to, and what takes its place."""
    # No variable is called so: no name in the code, or in one inside it, can be meant.
    return [f"{'.'.join(chain)}, {what}" for chain in chains for what in ("known", "rerouted")]


def sum_cell_names(sums: Collection[Sum]) -> list[str]:
    """The cells that `rerouted` adds for sums: what takes the place of an addition whose sum goes to this norm."""
    return [f"+, {name}" for name in dict.fromkeys(found.norm for found in sums)]


def rerouted(code: types.CodeType, chains: Collection[Chain], sums: Collection[Sum] = ()) -> types.CodeType:
    """The code with `cell_names(chains)` and `sum_cell_names(sums)` behind its other free variables.

    Where a chain gives the object in its first cell, the one in the second takes its place. For an addition
    in `sums` its cell's function is called: (the code's first argument, (left, right), whether each of the conditions
    holds …) -> (the norm's result or None, the sum).

    Lines and columns, what a traceback shows, are those of the code.

    Raises:
        CannotReroute: a chain's value comes from two places (`(a if b else F).softmax`); or a Python from 3.15 on.
    """
    if sys.version_info[:2] > _NEWEST:
        raise CannotReroute(f"the bytecode of Python {sys.version_info[0]}.{sys.version_info[1]} is not known")
    return _Rewriting(code, chains, sums).code([*cell_names(chains), *sum_cell_names(sums)])


class _Rewriting:
    def __init__(self, original: types.CodeType, chains: Collection[Chain], sums: Collection[Sum] = ()):
        self.original, self.chains, self.sums = original, chains, sums
        self.read = instructions_of(original)
        self.at = {read.offset: place for place, read in enumerate(self.read)}
        self.sites = dict(self.find_sites())
        self.inner: dict[int, _Rewriting] = {}
        for place, constant in enumerate(original.co_consts):
            if isinstance(constant, types.CodeType):
                inside = _Rewriting(constant, chains)
                if inside.used:
                    self.inner[place] = inside
        used = {*self.sites.values()}.union(*(inside.used for inside in self.inner.values()))
        # Of the chains that are loaded here or inside.
        self.used = tuple(chain for chain in chains if chain in used)

    def find_sites(self) -> Iterator[tuple[tuple[int, int], Chain]]:
        """(first and last instruction, the chain that they load) of each chain to be rerouted."""
        targets = {read.target for read in self.read} | {entry.target for entry in _handlers(self.original)}
        for first, read in enumerate(self.read):
            # It may be another variable of that name: what it gives decides.
            if read.name not in (*LOADS_OF_GLOBALS, "LOAD_DEREF"):
                continue
            chain, last = (read.value,), first
            while chain not in self.chains and self.read[last + 1].name in ("LOAD_ATTR", "LOAD_METHOD"):
                last += 1
                chain = (*chain, self.read[last].value)
            if chain in self.chains:
                if targets & {self.read[place].offset for place in range(first + 1, last + 1)}:
                    raise CannotReroute(f"{self.original.co_qualname} takes {chain[-1]} from one of several objects")
                yield (first, last), chain

    def code(self, names: list[str]) -> types.CodeType:
        """The code, with these as its last free variables."""
        code = self.original
        self.free = (*code.co_freevars, *names)
        self.variables = (*code.co_varnames, _NORMALISED) if self.sums else code.co_varnames
        locals_and_cells = dict.fromkeys((*self.variables, *code.co_cellvars))
        self.first_free = len(locals_and_cells)
        constants = list(code.co_consts)
        for place, inside in self.inner.items():
            constants[place] = inside.code(cell_names(inside.used))
        steps = [[self.as_it_was(read)] for read in self.read]
        for (first, last), chain in self.sites.items():
            self.reroute(steps, first, last, chain)
        for place, read in enumerate(self.read):
            if read.name == "LOAD_CONST" and read.argument in self.inner:
                self.close_over(steps, place, cell_names(self.inner[read.argument].used))
        if self.sums:
            self.none = len(constants)
            constants.append(None)
            start = next(place for place, read in enumerate(self.read) if read.name == "RESUME")
            steps[start] += self.assigned_none()
            for found in self.sums:
                self.add_and_normalise(steps, found)
            for load, call in {(found.load, found.call) for found in self.sums if found.norm}:
                self.leave_out(steps, load, call)
        if code.co_freevars:
            place = next(place for place, read in enumerate(self.read) if read.name == "COPY_FREE_VARS")
            steps[place] = [_Step("COPY_FREE_VARS", len(self.free))]
        elif self.free:
            steps[0].insert(0, _Step("COPY_FREE_VARS", len(self.free)))
        written, places = _written(steps)
        return code.replace(
            co_code=written,
            co_consts=tuple(constants),
            co_varnames=self.variables,
            co_nlocals=len(self.variables),
            co_freevars=self.free,
            co_linetable=_lines(code, self.read, places),
            co_exceptiontable=_exception_table(code, self.at, places),
            # What is known, and it once more to be compared with; the cells of a closure.
            co_stacksize=code.co_stacksize + 2 + len(names) + 1 + (len(code.co_varnames) + 6) * bool(self.sums),
        )

    def as_it_was(self, read: Instruction) -> _Step:
        if read.target is None:
            return _Step(read.name, self.moved(read))
        return _Step(read.name, 0, self.at[read.target], read.target <= read.offset)

    def moved(self, read: Instruction) -> int:
        """An instruction's argument; cells stand behind the variables, of which there may be one more."""
        added, number = len(self.variables) - self.original.co_nlocals, dis.opmap[read.name]
        if not added or not (number in dis.haslocal or number in dis.hasfree):
            return read.argument
        if read.name.startswith(_SUPERINSTRUCTIONS) and isinstance(read.value, tuple):
            if max(read.argument >> 4, read.argument & 15) >= self.original.co_nlocals:
                raise CannotReroute(f"{self.original.co_qualname} loads a cell together with another variable")
            return read.argument
        return read.argument + added * (read.argument >= self.original.co_nlocals)

    def cell(self, name: str) -> int:
        return self.first_free + self.free.index(name)

    def reroute(self, steps: list[list[_Step]], first: int, last: int, chain: Chain) -> None:
        """The chain's instructions, without the NULL for a call; what they give, or what takes its place; the NULL."""
        nulls = 0
        for place in range(first, last + 1):
            read = self.read[place]
            name, argument = read.name, read.argument
            if name == "LOAD_METHOD":  # 3.11's
                name, nulls = "LOAD_ATTR", nulls + 1
            elif name == "LOAD_GLOBAL" or (name == "LOAD_ATTR" and _HAS_CALL_BIT):
                nulls += argument & 1
                argument &= ~1
            steps[place] = [_Step(name, argument)]
        known, instead = map(self.cell, cell_names([chain]))
        taken = [_Step("POP_TOP"), _Step("LOAD_DEREF", instead)]
        # Python's own compiler puts it there for tools that count branches.
        passed = [_Step("NOT_TAKEN")] if sys.version_info >= (3, 14) else []
        steps[last] += [
            _Step("COPY", 1),
            _Step("LOAD_DEREF", known),
            _Step("IS_OP", 0),
            _Step(_JUMP_IF_FALSE, sum(map(_units, (*passed, *taken)))),
            *passed,
            *taken,
        ]
        null = [_Step("PUSH_NULL")] * nulls
        if _NULL_COMES_LAST:
            steps[last] += null
        else:
            steps[first][:0] = null

    def assigned_none(self) -> list[_Step]:
        return [_Step("LOAD_CONST", self.none), _Step("STORE_FAST", len(self.variables) - 1)]

    def add_and_normalise(self, steps: list[list[_Step]], found: Sum) -> None:
        """left, right -> sum, and the norm's result or None in its variable."""
        normalised = len(self.variables) - 1
        load = [_Step("LOAD_DEREF", self.cell(*sum_cell_names([found])))]
        null = [_Step("PUSH_NULL")]
        conditions = [
            step
            for argument, is_none in found.conditions
            for step in (
                _Step("LOAD_FAST", argument),
                _Step("LOAD_CONST", self.none),
                _Step("IS_OP", 0 if is_none else 1),
            )
        ]
        count = 2 + len(found.conditions)
        steps[found.add] = [
            _Step("BUILD_TUPLE", 2),
            _Step("STORE_FAST", normalised),
            *(load + null if _NULL_COMES_LAST else null + load),
            _Step("LOAD_FAST", 0),
            _Step("LOAD_FAST", normalised),
            *conditions,
            *([_Step("PRECALL", count)] if _HAS_PRECALL else []),
            _Step("CALL", count),
            _Step("UNPACK_SEQUENCE", 2),
            _Step("STORE_FAST", normalised),
        ]

    def leave_out(self, steps: list[list[_Step]], load: int, call: int) -> None:
        """The norm and its argument are taken from the stack, where the result is there."""
        # NULL, which nothing takes from the stack, comes where it is called after all.
        attribute = self.read[load].argument
        method = self.read[load].name == "LOAD_ATTR"
        steps[load] = [_Step("LOAD_ATTR", attribute & ~1 if method else attribute)]
        normalised = _Step("LOAD_FAST", len(self.variables) - 1)
        swaps = [_Step("SWAP", 2)] if _NULL_COMES_LAST else [_Step("SWAP", 3), _Step("SWAP", 2)]
        first = call - 1 if _HAS_PRECALL else call
        called = [_Step("PUSH_NULL"), *swaps, *(step for place in range(first, call + 1) for step in steps[place])]
        taken = [
            _Step("POP_TOP"),
            _Step("POP_TOP"),
            normalised,
            *self.assigned_none(),
            _Step("JUMP_FORWARD", sum(map(_units, called))),
        ]
        passed = [_Step("NOT_TAKEN")] if sys.version_info >= (3, 14) else []
        jump = _Step(_JUMP_IF_NONE, sum(map(_units, (*passed, *taken))))
        steps[first][:0] = [normalised, jump, *passed, *taken, *called[: 1 + len(swaps)]]

    def close_over(self, steps: list[list[_Step]], place: int, names: list[str]) -> None:
        """The function that is made of the constant at `place` gets these cells behind those that it has."""
        making = self.read[place + 1]
        if making.name != "MAKE_FUNCTION":
            raise CannotReroute(f"{self.original.co_qualname} has code inside it of which it makes no function")
        loads = [_Step(_LOAD_CELL, self.cell(name)) for name in names]
        setting = self.read[place + 2]
        if making.argument & _CLOSURE if _HAS_FLAGS else setting[:2] == ("SET_FUNCTION_ATTRIBUTE", _CLOSURE):
            steps[place - 1] = [*loads, _Step("BUILD_TUPLE", self.read[place - 1].argument + len(names))]
            return
        steps[place][:0] = [*loads, _Step("BUILD_TUPLE", len(names))]
        if _HAS_FLAGS:
            steps[place + 1] = [_Step("MAKE_FUNCTION", making.argument | _CLOSURE)]
        else:
            steps[place + 1].append(_Step("SET_FUNCTION_ATTRIBUTE", _CLOSURE))


# --- Reading and writing ----------------------------------------------------------------------------------------------


def instructions_of(code: types.CodeType) -> list[Instruction]:
    found, start = [], None
    for one in dis.get_instructions(code):
        start = one.offset if start is None else start
        if one.opname == "EXTENDED_ARG":
            continue
        target = one.argval if one.opcode in dis.hasjrel else None
        found.append(Instruction(one.opname, one.arg or 0, one.argval, start, target, one.positions))
        start = None
    return found


def _caches(operation: str) -> int:
    caches = opcode._inline_cache_entries
    return caches.get(operation, 0) if isinstance(caches, dict) else caches[dis.opmap[operation]]


def _units(step: _Step) -> int:
    """How many pairs of bytes the instruction takes."""
    return max(1, (step.argument.bit_length() + 7) // 8) + _caches(step.operation)


def _written(steps: list[list[_Step]]) -> tuple[bytes, list[int]]:
    """The bytes; and where what was made of each instruction begins, and ends, in pairs of bytes."""
    while True:
        sizes = [sum(map(_units, of)) for of in steps]
        places = list(itertools.accumulate(sizes, initial=0))
        settled = True
        for of, end in zip(steps, places[1:]):
            for at, step in enumerate(of):
                if step.target is not None:
                    # From behind the jump, which is the last of its steps.
                    distance = places[step.target] - end
                    jump = step._replace(argument=-distance if step.is_backward else distance)
                    settled, of[at] = settled and _units(jump) == _units(step), jump
        if settled:
            break
    out = bytearray()
    for step in itertools.chain(*steps):
        number = dis.opmap[step.operation]
        for shift in range(8 * (_units(step) - _caches(step.operation) - 1), 0, -8):
            out += bytes((dis.opmap["EXTENDED_ARG"], step.argument >> shift & 0xFF))
        out += bytes((number, step.argument & 0xFF)) + bytes(2 * _caches(step.operation))
    return bytes(out), places


def _handlers(code: types.CodeType) -> list:
    return dis._parse_exception_table(code)


def _exception_table(code: types.CodeType, at: dict[int, int], places: list[int]) -> bytes:
    table = bytearray()
    for entry in _handlers(code):
        # The end is the first instruction behind; there may be none.
        start, end, target = (places[at.get(offset, -1)] for offset in (entry.start, entry.end, entry.target))
        first = len(table)
        for number in (start, end - start, target, entry.depth << 1 | entry.lasti):
            digits = [number >> shift & 63 for shift in range(0, max(1, number.bit_length()), 6)][::-1]
            table += bytes((*(digit | 64 for digit in digits[:-1]), digits[-1]))
        table[first] |= 128
    return bytes(table)


def _lines(code: types.CodeType, read: list[Instruction], places: list[int]) -> bytes:
    """The table of lines and columns (`co_positions`)."""
    table, line = bytearray(), code.co_firstlineno
    units = [end - start for start, end in itertools.pairwise(places)]
    for position, group in itertools.groupby(zip(read, units), lambda pair: pair[0].position):
        left = sum(size for _, size in group)
        while left:
            size, left = min(left, 8), max(left - 8, 0)
            if position.lineno is None:
                table.append(128 | 15 << 3 | size - 1)
                continue
            moved, line = position.lineno - line, position.lineno
            moved = -moved << 1 | 1 if moved < 0 else moved << 1
            if position.col_offset is None:
                numbers, kind = (moved,), 13
            else:
                numbers = (moved, position.end_lineno - line, position.col_offset + 1, position.end_col_offset + 1)
                kind = 14
            table.append(128 | kind << 3 | size - 1)
            for number in numbers:
                while number > 63:
                    table.append(64 | number & 63)
                    number >>= 6
                table.append(number)
    return bytes(table)
