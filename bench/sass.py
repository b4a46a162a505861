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
                exponentials (of a warp's roles the heavier), of these the shortest (a mask, a correction that is rarely
                due, a slow division are stepped over). An instruction under a predicate counts as executed. Where it is
                known how many bytes are loaded for each that is stored, only paths near to it count: branches load
                parameters of another dtype, a residual, a mask.
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

WARP = 32
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
NO_SCOREBOARD = 7
LOADS, STORES = ("LDG", "LDGSTS", "LD"), ("STG", "ST")
# A path's bytes are in the ratio that is known within this factor, as a logarithm. Statistics, which are read and
# written by the row, by less than a wide access, are not among them.
NEAR = 0.1
WIDE = 8
# Of the paths from one place on, so many are kept apart by their work and bytes.
KEPT = 150
# A difference of fewer exponentials than this is no tile's.
EXPONENTIALS = 16


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
        return sum(moved(each) for each in self.instructions if each.opcode in LOADS)

    @property
    def stored(self) -> int:
        return sum(moved(each) for each in self.instructions if each.opcode in STORES)

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


class Loop(NamedTuple):
    """Places of instructions that reach one another, and the one where it is entered."""

    header: int
    places: frozenset[int]


def main_loop(code: list[Instruction], ratios: tuple[float, ...] = ()) -> Trip:
    """The trip of the module's rule; ratios: bytes loaded for each that is stored, where known: one of these."""
    graph = _graph(code)
    trips = {loop: Trip(_path(code, graph, loop, ratios), code[loop.header].address) for loop in _loops(graph)}
    if any(trip.products for trip in trips.values()):
        inner = _innermost(trips, lambda trip: trip.products > 0)
        most = max(trip.products for trip in inner)
        large = [trip for trip in inner if 2 * trip.products >= most]
        return min(large, key=lambda trip: (len(trip.instructions) / trip.products, trip.header))
    whole = Trip(_path(code, graph, Loop(0, frozenset(range(len(code)))), ratios))
    most = max((trip.moved for trip in trips.values()), default=0)
    inner = _innermost(trips, lambda trip: 2 * trip.moved >= most > 0)
    best = max(inner, key=lambda trip: (trip.moved, -len(trip.instructions), -trip.header), default=whole)
    return best if 4 * best.moved >= whole.moved else whole


def _innermost(trips: dict[Loop, Trip], counts: Callable[[Trip], bool]) -> list[Trip]:
    """Of those that count, what holds no other."""
    counting = {loop: trip for loop, trip in trips.items() if counts(trip)}
    return [trip for loop, trip in counting.items() if not any(other.places < loop.places for other in counting)]


def _graph(code: list[Instruction]) -> list[list[int]]:
    """Where a warp may go from each place; len(code) is outside."""
    places, outside = {each.address: place for place, each in enumerate(code)}, len(code)
    found = []
    for place, each in enumerate(code):
        following = [] if each.always else [place + 1]
        if each.opcode == "BRA":
            following.append(places.get(each.target, outside))
        elif each.opcode in ("EXIT", "RET", "BRX"):
            following.append(outside)
        found.append(sorted(set(following)))
    return found


def _loops(graph: list[list[int]]) -> list[Loop]:
    """All, outer and inner: what reaches itself; inside of it, what still does when it may not be entered anew."""
    leading: dict[int, list[int]] = {}
    for place, following in enumerate(graph):
        for other in following:
            leading.setdefault(other, []).append(place)
    found, open_ = [], [(frozenset(range(len(graph))), None)]
    while open_:
        places, header = open_.pop()
        for part in _components(graph, places, header):
            entered = [place for place in part if place == 0 or not part.issuperset(leading[place])]
            loop = Loop(min(entered, default=min(part)), part)
            found.append(loop)
            open_.append((part, loop.header))
    return sorted(found, key=lambda loop: (loop.header, len(loop.places)))


def _components(graph: list[list[int]], places: frozenset[int], closed: int | None) -> list[frozenset[int]]:
    """Strongly connected components of more than a place or with an edge to itself, without the edges into `closed`.

    (Tarjan, Depth-first search and linear graph algorithms, 1972; without recursion.)
    """
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []

    def following(place):
        return iter([other for other in graph[place] if other in places and other != closed])

    for root in sorted(places):
        if root in number:
            continue
        work = [(root, following(root))]
        number[root] = low[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            place, rest = work[-1]
            other = next(rest, None)
            if other is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[place])
                if low[place] == number[place]:
                    part = set()
                    while place not in part:
                        part.add(stack.pop())
                    on_stack -= part
                    if len(part) > 1 or (place in graph[place] and place != closed):
                        found.append(frozenset(part))
            elif other not in number:
                number[other] = low[other] = len(number)
                stack.append(other)
                on_stack.add(other)
                work.append((other, following(other)))
            elif other in on_stack:
                low[place] = min(low[place], number[other])
    return found


# Of a path: matrix work, bytes loaded, bytes stored, exponentials where there are products, instructions.
_Sums = tuple[int, int, int, int, int]


def _path(code: list[Instruction], graph: list[list[int]], loop: Loop, ratios: tuple[float, ...]) -> list[Instruction]:
    """Once around the loop, or through the kernel, as the module's rule says; inner loops are gone through once."""
    order = _topological(graph, loop)
    rank, outside = {place: position for position, place in enumerate(order)}, len(code)
    whole = len(loop.places) == len(code)
    matrix = any(products(code[place]) for place in order)
    sums_of = functools.partial(_sums, exponentials=matrix, least=WIDE if ratios else 0)
    # Of the paths from each place on: their sums, and where they go next. Of equal matrix work, bytes and exponentials
    # the shortest is kept.
    found: dict[int, dict[_Sums, int]] = {}
    for place in reversed(order):
        own, shortest = sums_of(code[place]), {}
        for other in graph[place]:
            if other == (outside if whole else loop.header):
                paths = {(0, 0, 0, 0, 0): outside}
            elif rank.get(other, -1) > rank[place]:
                paths = found[other]
            else:
                continue
            for sums in paths:
                total = tuple(a + b for a, b in zip(own, sums))
                known = shortest.get(total[:4])
                if known is None or total[4] < known[0][4]:
                    shortest[total[:4]] = total, other if other in rank and other != loop.header else outside
        found[place] = dict(sorted(shortest.values(), key=lambda item: _rank(item[0], ratios))[:KEPT])
    taken, place, left = [], loop.header, None
    while place != outside and found[place]:
        sums = min(found[place], key=lambda sums: _rank(sums, ratios)) if left is None else left
        taken.append(code[place])
        left, place = tuple(a - b for a, b in zip(sums, sums_of(code[place]))), found[place][sums]
    return taken


def _topological(graph: list[list[int]], loop: Loop) -> list[int]:
    """The loop's places from the header on, each before those that it leads to, but for edges back."""
    seen, done = {loop.header}, []
    work = [(loop.header, iter(graph[loop.header]))]
    while work:
        place, rest = work[-1]
        other = next((other for other in rest if other in loop.places and other not in seen), None)
        if other is None:
            done.append(place)
            work.pop()
        else:
            seen.add(other)
            work.append((other, iter(graph[other])))
    return done[::-1]


def _sums(each: Instruction, exponentials: bool, least: int) -> _Sums:
    """Of one instruction; least: bytes a thread below which an access does not count."""
    size = moved(each) if width(each) >= least else 0
    exponential = int(exponentials and each.opcode == "MUFU")
    return products(each), (each.opcode in LOADS) * size, (each.opcode in STORES) * size, exponential, 1


def _rank(sums: _Sums, ratios: tuple[float, ...]) -> tuple:
    """Least of the path that the rule takes."""
    work, loaded, stored, exponentials, length = sums
    if not ratios:
        return -work, -(loaded + stored), -(exponentials // EXPONENTIALS), length
    far = min(abs(math.log((loaded + 1) / (stored + 1) / ratio)) for ratio in ratios)
    return -work, far > NEAR, far if far > NEAR else 0, -(loaded + stored), length


def moved(each: Instruction) -> int:
    """Bytes of global memory that a warp's instruction moves."""
    return WARP * width(each) if pipe(each) == GLOBAL else 0
