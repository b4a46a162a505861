"""A table on standard output: with rich where it is installed, as aligned plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# Words that a table shows in colour.
_STYLES = {"ok": "green", "yes": "green", "FAILED": "bold red", "no": "yellow", "ahead": "green", "LOST": "bold red"}


def show(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print rows of text.

    Args:
        right: the headings whose columns are flushed right (numbers).
    """
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        _show_plain(title, headings, rows, right)
        return
    # In a file or a pipe lines are not folded to a terminal's width.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(table)


def _show_plain(title, headings, rows, right) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows)]
    print(title)
    for row in (headings, *rows):
        cells = [
            cell.rjust(width) if heading in right else cell.ljust(width)
            for cell, width, heading in zip(row, widths, headings)
        ]
        print("  ".join(cells).rstrip())
