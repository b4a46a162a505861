"""The configurations of kernels: tiles, warps and stages, by what is launched and on what.

A file <backend>.json in an operator's room:

    {"operator": …, "why": [sentences],
     "entries": [
      {"architecture": 80, "source": "…", "rows": [{"kernel": "forward", "head_dim": 64, "block_m": 128, …}, …]},
      {"architecture": 90, "device": "NVIDIA H200", "date": …, "versions": {…}, "source": "measured …", "rows": […]}]}

A row is its key (which kernel, which dtype, and last one size or several: rows and width) and its configuration. A
size is the largest that the row serves, or null: any. A call takes the first row that serves all of its sizes, in the
order of the sizes. An entry without a device is an architecture's default, and holds only what differs from the
default of the architecture below. An entry with a device was measured there and changes rows for that device alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from operator import le
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptkern.backends.tables import files, user

# From here on architectures are the parts for workstations again, with the shared memory and the matrix instructions
# of sm_86 and sm_89: they take the tables below BIG_SHARED_MEMORY.
WORKSTATIONS = 120
BIG_SHARED_MEMORY = 90
# Where there is no GPU kernels are interpreted, and any row is as good.
INTERPRETED_ARCHITECTURE = 80

# A kernel's module registers its table here, by operator and backend.
TABLES: dict[tuple[str, str], Table] = {}
# (operator, backend, key) -> the configuration that `override` puts in the place of the tables'.
_overrides: dict[tuple[str, str, tuple], Any] = {}


class Row(NamedTuple):
    """A line of a table.

    Args:
        configuration: of the kernel module's own type.
        source: where it comes from, in words.
        measured: what the file says of its measurement: "gain", "on"; empty for a default.
    """

    configuration: Any
    source: str
    measured: dict[str, Any]


class Entry(NamedTuple):
    """Rows of one origin."""

    architecture: int
    device: str | None
    source: str
    rows: dict[tuple, Row]


class Table:
    """The table of one operator's kernels on one backend.

    Args:
        operator: the room. backend: "triton", "cuda" or a variant: the name of the file.
        key: {name of a part of a row's key: the values that it may have}, the sizes (None: any number) last.
        instances: instances(*key) -> the configurations that were compiled, where a kernel has no others.
        configuration: a NamedTuple class. On Triton every field is a power of two, save `counts`, which are any number
            from 1 up; elsewhere all are any number from 1 up. `optional` ones may be None.
    """

    def __init__(
        self,
        operator: str,
        key: dict[str, tuple | None],
        configuration: type,
        *,
        backend: str = "triton",
        instances: Callable[..., Iterable] | None = None,
        counts: tuple[str, ...] = ("num_stages",),
        optional: tuple[str, ...] = (),
        path: Path | None = None,
    ):
        self.operator, self.backend, self.key, self.configuration = operator, backend, key, configuration
        self._sizes = sum(values is None for values in key.values())
        self.instances, self._counts, self._optional = instances, counts, optional
        # In a file they are in lower case; where they are handed to a kernel as they are, they are BLOCK_M.
        self._names = tuple(name.lower() for name in configuration._fields)
        self.path = path or files.shipped(operator, backend.replace(":", "_"))
        self.entries: list[Entry] = []
        # index of a GPU, or None for a CPU -> the key without its sizes -> (sizes, configuration), the least first
        self._steps: dict[int | None, dict[tuple, tuple[tuple[tuple, Any], ...]]] = {}
        self.read_again()
        TABLES[operator, backend] = self

    def read_again(self) -> None:
        """Reads the file, at the beginning and after it was written."""
        self.entries = self._entries(files.read(self.path))
        self._steps.clear()

    def find(self, device: torch.device, size: float | tuple[float, ...], *key) -> Any:
        """The configuration for a call: of the rows none of whose sizes is below the call's, the least.

        Args:
            size: one number, or one for each of the key's sizes.
        """
        steps = self._steps.get(device.index)
        if steps is None:
            steps = self._steps[device.index] = stepped(self.in_force(device), self._sizes)
        sizes = size if type(size) is tuple else (size,)
        for most, configuration in steps[key]:
            if all(map(le, sizes, most)):
                return configuration
        raise LookupError(f"{self.path} has no row of {key} for {size}")

    def in_force(self, device: torch.device) -> dict[tuple, Row]:
        """key -> row, for a device: the user's measurements, then gptkern's own on this device, then the defaults."""
        found = user.identify(device)
        if found is None:
            rows = self.defaults(self._architecture(device))
        else:
            rows = self.defaults(found.architecture)
            for entry in self.measured(found):
                rows |= entry.rows
            rows |= self._users(found)
        rows |= {
            key: Row(configuration, "overridden in this process", {})
            for (*table, key), configuration in _overrides.items()
            if table == [self.operator, self.backend]
        }
        return rows

    def defaults(self, architecture: int) -> dict[tuple, Row]:
        """key -> row of an architecture where nothing was measured."""
        entries = {entry.architecture: entry.rows for entry in self.entries if entry.device is None}
        rows: dict[tuple, Row] = {}
        for served in reversed(descent(architecture, tuple(entries))):
            rows |= entries[served]
        return rows

    def measured(self, device: user.Device | None = None) -> list[Entry]:
        """The entries that were measured, on any device or on this one."""
        return [
            entry
            for entry in self.entries
            if entry.device is not None and device in (None, user.Device(entry.device, entry.architecture))
        ]

    def shipped(self, architecture: int) -> list[tuple[str, dict[tuple, Row]]]:
        """(how it is called, rows) of all that ships for an architecture, each configuration of a key once.

        The first is the default, called ""; then come the rows that were measured on its devices.
        """
        everything = [("", self.defaults(architecture))]
        for entry in self.measured():
            if entry.architecture == architecture:
                known = [rows for _, rows in everything]
                new = {
                    key: row
                    for key, row in entry.rows.items()
                    if all(key not in rows or rows[key].configuration != row.configuration for rows in known)
                }
                everything.append((f" ({entry.device})", new))
        return everything

    def row(self, key: tuple, configuration: Any, measured: dict[str, Any]) -> dict[str, Any]:
        """The row as a file has it."""
        return dict(zip(self.key, key)) | dict(zip(self._names, configuration)) | measured

    def _users(self, device: user.Device) -> dict[tuple, Row]:
        file = user.read(device)
        part = f"{self.operator}, {self.backend}"
        listed = (file.content or {}).get("configurations", {}).get(part)
        if not listed:
            return {}
        try:
            source = f"measured by you on {file.content['date']}"
            rows = self._rows(f"{file.path}: configurations.{part}", listed, source)
            self._known_only(str(file.path), rows, self.defaults(device.architecture))
        except files.TableError as error:
            user.warn(file.path, str(error))
            return {}
        return rows

    def _architecture(self, device: torch.device) -> int:
        if device.type != "cuda":
            return INTERPRETED_ARCHITECTURE
        major, minor = torch.cuda.get_device_capability(device)
        return major * 10 + minor

    # Reading

    def _entries(self, content: dict[str, Any]) -> list[Entry]:
        where = str(self.path)
        if content.get("operator") != self.operator:
            raise files.TableError(f"{where}: operator is {content.get('operator')!r}; it needs {self.operator!r}")
        entries = []
        listed = files.wanted(where, "entries", content.get("entries"), list, "a list")
        for index, entry in enumerate(listed):
            place = f"{where}: entries[{index}]"
            files.wanted(place, "the entry", entry, dict, "an object")
            architecture = files.wanted(place, "architecture", entry.get("architecture"), int, "a number, as 90")
            source = files.wanted(place, "source", entry.get("source"), str, "a sentence")
            device = entry.get("device")
            if device is not None:
                files.wanted(place, "device", device, str, "a GPU's name")
                date = files.wanted(place, "date", entry.get("date"), str, "the day of the measurement")
                files.wanted(place, "versions", entry.get("versions"), dict, "an object of versions by package")
                source = f"{source} on {device}, {date}"
            rows = self._rows(place, files.wanted(place, "rows", entry.get("rows"), list, "a list"), source)
            if any(known[:2] == (architecture, device) for known in entries):
                raise files.TableError(f"{place}: a second entry for {device or 'the default of'} sm_{architecture}")
            entries.append(Entry(architecture, device, source, rows))
        defaults = [entry for entry in entries if entry.device is None]
        if not defaults:
            raise files.TableError(f"{where}: entries has no default; it needs an entry without a device")
        lowest = min(defaults, key=lambda entry: entry.architecture)
        for entry in entries:
            self._known_only(where, entry.rows, lowest.rows)
        return entries

    def _rows(self, where: str, listed: list, source: str) -> dict[tuple, Row]:
        """The rows, checked: the parts of the key first, then the configuration; what else there is, is kept."""
        rows: dict[tuple, Row] = {}
        names = self._names
        for index, row in enumerate(listed):
            place = f"{where}.rows[{index}]"
            files.wanted(place, "the row", row, dict, "an object")
            for name in (*self.key, *names):
                if name not in row:
                    raise files.TableError(f"{place}: {name} is missing; it needs {', '.join((*self.key, *names))}")
            for name, values in self.key.items():
                if values is not None and row[name] not in values:
                    needs = ", ".join(map(repr, values))
                    raise files.TableError(f"{place}: {name} is {row[name]!r}; it needs one of {needs}")
                if values is None and row[name] is not None:
                    files.wanted(place, name, row[name], int, "a number, or null for any")
            for name in names:
                self._check_number(place, name, row[name])
            key = tuple(row[name] for name in self.key)
            if key in rows:
                raise files.TableError(f"{place}: a second row of {described(self.key, key)}")
            configuration = self.configuration(*(row[name] for name in names))
            rest = {name: value for name, value in row.items() if name not in self.key and name not in names}
            rows[key] = Row(configuration, source, rest)
        return rows

    def _check_number(self, place: str, name: str, value: Any) -> None:
        if value is None and name in self._optional:
            return
        any_number = name in self._counts or not self.backend.startswith("triton")
        needs = "a number from 1 up" if any_number else "a power of two"
        files.wanted(place, name, value, int, needs)
        if value < 1 or (not any_number and value & (value - 1)):
            raise files.TableError(f"{place}: {name} is {value!r}; it needs {needs}")

    def _known_only(self, where: str, rows: dict[tuple, Row], known: dict[tuple, Row]) -> None:
        """A row that no default has would change which sizes the others serve."""
        for key in rows:
            if key not in known:
                raise files.TableError(f"{where}: a row of {described(self.key, key)}, which no default has")


def described(names: Any, key: tuple) -> str:
    """ "forward, bits 16, head_dim 128": a row's key in words."""
    return ", ".join(
        value if isinstance(value, str) else f"any larger {name}" if value is None else f"{name} {value}"
        for name, value in zip(names, key)
    )


def descent(architecture: int, known: tuple[int, ...]) -> list[int]:
    """The architectures of `known` whose tables serve one, the nearest first: itself, then those below.

    One below all of them takes the lowest.
    """
    below = BIG_SHARED_MEMORY if architecture >= WORKSTATIONS else architecture
    found = sorted((other for other in known if other == architecture or other < below), reverse=True)
    return found or [min(known)]


def stepped(rows: dict[tuple, Row], sizes: int = 1) -> dict[tuple, tuple[tuple[tuple, Any], ...]]:
    """The key without its sizes -> (sizes, configuration), the least first; any size is infinity."""
    steps: dict[tuple, list] = {}
    for key, row in rows.items():
        most = tuple(math.inf if size is None else size for size in key[len(key) - sizes :])
        steps.setdefault(key[: len(key) - sizes], []).append((most, row.configuration))
    return {key: tuple(sorted(listed, key=lambda step: step[0])) for key, listed in steps.items()}


@contextlib.contextmanager
def override(operator: str, key: tuple, configuration: Any, backend: str = "triton"):
    """Inside the `with` block, in every thread, the row of this key has this configuration: for tuning and tests."""
    table, place = TABLES[operator, backend], (operator, backend, key)
    if key not in table.defaults(INTERPRETED_ARCHITECTURE):
        raise LookupError(f"{operator} has no row of {described(table.key, key)} on {backend}")
    before = _overrides.get(place)
    _overrides[place] = configuration
    table._steps.clear()
    try:
        yield
    finally:
        if before is None:
            del _overrides[place]
        else:
            _overrides[place] = before
        table._steps.clear()


def has_table(operator: str, backend: str) -> bool:
    """Whether the operator's kernels on a backend have a table; nothing is imported."""
    return files.shipped(operator, backend.replace(":", "_")).is_file()


def forget() -> None:
    """What is in force is found anew at the next call: after a user's file was written."""
    user.forget()
    for table in TABLES.values():
        table._steps.clear()
