"""Tensors and JSON of anybody's files: what a file says of itself is checked before memory of that size is taken.

Tensors are in safetensors files, which hold data and no code. Their header is JSON, with the dtype, the shape and the
place of each tensor; the library `safetensors` refuses what overlaps, leaves a hole or reaches beyond the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.training.errors import reason

# A GPT of 96 layers has 1155 tensors: a header of some 150 kB.
MOST_HEADER_BYTES = 16 * 2**20
MOST_JSON_BYTES = 16 * 2**20
MOST_DIMENSIONS = 64  # what PyTorch computes with; the product of millions of sizes is a number of megabytes
_LENGTH = 8  # of a safetensors file: the header's length, little endian


class Header(NamedTuple):
    """What a file says of a tensor: the dtype as safetensors writes it ("F32", "BF16", …), and the shape."""

    dtype: str
    shape: tuple[int, ...]


class Tensors:
    """Tensors by their names. `headers` is known at once, and a tensor is read when it is asked for."""

    headers: dict[str, Header]
    bytes: int  # of the files

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU. Raises ValueError where the file is damaged there."""
        raise NotImplementedError


class SafetensorsFiles(Tensors):
    """The tensors of safetensors files in one folder.

    Args:
        names: the files' names. where: of each tensor the file that has to hold it, as an index says; None for wherever
            it is.

    Raises:
        ValueError: a file is none, is cut off, or does not hold what it has to; the message names it.
    """

    def __init__(self, folder: Path, names: Iterable[str], where: dict[str, str] | None = None):
        self.headers, self.bytes, self._files = {}, 0, {}
        for name in names:
            size, file = open_safetensors(folder / name)
            self.bytes += size
            for tensor in file.keys():  # noqa: SIM118, it is no dict
                if tensor in self._files or (where is not None and where.get(tensor) != name):
                    raise ValueError(f"{shown(name)} holds {shown(tensor)}, which is not its place")
                part = file.get_slice(tensor)
                self.headers[tensor] = Header(str(part.get_dtype()), tuple(part.get_shape()))
                self._files[tensor] = file
        for tensor, name in (where or {}).items():
            if tensor not in self._files:
                raise ValueError(f"{shown(tensor)} not found in {shown(name)}")

    def read(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def open_safetensors(path: Path) -> tuple[int, Any]:
    """(bytes of the file, the open file), of a file whose header has been checked.

    Raises:
        ValueError: it is no such file, or cut off.
    """
    from safetensors import SafetensorError, safe_open

    name = shown(path.name)
    size = regular_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
    if size < _LENGTH or length > size - _LENGTH:
        raise ValueError(
            f"{name} cannot be read, it may be cut off: it has {size} bytes and a header of {length}, or it is no "
            "safetensors file"
        )
    if length > MOST_HEADER_BYTES:
        raise ValueError(
            f"{name} has a header of {formatting.size(length)}; it needs one of at most "
            f"{formatting.size(MOST_HEADER_BYTES)}"
        )
    try:
        return size, safe_open(str(path), "pt")
    except SafetensorError as error:
        raise ValueError(f"{name} cannot be read, it may be cut off: {error}") from error
    except RuntimeError as error:
        # PyTorch maps the whole file.
        what = f"{name} has {formatting.size(size)}, of which no view in memory can be had"
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from error


def regular_size(path: Path) -> int:
    """Bytes of a file. Raises ValueError where it is not there, or none: a pipe has no end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{shown(path.name)}: {reason(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{shown(path.name)} is no file")
    return found.st_size


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where there is none, or it is larger than any such file."""
    name = shown(path.name)
    size = regular_size(path)
    if size > MOST_JSON_BYTES:
        raise ValueError(
            f"{name} has {formatting.size(size)}; it needs to be of at most {formatting.size(MOST_JSON_BYTES)}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{name}: {reason(error)}") from error
    except RecursionError as error:
        raise ValueError(f"{name} is no JSON: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {type(content).__name__}; it needs an object")
    return content


def said(value: Any) -> str:
    """A value of a JSON file as an error repeats it."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"
    return shown(json.dumps(value))
