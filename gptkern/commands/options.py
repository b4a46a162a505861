"""Options that several commands have, and what their values mean.

The types refuse while the options are read, before any work. Their errors go on from the option's name: "--lr" and
"is nan; it needs a finite number above 0".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from gptkern.training import recipe_files, values
from gptkern.training.presets import configured as configured
from gptkern.training.recipe_files import PRESETS as PRESETS

if TYPE_CHECKING:
    import torch

# The keys of stages.PRECISIONS once more: that module imports PyTorch, and `--help` does not wait for it. A test holds
# the two together.
DTYPES = ("float32", "bfloat16")


def typed(kind: values.Kind) -> Callable[[str], Any]:
    """What argparse takes for a type."""

    def parse(text: str) -> Any:
        try:
            return kind.parsed(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def whole(least: int, most: int = values.LARGEST, hint: str = "") -> Callable[[str], int]:
    return typed(values.Whole(least, most, hint))


def real(needs: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    return typed(values.Real(needs, allowed))


positive = whole(1)
above_zero = real("above 0", lambda number: number > 0)
# Longer than any run, and within what a system's clocks can wait for.
MOST_SECONDS = 1e9
duration = real(f"from 0 to {MOST_SECONDS:g}", lambda number: 0 <= number <= MOST_SECONDS)
some_duration = real(f"above 0 and up to {MOST_SECONDS:g}", lambda number: 0 < number <= MOST_SECONDS)
probability = real("of at least 0 and below 1", lambda number: 0 <= number < 1)
# What PyTorch's generators take.
seed = whole(-(2**63), 2**64 - 1)


def add_recipe_arguments(
    parser: argparse.ArgumentParser, without: Collection[str] = (), defaults: Mapping[str, Any] = {}
) -> None:
    """An option for each key of a recipe; None where it is not given, so that a recipe's file can say it.

    Args:
        without: keys that have none. defaults: of the command, in place of the keys' own; shown alone.
    """
    for key in recipe_files.KEYS.values():
        if key.name in without:
            continue
        words, default = key.words, defaults.get(key.name, key.default)
        if key.name in defaults:
            words = words.partition(" (default")[0]
        if default is not None and "default:" not in words and not isinstance(key.kind, values.Switch):
            words += f" (default: {default})"
        if isinstance(key.kind, values.Switch):
            parser.add_argument(key.option, action=argparse.BooleanOptionalAction, help=words)
        elif key.name == "preset":
            parser.add_argument(key.option, choices=PRESETS, metavar="NAME", help=words)
        else:
            # `--dtype`, as the other commands call it, with their names of it.
            names = (key.option, "--dtype") if key.name == "precision" else (key.option,)
            parser.add_argument(*names, type=typed(key.kind), metavar=key.metavar, help=words)


def add_machine_arguments(
    parser: argparse.ArgumentParser, seed_of: str = "of the first weights, the batches and the samples"
) -> None:
    """The options that every command has that runs a model."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of matrix products; auto is bfloat16 on a GPU and float32 elsewhere",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help=seed_of)


def resolved_dtype(name: str, device: torch.device) -> str:
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return name
