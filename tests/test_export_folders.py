"""Folders from strangers, and half-written ones: a line that says what is wrong, and no memory taken, no code run."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from model_folders import (
    BPE,
    bpe,
    edited,
    header_of,
    model,
    save_run,
    transformers_gpt2,
    with_header,
)
from safetensors.torch import load_file

from gptkern import cli
from gptkern.training import model_files
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.errors import UserError
from gptkern.training.exporting import export
from gptkern.training.loading import load_model, starting_model

PARAMETERS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


def refused(folder, option: str = "FOLDER") -> str:
    """What load_model says, and `gptkern generate` in one line with exit status 2."""
    with pytest.raises(UserError) as error:
        load_model(folder, option=option)
    assert str(error.value).startswith(f"{option} {folder}") and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in. An error shortens what is longer than a line, such as its whole name."""
    monkeypatch.chdir(tmp_path)
    return Path()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run, what `gptkern export` makes of it, and a GPT-2 of transformers in several files: to be copied."""
    folder = tmp_path_factory.mktemp("written")
    save_run(folder / "of", model())
    export(load_model(folder / "of"), folder / "out")
    transformers_gpt2().save_pretrained(folder / "shards", max_shard_size="50KB")
    return folder


@pytest.fixture
def exported(here, written):
    """What `gptkern export` writes, beside the run that it is of."""
    for name in ("of", "out"):
        shutil.copytree(written / name, here / name)
    return here / "out"


# --- safetensors ------------------------------------------------------------------------------------------------------


def first(header: dict) -> str:
    return next(name for name in header if name != "__metadata__")


def changed(header: dict, **changes) -> dict:
    name = first(header)
    return header | {name: header[name] | changes}


HEADERS = {
    "another dtype": lambda header: changed(header, dtype="F64"),
    "a dtype that there is not": lambda header: changed(header, dtype="F7"),
    "a shape of terabytes": lambda header: changed(header, shape=[2**40]),
    "a shape whose product wraps": lambda header: changed(header, shape=[2**32, 2**32]),
    "a negative shape": lambda header: changed(header, shape=[-144]),
    "a shape of floats": lambda header: changed(header, shape=[144.0]),
    "a shape that is none": lambda header: changed(header, shape=144),
    "offsets of terabytes": lambda header: changed(header, data_offsets=[0, 2**42], shape=[2**40]),
    "offsets that go back": lambda header: changed(header, data_offsets=[576, 0]),
    "offsets that are none": lambda header: changed(header, data_offsets=["0", "576"]),
    "the place of another": lambda header: header | {first(header): header[list(header)[-1]]},
    "a tensor in the place of others": lambda header: header | {"more": header[first(header)]},
    "a hole": lambda header: {name: entry for name, entry in header.items() if name != first(header)},
    "a list": lambda header: [header],
    "metadata of numbers": lambda header: header | {"__metadata__": {"format": 3}},
    "nothing": lambda header: {},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_is_not_so(exported, what):
    path = exported / PARAMETERS
    with_header(path, HEADERS[what](header_of(path)))
    assert "model.safetensors cannot be read, it may be cut off: " in refused(exported)


def test_two_tensors_over_the_same_bytes(exported):
    """Of one shape, so that each of them would be in the file."""
    path = exported / PARAMETERS
    header = header_of(path)
    names = [f"transformer.h.{block}.ln_1.weight" for block in range(2)]
    with_header(path, header | {names[1]: header[names[0]]})
    assert "model.safetensors cannot be read" in refused(exported)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**6])
def test_a_header_longer_than_its_file(exported, length):
    path = exported / PARAMETERS
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    line = refused(exported)
    assert f"it has {path.stat().st_size} bytes and a header of {length}" in line


def test_a_header_longer_than_any(exported):
    """In a file that has it: of a hole, which takes no room on the disk."""
    path = exported / PARAMETERS
    path.write_bytes(struct.pack("<Q", 2**35) + b"{")
    os.truncate(path, 2**35 + 8)
    assert "model.safetensors has a header of 34.4 GB; it needs one of at most 16.8 MB" in refused(exported)


def sparse(folder, size: int, dtype: str = "F32") -> None:
    """A model of more than `size` bytes, which are a hole in its file, and config.json agrees."""
    itemsize = {"F32": 4, "BF16": 2}[dtype]
    tokens = size // (itemsize * 48)
    path = folder / PARAMETERS
    header = header_of(path)
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        if name == "transformer.wte.weight":
            header[name] |= {"dtype": dtype, "shape": [tokens, 48]}
            start, stop = 0, tokens * 48 * itemsize
        entry["data_offsets"] = [end, end + stop - start]
        end += stop - start
    with_header(path, header)
    os.truncate(path, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0] + end)
    edited(folder / CONFIG, vocab_size=tokens)


MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "size, dtype, message",
    [
        (2**42, "F32", r": model\.safetensors has 4,398 GB, of which no view in memory can be had: "),
        # The file fits, and the model that is made of it is twice as large.
        (3 * MEMORY // 4, "BF16", r": the model needs [\d,.]+ GB of memory and there are [\d,.]+ GB \(cpu\)$"),
    ],
)
def test_a_model_that_no_memory_holds(exported, size, dtype, message):
    sparse(exported, size, dtype)
    assert (exported / PARAMETERS).stat().st_size > size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert re.search(message, refused(exported))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # 64 MB


@pytest.mark.parametrize("name", [PARAMETERS, CONFIG, "tokenizer.json"])
def test_a_pipe_is_no_file(exported, name):
    """Reading it would wait for ever."""
    os.remove(exported / name)
    os.mkfifo(exported / name)
    assert f"{name} is no file" in refused(exported)


@pytest.mark.parametrize("name", [PARAMETERS, CONFIG, "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"\x80\x04\x95", b"[]", b'"' + b"x" * 99, b"\xff\xfe{}"])
def test_a_file_of_something_else(exported, name, content):
    (exported / name).write_bytes(content)
    # An empty object in config.json is no config of transformers.
    assert name in refused(exported) or name == CONFIG


@pytest.mark.parametrize("content", ['{"a":' * 200_000, "[" * 200_000, '{"vocab_size": 1' + "0" * 5000 + "}"])
def test_json_that_is_meant_to_hurt(exported, content):
    (exported / CONFIG).write_text(content)
    assert "config.json is no JSON: " in refused(exported)


def test_json_of_gigabytes(exported):
    os.truncate(exported / CONFIG, 2**34)
    assert "config.json has 17.2 GB; it needs to be of at most 16.8 MB" in refused(exported)


# --- Several files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(here, written):
    return Path(shutil.copytree(written / "shards", here / "shards"))


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors", "/etc/outside.safetensors", "sub/outside.safetensors", "..\\outside.safetensors",
        "C:outside.safetensors", "outside\0.safetensors", "..", "", "x" * 300 + ".safetensors", 3, None, ["a"],
        "pytorch_model.bin",
    ],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_folder(sharded, file):
    for folder in (sharded.parent, sharded / "sub"):
        folder.mkdir(exist_ok=True)
        shutil.copy(next(sharded.glob("model-*")), folder / "outside.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{INDEX}: {name} is in " in refused(sharded)


def test_an_index_and_its_files_have_to_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    where = index["weight_map"]
    names = list(where)
    files = sorted(set(where.values()))

    def with_index(weight_map) -> str:
        (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refused(sharded)

    assert "which is not its place" in with_index(where | {names[0]: files[-1]})
    assert "which is not its place" in with_index({name: file for name, file in where.items() if name != names[0]})
    assert f"more.weight not found in {files[0]}" in with_index(where | {"more.weight": files[0]})
    assert "none.safetensors: No such file" in with_index(where | {"more.weight": "none.safetensors"})
    for wrong in ({}, [], None, "a"):
        assert "weight_map is " in with_index(wrong)
    (sharded / INDEX).write_text(json.dumps(index))
    os.remove(sharded / files[1])
    assert f"{files[1]}: No such file" in refused(sharded)


# --- Pickles, and weights that are there twice ------------------------------------------------------------------------


class Ran:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json"])
def test_no_pickle_is_read(exported, name, here):
    if name == "pytorch_model.bin":
        os.remove(exported / PARAMETERS)
    (exported / name).write_bytes(pickle.dumps(Ran()))
    line = refused(exported)
    if name == "pytorch_model.bin":
        assert "pytorch_model.bin is not read, since such a file can run code: " in line and "save_pretrained" in line
    assert not (here / "ran").exists()
    pickle.loads((exported / name).read_bytes())
    assert (here / "ran").exists(), "it would have"


def test_weights_that_are_there_twice(exported, here):
    export(load_model(here / "of"), here / "planes", planes=True)
    shutil.copy(here / "planes" / "model.byte-planes.safetensors", exported)
    assert "holds model.safetensors and model.byte-planes.safetensors; it needs to have its weights once" in refused(
        exported
    )


def test_byte_planes_that_are_damaged(exported, here):
    export(load_model(here / "of"), here / "planes", planes=True)
    path = here / "planes" / "model.byte-planes.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert "model.byte-planes.safetensors: frame 0 of plane " in refused(here / "planes")
    path.write_bytes(data[:-1])
    assert "model.byte-planes.safetensors cannot be read, it may be cut off" in refused(here / "planes")


# --- Runs -------------------------------------------------------------------------------------------------------------


def test_the_newest_whole_checkpoint_of_a_run(here, capsys):
    run = here / "run"
    for step in (5, 6):
        newest = save_run(run, model(), step=step)
    assert load_model(run).about["step"] == 6 and load_model(run).about["passed_over"] == []
    assert load_model(run / "checkpoints" / "step-00000005").about["step"] == 5
    tensors = next(newest.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    loaded = load_model(run)
    assert loaded.about["step"] == 5 and loaded.about["folder"].name == "step-00000005"
    (line,) = loaded.about["passed_over"]
    assert str(tensors) in line
    # Of the commands too.
    assert cli.main(["export", str(run), "--out", str(here / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"gptkern export: passed over: {line}; step 5 is taken\n"
    assert json.loads((here / "out" / CONFIG).read_text())["gptkern"]["step"] == 5
    assert f"{tensors}: its bytes are not those that were written" in refused(newest)
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    assert f"{run} holds no whole checkpoint: {line}" in refused(run)


def test_a_run_that_has_saved_nothing_yet(here):
    run = here / "run"
    save_run(run, model())
    (run / "checkpoints" / "step-00000007").rename(run / "checkpoints" / ".step-00000007.partial")
    assert "holds no whole checkpoint; its run has saved none yet" in refused(run)
    (run / "checkpoints" / "step-00000009").mkdir()
    assert "step-00000009/checksums.json: it is not there" in refused(run)


ABOUT = [
    ({"config": None}, "about.json: config is null; it needs an object"),
    ({"tokenizer": "bytes"}, 'about.json: tokenizer is "bytes"; it needs an object'),
    ({"config": {"width": 48}}, "about.json has no context, heads, layers, and 1 more"),
    ({"tokenizer": {"kind": "pickle"}}, "it needs the kind bytes or file"),
    ({"tokenizer": {"kind": "file", "file": "../tokenizer.json", "sha256": ""}}, "it needs tokenizer.json"),
    (
        {"tokenizer": {"kind": "file", "file": "tokenizer.json", "sha256": "0" * 64}},
        "it is not the file that was written",
    ),
    ({"tokenizer": {"kind": "file", "file": "tokenizer.json"}}, "it is not the file that was written there"),
]


@pytest.mark.parametrize("changes, message", ABOUT, ids=lambda value: str(value)[:40])
def test_what_a_checkpoint_says_of_itself(here, changes, message):
    folder = save_run(here / "run", model(), about=changes)
    assert message in refused(here / "run") and message in refused(folder)


def test_a_checkpoint_of_other_sizes_than_it_says(here):
    config = {"vocab_size": BPE, "context": 24, "layers": 2, "width": 48, "heads": 3}
    for changes, message in (
        ({"width": 96}, "blocks.0.attention.project.bias is (48,); it needs (96,)"),
        ({"layers": 10**12}, f"layers is {10**12}; it needs to be the number of blocks in step-00000007, 2"),
        ({"layers": 1}, "blocks.1.attention.project.bias, "),
        ({"context": 2**50}, f"position_embedding.weight is (24, 48); it needs ({2**50}, 48)"),
        ({"heads": 7}, "width is 48; it needs to be a multiple of heads, 7"),
    ):
        save_run(here / "run", model(), about={"config": config | changes})
        assert message in refused(here / "run")


# --- Tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_more_tokens_than_the_model(exported, here):
    bpe(BPE + 7).save(exported)
    assert f"its tokenizer has {BPE + 7} tokens; the model needs one of at most {BPE}" in refused(exported)
    save_run(here / "run", model(vocab_size=256), bytes_tokenizer())
    assert "its tokenizer has 257 tokens; the model needs one of at most 256" in refused(here / "run")
    # Fewer are: a vocabulary may be rounded up.
    bpe(290).save(exported)
    assert load_model(exported).tokenizer.vocab_size == 290


def test_a_tokenizer_that_is_missing(exported, here, capsys):
    os.remove(exported / "tokenizer.json")
    assert load_model(exported).tokenizer is None
    assert cli.main(["generate", str(exported), "--device", "cpu"]) == 2
    assert "has no tokenizer.json; it needs one: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--from .* has no tokenizer\.json; it needs one"):
        starting_model(exported, bpe())
    os.remove(here / "of" / "tokenizer.json")
    assert "tokenizer.json" in refused(here / "of")


def test_another_tokenizer_than_the_runs(here):
    save_run(here / "run", model())
    bpe(290).save(here / "run")
    assert "tokenizer.json: it is not the file that was written there" in refused(here / "run")


def test_a_tokenizer_that_does_not_say_where_a_text_ends(exported):
    edited(exported / "tokenizer.json", added_tokens=[])
    content = json.loads((exported / "tokenizer.json").read_text())
    del content["model"]["vocab"]["<|endoftext|>"]
    (exported / "tokenizer.json").write_text(json.dumps(content))
    assert "none of its tokens ends a text" in refused(exported)


# --- To start from ----------------------------------------------------------------------------------------------------


def test_a_model_to_start_from(exported, here):
    loaded = starting_model(exported, bpe(), length=24, dropout=0.25)
    assert loaded.model.config.dropout == 0.25 and loaded.model.blocks[0].attention.dropout == 0.25
    assert loaded.model.embedding_dropout.p == 0.25
    for name, parameter in model().named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    for tokenizer in (bytes_tokenizer(), bpe(290)):
        with pytest.raises(
            UserError, match=rf"^--from {exported} is a model of tokens by bpe of 300, and the data are tok"
        ):
            starting_model(exported, tokenizer)
    with pytest.raises(UserError, match=r"^--from .* has a context of 24; rows of 25 tokens do not fit into it$"):
        starting_model(exported, bpe(), length=25)
    save_run(here / "bytes", model(vocab_size=256), bytes_tokenizer(end_of_text=False))
    assert starting_model(here / "bytes", bytes_tokenizer(end_of_text=False)).tokenizer.vocab_size == 256
    # A model of 256 tokens has no end of a text, which the data have.
    with pytest.raises(UserError, match="gptkern data --tokenizer bytes"):
        starting_model(here / "bytes", bytes_tokenizer())


def test_no_model_to_start_from_whose_training_has_failed(here):
    broken = model()
    broken.final_norm.bias.data[3] = torch.inf
    save_run(here / "run", broken)
    with pytest.raises(UserError, match=r"holds NaN or an infinity in final_norm\.bias"):
        starting_model(here / "run", bpe())


def test_what_gptkern_wrote_before_runs_were_folders(here):
    model_files.save(model(vocab_size=256), here / "old")
    loaded = load_model(here / "old")
    assert loaded.tokenizer.vocab_size == 256 and loaded.about["kind"] == "gptkern"
    # The embedding under both names, which are one weight.
    state = load_file(here / "old" / PARAMETERS)
    from safetensors.torch import save_file

    save_file(state | {"token_embedding.weight": state["lm_head.weight"] + 1}, here / "old" / PARAMETERS)
    assert "token_embedding.weight and lm_head.weight differ" in refused(here / "old")
