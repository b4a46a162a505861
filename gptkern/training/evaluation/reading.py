"""Which task a file is of, its digest, and questions of multiple choice. The other readers: training/data/examples.py.

a folder                                 language: the held-out part of what `gptkern data` wrote
plain text                               language
{"text"} or {"prompt", "completion"}     language: the text, or the completion after its prompt
{"prompt" or "question", "choices", "answer"}    choice: "answer" is the place of the right one, from 0 on
{"text", "label"}                        classification
TACRED's keys                            relation
{"source", "target"}, "a.en,a.de"        translation
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptkern.formatting import shown
from gptkern.training.data.examples import objects
from gptkern.training.data.sources import COMPRESSED, Reader, Source, walk
from gptkern.training.data.store import Store
from gptkern.training.errors import UserError, reason

LANGUAGE, CHOICE, CLASSIFICATION, RELATION, TRANSLATION = TASKS = (
    "language", "choice", "classification", "relation", "translation",
)  # fmt: skip
# A key that one task's objects have, and no other's.
_SIGNS = {
    "choices": CHOICE, "relation": RELATION, "label": CLASSIFICATION, "source": TRANSLATION, "completion": LANGUAGE,
    "text": LANGUAGE,
}  # fmt: skip
_NEEDS = (
    "it needs text, or objects with text; prompt and completion; prompt or question, choices and answer; text and "
    "label; TACRED's keys; or source and target"
)
_NEEDS_CHOICES = "it needs prompt or question, choices and answer"
_CHUNK = 2**20


class Choice(NamedTuple):
    """A question of multiple choice.

    Args:
        question: whether it is asked as "Question: …", and not gone on with as it stands.
        answer: the right one's place. where: what an error calls it.
    """

    prompt: str
    question: bool
    choices: tuple[str, ...]
    answer: int
    where: str

    def texts(self) -> tuple[str, list[str]]:
        """(what is read, what may follow it): a space comes between where neither has one."""
        read = f"Question: {self.prompt}\nAnswer:" if self.question else self.prompt
        between = "" if not read or read[-1].isspace() else " "
        return read, [choice if choice[:1].isspace() else between + choice for choice in self.choices]


def files(data: str) -> list[str]:
    """The file; or the two that a comma means, where no file has that whole name."""
    return data.split(",", 1) if "," in data and not os.path.exists(data) else [data]


def source(path: str, option: str) -> Source:
    """A file. Raises UserError where it is none that can be read twice."""
    if not path:
        raise UserError(f"{option} is empty; it needs a file")
    try:
        is_file, there = os.path.isfile(path), os.path.exists(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {shown(path)}: {reason(error)}; it needs a file") from error
    if not is_file:
        what = "it is no file that can be read twice" if there else "there is no such file"
        raise UserError(f"{option} {shown(path)}: {what}; it needs a file")
    return next(walk([path], {}))


def task_of(data: str, option: str = "--data") -> str:
    """Raises UserError where there is no such file, or its first object is none of those above."""
    if len(files(data)) == 2:
        return TRANSLATION
    if os.path.isdir(data) or not _has_objects(data, option):
        return LANGUAGE
    with contextlib.closing(objects(data, option, _NEEDS)) as found:
        where, _, content = next(found)
    task = next((task for key, task in _SIGNS.items() if key in content), None)
    if task is None:
        has = ", ".join(shown(key) for key in list(content)[:5]) or "nothing"
        raise UserError(f"{where} has {has}; {_NEEDS}")
    return task


def is_text(data: str, option: str = "--data") -> bool:
    """Whether it is a plain text, and holds no objects."""
    return not _has_objects(data, option)


def _has_objects(data: str, option: str) -> bool:
    path = Path(data)
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    with Reader(source(data, option), option=option) as reader:
        return suffix.lower() == ".json" or reader.is_lines


def digest(data: str, option: str = "--data") -> list[dict[str, Any]]:
    """Of each file its name, its bytes and their SHA-256; of a folder its name and its tokens' fingerprint."""
    if os.path.isdir(data):
        store = Store.open(data, option)
        return [{"folder": store.name, "fingerprint": store.fingerprint}]
    found = []
    for path in files(data):
        size, hashed = 0, hashlib.sha256()
        try:
            with open(path, "rb") as file:
                while chunk := file.read(_CHUNK):
                    size += len(chunk)
                    hashed.update(chunk)
        except (OSError, ValueError) as error:
            raise UserError(f"{option} {shown(path)}: {reason(error)}; it needs a file") from error
        name = Path(path).name.encode("utf-8", errors="replace").decode()
        found.append({"file": name, "bytes": size, "sha256": hashed.hexdigest()})
    return found


def choices(data: str, option: str = "--data") -> Iterator[Choice]:
    """The questions of a file, in their order.

    Raises:
        UserError: names file and line: it cannot be read, or one is no question with choices and an answer.
    """
    for where, _, content in objects(data, option, _NEEDS_CHOICES):
        asked = [key for key in ("prompt", "question") if key in content]
        missing = [key for key in ("choices", "answer") if key not in content]
        if len(asked) != 1 or missing:
            has = "both prompt and question" if len(asked) > 1 else "no " + (missing or ["prompt and no question"])[0]
            raise UserError(f"{where} has {has}; {_NEEDS_CHOICES}")
        prompt, given, answer = _text(content[asked[0]], asked[0], where), content["choices"], content["answer"]
        if not isinstance(given, list) or len(given) < 2:
            what = f"a list of {len(given)}" if isinstance(given, list) else "no list"
            raise UserError(f"{where}: choices is {what}; it needs a list of two texts at least")
        texts = tuple(_text(each, f"choices[{place}]", where) for place, each in enumerate(given))
        for place, each in enumerate(texts):
            if not each.strip():
                raise UserError(f"{where}: choices[{place}] is empty; it needs a text")
        if type(answer) is not int or not 0 <= answer < len(texts):
            said = shown(str(answer)) if type(answer) is int and abs(answer) < 10**18 else "no such place"
            raise UserError(
                f"{where}: answer is {said}; it needs the place of the right choice, from 0 to {len(texts) - 1}"
            )
        yield Choice(prompt, asked[0] == "question", texts, answer, where)


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is no text; it needs a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key} holds half of a surrogate pair, which is no character") from error
    return value
