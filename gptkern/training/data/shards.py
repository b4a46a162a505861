"""Token ids in files that can be read anywhere: zstd's seekable format.

A shard is a sequence of zstd frames, each of which is read alone, and a skippable frame with their sizes:

    frame, frame, …, frame, 0x184D2A5E, bytes that follow, entry, entry, …, entry, frames, 0x80, 0x8F92EAB1
    entry = compressed bytes, bytes, the last 32 bits of the content's XXH64      all of them 32 bits, little endian

(the descriptor 0x80, of one byte, says that entries have checksums). Every frame but the last holds `frame_tokens` ids,
and ends with the checksum of its content, as zstd's frames may: `zstd -d` reads the file, and verifies it.

What a reader trusts is the manifest's entry of a shard. The entry's digest of the seek table covers the checksums of
all frames, so that a shard that was damaged, or is another one of the same size, is found without reading all of it.
Of what the files themselves say nothing is believed before it was compared with what it has to be.
"""

from __future__ import annotations

import base64
import collections
import hashlib
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import zstandard

from gptkern.formatting import count, shown, size
from gptkern.training.data.plain_files import open_plain, sync_folder
from gptkern.training.errors import UserError, kept, reason

FRAME_TOKENS = 2**15
MOST_FRAME_TOKENS = 2**22
SHARD_TOKENS = 2**24
LEVEL = 9  # 3 is three times as fast and 6 to 13% larger; 15 is 2 to 7% smaller, and writes 2 million ids a second

# Of decompressed frames that are kept for the next read.
CACHE_BYTES = 32 * 2**20

SKIPPABLE, SEEKABLE = 0x184D2A5E, 0x8F92EAB1
CHECKSUMS = 0x80
HEADER, ENTRY, FOOTER = struct.Struct("<II"), struct.Struct("<III"), struct.Struct("<IBI")
MOST_TABLE_BYTES = 16 * 2**20

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
# A frame's header and checksum, and what zstd adds to bytes that cannot be compressed.
FRAME_OVERHEAD = 64


def dtype_of(vocab_size: int) -> str:
    """The name of the smallest type that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class Layout(NamedTuple):
    """What all shards of a folder have in common."""

    dtype: str  # of DTYPES
    vocab_size: int
    frame_tokens: int = FRAME_TOKENS


# Writing -------------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes the ids of one split into `<split>-00000.zst`, `<split>-00001.zst`, ….

    A shard is written as `….zst.new`, and gets its name when it is whole and on the disk. The bytes depend on the ids
    and on zstandard's version alone, however the ids are cut into calls of `write` and wherever a run was continued.

    Args:
        folder: that exists. split: "train" or "validation".
        shard_tokens: ids of a shard, a multiple of the layout's frame_tokens; the last shard has the rest.
        state: what `state()` gave, to go on from there; what was written later is dropped.

    Raises:
        UserError: what the state says was written is not there.
        RunError: the disk is full, or refuses.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        layout: Layout,
        *,
        shard_tokens: int = SHARD_TOKENS,
        level: int = LEVEL,
        state: dict[str, Any] | None = None,
    ):
        if layout.dtype not in DTYPES:
            raise ValueError(f"ShardWriter got the dtype {layout.dtype!r}; it needs one of {', '.join(DTYPES)}")
        if not 1 <= layout.frame_tokens <= MOST_FRAME_TOKENS:
            raise ValueError(f"ShardWriter got frame_tokens={layout.frame_tokens}; it needs 1 to {MOST_FRAME_TOKENS}")
        if shard_tokens < 1 or shard_tokens % layout.frame_tokens:
            raise ValueError(
                f"ShardWriter got shard_tokens={shard_tokens}; it needs a multiple of the frame's {layout.frame_tokens}"
            )
        self.folder, self.split, self.layout = Path(folder), split, layout
        self.entries: list[dict[str, Any]] = []  # the manifest's, of the shards that are whole
        self.tokens = 0  # written so far
        self._frames_of_shard = shard_tokens // layout.frame_tokens
        self._dtype = DTYPES[layout.dtype]
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._buffer = np.empty(layout.frame_tokens, self._dtype)
        self._filled = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._frames: list[tuple[int, int, int]] = []  # entries of the shard's seek table
        if state is not None:
            self._go_on(state)

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self.entries):05d}.zst"

    def write(self, ids: np.ndarray) -> None:
        """Append ids, (tokens,) of any integer type.

        Raises:
            ValueError: an id that the vocabulary does not have; nothing of the call was written.
        """
        ids = np.asarray(ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ValueError(f"ShardWriter.write got {ids.dtype} of shape {ids.shape}; it needs integers, (tokens,)")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.layout.vocab_size):
            raise ValueError(
                f"ShardWriter.write got ids from {ids.min()} to {ids.max()}; it needs 0 to {self.layout.vocab_size - 1}"
            )
        while len(ids):
            part = ids[: len(self._buffer) - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            self.tokens += len(part)
            ids = ids[len(part) :]
            if self._filled == len(self._buffer):
                self._write_frame()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; the manifest's entries of all of them. A second call changes nothing."""
        if self._filled:
            self._write_frame()
        if self._frames:
            self._finish_shard()
        return self.entries

    def abandon(self) -> None:
        """Close the file of the shard that is not whole, and leave it for a writer that goes on from a state."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """What a writer needs to go on from here, for JSON; all that it speaks of is on the disk."""
        if self._file is not None:
            with kept(self._path_new):
                os.fsync(self._file.fileno())
        return {
            "entries": [dict(entry) for entry in self.entries],
            "tokens": self.tokens,
            "frames": [list(frame) for frame in self._frames],
            "pending": base64.b64encode(self._buffer[: self._filled].tobytes()).decode(),
        }

    def _go_on(self, state: dict[str, Any]) -> None:
        self.entries = [dict(entry) for entry in state["entries"]]
        self.tokens = state["tokens"]
        self._frames = [tuple(frame) for frame in state["frames"]]
        pending = np.frombuffer(base64.b64decode(state["pending"]), self._dtype)
        self._filled = len(pending)
        self._buffer[: self._filled] = pending
        for entry in self.entries:
            open_shard(self.folder, entry, self.layout)
        with kept(self._path_new):
            self._drop_later()
            if self._frames:
                self._read_again()

    def _read_again(self) -> None:
        self._file = self._path_new.open("r+b", buffering=0)
        # The digest's own state cannot be kept.
        for number, (compressed, length, checksum) in enumerate(self._frames):
            data = self._file.read(compressed)
            try:
                _content(data, length, checksum)
            except ValueError as error:
                self.abandon()
                raise UserError(
                    f"{self._path_new.name}: frame {number} is not what was written before ({error}); start anew"
                ) from error
            self._digest.update(data)
        self._file.truncate(self._file.tell())

    def _drop_later(self) -> None:
        """Shards that were finished after the state was taken: the first goes on, the others go."""
        path, number = self.folder / self._name, len(self.entries) + 1
        if path.exists():
            os.replace(path, self._path_new)
        while (path := self.folder / f"{self.split}-{number:05d}.zst").exists():
            path.unlink()
            number += 1
        if not self._frames:
            self._path_new.unlink(missing_ok=True)

    @property
    def _path_new(self) -> Path:
        return self.folder / f"{self._name}.new"

    def _write_frame(self) -> None:
        content = self._buffer[: self._filled].tobytes()
        data = self._compressor.compress(content)
        if self._file is None:
            with kept(self._path_new):
                self._file = self._path_new.open("wb", buffering=0)
        self._append(data)
        # A frame's own checksum, its last four bytes, is the one that the seek table wants.
        self._frames.append((len(data), len(content), int.from_bytes(data[-4:], "little")))
        self._filled = 0
        if len(self._frames) == self._frames_of_shard:
            self._finish_shard()

    def _append(self, data: bytes) -> None:
        with kept(self._path_new):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._digest.update(data)

    def _finish_shard(self) -> None:
        table = b"".join(ENTRY.pack(*frame) for frame in self._frames)
        footer = FOOTER.pack(len(self._frames), CHECKSUMS, SEEKABLE)
        table = HEADER.pack(SKIPPABLE, len(table) + len(footer)) + table + footer
        self._append(table)
        name, path = self._name, self._path_new
        with kept(path):
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(path, self.folder / name)
            sync_folder(self.folder)
        content = sum(length for _, length, _ in self._frames)
        self.entries.append(
            {
                "file": name,
                "tokens": content // self._dtype.itemsize,
                "bytes": len(table) + sum(compressed for compressed, _, _ in self._frames),
                "sha256": self._digest.hexdigest(),
                "seek_table_sha256": hashlib.sha256(table).hexdigest(),
            }
        )
        self._file, self._frames, self._digest = None, [], hashlib.sha256()


# Reading -------------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A shard whose seek table was read and is what the manifest says."""

    folder: Path
    name: str
    tokens: int
    layout: Layout
    offsets: np.ndarray  # (frames + 1,) int64: where each frame begins, and the last one ends
    checksums: np.ndarray  # (frames,) uint32


def open_shard(folder: Path, entry: dict[str, Any], layout: Layout) -> Shard:
    """Read a shard's seek table, and hold it against the manifest's entry.

    Args:
        entry: of the manifest, of which every value has its type ("file", "tokens", "bytes", "seek_table_sha256").

    Raises:
        UserError: the file is not the one that the entry speaks of.
    """
    name, tokens = entry["file"], entry["tokens"]
    frames = -(-tokens // layout.frame_tokens)
    table_bytes = HEADER.size + frames * ENTRY.size + FOOTER.size
    with open_plain(folder, name) as file:
        found = os.fstat(file.fileno()).st_size
        if found != entry["bytes"]:
            raise UserError(f"{shown(name)} has {count(found, 'byte')}; the manifest says {entry['bytes']}")
        if table_bytes > min(found, MOST_TABLE_BYTES):
            raise UserError(
                f"{shown(name)}: {tokens} tokens are {frames} frames, which a shard of {size(found)} cannot have"
            )
        file.seek(found - table_bytes)
        table = _read(file, table_bytes, name)
    if hashlib.sha256(table).hexdigest() != entry["seek_table_sha256"]:
        raise UserError(f"{shown(name)}: it is not the shard that the manifest speaks of, or its end is damaged")
    body = len(table) - HEADER.size
    ends = HEADER.unpack_from(table), FOOTER.unpack_from(table, len(table) - FOOTER.size)
    if ends != ((SKIPPABLE, body), (frames, CHECKSUMS, SEEKABLE)):
        raise UserError(f"{shown(name)}: its seek table is none of {count(frames, 'frame')} with checksums")
    rows = np.frombuffer(table, "<u4", 3 * frames, HEADER.size).reshape(frames, 3)
    itemsize = DTYPES[layout.dtype].itemsize
    expected = np.full(frames, layout.frame_tokens * itemsize, np.int64)
    expected[-1] = (tokens - (frames - 1) * layout.frame_tokens) * itemsize
    offsets = np.concatenate([[0], np.cumsum(rows[:, 0], dtype=np.int64)])
    if not np.array_equal(rows[:, 1], expected):
        raise UserError(
            f"{shown(name)}: its frames do not hold {tokens} ids of {layout.dtype}, {layout.frame_tokens} each"
        )
    if offsets[-1] != found - table_bytes or (rows[:, 0] > _most_compressed(expected)).any():
        raise UserError(f"{shown(name)}: the frames of its seek table do not fill the file")
    return Shard(folder, name, tokens, layout, offsets, rows[:, 2].copy())


def _most_compressed(content):
    return content + content // 128 + FRAME_OVERHEAD


def _read(file: BinaryIO, length: int, name: str) -> bytes:
    parts = []
    try:
        while length and (data := file.read(length)):
            parts.append(data)
            length -= len(data)
    except OSError as error:
        raise UserError(f"{shown(name)}: {reason(error)}") from error
    if length:
        raise UserError(f"{shown(name)}: it ends too early")
    return b"".join(parts)


_local = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    """Of this thread: one cannot be used by two at a time."""
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    return _local.decompressor


def read_frame(shard: Shard, frame: int) -> np.ndarray:
    """The ids of one frame, (tokens of it,), of which all were verified.

    Raises:
        UserError: the frame is damaged, or has an id that the vocabulary does not have.
    """
    layout, dtype = shard.layout, DTYPES[shard.layout.dtype]
    tokens = min(layout.frame_tokens, shard.tokens - frame * layout.frame_tokens)
    start, stop = int(shard.offsets[frame]), int(shard.offsets[frame + 1])
    with open_plain(shard.folder, shard.name) as file:
        file.seek(start)
        data = _read(file, stop - start, shard.name)
    try:
        ids = np.frombuffer(_content(data, tokens * dtype.itemsize, int(shard.checksums[frame])), dtype)
    except ValueError as error:
        raise UserError(
            f"{shown(shard.name)}: frame {frame} is damaged ({error}); nothing was trained on it"
        ) from error
    if (most := int(ids.max())) >= layout.vocab_size:
        raise UserError(
            f"{shown(shard.name)}: frame {frame} has the id {most} and the vocabulary ends at {layout.vocab_size - 1}; "
            "nothing was trained on it"
        )
    return ids


def _content(data: bytes, length: int, checksum: int) -> bytes:
    """What a frame holds, verified; ValueError where it is not this frame."""
    # The frame's own checksum, which zstd holds its content against.
    if int.from_bytes(data[-4:], "little") != checksum:
        raise ValueError("its checksum is another one")
    try:
        about = zstandard.get_frame_parameters(data)
        if about.content_size != length or not about.has_checksum or about.dict_id:
            raise ValueError(f"its header does not say {length} bytes with a checksum")
        return _decompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(" ".join(str(error).split())) from error


class ShardTokens:
    """The ids of shards, one after another; a few decompressed frames are kept. Threads may share it."""

    def __init__(self, shards: Sequence[Shard], dtype: str, cache_bytes: int = CACHE_BYTES):
        self.shards = list(shards)
        self.dtype = DTYPES[dtype]
        # (shards + 1,): where each shard begins, and the last one ends
        self._starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)])
        self._most = cache_bytes
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, int], np.ndarray] = collections.OrderedDict()
        self._held = 0  # bytes

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from start to stop, (stop - start,).

        Raises:
            IndexError: there are none there. UserError: as of `read_frame`.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        ids = np.empty(stop - start, self.dtype)
        position = start
        while position < stop:
            shard = int(np.searchsorted(self._starts, position, "right")) - 1
            frame, offset = divmod(position - int(self._starts[shard]), self.shards[shard].layout.frame_tokens)
            part = self._frame(shard, frame)[offset : offset + stop - position]
            ids[position - start : position - start + len(part)] = part
            position += len(part)
        return ids

    def _frame(self, shard: int, frame: int) -> np.ndarray:
        if self._process != os.getpid():
            self._reset()  # a thread of the process that forked may have held the lock
        key = shard, frame
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        ids = read_frame(self.shards[shard], frame)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = ids
                self._held += ids.nbytes
            while self._held > self._most and len(self._kept) > 1:
                self._held -= self._kept.popitem(last=False)[1].nbytes
        return ids
