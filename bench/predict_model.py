"""From the trip of a kernel's main loop (bench/sass.py) to a share of a GPU's limit, as a range: a prediction.

A warp is walked through the trip, instruction by instruction, as a scheduler would issue it: not before the stall count
of the one before is over, not before the scoreboards that it waits for are free, not before its pipe takes it. Pipes
are busy for as many cycles as the part's table says (bench/predict_parts.py); shared memory and the caches, which four
schedulers share, for four times as many, since each scheduler's warp asks for as much.

    busy[p]     cycles that a trip keeps pipe p; one of them is to issue
    alone       cycles of a trip where a scheduler has one warp
    in_step     cycles of a trip of each of w warps that all execute the same instruction before any goes on: their
                latencies overlap, and what pipes are asked for at different times does not

With w warps a scheduler (registers and shared memory say how many), one warp's trip takes

    best   = max(max over p of busy[p], alone / w)     pipes and latencies overlap perfectly
    worst  = max(best, in_step / w)                    no overlap between pipes

The first is the asymptotic bound of a closed queueing network (Lazowska, Zahorjan, Graham, Sevcik, Quantitative System
Performance, 1984, chapter 5). Warps of one block, which a barrier brings together, are nearer to the second.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import sass
from predict_parts import SCHEDULERS, Part, occupancy

# Where between the worst (0) and the best (1) a kernel with matrix work is expected. FITTED: of the published rates of
# four strangers (bench/predict_strangers.json) the largest error is least with it, to the nearest 0.05; all else here
# has a source. Nothing of the kind was fitted for kernels that the bandwidth limits: of those there is a range alone.
OVERLAP = 0.25
# A trip is walked so often before it is measured: loads of a trip are waited for in a later one.
WARMING, MEASURED = 4, 4
ISSUE, SECOND_CACHE, MEMORY = "issue", "second cache", "memory"
# Pipes that take an instruction and let the warp go on; the others hold it until they are free.
QUEUED = (sass.SPECIAL, sass.SHARED, SECOND_CACHE, MEMORY)


class Launch(NamedTuple):
    """What a block asks of a multiprocessor."""

    registers: int
    threads: int
    shared: int


class Prediction(NamedTuple):
    """Of one kernel on one part.

    Args:
        warps: a scheduler's. busy: by pipe, cycles of a trip. alone, in_step: as the module says.
        best, worst: the range, as shares of the part's peak (matrix work) or bandwidth.
        binds: the pipe that is busy longest, or what else makes the best no better.
        trip: what was walked. blocks: of a multiprocessor.
    """

    part: Part
    trip: sass.Trip
    launch: Launch
    blocks: int
    warps: float
    busy: dict[str, float]
    alone: float
    in_step: float
    best: float
    worst: float
    binds: str


def limit(part: Part, trip: sass.Trip, by_bytes: bool) -> float:
    """Bytes a second, or operations a second of the trip's operands."""
    if by_bytes:
        return part.bandwidth.value
    int8 = any(each.opcode in ("IMMA", "IGMMA") for each in trip.instructions)
    return (part.peak_int8 if int8 else part.peak).value


def expected(worst: float, best: float) -> float:
    return worst + OVERLAP * (best - worst)


def predict(part: Part, trip: sass.Trip, launch: Launch, streamed: float | None = None) -> Prediction:
    """The range.

    Args:
        streamed: bytes of device memory that a warp's trip has to move, of a kernel whose limit is the bandwidth; None:
            the limit is the matrix units'.

    Raises:
        ValueError: no block fits the part.
    """
    blocks = occupancy(part, *launch)
    if not blocks:
        raise ValueError(f"no block of {launch} fits a multiprocessor of {part.name}")
    warps = blocks * launch.threads / sass.WARP / SCHEDULERS
    far = part.cache.value if streamed is None else part.memory.value
    # What the trip asks of device memory goes through it as the trip's instructions of global memory do.
    share = 0.0 if streamed is None else streamed / trip.moved
    busy = pipes(part, trip.instructions, share)
    alone = walk(part, trip.instructions, share, far, 1)
    best = max(*busy.values(), alone / warps)
    worst = max(best, walk(part, trip.instructions, share, far, warps) / warps)
    binds = max(busy, key=lambda name: busy[name])
    if alone / warps > busy[binds]:
        binds = f"latency, {warps:g} warps"
    # The peak, or the bandwidth, of one scheduler's cycle.
    full = limit(part, trip, streamed is not None) / part.multiprocessors.value / SCHEDULERS / part.clock.value
    if streamed is None:
        shares = [part.sustained.value * 2 * trip.products / cycles / full for cycles in (best, worst)]
    else:
        shares = [part.streamed.value * streamed / cycles / full for cycles in (best, worst)]
    return Prediction(part, trip, launch, blocks, warps, busy, alone, worst * warps, *shares, binds)


# --- Pipes ------------------------------------------------------------------------------------------------------------


def costs(part: Part, each: sass.Instruction, share: float) -> dict[str, float]:
    """Cycles that an instruction keeps each pipe of a scheduler; share: of its bytes, what comes from device memory."""
    kind = sass.pipe(each)
    if kind == sass.MATRIX:
        found = {sass.MATRIX: sass.products(each) / matrix_rate(part, each)}
        if "GMMA" in each.opcode:
            found[sass.SHARED] = operand_bytes(each) / part.shared.value
        return found
    if kind == sass.SPECIAL:
        return {kind: part.special.value}
    if kind == sass.FLOAT:
        if each.opcode.startswith("H"):
            return {kind: (part.bfloat16 if ".BF16" in each.name else part.half).value}
        cycles = part.imad if each.opcode == "IMAD" else part.float32
        return {kind: cycles.value * (2 if ".WIDE" in each.name or ".HI" in each.name else 1)}
    if kind == sass.INTEGER:
        return {kind: part.integer.value}
    if kind == sass.SHARED:
        return {kind: SCHEDULERS * max(1.0, sass.WARP * sass.width(each) / part.shared.value)}
    if kind == sass.GLOBAL:
        size = sass.moved(each)
        through = SCHEDULERS * max(1.0, size / part.shared.value)
        found = {sass.SHARED: through, SECOND_CACHE: SCHEDULERS * size / part.l2.value}
        if share:
            found[MEMORY] = (
                share * size * part.multiprocessors.value * SCHEDULERS * part.clock.value / part.bandwidth.value
            )
        return found
    return {}


def matrix_rate(part: Part, each: sass.Instruction) -> float:
    """Multiply-adds a cycle of one scheduler.

    Raises:
        ValueError: the part has no such instruction.
    """
    rate = {
        "HMMA": part.mma, "IMMA": part.mma_int8, "HGMMA": part.wgmma, "IGMMA": part.wgmma_int8,
    }.get(each.opcode)  # fmt: skip
    if rate is None:
        raise ValueError(f"{part.name} has no {each.opcode}, or its rate is not in the table")
    if each.opcode == "HMMA" and ".TF32" in each.name:
        return rate.value / 2
    return rate.value


def operand_bytes(each: sass.Instruction) -> int:
    """Bytes of shared memory that a warpgroup's product reads: B always, A where it is not in registers."""
    rows, columns, depth = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", each.name).groups())
    size = 1 if each.opcode == "IGMMA" else 2
    # "R24, gdesc[UR8], R24" describes both; "R88, R120, gdesc[UR4], R88" has A in registers.
    in_registers = re.match(r"R\w+, R\w+, gdesc", each.operands) is not None
    return size * depth * (columns + (0 if in_registers else rows))


def pipes(part: Part, instructions: list[sass.Instruction], share: float) -> dict[str, float]:
    """busy[p]."""
    found: dict[str, float] = {ISSUE: float(len(instructions))}
    for each in instructions:
        for name, cycles in costs(part, each, share).items():
            found[name] = found.get(name, 0.0) + cycles
    return found


# --- One warp ---------------------------------------------------------------------------------------------------------


class _Groups:
    """Asynchronous work in groups, in order: `wait(n)` gives when all but the n youngest are done."""

    def __init__(self):
        self.open, self.closed = 0.0, []

    def add(self, done: float) -> None:
        self.open = max(self.open, done)

    def close(self) -> None:
        self.closed, self.open = [*self.closed[-8:], self.open], 0.0

    def wait(self, youngest: int) -> float:
        done = self.closed[: len(self.closed) - youngest] if youngest else self.closed
        return max(done, default=0.0)


def walk(part: Part, instructions: list[sass.Instruction], share: float, far: float, warps: float) -> float:
    """Cycles of a trip of so many warps in step, on average of some; far: the latency of global memory."""
    free: dict[str, float] = {}
    boards, copies, products = [0.0] * 6, _Groups(), _Groups()
    now = started = 0.0
    latencies = {sass.SPECIAL: part.exponential.value, sass.SHARED: part.local.value, sass.GLOBAL: far}
    known = [(each, costs(part, each, share), sass.pipe(each)) for each in instructions]
    for trip in range(WARMING + MEASURED):
        if trip == WARMING:
            started = now
        for each, cost, kind in known:
            now = max([now, *(boards[board] for board in each.waits), _asked(each, copies, products)])
            asynchronous = "GMMA" in each.opcode
            for name in cost:
                if name not in QUEUED and not asynchronous:
                    now = max(now, free.get(name, 0.0))
            for name, cycles in cost.items():
                free[name] = max(now, free.get(name, 0.0)) + warps * cycles
            # The nearest pipe reads the operands; the furthest has the result.
            read, last = (pick((free[name] for name in cost), default=now) for pick in (min, max))
            done = last + latencies.get(kind, 0.0)
            if each.opcode == "LDGSTS":
                copies.add(done)
            elif each.opcode == "LDGDEPBAR":
                copies.close()
            elif asynchronous:
                products.add(done)
                if "gsb0" in each.operands:
                    products.close()
            # A store is done for its warp when it is taken.
            if each.sets is not None:
                boards[each.sets] = max(boards[each.sets], done)
            if each.releases is not None:
                boards[each.releases] = max(boards[each.releases], read)
            now += max(warps, each.stall)
    return (now - started) / MEASURED


def _asked(each: sass.Instruction, copies: _Groups, products: _Groups) -> float:
    """When the asynchronous work is done that an instruction waits for."""
    if each.opcode == "DEPBAR" and "SB0" in each.operands and each.name.startswith("DEPBAR.LE"):
        return copies.wait(_number(each.operands))
    if each.opcode == "WARPGROUP" and ".DEPBAR" in each.name:
        return products.wait(_number(each.operands))
    return 0.0


def _number(operands: str) -> int:
    return int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)
