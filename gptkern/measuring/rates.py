"""What a results file says: rates, shares of the measured ceilings, who is ahead, which promises are broken.

    rate    what a cell counts (tokens, operations or bytes of one call) / time
    share   the least time at the measured ceiling (flops / ceiling, or bytes / ceiling) / time: 1 is the ceiling
    lead    the peer's time / gptkern's: above 1 gptkern is faster

Functions of plain dicts, as `results.load` gives them; what cannot be said is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

# gptkern has lost a cell where its time exceeds the best peer's by more than this factor: less is noise.
LOST = 1.02
# How a cell went; see `outcome`.
FASTEST, LEVEL, BEHIND, ALONE, FAILED = "fastest", "level", "behind", "no peer", "not timed"
NOISY = "noisy"
_ORDER = {"forward": 0, "backward": 1, "both": 2}


class Panel(NamedTuple):
    """Cells that one table and one plot show: the same operator, panel, dtype and direction, in the order of x."""

    operator: str
    title: str
    dtype: str
    direction: str
    cells: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The title, with the dtype."""
        return self.title if self.dtype in self.title else f"{self.title}, {self.dtype}"


def panels(results: dict[str, Any]) -> list[Panel]:
    """Operators and panels as the file has them first, then directions in order."""
    found: dict[tuple, list] = {}
    for cell in results["cells"]:
        key = (cell["operator"], cell["panel"], cell.get("dtype") or "", cell["direction"])
        found.setdefault(key, []).append(cell)
    # dict.fromkeys keeps the order in which they were met.
    first = {key: place for depth in (1, 3) for place, key in enumerate(dict.fromkeys(key[:depth] for key in found))}
    order = sorted(found, key=lambda key: (first[key[:1]], first[key[:3]], _ORDER.get(key[3], len(_ORDER))))
    return [Panel(*key, sorted(found[key], key=lambda cell: x_value(cell) or float("inf"))) for key in order]


def by_operator(results: dict[str, Any]) -> dict[str, list[Panel]]:
    found: dict[str, list[Panel]] = {}
    for panel in panels(results):
        found.setdefault(panel.operator, []).append(panel)
    return found


def x_value(cell: dict[str, Any]) -> float | None:
    """The size that the panel's plot runs over, where it is a number."""
    value = cell["sizes"].get(cell.get("x"))
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def names(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The implementations of some cells that were timed, gptkern first, then in the file's order."""
    found = [i["name"] for cell in cells for i in cell["implementations"] if seconds(i)]
    return sorted(dict.fromkeys(found), key=lambda name: name != "gptkern")


def implementation(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An implementation of a cell by name, where it was timed."""
    return next((i for i in cell["implementations"] if i["name"] == name and seconds(i)), None)


def ours(cell: dict[str, Any]) -> dict[str, Any] | None:
    """gptkern's implementation of a cell, or None where it was not timed."""
    return implementation(cell, "gptkern")


def best_peer(cell: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest implementation of a cell that is not gptkern's, or None."""
    timed = [i for i in cell["implementations"] if i["name"] != "gptkern" and seconds(i)]
    return min(timed, key=median, default=None)


# --- Times and rates ------------------------------------------------------------------------------------------------


def seconds(implementation: dict[str, Any]) -> dict[str, float] | None:
    """The time that counts and its quartiles: the device's on a GPU, the host's on a CPU; None where it was skipped."""
    return implementation.get("device_s") or implementation.get("wall_s")


def median(implementation: dict[str, Any] | None) -> float | None:
    """The median of the time that counts, in seconds."""
    return None if implementation is None else seconds(implementation)["median"]


def spread(implementation: dict[str, Any]) -> float:
    """The distance of the quartiles as a share of the median."""
    time = seconds(implementation)
    return (time["high"] - time["low"]) / time["median"]


def unit(cells: Sequence[dict[str, Any]]) -> str | None:
    """Of the rates of some cells, the same for all of them: "tokens/s", "FLOP/s", "OP/s" (of int8) or "B/s"."""
    if all(cell.get("tokens") for cell in cells):
        return "tokens/s"
    has_bytes = all(cell.get("bytes") for cell in cells)
    if has_bytes and all(cell.get("ceiling") == "copy" for cell in cells):
        return "B/s"
    if all(cell.get("flops") for cell in cells):
        return "OP/s" if any(cell.get("ceiling") == "int8" for cell in cells) else "FLOP/s"
    return "B/s" if has_bytes else None


def amount(cell: dict[str, Any], unit: str | None) -> float | None:
    """How much of it one call does."""
    return cell.get({"B/s": "bytes", "tokens/s": "tokens"}.get(unit, "flops")) if unit else None


def rate(cell: dict[str, Any], implementation: dict[str, Any] | None) -> float | None:
    """In `unit([cell])`."""
    taken, work = median(implementation), amount(cell, unit([cell]))
    return work / taken if work and taken else None


def least_seconds(cell: dict[str, Any], ceilings: dict[str, Any]) -> float | None:
    """The time of one call at the measured ceiling."""
    ceiling = ceilings.get(cell.get("ceiling"))
    work = cell.get("bytes" if cell.get("ceiling") == "copy" else "flops")
    return work / ceiling["value"] if ceiling and work else None


def share(cell: dict[str, Any], implementation: dict[str, Any] | None, ceilings: dict[str, Any]) -> float | None:
    least, taken = least_seconds(cell, ceilings), median(implementation)
    return least / taken if least and taken else None


def noisy(implementation: dict[str, Any] | None) -> str | None:
    """Why its time says little, or None."""
    return (implementation or {}).get("noisy")


def host_bound(implementation: dict[str, Any] | None) -> bool:
    """Whether the host queued its calls more slowly than the GPU ran them: its time may be in this one."""
    return bool((implementation or {}).get("host_bound"))


# --- Who is ahead ---------------------------------------------------------------------------------------------------


def lead(cell: dict[str, Any], peer: dict[str, Any] | None = None) -> float | None:
    """The time of a peer (the best one's) / gptkern's: above 1 gptkern is faster."""
    mine, peer = median(ours(cell)), median(peer or best_peer(cell))
    return peer / mine if mine and peer else None


def unclear(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the quartiles of two implementations' times overlap: their difference may be noise."""
    one, other = seconds(one), seconds(other)
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def outcome(cell: dict[str, Any], peer: dict[str, Any] | None = None) -> str:
    """How a cell went against a peer (the best one), by more than noise.

    FASTEST    gptkern is faster, and the quartiles of the two do not overlap
    BEHIND     the peer is faster by more than LOST, and the quartiles do not overlap
    LEVEL      neither: the difference is small, or may be noise
    NOISY      one of the two times says little, as its record has it: no verdict
    ALONE      no peer was timed
    FAILED     gptkern was not timed
    """
    mine, peer = ours(cell), peer or best_peer(cell)
    if mine is None:
        return FAILED
    if peer is None:
        return ALONE
    if noisy(mine) or noisy(peer):
        return NOISY
    ahead = lead(cell, peer)
    if unclear(mine, peer) or 1 / LOST <= ahead <= 1:
        return LEVEL
    return FASTEST if ahead > 1 else BEHIND


def tally(cells: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many cells went which way."""
    return Counter(map(outcome, cells))


class Promise(NamedTuple):
    """A promised limit: of gptkern's time over the peer's, or where `peer` is None of the value itself, in seconds."""

    where: str
    peer: str | None
    limit: float
    measured: float | None

    @property
    def broken(self) -> bool:
        return self.measured is not None and self.measured > self.limit

    def __str__(self) -> str:
        of = f" × {self.peer}'s" if self.peer else " s"
        return f"{self.where}: {self.measured:.3g}{of}, promised {self.limit:g}{of}"


def promises(results: dict[str, Any]) -> list[Promise]:
    """The promises of all cells and costs; what is noisy neither keeps nor breaks one."""
    found = []
    for cell in results["cells"]:
        for peer, limit in (cell.get("limits") or {}).items():
            other = implementation(cell, peer)
            quiet = other and not noisy(ours(cell)) and not noisy(other)
            ahead = lead(cell, other) if quiet else None
            where = f"{cell['operator']} {cell['direction']}, {cell['label']}"
            found.append(Promise(where, peer, limit, 1 / ahead if ahead else None))
    for cost in results["costs"]:
        if cost.get("limit") is not None:
            mine = None if cost.get("noisy") else cost["gptkern"].get("median")
            peer = cost.get("limit_to")
            of = cost["peers"][peer].get("median") if peer else 1
            found.append(Promise(cost["key"], peer, cost["limit"], mine / of if mine is not None and of else None))
    return found
