"""What a search varies: keys of a recipe, and the values that each of them may take.

In TOML a list names values and a table a range; on the command line they are `8,16,32`, and `low:high`, followed by
`:log` or, of whole numbers, by a step:

    batch = [8, 16, 32]                                     --vary batch=8,16,32
    lr = { low = 1e-4, high = 1e-2, log = true }            --vary lr=1e-4:1e-2:log
    width = { low = 64, high = 256, step = 64 }             --vary width=64:256:64
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.errors import UserError
from gptkern.training.values import Whole

# The keys that a search may vary; the rest of a recipe is the same in all of its trials.
VARIED = (
    "lr", "batch", "accumulate", "layers", "width", "heads", "dropout", "schedule", "warmup", "decay", "final_lr",
    "weight_decay", "beta1", "beta2", "clip", "label_smoothing", "z_loss",
)  # fmt: skip
MOST_VALUES = 100  # that a list names
_FIELDS = ("low", "high", "log", "step")


class Range(NamedTuple):
    """The numbers from `low` to `high`, both among them.

    Args:
        log: sampled and divided evenly in the logarithm. step: between two whole numbers; None for real ones.
    """

    low: float
    high: float
    log: bool = False
    step: int | None = None

    def sample(self, generator: random.Random) -> float:
        if self.step is None:
            return self._between(generator.random())
        if not self.log:
            return self.low + self.step * generator.randrange(self._count())
        # Half a number more at both ends, so that these are drawn as often as their neighbours.
        low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
        return min(max(round(math.exp(low + generator.random() * (high - low))), self.low), self.high)

    def grid(self, points: int) -> list[float]:
        """At most `points` values, evenly spread, the ends among them; in order."""
        if self.step is not None and not self.log:
            points = min(points, self._count())
        parts = [0.0] if points == 1 else [index / (points - 1) for index in range(points)]
        values = [self._between(part) for part in parts]
        if self.step is None:
            return values
        step = self.step
        return sorted({self.low + step * round((value - self.low) / step) for value in values})

    def _between(self, part: float) -> float:
        if part in (0.0, 1.0):
            return self.high if part else self.low
        if self.log:
            return min(max(self.low * (self.high / self.low) ** part, self.low), self.high)
        return self.low + part * (self.high - self.low)

    def _count(self) -> int:
        return (self.high - self.low) // self.step + 1


class Choices(NamedTuple):
    """Some values."""

    values: tuple[Any, ...]

    def sample(self, generator: random.Random) -> Any:
        return generator.choice(self.values)

    def grid(self, points: int) -> list[Any]:
        return list(self.values)


Parameter = Range | Choices


class Space(NamedTuple):
    """Parameters by the key of a recipe, in the order in which they are sampled."""

    parameters: dict[str, Parameter]

    @classmethod
    def of(cls, content: Mapping[str, Any], name: str) -> Space:
        """What a TOML file or a study holds.

        Raises:
            UserError: begins with `name`.
        """
        return cls({key: _parameter(key, value, name) for key, value in content.items()})

    @classmethod
    def read(cls, path: str | Path, option: str = "--space") -> Space:
        """A TOML file. Raises UserError."""
        return cls.of(recipe_files.toml(str(path), option), f"{option} {shown(str(path))}: ")

    @classmethod
    def parsed(cls, options: Sequence[str], option: str = "--vary") -> Space:
        """Of the command line. Raises UserError."""
        content: dict[str, Any] = {}
        for given in options:
            key, is_one, value = given.partition("=")
            key = key.strip().replace("-", "_")
            if not is_one:
                raise UserError(f"{option} {shown(given)}: it needs KEY=VALUES, as lr=1e-4:1e-2:log or batch=8,16,32")
            if key in content:
                raise UserError(f"{option} {key} is given twice; it needs one set of values")
            content[key] = _split(_known(key, f"{option} "), value, f"{option} {key}")
        return cls.of(content, f"{option} ")

    def described(self) -> dict[str, Any]:
        """As `of` takes it; JSON can hold it."""
        found: dict[str, Any] = {}
        for key, parameter in self.parameters.items():
            if isinstance(parameter, Choices):
                found[key] = list(parameter.values)
            else:
                fields = parameter._asdict()
                found[key] = {name: value for name, value in fields.items() if value not in (None, False)}
                found[key] |= {"low": parameter.low, "high": parameter.high}
        return found

    def sample(self, generator: random.Random) -> dict[str, Any]:
        return {key: parameter.sample(generator) for key, parameter in self.parameters.items()}

    def ends(self, key: str, otherwise: Any) -> list[Any]:
        """The values of a key at which what several keys need together is tried: those of a list, a range's ends, and
        whole numbers between them: all where they are few, else the first.
        """
        parameter = self.parameters.get(key)
        if parameter is None:
            return [otherwise]
        if isinstance(parameter, Choices) or parameter.step is None:
            return parameter.grid(2)
        few = range(parameter.low, parameter.high + 1, parameter.step)
        return list(few) if len(few) <= MOST_VALUES else [few[0], few[1], few[-1]]


class Grid:
    """The product of each parameter's values, the last parameter's first; `len` and `[index]`, never a list of it all.

    Args:
        points: values of a range, at most.
    """

    def __init__(self, space: Space, points: int):
        self.axes = {key: parameter.grid(points) for key, parameter in space.parameters.items()}
        self.size = math.prod(len(axis) for axis in self.axes.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        found = {}
        for key, axis in reversed(self.axes.items()):
            index, place = divmod(index, len(axis))
            found[key] = axis[place]
        return dict(reversed(found.items()))

    def chosen(self, count: int, seed: int) -> list[dict[str, Any]]:
        """All of it in order where it has no more than `count`; else that many different ones, drawn by the seed."""
        if count >= self.size:
            return [self[index] for index in range(self.size)]
        return [self[index] for index in random.Random(f"grid:{seed}").sample(range(self.size), count)]


def default(values: Mapping[str, Any]) -> Space:
    """The space where none is given: the peak learning rate within a factor of ten, the batch and twice it, two
    schedules, dropout or none.

    Args:
        values: every key of the recipe that is varied.
    """
    return Space(
        {
            "lr": Range(values["lr"] / 10, values["lr"] * 10, log=True),
            "batch": Choices((values["batch"], 2 * values["batch"])),
            "schedule": Choices(("cosine", "wsd")),
            "dropout": Choices((0.0, 0.1)),
        }
    )


def _known(key: str, name: str) -> str:
    if key in VARIED:
        return key
    likely = difflib.get_close_matches(key, VARIED, 1)
    more = f"did you mean {likely[0]}?" if likely else f"it needs one of {', '.join(VARIED)}"
    raise UserError(f"{name}{shown(key)} is no key that a search varies; {more}")


def _parameter(key: str, value: Any, name: str) -> Parameter:
    kind = recipe_files.KEYS[_known(key, name)].kind
    needs = "a list of values, or a table with low and high"
    try:
        if isinstance(value, list):
            if not 1 <= len(value) <= MOST_VALUES:
                raise ValueError(f"has {len(value)} values; it needs 1 to {MOST_VALUES}")
            checked = tuple(kind.checked(each) for each in value)
            if len(set(checked)) < len(checked):
                raise ValueError("has a value twice; it needs different ones")
            return Choices(checked)
        if not isinstance(value, dict):
            kind.checked(value)
            raise ValueError(f"is one value; it needs {needs}: what is not varied is an option of its own")
        return _range(kind, value)
    except ValueError as error:
        raise UserError(f"{name}{key} {error}") from None


def _range(kind: Any, value: Mapping[str, Any]) -> Range:
    odd = next((field for field in value if field not in _FIELDS), None)
    if odd is not None:
        raise ValueError(f"has {shown(odd)}; a range has {', '.join(_FIELDS)}")
    if "low" not in value or "high" not in value:
        raise ValueError("needs low and high")
    low, high = kind.checked(value["low"]), kind.checked(value["high"])
    if isinstance(low, str):
        raise ValueError("has words for values; it needs a list of them")
    log, is_whole = value.get("log", False), isinstance(kind, Whole)
    if not isinstance(log, bool):
        raise ValueError("has another log than true or false")
    if not low < high:
        raise ValueError(f"goes from {low!r} to {high!r}; it needs low below high")
    if log and low <= 0:
        raise ValueError(f"begins at {low!r}; with log it needs a low above 0")
    if "step" in value and (log or not is_whole):
        raise ValueError("has a step; only whole numbers without log have one")
    if not is_whole:
        return Range(low, high, log)
    step = Whole(1).checked(value.get("step", 1))
    if (high - low) % step:
        raise ValueError(f"goes from {low} to {high} in steps of {step}; it needs to end after whole steps")
    return Range(low, high, log, step)


def _split(key: str, text: str, name: str) -> Any:
    """What TOML would hold for the text of an option."""
    kind = recipe_files.KEYS[key].kind
    try:
        if ":" not in text:
            return [kind.parsed(each.strip()) for each in text.split(",")]
        low, high, *more = (part.strip() for part in text.split(":"))
        found: dict[str, Any] = {"low": kind.parsed(low), "high": kind.parsed(high)}
        if more == ["log"]:
            return found | {"log": True}
        if len(more) == 1 and isinstance(kind, Whole):
            return found | {"step": Whole(1).parsed(more[0])}
        if more:
            last = "log or a step" if isinstance(kind, Whole) else "log"
            raise ValueError(f"is {shown(text)}; after low:high it needs {last}, or nothing")
        return found
    except ValueError as error:
        raise UserError(f"{name} {error}") from None
