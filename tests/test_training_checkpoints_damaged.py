"""Checkpoints that are damaged, or a stranger's: named, passed over, and nothing in them is run or believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_checkpoints import counted, counter_of, names, save

from gptkern.training.checkpoint_reading import LARGEST_JSON, dumped
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.errors import RunError, UserError

TENSORS = "tensors-00001-of-00001.safetensors"
FILES = ("about.json", "checksums.json", TENSORS)


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    """The second of two."""
    checkpoints = Checkpoints(tmp_path / "run")
    save(checkpoints, 1)
    save(checkpoints, 2)
    return checkpoints.all()[1]


def passed_over(checkpoint: Checkpoint, *words: str) -> None:
    """It is found damaged in words, and the one before is taken."""
    with pytest.raises(UserError) as found:
        Checkpoint(checkpoint.folder).verify()
    for word in (*words, str(checkpoint.folder)):
        assert word in str(found.value), found.value
    newest, lines = Checkpoints(checkpoint.folder.parent).newest()
    assert (newest.step, lines) == (1, [str(found.value)])
    assert "\n" not in lines[0]


# --- Damage -----------------------------------------------------------------------------------------------------------


def flips(folder: Path, bits: dict[int, list[int]]) -> None:
    """Each byte of each file with each of its bits turned: never whole, and not read as something else."""
    for name in FILES:
        path = folder / name
        content = bytearray(path.read_bytes())
        for position, of in bits.items():
            for bit in of if position < len(content) else ():
                content[position] ^= 1 << bit
                path.write_bytes(content)
                with pytest.raises(UserError):
                    Checkpoint(folder).verify()
                content[position] ^= 1 << bit
        path.write_bytes(content)
    Checkpoint(folder).verify()


def test_a_bit_that_turned_anywhere_is_found(checkpoint):
    numbers = random.Random(1)
    flips(checkpoint.folder, {position: [numbers.randrange(8)] for position in numbers.sample(range(1200), 250)})


@pytest.mark.deep
def test_each_bit_that_turned_is_found(checkpoint):
    flips(checkpoint.folder, {position: list(range(8)) for position in range(1500)})


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_ends_early_or_late_or_is_not_there_is_named(name, checkpoint):
    path = checkpoint.folder / name
    content = path.read_bytes()
    for length in {0, 1, 7, 8, 9, len(content) // 2, len(content) - 1}:
        path.write_bytes(content[:length])
        passed_over(checkpoint, name)
    path.write_bytes(content + b"\0")
    passed_over(checkpoint, name)
    path.write_bytes(content + b"\n")
    passed_over(checkpoint, name)
    path.unlink()
    passed_over(checkpoint, name, "it is not there")
    path.write_bytes(content)
    assert counter_of(Checkpoints(checkpoint.folder.parent).newest()[0]) == 2


def test_files_that_were_added_renamed_or_exchanged_are_named(checkpoint):
    folder = checkpoint.folder
    for name in (".metadata", "more.json", "tensors-00002-of-00002.safetensors", "model.safetensors", "a\nb"):
        (folder / name).write_bytes((folder / TENSORS).read_bytes())
        passed_over(checkpoint, "it is none of the checkpoint's files")
        (folder / name).unlink()
    (folder / "folder").mkdir()
    passed_over(checkpoint, "folder: it is none of the checkpoint's files")
    (folder / "folder").rmdir()
    (folder / TENSORS).rename(folder / "tensors-00001-of-00002.safetensors")
    passed_over(checkpoint, "tensors-00001-of-00002.safetensors: it is none")
    (folder / "tensors-00001-of-00002.safetensors").rename(folder / TENSORS)
    shutil.copy(folder.parent / "step-00000001" / TENSORS, folder / TENSORS)
    passed_over(checkpoint, f"{TENSORS}: its bytes are not those that were written")


def test_a_folder_under_another_steps_name_is_found(checkpoint):
    renamed = checkpoint.folder.with_name("step-00000900")
    checkpoint.folder.rename(renamed)
    passed_over(Checkpoint(renamed), "it is of step 2, in the folder of step 900")
    # Under a name that says no step it is itself.
    moved = renamed.parent.with_name("mine")
    renamed.rename(moved)
    Checkpoint(moved).verify()
    assert Checkpoint(moved).step == 2 and counter_of(Checkpoint(moved)) == 2 and Checkpoint.is_one(moved)


def test_links_and_pipes_are_no_files_of_it(checkpoint, tmp_path):
    for name in FILES:
        path = checkpoint.folder / name
        shutil.copy(path, tmp_path / "elsewhere")
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
        passed_over(checkpoint, f"{name}: it is no plain file")
        path.unlink()
        os.mkfifo(path)  # on which reading would wait
        passed_over(checkpoint, f"{name}: it is no plain file")
        path.unlink()
        path.mkdir()
        passed_over(checkpoint, f"{name}: it is no plain file")
        path.rmdir()
        shutil.copy(tmp_path / "elsewhere", path)


def test_all_damaged_is_none_and_a_line_each(checkpoint):
    for folder in (checkpoint.folder, checkpoint.folder.with_name("step-00000001")):
        (folder / TENSORS).write_bytes(b"")
    newest, lines = Checkpoints(checkpoint.folder.parent).newest()
    assert newest is None and [TENSORS in line for line in lines] == [True, True]
    assert "step-00000002" in lines[0] and "step-00000001" in lines[1]
    # Sizes are looked at without reading all.
    assert Checkpoints(checkpoint.folder.parent).newest(verify=False) == (None, lines)


def test_a_damaged_checkpoint_is_replaced_by_the_next_of_its_step(checkpoint):
    (checkpoint.folder / TENSORS).write_bytes(b"")
    save(Checkpoints(checkpoint.folder.parent), 3, step=2)
    newest, lines = Checkpoints(checkpoint.folder.parent).newest()
    assert (newest.step, counter_of(newest), lines) == (2, 3, [])
    assert names(checkpoint.folder.parent) == ["step-00000001", "step-00000002"]


def test_a_save_that_fails_says_which_older_one_is_whole_having_read_it(checkpoint, monkeypatch):
    (checkpoint.folder / TENSORS).write_bytes(b"")
    (checkpoint.folder.parent / "step-00000003").write_text("somebody's file")
    with pytest.raises(RunError, match=r"step-00000003 was not saved: Not a directory .*; step-00000001 is whole$"):
        save(Checkpoints(checkpoint.folder.parent), 3)


# --- Strangers --------------------------------------------------------------------------------------------------------


class Planted:
    """Unpickled it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def signed(folder: Path) -> None:
    """checksums.json as who made the files would write it."""
    listing = json.loads((folder / "checksums.json").read_text())
    for name in listing["files"]:
        content = (folder / name).read_bytes()
        listing["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "checksums.json").write_bytes(dumped(listing))


MEMORY = 2**23  # bytes; some of the files have a megabyte themselves


def refused(checkpoint: Checkpoint, *words: str) -> None:
    """By all that read it, without the memory that it claims, and nothing was read into anything."""
    into = {name: torch.zeros_like(tensor) for name, tensor in counted(2).items()}
    for read in (Checkpoint.verify, Checkpoint.names, Checkpoint.chunks, lambda it: it.read(into)):
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as found:
                read(Checkpoint(checkpoint.folder))
            assert tracemalloc.get_traced_memory()[1] < MEMORY
        finally:
            tracemalloc.stop()
        assert all(word in str(found.value) for word in (*words, str(checkpoint.folder))), found.value
        assert "\n" not in str(found.value) and len(str(found.value)) < 400
    assert not any(tensor.any() for tensor in into.values())


@pytest.mark.parametrize("name", [*FILES, ".metadata", "__0_0.distcp", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_no_pickle_is_run(kind, name, checkpoint, tmp_path):
    planted, content = Planted(tmp_path / "ran"), io.BytesIO()
    pickle.dump(planted, content) if kind == "pickle" else torch.save(planted, content)
    (checkpoint.folder / name).write_bytes(content.getvalue())
    if name in ("about.json", TENSORS):
        signed(checkpoint.folder)
    into = {key: torch.zeros_like(tensor) for key, tensor in counted(2).items()}
    for read in (
        lambda it: it.about,
        lambda it: it.step,
        Checkpoint.names,
        lambda it: it.read(into),
        Checkpoint.verify,
    ):
        try:
            read(Checkpoint(checkpoint.folder))
        except UserError as error:
            assert str(checkpoint.folder) in str(error)
    passed_over(checkpoint, name)
    assert not (tmp_path / "ran").exists()
    # It would have been seen.
    content.seek(0)
    pickle.load(content) if kind == "pickle" else torch.load(content, weights_only=False)
    assert (tmp_path / "ran").exists()


def but(**changes):
    """What changes keys of a list of files."""
    return lambda listing: listing | changes


def with_file(name: str, entry) -> Callable[[dict], dict]:
    return lambda listing: listing | {"files": listing["files"] | {name: entry}}


LISTINGS = {
    "no object": lambda listing: [listing],
    "another format": but(format="zip"),
    "a version to come": but(version=2),
    "a version that is equal and no number": but(version=True),
    "no step": lambda listing: {key: value for key, value in listing.items() if key != "step"},
    "a step below 0": but(step=-1),
    "a step that is a half": but(step=0.5),
    "more that nobody reads": but(more=1),
    "files that are a list": lambda listing: listing | {"files": sorted(listing["files"])},
    "no about": lambda listing: listing | {"files": {TENSORS: listing["files"][TENSORS]}},
    "an entry that is a number": with_file(TENSORS, 3),
    "a size below 0": with_file(TENSORS, {"bytes": -1, "sha256": ""}),
    "a size of terabytes": with_file(TENSORS, {"bytes": 2**42, "sha256": ""}),
    "a size of 10^400": with_file(TENSORS, {"bytes": 10**400, "sha256": ""}),
    "a file that is not there": with_file("tensors-00002-of-00002.safetensors", {"bytes": 8, "sha256": ""}),
}
NAMES = (
    "../x", "/etc/passwd", "a/b", "..", ".", "", ".metadata", "x" * 300, "a\0b", "checksums.json", f"{TENSORS}\n",
    TENSORS.replace("0", "\u0660"),
)  # fmt: skip
LISTINGS |= {f"a file named {name!r}": with_file(name, {"bytes": 1, "sha256": ""}) for name in NAMES}


@pytest.mark.parametrize("change", LISTINGS)
def test_a_list_of_files_that_is_none(change, checkpoint):
    path = checkpoint.folder / "checksums.json"
    path.write_bytes(dumped(LISTINGS[change](json.loads(path.read_text()))))
    refused(checkpoint)
    passed_over(checkpoint)


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"null", b"[" * 500_000, b'{"format":' * 100_000, b"9" * 100_000, b"{}", b" " * (LARGEST_JSON + 1)],
    ids=["empty", "no UTF-8", "null", "brackets", "objects", "digits", "{}", "large"],
)
@pytest.mark.parametrize("name", ["checksums.json", "about.json"])
def test_json_that_is_none(name, text, checkpoint):
    (checkpoint.folder / name).write_bytes(text)
    if name == "checksums.json":
        refused(checkpoint, name)
    elif text != b"{}":
        signed(checkpoint.folder)
        with pytest.raises(UserError, match=r"about\.json: it is"):
            print(Checkpoint(checkpoint.folder).about)
        passed_over(checkpoint, name)


def header(**changes) -> dict:
    """A header of two tensors of four bytes: "a" and "b"."""
    entries = {name: {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]} for at, name in ((0, "a"), (4, "b"))}
    return entries | changes


def of(**changes) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


def sharded(offsets) -> dict:
    text = json.dumps({"a": {"saved_offsets": offsets}, "b": {"saved_offsets": [0]}})
    return header(__metadata__={"DCP_SHARDING_INFO": text})


HEADERS = {
    "a list": [],
    "a dtype that is none": header(a=of(dtype="F31")),
    "a dtype of the default's name": header(a=of(dtype=["F32"])),
    "fewer bytes than the shape": header(a=of(shape=[2])),
    "more bytes than the shape": header(a=of(shape=[0])),
    "a number below 0": header(a=of(shape=[-1])),
    "two numbers below 0": header(a=of(shape=[-1, -1])),
    "half a number": header(a=of(shape=[1.0])),
    "true": header(a=of(shape=[True])),
    "65 dimensions": header(a=of(shape=[1] * 65)),
    "a shape of terabytes": header(a=of(shape=[2**40])),
    "a shape of terabytes, and places": header(a=of(shape=[2**40], data_offsets=[0, 2**42])),
    "a product that overflows": header(a=of(shape=[2**32, 2**32, 2**32])),
    "a size that no tensor has": header(a=of(shape=[0, 10**30], data_offsets=[0, 0])),
    "places before the start": header(a=of(data_offsets=[-4, 0])),
    "places backwards": header(a=of(data_offsets=[4, 0])),
    "three places": header(a=of(data_offsets=[0, 4, 8])),
    "the same place": header(b=of()),
    "a hole": header(b=of(data_offsets=[8, 12])),
    "beyond the end": header(c=of(data_offsets=[8, 12])),
    "less than there is": {"a": of()},
    "nothing at all": {},
    "a key too many": header(a=of(more=1)),
    "an entry that is a number": header(a=1),
    "a sharding that is no JSON": header(__metadata__={"DCP_SHARDING_INFO": "{"}),
    "a sharding that is a list": header(__metadata__={"DCP_SHARDING_INFO": "[]"}),
    "a part that begins far out": sharded([2**40]),
    "a part that begins further out": sharded([2**63]),
    "a part that begins before": sharded([-1]),
    "a part of two dimensions": sharded([0, 0]),
    "a part at a half": sharded([0.5]),
    "a part at a word": sharded(["0"]),
    "a part at nothing": sharded(None),
    "no elements, beyond what a size can be": {
        "__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": [2**63 - 1, 0]}})},
        "a": of(shape=[1, 0], data_offsets=[0, 0]),
        "b": of(shape=[2], data_offsets=[0, 8]),
    },
}


def hostile(checkpoint: Checkpoint, text: bytes, data: bytes = bytes(8), length: int | None = None) -> None:
    size = len(text) if length is None else length
    (checkpoint.folder / TENSORS).write_bytes(size.to_bytes(8, "little") + text + data)
    signed(checkpoint.folder)


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_that_claims_what_is_not_there(change, checkpoint):
    hostile(checkpoint, json.dumps(HEADERS[change]).encode())
    refused(checkpoint)
    passed_over(checkpoint)


def test_the_header_that_the_hostile_ones_are_made_of_is_a_good_one(checkpoint):
    for good in (header(), sharded([0])):
        hostile(checkpoint, json.dumps(good).encode())
        assert Checkpoint(checkpoint.folder).names() == {name: (torch.float32, (1,)) for name in ("a", "b")}
        Checkpoint(checkpoint.folder).verify()


@pytest.mark.parametrize(
    "text, length",
    [
        (b"{}", 2**63), (b"{}", 2**64 - 1), (b"{}", 2**40), (b"{}", 11), (b"", 0), (b"[" * 100_000, None),
        (b" " * (LARGEST_JSON + 1), None), (b'{"a": 1, "a": 1}', None), (b"\xff\xfe", None),
        (json.dumps(header()).encode()[:-1] + b', "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', None),
    ],
)  # fmt: skip
def test_a_header_that_is_none(text, length, checkpoint):
    hostile(checkpoint, text, length=length)
    beyond = length is not None and length > len(text) + 8
    refused(checkpoint, TENSORS, "its header would need" if beyond else "it")


PARTS = {
    "overlap": [([0], [3]), ([2], [1])],
    "overlap and leave out": [([0], [2]), ([1], [2]), ([4], [2])],
    "are there twice": [([0], [2]), ([0], [2])],
    "are there twice, without elements": [([0], [0]), ([0], [0])],
    "leave a hole": [([0], [2]), ([3], [2])],
    "begin late": [([1], [2]), ([3], [2])],
    "cross": [([0, 0], [2, 1]), ([0, 1], [1, 2]), ([1, 2], [1, 1])],
    "differ in dimensions": [([0], [2]), ([2, 0], [2, 1])],
}


@pytest.mark.parametrize("change", PARTS)
def test_parts_that_do_not_make_up_a_tensor(change, checkpoint):
    folder = checkpoint.folder
    parts(folder, PARTS[change])
    refused(checkpoint, "the parts of a")
    parts(folder, [([0], [2]), ([2], [0]), ([2], [3])][::2])
    assert Checkpoint(folder).names() == {"a": (torch.float32, (5,))}


def parts(folder: Path, chunks: list) -> None:
    """A checkpoint whose tensor "a" is in as many files as there are parts."""
    for path in folder.glob("tensors-*"):
        path.unlink()
    listing = json.loads((folder / "checksums.json").read_text())
    listing["files"] = {"about.json": listing["files"]["about.json"]}
    for number, (offsets, sizes) in enumerate(chunks, 1):
        elements = int(torch.Size(sizes).numel())
        text = json.dumps({
            "__metadata__": {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": offsets}})},
            "a": {"dtype": "F32", "shape": sizes, "data_offsets": [0, 4 * elements]},
        }).encode()  # fmt: skip
        name = f"tensors-{number:05}-of-{len(chunks):05}.safetensors"
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * elements))
        listing["files"][name] = None
    (folder / "checksums.json").write_bytes(dumped(listing))
    signed(folder)
