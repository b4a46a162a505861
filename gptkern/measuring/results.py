"""The file that measurements are kept in: FOLDER/results.json.

    {"format": 1, "machine": {...}, "ceilings": {...}, "cells": [...], "costs": [...]}

    machine     measuring.machine.identify(): device, versions, commit, digest of the sources
    ceilings    measuring.ceilings.measure()
    cells       measuring.runner.measure(): a cell, its check, and each implementation's time and memory
    costs       measuring.costs: what is no kernel

A file holds one device and one state of the sources. It is written after every cell, at once as a whole, so that a run
that is cut off loses the cell that it was measuring and no other, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptkern.backends.tables import files
from gptkern.measuring import rates

FORMAT, PARTS = 1, ("machine", "ceilings", "cells", "costs")
NAME = "results.json"
# What has to be the same for one file to hold two measurements.
SAME = (
    "slug", "kind", "source", "gptkern", "torch", "triton", "cuda", "driver", "threads", "peers", "backend", "tables",
)  # fmt: skip
# A smaller measurement does not stand for a larger one.
EXTENTS = ("smoke", "quick", "full")


class ResultsError(Exception):
    """A file is not a results file; the message names it."""


def load(path: str | Path) -> dict[str, Any]:
    """The results in a file, or in the folder that holds it.

    Raises:
        ResultsError: there is no such file, it is no JSON, or it has not the form above.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        form, missing = results.get("format"), [part for part in PARTS if part not in results]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ResultsError(f"{path}: {why}; it needs to be a file that `gptkern bench` wrote") from error
    if form != FORMAT or missing:
        lacks = f"; it has no {', '.join(missing)}" if missing else ""
        raise ResultsError(f"{path}: its format is {form!r}; it needs {FORMAT}, with {', '.join(PARTS)}{lacks}")
    return results


@contextlib.contextmanager
def locked(folder: str | Path):
    """Keeps a second run out of the folder: each writes the whole file, and one would lose the other's cells.

    Raises:
        ResultsError: another run is writing there, or the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(Path(folder, NAME), wait=False))
        except BlockingIOError as error:
            raise ResultsError(f"{folder}: another gptkern bench is writing there") from error
        except OSError as error:
            raise ResultsError(f"{folder} cannot be written: {error.strerror}") from error
        yield


class Recorder:
    """Adds measurements to FOLDER/results.json.

    Results of the same device, versions and sources that are there already are kept and not measured again. Those of
    others are moved aside, to results-<commit>.json, and nothing is lost.
    """

    def __init__(self, folder: str | Path, machine: dict[str, Any]):
        self.path = Path(folder) / NAME
        self.moved: Path | None = None
        self.results = {"format": FORMAT, "machine": machine, "ceilings": {}, "cells": [], "costs": []}
        if self.path.exists():
            before = load(self.path)
            if all(before["machine"].get(name) == machine.get(name) for name in SAME):
                self.results |= {name: before[name] for name in ("ceilings", "cells", "costs")}
            else:
                self.moved = self._set_aside(before["machine"])

    def _set_aside(self, machine: dict[str, Any]) -> Path:
        name = (machine.get("commit") or machine.get("source") or "before")[:12]
        names = (f"results-{name}{f'-{number}' if number > 1 else ''}.json" for number in itertools.count(1))
        target = next(path for path in map(self.path.with_name, names) if not path.exists())
        os.replace(self.path, target)
        return target

    def done(self, key: str, rounds: int, peers: Sequence[str] | None = None) -> bool:
        """Whether the cell has been measured with as many rounds and these peers (None: all), and was right."""

        cell = next((cell for cell in self.results["cells"] if cell["key"] == key), None)
        if cell is None or cell["rounds"] < rounds or not rates.ours(cell):
            return False
        asked = cell.get("peers_asked")
        return asked is None or (peers is not None and set(peers) <= set(asked))

    def has_cost(self, key: str, extent: str) -> bool:
        return any(cost["key"] == key and _reaches(cost, extent) for cost in self.results["costs"])

    def has_ceilings(self, extent: str) -> bool:
        # The sizes of "quick" and "full" are the same.
        extent = min(extent, "quick", key=EXTENTS.index)
        ceilings = self.results["ceilings"].values()
        return bool(ceilings) and all(_reaches(ceiling, extent) for ceiling in ceilings)

    def set_ceilings(self, ceilings: dict[str, dict[str, Any]], extent: str) -> None:
        self.results["ceilings"] = {name: ceiling | {"extent": extent} for name, ceiling in ceilings.items()}
        self._save()

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Puts one of the "cells" or "costs" in the place of that of the same key, else at the end."""
        self.results[kind] = list(
            ({each["key"]: each for each in self.results[kind]} | {record["key"]: record}).values()
        )
        self._save()

    def _save(self) -> None:
        text = json.dumps(self.results, indent=1, ensure_ascii=False, allow_nan=False)
        files.replace(self.path, f"{text}\n")


def _reaches(record: dict[str, Any], extent: str) -> bool:
    return EXTENTS.index(record.get("extent", "full")) >= EXTENTS.index(extent)
