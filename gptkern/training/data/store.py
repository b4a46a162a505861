"""The tokens that a training reads: a folder of shards with its manifest, or an array in memory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from gptkern.formatting import shown, size
from gptkern.training.data.plain_files import is_plain, open_plain
from gptkern.training.data.rows import Part, Rows
from gptkern.training.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from gptkern.training.data.loader import Batch, Windows
    from gptkern.training.data.tokenizers import Tokenizer

MANIFEST = "manifest.json"
FORMAT, VERSION = "gptkern-tokens", 1
SPLITS = ("train", "validation")
MOST_MANIFEST_BYTES = 64 * 2**20
MOST_TOKENS = 2**48
MOST_VOCABULARY = 2**31


class Tokens(Protocol):
    """Token ids in their order. Threads may share it."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from start to stop, (stop - start,), of an integer type; not to be written to."""
        ...


class Shuffled(Protocol):
    """The endless, shuffled sequence of rows that a training reads, each of which can be computed alone."""

    def part(self, update: int, batch: int, first: int, rows: int) -> Part:
        """Of an update of `batch` rows those from `first` on."""
        ...


class InOrder(Protocol):
    """The rows of a held-out part, in their order."""

    def batches(self, rows: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """All of them, at most so many rows at a time; `tokens` are those of the batch."""
        ...


class Source(Protocol):
    """What a training reads: a `Store` of text, or one of examples (`example_rows.ExampleStore`).

    Attributes:
        tokenizer: of its ids. name: where they come from, for people. fingerprint: 64 hexadecimal digits, other ones
            for other ids, another split or another vocabulary. amount: of both splits, in words. about: what a
            checkpoint's about.json says of the data, beside name and fingerprint.
    """

    tokenizer: Tokenizer
    name: str
    fingerprint: str

    @property
    def amount(self) -> str: ...

    @property
    def about(self) -> dict[str, Any]: ...

    def rows(self, length: int, seed: int, full: bool = False) -> Shuffled:
        """Of at most `length` ids; `full`: of as many, padded where there are fewer. UserError: there is no row."""
        ...

    def held_out(self, length: int, most: int | None = None) -> InOrder:
        """At most so many rows, evenly spread. Raises UserError where there is none."""
        ...


class ArrayTokens:
    """The ids of an array in memory, (tokens,), of integers: NumPy's, or a tensor on the CPU."""

    def __init__(self, array: Any):
        self.array = np.asarray(array)
        if self.array.ndim != 1 or self.array.dtype.kind not in "iu":
            raise ValueError(
                f"ArrayTokens got {self.array.dtype} of shape {self.array.shape}; it needs integers, (tokens,)"
            )

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from start to stop, (stop - start,).

        Raises:
            IndexError: there are none there.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        return self.array[start:stop]


class Store(NamedTuple):
    """What a training reads.

    Args:
        train, validation: the two splits. name: where they come from, for people.
        manifest: what the folder's manifest.json says; None where there is no folder.
        fingerprint: 64 hexadecimal digits, other ones for other ids, another split or another vocabulary.
    """

    train: Tokens
    validation: Tokens
    tokenizer: Tokenizer
    manifest: dict[str, Any] | None
    name: str
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path, option: str = "--data") -> Store:
        """The folder that `gptkern data` wrote. Every shard is held against the manifest; none is read whole.

        Args:
            option: what an error calls the folder.

        Raises:
            UserError: the folder has no manifest, or one that does not fit what is there.
        """
        folder = Path(folder)
        try:
            manifest = read_manifest(folder)
            splits, layout = _check(manifest)
            tokens = {name: _tokens(folder, splits[name], layout) for name in SPLITS}
            tokenizer = _tokenizer(folder, manifest)
        except UserError as error:
            raise UserError(f"{option} {shown(str(folder))}: {error}") from error
        return cls(*tokens.values(), tokenizer, manifest, folder.resolve().name, _fingerprint(manifest))

    @property
    def amount(self) -> str:
        return f"{len(self.train):,} tokens to train on, {len(self.validation):,} held out"

    @property
    def about(self) -> dict[str, Any]:
        return {}

    def rows(self, length: int, seed: int, full: bool = False) -> Rows:
        """The shuffled rows of the training split, every one of them of `length` ids. Raises as `Rows`."""
        return Rows(self.train, length, seed)

    def held_out(self, length: int, most: int | None = None) -> Windows:
        """The rows of the held-out split in order. Raises as `loader.Windows`."""
        from gptkern.training.data.loader import windows

        return windows(self.validation, length, most)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says, as it says it.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    if not folder.is_dir():
        raise UserError("it is a file; it needs a folder" if folder.exists() else "there is no such folder")
    if not (folder / MANIFEST).exists():
        raise UserError(f"it has no {MANIFEST}; it needs a folder that `gptkern data` wrote to its end")
    with open_plain(folder, MANIFEST) as file:
        found = os.fstat(file.fileno()).st_size
        if found > MOST_MANIFEST_BYTES:
            raise UserError(f"{MANIFEST} has {size(found)}; it needs {size(MOST_MANIFEST_BYTES)} at most")
        data = file.read()
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{MANIFEST} is no JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{MANIFEST} is no JSON object")
    return manifest


def _check(manifest: dict[str, Any]):
    """The entries of each split and the layout, of a manifest of which every value that is used is what it may be."""
    from gptkern.training.data.shards import DTYPES, MOST_FRAME_TOKENS, Layout

    _need(manifest, "format", lambda value: value == FORMAT, f'"{FORMAT}"')
    _need(manifest, "version", lambda value: _whole(value, VERSION, VERSION), f"{VERSION}, all that this gptkern reads")
    _need(manifest, "dtype", lambda value: isinstance(value, str) and value in DTYPES, " or ".join(DTYPES))
    _need(manifest, "vocab_size", lambda value: _whole(value, 1, MOST_VOCABULARY), "a whole number above 0")
    _need(manifest, "frame_tokens", lambda value: _whole(value, 1, MOST_FRAME_TOKENS), f"1 to {MOST_FRAME_TOKENS}")
    last = manifest["vocab_size"] - 1
    _need(manifest, "end_of_text", lambda value: value is None or _whole(value, 0, last), f"0 to {last}, or null")
    _need(manifest, "splits", lambda value: isinstance(value, dict), "an object")
    splits, seen = {}, set()
    for name in SPLITS:
        split = _need(manifest["splits"], name, lambda value: isinstance(value, dict), "an object", "splits.")
        place = f"splits.{name}."
        _need(split, "tokens", lambda value: _whole(value, 0, MOST_TOKENS), "a whole number", place)
        _need(split, "shards", lambda value: isinstance(value, list), "a list", place)
        for index, entry in enumerate(split["shards"]):
            at = f"{place}shards[{index}]"
            if not isinstance(entry, dict):
                raise UserError(f"{MANIFEST}: {at} is {_said(entry)}; it needs an object")
            _need(entry, "file", is_plain, "a file's name without a folder", f"{at}.")
            _need(entry, "tokens", lambda value: _whole(value, 1, MOST_TOKENS), "a whole number above 0", f"{at}.")
            _need(entry, "bytes", lambda value: _whole(value, 1, 2**62), "a whole number above 0", f"{at}.")
            _need(entry, "seek_table_sha256", lambda value: isinstance(value, str), "a digest", f"{at}.")
            if entry["file"].casefold() in seen:
                raise UserError(f"{MANIFEST}: {at}.file is {_said(entry['file'])}, which stands there twice")
            seen.add(entry["file"].casefold())
        total = sum(entry["tokens"] for entry in split["shards"])
        _need(split, "tokens", lambda value, total=total: value == total, f"{total}, the sum of its shards", place)
        splits[name] = split["shards"]
    return splits, Layout(manifest["dtype"], manifest["vocab_size"], manifest["frame_tokens"])


def _need(values: dict[str, Any], key: str, fits, needs: str, place: str = "") -> Any:
    if key not in values:
        raise UserError(f"{MANIFEST} has no {place}{key}; it needs {needs}")
    if not fits(values[key]):
        raise UserError(f"{MANIFEST}: {place}{key} is {_said(values[key])}; it needs {needs}")
    return values[key]


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _said(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of more than 64 bits"  # Python refuses to write the longest ones
    return shown(json.dumps(value))


def _tokens(folder: Path, entries: list[dict[str, Any]], layout) -> Tokens:
    from gptkern.training.data.shards import ShardTokens, open_shard

    return ShardTokens([open_shard(folder, entry, layout) for entry in entries], layout.dtype)


def _tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    from gptkern.training.data.tokenizers import load_tokenizer

    _need(manifest, "tokenizer", lambda value: isinstance(value, dict), "an object")
    tokenizer = load_tokenizer(folder, manifest["tokenizer"])
    if tokenizer.vocab_size != manifest["vocab_size"]:
        raise UserError(
            f"{MANIFEST}: vocab_size is {manifest['vocab_size']}, and the tokenizer has {tokenizer.vocab_size} tokens"
        )
    if tokenizer.end_of_text != manifest["end_of_text"]:
        raise UserError(
            f"{MANIFEST}: end_of_text is {_said(manifest['end_of_text'])}, and the tokenizer's is "
            f"{_said(tokenizer.end_of_text)}"
        )
    return tokenizer


def _fingerprint(manifest: dict[str, Any]) -> str:
    used = {key: manifest[key] for key in ("dtype", "vocab_size", "end_of_text")}
    used["splits"] = {
        name: [(entry["tokens"], entry["seek_table_sha256"]) for entry in manifest["splits"][name]["shards"]]
        for name in SPLITS
    }
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode()).hexdigest()
