"""What a value may be: one check and one set of words, for options of the command line and for keys of a recipe file.

`checked(value)` takes what a file holds, `parsed(text)` what a command line does. Both raise ValueError with what goes
on from a name: "is nan; it needs a finite number above 0".
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptkern.formatting import shown

LARGEST = 2**63 - 1  # what a size of a tensor can be


class Whole(NamedTuple):
    """A whole number from `least` to `most`; what `hint` says ends the error."""

    least: int
    most: int = LARGEST
    hint: str = ""

    def checked(self, value: Any) -> int:
        return self._within(value if isinstance(value, int) and not isinstance(value, bool) else None, _shown(value))

    def parsed(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        return self._within(number, shown(text))

    def _within(self, number: int | None, given: str) -> int:
        if number is None or not self.least <= number <= self.most:
            unlimited = self.most == LARGEST and (number is None or number < self.least)
            limits = f"of at least {self.least}" if unlimited else f"from {self.least} to {self.most}"
            raise ValueError(f"is {given}; it needs a whole number {limits}{self.hint}")
        return number


class Real(NamedTuple):
    """A number, not infinite, for which `allowed` holds; `needs` says in words which these are."""

    needs: str
    allowed: Callable[[float], bool]

    def checked(self, value: Any) -> float:
        return self._within(value if not isinstance(value, (bool, str)) else None, _shown(value))

    def parsed(self, text: str) -> float:
        return self._within(text, shown(text))

    def _within(self, value: Any, given: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not (math.isfinite(number) and self.allowed(number)):
            raise ValueError(f"is {given}; it needs a finite number {self.needs}")
        return number


class Choice(NamedTuple):
    """One of some words; `other` are further names of them."""

    words: tuple[str, ...]
    other: Mapping[str, str] = {}

    def checked(self, value: Any) -> str:
        return self._one(value, _shown(value))

    def parsed(self, text: str) -> str:
        return self._one(text, shown(text))

    def _one(self, value: Any, given: str) -> str:
        word = self.other.get(value, value) if isinstance(value, str) else value
        if not isinstance(word, str) or word not in self.words:
            raise ValueError(f"is {given}; it needs one of {', '.join(self.words)}")
        return word


class WordOrWhole(NamedTuple):
    """One of some words, or a whole number of at least 1, which is kept as text."""

    words: tuple[str, ...]

    def checked(self, value: Any) -> str:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST:
            return str(value)
        return self._one(value, _shown(value))

    def parsed(self, text: str) -> str:
        return self._one(text, shown(text))

    def _one(self, value: Any, given: str) -> str:
        if value in self.words:
            return value
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return str(Whole(1).parsed(value))
        raise ValueError(f"is {given}; it needs {', '.join(self.words)} or a whole number of at least 1")


class Text(NamedTuple):
    """Any text; what it names is looked at elsewhere. `metavar` stands for it in a command's help."""

    needs: str = "text"
    metavar: str = "TEXT"

    def checked(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"is {_shown(value)}; it needs {self.needs}, in quotes")
        return value

    def parsed(self, text: str) -> str:
        return text


class Switch(NamedTuple):
    """true or false."""

    def checked(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"is {_shown(value)}; it needs true or false")
        return value


Kind = Whole | Real | Choice | WordOrWhole | Text | Switch


def _shown(value: Any) -> str:
    """As it stands in a file: text in quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # Python refuses to write the largest out.
        return shown(str(value)) if abs(value) < 10**100 else "a number of more than 100 digits"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    return shown(repr(value) if isinstance(value, str) else str(value))
