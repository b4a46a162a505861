"""Which backend of an operator is tried first: backends.json in the operator's room.

    {"defaults": [{"architecture": 80, "order": ["cuda", "triton", "torch"], "source": "reasoned: …"}, …],
     "entries": [{"device": …, "architecture": 90, "date": …, "versions": {…}, "source": …,
                  "rows": [{"bits": 16, "head_dim": 128, …, "order": ["triton", "torch"], "ratio": 1.3, "on": …}, …]}]}

A default is an architecture's order where nothing was measured, with its reason; it serves the newer ones that have
none of their own. An entry is of one device. Its row is a class of calls (`classes` of the operator's problem), the
order of the backends that were measured, the fastest first, and by how much the second is slower. It holds for the
backward as well: that runs where its forward ran. A room without the file has the order of FAMILIES everywhere.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from gptkern import operators
from gptkern.backends.tables import configurations, files, user

FAMILIES = ("cuda", "triton", "torch")


class Preference(NamedTuple):
    """The order of an operator's backends, variants included, and why: reasoned, or measured where and when."""

    order: tuple[str, ...]
    reason: str


class Shipped(NamedTuple):
    """backends.json of one room."""

    defaults: dict[int, Preference]
    entries: dict[user.Device, dict[tuple, Preference]]


# What a room without the file has.
_ALIKE = {80: Preference(FAMILIES, "no order of its own: kernels before PyTorch, not measured")}


@functools.cache
def shipped(operator: str) -> Shipped:
    """The file of an operator's room, read once a process.

    Raises:
        files.TableError: it is not as it has to be.
    """
    path = files.shipped(operator, "backends")
    if not path.is_file():
        return Shipped(_ALIKE, {})
    with files.reading(path):
        content, defaults, entries = files.read(path), {}, {}
        for default in content["defaults"]:
            order = _order(str(path), default["order"])
            if not set(FAMILIES) <= set(order):
                raise files.TableError(f"{path}: order is {list(order)}; it needs each of {', '.join(FAMILIES)}")
            defaults[default["architecture"]] = Preference(order, default["source"])
        for entry in content["entries"]:
            device, where = user.Device(entry["device"], entry["architecture"]), f"{path}: {entry['device']}"
            entries[device] = _rows(where, operator, entry["rows"], _names(defaults), device.name, entry["date"])
    return Shipped(defaults, entries)


def names(operator: str) -> tuple[str, ...]:
    """Every backend and variant of the operator."""
    return _names(shipped(operator).defaults)


def _names(defaults: dict[int, Preference]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for preference in defaults.values() for name in preference.order))


@functools.cache
def variants() -> tuple[str, ...]:
    """The variants of all operators: "torch:cudnn"."""
    found = (name for operator in operators.NAMES for name in names(operator) if ":" in name)
    return tuple(dict.fromkeys(found))


def default(operator: str, device: user.Device | None) -> Preference:
    """The order of the device's architecture where nothing was measured."""
    defaults = shipped(operator).defaults
    architecture = configurations.INTERPRETED_ARCHITECTURE if device is None else device.architecture
    return defaults[configurations.descent(architecture, tuple(defaults))[0]]


def preferences(operator: str, device: user.Device | None) -> dict[tuple, Preference]:
    """class -> preference for a device: the user's measurements before those that came with gptkern."""
    if device is None:
        return {}
    known = default(operator, device).order

    def made(where: str, listed: list, date: str) -> dict[tuple, Preference]:
        return _rows(where, operator, listed, known, device.name, date)

    return shipped(operator).entries.get(device, {}) | user.rows(device, "backends", operator, made)


def _rows(where: str, operator: str, listed: list, known: tuple, device: str, date: str) -> dict[tuple, Preference]:
    parts = operators.problem(operator).classes.parts
    rows = {}
    for row in listed:
        for name, values in parts.items():
            # False == 0 and True == 1: neither stands for the other.
            if not any(type(row[name]) is type(value) and row[name] == value for value in values):
                needs = ", ".join(map(repr, values))
                raise files.TableError(f"{where}: {name} is {row[name]!r}; it needs one of {needs}")
        key, order, ratio = tuple(row[name] for name in parts), _order(where, row["order"]), row["ratio"]
        if key in rows or len(order) < 2:
            raise files.TableError(f"{where}: the row of {key} needs two backends at least, and to be the only one")
        # What was not measured comes last: nothing is known for it.
        complete = (*order, *(name for name in known if name not in order))
        found = f"{ratio:.2f} x faster than" if ratio > 1 else "within the noise as fast as"
        rows[key] = Preference(complete, f"measured {found} {order[1]} on {device}, {date}")
    return rows


def _order(where: str, order: list[str]) -> tuple[str, ...]:
    if len({*order}) < len(order) or any(name.partition(":")[0] not in FAMILIES for name in order):
        needs = f"names of {', '.join(FAMILIES)}, or of variants of theirs, each once"
        raise files.TableError(f"{where}: order is {order}; it needs {needs}")
    return tuple(order)


def path(operator: str) -> Path:
    return files.shipped(operator, "backends")


def forget() -> None:
    """The files are read again."""
    shipped.cache_clear()
    variants.cache_clear()
