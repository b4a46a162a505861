"""A checkpoint's folder, before a command writes to it; what is read and written is in gptkern.training.model_files."""

from __future__ import annotations

from pathlib import Path

from gptkern.commands import places
from gptkern.training.model_files import CONFIG, PARAMETERS, held, load, save

__all__ = ["CONFIG", "PARAMETERS", "check_writable", "held", "load", "save"]


def check_writable(option: str, folder: Path) -> None:
    """Raises UserError where a part of a checkpoint that is in the folder cannot be replaced."""
    for name in (CONFIG, PARAMETERS):
        if folder.is_dir():
            places.file(option, str(folder / name))
