"""Labelled data, read as a stream: what a model is given, and what it shall say.

    JSONL                 {"text"}, {"prompt", "completion"}, {"text", "label"} or {"source", "target"}, one of them in
                          a file; other keys beside them are passed over
    a list in JSON        of the same objects, or of TACRED's
    "a.en,a.de"           two text files of which a line is the translation of the same line of the other, as WMT's

each of them plain, under gzip or under zstd, which their first bytes tell. TACRED's objects (token, subj_start,
subj_end, subj_type, obj_start, obj_end, obj_type, relation; the places count tokens from 0, the ends among them) become
a text and a label: the tokens with spaces between, the two entities marked as in

    @ * person * Marie Curie @ was born in # ^ city ^ Warsaw #

which needs no token that a tokenizer lacks; the label is the relation, "no_relation" that of most pairs.

Sources: TACRED: Zhang et al., "Position-aware Attention and Supervised Data Improve Slot Filling", 2017; the marks:
Zhou and Chen, "An Improved Baseline for Sentence-level Relation Extraction", 2022 (arXiv:2102.01373), "typed entity
marker (punct)"; "source = target" of a translation: Radford et al., "Language Models are Unsupervised Multitask
Learners", 2019, section 3.7.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from gptkern.formatting import shown, size
from gptkern.training.data.sources import BYTE_ORDER_MARK, LONGEST_LINE, Reader, Source
from gptkern.training.errors import UserError, reason

TEXT, COMPLETION, LABEL, TRANSLATION = "text", "completion", "label", "translation"
NO_RELATION = "no_relation"  # TACRED's negative class

# kind -> the keys of its objects: (what is given, what shall be said).
_KEYS = {
    TEXT: (None, "text"),
    COMPLETION: ("prompt", "completion"),
    LABEL: ("text", "label"),
    TRANSLATION: ("source", "target"),
}
_TACRED = ("token", "subj_start", "subj_end", "subj_type", "obj_start", "obj_end", "obj_type", "relation")
_KNOWN = {key for keys in _KEYS.values() for key in keys if key} | set(_TACRED)
_NEEDS = "it needs text; prompt and completion; text and label; source and target; or TACRED's keys"
# As the Penn Treebank writes brackets.
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_SPACES = re.compile(r"[ \t\r\n]*")
_MOST_DIGITS = 10**18  # a label may be a whole number below it
_LONGEST_NAME = 1000  # characters of a label


class Example(NamedTuple):
    """An example.

    Args:
        kind: "text", "completion", "label" or "translation".
        prompt: what is given: the prompt, the text of a label, the source of a translation; empty of a text.
        completion: what shall be said: the text, the completion, the label, the target of a translation.
        line: of the file, from 1 on; of a list in JSON the number of the object.
    """

    kind: str
    prompt: str
    completion: str
    line: int


def read_examples(data: str, option: str = "--data") -> Iterator[Example]:
    """The examples of a file, or of two that are parallel, in their order; in the memory of one of them.

    Args:
        data: the file's path; or two paths with a comma between, where no file has that whole name. option: what an
            error calls it.

    Raises:
        UserError: names file and line: it cannot be read, is none of what is known here, or mixes two kinds.
    """
    files = files_of(data)
    if len(files) > 1:
        yield from _translations(*files, option)
        return
    kind = None
    for where, number, content in objects(data, option):
        example = _example(content, where, number)
        if kind is None:
            kind = example.kind
        elif kind != example.kind:
            raise UserError(
                f"{where} has {_said_keys(example.kind)}, and those before it {_said_keys(kind)}; a file needs to be "
                "of one kind"
            )
        yield example


def as_completion(example: Example) -> tuple[str, str]:
    """(prompt, completion) as a model reads them, one after the other.

    A label is said after its text and a space, a target after its source and " = ", and the rest is as it stands. The
    space belongs to the completion, as tokenizers have it.
    """
    if example.kind == LABEL:
        return example.prompt, label_completion(example.completion)
    if example.kind == TRANSLATION:
        return f"{example.prompt} =", f" {example.completion}"
    return example.prompt, example.completion


def label_completion(label: str) -> str:
    """What a model says for a label."""
    return f" {label}"


def objects(path: str, option: str = "--data", needs: str = _NEEDS) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(what an error calls it, number, object) of each line of a JSONL file, or of each item of a list in JSON.

    Empty lines are passed over. Raises as `read_examples`; `needs` ends the error of what is no object.
    """
    with Reader(_source(path, option), option=option) as reader:
        called = f"{option} {reader.source.name}"
        first, found = _first(reader.chunks()), 0
        for where, number, content in _items(reader, called, needs) if first == b"[" else _lines(reader, called):
            if not isinstance(content, dict):
                raise UserError(f"{where} is no JSON object; {needs}")
            found += 1
            yield where, number, content
        if not found:
            raise UserError(f"{called}: it has no example; {needs}")


def _first(chunks: Iterator[bytes]) -> bytes:
    """The first byte that is no space, behind a byte order mark."""
    head = b""
    for chunk in chunks:
        head += chunk
        rest = head.removeprefix(BYTE_ORDER_MARK).lstrip()
        if rest and len(head) >= len(BYTE_ORDER_MARK):
            return rest[:1]
        head = head if rest or len(head) < len(BYTE_ORDER_MARK) else b"   "
    return head.lstrip()[:1]


# Files ----------------------------------------------------------------------------------------------------------------


def files_of(data: str) -> tuple[str, ...]:
    """The file, or the two files that a name with a comma means, where it is not a file's own."""
    if "," not in data or os.path.exists(data):
        return (data,)
    first, _, second = data.partition(",")
    return first, second


def _source(path: str, option: str) -> Source:
    if not path:
        raise UserError(f"{option} is empty; it needs a file")
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {shown(path)}: {reason(error)}; it needs a file") from error
    if not stat.S_ISREG(found.st_mode):
        # It is read again when a run goes on: a pipe cannot be.
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        what = next((words for is_one, words in kinds if is_one(found.st_mode)), "a device")
        raise UserError(f"{option} {shown(path)}: it is {what}; it needs a file")
    return Source(path, shown(path), found.st_size, f"{found.st_size} {found.st_mtime_ns}", given=True)


def _lines(reader: Reader, called: str) -> Iterator[tuple[str, int, Any]]:
    for line in reader.lines(blank=False):
        data = line.data.removeprefix(BYTE_ORDER_MARK) if line.number == 1 else line.data
        if data.strip():
            where = f"{called}: line {line.number}"
            yield where, line.number, _parsed(_decoded(data, where), where)


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (its byte {error.start})") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {_words(error)}") from error


def _words(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]


def _items(reader: Reader, called: str, needs: str) -> Iterator[tuple[str, int, Any]]:
    """The items of a list in JSON, of which no more is in memory than the one that is read."""
    text = _Text(reader, called)
    text.next_character()  # the bracket
    number, character = 1, text.next_character()
    while character != "]":
        where = f"{called}: object {number}"
        yield where, number, text.value(character, where, needs)
        number, character = number + 1, text.next_character()
        if character == ",":
            character = text.next_character()
            if character == "]":
                raise UserError(f"{called}: after object {number - 1} there is a comma and no object")
        elif character != "]":
            raise UserError(f"{called}: after object {number - 1} there is {shown(character)}; it needs a comma or ]")
    if text.next_character(at_end=""):
        raise UserError(f"{called}: after the list of {number - 1} objects there is more; it needs to be one list")


class _Text:
    """The characters of a file in JSON, one value after another."""

    def __init__(self, reader: Reader, called: str):
        self._chunks, self._called = reader.chunks(), called
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._place, self._ended = "", 0, False
        self._json = json.JSONDecoder()

    def next_character(self, at_end: str | None = None) -> str:
        """The next one that is no space."""
        while True:
            place = _SPACES.match(self._text, self._place).end()
            if place < len(self._text):
                self._place = place + 1
                return self._text[place]
            self._text, self._place = "", 0
            if not self._more():
                if at_end is None:
                    raise UserError(f"{self._called}: it is cut off: its list has no end")
                return at_end

    def value(self, first: str, where: str, needs: str) -> Any:
        """The value that begins with the character that was given out last."""
        if first != "{":
            raise UserError(f"{where} is no JSON object; {needs}")
        while True:
            try:
                found, end = self._json.raw_decode(self._text, self._place - 1)
            except (ValueError, RecursionError) as error:
                # It may go on in what was not read yet.
                if len(self._text) - self._place > LONGEST_LINE:
                    raise UserError(f"{where} is no JSON, or longer than {size(LONGEST_LINE)}") from error
                if not self._more():
                    raise UserError(f"{where} is no JSON: {_words(error)}") from error
                continue
            self._place = end
            return found

    def _more(self) -> bool:
        chunk = next(self._chunks, b"")
        try:
            new = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._called}: it is not UTF-8: {error.reason}") from error
        self._text, self._place = self._text[max(0, self._place - 1) :] + new, min(self._place, 1)
        return bool(chunk)


def _translations(first: str, second: str, option: str) -> Iterator[Example]:
    with (
        Reader(_source(first, option), option=option) as sources,
        Reader(_source(second, option), option=option) as targets,
    ):
        number = 0
        pairs = [_texts(reader, f"{option} {reader.source.name}") for reader in (sources, targets)]
        while True:
            source, target = (next(lines, None) for lines in pairs)
            if source is None or target is None:
                break
            number += 1
            yield Example(TRANSLATION, source, target, number)
        if source is not None or target is not None:
            counts = [
                number + (given is not None) + sum(1 for _ in lines) for given, lines in zip((source, target), pairs)
            ]
            raise UserError(
                f"{option}: {sources.source.name} has {counts[0]} lines and {targets.source.name} {counts[1]}; "
                "parallel texts need as many, each line the translation of the other's"
            )
        if not number:
            raise UserError(f"{option} {sources.source.name}: it is empty; it needs a sentence a line")


def _texts(reader: Reader, called: str) -> Iterator[str]:
    for line in reader.lines():
        data = line.data.removeprefix(BYTE_ORDER_MARK) if line.number == 1 else line.data
        text = _decoded(data, f"{called}: line {line.number}").strip()
        if "\0" in text:
            raise UserError(f"{called}: line {line.number} holds a zero byte, as binary files do; it needs text")
        yield text


# Objects --------------------------------------------------------------------------------------------------------------


def _example(content: dict[str, Any], where: str, number: int) -> Example:
    there = content.keys() & _KNOWN
    if there == set(_TACRED):
        return Example(LABEL, _marked(content, where), _string(content, "relation", where, name=True), number)
    kind = next((kind for kind, keys in _KEYS.items() if there == set(keys) - {None}), None)
    if kind is None:
        has = " and ".join(sorted(there)) if there else ", ".join(shown(key) for key in list(content)[:5]) or "nothing"
        raise UserError(f"{where} has {has}; {_NEEDS}")
    given, wanted = _KEYS[kind]
    prompt = "" if given is None else _string(content, given, where)
    return Example(kind, prompt, _string(content, wanted, where, name=kind == LABEL), number)


def _said_keys(kind: str) -> str:
    return " and ".join(key for key in _KEYS[kind] if key)


def _string(content: dict[str, Any], key: str, where: str, name: bool = False) -> str:
    """The text of a key. A `name` is not empty, on one line, and may be a whole number."""
    value = content[key]
    if name and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST_DIGITS:
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {_kind_of(value)}; it needs a string{' or a whole number' if name else ''}")
    if name and (not value.strip() or len(value) > _LONGEST_NAME):
        what = "empty" if not value.strip() else f"{len(value)} characters long"
        raise UserError(f"{where}: {key} is {what}; it needs a name of 1 to {_LONGEST_NAME} characters")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key} holds half of a surrogate pair, which is no character") from error
    return value


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "a number" if type(value) in (int, float) else names.get(type(value), "null")


def _marked(content: dict[str, Any], where: str) -> str:
    """The tokens of TACRED's object as a text, with the two entities marked."""
    tokens = content["token"]
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{where}: token is {_kind_of(tokens)}; it needs a list of strings")
    before: dict[int, list[str]] = {}
    behind: dict[int, list[str]] = {}
    for entity, mark, around in (("subj", "@", "*"), ("obj", "#", "^")):
        start, end = content[f"{entity}_start"], content[f"{entity}_end"]
        if not all(type(place) is int for place in (start, end)) or not 0 <= start <= end < len(tokens):
            are = f"{shown(json.dumps(start))} and {shown(json.dumps(end))}"
            raise UserError(
                f"{where}: {entity}_start and {entity}_end are {are}; they need to be places among its {len(tokens)} "
                "tokens, from 0 on, the first not behind the last"
            )
        kind = _string(content, f"{entity}_type", where, name=True).lower().replace("_", " ")
        before.setdefault(start, []).append(f"{mark} {around} {kind} {around}")
        behind.setdefault(end, []).append(mark)
    words = []
    for place, token in enumerate(tokens):
        words += [*before.get(place, ()), _BRACKETS.get(token, token), *behind.get(place, ())]
    text = " ".join(words)
    return _string({"token": text}, "token", where)
