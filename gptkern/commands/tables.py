"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Sequence

from gptkern import formatting


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows of text; the columns of the headings in `right` (numbers) are flushed right."""
    print(f"{title}\n{formatting.columns([f'>{name}' if name in right else name for name in headings], rows)}")
