"""Tokenizers: the bytes of a text, byte-pair encodings that are trained here, and any tokenizer.json of `tokenizers`.

A tokenizer.json may come from anybody. It is data: its size is limited before it is read, and what in it would make
preparing random or would let a text forge the end of a document is taken out of it (`_settled`). A special token that
stands in a text is encoded as the characters that it is written with.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from gptkern.formatting import shown, size
from gptkern.training.data.plain_files import open_plain
from gptkern.training.errors import UserError, reason

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# What other people's tokenizers end a text with, in the order in which they are looked for.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
BYTES = 256
FILE = "tokenizer.json"
# The largest in use have 256 thousand tokens and 33 MB.
MOST_TOKENS = 2**22
LARGEST_FILE = 2**26
# What replacements may make of a character, all of them together.
MOST_GROWTH = 1000
# Of a byte-pair encoding that is trained: the bytes and the end of a text, and one pair at least.
SMALLEST_TRAINED, LARGEST_TRAINED = BYTES + 2, 2**20
# `tokenizers` holds about 100 bytes for each character that it is given at once.
PART_CHARACTERS = 2**16


class Tokenizer:
    """Text to token ids and back.

    Args:
        kind: "bytes", or "file" for a tokenizer.json. name: for people: "bytes", "bpe of 8192".
        vocab_size: ids are below it. end_of_text: the id that follows every document; None where there is none.
    """

    def __init__(self, kind: str, name: str, vocab_size: int, end_of_text: int | None, text: str = ""):
        self.kind, self.name, self.vocab_size, self.end_of_text = kind, name, vocab_size, end_of_text
        self._text = text
        self._inner = _loaded(text) if kind == "file" else None
        self._byte_level = _is_byte_level(json.loads(text)) if kind == "file" else False

    @property
    def dtype(self) -> str:
        """The smallest of "uint16" and "uint32" that holds every id."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode(self, text: str | bytes) -> np.ndarray:
        """(tokens,) of `dtype`. No end of text is added, and none that is written in the text is read as one.

        Raises:
            UnicodeError: bytes that are not UTF-8, or surrogates; the kind "bytes" takes the surrogates that stand for
                bytes (PEP 383).
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[np.ndarray]:
        """`encode` of each, on all cores."""
        if self.kind == "bytes":
            return [np.frombuffer(_bytes(text), np.uint8).astype(np.uint16) for text in texts]
        parts, counts = [], []
        for text in texts:
            of_text = self._parts(text if isinstance(text, str) else text.decode())
            counts.append(len(of_text))
            parts += of_text
        for part in parts:
            # `tokenizers` says no more of a surrogate than that a type is wrong.
            part.encode()
        found = iter(_asked(self._inner.encode_batch_fast, parts, add_special_tokens=False, about=self.name))
        ids = []
        for count in counts:
            of_text = [np.array(next(found).ids, self.dtype) for _ in range(count)]
            ids.append(of_text[0] if count == 1 else np.concatenate(of_text))
            if self.end_of_text is not None and (ids[-1] == self.end_of_text).any():
                raise UserError(
                    f"the tokenizer ({self.name}) makes its end of text, {self.end_of_text}, of a text's own words; "
                    "it needs a token that no text can spell"
                )
        return ids

    def _parts(self, text: str) -> list[str]:
        """A long text cut where the ids stay the same: between a letter and the space before the next word."""
        if not self._byte_level:
            return [text]
        parts, start = [], 0
        while len(text) - start > PART_CHARACTERS:
            found = _BETWEEN_WORDS.search(text, start + PART_CHARACTERS)
            if found is None:
                break
            parts.append(text[start : found.end()])
            start = found.end()
        return [*parts, text[start:]]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 show as the replacement character, the end of a text as nothing."""
        decoder = self.decoder()
        if self.kind == "bytes" or self._byte_level_decoder:
            return "".join(map(decoder.feed, map(int, ids))) + decoder.end()
        return self._inner.decode([int(id) for id in ids if id != self.end_of_text], skip_special_tokens=False)

    def decoder(self) -> Decoder:
        """For ids that come one by one."""
        if self.kind == "bytes" or self._byte_level_decoder:
            return _BytesDecoder(self)
        return Decoder(self)

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes tokenizer.json into the folder, where the kind is "file"; returns what a manifest says of it.

        Raises:
            OSError: it cannot be written.
        """
        if self.kind == "bytes":
            return self.entry()
        data = self._text.encode()
        new = folder / f".{FILE}.new"
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / FILE)
        return self.entry()

    def entry(self) -> dict[str, Any]:
        """What `save` returns."""
        if self.kind == "bytes":
            return {"kind": "bytes"} | ({} if self.end_of_text is not None else {"end_of_text": False})
        return {"kind": "file", "file": FILE, "sha256": hashlib.sha256(self._text.encode()).hexdigest()}

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether a text has the same ids by both; a tokenizer.json that was written anew by another program counts.

        What surrounds a text with special tokens, and what makes text of ids, is not compared.
        """
        if self.kind == "bytes" or other.kind == "bytes":
            return self.entry() == other.entry()
        ours, theirs = json.loads(self._text), json.loads(other._text)
        decides = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        return all(ours.get(part) == theirs.get(part) for part in decides) and self.end_of_text == other.end_of_text

    @property
    def is_lossless(self) -> bool:
        """Whether any text comes back as it was; False where that is not known."""
        return self.kind == "bytes" or (self._byte_level and self._byte_level_decoder)

    def bytes_of(self, ids: np.ndarray) -> int:
        """Bytes of the text, in UTF-8, that ids stand for; the end of a text has none."""
        if self.kind == "bytes" or self._byte_level_decoder:
            return int(self._sizes[ids].sum())
        return len(self.decode(ids).encode())

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        """(vocab_size,), the bytes of each token."""
        return np.array([len(self._bytes_of(id)) for id in range(self.vocab_size)])

    @functools.cached_property
    def _byte_level_decoder(self) -> bool:
        return self.kind == "file" and _type(json.loads(self._text).get("decoder")) == "ByteLevel"

    def _bytes_of(self, id: int) -> bytes:
        """The bytes that a token stands for, of the bytes and of a byte-level decoder."""
        if id == self.end_of_text:
            return b""
        if self.kind == "bytes":
            return bytes([id]) if id < BYTES else b""
        token = self._inner.id_to_token(id) or ""
        letters = [bytes_by_letter().get(letter) for letter in token]
        return token.encode() if None in letters else bytes(letters)


class Decoder:
    """Text of ids that come one by one: only whole characters come out, and together they are `decode`'s.

    Of byte-level tokenizers for any ids. Of others for those of a text: what a token adds is what the text of the last
    tokens grows by.
    """

    # A character has four bytes at most: what still ends in a replacement character then, holds one.
    PATIENCE = 8

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0

    def feed(self, id: int) -> str:
        if id == self.tokenizer.end_of_text:
            return ""
        self.ids.append(int(id))
        new = self._new()
        if not new or (new.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) - self.shown < self.PATIENCE):
            return ""
        # The tokens shown last stay, since what stands at the beginning of a text decodes in another way.
        self.ids = self.ids[self.shown :]
        self.shown = len(self.ids)
        return new

    def end(self) -> str:
        """What is left of a character that was not finished."""
        new, self.ids, self.shown = self._new(), [], 0
        return new

    def _new(self) -> str:
        decode = self.tokenizer._inner.decode
        before = decode(self.ids[: self.shown], skip_special_tokens=False)
        return decode(self.ids, skip_special_tokens=False)[len(before) :]


class _BytesDecoder(Decoder):
    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        return self.decoder.decode(self.tokenizer._bytes_of(int(id)))

    def end(self) -> str:
        return self.decoder.decode(b"", final=True)


def bytes_tokenizer(end_of_text: bool = True) -> Tokenizer:
    """Ids 0 to 255 are bytes, and 256 ends a text; without that it has 256 tokens."""
    return Tokenizer("bytes", "bytes", BYTES + end_of_text, BYTES if end_of_text else None)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level byte-pair encoding of `vocab_size` tokens, the end of text among them (id 0): the same on every run.

    It holds the distinct words of the texts, and not the texts.

    Raises:
        UserError: the texts have too few pairs for so many tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator((part for text in texts for part in _without_long_words(text)), trainer)
    there = inner.get_vocab_size()
    if there < vocab_size:
        raise UserError(
            f"--tokenizer bpe:{vocab_size}: the text to train on makes {there} tokens and no more; it needs "
            f"bpe:{there} or fewer, or more text"
        )
    return _parsed(inner.to_str().encode(), f"--tokenizer bpe:{vocab_size}")


def _without_long_words(text: str) -> Iterator[str]:
    """The text, cut where something goes on for too long: a merge in a word takes the square of its length."""
    start = 0
    for found in _LONG_WORD.finditer(text):
        yield text[start : found.end()]
        start = found.end()
    yield text[start:]


def load_tokenizer(folder: Path, entry: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `save` wrote into the folder, by the entry that it returned.

    Raises:
        UserError: the entry is none, or the file is missing, another one than was saved, or no tokenizer.
    """
    if not isinstance(entry, dict) or entry.get("kind") not in ("bytes", "file"):
        raise UserError(f"{shown(str(folder))}: its tokenizer is {shown(str(entry))}; it needs the kind bytes or file")
    if entry["kind"] == "bytes":
        return bytes_tokenizer(entry.get("end_of_text", True) is not False)
    if entry.get("file") != FILE:
        raise UserError(f"{shown(str(folder))}: its tokenizer is in {shown(str(entry.get('file')))}; it needs {FILE}")
    path = folder / FILE
    name = shown(str(path))
    with open_plain(folder, FILE) as file:
        data = _limited(file, name)
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise UserError(f"{name}: it is not the file that was written there (its SHA-256 is another one)")
    return _parsed(data, name)


def read_tokenizer(path: Path, option: str = "--tokenizer") -> Tokenizer:
    """A tokenizer.json of anybody's, with the token that ends a text in it (one of `ENDS`).

    Raises:
        UserError: there is no such file, it is too large, it is no tokenizer, or no token of it ends a text.
    """
    name = f"{option} {shown(str(path))}"
    return _parsed(_read(path, name), name)


def _read(path: Path, name: str) -> bytes:
    try:
        if not path.is_file():
            raise UserError(
                f"{name}: {'it is no file' if path.exists() else 'there is no such file'}; it needs a {FILE}"
            )
        with open(path, "rb") as file:
            return _limited(file, name)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: {reason(error)}; it needs a {FILE}") from error


def _limited(file: BinaryIO, name: str) -> bytes:
    found = os.fstat(file.fileno()).st_size
    if found > LARGEST_FILE:
        raise UserError(f"{name}: it has {size(found)}; a {FILE} has {size(LARGEST_FILE)} at most")
    return file.read(LARGEST_FILE)


def _parsed(data: bytes, name: str) -> Tokenizer:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: it is no JSON: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(content, dict) or _type(content.get("model")) is None:
        raise UserError(f"{name}: it is no tokenizer.json of the library tokenizers (it has no model with a type)")
    _check_growth(content, name)
    inner = _asked(_loaded, json.dumps(content), about=name)
    end = next((id for id in map(inner.token_to_id, ENDS) if id is not None), None)
    if end is None:
        raise UserError(
            f"{name}: none of its tokens ends a text ({', '.join(ENDS)}); add one to it, as with "
            f'tokenizer.add_special_tokens(["{END_OF_TEXT}"]) of the library tokenizers'
        )
    vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())
    if vocab_size > MOST_TOKENS:
        raise UserError(f"{name}: its largest id is {vocab_size - 1}; it needs ids below {MOST_TOKENS}")
    text = _asked(
        lambda: _loaded(json.dumps(_settled(content, inner.id_to_token(end)))).to_str(pretty=True), about=name
    )
    return Tokenizer("file", f"{_type(content['model']).lower()} of {vocab_size}", vocab_size, end, text)


def _check_growth(content: dict[str, Any], name: str) -> None:
    """Replacements, one after another, could make gigabytes of a line."""
    growth, left = 1, [content.get(key) for key in ("normalizer", "pre_tokenizer")]
    decoder = content.get("decoder")
    # As a decoder, ByteLevel makes bytes of letters, and nothing grows.
    left += [decoder] if _type(decoder) != "ByteLevel" else []
    while left:
        value = left.pop()
        if isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value
        growth *= _growth(value) if isinstance(value, dict) else 1
        if growth > MOST_GROWTH:
            raise UserError(f"{name}: its replacements would make a text longer than {MOST_GROWTH} times")


def _growth(step: dict[str, Any]) -> int:
    """What one step can make of a character, at most; of the steps that do the same only once (NFKC), 1."""
    # Letters for bytes: each byte of a character of two becomes a letter; and spaces around a Chinese character.
    growth = {"ByteLevel": 2, "BertNormalizer": 3}.get(_type(step), 1)
    put, pattern = step.get("content"), step.get("pattern")
    if isinstance(put, str):
        # An expression may match nothing, between any two characters, and then what was there stays.
        stays = isinstance(pattern, dict) and pattern.get("String", "") == ""
        growth *= max(1, len(put) + stays)
    if isinstance(before := step.get("prepend"), str):
        growth *= len(before) + 1
    return growth


def _settled(content: dict[str, Any], end: str) -> dict[str, Any]:
    """The tokenizer without what would make its ids random, shorten a text, or let a text spell its own end."""
    content = content | {"truncation": None, "padding": None}
    if "dropout" in content["model"]:
        content["model"] = content["model"] | {"dropout": None}
    added = content.get("added_tokens")
    if isinstance(added, list):
        content["added_tokens"] = [
            token | {"special": True} if isinstance(token, dict) and token.get("content") == end else token
            for token in added
        ]
    return content


def _loaded(text: str) -> tokenizers.Tokenizer:
    import tokenizers

    inner = tokenizers.Tokenizer.from_str(text)
    inner.encode_special_tokens = True
    return inner


def _asked(function, *arguments, about: str, **keywords):
    """A call of `tokenizers`. Whatever goes wrong in it, a panic of its Rust too, is what the tokenizer.json is."""
    try:
        return function(*arguments, **keywords)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic is no Exception
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{about}: the library tokenizers cannot use it: {words}") from error


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogateescape")


def _type(value: Any) -> str | None:
    found = value.get("type") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether words are cut by GPT-2's expression and nothing else, so that the cuts of `_parts` change no id."""
    words = content.get("pre_tokenizer")
    return (
        _type(words) == "ByteLevel"
        and words.get("use_regex", True) is True
        and content.get("normalizer") is None
        and all(token.get("special") is True for token in content.get("added_tokens", ()))
    )


# No word, and no number: data within a text, a row of signs, blank space.
_LONG_WORD = re.compile(r"\S{256}|\s{256}")
_BETWEEN_WORDS = re.compile(r"[A-Za-z](?= [A-Za-z])")


@functools.cache
def bytes_by_letter() -> dict[str, int]:
    """How byte-level encodings write bytes: printable ones as themselves, the others as letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(BYTES + place): byte for place, byte in enumerate(others)}
