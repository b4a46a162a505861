"""The files' layout: JSON of which a person reads a row as a line, and errors that name the file and the place."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not told apart
    fcntl = None

PACKAGE = Path(__file__).resolve().parents[2]
# A list or an object is written on one line where it fits into so many characters.
LINE = 160


class TableError(ValueError):
    """A file of tables is not as it has to be; the message names the file and the place in it."""


def shipped(operator: str, name: str) -> Path:
    """A file of an operator's room: the tiles of a backend ("triton"), or "backends"."""
    return PACKAGE / "operators" / operator / f"{name}.json"


@contextlib.contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """What a file lacks, or has of another type than it needs to, is a TableError that names the file."""
    try:
        yield
    except TableError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TableError(f"{path}: {type(error).__name__}: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """The object that a file holds. Raises OSError where it cannot be read, TableError where it is no JSON."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: dict[str, Any]) -> None:
    replace(path, text(content))


def replace(path: Path, text: str, sync: bool = False) -> None:
    """Writes the file in one step: a reader sees the old text or the new, and so does a crash; synced, a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        # mkstemp lets nobody else read the file.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Keeps other processes out of a file that is read, changed and written: two that do so at once lose nothing.

    Raises:
        BlockingIOError: another process is there, and this one does not wait. OSError: the lock cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        # Not removed afterwards: who waits for the file that was there would not see who opens a new one.
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def text(content: Any) -> str:
    """JSON of which each row is a line."""
    return f"{_text(content, 0)}\n"


def _text(value: Any, depth: int) -> str:
    line = json.dumps(value, ensure_ascii=False)
    # The indentation takes its part of the line.
    if not isinstance(value, (dict, list)) or (not _holds_rows(value) and len(line) + depth <= LINE):
        return line
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(key)}: {_text(item, depth + 1)}" for key, item in value.items()]
    else:
        lines = [pad + _text(item, depth + 1) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(lines), " " * depth + closing])


def _holds_rows(value: Any) -> bool:
    """Whether it is a list of objects, or has one inside: that is never squeezed into a line."""
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, list) and any(isinstance(item, dict) for item in items):
        return True
    return any(isinstance(item, (dict, list)) and _holds_rows(item) for item in items)
