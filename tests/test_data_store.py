"""What a manifest, a text and a folder of tokens are held against."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from gptkern.training import memory
from gptkern.training.data import text as texts
from gptkern.training.data.preparing import prepare, tokenizer_kind
from gptkern.training.data.store import Store
from gptkern.training.errors import UserError
from gptkern.training.exporting import check_target


def test_an_end_of_text_that_is_not_the_tokenizers(tmp_path):
    (tmp_path / "text").write_text("to be " * 100)
    prepare([str(tmp_path / "text")], tmp_path / "out", held_out=0)
    path = tmp_path / "out/manifest.json"
    manifest = json.loads(path.read_text())
    for end in (3, None):
        path.write_text(json.dumps(manifest | {"end_of_text": end}))
        with pytest.raises(UserError, match=r"end_of_text is (3|null), and the tokenizer's is 256"):
            Store.open(tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_model_is_not_written_among_tokens(tmp_path, overwrite):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds tokens \(manifest.json\); it needs another folder"):
        check_target(tmp_path, overwrite)


@pytest.mark.parametrize("name", ["bpe/tokenizer.json", "bpe8k.json"])
def test_files_whose_names_begin_as_an_encoding_does(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("{}")
    assert tokenizer_kind(name) == Path(name)


def test_a_pipe_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 4_000_000)
    monkeypatch.setattr(texts, "PIECE_BYTES", 2**16)
    os.mkfifo(tmp_path / "pipe")
    left = 5_000_000

    def write():
        nonlocal left
        try:
            with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
                while left > 0:
                    left -= pipe.write(b"y\n" * 5000)
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(UserError, match=r"--text .* needs more than the 4\.00 MB of memory that there are"):
        texts.load(str(tmp_path / "pipe"))
    thread.join()
    assert left > 3_000_000
