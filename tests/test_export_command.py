"""`gptkern export`: nothing is lost, whatever is in the folder or on the disk; every option against nonsense."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from model_folders import bpe, model, save_run, transformers_gpt2
from safetensors.torch import load_file

from gptkern import cli
from gptkern.commands import export as command
from gptkern.training import exporting, model_files
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.errors import RunError, UserError
from gptkern.training.loading import load_model

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "run"
    save_run(folder, model())
    return folder


@pytest.fixture
def here(tmp_path, written, monkeypatch):
    """A folder to work in, with a run in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, "run")
    return Path()


@pytest.fixture
def export(capsys):
    """export(arguments) -> (exit status, what was printed, the errors)"""

    def run(*arguments) -> tuple[int, str, str]:
        status = cli.main(["export", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_it_says_and_writes(here, export):
    status, printed, errors = export("run", "--out", "out")
    count = model().parameter_count()
    size = (here / "out" / "model.safetensors").stat().st_size
    assert (status, errors) == (0, "") and size > 4 * count
    first, second = printed.splitlines()
    assert first == f"{count:,} parameters, float32, {size / 1e3:.0f} kB"
    assert second == 'model: out   (AutoModelForCausalLM.from_pretrained("out"))'
    assert sorted(os.listdir("out")) == FILES
    # safetensors by itself would let nobody else read the weights.
    (here / "of the umask").touch()
    modes = {path.stat().st_mode for path in (here / "out").iterdir()}
    assert modes == {(here / "of the umask").stat().st_mode}
    status, printed, errors = export("run", "--out", "new/planes", "--byte-planes", "--dtype", "bfloat16")
    size = (here / "new" / "planes" / "model.byte-planes.safetensors").stat().st_size
    assert (status, errors) == (0, "")
    ratio = f"{size / (2 * count):.3f} × the {2 * count / 1e3:.0f} kB of the weights as they are"
    assert (
        f"bfloat16, {size / 1e3:.0f} kB in byte planes: {ratio}" in printed
        and "(gptkern generate new/planes)" in printed
    )


def test_every_kind_of_folder_can_be_written_anew(here, export):
    torch.manual_seed(0)
    transformers_gpt2().save_pretrained("theirs", max_shard_size="50KB")
    status, printed, _ = export("theirs", "--out", "a")
    assert status == 0 and "no tokenizer: theirs has none" in printed
    assert sorted(os.listdir("a")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert export("run/checkpoints/step-00000007", "--out", "b")[0] == 0
    assert export("b", "--out", "c", "--byte-planes")[0] == 0
    assert export("c", "--out", "d")[0] == 0
    assert sorted(os.listdir("b")) == sorted(os.listdir("d")) == FILES
    for name in set(FILES) - {"config.json"}:
        assert (here / "b" / name).read_bytes() == (here / "d" / name).read_bytes(), name
    ours, theirs = (json.loads((here / name / "config.json").read_text()) for name in "bd")
    # Of the run, the step is known to the first alone.
    assert ours.pop("gptkern")["step"] == 7 and "step" not in theirs.pop("gptkern") and ours == theirs


# --- What is in the folder --------------------------------------------------------------------------------------------


def test_a_model_is_replaced_where_that_is_asked_for(here, export, capsys):
    transformers_gpt2().save_pretrained("out", max_shard_size="50KB")
    capsys.readouterr()
    for name in ("vocab.json", "merges.txt", "notes.txt", "model.byte-planes.safetensors"):
        (here / "out" / name).write_text("{}")
    before = content(here)
    status, _, errors = export("run", "--out", "out")
    assert status == 2 and content(here) == before
    assert errors.startswith("gptkern export: --out out holds a model (") and "--overwrite replaces it" in errors
    assert export("run", "--out", "out", "--overwrite")[0] == 0
    assert sorted(os.listdir("out")) == sorted([*FILES, "notes.txt"])
    assert load_model(here / "out").tokenizer.same_ids(bpe())
    # Smaller and bytes: no file of the one before is read in place of its own.
    save_run(here / "bytes", model(vocab_size=256), bytes_tokenizer(end_of_text=False))
    assert export("bytes", "--out", "out", "--overwrite", "--byte-planes")[0] == 0
    loaded = load_model(here / "out")
    assert loaded.tokenizer.kind == "bytes" and not (here / "out" / "model.safetensors").exists()
    assert (here / "out" / "notes.txt").exists()


def test_a_part_of_a_model_is_not_written_over_either(here, export):
    for name in (
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "vocab.json",
    ):
        (here / "part").mkdir()
        (here / "part" / name).write_text("")
        assert f"--out part holds a model ({name})" in export("run", "--out", "part")[2]
        shutil.rmtree(here / "part")
    (here / "part").mkdir()
    (here / "part" / "README.md").write_text("mine")
    assert export("run", "--out", "part")[0] == 0
    assert (here / "part" / "README.md").read_text() == "mine"


def test_a_run_is_never_written_into(here, export):
    (here / "begun").mkdir()
    (here / "begun" / "recipe.toml").write_text("steps = 3\n")
    before = content(here)
    for out in ("run", "begun", "run/checkpoints/step-00000007"):
        for more in ([], ["--overwrite"]):
            status, _, errors = export("run", "--out", out, *more)
            assert status == 2 and errors.count("\n") == 1
            assert f"--out {out} holds a run" in errors and "it needs another folder" in errors
    assert content(here) == before


def test_a_model_over_itself(here, export):
    assert export("run", "--out", "out")[0] == 0
    weights = load_file("out/model.safetensors")
    assert export("out", "--out", "out", "--overwrite", "--byte-planes")[0] == 0
    assert not (here / "out" / "model.safetensors").exists()
    assert export("out", "--out", "out", "--overwrite")[0] == 0
    assert sorted(os.listdir("out")) == FILES
    for name, tensor in load_file("out/model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


# --- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk():
    """full_disk(size): from now on no file can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("planes", [[], ["--byte-planes"]])
@pytest.mark.parametrize("size", [100, 1000, 100_000])
def test_a_full_disk_leaves_what_was_there(here, export, full_disk, planes, size):
    assert export("run", "--out", "out")[0] == 0
    before = content(here)
    full_disk(size)
    status, _, errors = export("run", "--out", "out", "--overwrite", *planes)
    assert status == 1 and errors.count("\n") == 1
    assert errors == "gptkern export: out cannot be written: File too large; the model there is as it was\n"
    status, _, errors = export("run", "--out", "new", *planes)
    assert status == 1 and errors == "gptkern export: new cannot be written: File too large\n"
    assert content(here) == before and not (here / "new").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_ends_the_writing_leaves_what_was_there(here, monkeypatch, error):
    # Of bytes: what is on the disk before its time is no tokenizer's own file.
    save_run(here / "bytes", model(vocab_size=257), bytes_tokenizer())
    loaded = load_model("bytes")
    exporting.export(loaded, "out")
    before = content(here)

    def ended(_):
        raise error

    monkeypatch.setattr(os, "fsync", ended)
    with pytest.raises((KeyboardInterrupt, RunError)):
        exporting.export(loaded, "out", "float16", planes=True, overwrite=True)
    assert content(here) == before and sorted(os.listdir("out")) == FILES


def test_a_folder_in_the_place_of_a_file_changes_nothing(here, export):
    assert export("run", "--out", "out")[0] == 0
    os.remove("out/generation_config.json")
    (here / "out" / "generation_config.json").mkdir()
    before = content(here)
    status, _, errors = export("run", "--out", "out", "--overwrite", "--dtype", "bfloat16", "--byte-planes")
    assert (status, errors) == (
        1,
        "gptkern export: out cannot be written: generation_config.json is a folder; the model there is as it was\n",
    )
    assert content(here) == before and not list(here.glob("out/.*"))


OLD = {"config.json": "old", "weights": "old", "only old": "old", "notes.txt": "theirs"}
NEW = {"config.json": "new", "weights": "new", "tokens": "new", "notes.txt": "theirs"}


def put(folder: Path) -> None:
    def write(new: Path) -> None:
        for name in ("weights", "tokens", "config.json"):
            (new / name).write_text("new")

    model_files.replace(folder, write, ("weights", "tokens", "config.json"), "as it was", stale=["only old"])


def old_model(folder: Path) -> Path:
    folder.mkdir()
    for name, text in OLD.items():
        (folder / name).write_text(text)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def at_move(monkeypatch, number: int, do) -> list:
    """From the move of that number on each one does this instead; what has been moved."""
    real, calls = os.replace, []

    def replaced(source, target):
        calls.append(target)
        return real(source, target) if len(calls) != number else do(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    return calls


@pytest.mark.parametrize("number", range(1, 7))
def test_a_move_that_fails_is_taken_back(tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(5, "Input/output error")

    folder = old_model(tmp_path / "out")
    calls = at_move(monkeypatch, number, fails)
    with pytest.raises(RunError, match=r"Input/output error; as it was$"):
        put(folder)
    assert len(calls) == 2 * number - 1 and texts(folder) == OLD and not list(folder.glob(".*"))
    monkeypatch.undo()
    put(folder)
    assert texts(folder) == NEW and not list(folder.glob(".*"))


def test_what_cannot_be_put_back_either_is_kept_and_said(tmp_path, monkeypatch):
    def failing(*_):
        monkeypatch.setattr(os, "replace", failing)
        raise OSError(5, "Input/output error")

    folder = old_model(tmp_path / "out")
    at_move(monkeypatch, 4, failing)
    with pytest.raises(RunError, match=r"nor can what was there be put back: .*; its files are in ") as error:
        put(folder)
    assert "as it was" not in str(error.value)
    assert texts(Path(str(error.value).rpartition("are in ")[2])) == {
        name: text for name, text in OLD.items() if name != "notes.txt"
    }
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"holds a model \(\.checkpoint-.*/replaced\): --overwrite replaces it"):
        exporting.check_target(folder, False)


@pytest.mark.parametrize("number", range(1, 8))
def test_a_kill_between_two_moves_leaves_one_model_or_none(tmp_path, monkeypatch, number):
    """Each prefix of what is moved, in a process of its own."""
    folder = old_model(tmp_path / "out")
    process = os.fork()
    if process == 0:
        try:
            at_move(monkeypatch, number, lambda *_: os._exit(9))
            put(folder)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == (9 if number < 7 else 0)
    left = texts(folder)
    assert left == {1: OLD, 7: NEW}.get(number, left) and ("config.json" in left) == (number in (1, 7))
    assert bool(list(folder.glob(".checkpoint-*"))) == (number < 7)
    put(folder)
    assert texts(folder) == NEW and not list(folder.glob(".*"))


def test_the_disk_has_each_step_before_the_next(tmp_path, monkeypatch):
    """That config.json has gone before the weights change, and that they are there before it comes."""
    folder, events = old_model(tmp_path / "out"), []
    replace, fsync = os.replace, os.fsync

    def replaced(source, target):
        events.append(Path(source if Path(source).parent == folder else target).name)
        replace(source, target)

    def synced(handle):
        if os.path.sameopenfile(handle, seen):
            events.append("on the disk")
        fsync(handle)

    seen = os.open(folder, os.O_RDONLY)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synced)
    put(folder)
    os.close(seen)
    on = "on the disk"
    assert events == ["config.json", on, "weights", "only old", "weights", "tokens", on, "config.json", on]


def test_a_signal_waits_for_the_moves(tmp_path, monkeypatch):
    def interrupted(source, target):
        signal.raise_signal(signal.SIGINT)
        os.rename(source, target)

    folder = old_model(tmp_path / "out")
    at_move(monkeypatch, 4, interrupted)
    # Ignored, as a shell has it for what it starts in the background, none would come.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            put(folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert texts(folder) == NEW and not list(folder.glob(".*"))


def test_a_training_that_failed_is_no_model(here, export):
    broken = model()
    broken.blocks[1].attention.qkv.bias.data[0] = torch.nan
    save_run(here / "run", broken, step=8)
    status, _, errors = export("run", "--out", "out")
    assert (status, (here / "out").exists()) == (2, False)
    assert "holds NaN or an infinity in blocks.1.attention.qkv.bias: its training has failed" in errors


def test_a_disk_that_is_too_small_is_said_before(here, export, monkeypatch):
    """The whole disk, through a size that none has."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 10**3, 10**3))
    status, _, errors = export("run", "--out", "out")
    assert status == 2 and "--out out: it needs" in errors and "on the disk and there are 1.00 kB" in errors
    assert not (here / "out").exists()


def test_the_dtype_that_there_is_not():
    with pytest.raises(ValueError, match=r"export: dtype is 'float64'; it needs one of float32, bfloat16, float16"):
        exporting.export(None, "out", "float64")
    assert tuple(exporting.DTYPES) == command.DTYPES


NONSENSE = [
    (["run"], "the following arguments are required: --out"),
    (["--out", "out"], "the following arguments are required: FOLDER"),
    (["run", "--out", ""], "--out is empty; it needs a folder that can be written"),
    (["", "--out", "out"], "FOLDER is empty; it needs a folder that `gptkern train` wrote, or a model's"),
    (["run", "--out", "text.txt"], "--out text.txt: "),
    (["run", "--out", "text.txt/below"], "--out text.txt/below: "),
    (["run", "--out", "x" * 300], "File name too long; it needs a folder that can be written"),
    (["run", "--out", "a\0b"], "embedded null"),
    (["a\0b", "--out", "out"], "embedded null"),
    (["x" * 300, "--out", "out"], "File name too long"),
    (["nowhere", "--out", "out"], "FOLDER nowhere is no checkpoint: there is no such folder"),
    (["text.txt", "--out", "out"], "FOLDER text.txt is no checkpoint: it is a file"),
    (
        ["run/recipe.toml", "--out", "out"],
        "run/recipe.toml is no checkpoint: it is a file; it needs the folder of a run, of ",
    ),
    (["run/checkpoints", "--out", "out"], "did you mean run?"),
    (["empty", "--out", "out"], "config.json and model.safetensors not found in it"),
    (["run", "--out", "out", "--dtype", "float64"], "--dtype"),
    (["run", "--out", "out", "--dtype", ""], "--dtype"),
    (["run", "--out", "out", "--byte-planes=yes"], "--byte-planes"),
    (["run", "out"], "the following arguments are required: --out"),
    (["run", "other", "--out", "out"], "unrecognized argument other"),
    (["run", "--out", "out", "--to", "x"], "unrecognized argument --to"),
]


@pytest.mark.parametrize("arguments, message", NONSENSE, ids=lambda value: str(value)[:40])
def test_nonsense_is_one_line_before_any_work(here, capsys, arguments, message):
    (here / "empty").mkdir()
    (here / "text.txt").write_text("text")
    (here / "run" / "recipe.toml").write_text("steps = 3\n")
    before = content(here)
    try:
        status = cli.main(["export", *arguments])
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert status == 2 and printed.out == "" and printed.err.count("\n") == 1 and message in printed.err
    assert content(here) == before and not (here / "out").exists()


def test_a_model_that_is_none_writes_nothing(here):
    with pytest.raises(UserError, match="holds a run"):
        exporting.export(load_model("run"), "run", overwrite=True)
    assert json.loads(next(here.rglob("about.json")).read_text())["step"] == 7
