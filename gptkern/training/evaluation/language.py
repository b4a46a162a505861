"""Language modelling: how well a model predicts a text.

    nats per byte   = Σ -log p(token) / bytes of the text in UTF-8      whatever the tokenizer
    bits per byte   = nats per byte / log 2
    nats per token  = Σ -log p(token) / tokens
    perplexity      = exp(nats per token)                               of this tokenizer, with this context and stride

The ends of texts are read and not asked for: they are no part of a text. Intervals are of documents, and of the parts
of about 8 KiB that long texts are read in (training/data/sources.py).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np

from gptkern.formatting import shown
from gptkern.models.gpt import GPT
from gptkern.training.data.examples import COMPLETION, TEXT, Example, read_examples
from gptkern.training.data.sources import Reader
from gptkern.training.data.store import Store, Tokens
from gptkern.training.data.tokenizers import Tokenizer
from gptkern.training.errors import UserError
from gptkern.training.evaluation import reading
from gptkern.training.evaluation.likelihood import Computing, Row, nats
from gptkern.training.evaluation.tasks import Asked, where
from gptkern.training.evaluation.windows import Part, windows
from gptkern.training.loading import same_tokens

READ_TOGETHER = 64  # batches
PART_TOKENS = 2**11  # of prepared data: some 8 KiB of text, where a token is four bytes


class Language:
    """A text, texts, or completions of prompts.

    Args:
        stride: tokens from a window to the next.
    """

    task = reading.LANGUAGE

    def __init__(self, data: str, option: str, model: GPT, tokenizer: Tokenizer, stride: int):
        self.data, self.option = data, option
        self.model, self.tokenizer, self.stride = model, tokenizer, stride
        self.store = Store.open(data, option) if os.path.isdir(data) else None
        if self.store is not None and not same_tokens(tokenizer, self.store.tokenizer):
            raise UserError(
                f"{option} {shown(data)} are tokens by {self.store.tokenizer.name}, and the model's are by "
                f"{tokenizer.name}; it needs data of the model's own tokenizer, or text"
            )
        # All of it is looked at before a model is run: what is wrong with the last line is said now.
        self.count = self.bytes = self.skipped = 0
        for part in self._parts(encoded=False):
            self.count += part.last
            self.bytes += part.bytes
        if not self.bytes:
            raise UserError(f"{option} {shown(data)}: there is no text in it; it needs some")

    def __len__(self) -> int:
        """Documents."""
        return self.count

    def ask(self, how: Computing, changed: Callable[[str], str] = str) -> Asked:
        self.cut = self.altered = self.skipped = 0
        sizes: list[int] = []  # of the parts, in bytes

        def parts() -> Iterator[Part]:
            for part in self._parts(encoded=True):
                # Where nothing comes before the first token it is not asked for; such tokens are bytes.
                unasked = part.first and not len(part.given) and self.tokenizer.end_of_text is None and len(part.ids)
                sizes.append(part.bytes - bool(unasked))
                yield part

        sums, counts = np.zeros(0), np.zeros(0)
        rows: list[Row] = []
        owners: list[np.ndarray] = []

        def flush() -> None:
            nonlocal sums, counts
            if rows:
                of = np.concatenate(owners)
                # So many parts have been read by now.
                found = np.concatenate(nats(self.model, rows, how))
                sums = _grown(sums, len(sizes)) + np.bincount(of, found, len(sizes))
                counts = _grown(counts, len(sizes)) + np.bincount(of, minlength=len(sizes))
                rows.clear()
                owners.clear()

        for row, of_row in windows(parts(), self.model.config.context, self.stride, self.tokenizer.end_of_text):
            rows.append(row)
            owners.append(of_row)
            if len(rows) >= READ_TOGETHER * how.batch:
                flush()
        flush()
        if not counts.sum():
            raise UserError(
                f"{self.option} {shown(self.data)}: no token of it has another one before it; it needs more text"
            )
        kept = counts > 0
        details = {
            "context": self.model.config.context, "stride": self.stride, "documents": self.count,
            "parts": int(kept.sum()), "tokens": int(counts.sum()), "bytes": int(np.array(sizes)[kept].sum()),
            "altered_parts": self.altered, "skipped": self.skipped,
        }  # fmt: skip
        return Asked(of_text(sums[kept], counts[kept], np.array(sizes, np.float64)[kept]), details, self.cut)

    # --- What is read -------------------------------------------------------------------------------------------------

    def _parts(self, encoded: bool) -> Iterator[Part]:
        """Parts in their order; not encoded: of texts without their ids, which take time."""
        if self.store is not None:
            yield from _of_tokens(self.store.validation, self.tokenizer)
            return
        if reading.is_text(self.data, self.option):
            yield from self._of_text(encoded)
            return
        for example in read_examples(self.data, self.option):
            if example.kind not in (TEXT, COMPLETION):
                raise UserError(
                    f"{where(self.data, self.option, example)} has neither text alone nor prompt and completion, which "
                    "--task language needs"
                )
            if not example.completion:
                self.skipped += 1
                continue
            yield self._of_example(example, encoded)

    def _of_text(self, encoded: bool) -> Iterator[Part]:
        first, line = True, 1
        with Reader(reading.source(self.data, self.option), option=self.option) as reader:
            for piece in reader.pieces():
                text = piece.text.decode()
                yield self._part(text, f"{self.option} {reader.source.name}: line {line}", encoded, first, piece.last)
                first, line = piece.last, line + text.count("\n")

    def _of_example(self, example: Example, encoded: bool) -> Part:
        called = f"{self.option} {shown(self.data)}: example {example.line}"
        part = self._part(example.completion, called, encoded, True, True)
        if not encoded or not example.prompt:
            return part
        given = self.tokenizer.encode(example.prompt)
        # What is left of the context is the prompt's, at least a token.
        room = max(1, self.model.config.context + 1 - len(part.ids))
        self.cut += len(given) > room
        return part._replace(given=given[-room:])

    def _part(self, text: str, where: str, encoded: bool, first: bool, last: bool) -> Part:
        size = len(text.encode())
        if not encoded:
            return Part(np.empty(0, np.int64), size, first=first, last=last)
        ids = self.tokenizer.encode(text)
        if not len(ids):
            raise UserError(f"{where}: none of it is a token by {self.tokenizer.name}; it needs text of this tokenizer")
        self.altered += not self.tokenizer.is_lossless and self.tokenizer.decode(ids).split() != text.split()
        return Part(ids, size, first=first, last=last)


def _of_tokens(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[Part]:
    """Prepared ids: documents, each with the end of a text behind it."""
    end_of_text = -1 if tokenizer.end_of_text is None else tokenizer.end_of_text
    first = True
    for start in range(0, len(tokens), PART_TOKENS):
        ids, begin = tokens.read(start, min(start + PART_TOKENS, len(tokens))), 0
        for end in np.flatnonzero(ids == end_of_text).tolist():
            yield Part(ids[begin:end], tokenizer.bytes_of(ids[begin:end]), first=first, last=True)
            first, begin = True, end + 1
        if begin < len(ids):
            last = start + len(ids) == len(tokens)
            yield Part(ids[begin:], tokenizer.bytes_of(ids[begin:]), first=first, last=last)
            first = False


def of_text(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """The metrics of parts of a text.

    Args:
        nats: (parts,), -log p of each. tokens, sizes: (parts,), their tokens and bytes.
    """

    def statistic(picked: np.ndarray) -> dict[str, float]:
        total = float(nats[picked].sum())
        per_byte, per_token = total / float(sizes[picked].sum()), total / float(tokens[picked].sum())
        perplexity = math.exp(per_token) if per_token < math.log(sys.float_info.max) else math.inf
        return {
            "nats_per_byte": per_byte, "bits_per_byte": per_byte / math.log(2), "nats_per_token": per_token,
            "perplexity": perplexity,
        }  # fmt: skip

    return statistic


def _grown(values: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([values, np.zeros(size - len(values))])
