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
        # What launchers keep that follows from the configurations.
        self.kept: dict = {}
        self.read_again()
        TABLES[operator, backend] = self

    def read_again(self) -> None:
        """Reads the file, at the beginning and after it was written."""
        with files.reading(self.path):
            self.entries = self._entries(files.read(self.path))
        self.find_anew()

    def find_anew(self) -> None:
        """Another configuration may be in force."""
        self._steps.clear()
        self.kept.clear()

    def find(self, device: torch.device, size: float | tuple[float, ...], *key) -> Any:
        """The configuration for a call: of the rows none of whose sizes is below the call's, the least.

        Args:
            size: one number, or one for each of the key's sizes.
        """
        steps = self._steps.get(device.index)
        if steps is None:
            steps = self._steps[device.index] = stepped(self.in_force(device), self._sizes)
        if type(size) is not tuple:
            # Asked at every call, so without a generator.
            for (limit,), configuration in steps[key]:
                if size <= limit:
                    return configuration
            raise LookupError(f"{self.path} has no row of {key} for {size}")
        sizes = size
        for most, configuration in steps[key]:
            if all(size <= limit for size, limit in zip(sizes, most, strict=True)):
                return configuration
        raise LookupError(f"{self.path} has no row of {key} for {size}")

    def in_force(self, device: torch.device) -> dict[tuple, Row]:
        """key -> row, for a device: the user's measurements, then gptkern's own on this device, then the defaults."""
        found = user.identify(device)
        rows = self.defaults(found.architecture if found else INTERPRETED_ARCHITECTURE)
        if found:
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
        """(how it is called, rows) of all that ships for an architecture: the default, called "", then its devices'."""
        measured = [entry for entry in self.measured() if entry.architecture == architecture]
        return [("", self.defaults(architecture)), *((f" ({entry.device})", entry.rows) for entry in measured)]

    def row(self, key: tuple, configuration: Any, measured: dict[str, Any]) -> dict[str, Any]:
        """The row as a file has it."""
        return dict(zip(self.key, key)) | dict(zip(self._names, configuration)) | measured

    def _users(self, device: user.Device) -> dict[tuple, Row]:
        def made(where: str, listed: list, date: str) -> dict[tuple, Row]:
            rows = self._rows(where, listed, f"measured by you on {date}", self.defaults(device.architecture))
            for key, row in rows.items():
                # Compiled from other sources: a launch would refuse it.
                if self.instances is not None and row.configuration not in self.instances(*key):
                    raise files.TableError(f"{where}: {row.configuration} is not compiled")
            return rows

        return user.rows(device, "configurations", f"{self.operator}, {self.backend}", made)

    # Reading

    def _entries(self, content: dict[str, Any]) -> list[Entry]:
        found: dict[tuple, Entry] = {}
        # The defaults of the lowest architecture come first: they have every row.
        for entry in sorted(content["entries"], key=lambda entry: (bool(entry.get("device")), entry["architecture"])):
            architecture, device, source = entry["architecture"], entry.get("device"), entry["source"]
            where = f"{self.path}: {device or 'the default of'} sm_{architecture}"
            if (architecture, device) in found or (device and not found):
                raise files.TableError(f"{where}: it needs to be the only entry, beside a default, which has no device")
            if device:
                source = f"{source} on {device}, {entry['date']}"
            known = next(iter(found.values())).rows if found else None
            rows = self._rows(where, entry["rows"], source, known)
            for key in rows if known is None and self._sizes > 1 else ():
                # Of several sizes there is a row of any, for each kernel: a call never falls between two.
                if (widest := (*key[: -self._sizes], *[None] * self._sizes)) not in rows:
                    raise files.TableError(f"{where}: there is no row of {described(self.key, widest)}")
            found[architecture, device] = Entry(architecture, device, source, rows)
        return list(found.values())

    def _rows(self, where: str, listed: list, source: str, known: dict | None = None) -> dict[tuple, Row]:
        """The rows, checked. known: those that there may be: another one would change which sizes the others serve."""
        rows: dict[tuple, Row] = {}
        for row in listed:
            key = tuple(row[name] for name in self.key)
            configuration = self.configuration(*(row[name] for name in self._names))
            for name in (*self.key, *self._names):
                self._check(where, name, row[name])
            if key in rows or (known is not None and key not in known):
                reason = "a second row" if key in rows else "no default has a row"
                raise files.TableError(f"{where}: {reason} of {described(self.key, key)}")
            rest = {name: value for name, value in row.items() if name not in self.key and name not in self._names}
            rows[key] = Row(configuration, source, rest)
        return rows

    def _check(self, where: str, name: str, value: Any) -> None:
        values, number = self.key.get(name), type(value) is int
        if values is not None:
            right, needs = value in values, f"one of {', '.join(map(repr, values))}"
        elif name in self.key:
            right, needs = value is None or (number and value >= 1), "a number from 1 up, or null for any"
        elif name in self._counts or not self.backend.startswith("triton"):
            right, needs = number and value >= 1, "a number from 1 up"
        else:
            right, needs = number and value >= 1 and not value & (value - 1), "a power of two"
        if not right and not (value is None and name in self._optional):
            raise files.TableError(f"{where}: {name} is {value!r}; it needs {needs}")


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
    table.find_anew()
    try:
        yield
    finally:
        if before is None:
            del _overrides[place]
        else:
            _overrides[place] = before
        table.find_anew()


def has_table(operator: str, backend: str) -> bool:
    """Whether the operator's kernels on a backend have a table; nothing is imported."""
    return files.shipped(operator, backend.replace(":", "_")).is_file()


def forget() -> None:
    """What is in force is found anew at the next call: after a user's file was written."""
    user.forget()
    for table in TABLES.values():
        table.find_anew()
