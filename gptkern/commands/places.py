"""Where commands write: tried before any work, and written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptkern import formatting
from gptkern.backends.tables import files
from gptkern.commands import UserError
from gptkern.formatting import shown
from gptkern.training.errors import kept, reason

__all__ = ["file", "folder", "kept", "named", "reason", "room", "write"]


def folder(option: str, value: str) -> Path:
    """The folder that an option names, after a file was written into it and removed. What did not exist does not now.

    Raises:
        UserError: it is a file, its name is too long, or nothing can be written there.
    """
    path = Path(value)
    made: list[Path] = []
    with _refused(option, value, "a folder that can be written"):
        try:
            for each in (*reversed(path.parents), path):
                if not each.is_dir():
                    if os.path.lexists(each):
                        raise NotADirectoryError(0, f"{shown(str(each))} is no folder")
                    each.mkdir()
                    made.append(each)
            tempfile.TemporaryFile(dir=path).close()
        finally:
            for each in reversed(made):
                # Somebody else may have begun to use it.
                with contextlib.suppress(OSError):
                    each.rmdir()
    return path


def named(option: str, value: str, needs: str) -> Path:
    """What an option names, to be read; that it is there is for others to say.

    Raises:
        UserError: nothing can have this name, or it cannot be looked at.
    """
    with _refused(option, value, needs), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.stat(value)
    return Path(value)


def room(option: str, path: Path, size: int) -> None:
    """Raises UserError where the disk that the folder is on, or will be, has not `size` bytes left."""
    free = shutil.disk_usage(next(each for each in (path, *path.parents) if each.is_dir())).free
    if size > free:
        needed, there = formatting.size(size), formatting.size(free)
        raise UserError(f"{option} {shown(str(path))}: it needs {needed} on the disk and there are {there}")


def file(option: str, value: str) -> Path:
    """The file that an option names, after one was written beside it and removed; a device or a pipe as it is.

    Raises:
        UserError: it is a folder, its name is too long, or it cannot be written.
    """
    path = Path(value)
    with _refused(option, value, "a file that can be written"):
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if _is_replaced(path):
            path = _target(path)
            if path.exists():
                open(path, "ab").close()
            # Of the name that `files.replace` will write.
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".new").close()
    return path


def write(path: Path, text: str) -> None:
    """Write the text; a file that is there stays whole until the new one is.

    Raises:
        RunError: it cannot be written, as on a full disk.
    """
    with kept(path, "what was there is as it was" if path.is_file() else ""):
        if _is_replaced(path):
            files.replace(_target(path), text)
        else:
            path.write_text(text, encoding="utf-8")


def _is_replaced(path: Path) -> bool:
    """Whether it is no device and no pipe (/dev/stdout), which are written as they are."""
    return path.is_file() or not path.exists()


def _target(path: Path) -> Path:
    """What a link points to, so that the link stays one."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _refused(option: str, value: str, needs: str) -> Iterator[None]:
    if not value:
        raise UserError(f"{option} is empty; it needs {needs}")
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {shown(value)}: {reason(error)}; it needs {needs}") from error
