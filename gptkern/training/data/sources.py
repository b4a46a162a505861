"""Texts to prepare: files, folders and pipes, plain or compressed, as a stream of pieces in bounded memory.

What a file is, is told by its content, and by its name where that says more: gzip and zstd by their first bytes; JSONL
by its name (.jsonl, .ndjson, .jl) or by a first line that is a JSON object; all else is text, in UTF-8.

A line of JSONL is a document, and one piece. A text is one document; while more than 16 KiB of it are left, a piece is
cut off: it ends at the first paragraph's end that begins after 8 KiB, or else at the first line's, or before the first
space, or with 16 KiB.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from gptkern.formatting import shown, size
from gptkern.training.errors import RunError, UserError, reason

STANDARD_INPUT = "-"
FIELD = "text"

PIECE_BYTES, LONGEST_PIECE = 2**13, 2**14
# A line is held whole, and Python's objects of a hostile one take 20 times as much.
LONGEST_LINE = 2**24
CHUNK_BYTES = 2**18
# A zstd block of 4 bytes can hold 128 KiB: so much compressed data makes 64 MiB at most.
ZSTD_INPUT_BYTES = 2**11

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a zstd file may begin with a skippable frame
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
# Files that are often given and hold no text by themselves.
OTHERS = {
    b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"%PDF": "a PDF",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_PARAGRAPH = re.compile(rb"\n[ \t\r]*\n")


class Source(NamedTuple):
    """A file to read.

    Args:
        path: of the file. name: for people. bytes: on the disk. identity: another one for another content.
        given: whether it was named itself, and not found in a folder. kept: whether it is what `spool` compressed.
    """

    path: str
    name: str
    bytes: int
    identity: str
    given: bool
    kept: bool = False


class Piece(NamedTuple):
    """A document, or a part of one.

    Args:
        text: UTF-8. last: whether the document ends with it.
        end: where in the decompressed file the next one begins. line: the lines before that, of JSONL.
    """

    text: bytes
    last: bool
    end: int
    line: int


class Line(NamedTuple):
    """A line without its end.

    Args:
        data: what it holds. end: where in the decompressed file the next one begins. number: from 1 on.
    """

    data: bytes
    end: int
    number: int


# Finding files --------------------------------------------------------------------------------------------------------


def is_pipe(text: str) -> bool:
    """Whether it can be read but once: standard input, a named pipe, a shell's `<(…)`.

    Raises:
        UserError: there is no such file, or it is a device.
    """
    if text == STANDARD_INPUT:
        return True
    if not text:
        raise UserError("TEXT is empty; it needs a file, a folder, or - for standard input")
    mode = _stat(text).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise UserError(f"TEXT {shown(text)}: it is a device; it needs a file or a folder")
    if stat.S_ISSOCK(mode):
        raise UserError(f"TEXT {shown(text)}: it is a socket; it needs a file or a folder")
    return stat.S_ISFIFO(mode)


def walk(texts: Sequence[str], spooled: Mapping[str, Source]) -> Iterator[Source]:
    """The files of what was asked for: of a folder all that are in it, by their names in order, hidden ones apart.

    Args:
        spooled: what stands for a pipe.

    Raises:
        UserError: a folder cannot be read, leads back into itself, or holds what is no file.
    """
    for text in texts:
        if text in spooled:
            yield spooled[text]
        elif os.path.isdir(text):
            yield from _files(text)
        else:
            yield _source(text, given=True)


def _files(folder: str) -> Iterator[Source]:
    # A stack of its own: folders may be nested deeper than Python's.
    first = _stat(folder)
    stack = [((first.st_dev, first.st_ino), folder, _names(folder))]
    while stack:
        _, above, names = stack[-1]
        name = next(names, None)
        if name is None:
            stack.pop()
            continue
        path = os.path.join(above, name)
        found = _stat(path)
        key = found.st_dev, found.st_ino
        if stat.S_ISREG(found.st_mode):
            yield _source(path, given=False)
        elif not stat.S_ISDIR(found.st_mode):
            raise UserError(f"TEXT {shown(path)}: it is neither a file nor a folder")
        elif any(key == each for each, _, _ in stack):
            raise UserError(f"TEXT {shown(path)}: it is a link that leads back to a folder that it is in")
        else:
            stack.append((key, path, _names(path)))


def _names(folder: str) -> Iterator[str]:
    try:
        return iter(sorted((name for name in os.listdir(folder) if not name.startswith(".")), key=os.fsencode))
    except OSError as error:
        raise UserError(f"TEXT {shown(folder)}: {reason(error)}") from error


def _source(path: str, given: bool) -> Source:
    found = _stat(path)
    return Source(path, _named(path), found.st_size, f"{found.st_size} {found.st_mtime_ns}", given)


def _named(path: str) -> str:
    return shown(path)


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"TEXT {shown(path)}: {reason(error)}; it needs a file, a folder, or -") from error


def spool(text: str, stream: BinaryIO, path: Path) -> Source:
    """Keep what comes through a pipe in a file, compressed where it is not yet: it is read more than once.

    Raises:
        UserError: it cannot be read. OSError: the file cannot be written.
    """
    name = "standard input" if text == STANDARD_INPUT else _named(text)
    digest = hashlib.sha256()
    first = _read(stream, name)
    while first and len(first) < len(ZSTD) and (more := _read(stream, name)):
        first += more
    compress = zstandard.ZstdCompressor(level=1).compressobj() if _compression(first) is None else None
    with open(path, "wb") as file:
        for chunk in itertools.chain([first], iter(lambda: _read(stream, name), b"")):
            digest.update(chunk)
            file.write(compress.compress(chunk) if compress else chunk)
        if compress:
            file.write(compress.flush())
        written = file.tell()
    return Source(str(path), name, written, digest.hexdigest(), given=True, kept=compress is not None)


def _read(stream: BinaryIO, name: str) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except OSError as error:
        raise UserError(f"TEXT {name}: {reason(error)}") from error


# Reading a file -------------------------------------------------------------------------------------------------------


class Reader:
    """Reads one source.

    Args:
        field: of a JSONL object, that holds its text. option: what an error calls the source.

    Raises:
        UserError: it cannot be opened, or its beginning is neither text nor what is known here.
    """

    def __init__(self, source: Source, field: str = FIELD, option: str = "TEXT"):
        self.source, self.field = source, field
        self._called = f"{option} {source.name}"
        try:
            self._file = open(source.path, "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise UserError(f"{self._called}: {reason(error)}") from error
        try:
            self.compression = _compression(self._read(len(ZSTD)))
            named = Path(source.path).suffix.lower()
            if self.compression is None and named in COMPRESSED and source.bytes:
                raise UserError(f"{self._called}: by its name it is compressed, and it holds neither gzip nor zstd")
            self._check_other()
            self.is_lines = self._holds_lines()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    @property
    def position(self) -> int:
        """Bytes of the file that were read."""
        return self._file.tell()

    def pieces(self, offset: int = 0, line: int = 0) -> Iterator[Piece]:
        """Its pieces from a place on that the `end` and `line` of one gave. An empty document is a piece of no bytes.

        Raises:
            UserError: it is cut off or damaged, binary, no UTF-8, or a line of it is none of JSONL.
            RunError: it has changed since it was found.
        """
        if self.is_lines:
            for each in self._lines(self._chunks(offset), offset, line):
                yield from self._document(each)
        else:
            yield from self._cut(self._chunks(offset), offset)
        self._check_unchanged()

    def lines(self, blank: bool = True) -> Iterator[Line]:
        """The lines as they are, whatever they hold; `blank`: also those that hold nothing, which JSONL passes over.

        Raises:
            UserError: it is cut off or damaged, or a line is longer than 16 MiB. RunError: as `pieces`.
        """
        yield from self._lines(self._chunks(0), 0, 0, blank)
        self._check_unchanged()

    def chunks(self) -> Iterator[bytes]:
        """The decompressed content, 256 KiB of it at a time. Raises as `lines`."""
        yield from self._chunks(0)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        found = os.fstat(self._file.fileno())
        if self.source.identity.count(" ") and self.source.identity != f"{found.st_size} {found.st_mtime_ns}":
            raise RunError(f"{self._called}: it was changed while it was read")

    def _check_other(self) -> None:
        self._file.seek(0)
        start = self._read(max(map(len, OTHERS)))
        for first, name in OTHERS.items():
            if start.startswith(first):
                raise UserError(f"{self._called}: it is {name}; it needs text in UTF-8 or JSONL, plain, gzip or zstd")

    def _holds_lines(self) -> bool:
        path = Path(self.source.path)
        suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
        if suffix.lower() in LINES:
            return True
        head, seen = b"", 0
        for chunk in self._chunks(0):
            head = (head + chunk).removeprefix(BYTE_ORDER_MARK).lstrip()
            seen += len(chunk)
            # What shows that the first line is none of JSONL, or ends it.
            if seen > LONGEST_LINE or (head and not head.startswith(b"{")) or b"\n" in head:
                break
        if not head.startswith(b"{"):
            return False
        try:
            found = json.loads(head.partition(b"\n")[0].decode())
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and bool(found)

    def _cut(self, chunks: Iterator[bytes], offset: int) -> Iterator[Piece]:
        data, start = b"", 0
        for chunk in chunks:
            data, start = data[start:] + chunk, 0
            if offset == 0 and data.startswith(BYTE_ORDER_MARK):
                start = offset = len(BYTE_ORDER_MARK)
            while len(data) - start > LONGEST_PIECE:
                end = _piece_end(data, start)
                yield self._text(data[start:end], False, offset)
                offset += end - start
                start = end
        if len(data) > start:
            yield self._text(data[start:], True, offset)

    def _text(self, text: bytes, last: bool, offset: int) -> Piece:
        zero = text.find(0)
        try:
            text[: zero if zero >= 0 else None].decode()
        except UnicodeDecodeError as error:
            binary = "it is binary: " if zero >= 0 else ""
            place = f"{binary}byte {offset + error.start}{self._of} is not UTF-8"
            raise UserError(f"{self._called}: {place}; it needs text in UTF-8") from error
        if zero >= 0:
            raise UserError(f"{self._called}: it is binary: byte {offset + zero}{self._of} is zero; it needs text")
        return Piece(text, last, offset + len(text), 0)

    @property
    def _of(self) -> str:
        return f" of what {self.compression} holds" if self.compression and not self.source.kept else ""

    def _lines(self, chunks: Iterator[bytes], offset: int, line: int, blank: bool = False) -> Iterator[Line]:
        begun: list[bytes] = []
        length = 0
        for chunk in chunks:
            if not blank and not length and chunk.isspace() and b"\n" in chunk:
                # A small file can hold billions of empty lines.
                skipped = chunk.rfind(b"\n") + 1
                line, offset, chunk = line + chunk.count(b"\n"), offset + skipped, chunk[skipped:]
            first, *others = chunk.split(b"\n")
            begun.append(first)
            length += len(first)
            for other in others:
                self._check_length(length, line)
                line, offset = line + 1, offset + length + 1
                yield Line(b"".join(begun), offset, line)
                begun, length = [other], len(other)
            self._check_length(length, line)
        if length:
            yield Line(b"".join(begun), offset + length, line + 1)

    def _check_length(self, length: int, line: int) -> None:
        if length > LONGEST_LINE:
            raise UserError(
                f"{self._called}: line {line + 1} is longer than {size(LONGEST_LINE)}; it needs shorter documents, "
                "or to be a text file"
            )

    def _document(self, each: Line) -> Iterator[Piece]:
        data, end, line = each
        if line == 1:
            data = data.removeprefix(BYTE_ORDER_MARK)
        if not data.strip():
            return
        where = f"{self._called}: line {line}"
        try:
            found = json.loads(data.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 (its byte {error.start})") from error
        except (ValueError, RecursionError) as error:
            words = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
            raise UserError(f"{where} is no JSON: {words}") from error
        if not isinstance(found, dict):
            raise UserError(f'{where} is no JSON object; it needs one with the field "{self.field}"')
        if self.field not in found:
            there = ", ".join(shown(key) for key in itertools.islice(found, 5))
            raise UserError(f"{where} has no field {shown(self.field)}: --field names another one (it has {there})")
        text = found[self.field]
        if not isinstance(text, str):
            raise UserError(f"{where}: the field {shown(self.field)} is {_json_type(text)}; it needs a string")
        try:
            yield Piece(text.encode(), True, end, line)
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: the text holds half of a surrogate pair, which is no character") from error

    def _chunks(self, offset: int) -> Iterator[bytes]:
        """The decompressed content from a place on."""
        self._file.seek(0)
        if self.compression is None:
            self._file.seek(offset)
            chunks = iter(lambda: self._read(CHUNK_BYTES), b"")
            skipped = offset
        else:
            chunks = self._gunzipped() if self.compression == "gzip" else self._unzstd()
            skipped = 0
        for chunk in chunks:
            if skipped < offset:
                skipped += len(chunk)
                if skipped <= offset:
                    continue
                chunk, skipped = chunk[offset - skipped :], offset
            yield from (chunk[start : start + CHUNK_BYTES] for start in range(0, len(chunk), CHUNK_BYTES))

    def _read(self, length: int) -> bytes:
        try:
            return self._file.read(length)
        except OSError as error:
            raise RunError(f"{self._called}: {reason(error)}") from error

    def _gunzipped(self) -> Iterator[bytes]:
        with gzip.GzipFile(fileobj=self._file) as file:
            while chunk := self._unpacked(file.read, CHUNK_BYTES):
                yield chunk

    def _unzstd(self) -> Iterator[bytes]:
        decompressor = zstandard.ZstdDecompressor()
        frame, data = None, b""
        while data or (data := self._read(ZSTD_INPUT_BYTES)):
            if frame is None:
                frame = decompressor.decompressobj()
            chunk = self._unpacked(frame.decompress, data)
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
            yield chunk
        if frame is not None:
            raise self._cut_off()

    def _cut_off(self) -> UserError:
        place = f"its {self.compression} data goes on after its last byte, {self.position - 1}"
        return UserError(f"{self._called}: it is cut off: {place}")

    def _unpacked(self, call, argument) -> bytes:
        try:
            return call(argument)
        except EOFError as error:
            raise self._cut_off() from error
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            words = str(error).partition("\n")[0]
            raise UserError(
                f"{self._called}: its {self.compression} data is damaged near byte {self.position}: {words}"
            ) from error
        except OSError as error:
            raise RunError(f"{self._called}: {reason(error)}") from error


def _compression(first: bytes) -> str | None:
    if first.startswith(GZIP):
        return "gzip"
    return "zstd" if first.startswith(ZSTD) or SKIPPABLE.match(first) else None


def _piece_end(data: bytes, start: int) -> int:
    """Where a piece ends that more than LONGEST_PIECE bytes follow from its start on."""
    least, most = start + PIECE_BYTES, start + LONGEST_PIECE
    paragraph = _PARAGRAPH.search(data, least, most)
    if paragraph:
        return paragraph.end()
    line = data.find(b"\n", least, most)
    if line >= 0:
        return line + 1
    space = data.find(b" ", least, most)
    if space >= 0:
        return space
    # Not within a character; what is none has no beginning to be found.
    return next((end for end in range(most, most - 4, -1) if data[end] & 0xC0 != 0x80), most)


def _json_type(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
