"""Which backend is tried first, by measurement.

backends.json holds the order where nothing was measured, and an entry for each device where something was:

    {"device": …, "architecture": 90, "date": …, "versions": {…}, "source": …,
     "rows": {operator: [{"bits": 16, "head_dim": 128, …, "order": ["triton", "torch"], "ratio": 1.3, "on": …}, …]}}

A row is a class of calls (shape_classes.py), the order of the backends that were measured, the fastest first, and by
how much the second is slower. It holds for the backward as well: that runs where its forward ran.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

from gptkern.backends.tables import files, user
from gptkern.backends.tables.shape_classes import CLASSES

NAMES = ("cuda", "triton", "torch")


class Preference(NamedTuple):
    """The order of the backends for a class of calls, all of them, and why: what was measured, where and when."""

    order: tuple[str, ...]
    reason: str


class Shipped(NamedTuple):
    """backends.json."""

    default: tuple[str, ...]
    source: str
    entries: dict[user.Device, dict[str, dict[tuple, Preference]]]


@functools.cache
def shipped(path: Path | None = None) -> Shipped:
    """The file that comes with gptkern, read once a process.

    Raises:
        files.TableError: it is not as it has to be.
    """
    path = path or files.shipped("backends")
    where, content = str(path), files.read(path)
    default = files.wanted(where, "default", content.get("default"), dict, "an object")
    order = _order(f"{where}: default", default.get("order"))
    if sorted(order) != sorted(NAMES):
        raise files.TableError(f"{where}: default.order is {list(order)}; it needs each of {', '.join(NAMES)}")
    source = files.wanted(f"{where}: default", "source", default.get("source"), str, "a sentence")
    entries = {}
    for index, entry in enumerate(files.wanted(where, "entries", content.get("entries"), list, "a list")):
        place = f"{where}: entries[{index}]"
        files.wanted(place, "the entry", entry, dict, "an object")
        name = files.wanted(place, "device", entry.get("device"), str, "a GPU's name")
        architecture = files.wanted(place, "architecture", entry.get("architecture"), int, "a number, as 90")
        date = files.wanted(place, "date", entry.get("date"), str, "the day of the measurement")
        files.wanted(place, "versions", entry.get("versions"), dict, "an object of versions by package")
        by_operator = files.wanted(place, "rows", entry.get("rows"), dict, "an object of rows by operator")
        device = user.Device(name, architecture)
        if device in entries:
            raise files.TableError(f"{place}: a second entry for {name}")
        entries[device] = {
            operator: _rows(f"{place}.rows", operator, listed, order, name, date)
            for operator, listed in by_operator.items()
        }
    return Shipped(order, source, entries)


def preferences(operator: str, device: user.Device | None) -> dict[tuple, Preference]:
    """class -> preference for a device: the user's measurements before those that came with gptkern."""
    if device is None or operator not in CLASSES:
        return {}
    ours = shipped()
    rows = dict(ours.entries.get(device, {}).get(operator, {}))
    file = user.read(device)
    listed = (file.content or {}).get("backends", {}).get(operator)
    if listed:
        where = f"{file.path}: backends"
        try:
            rows |= _rows(where, operator, listed, ours.default, device.name, str(file.content["date"]))
        except files.TableError as error:
            user.warn(file.path, str(error))
    return rows


def _rows(where: str, operator: str, listed: Any, default: tuple, device: str, date: str) -> dict[tuple, Preference]:
    if operator not in CLASSES:
        raise files.TableError(f"{where}.{operator}: no such operator; it needs one of {', '.join(CLASSES)}")
    parts = CLASSES[operator].parts
    rows = {}
    for index, row in enumerate(files.wanted(where, operator, listed, list, "a list of rows")):
        place = f"{where}.{operator}[{index}]"
        files.wanted(place, "the row", row, dict, "an object")
        for name, values in parts.items():
            # False == 0 and True == 1: neither stands for the other.
            if name not in row or not any(row[name] is value or _same(row[name], value) for value in values):
                needs = ", ".join(map(repr, values))
                raise files.TableError(f"{place}: {name} is {row.get(name)!r}; it needs one of {needs}")
        order = _order(place, row.get("order"))
        if len(order) < 2:
            raise files.TableError(f"{place}: order is {list(order)}; it needs two backends at least")
        ratio = files.wanted(place, "ratio", row.get("ratio"), (int, float), "a number")
        key = tuple(row[name] for name in parts)
        if key in rows:
            raise files.TableError(f"{place}: a second row of {key}")
        # What was not measured comes last: nothing is known for it.
        complete = (*order, *(name for name in default if name not in order))
        found = f"{ratio:.2f} x faster than" if ratio > 1 else "within the noise as fast as"
        rows[key] = Preference(complete, f"measured {found} {order[1]} on {device}, {date}")
    return rows


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _order(place: str, order: Any) -> tuple[str, ...]:
    names = files.wanted(place, "order", order, list, "a list of backends")
    if len(set(map(str, names))) != len(names) or any(name not in NAMES for name in names):
        raise files.TableError(f"{place}: order is {names}; it needs names of {', '.join(NAMES)}, each once")
    return tuple(names)


def forget() -> None:
    """The files are read again."""
    shipped.cache_clear()
