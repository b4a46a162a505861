"""Readers of labelled data: what they make of files, in whatever form, and what they refuse, with file and line."""

from __future__ import annotations

import gzip
import json

import pytest
import zstandard

from gptkern.training.data import examples, sources
from gptkern.training.data.examples import Example, as_completion, read_examples
from gptkern.training.errors import UserError

OF_KINDS = {
    "text": ({"text": "a\nb"}, ("", "a\nb"), ("", "a\nb")),
    "completion": ({"prompt": "2 + 2 =", "completion": " 4"}, ("2 + 2 =", " 4"), ("2 + 2 =", " 4")),
    "label": ({"text": "so good", "label": "positive"}, ("so good", "positive"), ("so good", " positive")),
    "translation": ({"source": "a cat", "target": "eine Katze"}, ("a cat", "eine Katze"), ("a cat =", " eine Katze")),
}


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refused(path, words: str) -> None:
    with pytest.raises(UserError) as error:
        list(read_examples(str(path)))
    assert words in str(error.value) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("kind", OF_KINDS)
def test_the_keys_tell_the_kind(tmp_path, kind):
    row, texts, said = OF_KINDS[kind]
    (tmp_path / "a.jsonl").write_bytes(lines(row | {"id": 7}) + b"\n\n" + lines(row))
    found = list(read_examples(str(tmp_path / "a.jsonl")))
    assert found == [Example(kind, *texts, 1), Example(kind, *texts, 4)]
    assert as_completion(found[0]) == said


def test_compressed_files_and_lists_hold_the_same(tmp_path, monkeypatch):
    rows = [{"text": f"Zürich {number} " * (number % 7), "label": number % 3} for number in range(40)]
    plain = [Example("label", row["text"], str(row["label"]), line) for line, row in enumerate(rows, 1)]
    forms = {
        "a.jsonl": lines(*rows), "b.gz": gzip.compress(lines(*rows)), "c.zst": zstandard.compress(lines(*rows)),
        "d.json": b"\xef\xbb\xbf \n" + json.dumps(rows, indent=1).encode(),
        "e.json.gz": gzip.compress(json.dumps(rows, ensure_ascii=False).encode()),
    }  # fmt: skip
    for chunk in (1, 7, sources.CHUNK_BYTES):
        monkeypatch.setattr(sources, "CHUNK_BYTES", chunk)
        for name, content in forms.items():
            (tmp_path / name).write_bytes(content)
            assert list(read_examples(str(tmp_path / name))) == plain, (name, chunk)


def test_a_list_is_read_as_it_comes(tmp_path, monkeypatch):
    """Of a file of which the end is damaged the objects before it are there: it is not read whole."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 64)
    (tmp_path / "a.json").write_bytes(json.dumps([{"text": "a"}] * 50).encode()[:-1] + b", {]")
    found = read_examples(str(tmp_path / "a.json"))
    assert [next(found).line for _ in range(50)] == list(range(1, 51))
    with pytest.raises(UserError, match="object 51 is no JSON"):
        next(found)


TACRED = {
    "id": "e7", "docid": "x", "relation": "per:city_of_birth",
    "token": ["Marie", "Curie", "(", "-LRB-", "was", "born", "in", "Warsaw", "."],
    "subj_start": 0, "subj_end": 1, "subj_type": "PERSON",
    "obj_start": 7, "obj_end": 7, "obj_type": "STATE_OR_PROVINCE", "stanford_pos": ["NNP"] * 9,
}  # fmt: skip


def test_tacred_marks_both_entities(tmp_path):
    none = TACRED | {"relation": "no_relation", "subj_start": 8, "subj_end": 8, "obj_start": 0, "obj_end": 0}
    (tmp_path / "train.json").write_text(json.dumps([TACRED, none]))
    found = list(read_examples(str(tmp_path / "train.json")))
    assert [(each.kind, each.completion) for each in found] == [
        ("label", "per:city_of_birth"), ("label", examples.NO_RELATION),
    ]  # fmt: skip
    assert found[0].prompt == "@ * person * Marie Curie @ ( ( was born in # ^ state or province ^ Warsaw # ."
    assert found[1].prompt == "# ^ state or province ^ Marie # Curie ( ( was born in Warsaw @ * person * . @"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"subj_end": 9}, "object 1: subj_start and subj_end are 0 and 9; they need to be places among its 9 tokens"),
        ({"obj_start": 8}, "obj_start and obj_end are 8 and 7"),
        ({"obj_start": True}, "obj_start and obj_end are true and 7"),
        ({"token": ["a", 1]}, "token is a list; it needs a list of strings"),
        ({"token": "a b"}, "token is a string; it needs a list of strings"),
        ({"relation": ""}, "relation is empty"),
        ({"label": "x"}, "object 1 has label and obj_end"),
    ],
)
def test_tacred_that_is_none(tmp_path, changes, words):
    (tmp_path / "train.json").write_text(json.dumps([TACRED | changes]))
    refused(tmp_path / "train.json", words)


def test_parallel_texts(tmp_path):
    (tmp_path / "a.en").write_bytes(b"\xef\xbb\xbfA cat.\r\n\nTwo\xc2\xa0dogs.")
    (tmp_path / "a.de").write_bytes(gzip.compress("Eine Katze.\nÜber\n\n".encode()))
    name = f"{tmp_path / 'a.en'},{tmp_path / 'a.de'}"
    assert list(read_examples(name)) == [
        Example("translation", "A cat.", "Eine Katze.", 1), Example("translation", "", "Über", 2),
        Example("translation", "Two\xa0dogs.", "", 3),
    ]  # fmt: skip
    (tmp_path / "a.de").write_text("eins\n")
    with pytest.raises(UserError) as error:
        list(read_examples(name))
    assert f"{tmp_path / 'a.en'} has 3 lines and {tmp_path / 'a.de'} 1; parallel texts need as many" in str(error.value)
    with pytest.raises(UserError, match=r"de has 1 lines and .*en 3;"):
        list(read_examples(",".join(name.split(",")[::-1])))
    # A file's own name may have a comma.
    (tmp_path / "a.en,b").write_bytes(lines({"text": "one file"}))
    assert [each.completion for each in read_examples(str(tmp_path / "a.en,b"))] == ["one file"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "it has no example"),
        (b"\n \n", "it has no example"),
        (b"[]", "it has no example"),
        (b'{"text": "a"}\n{"text": 1}\n', "a.jsonl: line 2: text is a number; it needs a string"),
        (b'{"text": "a"}\n{"text": "a", "label": "b"}\n', "line 2 has text and label, and those before it text;"),
        (b'{"text": "a", "completion": "b"}\n', "line 1 has completion and text; it needs text; prompt and completion"),
        (b'{"prompt": "a"}\n', "line 1 has prompt; it needs"),
        (b'{"words": "a"}\n', "line 1 has words; it needs"),
        (b"{}\n", "line 1 has nothing; it needs"),
        (b'{"text": "a", "label": true}', "label is true or false; it needs a string or a whole number"),
        (b'{"text": "a", "label": " "}', "label is empty"),
        (b'{"text": "\\ud800"}', "line 1: text holds half of a surrogate pair"),
        (b'{"text": "a"}\n\n{"text": \n', "line 3 is no JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2 is not UTF-8"),
        (b'{"text": "a"}\n["text"]', "line 2 is no JSON object"),
        (b"a sentence\n", "line 1 is no JSON"),
        (b'[{"text": "a"}', "it is cut off: its list has no end"),
        (b'[{"text": "a"} {"text": "b"}]', "after object 1 there is {; it needs a comma or ]"),
        (b'[{"text": "a"},]', "after object 1 there is a comma and no object"),
        (b'[{"text": "a"}] x', "after the list of 1 objects there is more"),
        (b'[{"text": "a"}, 3]', "object 2 is no JSON object"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "it is not UTF-8"),
        (b"[" * 100_000, "object 1 is no JSON object"),
        (b'[{"a": ' * 100_000, "object 1 is no JSON"),
        (b"PK\x03\x04", "it is a zip archive"),
        (gzip.compress(b'{"text": "a"}' * 99)[:-12], "cut off"),
    ],
)
def test_what_is_no_example_is_said_with_file_and_line(tmp_path, content, words):
    (tmp_path / "a.jsonl").write_bytes(content)
    refused(tmp_path / "a.jsonl", words)


def test_what_is_no_file(tmp_path):
    for path, words in (
        (tmp_path, "it is a folder"),
        (tmp_path / "b", "No such file"),
        ("/dev/null", "it is a device"),
    ):
        refused(path, words)
    refused("", "--data is empty")
