"""What a results file says: rates, shares of the measured ceilings, who is ahead.

    rate    what a cell's panel counts (tokens, operations or bytes of one call) / time
    limit   the rate at the measured ceiling: a call cannot take less than flops / ceiling, or bytes / ceiling
    share   rate / limit
    lead    the peer's time / gptkern's: above 1 gptkern is faster

Functions of plain dicts, as `results.load` gives them; what cannot be said is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gptkern.measuring import results as files

OPERATORS = ("attention", "layer_norm", "rms_norm", "rotary", "softmax", "int8_linear", "model")
DIRECTIONS = ("forward", "backward", "both", "training step", "generation")
# How a cell went; see `outcome`.
FASTEST, LEVEL, BEHIND, ALONE, FAILED = "fastest", "level", "behind", "no peer", "not timed"


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
    """All cells, in the order of OPERATORS, then as the file has the panels, then of DIRECTIONS."""
    found: dict[tuple, list] = {}
    for cell in results["cells"]:
        found.setdefault((cell["operator"], cell["panel"], cell.get("dtype") or "", cell["direction"]), []).append(cell)
    first = {}
    for operator, title, dtype, _ in found:
        first.setdefault((operator, title, dtype), len(first))
    order = sorted(
        found, key=lambda key: (_place(key[0], OPERATORS), key[0], first[key[:3]], _place(key[3], DIRECTIONS), key[3])
    )
    return [Panel(*key, sorted(found[key], key=_x_order)) for key in order]


def operators(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(panel.operator for panel in panels(results)))


def x_value(cell: dict[str, Any]) -> float | None:
    """The size that the panel's plot runs over, where it is a number."""
    value = cell["sizes"].get(cell.get("x"))
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def names(cells: Sequence[dict[str, Any]], timed: bool = True) -> list[str]:
    """The implementations of some cells, gptkern first, then in the file's order; by default those with a time."""
    found = [i["name"] for cell in cells for i in cell["implementations"] if not timed or files.seconds(i)]
    return sorted(dict.fromkeys(found), key=lambda name: name != "gptkern")


def implementation(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    """An implementation of a cell by name, where it was timed."""
    return next((i for i in cell["implementations"] if i["name"] == name and files.seconds(i)), None)


def median(implementation: dict[str, Any] | None) -> float | None:
    """The median of the time that counts, in seconds."""
    return None if implementation is None else files.seconds(implementation)["median"]


def spread(implementation: dict[str, Any]) -> float:
    """The distance of the quartiles as a share of the median."""
    time = files.seconds(implementation)
    return (time["high"] - time["low"]) / time["median"]


# --- Rates and limits -------------------------------------------------------------------------------------------------


def counted(cells: Sequence[dict[str, Any]]) -> str | None:
    """What the rates of some cells count: "tokens", "flops", "ops" (of int8) or "bytes", the same for all of them."""
    if all(cell.get("tokens") for cell in cells):
        return "tokens"
    limited_by_copy = [cell.get("ceiling") == "copy" for cell in cells]
    if all(cell.get("flops") for cell in cells) and not (
        all(limited_by_copy) and all(cell.get("bytes") for cell in cells)
    ):
        return "ops" if any(cell.get("ceiling") == "int8" for cell in cells) else "flops"
    return "bytes" if all(cell.get("bytes") for cell in cells) else None


def amount(cell: dict[str, Any], what: str | None) -> float | None:
    """How much of it one call does."""
    return cell.get({"ops": "flops"}.get(what, what)) if what else None


def rate(cell: dict[str, Any], implementation: dict[str, Any] | None) -> float | None:
    """Of what the cell counts, a second."""
    taken, work = median(implementation), amount(cell, counted([cell]))
    return work / taken if work and taken else None


def least_seconds(cell: dict[str, Any], ceilings: dict[str, Any]) -> float | None:
    """The time of one call at the measured ceiling."""
    ceiling = ceilings.get(cell.get("ceiling"))
    work = cell.get("bytes" if cell.get("ceiling") == "copy" else "flops")
    return work / ceiling["value"] if ceiling and work else None


def share(cell: dict[str, Any], implementation: dict[str, Any] | None, ceilings: dict[str, Any]) -> float | None:
    """rate / limit: 1 is the measured ceiling."""
    least, taken = least_seconds(cell, ceilings), median(implementation)
    return least / taken if least and taken else None


# --- Who is ahead -----------------------------------------------------------------------------------------------------


def lead(cell: dict[str, Any], peer: dict[str, Any] | None = None) -> float | None:
    """The time of a peer (the best one's) / gptkern's: above 1 gptkern is faster."""
    ratio = files.ratio(cell, peer)
    return None if ratio is None else 1 / ratio


def unclear(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the quartiles of two implementations' times overlap: their difference may be noise."""
    one, other = files.seconds(one), files.seconds(other)
    return one["low"] <= other["high"] and other["low"] <= one["high"]


def outcome(cell: dict[str, Any], peer: dict[str, Any] | None = None) -> str:
    """How a cell went against a peer (the best one), by more than noise.

    FASTEST    gptkern is faster, and the quartiles of the two do not overlap
    BEHIND     the peer is faster by more than results.LOST, and the quartiles do not overlap
    LEVEL      neither: the difference is small, or may be noise
    ALONE      no peer was timed
    FAILED     gptkern was not timed
    """
    mine, peer = files.ours(cell), peer or files.best_peer(cell)
    if mine is None:
        return FAILED
    if peer is None:
        return ALONE
    ratio = files.ratio(cell, peer)
    if unclear(mine, peer) or 1 <= ratio <= files.LOST:
        return LEVEL
    return FASTEST if ratio < 1 else BEHIND


def tally(cells: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many cells went which way."""
    outcomes = [outcome(cell) for cell in cells]
    return {name: outcomes.count(name) for name in (FASTEST, LEVEL, BEHIND, ALONE, FAILED)}


class Promise(NamedTuple):
    """A promised limit: gptkern's time is at most `limit` times the peer's; `ratio` is what was measured, or None."""

    where: str
    peer: str
    limit: float
    ratio: float | None

    @property
    def broken(self) -> bool:
        return self.ratio is not None and self.ratio > self.limit


def promises(cell: dict[str, Any]) -> list[Promise]:
    """The promises of a cell."""
    where = f"{cell['operator']} {cell['direction']}, {cell.get('label') or cell['key']}"
    found = []
    for peer, limit in (cell.get("limits") or {}).items():
        other = implementation(cell, peer)
        found.append(Promise(where, peer, limit, None if other is None else files.ratio(cell, other)))
    return found


def cost_promise(cost: dict[str, Any]) -> Promise | None:
    """The promise of a cost; of a limit that is a value, `peer` is "" and `ratio` the value itself."""
    if cost.get("limit") is None:
        return None
    mine = (cost.get("gptkern") or {}).get("median")
    if cost.get("limit_is") == "value":
        return Promise(cost["key"], "", cost["limit"], mine)
    other = (cost.get("peers") or {}).get(cost.get("limit_to"), {}).get("median")
    ratio = mine / other if mine is not None and other else None
    return Promise(cost["key"], cost.get("limit_to") or "", cost["limit"], ratio)


def all_promises(results: dict[str, Any]) -> list[Promise]:
    """The promises of all cells and costs."""
    found = [promise for cell in results["cells"] for promise in promises(cell)]
    return found + [promise for promise in map(cost_promise, results["costs"]) if promise]


def meaningless(results: dict[str, Any], name: str) -> bool:
    """Whether some of a file's "cells", "ceilings" or "costs" were measured in a smoke run, on tiny sizes."""
    entries = results[name]
    if name == "ceilings":
        entries = entries.values()
    return any(entry.get("extent") == "smoke" or "--smoke" in (entry.get("options") or ()) for entry in entries)


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def _x_order(cell: dict[str, Any]) -> float:
    value = x_value(cell)
    return float("inf") if value is None else value
