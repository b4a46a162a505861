"""Tokenizers: what a text becomes, and that neither a text nor a tokenizer.json from a stranger gets more than that."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Inner

from gptkern.formatting import shown
from gptkern.training.data import tokenizers
from gptkern.training.data.tokenizers import bytes_tokenizer, load_tokenizer, read_tokenizer, train_bpe
from gptkern.training.errors import UserError

_DRAW = random.Random(0)
WORDS = ["".join(_DRAW.choices("etaoinshrdlu", k=_DRAW.randint(1, 8))) for _ in range(200)]
WORDS += ["to", "be", "or", "not", "Äpfel", "日本", "😀", "12", "don't", "...", "  "]


def some_text(seed: int, words: int = 300) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", "\n"]) for _ in range(words))


TEXT = [some_text(seed) for seed in range(20)]
BPE = train_bpe(TEXT, 400)


def others() -> dict[str, Inner]:
    """Tokenizers of other kinds than the one that is trained here."""
    unigram = Inner(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    pieces = Inner(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[EOS]"], show_progress=False)
    )
    pieces.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    fallback = Inner(models.BPE(byte_fallback=True, unk_token="<unk>"))
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback.normalizer = normalizers.Replace(" ", "▁")
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    fallback.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, initial_alphabet=["a", "▁"], show_progress=False),
    )
    return {"unigram": unigram, "pieces": pieces, "fallback": fallback}


OTHERS = others()


def read(inner: Inner | dict, tmp_path) -> tokenizers.Tokenizer:
    path = tmp_path / "tokenizer.json"
    path.write_text(inner.to_str() if isinstance(inner, Inner) else json.dumps(inner))
    return read_tokenizer(path)


def test_bytes():
    tokenizer = bytes_tokenizer()
    assert (tokenizer.kind, tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("bytes", "bytes", 257, 256)
    assert (bytes_tokenizer(False).vocab_size, bytes_tokenizer(False).end_of_text) == (256, None)
    ids = tokenizer.encode("é<|endoftext|>")
    assert ids.dtype == np.uint16 and bytes(ids.tolist()) == "é<|endoftext|>".encode()
    # A word of the command line that is no UTF-8.
    assert tokenizer.encode("\udce9").tolist() == [0xE9] and tokenizer.encode(b"\xe9").tolist() == [0xE9]
    assert tokenizer.decode([0xC3, 256, 0xA9, 0xE9]) == "é\N{REPLACEMENT CHARACTER}"


def test_a_trained_encoding_has_the_tokens_asked_for():
    assert (BPE.kind, BPE.name, BPE.vocab_size, BPE.end_of_text, BPE.dtype) == ("file", "bpe of 400", 400, 0, "uint16")
    assert len(BPE.encode(TEXT[0])) < 0.65 * len(TEXT[0].encode())
    with pytest.raises(
        UserError, match=r"bpe:5000: the text to train on makes \d+ tokens and no more; it needs bpe:\d+ or"
    ):
        train_bpe(["to be"], 5000)


def test_training_is_the_same_on_every_run_and_every_number_of_threads(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXT * 30))
    program = (
        "import json, sys\nfrom gptkern.training.data.tokenizers import train_bpe\n"
        "print(train_bpe(iter(json.load(open('texts.json'))), 800)._text)"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
        ).stdout
        for threads in ("1", "4")
    ]  # fmt: skip
    assert found[0] == found[1] and json.loads(found[0])["model"]["type"] == "BPE"


@given(st.text())
def test_text_comes_back(text):
    for tokenizer in (BPE, bytes_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        decoder = tokenizer.decoder()
        parts = [decoder.feed(id) for id in ids]
        assert "".join(parts) + decoder.end() == text
        assert (ids != tokenizer.end_of_text).all()


@given(st.lists(st.integers(0, 399)))
def test_any_ids_stream_as_they_decode(ids):
    decoder = BPE.decoder()
    expected = BPE._inner.decode([id for id in ids if id], skip_special_tokens=False)
    assert "".join(map(decoder.feed, ids)) + decoder.end() == BPE.decode(ids) == expected


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_stream_as_they_decode(tmp_path, kind):
    tokenizer = read(OTHERS[kind], tmp_path)
    assert (
        tokenizer.name.endswith(f" of {tokenizer.vocab_size}") and tokenizer.vocab_size == OTHERS[kind].get_vocab_size()
    )
    draw = random.Random(0)
    for text in (*TEXT[:5], "日本語😀 é", "", "x"):
        ids = tokenizer.encode(text)
        assert ids.tolist() == OTHERS[kind].encode(text, add_special_tokens=False).ids
        any_ids = draw.choices(range(tokenizer.vocab_size), k=30)
        # One byte that is wrong makes all of those beside it unreadable, there, those that were shown among them.
        for each in (ids.tolist(), any_ids) if kind != "fallback" else (ids.tolist(),):
            decoder = tokenizer.decoder()
            parts = [decoder.feed(id) for id in each]
            assert "".join(parts) + decoder.end() == tokenizer.decode(each)
    if kind == "fallback":
        decoder = tokenizer.decoder()
        assert [decoder.feed(tokenizer._inner.token_to_id(f"<0x{byte:02X}>")) for byte in "😀".encode()] == [
            "",
            "",
            "",
            "😀",
        ]


def test_a_batch_is_each_of_its_texts():
    for text, ids in zip(TEXT, BPE.encode_batch([text.encode() for text in TEXT])):
        assert ids.tolist() == BPE.encode(text).tolist() == BPE._inner.encode(text).ids
    assert BPE.encode_batch([]) == [] and BPE.encode("").tolist() == []
    for wrong in ("\ud800", b"\xff"):
        with pytest.raises(UnicodeError):
            BPE.encode_batch(["a", wrong])


def test_a_long_text_is_encoded_in_parts_that_change_nothing(tmp_path, monkeypatch):
    text = "".join(TEXT) + " x" * 50 + " be or not to" * 50 + "   y\n\n z'll don't" * 20
    stripping = Inner.from_str(BPE._inner.to_str())
    stripping.normalizer = normalizers.Strip()
    two_words = Inner.from_str(BPE._inner.to_str())
    two_words.add_tokens([" or not"])
    inners = {**OTHERS, "stripping": stripping, "two words": two_words}
    whole = {name: read(inner, tmp_path) for name, inner in inners.items()}
    expected = {name: tokenizer.encode(text).tolist() for name, tokenizer in whole.items()}
    ids = BPE.encode(text).tolist()
    for characters in (1, 7, 100):
        monkeypatch.setattr(tokenizers, "PART_CHARACTERS", characters)
        assert len(BPE._parts(text)) > 10 and "".join(BPE._parts(text)) == text
        assert BPE.encode(text).tolist() == ids
        # Where a part's beginning may be read in another way nothing is cut.
        assert {name: tokenizer.encode(text).tolist() for name, tokenizer in whole.items()} == expected


# A text that spells a special token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("end", tokenizers.ENDS)
def test_a_text_cannot_spell_the_end_of_a_document(tmp_path, end, special):
    inner = Inner.from_str(BPE._inner.to_str().replace(tokenizers.END_OF_TEXT, "<|other|>"))
    # lstrip and rstrip would take the spaces around along.
    inner.add_tokens([AddedToken(end, special=special, lstrip=True, rstrip=True, normalized=False)])
    inner.encode_special_tokens = True
    tokenizer = read(inner, tmp_path)
    assert tokenizer.end_of_text == inner.token_to_id(end) == 400
    text = f"to be {end} or <|other|> not{end}{end}"
    ids = tokenizer.encode(text)
    assert (ids != tokenizer.end_of_text).all() and (ids != 0).all() and tokenizer.decode(ids) == text
    again = load_tokenizer(tmp_path, tokenizer.save(tmp_path))
    assert again.encode(text).tolist() == ids.tolist()
    assert again.decode([*ids, tokenizer.end_of_text]) == text


def test_a_vocabulary_that_spells_the_end_of_a_document_is_refused(tmp_path):
    inner = Inner(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = read(inner, tmp_path)
    assert tokenizer.encode("a a").tolist() == [0, 0]
    with pytest.raises(UserError, match="makes its end of text, 1, of a text's own words"):
        tokenizer.encode_batch(["a", "a </s> a"])


def test_what_would_make_ids_random_or_shorten_a_text_is_off(tmp_path):
    inner = Inner.from_str(BPE._inner.to_str())
    inner.model.dropout = 0.5
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer = read(inner, tmp_path)
    for _ in range(3):
        assert tokenizer.encode(TEXT[0]).tolist() == BPE.encode(TEXT[0]).tolist()


# Files from strangers -------------------------------------------------------------------------------------------------

CONTENT = json.loads(BPE._text)
MODEL = CONTENT["model"]


def changed(**keys) -> dict:
    return {**CONTENT, **keys}


HOSTILE = {
    "empty": ("", "it is no JSON"),
    "cut": (BPE._text[:2000], "it is no JSON"),
    "deep": ("[" * 100_000, "it is no JSON: maximum recursion depth"),
    "list": ([1], "it is no tokenizer.json"),
    "no_model": (changed(model=None), "it is no tokenizer.json"),
    "type": (changed(model={"type": 3}), "it is no tokenizer.json"),
    "unknown": (changed(model={"type": "Nothing"}), "the library tokenizers cannot use it"),
    "merges": (changed(model={**MODEL, "merges": [["no", "such"]]}), "the library tokenizers cannot use it"),
    "negative": (changed(model={**MODEL, "vocab": {"a": -1}}), "the library tokenizers cannot use it"),
    "expression": (
        changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}),
        "the library tokenizers cannot use it",
    ),
    "decoder": (changed(decoder={"type": "Exec", "command": "ls"}), "the library tokenizers cannot use it"),
    "no_end": (json.loads(BPE._text.replace("<|endoftext|>", "<|x|>")), "none of its tokens ends a text"),
    "huge_id": ({"model": {"type": "WordLevel", "vocab": {"</s>": 0, "a": 2**31}, "unk_token": "a"}}, "largest id is"),
    "surrogate": (changed(model={**MODEL, "vocab": {"\ud800": 1}}), "the library tokenizers cannot use it"),
    "huge_replacement": (
        changed(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}),
        "would make a text longer than",
    ),
    "doubling": (
        changed(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30,
            }
        ),
        "would make a text longer than",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, name):
    content, words = HOSTILE[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        read_tokenizer(path)
    line = str(error.value)
    assert line.startswith(f"--tokenizer {shown(str(path))}") and words in line, line
    assert "\n" not in line and len(line) < 500


def test_sizes_and_kinds_of_files(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    for words in ("there is no such file", "it is no file"):
        with pytest.raises(UserError, match=f"{words}; it needs a tokenizer.json"):
            read_tokenizer(path)
        if not path.exists():
            path.mkdir()
    path.rmdir()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"it has 1,100 GB; a tokenizer.json has 67.1 MB at most"):
        read_tokenizer(path)
    with pytest.raises(UserError, match="File name too long"):
        read_tokenizer(tmp_path / ("a" * 300))


def test_a_saved_tokenizer_is_the_one_that_is_loaded(tmp_path):
    entry = BPE.save(tmp_path)
    assert sorted(entry) == ["file", "kind", "sha256"] and [path.name for path in tmp_path.iterdir()] == [
        "tokenizer.json"
    ]
    assert Inner.from_file(str(tmp_path / "tokenizer.json")).encode("to be").ids == BPE.encode("to be").tolist()
    assert (
        load_tokenizer(tmp_path, json.loads(json.dumps(entry))).encode(TEXT[0]).tolist() == BPE.encode(TEXT[0]).tolist()
    )
    for whole in (bytes_tokenizer(), bytes_tokenizer(False)):
        entry_of_bytes = whole.save(tmp_path / "nowhere")
        assert load_tokenizer(tmp_path, json.loads(json.dumps(entry_of_bytes))).vocab_size == whole.vocab_size
    for wrong, words in [
        ("tokenizer.json", "it needs the kind bytes or file"), ({}, "it needs the kind"), (None, "it needs the kind"),
        ({**entry, "kind": "pickle"}, "it needs the kind"), ({**entry, "file": "../tokenizer.json"}, "it needs token"),
        ({**entry, "file": ["a"]}, "it needs tokenizer"), ({**entry, "sha256": "0" * 64}, "it is not the file"),
        ({**entry, "sha256": None}, "it is not the file"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_tokenizer(tmp_path, wrong)
    outside = tmp_path / "outside"
    (tmp_path / "tokenizer.json").rename(outside)
    (tmp_path / "tokenizer.json").symlink_to(outside)
    with pytest.raises(UserError, match="is a link"):
        load_tokenizer(tmp_path, entry)


@pytest.mark.deep
def test_a_tokenizer_with_anything_changed_in_it_is_used_or_refused(tmp_path):
    """Each value of the file is put in the place of another, or is removed: no crash, no end of a text in a text."""
    draw = random.Random(0)
    small = json.loads(train_bpe(TEXT, 270)._text)
    odd = [None, True, -1, 2**40, 1.5, "", "<|endoftext|>", "\u0000", [], {}, [[]], {"type": "ByteLevel"}]

    def places(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from places(item, (*path, key))

    everywhere = [path for path in places(small) if path]
    path = tmp_path / "tokenizer.json"
    used = 0
    for _ in range(1500):
        content = json.loads(json.dumps(small))
        for *above, key in draw.sample(everywhere, draw.choice([1, 1, 2])):
            try:
                inside = content
                for step in above:
                    inside = inside[step]
                if draw.random() < 0.3:
                    del inside[key]
                else:
                    inside[key] = draw.choice(odd)
            except (LookupError, TypeError):
                continue
        path.write_text(json.dumps(content))
        try:
            tokenizer = read_tokenizer(path)
            ids = tokenizer.encode("to be <|endoftext|> or 日本 not")
            assert (ids != tokenizer.end_of_text).all() and ids.max(initial=0) < tokenizer.vocab_size
            tokenizer.decode(ids)
            used += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert used > 100
