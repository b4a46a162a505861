"""Files that a folder from a stranger names, and folders that are on the disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from gptkern.formatting import shown
from gptkern.training.errors import UserError, reason


def open_plain(folder: Path, name: str) -> BinaryIO:
    """A file of a folder to read: a regular one that lies in it.

    Raises:
        UserError: the name leads elsewhere, or the file is a link, a device or a pipe, or cannot be opened.
    """
    if not is_plain(name):
        raise UserError(f"{shown(str(name))} is no file of the folder; it needs a name without a folder")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    path = folder / name
    try:
        # Where O_NOFOLLOW does not exist.
        if path.is_symlink():
            raise UserError(f"{shown(name)} is a link; it needs a file of the folder itself")
        descriptor = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{shown(name)} is no regular file")
        return open(descriptor, "rb", buffering=0)
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(name)}: {reason(error)}") from error


def is_plain(name: Any) -> bool:
    """Whether it is the name of a file in a folder, which leads nowhere else, on any system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0") and len(name) < 256


def sync_folder(folder: Path) -> None:
    """What was renamed in it is on the disk; where a system cannot open folders it needs no such thing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
