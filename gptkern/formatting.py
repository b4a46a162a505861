"""Numbers and tables as people read them, in reports and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What stands where nothing is known.
NONE = "–"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. A heading that starts with > is of numbers, flushed right."""
    lines = ["| " + " | ".join(heading.removeprefix(">") for heading in headings) + " |"]
    lines.append("|" + "|".join("---:" if heading.startswith(">") else "---" for heading in headings) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal: aligned text."""
    rows = [[heading.removeprefix(">") for heading in headings], *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = [str.rjust if heading.startswith(">") else str.ljust for heading in headings]
    return "\n".join("  ".join(map(lambda to, *cell: to(*cell), aligned, row, widths)).rstrip() for row in rows)


def escaped(value: Any) -> str:
    """Words for a cell of a Markdown table."""
    words = " ".join(str(value).split())
    for letter, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("_", "\\_"), ("`", "'")):
        words = words.replace(letter, shown)
    return words


LONGEST_SHOWN = 80  # characters of a value that an error repeats


def shown(value: str) -> str:
    """A value as an error repeats it: on one line, and not all of it where it is long."""
    part = cut(value)
    return part if part.isprintable() and part.split() == [part] else repr(part)


def cut(value: str) -> str:
    """The value, or both of its ends where it is long: of a path the last name says the most."""
    half = LONGEST_SHOWN // 2
    return value if len(value) <= LONGEST_SHOWN else f"{value[: half - 1]}…{value[-half:]}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def times(ratio: float | None) -> str:
    """1.15 -> "1.15×"; below 0.1 as a fraction of two digits: 0.00007 -> "1/14000"."""
    if ratio is None:
        return NONE
    return f"1/{float(f'{1 / ratio:.2g}'):.0f}" if 0 < ratio < 0.1 else f"{ratio:.2f}×"


def percent(share: float | None) -> str:
    if share is None:
        return NONE
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def seconds(value: float | None) -> str:
    return _scaled(value, "s", ((1, ""), (1e-3, "m"), (1e-6, "µ")))


def size(value: float | None) -> str:
    """Of so many bytes."""
    return _scaled(value, "B", ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")))


def rate(value: float | None, unit: str | None) -> str:
    """A rate in "B/s", "FLOP/s", "OP/s" or "tokens/s"."""
    if value is None or unit is None:
        return NONE
    if unit == "tokens/s":
        return f"{three(value)} {unit}"
    # Memory is compared in GB/s, whatever the size.
    return _scaled(value, unit, ((1e9, "G"),) if unit == "B/s" else ((1e12, "T"), (1e9, "G")))


def _scaled(value: float | None, unit: str, scales: Sequence[tuple[float, str]]) -> str:
    if value is None:
        return NONE
    scale, prefix = next((pair for pair in scales if value >= pair[0]), scales[-1])
    return f"{three(value / scale) if scale != 1 or unit != 'B' else f'{value:.0f}'} {prefix}{unit}"
