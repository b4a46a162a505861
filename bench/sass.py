"""Reads machine code as cuobjdump prints it: instructions with their control codes, loops, and what a trip executes.

A GPU has no out-of-order execution: the compiler writes into each instruction how many cycles the warp waits after it
(the stall count), which of six scoreboards its result or its operands' release sets, and which of them it waits for.
They are bits 105 to 121 of the 128 (Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking",
2018, section 2.1; the same places on every architecture since).

    loop        instructions that reach one another, entered at the header
    main loop   of the innermost loops with at least half of the most matrix work, the one with the fewest
                instructions for its work: its tiles need no mask, and most tiles are of that kind. Without matrix
                work, the innermost of those with at least half of the most bytes of global memory.
    trip        a path through the loop's body: of all paths those with the most matrix work, of these those with the
                most bytes of global memory (what is prefetched is counted), of these, by sixteens, those with the most
                exponentials (of a warp's roles the heavier; without matrix work only where nothing is stored), of these
                the shortest (a mask, a correction that is rarely due, a slow division are stepped over). An instruction
                under a predicate counts as executed. Where it is known how many bytes are loaded for each that is
                stored (without a loop: how many are loaded and stored), only paths near to it count, and a load under
                a predicate may be one that is not executed: branches load parameters of another dtype, a residual, a
                mask.
    marks       what tells branches apart that move the same bytes: text of instructions that the call executes, and of
                such that it does not (an activation's constants, another dtype's conversions).
    no loop     where no loop has a quarter of the bytes that are moved from the entry to the exit, with each loop gone
                through once, the trip is such a path: from the entry to the exit
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sass_graph import Loop, graph_of, loops, topological

WARP = 32
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
NO_SCOREBOARD = 7
LOADS, STORES = ("LDG", "LDGSTS", "LD"), ("STG", "ST")
# A path's bytes are what is known of them within this factor, as a logarithm. Statistics, which are read and
# written by the row, by less than a wide access, are not among them.
NEAR = 0.02
WIDE = 8
# Of the paths from one place on, so many are kept apart by their work and bytes.
KEPT = 600
# A difference of fewer exponentials than this is no tile's.
EXPONENTIALS = 16
# An instruction that a call does not execute outweighs so many that it does.
UNWANTED = 10_000


class Instruction(NamedTuple):
    """One of a kernel's.

    Args:
        name: "LDG.E.128"; operands: as printed; predicate: whether it is executed under one.
        stall: cycles until the warp's next instruction. sets: the scoreboard of its result, releases: of its operands,
        waits: scoreboards that it waits for.
    """

    address: int
    name: str
    operands: str
    predicate: bool
    stall: int
    sets: int | None
    releases: int | None
    waits: tuple[int, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.opcode != "BRA":
            return None
        found = re.search(r"(?:0x)([0-9a-f]+)\)?\s*$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def off(self) -> Instruction:
        """Where its predicate is false: it is issued, and does nothing."""
        return self._replace(name="NOP", sets=None, releases=None)

    @property
    def always(self) -> bool:
        """Whether what follows is reached by jumps alone."""
        # BRA P1, 0x…: a further predicate as an operand. BRA.U … UP0.
        taken = self.opcode == "BRA" and not re.match(r"!?U?P\w+,", self.operands)
        return not self.predicate and (taken or self.opcode in ("EXIT", "RET", "BRX", "BREAK"))


def kernels(lines: Iterable[str]) -> dict[tuple[str, str], list[Instruction]]:
    """(architecture, mangled name) -> instructions in order, of `cuobjdump --dump-sass`."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    architecture, current, pending = "", None, None
    for line in lines:
        if pending is not None and current is not None and (match := _SECOND.match(line)):
            current.append(_instruction(*pending, int(match[1], 16)))
            pending = None
        elif match := _LINE.match(line):
            pending = int(match[1], 16), match[3], match[4].strip(), match[2] is not None
        elif match := re.match(r"\s*(?:code for|\.target)\s+(sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault((architecture, match[1]), [])
            current.clear()
    return found


def _instruction(address: int, name: str, operands: str, predicate: bool, high: int) -> Instruction:
    stall, sets, releases = high >> 41 & 15, high >> 46 & 7, high >> 49 & 7
    waits = tuple(board for board in range(6) if high >> 52 + board & 1)
    board = lambda number: None if number == NO_SCOREBOARD else number  # noqa: E731
    return Instruction(address, name, operands, predicate, stall, board(sets), board(releases), waits)


# --- What an instruction does -----------------------------------------------------------------------------------------

MATRIX, SPECIAL, FLOAT, INTEGER, SHARED, GLOBAL, OTHER = (
    "matrix", "special", "float32", "integer", "shared", "global", "other",
)  # fmt: skip
PIPES = (MATRIX, SPECIAL, FLOAT, INTEGER, SHARED, GLOBAL, OTHER)
_OPCODES = {
    MATRIX: "HMMA IMMA BMMA DMMA HGMMA IGMMA QGMMA",
    SPECIAL: "MUFU I2F F2I F2F FRND POPC FLO",
    # IMAD is computed by the float32 units, at half of their rate where there are two sets of them.
    FLOAT: "FFMA FFMA2 FMUL FMUL2 FADD FADD2 FADD32I FMUL32I FFMA32I HFMA2 HADD2 HMUL2 HMNMX2 IMAD",
    INTEGER: (
        "IADD3 IADD LOP3 LOP SHF SHL SHR LEA SEL FSEL ISETP FSETP FMNMX FMNMX3 IMNMX VIMNMX VIADD VIADDMNMX PRMT IABS "
        "MOV SGXT BMSK PLOP3 P2R R2P F2FP I2FP I2I FCHK FSET BREV IDP IDP4A HSETP2 HSET2 VABSDIFF VOTE"
    ),
    SHARED: "LDS LDSM STS STSM ATOMS SHFL LDL STL",
    GLOBAL: "LDG STG LDGSTS RED ATOM ATOMG UTMALDG UTMASTG UBLKCP LD ST",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in _OPCODES.items() for opcode in opcodes.split()}


def pipe(instruction: Instruction) -> str:
    return _PIPE_OF.get(instruction.opcode, OTHER)


def width(instruction: Instruction) -> int:
    """Bytes that each of a warp's threads moves between registers, shared and global memory; 0 where none."""
    kind, parts = pipe(instruction), instruction.name.split(".")
    if kind not in (SHARED, GLOBAL) or instruction.opcode in ("UTMALDG", "UTMASTG", "UBLKCP"):
        return 0
    if instruction.opcode in ("LDSM", "STSM"):  # eight rows of 16 bytes for each matrix: four bytes a thread
        return 4 * int(parts[-1]) if parts[-1] in ("2", "4") else 4
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("16", 2), ("U8", 1), ("S8", 1), ("8", 1)):
        if part in parts[1:]:
            return size
    return 4


def products(instruction: Instruction) -> int:
    """Multiply-adds that a warp's matrix instruction does; of a warpgroup's instruction, a quarter."""
    if pipe(instruction) != MATRIX:
        return 0
    if match := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.name):
        rows, columns, depth = map(int, match.groups())
        return rows * columns * depth // (4 if "GMMA" in instruction.opcode else 1)
    if match := re.search(r"\.(16|8)(8)(\d+)\b", instruction.name):  # HMMA.16816: 16 × 8 × 16
        return int(match[1]) * int(match[2]) * int(match[3])
    raise ValueError(f"{instruction.name}: a matrix instruction of unknown shape")


# --- Loops ------------------------------------------------------------------------------------------------------------


class Trip(NamedTuple):
    """What one pass through a loop executes; header: the address at which it is entered, None of a whole kernel."""

    instructions: list[Instruction]
    header: int | None = None

    @property
    def counts(self) -> dict[str, int]:
        found = collections.Counter(pipe(each) for each in self.instructions)
        return {name: found[name] for name in PIPES}

    @property
    def products(self) -> int:
        return sum(map(products, self.instructions))

    @property
    def loaded(self) -> int:
        """Bytes that a warp reads from global memory."""
        return self.vectors(0)[0]

    @property
    def stored(self) -> int:
        return self.vectors(0)[1]

    def vectors(self, least: int) -> tuple[int, int]:
        """Bytes loaded and stored by accesses of at least so many bytes a thread."""
        own = [each for each in self.instructions if width(each) >= least]
        return tuple(sum(moved(each) for each in own if each.opcode in opcodes) for opcodes in (LOADS, STORES))

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


class Marks(NamedTuple):
    """What is known of a call's instructions, as regular expressions that are found in "FMUL R0, R1, 0.5".

    Args:
        wanted, avoided: what is executed, and what is not. same: loads of one place by all threads of a warp, which
            move a sector: scales, tables. least: bytes a thread below which an access is of no vector.
    """

    wanted: tuple[str, ...] = ()
    avoided: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    least: int = WIDE

    def merit(self, each: Instruction) -> int:
        # Where both branches are instructions under predicates, all of them are issued.
        if not each.predicate and _has(each, self.avoided):
            return -UNWANTED
        return int(_has(each, self.wanted))

    def applied(self, code: list[Instruction]) -> list[Instruction]:
        """With what moves a sector as a byte a thread, and what is avoided under a predicate as what does nothing."""
        found = [each._replace(name=f"{each.opcode}.U8") if _has(each, self.same) else each for each in code]
        return [each.off if each.predicate and _has(each, self.avoided) else each for each in found]

    def missing(self, code: list[Instruction]) -> list[str]:
        """Marks that no instruction has: what they are to tell apart has another look here."""
        return [
            mark for mark in self.wanted + self.avoided + self.same if not any(_has(each, (mark,)) for each in code)
        ]


NO_MARKS = Marks()


def _has(each: Instruction, marks: tuple[str, ...]) -> bool:
    return any(re.search(mark, f"{each.name} {each.operands}") for mark in marks)


class Wrong(LookupError):
    """A trip that is not what the kernel does."""


def checked(trip: Trip, known: tuple[Amounts, ...], marks: Marks, requests: Amounts) -> Trip:
    """The trip, whose bytes are what a warp moves and whose loads are used.

    Args:
        known, marks: as `main_loop` had them. requests: loads and stores that a warp executes in all, which tell where
            threads read the same bytes.

    Raises:
        Wrong: it leaves something out, or does what the call does not.
    """
    vectors, far = trip.vectors(marks.least), 0.0
    if known and trip.header is None:
        own = [sum(each.opcode in opcodes for each in trip.instructions) for opcodes in (LOADS, STORES)]
        far = 0.0 if own == list(requests) else _from_amount(known, *vectors)
    elif known:
        far = _from_ratio(known, *vectors)
    if far > NEAR:
        wanted = " or ".join(f"{round(loaded)} and {round(stored)}" for loaded, stored in known)
        raise Wrong(f"a trip loads and stores {vectors[0]} and {vectors[1]} bytes in vectors; a warp {wanted}")
    if left := unread(trip, marks.least):
        raise Wrong(f"a trip does not use what {left[0].name} {left[0].operands} at {left[0].address:x} loads")
    if any(marks.merit(each) < 0 for each in trip.instructions):
        raise Wrong("a trip has instructions that the call does not execute")
    return trip


def unread(trip: Trip, least: int) -> list[Instruction]:
    """Loads of vectors of which a register is written again, or the kernel ends, before anything reads it."""
    following = trip.instructions * (1 if trip.header is None else 2)
    found = []
    for place, each in enumerate(trip.instructions):
        if each.opcode not in ("LDG", "LD") or width(each) < least:
            continue
        first = int(re.match(r"R(\d+)", each.operands)[1])
        for register in range(first, first + width(each) // 4):
            uses = (_use(other, register) for other in following[place + 1 :])
            if next(filter(None, uses), "written") == "written":
                found.append(each)
                break
    return found


def _use(each: Instruction, register: int) -> str | None:
    """Whether it has the register: "read", or "written" alone."""
    written = None
    for place, operand in enumerate(each.operands.split(",")):
        for match in re.finditer(r"\bR(\d+)(\.64)?", operand):
            several = max(1, width(each) // 4) if pipe(each) in (SHARED, GLOBAL) and "[" not in operand else 1
            wide = 2 if match[2] or ".WIDE" in each.name or each.opcode == "CS2R" else several
            if int(match[1]) <= register < int(match[1]) + wide:
                # Where one is written, it is the first operand; a store has its address there.
                if place > 0 or "[" in operand:
                    return "read"
                written = "written"
    return written


# Bytes that a warp loads and stores.
Amounts = tuple[float, float]
# How far bytes loaded and stored are from what is known of them, as a logarithm.
_Far = Callable[[int, int], float]


def main_loop(code: list[Instruction], known: tuple[Amounts, ...] = (), marks: Marks = NO_MARKS) -> Trip:
    """The trip of the module's rule.

    Args:
        known: what a warp loads and stores, where it is known: in all; and what else a loop's part of it may be, as
            some is loaded before it, or stored after it. A trip around a loop has the ratio of one of these, a trip
            through the kernel has the first.
    """
    merits, code = list(map(marks.merit, code)), marks.applied(code)
    graph = graph_of(code)
    ratio, amount = (functools.partial(far, known) if known else None for far in (_from_ratio, _from_amount))
    path = functools.partial(_path, code, graph, merits, marks.least)
    trips = {loop: Trip(path(loop, ratio), code[loop.header].address) for loop in loops(graph)}
    if any(trip.products for trip in trips.values()):
        inner = _innermost(trips, lambda trip: trip.products > 0)
        most = max(trip.products for trip in inner)
        large = [trip for trip in inner if 2 * trip.products >= most]
        return min(large, key=lambda trip: (len(trip.instructions) / trip.products, trip.header))
    whole = Trip(path(Loop(0, frozenset(range(len(code)))), amount))
    most = max((trip.moved for trip in trips.values()), default=0)
    inner = _innermost(trips, lambda trip: 2 * trip.moved >= most > 0)

    def rank(trip: Trip) -> tuple:
        return sum(map(marks.merit, trip.instructions)), trip.moved, -len(trip.instructions), -trip.header

    best = max(inner, key=rank, default=whole)
    return best if 4 * best.moved >= whole.moved else whole


def _from_ratio(known: tuple[Amounts, ...], loaded: int, stored: int) -> float:
    return min(far_from_ratio(each, loaded, stored) for each in known)


def far_from_ratio(known: Amounts, loaded: int, stored: int) -> float:
    return abs(math.log((loaded + 1) / (stored + 1) / (known[0] / known[1])))


def _from_amount(known: tuple[Amounts, ...], loaded: int, stored: int) -> float:
    return max(abs(math.log((a + 1) / (b + 1))) for a, b in zip((loaded, stored), known[0]))


def _innermost(trips: dict[Loop, Trip], counts: Callable[[Trip], bool]) -> list[Trip]:
    """Of those that count, what holds no other."""
    counting = {loop: trip for loop, trip in trips.items() if counts(trip)}
    return [trip for loop, trip in counting.items() if not any(other.places < loop.places for other in counting)]


# Of a path: matrix work, merit, bytes loaded, bytes stored, exponentials where they count, instructions.
_Sums = tuple[int, int, int, int, int, int]


def _path(
    code: list[Instruction], graph: list[list[int]], merits: list[int], least: int, loop: Loop, far: _Far | None
) -> list[Instruction]:
    """Once around the loop, or through the kernel, as the module's rule says; inner loops are gone through once."""
    order = topological(graph, loop)
    rank, outside = {place: position for position, place in enumerate(order)}, len(code)
    whole = len(loop.places) == len(code)
    # A trip that stores nothing could leave out its arithmetic and move the same bytes.
    exponentials = any(products(code[place]) for place in order) or not any(_stores(code[place]) for place in order)
    sums_of = functools.partial(_sums, exponentials=exponentials, least=least if far else 0)
    # Of the paths from each place on: their sums, and where they go next. Of equal sums of all else the shortest is
    # kept.
    found: dict[int, dict[_Sums, tuple[Instruction, _Sums, int]]] = {}
    for place in reversed(order):
        shortest: dict[tuple, tuple[_Sums, tuple[Instruction, _Sums, int]]] = {}
        # A load under a predicate moves nothing where that is false: what is known of the bytes decides.
        off = far is not None and code[place].predicate and code[place].opcode in LOADS
        for each in (code[place], code[place].off) if off else (code[place],):
            own = sums_of(each, merits[place])
            for other in graph[place]:
                if other == (outside if whole else loop.header):
                    paths, following = ((0, 0, 0, 0, 0, 0),), outside
                elif rank.get(other, -1) > rank[place]:
                    paths, following = found[other], other
                else:
                    continue
                for sums in paths:
                    total = tuple(a + b for a, b in zip(own, sums))
                    known = shortest.get(total[:-1])
                    if known is None or total[-1] < known[0][-1]:
                        shortest[total[:-1]] = total, (each, sums, following)
        found[place] = dict(sorted(shortest.values(), key=lambda item: _rank(item[0], far))[:KEPT])
    taken, place = [], loop.header
    sums = min(found[place], key=lambda sums: _rank(sums, far), default=None)
    while place != outside and sums in found[place]:
        each, sums, place = found[place][sums]
        taken.append(each)
    return taken


def _stores(each: Instruction) -> bool:
    return each.opcode in STORES


def _sums(each: Instruction, merit: int, exponentials: bool, least: int) -> _Sums:
    """Of one instruction; least: bytes a thread below which an access does not count."""
    size = moved(each) if width(each) >= least else 0
    exponential = int(exponentials and each.opcode == "MUFU")
    return products(each), merit, (each.opcode in LOADS) * size, (each.opcode in STORES) * size, exponential, 1


def _rank(sums: _Sums, far: _Far | None) -> tuple:
    """Least of the path that the rule takes."""
    work, merit, loaded, stored, exponentials, length = sums
    avoided, wanted = -(merit // UNWANTED), merit % UNWANTED
    if far is None:
        return -work, avoided, -wanted, -(loaded + stored), -(exponentials // EXPONENTIALS), length
    distance = far(loaded, stored)
    return -work, avoided, distance > NEAR, distance if distance > NEAR else 0, -wanted, -(loaded + stored), length


def moved(each: Instruction) -> int:
    """Bytes of global memory that a warp's instruction moves."""
    return WARP * width(each) if pipe(each) == GLOBAL else 0
