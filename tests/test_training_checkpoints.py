"""Checkpoints: what is read is what was saved; their order, those that go; errors of the thread that writes."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from saved_checkpoints import counter_of, largest_file, names, save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from gptkern.training import checkpoint_reading
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.errors import RunError, UserError

DTYPES = list(checkpoint_reading.DTYPES.values())


def of_each_dtype() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5), generator=random).to(dtype)
        if dtype == torch.bool
        else torch.randint(0, 256, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=random).view(dtype)
        for dtype in DTYPES
    }
    whole = torch.randn(4, 6, generator=random)
    return tensors | {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": whole.t(),
        "strided": whole[:, ::2],
        "expanded": whole[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(whole.clone()),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To the bit: NaN too."""
    flat = [each.detach().contiguous().reshape(-1).view(torch.uint8) for each in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def zeros(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


def test_every_dtype_and_layout_comes_back_to_the_bit(tmp_path):
    tensors, about = of_each_dtype(), {"scale": 2.0**-20, "loss": 0.1 + 0.2, "names": ["ä", "<|x|>"], "none": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Checkpoints(tmp_path / "new" / "checkpoints").save(7, tensors, about, wait=True)
        checkpoint, passed = Checkpoints(tmp_path / "new" / "checkpoints").newest()
        assert (checkpoint.step, checkpoint.about, passed) == (7, about, [])
        assert checkpoint.names() == {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}
        into = zeros(tensors)
        checkpoint.read(into)
    for name, tensor in tensors.items():
        assert same(into[name], tensor), name


def test_other_tools_read_it_and_theirs_is_laid_out_alike(tmp_path):
    """torch.distributed.checkpoint's own storage and safetensors read the file, and its header is read here."""
    tensors = {name: each.contiguous() for name, each in of_each_dtype().items() if name != "parameter"}
    Checkpoints(tmp_path).save(1, tensors, {}, wait=True)
    (file,) = (tmp_path / "step-00000001").glob("*.safetensors")
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys() and all(same(loaded[name], tensors[name]) for name in tensors)
    into = zeros(tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a process group that is not there
        dcp.load(into, storage_reader=HuggingFaceStorageReader(str(file.parent)))
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True))
    assert all(same(into[name], tensors[name]) for name in tensors)
    (theirs,) = (tmp_path / "theirs").glob("*.safetensors")
    assert {name: part[1:] for name, part in Checkpoint(tmp_path / "theirs").header(theirs.name).items()} == {
        name: (each.dtype, (0,) * each.ndim, tuple(each.shape)) for name, each in tensors.items()
    }


def test_training_goes_on_in_the_tensors_while_they_are_written(tmp_path):
    tensors = {"a": torch.ones(300_000), "b": torch.ones(300_000)}
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 6):
        checkpoints.save(step, tensors, {})
        for tensor in tensors.values():
            tensor += 1
    checkpoints.wait()
    assert [each.step for each in checkpoints.all()] == [3, 4, 5]
    for checkpoint in checkpoints.all():
        into = zeros(tensors)
        checkpoint.read(into)
        assert all(torch.equal(each, torch.full_like(each, checkpoint.step)) for each in into.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: PyTorch sees none")
def test_training_goes_on_on_a_gpu_while_its_tensors_are_written(tmp_path):
    checkpoints, tensor = Checkpoints(tmp_path), torch.zeros(1 << 24, device="cuda")
    for step in range(1, 4):
        tensor += 1
        checkpoints.save(step, {"a": tensor, "b": tensor.sum()}, {})
        tensor *= 2
        tensor /= 2
    checkpoints.wait()
    for checkpoint in checkpoints.all():
        into = {"a": torch.zeros_like(tensor), "b": torch.zeros((), device="cuda")}
        checkpoint.read(into)
        assert into["a"].eq(checkpoint.step).all() and into["b"] == checkpoint.step * tensor.numel()


def test_tensors_may_come_go_and_change_their_shape_from_save_to_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    states = [{"a": torch.ones(3)}, {"a": torch.ones(4), "b": torch.zeros(2)}, {"b": torch.ones(2).half()}, {}]
    for step, tensors in enumerate(states):
        checkpoints.save(step, tensors, {})
    checkpoints.wait()
    for checkpoint, tensors in zip(checkpoints.all(), states[1:], strict=True):
        into = zeros(tensors)
        checkpoint.read(into)
        assert checkpoint.names().keys() == tensors.keys()
        assert all(same(into[name], tensors[name]) for name in tensors)


def test_a_prefix_and_what_does_not_fit_changes_nothing(tmp_path):
    tensors = {"model.a": torch.ones(2, 3), "model.b": torch.ones(4), "optimizer.a": torch.zeros(2, 3)}
    Checkpoints(tmp_path).save(1, tensors, {}, wait=True)
    checkpoint, _ = Checkpoints(tmp_path).newest()
    into = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    checkpoint.read(into, prefix="model.")
    assert torch.equal(into["a"], torch.ones(2, 3)) and torch.equal(into["b"], torch.ones(4))
    a, float32 = torch.zeros(2, 3), r"torch\.float32"
    wrong = {
        rf"model\.c is not in it; it needs {float32}, \(1,\)$": {"a": a, "c": torch.zeros(1)},
        rf"model\.b is {float32}, \(4,\); it needs {float32}, \(5,\)": {"a": a, "b": torch.zeros(5)},
        rf"model\.b is {float32}, \(4,\); it needs torch\.float64": {"a": a, "b": torch.zeros(4).double()},
        rf"model\.a is .* it needs {float32}, \(6,\), and 1 more": {"a": torch.zeros(6), "b": torch.zeros(1)},
    }
    for message, into in wrong.items():
        with pytest.raises(UserError, match=message):
            checkpoint.read(into, prefix="model.")
        assert not any(tensor.any() for tensor in into.values())
    with pytest.raises(ValueError, match="b is on meta"):
        checkpoint.read({"a": torch.zeros(2, 3), "b": torch.zeros(4, device="meta")}, prefix="model.")


@pytest.mark.parametrize(
    "keep, steps, left",
    [
        (1, [1, 2, 3], [3]),
        (2, [1, 2, 3], [2, 3]),
        (3, [0, 10, 5], [0, 5, 10]),
        (1, [10, 5], [5, 10]),
        (1, [99_999_999, 100_000_000], [100_000_000]),
        (2, [99_999_999, 100_000_000], [99_999_999, 100_000_000]),
    ],
)
def test_the_oldest_go_and_later_steps_are_not_counted(keep, steps, left, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in steps:
        save(checkpoints, step)
    assert [(each.step, counter_of(each)) for each in checkpoints.all()] == [(step, step) for step in left]
    assert names(tmp_path) == sorted(f"step-{step:08}" for step in left)


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, step=5)
    save(checkpoints, 2, step=5)
    (checkpoint,) = checkpoints.all()
    assert (checkpoint.step, counter_of(checkpoint), names(tmp_path)) == (5, 2, ["step-00000005"])


def test_what_is_none_of_its_own_is_left_alone(tmp_path):
    for name in ("step-1", "step-00000001x", ".step-00000001.partial.txt", "more", ".step-x.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    before = names(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.all() == [] and checkpoints.newest() == (None, [])
    save(checkpoints, 3)
    assert names(tmp_path) == sorted([*before, "step-00000003"])


def test_a_save_clears_what_a_killed_one_left_and_a_reader_does_not(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    # As between the two renames of a checkpoint that replaces one, and in the middle of removing one.
    (tmp_path / "step-00000002").rename(tmp_path / ".step-00000002.replaced")
    for name in (".step-00000002.partial", ".step-00000000.deleted", ".step-00000003.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "about.json").write_text("{")
    before = names(tmp_path)
    checkpoint, passed = Checkpoints(tmp_path).newest()
    assert (counter_of(checkpoint), checkpoint.step, passed, names(tmp_path)) == (2, 2, [], before)
    save(Checkpoints(tmp_path), 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert [counter_of(each) for each in checkpoints.all()] == [1, 2, 3]


def test_no_folder_has_no_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "none", tmp_path / "file", tmp_path):
        assert Checkpoints(folder).all() == [] and Checkpoints(folder).newest() == (None, [])
    assert names(tmp_path) == ["file"]


def test_a_folder_that_cannot_be_read_is_said(tmp_path):
    """The list of its names: a loop of links has none, whoever asks."""
    (tmp_path / "run").symlink_to(tmp_path / "run")
    for ask in (Checkpoints(tmp_path / "run").all, Checkpoints(tmp_path / "run").newest):
        with pytest.raises(UserError, match=r"run: it cannot be read: Too many levels of symbolic links"):
            ask()
    with pytest.raises(RunError, match=r"step-00000001 was not saved: .*; .*run: it cannot be read"):
        save(Checkpoints(tmp_path / "run"), 1)


def test_arguments_are_tried_before_anything_is_written(tmp_path):
    good = torch.ones(2)
    wrong = [
        (ValueError, "step is -1; it needs", (-1, {"a": good}, {})),
        (ValueError, "step is True; it needs", (True, {"a": good}, {})),
        (ValueError, r"step is 1\.0; it needs", (1.0, {"a": good}, {})),
        (TypeError, "'b' is a float; it needs to be a tensor", (1, {"a": good, "b": 1.0}, {})),
        (ValueError, r"'b' is torch\.complex64, .*; it needs", (1, {"b": good.to(torch.complex64)}, {})),
        (ValueError, r"'b' is .*torch\.sparse_coo.*; it needs", (1, {"b": good.to_sparse()}, {})),
        (ValueError, r"'b' is .* on meta; it needs", (1, {"b": good.to("meta")}, {})),
        (TypeError, "about", (1, {"a": good}, {"x": object()})),
        (TypeError, "about", (1, {"a": good}, [1])),
    ]
    checkpoints = Checkpoints(tmp_path)
    for kind, message, arguments in wrong:
        with pytest.raises(kind, match=message):
            checkpoints.save(*arguments)
        checkpoints.wait()
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="keep is 0; it needs to be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_file_that_cannot_be_written_is_said_once_and_the_old_checkpoint_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with largest_file(4000):
        save(checkpoints, 1, elements=30_000, wait=False)
        failed = "was not saved: File too large"
        with pytest.raises(RunError, match=f"step-00000001 {failed}; there is no older checkpoint$"):
            checkpoints.wait()
        assert names(tmp_path) == []
        save(checkpoints, 2)
        save(checkpoints, 3, elements=30_000, wait=False)
        with pytest.raises(RunError, match=f"step-00000003 {failed}; step-00000002 is whole$"):
            save(checkpoints, 4)
        # Of the step that is there.
        with pytest.raises(RunError, match=f"step-00000002 {failed}; step-00000002 is whole$"):
            save(checkpoints, 5, step=2, elements=30_000)
        assert [counter_of(each) for each in checkpoints.all()] == [2]
    checkpoints.wait()
    save(checkpoints, 6, elements=30_000)
    assert [counter_of(each, 30_000) for each in checkpoints.all()] == [6]
    assert names(tmp_path) == ["step-00000006"]


def test_a_place_that_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run/step-00000001 was not saved: Not a directory .*; there is no older"):
        save(Checkpoints(tmp_path / "file" / "run"), 1)
    # Somebody's file has the name that it is to have.
    (tmp_path / "step-00000001").write_text("a file")
    with pytest.raises(RunError, match=r"step-00000001 was not saved: Not a directory .*; there is no older"):
        save(Checkpoints(tmp_path), 1)
    assert (tmp_path / "step-00000001").read_text() == "a file" and names(tmp_path) == ["file", "step-00000001"]


@pytest.mark.parametrize("saves", [15, pytest.param(200, marks=pytest.mark.deep)])
def test_a_reader_beside_the_run_sees_whole_checkpoints_alone(saves, tmp_path):
    """While the run removes the older ones: each that is found is whole, or was removed and says so."""
    checkpoints, ended, seen = Checkpoints(tmp_path, keep=1), threading.Event(), []
    save(checkpoints, 1)

    def read() -> None:
        while not ended.is_set():
            found, passed = Checkpoints(tmp_path).newest()
            assert found is not None and passed == []
            try:
                seen.append(counter_of(found))
            except UserError as error:
                assert "it is not there" in str(error)

    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            read()
        except BaseException as error:
            errors.append(error)

    reader = threading.Thread(target=guarded)
    reader.start()
    for counter in range(2, 2 + saves):
        save(checkpoints, counter)
    ended.set()
    reader.join()
    assert errors == []
    assert seen and seen == sorted(seen)
