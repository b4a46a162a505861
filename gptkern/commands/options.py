"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gptkern.commands import UserError

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


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command has that runs a model."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto",
        help="of matrix products; auto is bfloat16 on a GPU and float32 elsewhere",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the first weights, the batches and the samples")


def positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return number


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
