"""Reading a checkpoint, which may be a stranger's or a damaged one: gptkern/training/checkpoints.py writes it.

    step-00000500/checksums.json                     size and sha256 of each other file
                  about.json                         what is no tensor
                  tensors-00001-of-00002.safetensors what the first of two processes held

A file of tensors is 8 bytes of length, a JSON header of that length, and the tensors' bytes. The header says dtype,
shape and place of each, and under DCP_SHARDING_INFO where in the whole tensor it begins. Nothing in any file can run
code. What a header claims has to be in the file, byte for byte, before anything is allocated or read; the parts of
several processes have to make up whole tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptkern.formatting import count, shown
from gptkern.training.errors import UserError
from gptkern.training.tensor_files import MOST_DIMENSIONS

ABOUT, CHECKSUMS = "about.json", "checksums.json"
FORMAT, VERSION = "gptkern-checkpoint", 1
FOLDER = re.compile(r"step-(\d{8,18})")
TENSORS = re.compile(r"tensors-\d{5}-of-\d{5}\.safetensors")
SHARDING = "DCP_SHARDING_INFO"  # what torch.distributed.checkpoint's safetensors storage calls it

LARGEST_JSON = 2**24  # bytes of JSON that are parsed; a tensor's entry in a header takes about 200
BLOCK = 2**20  # bytes that are hashed or written at once, without the interpreter's lock

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Chunk(NamedTuple):
    """A part of a tensor, as a file holds it."""

    file: str
    dtype: torch.dtype
    offsets: tuple[int, ...]  # of its first element in the whole tensor
    sizes: tuple[int, ...]


class Checkpoint:
    """One checkpoint's folder. Nothing is read before it is asked for.

    Raises, in each of its methods and properties:
        UserError: a file is missing, damaged, or not as it has to be; the message names it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._files: dict[str, dict[str, Any]] | None = None
        self._step = -1

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r})"

    @staticmethod
    def is_one(folder: str | os.PathLike) -> bool:
        """Whether a folder looks like a checkpoint, whole or damaged."""
        return (Path(folder) / CHECKSUMS).is_file()

    @property
    def step(self) -> int:
        """The updates that had been done."""
        self.files()
        return self._step

    @property
    def about(self) -> dict[str, Any]:
        """What was saved beside the tensors: JSON."""
        self._listed(ABOUT)
        return self._object(ABOUT)

    def files(self) -> dict[str, dict[str, Any]]:
        """{file: {"bytes": its size, "sha256": of its bytes}} of all files but checksums.json, as that one says."""
        if self._files is None:
            content = self._object(CHECKSUMS, canonical=True)
            form, version, step, files = (content.pop(key, None) for key in ("format", "version", "step", "files"))
            if form != FORMAT or type(version) is not int or version != VERSION:
                got = f"it has format {shown(repr(form))}, version {shown(repr(version))}"
                raise self._wrong(CHECKSUMS, f"{got}; this gptkern reads {FORMAT!r}, version {VERSION}")
            if content:
                raise self._wrong(CHECKSUMS, f"nobody knows its {shown(min(content))}")
            if not _is_size(step):
                raise self._wrong(CHECKSUMS, f"step is {shown(repr(step))}; it needs a whole number")
            if not isinstance(files, dict) or ABOUT not in files:
                raise self._wrong(CHECKSUMS, f"it needs the files, {ABOUT} among them")
            for name, entry in files.items():
                if name != ABOUT and not TENSORS.fullmatch(name):
                    raise self._wrong(CHECKSUMS, f"{shown(name)} is the name of none of a checkpoint's files")
                if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"} or not _is_size(entry["bytes"]):
                    raise self._wrong(CHECKSUMS, f"{name} needs bytes and sha256")
            self._files, self._step = files, step
        return self._files

    def verify(self) -> None:
        """Reads every byte: the files are those that were written, no more, no fewer and not changed.

        Raises:
            UserError: names the first file that is not, and how.
        """
        files = self.files()
        named = FOLDER.fullmatch(self.folder.name)
        if named and int(named[1]) != self.step:
            raise self._wrong(CHECKSUMS, f"it is of step {self.step}, in the folder of step {int(named[1])}")
        with self._reading(""):
            there = set(os.listdir(self.folder)) - {CHECKSUMS}
        for name in sorted(there - files.keys()):
            raise self._wrong(shown(name), f"it is none of the checkpoint's files, of which {CHECKSUMS} has the list")
        for name in sorted(files):
            self._listed(name)
        for name, entry in sorted(files.items()):
            with self._reading(name), open(self.folder / name, "rb") as file:
                digest = hashlib.sha256()
                while block := file.read(BLOCK):
                    digest.update(block)
            if digest.hexdigest() != entry["sha256"]:
                raise self._wrong(name, f"its bytes are not those that were written (sha256, {CHECKSUMS})")
        self._object(ABOUT)
        self.names()

    def names(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """{name: (dtype, shape)} of all tensors, from the files' headers, whose every claim was checked."""
        return {name: (chunks[0].dtype, _whole(chunks)) for name, chunks in self.chunks().items()}

    def chunks(self) -> dict[str, list[Chunk]]:
        """The parts that make up each tensor."""
        tensors: dict[str, list[Chunk]] = {}
        for name in sorted(self.files().keys() - {ABOUT}):
            self._listed(name)
            for tensor, chunk in self.header(name).items():
                tensors.setdefault(tensor, []).append(chunk)
        for name, chunks in tensors.items():
            reason = _not_whole(chunks)
            if reason:
                raise UserError(f"{printable(self.folder)}: the parts of {shown(name)} {reason}")
        return tensors

    def read(self, into: dict[str, torch.Tensor], prefix: str = "") -> None:
        """Copies the tensors named `prefix + key` into those of `into`, in place: whole ones or shards of DTensors,
        whatever the number of processes that saved them; each process for itself.

        Raises:
            UserError: a tensor is not there, or has another dtype or shape; nothing was changed then. Or a file cannot
                be read to its end.
        """
        chunks = self.chunks()
        wanted = {prefix + key: tensor for key, tensor in into.items()}
        self._fit({name: (of[0].dtype, _whole(of)) for name, of in chunks.items()}, wanted)
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        metadata, places = _described({name: chunks[name] for name in wanted}, self.folder)
        # torch.distributed.checkpoint.load does the same, after it asked the other processes whether they are ready.
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = _reader(self.folder)
        reader.storage_data = places
        with self._reading(""), torch.no_grad():
            planner.set_up_planner(wanted, metadata, is_coordinator=True)
            reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()

    def header(self, name: str) -> dict[str, Chunk]:
        """The parts that one file of tensors holds.

        Raises:
            UserError: its header is no safetensors header, or claims what the file does not hold.
        """
        with self._reading(name), open(self.folder / name, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > total - 8:
                raise self._wrong(name, f"it has {count(total, 'byte')}, and its header would need {8 + length}")
            text = file.read(length) if length <= LARGEST_JSON else b""
        if length > LARGEST_JSON:
            raise self._wrong(name, f"its header has {length} bytes; it needs at most {LARGEST_JSON}")
        entries = self._parsed(name, text)
        about = entries.pop("__metadata__", {})
        sharding = about.get(SHARDING) if isinstance(about, dict) else None
        offsets = self._parsed(name, sharding) if isinstance(sharding, str) else {}
        chunks, spans = {}, []
        for tensor, entry in entries.items():
            chunk, span = _chunk(name, entry, offsets.get(tensor))
            if chunk is None:
                raise self._wrong(name, f"its header is wrong about {shown(tensor)}")
            chunks[tensor] = chunk
            spans.append(span)
        end = 0
        for start, stop in sorted(spans):
            if start != end:
                raise self._wrong(name, f"its tensors do not follow one another: one begins at {start}, not at {end}")
            end = stop
        if end != total - 8 - length:
            raise self._wrong(name, f"its header is of {end} bytes of tensors, and it holds {total - 8 - length}")
        return chunks

    def _fit(self, there: dict[str, tuple], wanted: dict[str, torch.Tensor]) -> None:
        wrong = []
        for name, tensor in wanted.items():
            needs = f"it needs {tensor.dtype}, {tuple(tensor.shape)}"
            if name not in there:
                wrong.append(f"{shown(name)} is not in it; {needs}")
            elif there[name] != (tensor.dtype, tuple(tensor.shape)):
                wrong.append(f"{shown(name)} is {there[name][0]}, {there[name][1]}; {needs}")
            elif tensor.is_meta:
                raise ValueError(f"Checkpoint.read: {name} is on meta; it needs memory to be read into")
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise UserError(f"{printable(self.folder)}: {wrong[0]}{more}")

    def _listed(self, name: str) -> None:
        """The file is there, is a plain file, and has the size that checksums.json says."""
        needs = self.files()[name]["bytes"]
        size = self._size(name)
        if size != needs:
            raise self._wrong(name, f"it has {count(size, 'byte')}; it needs {needs}")

    def _size(self, name: str) -> int:
        with self._reading(name):
            found = os.lstat(self.folder / name)
        # No link, which could lead anywhere, and no pipe, on which reading would wait.
        if not stat.S_ISREG(found.st_mode):
            raise self._wrong(name, "it is no plain file")
        return found.st_size

    def _object(self, name: str, canonical: bool = False) -> dict[str, Any]:
        if self._size(name) > LARGEST_JSON:
            raise self._wrong(name, f"it is larger than {LARGEST_JSON} bytes")
        with self._reading(name):
            text = (self.folder / name).read_bytes()
        content = self._parsed(name, text)
        if canonical and dumped(content) != text:
            raise self._wrong(name, "it is not as it was written")
        return content

    def _parsed(self, name: str, text: str | bytes) -> dict[str, Any]:
        try:
            content = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise self._wrong(name, f"it is no JSON ({shown(str(error))})") from error
        if not isinstance(content, dict):
            raise self._wrong(name, "it is no JSON object")
        return content

    def _reading(self, name: str) -> _Reading:
        return _Reading(self, name)

    def _wrong(self, name: str, what: str) -> UserError:
        return UserError(f"{printable(self.folder / name)}: {what}")


class _Reading:
    """What goes wrong while a file is read is a UserError that names it."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.checkpoint, self.name = checkpoint, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, FileNotFoundError):
            raise self.checkpoint._wrong(self.name, "it is not there") from error
        if isinstance(error, Exception) and not isinstance(error, UserError):
            reason = getattr(error, "strerror", None) or str(error)
            raise self.checkpoint._wrong(self.name, f"it cannot be read: {shown(reason)}") from error


def dumped(content: Any) -> bytes:
    """JSON as checksums.json is written, a row a file: a changed byte that is still JSON is not what this writes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def printable(path: Any) -> str:
    """A path on one line, all of it: what tells files apart is at its end."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: two readers of one that is there twice may take different ones."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key is there twice")
    return content


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _sizes(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(map(_is_size, value)) else None


def _chunk(file: str, entry: Any, sharding: Any) -> tuple[Chunk | None, tuple[int, int]]:
    """What a header says of one tensor, and where its bytes are; None where that is not possible."""
    wrong = None, (0, 0)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return wrong
    shape, span = _sizes(entry["shape"]), _sizes(entry["data_offsets"])
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if shape is None or span is None or dtype is None or len(span) != 2 or len(shape) > MOST_DIMENSIONS:
        return wrong
    if span[1] - span[0] != math.prod(shape) * dtype.itemsize:
        return wrong
    offsets = (0,) * len(shape)
    if sharding is not None:
        offsets = _sizes(sharding.get("saved_offsets")) if isinstance(sharding, dict) else None
    if offsets is None or len(offsets) != len(shape) or any(a + b >= 2**63 for a, b in zip(offsets, shape)):
        return wrong
    return Chunk(file, dtype, offsets, shape), (span[0], span[1])


def _whole(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    """The shape of the tensor that the parts make up."""
    ends = [[offset + size for offset, size in zip(chunk.offsets, chunk.sizes)] for chunk in chunks]
    return tuple(map(max, zip(*ends)))


def _not_whole(chunks: Sequence[Chunk]) -> str | None:
    """Why parts do not make up a tensor, each element once; None where they do."""
    if len({(chunk.dtype, len(chunk.sizes)) for chunk in chunks}) > 1:
        return "differ in dtype or in their number of dimensions"
    if len({chunk.offsets for chunk in chunks}) < len(chunks):
        return "overlap"
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(_whole(chunks)):
        return "do not add up to the whole"
    if len(chunks) == 1:
        return None
    # Sorted along one dimension, a part is held against those alone that have not ended where it begins.
    dimension = max(range(len(chunks[0].sizes)), key=lambda d: len({chunk.offsets[d] for chunk in chunks}))
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[dimension]):
        start = chunk.offsets[dimension]
        active = [other for other in active if other.offsets[dimension] + other.sizes[dimension] > start]
        if any(_overlap(chunk, other) for other in active):
            return "overlap"
        active.append(chunk)
    return None


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(x < y + m and y < x + n for x, n, y, m in zip(a.offsets, a.sizes, b.offsets, b.sizes))


def _described(tensors: dict[str, list[Chunk]], folder: Path) -> tuple[Any, dict[Any, Any]]:
    """The parts in the words of torch.distributed.checkpoint: its Metadata, and where each is."""
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described, places = {}, {}
    for name, chunks in tensors.items():
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=chunks[0].dtype),
            torch.Size(_whole(chunks)),
            [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in chunks],
        )
        for chunk in chunks:
            places[MetadataIndex(name, chunk.offsets)] = _Place(str(folder / chunk.file))
    return Metadata(described), places


class _Place(NamedTuple):
    relative_path: str


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))
