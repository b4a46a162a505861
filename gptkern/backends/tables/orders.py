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
from typing import Any, NamedTuple

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
    where, content = str(path), files.read(path)
    defaults = {}
    for index, default in enumerate(files.wanted(where, "defaults", content.get("defaults"), list, "a list")):
        place = f"{where}: defaults[{index}]"
        files.wanted(place, "the default", default, dict, "an object")
        architecture = files.wanted(place, "architecture", default.get("architecture"), int, "a number, as 90")
        order = _order(place, default.get("order"))
        if not set(FAMILIES) <= set(order):
            raise files.TableError(f"{place}: order is {list(order)}; it needs each of {', '.join(FAMILIES)}")
        source = files.wanted(place, "source", default.get("source"), str, "a sentence")
        defaults[architecture] = Preference(order, source)
    if not defaults:
        raise files.TableError(f"{where}: defaults is empty; it needs the order of one architecture at least")
    known = _names(defaults)
    entries = {}
    for index, entry in enumerate(files.wanted(where, "entries", content.get("entries"), list, "a list")):
        place = f"{where}: entries[{index}]"
        files.wanted(place, "the entry", entry, dict, "an object")
        name = files.wanted(place, "device", entry.get("device"), str, "a GPU's name")
        architecture = files.wanted(place, "architecture", entry.get("architecture"), int, "a number, as 90")
        date = files.wanted(place, "date", entry.get("date"), str, "the day of the measurement")
        files.wanted(place, "versions", entry.get("versions"), dict, "an object of versions by package")
        listed = files.wanted(place, "rows", entry.get("rows"), list, "a list of rows")
        device = user.Device(name, architecture)
        if device in entries:
            raise files.TableError(f"{place}: a second entry for {name}")
        entries[device] = _rows(f"{place}.rows", operator, listed, known, name, date)
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
    rows = dict(shipped(operator).entries.get(device, {}))
    file = user.read(device)
    listed = (file.content or {}).get("backends", {}).get(operator)
    if listed:
        where = f"{file.path}: backends.{operator}"
        try:
            known = default(operator, device).order
            rows |= _rows(where, operator, listed, known, device.name, str(file.content["date"]))
        except files.TableError as error:
            user.warn(file.path, str(error))
    return rows


def _rows(where: str, operator: str, listed: list, known: tuple, device: str, date: str) -> dict[tuple, Preference]:
    classes = operators.problem(operator).classes
    if classes is None:
        raise files.TableError(f"{where}: {operator} has no classes of calls, by which rows are found")
    rows = {}
    for index, row in enumerate(listed):
        place = f"{where}[{index}]"
        files.wanted(place, "the row", row, dict, "an object")
        for name, values in classes.parts.items():
            # False == 0 and True == 1: neither stands for the other.
            if name not in row or not any(row[name] is value or _same(row[name], value) for value in values):
                needs = ", ".join(map(repr, values))
                raise files.TableError(f"{place}: {name} is {row.get(name)!r}; it needs one of {needs}")
        order = _order(place, row.get("order"))
        if len(order) < 2:
            raise files.TableError(f"{place}: order is {list(order)}; it needs two backends at least")
        ratio = files.wanted(place, "ratio", row.get("ratio"), (int, float), "a number")
        key = tuple(row[name] for name in classes.parts)
        if key in rows:
            raise files.TableError(f"{place}: a second row of {key}")
        # What was not measured comes last: nothing is known for it.
        complete = (*order, *(name for name in known if name not in order))
        found = f"{ratio:.2f} x faster than" if ratio > 1 else "within the noise as fast as"
        rows[key] = Preference(complete, f"measured {found} {order[1]} on {device}, {date}")
    return rows


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and value == other


def _order(place: str, order: Any) -> tuple[str, ...]:
    found = files.wanted(place, "order", order, list, "a list of backends")
    if len(set(map(str, found))) != len(found) or any(str(name).partition(":")[0] not in FAMILIES for name in found):
        needs = f"names of {', '.join(FAMILIES)}, or of variants of theirs, each once"
        raise files.TableError(f"{place}: order is {found}; it needs {needs}")
    return tuple(found)


def path(operator: str) -> Path:
    return files.shipped(operator, "backends")


def forget() -> None:
    """The files are read again."""
    shipped.cache_clear()
    variants.cache_clear()
