"""The file of a user who ran `gptkern tune`: what was measured on one device, with one set of versions.

    <folder>/tables/<device>-sm_<architecture>.json
    {"format": 2, "device": …, "architecture": …, "versions": {…}, "date": …,
     "configurations": {"<operator>, <backend>": rows}, "backends": {operator: rows}}

The folder is GPTKERN_CACHE, else the system's place for caches. The rows are those of the shipped files. A file of
other versions is ignored: another compiler may spill where this one did not. So is one that cannot be read, with one
warning; a training run never ends because of it.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptkern.backends.tables import files
from gptkern.version import __version__

FORMAT = 2


class Device(NamedTuple):
    """What a measurement holds for: a GPU's name and its compute capability, as 90 for 9.0."""

    name: str
    architecture: int


class File(NamedTuple):
    """A device's file.

    Args:
        content: what it holds; None where there is no file, or where it is ignored.
        ignored: why it is ignored, or None.
    """

    path: Path | None
    content: dict[str, Any] | None
    ignored: str | None = None


def identify(device: torch.device) -> Device | None:
    """The GPU, or None for what is no GPU, and for one that PyTorch can tell nothing about (a simulated one)."""
    if device.type != "cuda":
        return None
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return Device(torch.cuda.get_device_name(device), major * 10 + minor)
    except (AssertionError, RuntimeError):
        return None


def versions() -> dict[str, str | None]:
    """What a measurement is repeated for when it changes."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "gptkern": __version__,
        "torch": str(torch.__version__),
        "triton": None if triton is None else triton.__version__,
    }


def folder() -> Path | None:
    """Where gptkern keeps files of the user's, or None where the system names no place."""
    for variable, *below in (("GPTKERN_CACHE",), ("XDG_CACHE_HOME", "gptkern"), ("LOCALAPPDATA", "gptkern", "cache")):
        if os.environ.get(variable) and (variable != "LOCALAPPDATA" or sys.platform == "win32"):
            return Path(os.environ[variable], *below)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home.joinpath("Library", "Caches", "gptkern") if sys.platform == "darwin" else home / ".cache" / "gptkern"


def path(device: Device) -> Path | None:
    """The device's file, whether it is there or not."""
    place = folder()
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return None if place is None else place / "tables" / f"{slug}-sm_{device.architecture}.json"


def written() -> list[Path]:
    """The files of all devices."""
    place = folder()
    return [] if place is None else sorted((place / "tables").glob("*-sm_*.json"))


# What was read, and what was warned of, in this process.
_read: dict[Device, File] = {}
_warned: set[Path] = set()


def read(device: Device) -> File:
    """The device's file; read once a process."""
    if device not in _read:
        where = path(device)
        try:
            _read[device] = File(where, None) if where is None or not where.exists() else _checked(where, device)
        except (files.TableError, OSError) as error:
            _read[device] = File(where, None, str(error))
            warn(where, str(error))
    return _read[device]


def _checked(where: Path, device: Device) -> File:
    content = files.read(where)
    with files.reading(where):
        here = {"format": FORMAT, "device": device.name, "architecture": device.architecture} | versions()
        made_for = content | (content.get("versions") or {})
        differs = [
            f"{name} {made_for.get(name)} (here: {here[name]})" for name in here if made_for.get(name) != here[name]
        ]
    return File(where, None, f"it was made for {', '.join(differs)}") if differs else File(where, content)


def rows(device: Device, part: str, table: str, made: Callable[[str, list, str], dict]) -> dict:
    """What `made(where, rows, date)` makes of a table's rows in the device's file; where they are wrong, a warning."""
    file = read(device)
    try:
        with files.reading(file.path):
            listed = file.content[part].get(table) if file.content else None
            return made(f"{file.path}: {part}.{table}", listed, file.content["date"]) if listed else {}
    except files.TableError as error:
        warn(file.path, str(error))
        return {}


def warn(where: Path | None, reason: str) -> None:
    """Says once that a user's file is ignored."""
    if where not in _warned:
        _warned.add(where)
        warnings.warn(
            f"gptkern: {where} is ignored, and gptkern's own tables are used ({reason}); `gptkern tune` writes it anew",
            stacklevel=2,
        )


def put(device: Device, part: str, table: str, row: dict[str, Any], key: tuple[str, ...], date: str) -> None:
    """Adds a row to the device's file, or replaces the one of the same key; a file of other versions is begun anew.

    Args:
        part: "configurations", whose tables are "<operator>, <backend>", or "backends", whose are operators.

    Raises:
        OSError: it cannot be written, or the system names no place for it.
    """
    where = path(device)
    if where is None:
        raise OSError("this system names no folder for caches: set GPTKERN_CACHE")
    with files.locked(where):
        try:
            content = _checked(where, device).content if where.exists() else None
        except files.TableError:
            content = None
        if content is None:
            content = {"format": FORMAT, "device": device.name, "architecture": device.architecture}
            content |= {"versions": versions(), "date": date, "configurations": {}, "backends": {}}
        content["date"] = date
        replace_row(content[part].setdefault(table, []), row, key)
        files.write(where, content)
    _read.pop(device, None)


def replace_row(rows: list[dict[str, Any]], row: dict[str, Any], key: tuple[str, ...]) -> None:
    """Puts the row in the place of the one of the same key, or at the end."""
    for index, other in enumerate(rows):
        if all(other.get(name) == row[name] for name in key):
            rows[index] = row
            return
    rows.append(row)


def forget() -> None:
    """Files are read again."""
    _read.clear()
    _warned.clear()
