"""SwapReport: what `gptkern.swap` replaced and what it left alone, as data and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Replaced(NamedTuple):
    """A module that runs on gptkern's operators."""

    name: str  # its path in the model
    original: str  # its class before
    replacement: str  # what it is now
    operator: str  # the operators, comma-separated
    # What would run each of them on the device on which the model was, comma-separated; `explain(model, *inputs)` says
    # it of a call.
    backend: str = ""
    reason: str = ""


class Skipped(NamedTuple):
    """A module that an operator might have served and that was left alone."""

    name: str
    original: str
    reason: str


class SwapReport:
    """What `swap` did; `print(report)` shows it as a table, modules of one kind in one row.

    Attributes:
        replaced: the modules that were replaced, by this call or an earlier one.
        skipped: the modules that were left alone although one of the operators asked for computes what they do.
    """

    def __init__(self, replaced: list[Replaced], skipped: list[Skipped]):
        self.replaced = replaced
        self.skipped = skipped

    def __repr__(self) -> str:
        return f"SwapReport({len(self.replaced)} replaced, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        lines = [f"{_count(len(self.replaced), 'module')} replaced, {len({s.name for s in self.skipped})} skipped"]
        if self.replaced:
            rows = [
                (str(len(names)), original, operator, replacement, backend, where(names))
                for (original, operator, replacement, backend), names in grouped(
                    (r.name, (r.original, r.operator, r.replacement, r.backend)) for r in self.replaced
                ).items()
            ]
            lines += ["", *table(("replaced", "module", "operator", "became", "runs on", "where"), rows)]
            why = {(r.backend, r.reason) for r in self.replaced if r.reason}
            lines += ["", *(f"{backend}: {reason}" for backend, reason in sorted(why))] if why else []
        if self.skipped:
            rows = [
                (str(len(names)), original, reason, where(names))
                for (original, reason), names in grouped((s.name, (s.original, s.reason)) for s in self.skipped).items()
            ]
            lines += ["", *table(("skipped", "module", "reason", "where"), rows)]
        return "\n".join(lines)


class Restored(NamedTuple):
    """A module that is again what it was before a swap."""

    name: str
    original: str  # its class


class UnswapReport:
    """What `unswap` did; `print(report)` shows it as a table.

    Attributes:
        restored: the modules that have their own class or config again.
    """

    def __init__(self, restored: list[Restored]):
        self.restored = restored

    def __repr__(self) -> str:
        return f"UnswapReport({len(self.restored)} restored)"

    def __str__(self) -> str:
        lines = [f"{_count(len(self.restored), 'module')} restored"]
        if self.restored:
            rows = [
                (str(len(names)), original, where(names))
                for (original,), names in grouped((r.name, (r.original,)) for r in self.restored).items()
            ]
            lines += ["", *table(("restored", "module", "where"), rows)]
        return "\n".join(lines)


def where(names: Iterable[str]) -> str:
    """The modules' paths in short: h.0.ln_1, h.1.ln_1 and h.2.ln_1 are "h.{0-2}.ln_1"."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"(?<![^.])\d+(?![^.])", name)
        shape = name if found is None else f"{name[: found.start()]}{{}}{name[found.end() :]}"
        numbers.setdefault(shape, []).extend([] if found is None else [int(found.group())])
    return ", ".join(shape.replace("{}", _ranges(known), 1) if known else shape for shape, known in numbers.items())


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; a single number as it is."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) + "}"


def grouped(entries: Iterable[tuple[str, tuple]]) -> dict[tuple, list[str]]:
    """(name, what it has in common with others) -> that, with all names."""
    groups: dict[tuple, list[str]] = {}
    for name, key in entries:
        groups.setdefault(key, []).append(name)
    return groups


def table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
