"""Texts to shards: held against a preparation of a dozen lines, killed anywhere, refused before anything is changed."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zstandard
from test_data_sources import cut, some_text
from test_data_tokenizers import some_text as some_words
from tokenizers import Tokenizer as Inner

from gptkern.training.data import preparing, work
from gptkern.training.data.preparing import prepare
from gptkern.training.data.store import Store
from gptkern.training.data.tokenizers import train_bpe
from gptkern.training.errors import RunError, UserError


def prepared(documents: list[list[bytes]], encode, end: int, held_out: float) -> dict[str, list[int]]:
    """The stream of each split, of documents in pieces: the whole rule once more, on lists."""
    streams: dict[str, list[int]] = {"train": [], "validation": []}
    for pieces in documents:
        before = None
        for piece in pieces:
            share = int(hashlib.sha256(piece).hexdigest()[:16], 16) / 2**64
            split = "validation" if share < held_out else "train"
            if before not in (None, split):
                streams[before].append(end)
            streams[split] += encode(piece)
            before = split
        if before:
            streams[before].append(end)
    return streams


def streams(folder) -> dict[str, list[int]]:
    store = Store.open(folder)
    return {name: getattr(store, name).read(0, len(getattr(store, name))).tolist() for name in ("train", "validation")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def corpus(tmp_path) -> tuple[list[str], list[list[bytes]]]:
    """(texts, their documents in pieces): a folder of all kinds, and a file twice."""
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    long, other_long = some_text(1, 60_000).encode(), some_text(2, 60_000).encode()
    short = "kürzer <|endoftext|> ".encode() * 5
    lines = [f"document {number} <|endoftext|>" * (number % 7) for number in range(200)] + ["ä" * 20_000]
    (folder / "a.txt").write_bytes(long)
    (folder / "b/1.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": text}) for text in lines).encode())
    )
    (folder / "b/2.zst").write_bytes(zstandard.ZstdCompressor().compress(other_long))
    (folder / "c").write_bytes(b"")
    other = tmp_path / "other.md"
    other.write_bytes(short)
    documents = [[text.encode()] for text in lines if text]
    documents = [cut(long), *documents, cut(other_long), [short], [short]]
    return [str(folder), str(other), str(other)], documents


@pytest.mark.parametrize("held_out", [0.0, 0.05, 0.5])
def test_the_streams_are_those_of_the_rule(tmp_path, corpus, held_out):
    texts, documents = corpus
    found = prepare(texts, tmp_path / "out", held_out=held_out, frame_tokens=1000, shard_tokens=50_000)
    expected = prepared(documents, list, 256, held_out)
    assert streams(tmp_path / "out") == expected
    manifest = found.manifest
    assert manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert {name: split["documents"] for name, split in manifest["splits"].items()} == {
        name: ids.count(256) for name, ids in expected.items()
    }
    assert manifest["text_bytes"] == sum(len(piece) for document in documents for piece in document)
    assert found.empty == 29 and found.how == "new" and not found.sampled
    assert (
        0.95
        < found.gzip_bytes / len(gzip.compress(b"".join(piece for document in documents for piece in document), 6))
        < 1.05
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", *(shard["file"] for split in manifest["splits"].values() for shard in split["shards"])]
    )
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            data = (tmp_path / "out" / shard["file"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_of_a_small_text_the_piece_with_the_least_hash_is_held_out(tmp_path):
    lines = [f"document {number}" for number in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", held_out=1e-9)
    least = min(lines, key=lambda line: hashlib.sha256(line.encode()).digest())
    found = streams(tmp_path / "out")
    assert found["validation"] == [*least.encode(), 256]
    assert found["train"] == [id for line in lines if line != least for id in [*line.encode(), 256]]


def test_an_encoding_is_trained_on_the_training_split_alone(tmp_path, corpus):
    texts, documents = corpus
    prepare(texts, tmp_path / "out", tokenizer="bpe:600", held_out=0.3)
    path = tmp_path / "out/tokenizer.json"
    inner = Inner.from_file(str(path))
    inner.encode_special_tokens = True
    end = inner.token_to_id("<|endoftext|>")
    expected = prepared(documents, lambda piece: inner.encode(piece.decode()).ids, end, 0.3)
    assert streams(tmp_path / "out") == expected and min(map(len, expected.values())) > 1000
    kept = [
        piece.decode()
        for document in documents
        for piece in document
        if int(hashlib.sha256(piece).hexdigest()[:16], 16) / 2**64 >= 0.3
    ]
    assert json.loads(train_bpe(kept, 600)._text) == json.loads(path.read_text())
    # The same tokenizer from a file gives the same shards.
    prepare(texts, tmp_path / "again", tokenizer=str(path), held_out=0.3)
    shards = {name: data for name, data in contents(tmp_path / "out").items() if name != "manifest.json"}
    assert shards.items() <= contents(tmp_path / "again").items()


def test_a_pipe_is_what_comes_through_it(tmp_path, corpus, monkeypatch):
    text = some_text(3, 100_000).encode()
    (tmp_path / "text").write_bytes(text)
    prepare([str(tmp_path / "text")], tmp_path / "file", held_out=0.3)
    for name, data in {"plain": text, "gzip": gzip.compress(text), "zstd": zstandard.compress(text)}.items():
        read, write = os.pipe()
        if os.fork() == 0:
            with open(write, "wb") as file:
                file.write(data)
            os._exit(0)
        os.close(write)
        with open(read) as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            found = prepare(["-"], tmp_path / name, held_out=0.3)
        os.wait()
        assert found.manifest["sources"] == ["standard input"]
        assert streams(tmp_path / name) == streams(tmp_path / "file")
        assert len(contents(tmp_path / name)) == 3


@pytest.mark.deep
def test_the_number_of_threads_changes_no_byte(tmp_path, corpus):
    texts, _ = corpus
    program = (
        "import sys\nfrom gptkern.training.data.preparing import prepare\n"
        "prepare(sys.argv[2:], sys.argv[1], tokenizer='bpe:700', held_out=0.2)"
    )
    for threads in ("1", "5"):
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / threads), *texts], check=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads},
        )  # fmt: skip
    assert contents(tmp_path / "1") == contents(tmp_path / "5")


# Ended before its end -------------------------------------------------------------------------------------------------

WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def prepare_until(event: int, texts: list[str], out: Path, **options) -> int | None:
    """In a process of its own that ends, as by a power cut, before the event'th time that it touches the folder.

    Returns the number of times that there are, or None where it was ended.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def hook(name, arguments):
            nonlocal count
            if name in WRITES and str(out) in str(arguments[0]):
                count += 1
                if count == event:
                    os._exit(9)

        try:
            preparing.SECONDS_BETWEEN_STATES = 0.0
            preparing.BATCH_BYTES = 2**16
            sys.addaudithook(hook)
            prepare(texts, out, **options)
            os.write(write, str(count).encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 9:
        return None
    assert said.isdecimal(), said
    return int(said)


@pytest.fixture
def whole(tmp_path, corpus):
    """(texts, an uninterrupted preparation of them, the times that it touched its folder, its options)."""

    def run(tokenizer):
        # Half of the pieces are held out: hardly a state is taken where no document is open.
        options = {"tokenizer": tokenizer, "held_out": 0.5, "frame_tokens": 5000, "shard_tokens": 50_000}
        times = prepare_until(0, corpus[0], tmp_path / "whole", **options)
        assert times > 50
        return times, options

    return run


@pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("bpe:300", marks=pytest.mark.deep)])
def test_ended_anywhere_it_goes_on_to_the_same_bytes(tmp_path, corpus, whole, tokenizer):
    times, options = whole(tokenizer)
    # The first, some in the middle, the moves at the end.
    for event in (2, 9, times // 2, times - 6, times - 3, times) if tokenizer == "bytes" else (12, times // 2):
        out = tmp_path / f"ended-{event}"
        assert prepare_until(event, corpus[0], out, **options) is None
        assert prepare_until(0, corpus[0], out, **options) is not None
        assert contents(out) == contents(tmp_path / "whole"), event
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


@pytest.mark.deep
@pytest.mark.parametrize("tokenizer, step", [("bytes", 1), ("bpe:300", 7)])
def test_ended_at_each_single_place_it_goes_on_to_the_same_bytes(tmp_path, corpus, whole, tokenizer, step):
    times, options = whole(tokenizer)
    for event in range(1, times + 1, step):
        out = tmp_path / f"ended-{event}"
        assert prepare_until(event, corpus[0], out, **options) is None
        # What goes on is ended too.
        if prepare_until(event % 13 + 5, corpus[0], out, **options) is None:
            prepare_until(0, corpus[0], out, **options)
        assert contents(out) == contents(tmp_path / "whole"), event
        assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))


def test_ended_while_it_replaces_the_old_the_folder_is_never_half_of_each(tmp_path, corpus):
    old = {"frame_tokens": 2**12}
    new = {**old, "held_out": 0.5, "overwrite": True}
    prepare(corpus[0], tmp_path / "old", **old)
    prepare(corpus[0], tmp_path / "new", **new)
    expected = [streams(tmp_path / "old"), streams(tmp_path / "new")]
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    times = prepare_until(0, corpus[0], tmp_path / "out", **new)
    seen = set()
    for event in range(times - 9, times + 1):
        out = tmp_path / f"out-{event}"
        shutil.copytree(tmp_path / "old", out)
        assert prepare_until(event, corpus[0], out, **new) is None
        whole = (out / "manifest.json").exists()
        seen.add(expected.index(streams(out)) if whole else None)
        prepare_until(0, corpus[0], out, **new)
        assert contents(out) == contents(tmp_path / "new")
    assert seen == {0, None, 1}


def test_it_goes_on_and_does_not_begin_anew(tmp_path, corpus, monkeypatch):
    texts, _ = corpus
    monkeypatch.setattr(preparing, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(preparing, "BATCH_BYTES", 2**15)
    seen: list[int] = []

    def watch(progress):
        if progress.stage == "writing tokens":
            seen.append(progress.tokens)
            if len(seen) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(texts, tmp_path / "out", watch=watch)
    written, seen[:] = seen[-1], []
    with pytest.raises(UserError, match="holds what another command began and did not finish"):
        prepare(texts, tmp_path / "out", held_out=0.2)
    found = prepare(texts, tmp_path / "out", watch=lambda progress: seen.append(progress.tokens))
    assert found.how == "continued" and min(tokens for tokens in seen if tokens) >= written > 0
    assert prepare(texts, tmp_path / "out").how == "complete"
    prepare(texts, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.deep
@pytest.mark.parametrize("overwrite, times", [(False, 20), (True, 6)])
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path, overwrite, times):
    """The command itself, with SIGKILL."""
    draw = random.Random(0)
    (tmp_path / "text").write_text("".join(some_text(seed, 100_000) for seed in range(10)))
    options = ["--tokenizer", "bpe:1000", *(["--overwrite"] if overwrite else [])]
    program = (
        "import sys; from gptkern import cli; from gptkern.training.data import preparing\n"
        "preparing.SECONDS_BETWEEN_STATES = 0.05; sys.exit(cli.main())"
    )

    def run(out):
        return subprocess.Popen(
            [sys.executable, "-c", program, "data", str(tmp_path / "text"), "--out", str(out), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    before = time.monotonic()
    assert run(tmp_path / "whole").communicate() and (tmp_path / "whole/manifest.json").exists()
    seconds = time.monotonic() - before
    out, kills = tmp_path / "out", 0
    if overwrite:
        prepare([str(tmp_path / "text")], out)
        old = contents(out)
    while kills < times:
        process = run(out)
        try:
            said, _ = process.communicate(timeout=draw.uniform(0.1, 1.1) * seconds)
            assert process.returncode == 0, said.decode()
            assert contents(out) == contents(tmp_path / "whole")
            if overwrite:
                continue
            for path in out.iterdir():
                path.unlink()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            # Never half of each: it may have been killed while it moved the new, and then nothing is called whole.
            if overwrite and (found := contents(out)).get("manifest.json"):
                assert old.items() <= found.items() or contents(tmp_path / "whole").items() <= found.items()
    said, _ = run(out).communicate()
    assert contents(out) == contents(tmp_path / "whole"), said.decode()


# Refused, with everything as it was -----------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    def state():
        return {path: None if path.is_dir() else path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}

    def run(words, texts, out="out", **options):
        before = state()
        with pytest.raises(UserError, match=words) as error:
            prepare([str(text) for text in texts], tmp_path / out, **options)
        assert state() == before
        assert "\n" not in str(error.value)

    return run


def test_what_is_wrong_at_the_end_leaves_nothing(tmp_path, refused, monkeypatch):
    """Also where it is found late, after shards were written."""
    text = tmp_path / "a.txt"
    text.write_bytes(some_text(1, 400_000).encode() + b"\xff")
    monkeypatch.setattr(preparing, "LOOKED_BYTES", 2**16)
    refused("is not UTF-8", [text], out="new/folder", frame_tokens=1000, shard_tokens=1000)
    refused("is not UTF-8", [text], tokenizer="bpe:300")
    prepare(
        [str(text.with_name("good"))] if text.with_name("good").write_text("to be " * 100) else [],
        tmp_path / "out",
        held_out=0,
    )
    refused("is not UTF-8", [text], overwrite=True)
    assert Store.open(tmp_path / "out").manifest["text_bytes"] == 600


def test_no_text(tmp_path, refused):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "lines.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "text").write_text("not")
    refused("TEXT is missing", [])
    refused("empty: it is empty; it needs text", [tmp_path / "text", tmp_path / "empty"])
    refused("empty.gz: it is empty", [tmp_path / "empty.gz"])
    refused("lines.jsonl: it has no document with text", [tmp_path / "lines.jsonl"])
    refused("TEXT has no text in it", [tmp_path / "folder"])
    (tmp_path / "folder/empty").write_bytes(b"")
    refused("TEXT has no text in it", [tmp_path / "folder"])
    words = "of 3 bytes of text nothing was left to train on; it needs more text, or a smaller part"
    for held_out in (0.05, 0.99):
        refused(f"--held-out {held_out}: {words}", [tmp_path / "text"], held_out=held_out)
    refused("--field body is of JSONL, of which nothing was given", [tmp_path / "text"], field="body")
    refused("bpe:300: the text to train on makes 25[0-9] tokens", [tmp_path / "text"], tokenizer="bpe:300", held_out=0)


def test_places(tmp_path, refused):
    (tmp_path / "texts").mkdir()
    text = tmp_path / "texts/text"
    text.write_text("to be " * 100)
    (tmp_path / "link").symlink_to("texts")
    for out in ("texts", "texts/out", "link/out"):
        refused("lies in .*texts, which is read; it needs another place", [tmp_path / "texts"], out=out)
    for name, words in {
        "train-00000.zst": "holds train-00000.zst: --overwrite replaces it",
        "tokenizer.json": "holds tokenizer.json: --overwrite replaces it",
    }.items():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
        refused(words, [text], held_out=0)
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out/manifest.json").write_text('{"name": "an app"}')
    for overwrite in (False, True):
        refused(
            "holds a manifest.json that is not of gptkern; it needs another", [text], held_out=0, overwrite=overwrite
        )
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/mine").write_text("mine")
    prepare([str(text)], tmp_path / "out", held_out=0)
    refused("holds other tokens: --overwrite replaces them, another --out leaves them", [text], held_out=0.5)
    prepare([str(text)], tmp_path / "out", held_out=0, tokenizer="bpe:258", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "mine", "tokenizer.json", "train-00000.zst",
    ]  # fmt: skip
    prepare([str(text)], tmp_path / "out", held_out=0, overwrite=True)
    assert not (tmp_path / "out/tokenizer.json").exists()
    text.write_text("changed " * 100)
    refused("holds other tokens", [text], held_out=0)
    (tmp_path / "out/train-00000.zst").write_bytes(b"damaged")
    os.utime(text, ns=(1, 1))
    prepare([str(text)], tmp_path / "out", held_out=0, overwrite=True)
    (tmp_path / "out/train-00000.zst").write_bytes(b"damaged")
    refused("--out .*train-00000.zst", [text], held_out=0)


def test_two_at_once(tmp_path, refused):
    (tmp_path / "text").write_text("to be " * 100)
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    refused("another program is preparing tokens in it", [tmp_path / "text"], held_out=0)
    os.close(descriptor)
    prepare([str(tmp_path / "text")], tmp_path / "out", held_out=0)


def test_a_damaged_state(tmp_path, refused):
    (tmp_path / "text").write_text("to be " * 100)
    for state in ("", "[]", "{", "{}", '{"asked": 1}', "[" * 100_000):
        (tmp_path / "out" / work.NAME).mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / work.NAME / work.STATE).write_text(state)
        refused("holds what another command began and did not finish", [tmp_path / "text"], held_out=0)
    prepare([str(tmp_path / "text")], tmp_path / "out", held_out=0, overwrite=True)
    assert len(contents(tmp_path / "out")) == 2


def test_a_full_disk_keeps_what_was_done(tmp_path, corpus):
    """A file may have 20 kB and no more, which the system says as it says that a disk is full."""
    texts, _ = corpus
    program = (
        "import resource, sys\nfrom gptkern.training.data import preparing\n"
        "preparing.SECONDS_BETWEEN_STATES, preparing.BATCH_BYTES = 0.0, 2**15\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "preparing.prepare(sys.argv[2:], sys.argv[1], frame_tokens=4096)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out"), *texts], capture_output=True, text=True
    )
    assert "RunError" in process.stderr and "train-00000.zst.new cannot be written: File too large" in process.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    assert prepare(texts, tmp_path / "out", frame_tokens=4096).how == "continued"
    prepare(texts, tmp_path / "whole", frame_tokens=4096)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_texts_that_change_meanwhile(tmp_path, corpus):
    texts, _ = corpus

    first = Path(texts[0]) / "a.txt"
    size = first.stat().st_size

    def watch(progress):
        # One that was read already: of the others the reader says it.
        if progress.stage == "writing tokens" and progress.done > size:
            first.write_text("another text" * 5)

    with pytest.raises(RunError, match="the texts were changed while they were read"):
        prepare(texts, tmp_path / "out", watch=watch)
    with pytest.raises(UserError, match="or the texts have changed since; --overwrite begins anew"):
        prepare(texts, tmp_path / "out")


@pytest.mark.deep
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:1000"])
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer):
    # VmHWM: the resource module's figure is that of the process that forked, where that one was larger.
    program = (
        "import re, sys\nfrom gptkern.training.data.preparing import prepare\n"
        f"prepare(sys.argv[2:], sys.argv[1], tokenizer={tokenizer!r})\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    peaks = []
    part = some_words(0, 100_000)
    for times in (4, 32):
        lines = [f"{number} {part[at : at + 3000]}" for number in range(times) for at in range(0, len(part), 3000)]
        texts = [tmp_path / f"{times}.jsonl", tmp_path / f"{times}.txt"]
        texts[0].write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        texts[1].write_text(part * times)
        process = subprocess.run(
            [sys.executable, "-c", program, tmp_path / f"out-{times}", *texts],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(int(process.stdout))
    assert peaks[0] > 10_000 and peaks[1] < 1.1 * peaks[0] + 10_000, peaks
