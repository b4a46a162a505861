"""metrics.jsonl: a line of JSON for each update of a run, in their order.

    {"step": 12, "loss": 4.519…, "grad_norm": 1.2…, "lr": 0.0003, "tokens": 2048, "seconds": 1.7, …}

`loss` is the whole update's, in full precision; `validation_loss` stands in the lines of updates after which the
held-out part was evaluated, and `untrained_validation_loss` in the first, for the model before it. `seconds` are those
of training until then, over all parts of a run that was resumed. Steps that somebody took away stay away.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptkern.formatting import shown
from gptkern.training.errors import UserError, kept

# What two runs of the same recipe need not have in common.
TIMES = ("seconds", "tokens_per_second", "share_of_peak")

# Keys whose values are numbers, or null where one was none.
NUMBERS = ("loss", "grad_norm", "lr", "tokens", "scale", "validation_loss", "untrained_validation_loss", *TIMES)

LONGEST_LINE = 1 << 16  # bytes; a line that is longer is none of ours


class Metrics:
    """The file, open to be appended to. `append` writes lines, `sync` sees them onto the disk."""

    def __init__(self, path: Path):
        self.path = path
        with kept(path):
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Raises RunError where the disk takes no more; what was written before stays whole."""
        content = "".join(json.dumps(_finite(line)) + "\n" for line in lines).encode()
        with kept(self.path):
            before = self._file.tell()
            try:
                while content:
                    content = content[self._file.write(content) :]
            except OSError:
                self._file.truncate(before)
                raise

    def sync(self) -> None:
        with kept(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null, and in words under another key."""
    odd = {name: value for name, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**line, **dict.fromkeys(odd), **({"not_finite": {name: str(odd[name]) for name in odd}} if odd else {})}


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines; the last is left out where it is not whole, as after a kill. None of no file.

    Raises:
        UserError: a line is no object whose step is greater than that of the line before, or a value is of
            another type.
    """
    for line, _ in _lines(path):
        yield line


def cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut off what comes after the line of a step, in one move, and return what is left.

    Raises:
        UserError: as `lines`; nothing was cut.
    """
    found, end = _until(path, step)
    with kept(path):
        _unfinished(path).unlink(missing_ok=True)
        if path.exists() and path.stat().st_size > end:
            os.truncate(path, end)
    return found


def check(path: Path, step: int) -> None:
    """Whether the lines until a step can be gone on with. Raises UserError as `lines`."""
    _until(path, step)


def _until(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """The lines until that of a step, and where they end. What comes after it is not looked at."""
    found, end = [], 0
    for line, stop in _lines(path) if step > 0 else ():
        if line["step"] > step:
            break
        found.append(line)
        end = stop
        if line["step"] == step:
            break
    return found, end


def replace_last(path: Path, line: Mapping[str, Any]) -> None:
    """Put a line in the place of the last, in one move: a reader, and a crash, see the old file or the new.

    Raises:
        UserError: as `lines`. RunError: it cannot be written; the file is as it was.
    """
    start = stop = 0
    for _, end in _lines(path):
        start, stop = stop, end
    new = _unfinished(path)
    with kept(path):
        try:
            shutil.copy(path, new)
            with open(new, "r+b") as file:
                file.truncate(start)
                file.seek(start)
                file.write((json.dumps(_finite(line)) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _is_number(value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        # A whole number of JSON may have any number of digits, and json takes NaN.
        return abs(value) < 1e300
    return value is None


def _unfinished(path: Path) -> Path:
    """Where `replace_last` writes; a kill leaves it there."""
    return path.with_name(f".{path.name}.new")


def _lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line, and where in the file it ends."""
    if not path.exists():
        return
    end, before = 0, None
    with open(path, "rb") as file:
        while content := file.readline(LONGEST_LINE):
            if not content.endswith(b"\n") and len(content) < LONGEST_LINE:
                return
            try:
                line = json.loads(content)
                step = line["step"]
                if type(step) is not int or step <= (before or 0):
                    raise ValueError(f"its step is {shown(str(step))}")
                for name in NUMBERS:
                    if not _is_number(line.get(name)):
                        raise ValueError(f"its {name} is {shown(str(line[name]))}, no number")
                if not isinstance(line.get("skipped"), bool | None):
                    raise ValueError(f"its skipped is {shown(str(line['skipped']))}, neither true nor false")
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                after = "" if before is None else f" after that of step {before}"
                raise UserError(
                    f"{path}: the line{after} is no line of an update ({shown(str(error))}); mend it, or take the file "
                    "away: the run goes on without what it says"
                ) from None
            before, end = step, end + len(content)
            yield line, end
