"""Text as bytes: the default text, the held-out split, and both as what a training reads."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import torch

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.training import memory
from gptkern.training.data.store import ArrayTokens, Store
from gptkern.training.errors import UserError

# The text is cut into blocks of this many bytes and every tenth one is held out, so that training and validation
# text are of the same kind wherever in the file they come from.
BLOCK_BYTES = 4096
HELD_OUT_EVERY = 10

# A paragraph that comes back word by word would be in both splits; shorter ones (rules, list items) may repeat.
REPEATED_PARAGRAPH_CHARACTERS = 40

# Of the text in memory at once: as it was read, in blocks, joined, and as tensors.
COPIES = 4
PIECE_BYTES = 2**24

DEFAULT_TEXT = "the Python language reference (pydoc_data.topics)"


@dataclasses.dataclass
class Text:
    """A text and its split.

    Args:
        name: where it comes from, for people.
        train, validation: (bytes,), uint8.
    """

    name: str
    train: torch.Tensor
    validation: torch.Tensor


def load(path: str | None = None, shortest: int = 2) -> Text:
    """The text file at `path`, or the text that every Python brings along.

    Args:
        shortest: the fewest bytes that each split may have.

    Raises:
        UserError: there is no such file, or it is too short.
    """
    if path is None:
        name, data = DEFAULT_TEXT, default_text().encode()
    else:
        name, data = printable(Path(path).name), _read(path)
    train, validation = split(data)
    if min(len(train), len(validation)) < shortest:
        raise UserError(
            f"--text {shown(name)} has {len(data)} bytes: {len(train)} to train on and {len(validation)} held out; "
            f"each needs at least {shortest}"
        )
    return Text(name, train, validation)


def _read(path: str) -> bytes:
    if not path:
        raise UserError("--text is empty; it needs a file")
    try:
        found = os.stat(path)
        # What has no end, /dev/zero, would be read until the memory is.
        if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            raise UserError(f"--text {shown(path)}: it is a device; it needs a file")
        free = memory.available(torch.device("cpu"))
        if free is not None and COPIES * found.st_size > free:
            raise UserError(
                f"--text {shown(path)} needs {formatting.size(COPIES * found.st_size)} of memory and there are "
                f"{formatting.size(free)}"
            )
        pieces, length = [], 0
        with open(path, "rb") as file:
            # A pipe has no size, and perhaps no end.
            while piece := file.read(PIECE_BYTES):
                pieces.append(piece)
                length += len(piece)
                if free is not None and COPIES * length > free:
                    raise UserError(
                        f"--text {shown(path)} needs more than the {formatting.size(free)} of memory that there are: "
                        f"{formatting.size(length)} were read of it, and there is more"
                    )
        return b"".join(pieces)
    except (OSError, ValueError) as error:
        raise UserError(f"--text {shown(path)}: {getattr(error, 'strerror', None) or error}") from error


def printable(name: str) -> str:
    """A file's name of which every character can be written; bytes of it that are no text are replaced."""
    return name.encode("utf-8", errors="replace").decode()


def default_text() -> str:
    """The language reference of this Python's `help()`, every long paragraph once.

    Its topics quote one another at length ("compound" holds "if", "while" and "for"): without this, much of the
    held-out text would have been trained on.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept = []
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            words = " ".join(paragraph.split())
            if words in seen and len(words) >= REPEATED_PARAGRAPH_CHARACTERS:
                continue
            seen.add(words)
            kept.append(paragraph)
    return "\n\n".join(kept)


def split(data: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """(train, validation), both (bytes,) uint8. A text of less than ten blocks is cut into ten shorter ones."""
    block = max(1, min(BLOCK_BYTES, len(data) // HELD_OUT_EVERY))
    blocks = [data[start : start + block] for start in range(0, len(data), block)]
    held_out = range(HELD_OUT_EVERY - 1, len(blocks), HELD_OUT_EVERY)
    train = b"".join(piece for index, piece in enumerate(blocks) if index not in held_out)
    validation = b"".join(blocks[index] for index in held_out)
    return _tensor(train), _tensor(validation)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def text_store(text: Text) -> Store:
    """A text as what a training reads: its bytes are the ids, 256 of them, and nothing ends a document."""
    from gptkern.training.data.tokenizers import bytes_tokenizer

    train, validation = ArrayTokens(text.train), ArrayTokens(text.validation)
    digest = hashlib.sha256(f"{len(train)} bytes\n".encode())
    for part in (train, validation):
        digest.update(np.ascontiguousarray(part.array))
    return Store(train, validation, bytes_tokenizer(end_of_text=False), None, text.name, digest.hexdigest())
