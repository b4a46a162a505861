"""Weights without loss in fewer bytes: byte planes under zstd.

Of trained weights the exponents are alike and the digits of the mantissas are not. So the bits of each element are
turned by one to the left, which puts the sign at the end and all of the exponent in front (bfloat16 and float32), and
byte k of every element of a tensor stands together: plane 0, the exponents, shrinks to about a third, and the
others stay as they are, unless the values have fewer digits than their dtype.

    bfloat16   seeeeeee emmmmmmm  ->  plane 0 eeeeeeee   plane 1 mmmmmmms

The file is a safetensors file: for each tensor and plane a uint8 tensor "name/0", "name/1", … of frames in zstd's
own format, one after another, each with the checksum of its FRAME bytes (the last of a plane has fewer). Its metadata:

    format    "gptkern-byte-planes"
    version   "1"
    tensors   JSON: name -> {"dtype": "BF16", "shape": […], "frames": [[bytes of each frame of plane 0], …]}
    sha256    of that JSON

Sources: Hershcovitch et al., "ZipNN: Lossless Compression for AI Models", 2024 (arXiv:2411.05239), which groups the
bytes of weights so; RFC 8878 (zstd).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from gptkern.formatting import shown
from gptkern.training.tensor_files import MOST_DIMENSIONS, Header, Tensors, open_safetensors

FORMAT, VERSION = "gptkern-byte-planes", "1"
FRAME = 2**20  # bytes of a plane

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_WORDS = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_BITS = {2: torch.int16, 4: torch.int32}  # torch's integers of the same size


class Sizes(NamedTuple):
    """Bytes of the tensors as they are, and of the file that holds their planes."""

    raw: int
    stored: int

    @property
    def ratio(self) -> float:
        return self.stored / self.raw if self.raw else math.nan


def save(tensors: dict[str, torch.Tensor], path: Path) -> Sizes:
    """Write the byte planes of the tensors to a file, whatever bits they hold.

    Args:
        tensors: of any shapes, bfloat16, float16 or float32, on the CPU.

    Raises:
        TypeError: a tensor is of another dtype. OSError: the file cannot be written.
    """
    from safetensors.numpy import save_file

    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise TypeError(f"byte planes: {name} is {tensor.dtype}; it needs bfloat16, float16 or float32")
    planes, entries = {}, {}
    for name, tensor in tensors.items():
        compressed = _compressed(tensor.detach())
        for number, frames in enumerate(compressed):
            planes[f"{name}/{number}"] = np.frombuffer(b"".join(frames), np.uint8)
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "frames": [[len(frame) for frame in frames] for frames in compressed],
        }
    content = json.dumps(entries, separators=(",", ":"))
    digest = hashlib.sha256(content.encode()).hexdigest()
    save_file(planes, str(path), {"format": FORMAT, "version": VERSION, "tensors": content, "sha256": digest})
    raw = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Sizes(raw, path.stat().st_size)


def _compressed(tensor: torch.Tensor) -> list[list[bytes]]:
    """The frames of each plane of a tensor; of what is in between, one frame's is in memory."""
    import zstandard

    # Every match costs more bits than the exponents that it stands for: with a table of 64 entries and 7 bytes hardly
    # one is found, but in what does repeat; 0.322 of a trained model's exponents against 0.352 at zstd's level 1.
    parameters = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=20,
        target_length=0, write_checksum=True, write_content_size=True,
    )  # fmt: skip
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    itemsize = tensor.element_size()
    flat = tensor.contiguous().view(-1).view(_BITS[itemsize]).numpy()  # (elements,)
    frames: list[list[bytes]] = [[] for _ in range(itemsize)]
    for start in range(0, len(flat), FRAME):
        words = flat[start : start + FRAME].view(_WORDS[itemsize].newbyteorder("=")).astype(_WORDS[itemsize])
        words = (words << 1) | (words >> (8 * itemsize - 1))
        columns = words.view(np.uint8).reshape(-1, itemsize)  # (elements, bytes), the last byte is the highest
        for number in range(itemsize):
            frames[number].append(compressor.compress(np.ascontiguousarray(columns[:, itemsize - 1 - number])))
    return frames


class BytePlanes(Tensors):
    """The tensors of a file that `save` wrote. Nothing is taken for more than one of its frames before it is checked.

    Raises:
        ValueError: it is no such file, or what it says of its tensors does not fit what it holds.
    """

    def __init__(self, path: Path):
        self._name = shown(path.name)
        self.bytes, self._file = open_safetensors(path)
        self._entries = self._described(self._file.metadata() or {})
        self.headers = {name: Header(entry["dtype"], tuple(entry["shape"])) for name, entry in self._entries.items()}

    def _described(self, metadata: dict[str, str]) -> dict[str, Any]:
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{self._name} holds no byte planes")
        if metadata.get("version") != VERSION:
            raise ValueError(f"{self._name} is of version {shown(str(metadata.get('version')))}; it needs {VERSION}")
        content = metadata.get("tensors", "")
        if hashlib.sha256(content.encode()).hexdigest() != metadata.get("sha256"):
            raise ValueError(f"{self._name} is damaged: its list of tensors is not the one that was written")
        held = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118, it is no dict
        held = {name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in held.items()}
        try:
            entries = json.loads(content)
            expected = {}
            for name, entry in entries.items():
                for number, frames in enumerate(_checked(entry)):
                    expected[f"{name}/{number}"] = ("U8", (sum(frames),))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self._name}: its list of tensors says what no tensor is") from error
        for plane in expected.keys() | held.keys():
            if expected.get(plane) != held.get(plane):
                raise ValueError(f"{self._name}: {shown(plane)} is not of the size that the list of tensors says")
        return entries

    def read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        dtype = _DTYPES[entry["dtype"]]
        itemsize = dtype.itemsize
        planes = [memoryview(self._file.get_tensor(f"{name}/{number}").numpy()) for number in range(itemsize)]
        tensor = torch.empty(entry["shape"], dtype=dtype)
        flat = tensor.view(-1).view(_BITS[itemsize]).numpy()  # (elements,), the tensor's memory
        ends = [0] * itemsize
        for index, start in enumerate(range(0, len(flat), FRAME)):
            part = flat[start : start + FRAME]
            columns = np.empty((len(part), itemsize), np.uint8)
            for number in range(itemsize):
                begin, ends[number] = ends[number], ends[number] + entry["frames"][number][index]
                frame = planes[number][begin : ends[number]]
                try:
                    columns[:, itemsize - 1 - number] = np.frombuffer(_decompressed(frame, len(part)), np.uint8)
                except ValueError as error:
                    place = f"frame {index} of plane {number} of {shown(name)}"
                    raise ValueError(f"{self._name}: {place} is damaged: {error}") from error
            words = columns.reshape(-1).view(_WORDS[itemsize])  # (elements,)
            part[:] = ((words >> 1) | (words << (8 * itemsize - 1))).astype(part.dtype, copy=False)
        return tensor


def _checked(entry: dict[str, Any]) -> list[list[int]]:
    """The bytes of each frame, of an entry that describes a tensor; a ValueError or TypeError of one that does not."""
    dtype, shape, frames = entry["dtype"], entry["shape"], entry["frames"]
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(entry)
    whole = all(
        type(number) is int and number >= 0 for number in [*shape, *(size for plane in frames for size in plane)]
    )
    elements = math.prod(shape)
    if not whole or len(frames) != _DTYPES[dtype].itemsize or elements >= 2**48:
        raise ValueError(entry)
    if any(len(plane) != -(-elements // FRAME) for plane in frames):
        raise ValueError(entry)
    return frames


def _decompressed(frame: memoryview, size: int) -> bytes:
    """The `size` bytes of a frame. Raises ValueError where it does not hold exactly these, with their checksum."""
    import zstandard

    try:
        found = zstandard.get_frame_parameters(frame)
        if found.content_size != size or not found.has_checksum:
            raise ValueError("it is of another size, or has no checksum")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
