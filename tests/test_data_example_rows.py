"""Rows of examples: which ids are given and which are targets, the same ones whoever asks, and what is held out."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from gptkern.training.data.example_rows import encode, fitted, load_examples
from gptkern.training.data.loader import Batches
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.errors import UserError

BYTES, WITHOUT_END = bytes_tokenizer(), bytes_tokenizer(end_of_text=False)


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some(path, count: int = 40) -> str:
    return written(path, [{"prompt": f"{n} " * (n % 5 + 1), "completion": f"{n * n}"} for n in range(count)])


def rows_of(ids: np.ndarray, targets: np.ndarray, end: int = 256) -> list[tuple[str, str]]:
    """(what is given, what is a target) of each row, read off the padded arrays."""
    found = []
    for of_row, wanted in zip(ids.tolist(), targets.tolist()):
        places = [place for place, target in enumerate(wanted) if target != -100]
        assert places == list(range(places[0], places[-1] + 1))
        said = [wanted[place] for place in places]
        # What is said is given, one place later, but for its last.
        assert of_row[places[0] + 1 : places[-1] + 1] == said[:-1] and not any(of_row[places[-1] + 1 :])
        text = ["".join(chr(id) if id < 256 else "$" for id in part) for part in (of_row[: places[0] + 1], said)]
        found.append(tuple(text))
    return found


def test_targets_are_the_completion_and_its_end(tmp_path):
    data = written(tmp_path / "a", [{"prompt": "ab", "completion": "cd"}, {"prompt": "", "completion": "e"}])
    other = written(tmp_path / "b", [{"prompt": "longer", "completion": "!"}])
    store = load_examples(data, BYTES, 16, validation=other)
    part = store.rows(16, seed=0).part(0, 2, 0, 2)
    assert sorted(rows_of(part.ids, part.targets)) == [("$", "e$"), ("ab", "cd$")]
    assert (part.tokens, part.read, part.ids.shape) == (5, 6, (2, 8)) and store.notes == ()
    (batch,) = store.held_out(16).batches(4)
    assert rows_of(batch.ids.numpy(), batch.targets.numpy()) == [("longer", "!$")] and batch.tokens == 2
    # Without an end of text nothing ends a completion, and what has no prompt begins with its own first byte.
    store = load_examples(written(tmp_path / "a", [{"text": "xyz"}, {"text": "a"}]), WITHOUT_END, 16, validation=(
        written(tmp_path / "b", [{"text": "xy"}])))  # fmt: skip
    part = store.rows(16, seed=0).part(0, 1, 0, 1)
    assert rows_of(part.ids, part.targets) == [("x", "yz")]
    assert store.notes[0] == "1 example left out: nothing is to be said" and "no end of text" in store.notes[1]


def test_what_is_too_long(tmp_path):
    data = [{"prompt": "abcdef", "completion": "gh"}, {"prompt": "ab", "completion": "0123456789"}]
    store = load_examples(written(tmp_path / "a", data), BYTES, 5, validation=written(tmp_path / "b", data[:1]))
    part = store.rows(5, seed=0).part(0, 2, 0, 2)
    assert sorted(rows_of(part.ids, part.targets)) == [("b", "01234"), ("def", "gh$")]
    # Of both files.
    assert store.notes[0] == "3 prompts lost their beginning, which the 5 tokens of a row had no room for"
    assert store.notes[1].startswith("1 completion lost their end")
    (whole,) = encode(BYTES, [("ab", "0123456789")])
    assert len(fitted(whole, 12).completion) == 11 and fitted(whole, 12).prompt == [97, 98]
    # Where a label begins says nothing of its length.
    data = [{"text": "abcdef", "label": label} for label in ("x", "long")] + [{"text": "ab", "label": "x"}]
    store = load_examples(written(tmp_path / "a", data), BYTES, 7, validation=written(tmp_path / "b", data[:1]))
    part = store.rows(7, seed=0).part(0, 3, 0, 3)
    assert sorted(rows_of(part.ids, part.targets)) == [("ab", " x$"), ("ef", " long$"), ("ef", " x$")]
    assert store.length == 7 and store.notes[0].startswith("3 prompts lost")
    assert fitted(encode(BYTES, [("abcdef", " x")])[0], 7, longest=6).prompt == [101, 102]
    # A text is cut into rows, and nothing of it is lost.
    store = load_examples(written(tmp_path / "a", [{"text": "abcdefgh"}]), BYTES, 4, validation=data_of_texts(tmp_path))
    part = store.rows(4, seed=0).part(0, 3, 0, 3)
    assert sorted(rows_of(part.ids, part.targets)) == [("$", "abcd"), ("d", "efgh"), ("h", "$")]


def test_a_label_that_nothing_teaches_is_told(tmp_path):
    data = written(tmp_path / "a", [{"text": text, "label": text} for text in "xy"])
    other = written(tmp_path / "b", [{"text": text, "label": text} for text in "xzw"])
    for head in (False, True):
        store = load_examples(data, BYTES, 8, validation=other, head=head)
        assert store.labels == ("w", "x", "y", "z")
        assert store.notes == ("--validation has 2 labels that no example to train on has, as z",)
    assert load_examples(data, BYTES, 8, validation=data).notes == ()


def data_of_texts(tmp_path) -> str:
    return written(tmp_path / "texts", [{"text": "a"}])


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(tmp_path):
    store = load_examples(some(tmp_path / "a"), BYTES, 64)
    rows = len(store.train)
    sequence = store.rows(64, seed=3)
    epochs = [sequence.numbers(rows * epoch, rows).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert store.rows(64, seed=4).numbers(0, rows).tolist() != epochs[0]
    # Where a part begins does not matter.
    assert sequence.numbers(rows - 3, 7).tolist() == epochs[0][-3:] + epochs[1][:4]


def test_a_batch_is_the_same_for_any_number_of_processes_and_wherever_it_goes_on(tmp_path):
    store = load_examples(some(tmp_path / "a"), BYTES, 64)
    with Batches(store.rows(64, seed=1), 12) as batches:
        whole = [batches.next() for _ in range(9)]
    assert len({batch.ids.shape for batch in whole}) > 1
    for world in (2, 3):
        parts = []
        for rank in range(world):
            with Batches(store.rows(64, seed=1), 12, update=5, rank=rank, world=world) as batches:
                parts.append(batches.next())
        for name in ("ids", "targets"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole[5], name))
        assert {(part.tokens, part.read) for part in parts} == {whole[5][2:]}
    assert int((whole[5].targets != -100).sum()) == whole[5].tokens
    full = store.rows(64, seed=1, full=True).part(5, 12, 0, 12)
    assert full.ids.shape == (12, 64) and rows_of(full.ids, full.targets) == rows_of(*map(np.asarray, whole[5][:2]))


def test_without_a_prompt_an_example_is_held_out_by_what_is_said(tmp_path):
    rows = [{"prompt": "", "completion": f"{number} words"} for number in range(200)]
    store = load_examples(written(tmp_path / "a", rows), BYTES, 64, held_out=0.2)
    assert 20 <= len(store.validation) <= 60 and len(store.train) + len(store.validation) == 200


def test_an_example_is_held_out_by_its_prompt(tmp_path):
    rows = [{"text": f"text {n % 150}", "label": n % 2} for n in range(300)]
    store = load_examples(written(tmp_path / "a", rows), BYTES, 64, held_out=0.2)
    expected = [
        text for text in (f"text {n % 150}" for n in range(300))
        if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.2 * 2**64
    ]  # fmt: skip
    batches = store.held_out(64).batches(16)
    found = [given for batch in batches for given, _ in rows_of(batch.ids.numpy(), batch.targets.numpy())]
    assert found == expected and 30 < len(found) < 90 and len(store.train) == 300 - len(found)
    assert store.labels == ("0", "1") and store.amount.startswith(f"{300 - len(found)} examples of 2 labels")
    # Of a few at least one.
    few = load_examples(written(tmp_path / "a", rows[:5]), BYTES, 64, held_out=1e-9)
    assert (len(few.train), len(few.validation)) == (4, 1)
    assert [len(few.held_out(64, most).numbers) for most in (1, 9)] == [1, 1]
    names = {store.fingerprint, few.fingerprint, load_examples(written(tmp_path / "b", rows), BYTES, 64).fingerprint}
    assert len(names) == 3


def test_parts_that_are_empty_or_of_two_kinds(tmp_path):
    one = written(tmp_path / "a", [{"text": "a", "label": "b"}])
    with pytest.raises(UserError, match=r"--data .*: of 1 row with something to learn none is left to train on"):
        load_examples(one, BYTES, 8)
    texts = written(tmp_path / "b", [{"text": "ab"}, {"text": ""}])
    with pytest.raises(UserError, match=r"--validation .* is of the kind text, and --data .* of the kind label"):
        load_examples(one, BYTES, 8, validation=texts)
    empty = written(tmp_path / "c", [{"text": ""}])
    with pytest.raises(UserError, match=r"--validation .*: it has no example with something to learn"):
        load_examples(texts, BYTES, 8, validation=empty)
    with pytest.raises(UserError, match="the examples were made for rows of 3 tokens; length is 1"):
        load_examples(texts, BYTES, 8, validation=texts).rows(1, 0)
