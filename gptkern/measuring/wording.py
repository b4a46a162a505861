"""Words and numbers of a results file, as Markdown and the terminal show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A reason in the list of what was not measured is cut here, in letters.
LONGEST_REASON = 240


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a heading that starts with > is of numbers, flushed right."""
    lines = ["| " + " | ".join(heading.removeprefix(">") for heading in headings) + " |"]
    lines.append("|" + "|".join("---:" if heading.startswith(">") else "---" for heading in headings) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def text(value: Any) -> str:
    """Words of a results file, for a cell of a Markdown table."""
    words = " ".join(str(value).split())
    for letter, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("*", "\\*"), ("_", "\\_"), ("`", "'")):
        words = words.replace(letter, shown)
    return words


def cut(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def times(ratio: float) -> str:
    """1.15 -> "1.15×"; below 0.1 as a fraction of two digits: 0.00007 -> "1/14000"."""
    if 0 < ratio < 0.1:
        return f"1/{float(f'{1 / ratio:.2g}'):.0f}"
    return f"{ratio:.2f}×"


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    scale, unit = next((pair for pair in ((1, "s"), (1e-3, "ms")) if value >= pair[0]), (1e-6, "µs"))
    return f"{three(value / scale)} {unit}"


def size(count: float) -> str:
    scale, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= pair[0]), (1, "B"))
    return f"{count:.0f} B" if scale == 1 else f"{three(count / scale)} {unit}"


def quantity(value: float, unit: str | None) -> str:
    if unit == "s":
        return seconds(value)
    return size(value) if unit == "B" else f"{three(value)} {unit or ''}".strip()


def rate(value: float | None, what: str | None) -> str:
    """A rate of what rates.counted says."""
    if value is None or what is None:
        return "–"
    if what == "bytes":
        return f"{three(value / 1e9)} GB/s"
    if what == "tokens":
        return f"{three(value)} tokens/s"
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{three(value / scale)} {prefix}{'OP' if what == 'ops' else 'FLOP'}/s"
