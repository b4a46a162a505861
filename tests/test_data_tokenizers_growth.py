"""A tokenizer.json whose steps, one after another, make gigabytes of a line is refused; those in use are not."""

from __future__ import annotations

import json

import pytest

from gptkern.training.data.tokenizers import read_tokenizer, train_bpe
from gptkern.training.errors import UserError

CONTENT = json.loads(train_bpe(["to be or not to be " * 50], 262)._text)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def replace(pattern, content="x"):
    return {"type": "Replace", "pattern": pattern, "content": content}


def normalizers(*steps):
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


GROWING = {
    "byte_level": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 12}},
    "byte_level_normalizer": normalizers(*[{"type": "ByteLevel"}] * 12),
    "nothing": normalizers(*[replace({"Regex": ""})] * 12),
    "before_anything": normalizers(*[replace({"Regex": "(?=.)"})] * 12),
    "empty_string": normalizers(*[replace({"String": ""})] * 12),
    "chinese": normalizers(*[{"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                              "strip_accents": None, "lowercase": True}] * 12),
    "prepended": normalizers(*[{"type": "Prepend", "prepend": "x"}] * 12),
}  # fmt: skip
HONEST = {
    "gpt2": {"pre_tokenizer": BYTE_LEVEL},
    "llama": normalizers({"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")),
    "bert": {"normalizer": GROWING["chinese"]["normalizer"]["normalizers"][0]},
    "clip": normalizers({"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}),
    "strings": normalizers(*[replace({"String": "a"}, "b")] * 50, {"type": "NFKC"}),
}


def read(tmp_path, keys):
    (tmp_path / "tokenizer.json").write_text(json.dumps(CONTENT | keys))
    return read_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", GROWING)
def test_steps_that_make_a_text_longer_and_longer_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="would make a text longer than 1000 times"):
        read(tmp_path, GROWING[name])


@pytest.mark.parametrize("name", HONEST)
def test_those_in_use_are_not(tmp_path, name):
    assert len(read(tmp_path, HONEST[name]).encode("to be")) > 0
