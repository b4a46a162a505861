"""Shards of token ids and their manifest: what was written is read, wherever a run was continued; whatever a file from
a stranger says is compared with what it has to be before memory is taken."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard

from gptkern.training.data import shards
from gptkern.training.data.shards import Layout, ShardTokens, ShardWriter, dtype_of, open_shard, read_frame
from gptkern.training.data.store import ArrayTokens, Store
from gptkern.training.errors import RunError, UserError

LAYOUT = Layout("uint16", 257, frame_tokens=64)


def some_ids(count: int, vocab_size: int = 257, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def written(folder: Path, ids, split: str = "train", layout: Layout = LAYOUT, frames: int = 4) -> list[dict]:
    writer = ShardWriter(folder, split, layout, shard_tokens=frames * layout.frame_tokens)
    writer.write(ids)
    return writer.close()


def opened(folder: Path, entries, layout: Layout = LAYOUT, **options) -> ShardTokens:
    return ShardTokens([open_shard(folder, entry, layout) for entry in entries], layout.dtype, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of 3 training shards, of 4, 4 and 2 frames, and one held-out shard."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    splits = {}
    for seed, (split, count) in enumerate({"train": 600, "validation": 100}.items()):
        entries = written(folder, some_ids(count, seed=seed), split)
        splits[split] = {"tokens": count, "documents": 3, "shards": entries}
    manifest = {
        "format": "gptkern-tokens", "version": 1, "tokenizer": {"kind": "bytes"}, "vocab_size": 257,
        "end_of_text": 256, "dtype": "uint16", "frame_tokens": 64, "splits": splits,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def changed(folder: Path, change) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(action, *words: str) -> str:
    """One line, in which all of the words stand; nothing large was allocated on the way to it."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message, message
    assert peak < 8e6, f"{peak} bytes"
    return message


# What is written is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [257, 65536, 65537, 2**31])
def test_what_is_written_is_read(tmp_path, vocab_size):
    layout = Layout(dtype_of(vocab_size), vocab_size, frame_tokens=50)
    ids = some_ids(1234, vocab_size)
    ids[:2] = 0, vocab_size - 1
    writer = ShardWriter(tmp_path, "train", layout, shard_tokens=200)
    for start in range(0, len(ids), 97):
        writer.write(ids[start : start + 97])
    entries = writer.close()
    assert writer.close() == entries and writer.tokens == 1234
    assert [entry["tokens"] for entry in entries] == [200] * 6 + [34]

    tokens = opened(tmp_path, entries, layout, cache_bytes=300)
    assert len(tokens) == 1234
    draw = np.random.default_rng(1)
    for start, stop in [(0, 0), (0, 1234), (1234, 1234), *(sorted(draw.integers(0, 1235, 2)) for _ in range(60))]:
        np.testing.assert_array_equal(tokens.read(start, stop), ids[start:stop])
    assert tokens._held <= 300
    for start, stop in ((-1, 3), (5, 4), (0, 1235)):
        with pytest.raises(IndexError):
            tokens.read(start, stop)


def test_the_files_are_of_the_seekable_format_and_of_zstd(tmp_path):
    """Read as the format's specification says, and by zstd's own program."""
    ids = some_ids(600)
    entries = written(tmp_path, ids)
    found = b""
    for entry in entries:
        data = (tmp_path / entry["file"]).read_bytes()
        assert len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]
        frames, descriptor, magic = struct.unpack("<IBI", data[-9:])
        assert (descriptor, magic) == (0x80, 0x8F92EAB1)
        table = data[-frames * 12 - 17 :]
        assert struct.unpack("<II", table[:8]) == (0x184D2A5E, frames * 12 + 9)
        assert hashlib.sha256(table).hexdigest() == entry["seek_table_sha256"]
        place = 0
        for compressed, content, checksum in struct.iter_unpack("<III", table[8:-9]):
            frame = data[place : place + compressed]
            found += (ids_of := zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False))
            assert len(ids_of) == content and frame[-4:] == struct.pack("<I", checksum)
            assert zstandard.get_frame_parameters(frame).has_checksum
            place += compressed
        assert place == len(data) - len(table)
    assert found == ids.astype("<u2").tobytes()
    program = subprocess.run(["zstd", "--version"], capture_output=True) if os.path.exists("/usr/bin/zstd") else None
    if program is not None:
        paths = [str(tmp_path / entry["file"]) for entry in entries]
        assert subprocess.run(["zstd", "-dc", *paths], capture_output=True, check=True).stdout == found


def test_a_writer_that_goes_on_from_any_state_writes_the_same_bytes(tmp_path):
    ids = some_ids(600)
    whole = tmp_path / "whole"
    whole.mkdir()
    entries = written(whole, ids)
    for number, at in enumerate([0, 1, 63, 64, 65, 255, 256, 257, 300, 511, 512, 599, 600]):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = ShardWriter(folder, "train", LAYOUT, shard_tokens=256)
        writer.write(ids[:at])
        state = json.loads(json.dumps(writer.state()))
        writer.write(ids[at : at + 30 * number])  # and then it is killed: in this shard, or further on
        if number % 2:
            writer.close()
        writer.abandon()
        writer = ShardWriter(folder, "train", LAYOUT, shard_tokens=256, state=state)
        assert writer.tokens == at
        writer.write(ids[at:])
        assert writer.close() == entries
        assert sorted(path.name for path in folder.iterdir()) == [entry["file"] for entry in entries]
        for entry in entries:
            assert (folder / entry["file"]).read_bytes() == (whole / entry["file"]).read_bytes()


def test_what_was_written_after_a_state_is_dropped(tmp_path):
    ids = some_ids(600)
    writer = ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=256)
    writer.write(ids[:330])
    state = writer.state()
    writer.write(ids[330:])
    writer.close()
    entries = ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=256, state=state).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [entry["file"] for entry in entries]
    np.testing.assert_array_equal(opened(tmp_path, entries).read(0, 330), ids[:330])


def test_a_writer_goes_on_from_nothing_that_is_not_there(tmp_path):
    writer = ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=256)
    writer.write(some_ids(400))
    state = writer.state()
    writer.abandon()
    path = tmp_path / "train-00001.zst.new"
    data = path.read_bytes()
    path.write_bytes(data[:-20] + b"?" + data[-19:])
    refused(
        lambda: ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=256, state=state), "train-00001.zst.new", "frame 1"
    )
    path.write_bytes(data[:-1])
    refused(
        lambda: ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=256, state=state), "train-00001.zst.new", "frame 1"
    )
    path.write_bytes(data)
    (tmp_path / "train-00000.zst").write_bytes(b"another")
    refused(lambda: ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=256, state=state), "train-00000.zst", "7 bytes")


def test_a_writer_refuses_ids_that_the_vocabulary_does_not_have(tmp_path):
    writer = ShardWriter(tmp_path, "train", LAYOUT)
    for ids in ([1, 257], [-1, 3], [65536 + 1], [2**40]):
        with pytest.raises(ValueError, match="it needs 0 to 256"):
            writer.write(np.array(ids))
    for ids in (np.zeros(3), np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="it needs integers"):
            writer.write(ids)
    assert writer.tokens == 0 and writer.close() == []
    with pytest.raises(ValueError, match="multiple"):
        ShardWriter(tmp_path, "train", LAYOUT, shard_tokens=65)


def test_a_disk_that_refuses_is_said(tmp_path):
    writer = ShardWriter(tmp_path / "gone", "train", LAYOUT)
    with pytest.raises(RunError, match=r"train-00000\.zst\.new"):
        writer.write(some_ids(64))


# What is damaged is found --------------------------------------------------------------------------------------------


def test_a_store_is_what_was_written(folder):
    store = Store.open(folder)
    np.testing.assert_array_equal(store.train.read(0, 600), some_ids(600))
    np.testing.assert_array_equal(store.validation.read(0, 100), some_ids(100, seed=1))
    assert store.tokenizer.vocab_size == 257 and store.name == "tokens" and store.manifest["version"] == 1
    again = Store.open(folder)
    assert again.fingerprint == store.fingerprint and len(store.fingerprint) == 64


def test_another_split_has_another_fingerprint(folder):
    before = Store.open(folder).fingerprint

    def move(manifest):
        train, validation = manifest["splits"].values()
        moved = train["shards"].pop()
        validation["shards"].append(moved)
        train["tokens"] -= moved["tokens"]
        validation["tokens"] += moved["tokens"]

    changed(folder, move)
    assert Store.open(folder).fingerprint != before


@pytest.mark.parametrize("place", ["header", "content", "checksum"])
def test_a_damaged_frame_is_named_and_the_others_are_read(folder, place):
    path = folder / "train-00001.zst"
    data = bytearray(path.read_bytes())
    shard = open_shard(
        folder, json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"][1], LAYOUT
    )
    start, stop = shard.offsets[2], shard.offsets[3]
    data[{"header": start + 5, "content": (start + stop) // 2, "checksum": stop - 1}[place]] ^= 1
    path.write_bytes(data)
    store = Store.open(folder)  # which reads no frame
    np.testing.assert_array_equal(store.train.read(0, 256 + 128), some_ids(600)[:384])
    np.testing.assert_array_equal(store.train.read(256 + 192, 600), some_ids(600)[448:])
    for _ in range(2):
        refused(lambda: store.train.read(380, 390), "train-00001.zst: frame 2 is damaged", "nothing was trained on it")


def test_every_flipped_bit_is_found(folder):
    """In any byte of a shard: when the folder is opened, or when its frame is read. None is read as something else."""
    path, right = folder / "train-00002.zst", some_ids(600)
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        entries = json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"]
        try:
            found = opened(folder, entries).read(0, 600)
        except UserError:
            continue
        # zstd's headers have bits that no decoder looks at.
        np.testing.assert_array_equal(found, right)


def test_a_shard_that_is_cut_or_another_is_found_before_anything_is_read(folder):
    first, second = (folder / f"train-0000{number}.zst" for number in (0, 1))
    data = first.read_bytes()
    for cut in (0, 1, 9, len(data) - 1):
        first.write_bytes(data[:cut])
        refused(lambda: Store.open(folder), "--data", "train-00000.zst has", f"the manifest says {len(data)}")
    first.write_bytes(data + b"\0")
    refused(lambda: Store.open(folder), "train-00000.zst has")
    first.unlink()
    refused(lambda: Store.open(folder), "train-00000.zst", "No such file")
    first.write_bytes(data)

    # The other one has the same number of tokens, and here the same number of bytes.
    other = written_with_size(folder.parent / "other", len(data))
    first.write_bytes(other)
    refused(lambda: Store.open(folder), "train-00000.zst: it is not the shard that the manifest speaks of")
    first.write_bytes(data)
    second.write_bytes(second.read_bytes())
    Store.open(folder)


def written_with_size(folder: Path, size: int) -> bytes:
    folder.mkdir()
    for seed in range(10, 200):
        entry = written(folder, some_ids(256, seed=seed))[0]
        if entry["bytes"] == size:
            return (folder / entry["file"]).read_bytes()
    raise AssertionError("no shard of that size")


def test_a_shard_that_is_exchanged_while_it_is_read_is_found(folder):
    store = Store.open(folder)
    store.train.read(0, 64)
    path = folder / "train-00000.zst"
    data = path.read_bytes()
    other = bytearray(written_with_size(folder.parent / "other", len(data)))
    path.write_bytes(other)
    refused(lambda: store.train.read(64, 128), "train-00000.zst: frame 1 is damaged")
    path.unlink()
    refused(lambda: store.train.read(64, 128), "train-00000.zst", "No such file")


def test_a_whole_frame_in_the_place_of_another_is_found(folder):
    """zstd itself finds nothing wrong with it."""
    assert len(FRAMES[1]) == len(FRAMES[2])
    forged(folder, FRAMES)
    store = Store.open(folder)
    path = folder / "train-00000.zst"
    path.write_bytes(path.read_bytes().replace(FRAMES[1] + FRAMES[2], FRAMES[2] + FRAMES[1]))
    for frame in (1, 2):
        refused(lambda frame=frame: store.train.read(64 * frame, 64 * frame + 1), f"frame {frame} is damaged")


def forged(folder: Path, frames: list[bytes], table: list[tuple[int, int, int]] | None = None, **entry) -> None:
    """The first shard of the training split, as a stranger wants it, with a manifest that agrees."""
    if table is None:
        table = [(len(frame), 128, int.from_bytes(frame[-4:], "little")) for frame in frames]
    rows = b"".join(struct.pack("<III", *row) for row in table)
    header = struct.pack("<II", 0x184D2A5E, len(rows) + 9)
    end = header + rows + struct.pack("<IBI", entry.pop("count", len(table)), *entry.pop("end", (0x80, 0x8F92EAB1)))
    data = b"".join(frames) + end
    (folder / "train-00000.zst").write_bytes(data)

    def change(manifest):
        right = {"bytes": len(data), "seek_table_sha256": hashlib.sha256(end).hexdigest(), **entry}
        split = manifest["splits"]["train"]
        split["shards"][0].update(right)
        split["tokens"] = sum(shard["tokens"] for shard in split["shards"])

    changed(folder, change)


def frame_of(ids, **options) -> bytes:
    content = np.asarray(ids, "<u2").tobytes()
    return zstandard.ZstdCompressor(**{"write_checksum": True, **options}).compress(content)


FRAMES = [frame_of(np.arange(64) + number) for number in range(4)]
CHECKSUMS = [int.from_bytes(frame[-4:], "little") for frame in FRAMES]
RIGHT = [(len(frame), 128, checksum) for frame, checksum in zip(FRAMES, CHECKSUMS)]


def test_what_the_forger_of_these_tests_writes_is_read_where_it_is_right(folder):
    forged(folder, FRAMES)
    np.testing.assert_array_equal(Store.open(folder).train.read(64, 128), np.arange(64) + 1)


@pytest.mark.parametrize(
    "table, options, words",
    [
        ([(2**32 - 1, 128, 0), *RIGHT[1:]], {}, "do not fill the file"),
        ([(RIGHT[0][0], 2**32 - 1, 0), *RIGHT[1:]], {}, "do not hold 256 ids of uint16"),
        ([(0, 128, 0), *RIGHT[1:]], {}, "do not fill the file"),
        ([(RIGHT[0][0] + RIGHT[1][0], 128, 0), (0, 128, 0), *RIGHT[2:]], {}, None),
        ([*RIGHT, RIGHT[0]], {}, "is not the shard"),
        (RIGHT[:3], {}, "is not the shard"),
        (RIGHT, {"count": 2**32 - 1}, "seek table"),
        (RIGHT, {"count": 0}, "seek table"),
        (RIGHT, {"end": (0x00, 0x8F92EAB1)}, "seek table"),
        (RIGHT, {"end": (0x80, 0x8F92EAB2)}, "seek table"),
        (RIGHT, {"tokens": 2**47}, "frames, which a shard of"),
        (RIGHT, {"tokens": 257}, "is not the shard"),
        (RIGHT, {"tokens": 255}, "do not hold 255 ids"),
        (RIGHT, {"tokens": 192}, "is not the shard"),
    ],
)
def test_a_forged_seek_table_is_refused(folder, table, options, words):
    forged(folder, FRAMES, table, **options)
    if words is not None:
        refused(lambda: Store.open(folder), "train-00000.zst", words)
    else:
        store = Store.open(folder)
        for start in (0, 64):
            refused(lambda start=start: store.train.read(start, start + 1), "train-00000.zst: frame", "is damaged")


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(np.arange(64), write_checksum=False),
        frame_of(np.arange(64), write_content_size=False),
        frame_of(np.arange(63)),
        frame_of(np.arange(65)),
        frame_of(np.zeros(2_000_000)),  # 150 bytes and more become 4 MB
        frame_of(np.zeros(50_000_000)),  # more bytes than 64 ids can have
        # A header that says 128 bytes, and a block that is 128 kB: magic, descriptor, size, a byte so many times.
        struct.pack("<IBB", 0xFD2FB528, 0x24, 128) + (2**17 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x" + bytes(4),
        frame_of(np.arange(32)) + frame_of(np.arange(32)),
        frame_of(np.arange(64)) + frame_of([]),
        struct.pack("<II", 0x184D2A50, 20) + bytes(20),
        # A header that says 2**62 bytes: magic, descriptor (size in 8 bytes, one segment, checksum), size, empty block.
        struct.pack("<IBQ", 0xFD2FB528, 0xE4, 2**62) + b"\1\0\0" + bytes(4),
        # A window of 2 GB, which is no single segment.
        struct.pack("<IBB", 0xFD2FB528, 0x04, 0xA8) + b"\1\0\0" + bytes(4),
        bytes(40),
    ],
)
def test_a_forged_frame_is_refused_where_it_is_read(folder, frame):
    forged(folder, [frame, *FRAMES[1:]])
    try:
        store = Store.open(folder)
    except UserError as error:
        assert "do not fill the file" in str(error) and len(frame) > 193  # longer than its ids can be
        return
    assert len(frame) <= 193
    refused(lambda: store.train.read(3, 4), "train-00000.zst: frame 0 is damaged", "nothing was trained on it")
    np.testing.assert_array_equal(store.train.read(64, 128), np.arange(64) + 1)


def test_an_id_that_the_vocabulary_does_not_have_is_found(folder):
    forged(folder, [FRAMES[0], frame_of(np.arange(194, 258)), *FRAMES[2:]])
    store = Store.open(folder)
    refused(lambda: store.train.read(100, 101), "train-00000.zst: frame 1 has the id 257", "ends at 256")
    changed(folder, lambda manifest: manifest.update(vocab_size=256))
    refused(lambda: Store.open(folder), "manifest.json")  # the end of text is none of these, nor has the tokenizer 256


def test_another_dtype_is_found(folder):
    changed(folder, lambda manifest: manifest.update(dtype="uint32"))
    refused(lambda: Store.open(folder), "do not hold 256 ids of uint32")


# The manifest ---------------------------------------------------------------------------------------------------------


def entry_with(**values):
    return lambda manifest: manifest["splits"]["train"]["shards"][0].update(values)


@pytest.mark.parametrize(
    "change, words",
    [
        (entry_with(file="/etc/passwd"), "splits.train.shards[0].file is"),
        (entry_with(file="../train-00000.zst"), "a file's name without a folder"),
        (entry_with(file=".."), "a file's name without a folder"),
        (entry_with(file=""), "a file's name without a folder"),
        (entry_with(file="sub/train-00000.zst"), "a file's name without a folder"),
        (entry_with(file="C:\\train-00000.zst"), "a file's name without a folder"),
        (entry_with(file="train\0.zst"), "a file's name without a folder"),
        (entry_with(file="x" * 100_000), "a file's name without a folder"),
        (entry_with(file=["train-00000.zst"]), "a file's name without a folder"),
        (entry_with(file="\udcff.zst"), "No such file"),
        (entry_with(file="line\nbreak"), "break"),
        (entry_with(file="link.zst"), "link.zst is a link"),
        (entry_with(file="folder"), "is no regular file"),
        (entry_with(file="pipe"), "is no regular file"),
        (entry_with(file="train-00001.zst"), "stands there twice"),
        (entry_with(file="validation-00000.zst"), "stands there twice"),
        (entry_with(tokens=-256), "splits.train.shards[0].tokens is -256"),
        (entry_with(tokens=0), "tokens is 0"),
        (entry_with(tokens=True), "tokens is true"),
        (entry_with(tokens=256.0), "tokens is 256.0"),
        (entry_with(tokens="256"), "tokens is"),
        (entry_with(tokens=float("nan")), "tokens is NaN"),
        (entry_with(tokens=10**4000), "tokens is a number of more than 64 bits"),
        (entry_with(tokens=2**60), "tokens is"),
        (entry_with(bytes=-1), "bytes is -1"),
        (entry_with(bytes=2**50), "the manifest says"),
        (entry_with(seek_table_sha256="00"), "is not the shard that the manifest speaks of"),
        (entry_with(seek_table_sha256=None), "seek_table_sha256 is null"),
        (lambda manifest: manifest["splits"]["train"]["shards"][0].pop("bytes"), "no splits.train.shards[0].bytes"),
        (lambda manifest: manifest["splits"]["train"].update(tokens=601), "it needs 600, the sum of its shards"),
        (lambda manifest: manifest["splits"]["train"].update(shards={}), "splits.train.shards is an object"),
        (lambda manifest: manifest["splits"]["train"]["shards"].append(3), "splits.train.shards[3] is 3"),
        (lambda manifest: manifest["splits"].pop("validation"), "has no splits.validation"),
        (lambda manifest: manifest.update(splits=[]), "splits is a list"),
        (lambda manifest: manifest.update(format="other"), "format is"),
        (lambda manifest: manifest.update(version=2), "version is 2"),
        (lambda manifest: manifest.update(version=True), "version is true"),
        (lambda manifest: manifest.update(dtype="float64"), "dtype is"),
        (lambda manifest: manifest.update(dtype=["uint16"]), "dtype is a list"),
        (lambda manifest: manifest.update(vocab_size=0), "vocab_size is 0"),
        (lambda manifest: manifest.update(vocab_size=300), "the tokenizer has 257"),
        (lambda manifest: manifest.update(end_of_text=257), "end_of_text is 257"),
        (lambda manifest: manifest.update(frame_tokens=2**40), "frame_tokens is"),
        (lambda manifest: manifest.update(frame_tokens=32), "is not the shard"),
        (lambda manifest: manifest.pop("tokenizer"), "no tokenizer"),
        (lambda manifest: manifest.update(tokenizer="bytes"), "tokenizer is"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(folder, change, words):
    outside = folder.parent / "outside.zst"
    outside.write_bytes((folder / "train-00000.zst").read_bytes())
    (folder / "link.zst").symlink_to(outside)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    changed(folder, change)
    message = refused(lambda: Store.open(folder), f"--data {str(folder)[:30]}", words)
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"3", "no JSON object"),
        (b"{}", "has no format"),
        (b'{"format": ' + b"1" * 10_000 + b"}", "manifest.json"),
    ],
)
def test_what_is_no_manifest_is_refused(folder, data, words):
    (folder / "manifest.json").write_bytes(data)
    refused(lambda: Store.open(folder), words)


def test_a_folder_that_is_none_is_refused(folder, tmp_path, monkeypatch):
    refused(lambda: Store.open(tmp_path / "nowhere"), "--data", "there is no such folder")
    refused(lambda: Store.open(folder / "manifest.json", option="--other"), "--other", "it needs a folder")
    refused(lambda: Store.open(tmp_path), "it has no manifest.json")
    monkeypatch.setattr("gptkern.training.data.store.MOST_MANIFEST_BYTES", 100)
    refused(lambda: Store.open(folder), "manifest.json has", "100 B at most")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    refused(lambda: Store.open(folder), "manifest.json", "link")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    refused(lambda: Store.open(folder), "no regular file")


# In memory ------------------------------------------------------------------------------------------------------------


def test_an_array_is_read_as_shards_are():
    tokens = ArrayTokens(np.arange(10, dtype=np.uint8))
    assert len(tokens) == 10
    np.testing.assert_array_equal(tokens.read(3, 10), np.arange(3, 10))
    for start, stop in ((-1, 3), (5, 4), (0, 11)):
        with pytest.raises(IndexError):
            tokens.read(start, stop)
    for array in (np.zeros(3), np.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="it needs integers"):
            ArrayTokens(array)


def test_few_frames_are_kept(tmp_path, monkeypatch):
    """A frame that is kept is not read again; the one that was used longest ago goes first."""
    tokens = opened(tmp_path, written(tmp_path, some_ids(600)), cache_bytes=3 * 128)
    reads = []
    monkeypatch.setattr(shards, "read_frame", lambda shard, frame: reads.append(frame) or read_frame(shard, frame))
    for frame in (0, 1, 2, 0, 3, 0, 1):
        tokens.read(64 * frame, 64 * frame + 1)
    assert reads == [0, 1, 2, 3, 1]
