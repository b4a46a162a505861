"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import argparse

import torch

from gptkern.commands import UserError, training
from gptkern.models.gpt import BYTES, GPTConfig


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command has that runs a model."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--dtype", choices=("auto", *training.DTYPES), default="auto",
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
    changes = {"vocab_size": BYTES, "dropout": dropout}
    if context is not None:
        changes["context"] = context
    try:
        return GPTConfig.preset(preset, **changes)
    except ValueError as error:
        raise UserError(str(error)) from error
