"""What goes wrong with what a user gave, and with a run that began: the command line shows each as one line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """What a user has to mend: an option, a recipe, a file. Exit status 2, before any work."""


class RunError(Exception):
    """A run that began and could not be brought to its end. Exit status 1."""


@contextlib.contextmanager
def kept(path: Path, stays: str = "") -> Iterator[None]:
    """An OSError inside the block, where `path` is written, becomes a RunError, which says what `stays`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {reason(error)}" + (stays and f"; {stays}")) from error


def reason(error: Exception) -> str:
    """The system's words for what went wrong with a file; safetensors has but the number, within a text."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        return os.strerror(int(number[1]))
    return getattr(error, "strerror", None) or str(error)
