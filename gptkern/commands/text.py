"""Text as bytes, as the commands use it: the library's (training/data/text.py), and batches of random windows."""

from __future__ import annotations

import torch

from gptkern.training.data.text import (  # noqa: F401
    BLOCK_BYTES,
    DEFAULT_TEXT,
    HELD_OUT_EVERY,
    Text,
    default_text,
    load,
    printable,
    split,
)


class Batches:
    """Random windows of a text: (ids, targets), each (batch, length), int64; the targets are one byte further on.

    The generator is its own: two trainings with one seed get the same batches whatever their models draw.
    """

    def __init__(self, text: torch.Tensor, batch: int, length: int, seed: int, device: torch.device):
        self.text = text.to(device)
        self.batch, self.length = batch, length
        self.offsets = torch.arange(length + 1, device=device)
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(self.text) - self.length, (self.batch, 1), generator=self.generator)
        # (batch, 1) + (length + 1,) -> (batch, length + 1)
        window = self.text[starts.to(self.text.device) + self.offsets].long()
        return window[:, :-1], window[:, 1:]


def windows(text: torch.Tensor, length: int) -> torch.Tensor:
    """(windows, length + 1), int64: the text in order, each window starting on the last byte of the one before."""
    return text.unfold(0, length + 1, length).long()


def decode(ids: torch.Tensor) -> str:
    """(length,) bytes -> text; what is not UTF-8 shows as the replacement character."""
    return bytes(ids.tolist()).decode("utf-8", errors="replace")


def encode(text: str, device: torch.device) -> torch.Tensor:
    """text -> (1, bytes), int64. What was no text on the command line, and is surrogates in Python, is those bytes.

    Raises:
        UnicodeEncodeError: it has other surrogates, which stand for nothing.
    """
    return torch.tensor([list(text.encode("utf-8", errors="surrogateescape"))], device=device)
