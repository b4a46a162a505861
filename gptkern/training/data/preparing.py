"""Texts to shards of token ids, in memory that does not grow with them.

Each piece of text (`sources`) goes to the held-out split where the first 64 bits of its SHA-256, as a part of 2^64, are
below the part to hold out, so that neither order nor process matters; of so little text that none is, the piece with
the least. A document's end is one id. Pieces of a text that follow one another in a split are not parted by it; where
one between them went to the other split, they are.

All is written in a folder of its own first (`work`), with a state from which the same call goes on after whatever ended
it. The bytes that come out depend neither on where a run was ended nor on the number of threads.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard

from gptkern.formatting import shown
from gptkern.training.data import shards, sources, store, tokenizers
from gptkern.training.data.sources import Piece, Reader, Source
from gptkern.training.data.tokenizers import Tokenizer
from gptkern.training.data.work import Work
from gptkern.training.errors import RunError, UserError, kept
from gptkern.version import __version__

TRAIN, VALIDATION = store.SPLITS
HELD_OUT = 0.05

# Text of a call of the tokenizer, and how many calls may wait: `tokenizers` takes 100 times as much memory.
BATCH_BYTES, BATCHES = 2**18, 3
PIECES_BETWEEN_REPORTS = 32
# A state is taken this often: what is to be done again after a kill.
SECONDS_BETWEEN_STATES = 5.0
# What is read in advance, to find what is wrong with the texts: so much of them, and of what follows the beginnings.
LOOKED_BYTES, LOOKED_HEAD = 2**28, 2**16
# A byte-pair encoding is trained on so much text, drawn by its hash from all of the training split.
TRAINED_BYTES = 2**28
USUAL_COMPRESSION = 4
# Text that is compressed to be compared with: so much, and of what follows a part.
GZIPPED_BYTES, GZIPPED_PART = 2**24, 1 / 16


class Progress(NamedTuple):
    """How far a stage is: bytes of the files that were read, of how many (None where that is not known), and tokens."""

    stage: str
    done: int
    total: int | None
    tokens: int


class Prepared(NamedTuple):
    """What was made.

    Args:
        manifest: as it was written. gzip_bytes: of the text, compressed with gzip; None where none was read. sampled:
            whether that is estimated from a part of it.
        empty: documents without text, which were left out. how: "new", "continued", or "complete" where nothing was
            left to do.
    """

    manifest: dict[str, Any]
    gzip_bytes: float | None
    sampled: bool
    empty: int
    how: str


def prepare(
    texts: Sequence[str],
    out: str | Path,
    *,
    tokenizer: str = "bytes",
    field: str | None = None,
    held_out: float = HELD_OUT,
    overwrite: bool = False,
    shard_tokens: int = shards.SHARD_TOKENS,
    frame_tokens: int = shards.FRAME_TOKENS,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Prepared:
    """Write the texts' tokens into a folder, from which `Store.open` reads them.

    Args:
        texts: files, folders, pipes, or "-" for standard input.
        tokenizer: "bytes", "bpe:N" to train one of N tokens, or the path of a tokenizer.json.
        field: of JSONL that holds the text; "text" where none is named. held_out: the part of the text in the
            validation split. overwrite: replace what is prepared in the folder, once the new is whole.

    Raises:
        UserError: something is wrong with the texts, the tokenizer or the folder, which is then as it was.
        RunError: the disk is full or refuses, or the texts changed meanwhile.
    """
    job = _Job(list(texts), Path(out), tokenizer, field, held_out, shard_tokens, frame_tokens, watch)
    job.look()
    with Work(Path(out)) as work, job.pipes_kept(work):
        return job.run(work, overwrite)


def tokenizer_kind(value: str) -> str | int | Path:
    """What `--tokenizer` names: "bytes", the size of an encoding that is to be trained, or a file.

    Raises:
        UserError: it names none of them.
    """
    needs = "it needs bytes, bpe:N, or the path of a tokenizer.json"
    if value == "bytes":
        return value
    if not value:
        raise UserError(f"--tokenizer is empty; {needs}")
    if value != "bpe" and not value.startswith("bpe:"):
        if not os.path.exists(value):
            raise UserError(f"--tokenizer {shown(value)}: there is no such file; {needs}")
        return Path(value)
    least, most = tokenizers.SMALLEST_TRAINED, tokenizers.LARGEST_TRAINED
    found = re.fullmatch(r"bpe:(\d{1,9})", value, re.ASCII)
    if found is None or not least <= int(found[1]) <= most:
        raise UserError(f"--tokenizer is {shown(value)}; it needs bpe:N, with N from {least} to {most}")
    return int(found[1])


class _Job:
    def __init__(self, texts, out, tokenizer, field, held_out, shard_tokens, frame_tokens, watch):
        self.texts, self.out, self.watch = texts, out, watch
        self.held_out, self.shard_tokens, self.frame_tokens = held_out, shard_tokens, frame_tokens
        self.field_given, self.field = field is not None, field if field is not None else sources.FIELD
        self.kind = tokenizer_kind(tokenizer)
        self.tokenizer: Tokenizer | None = None  # None until it is trained
        if self.kind == "bytes":
            self.tokenizer = tokenizers.bytes_tokenizer()
        elif isinstance(self.kind, Path):
            self.tokenizer = tokenizers.read_tokenizer(self.kind)
        self.asked_tokenizer = self.kind if self.tokenizer is None else self.tokenizer.entry()
        self.spooled: dict[str, Source] = {}
        self.total = 0  # bytes of all files
        self.text_total = 0  # of their text, about
        self.lines = False  # whether one of them is JSONL
        self.least_share, self.all_looked_at = 1.0, True  # of a piece; whether each of them was looked at

    # Looking at the texts -------------------------------------------------------------------------------------------

    def look(self) -> None:
        """All that can be known before the folder is touched."""
        if not self.texts:
            raise UserError("TEXT is missing; it needs a file, a folder, or - for standard input")
        self.pipes = [text for text in dict.fromkeys(self.texts) if sources.is_pipe(text)]
        for pipe in self.pipes:
            if self.texts.count(pipe) > 1:
                raise UserError(f"TEXT {shown(pipe)} is there twice; it can be read but once")
        out = os.path.realpath(self.out)
        for text in self.texts:
            folder = os.path.realpath(text)
            if text not in self.pipes and os.path.isdir(folder) and os.path.commonpath([out, folder]) == folder:
                raise UserError(
                    f"--out {shown(str(self.out))} lies in {shown(text)}, which is read; it needs another place"
                )
        self._look_at([text for text in self.texts if text not in self.pipes])
        if not self.pipes:
            self._check_field()

    def _look_at(self, texts: Sequence[str]) -> None:
        left = LOOKED_BYTES
        for source in sources.walk(texts, self.spooled):
            try:
                with Reader(source, self.field) as reader:
                    left -= self._looked(reader, max(left, LOOKED_HEAD))
                    self.lines |= reader.is_lines
                    self.text_total += source.bytes * (USUAL_COMPRESSION if reader.compression else 1)
            except RunError as error:  # it cannot be read
                raise UserError(str(error)) from error
            self.total += source.bytes
            self.watch(Progress("looking at the texts", self.total, None, 0))

    def _looked(self, reader: Reader, most: int) -> int:
        end, any_text = 0, False
        for piece in reader.pieces():
            end = piece.end
            if piece.text:
                any_text, self.least_share = True, min(self.least_share, _share(piece.text))
            if end >= most:
                self.all_looked_at = False
                break
        if reader.source.given and not any_text and end < most:
            what = "it has no document with text" if reader.is_lines and reader.source.bytes else "it is empty"
            raise UserError(f"TEXT {reader.source.name}: {what}; it needs text")
        return end

    def is_held_out(self, text: bytes) -> bool:
        share = _share(text)
        least = self.held_out > 0 and self.all_looked_at and share == self.least_share
        return least or share < self.held_out

    def _check_field(self) -> None:
        if self.field_given and not self.lines:
            raise UserError(f"--field {shown(self.field)} is of JSONL, of which nothing was given")

    @contextlib.contextmanager
    def pipes_kept(self, work: Work) -> Iterator[None]:
        """Inside the block what came through pipes is in files."""
        try:
            for number, pipe in enumerate(self.pipes):
                path = work.make() / f"pipe-{number}"
                with kept(path), _opened(pipe) as stream:
                    self.watch(Progress(f"reading {'standard input' if pipe == '-' else shown(pipe)}", 0, None, 0))
                    self.spooled[pipe] = sources.spool(pipe, stream, path)
            if self.pipes:
                self._look_at(self.pipes)
                self._check_field()
            yield
        finally:
            for number in range(len(self.pipes)):
                (work.folder / f"pipe-{number}").unlink(missing_ok=True)

    def _inputs(self) -> str:
        """Another text for other options, other files, or files that were changed."""
        asked = (self.asked_tokenizer, self.field, self.held_out, self.shard_tokens, self.frame_tokens)
        digest = hashlib.sha256(repr(asked).encode(errors="surrogateescape"))
        for source in sources.walk(self.texts, self.spooled):
            digest.update(f"{source.name}\0{source.identity}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    # Writing ----------------------------------------------------------------------------------------------------------

    def run(self, work: Work, overwrite: bool) -> Prepared:
        inputs = self._inputs()
        if not overwrite and (manifest := work.complete(inputs)):
            return Prepared(manifest, None, False, 0, "complete")
        asked = {"inputs": inputs, "versions": self._versions()}
        state = work.begin(asked, overwrite, {Path(source.path).name for source in self.spooled.values()})
        if state is not None and "moving" in state:
            return Prepared(work.move(), None, False, 0, "continued")
        if state is None or self.tokenizer is None:
            self._settle_tokenizer(work, asked, state)
        how = "continued" if state is not None and "writers" in state else "new"
        writing = _Pass(self, work, asked, state)
        manifest = writing.run() | {"inputs": inputs}
        if self._inputs() != inputs:
            raise RunError("the texts were changed while they were read: --overwrite begins anew")
        gzipped = writing.gzipped
        return Prepared(work.finish(manifest, asked), gzipped.bytes, gzipped.sampled, writing.empty, how)

    def _settle_tokenizer(self, work: Work, asked: dict[str, Any], state: dict[str, Any] | None) -> None:
        """Train it, or take the one that an earlier run has trained."""
        if state is not None:
            self.tokenizer = tokenizers.load_tokenizer(work.folder, state["tokenizer"])
            return
        if self.tokenizer is None:
            self.tokenizer = tokenizers.train_bpe(self._trained_on(), self.kind)
        with kept(work.folder):
            entry = self.tokenizer.save(work.folder)
        work.save({"asked": asked, "tokenizer": entry})

    def _trained_on(self) -> Iterator[str]:
        part, left = min(1.0, TRAINED_BYTES / max(1, self.text_total)), TRAINED_BYTES
        for _, piece in self.pieces("training the tokenizer"):
            if not self.is_held_out(piece.text) and _share(piece.text, 8) < part:
                yield piece.text.decode()
                left -= len(piece.text)
                if left <= 0:
                    return

    def pieces(self, stage: str, place: Sequence[int] = (0, 0, 0), tokens=lambda: 0) -> Iterator[tuple[int, Piece]]:
        """(number of the source, piece), from a place on: number of the source, and the piece's `end` and `line`."""
        done = 0
        for number, source in enumerate(sources.walk(self.texts, self.spooled)):
            if number >= place[0]:
                with Reader(source, self.field) as reader:
                    for count, piece in enumerate(reader.pieces(*(place[1:] if number == place[0] else ()))):
                        yield number, piece
                        if count % PIECES_BETWEEN_REPORTS == 0:
                            self.watch(Progress(stage, done + reader.position, self.total, tokens()))
            done += source.bytes

    def _versions(self) -> dict[str, str]:
        """Of what the bytes depend on."""
        versions = {"gptkern": __version__, "zstandard": zstandard.__version__}
        versions["zstd"] = ".".join(map(str, zstandard.ZSTD_VERSION))
        if self.kind != "bytes":
            versions["tokenizers"] = importlib.metadata.version("tokenizers")
        return versions


class _Pass:
    """The pass over the texts that writes the tokens."""

    def __init__(self, job: _Job, work: Work, asked: dict[str, Any], state: dict[str, Any] | None):
        self.job, self.work, self.tokenizer = job, work, job.tokenizer
        self.asked = asked
        state = state if state is not None and "writers" in state else {}
        # Where to go on: number of the source, offset in it, line.
        self.place = state.get("place", [0, 0, 0])
        # The split whose last document has not ended.
        self.open: str | None = state.get("open")
        self.documents = state.get("documents", {TRAIN: 0, VALIDATION: 0})
        self.text_bytes, self.empty = state.get("text_bytes", 0), state.get("empty", 0)
        self.gzipped = _Gzipped()
        self.layout = shards.Layout(self.tokenizer.dtype, self.tokenizer.vocab_size, job.frame_tokens)
        self.end = np.array([self.tokenizer.end_of_text], self.tokenizer.dtype)
        written = state.get("writers", {})
        self.writers = {
            split: shards.ShardWriter(
                work.folder, split, self.layout, shard_tokens=job.shard_tokens, state=written.get(split)
            )
            for split in store.SPLITS
        }

    def run(self) -> dict[str, Any]:
        """The manifest of what was written, but for its inputs."""
        try:
            last = time.monotonic()
            for batch, ids in self._encoded():
                self._write(batch, ids)
                if time.monotonic() - last >= SECONDS_BETWEEN_STATES:
                    self.work.save(self._state())
                    last = time.monotonic()
            self._check()
            for writer in self.writers.values():
                writer.close()
        finally:
            for writer in self.writers.values():
                writer.abandon()
        return self._manifest()

    def _encoded(self) -> Iterator[tuple[list[tuple[int, Piece]], list[np.ndarray]]]:
        """(pieces, their ids): tokenized in threads while others are read and written, in their order."""
        waiting: collections.deque = collections.deque()
        pieces = self.job.pieces("writing tokens", self.place, self._tokens)
        with concurrent.futures.ThreadPoolExecutor(BATCHES - 1) as pool:
            for batch in _batches(pieces):
                waiting.append((batch, pool.submit(self.tokenizer.encode_batch, [piece.text for _, piece in batch])))
                if len(waiting) == BATCHES:
                    batch, ids = waiting.popleft()
                    yield batch, ids.result()
            for batch, ids in waiting:
                yield batch, ids.result()

    def _write(self, batch: list[tuple[int, Piece]], ids: list[np.ndarray]) -> None:
        parts: dict[str, list[np.ndarray]] = {split: [] for split in store.SPLITS}

        def end_document(split):
            parts[split].append(self.end)
            self.documents[split] += 1

        for (number, piece), of_piece in zip(batch, ids):
            self.place = [number, piece.end, piece.line]
            if not piece.text:
                self.empty += 1
                continue
            split = VALIDATION if self.job.is_held_out(piece.text) else TRAIN
            if self.open not in (None, split):
                end_document(self.open)
            parts[split].append(of_piece)
            if piece.last:
                end_document(split)
            self.open = None if piece.last else split
            self.text_bytes += len(piece.text)
            self.gzipped.add(piece.text)
        for split, arrays in parts.items():
            if arrays:
                self.writers[split].write(np.concatenate(arrays))

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def _state(self) -> dict[str, Any]:
        return {
            "asked": self.asked, "tokenizer": self.tokenizer.entry(),
            "place": self.place, "open": self.open, "documents": self.documents, "text_bytes": self.text_bytes,
            "empty": self.empty, "writers": {split: writer.state() for split, writer in self.writers.items()},
        }  # fmt: skip

    def _check(self) -> None:
        if not self._tokens():
            raise UserError("TEXT has no text in it; it needs some")
        for split, words in ((TRAIN, "left to train on"), (VALIDATION, "held out")):
            if not self.writers[split].tokens and (split == TRAIN or self.job.held_out > 0):
                other = "smaller" if split == TRAIN else "larger"
                raise UserError(
                    f"--held-out {self.job.held_out}: of {self.text_bytes} bytes of text nothing was {words}; it needs "
                    f"more text, or a {other} part to hold out (0 is none)"
                )

    def _manifest(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        return {
            "format": store.FORMAT, "version": store.VERSION,
            "tokenizer": tokenizer.entry(), "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text,
            "dtype": self.layout.dtype, "frame_tokens": self.layout.frame_tokens,
            "splits": {
                split: {"tokens": writer.tokens, "documents": self.documents[split], "shards": writer.entries}
                for split, writer in self.writers.items()
            },
            "text_bytes": self.text_bytes, "held_out": self.job.held_out,
            "sources": ["standard input" if text == sources.STANDARD_INPUT else text for text in self.job.texts],
            "versions": self.asked["versions"],
        }  # fmt: skip


class _Gzipped:
    """How large the text would be under gzip, by its usual level."""

    def __init__(self):
        self._compressor = zlib.compressobj(6)
        self._read, self._taken, self._made = 0, 0, 0

    def add(self, text: bytes) -> None:
        self._read += len(text)
        if self._read <= GZIPPED_BYTES or self._taken < self._read * GZIPPED_PART:
            self._taken += len(text)
            self._made += len(self._compressor.compress(text))

    @property
    def sampled(self) -> bool:
        return self._taken < self._read

    @property
    def bytes(self) -> float | None:
        """Of all that was added, after which nothing is; None where nothing was."""
        if self._compressor is not None:
            self._made += len(self._compressor.flush())
            self._compressor = None
        return self._made * self._read / self._taken if self._taken else None


def _share(text: bytes, start: int = 0) -> float:
    """64 bits of its SHA-256, from a byte on, as a part of 2^64."""
    return int.from_bytes(hashlib.sha256(text).digest()[start : start + 8], "big") / 2**64


def _batches(pieces: Iterable[tuple[int, Piece]]) -> Iterator[list[tuple[int, Piece]]]:
    batch, length = [], 0
    for each in pieces:
        batch.append(each)
        length += len(each[1].text)
        if length >= BATCH_BYTES:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _opened(pipe: str) -> Iterator[BinaryIO]:
    if pipe != sources.STANDARD_INPUT:
        try:
            stream = open(pipe, "rb")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"TEXT {shown(pipe)}: {error.strerror}") from error
        with stream:
            yield stream
    elif sys.stdin is None:
        raise UserError("TEXT -: standard input is closed; it needs text")
    else:
        yield sys.stdin.buffer
