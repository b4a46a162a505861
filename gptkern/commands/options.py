"""Options that several commands have, and what their values mean.

The types refuse while the options are read, before any work. Their errors go on from the option's name: "--lr" and
"is nan; it needs a finite number above 0".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from gptkern.commands import UserError
from gptkern.formatting import shown

if TYPE_CHECKING:
    import torch

    from gptkern.models.gpt import GPTConfig

# The keys of models.gpt.PRESETS and of training.DTYPES once more: those modules import PyTorch, and `--help` does not
# wait for it. A test holds each pair together.
PRESETS = (
    "nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
    "gpt3-125M", "gpt3-350M", "gpt3-760M", "gpt3-1.3B", "gpt3-2.7B", "gpt3-6.7B", "gpt3-13B", "gpt3-175B",
)  # fmt: skip
DTYPES = ("float32", "bfloat16")

LARGEST = 2**63 - 1  # what a size of a tensor can be


def whole(least: int, most: int = LARGEST, hint: str = "") -> Callable[[str], int]:
    """The type of a whole number from `least` to `most`; what `hint` says ends the error."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or not least <= number <= most:
            unlimited = most == LARGEST and (number is None or number < least)
            limits = f"of at least {least}" if unlimited else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"is {shown(value)}; it needs a whole number {limits}{hint}")
        return number

    return parse


def real(needs: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """The type of a number, not infinite, for which `allowed` holds; `needs` says in words which these are."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and allowed(number)):
            raise argparse.ArgumentTypeError(f"is {shown(value)}; it needs a finite number {needs}")
        return number

    return parse


positive = whole(1)
above_zero = real("above 0", lambda number: number > 0)
# Longer than any run, and within what a system's clocks can wait for.
MOST_SECONDS = 1e9
duration = real(f"from 0 to {MOST_SECONDS:g}", lambda number: 0 <= number <= MOST_SECONDS)
some_duration = real(f"above 0 and up to {MOST_SECONDS:g}", lambda number: 0 < number <= MOST_SECONDS)
probability = real("of at least 0 and below 1", lambda number: 0 <= number < 1)
# What PyTorch's generators take.
seed = whole(-(2**63), 2**64 - 1)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command has that runs a model."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of matrix products; auto is bfloat16 on a GPU and float32 elsewhere",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of the first weights, the batches and the samples")


def resolved_dtype(name: str, device: torch.device) -> str:
    if name == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return name


def configured(preset: str, context: int | None = None, dropout: float = 0.0) -> GPTConfig:
    """A preset over bytes.

    Raises:
        UserError: the sizes do not fit together.
    """
    from gptkern.models.gpt import BYTES, GPTConfig

    changes = {"vocab_size": BYTES, "dropout": dropout}
    if context is not None:
        changes["context"] = context
    try:
        return GPTConfig.preset(preset, **changes)
    except ValueError as error:
        raise UserError(str(error)) from error
