"""A run's checkpoints: saved beside the training, whole under their name or not there, read in checkpoint_reading.py.

    save:  copy the tensors to the CPU          all that the training waits for
           ---------------------------------    from here on in a thread
           plan which process writes what       torch.distributed.checkpoint's planner: shards, copies once
           write `.step-00000500.partial/`      a file of tensors each process, about.json, checksums.json; each fsynced
           rename it to `step-00000500/`        the folder fsynced before and after
           rename the oldest ones beyond `keep` to `.step-….deleted`, remove those

The format is torch.distributed.checkpoint's storage in safetensors, not its `.distcp`: that one keeps its metadata as
a pickle and each tensor as a file of torch.save, a pickle too. A list of allowed classes would have to be kept in step
with PyTorch's own, whose `__setstate__` would still run on a stranger's values. Here nothing is unpickled, a header is
JSON that says where each byte is, and any safetensors reader opens the file. The planner and the reader are PyTorch's.
Its writer is not: it joins all tensors in memory twice before it writes the first byte; and its `async_save` warns
wherever torch.distributed is not in use.

Several processes: each calls `save` and writes what it holds; what they say to each other goes through a Gloo group of
its own, so that it cannot meet the training's. They share the folder.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from gptkern.formatting import shown
from gptkern.training.checkpoint_reading import (
    ABOUT,
    BLOCK,
    CHECKSUMS,
    DTYPES,
    FOLDER,
    FORMAT,
    LARGEST_JSON,
    SHARDING,
    VERSION,
    Checkpoint,
    dumped,
    printable,
)
from gptkern.training.errors import RunError, UserError

__all__ = ["Checkpoint", "Checkpoints"]

PARTIAL, REPLACED, DELETED = ".partial", ".replaced", ".deleted"
HIDDEN = re.compile(r"\.(step-\d{8,18})(\.partial|\.replaced|\.deleted)")
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, oldest first, and the way to save one.

    Args:
        folder: holds them; the first save makes it. keep: how many stay; older ones go once a newer one is whole.

    Raises:
        ValueError: keep is less than 1.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(f"Checkpoints: keep is {keep}; it needs to be at least 1")
        self.folder, self.keep = Path(folder), keep
        self._buffers: dict[str, torch.Tensor] = {}
        # One thread that waits for the next save: to start a thread is to wait until the system runs it. An interpreter
        # that ends lets it finish.
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving = False
        self._error: RunError | None = None
        self._ranks: _Ranks | None = None
        self._process = os.getpid()

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], about: dict, *, best: int | None = None, wait: bool = False
    ) -> None:
        """Saves the tensors as they are now, and `about`. Returns once they are copied; a thread writes them.

        The copies stay allocated for the next save. A save waits for the one before. A checkpoint of the same step that
        is there is replaced; those of later steps stay. Of several processes each calls it. A tensor that several of
        them name, if it is no DTensor, has the same values there, and is written once.

        Args:
            step: updates done, at least 0. tensors: flat names; whole tensors or DTensors, on any device.
            about: what JSON can hold. best: a step whose checkpoint stays, however old. wait: return once it is on the
                disk.

        Raises:
            RunError: the save before, or this one with `wait`, could not be written; older ones are whole.
            ValueError, TypeError: an argument is not what it needs to be. Nothing was written then.
        """
        self.wait()
        if type(step) is not int or not 0 <= step < 10**18:
            raise ValueError(f"Checkpoints.save: step is {step!r}; it needs a whole number, at least 0")
        for name, tensor in tensors.items():
            _check(name, tensor)
        text = _text(about)
        job = _Job(step, dict(tensors), self._copied(tensors), text, best)
        if self._ranks is None:
            self._ranks = _Ranks()
        self._saving = True  # noted first: an interrupt between the two does not lose it
        self._writer.submit(self._run, job, self._ranks)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns once the last save is on the disk.

        Raises:
            RunError: it could not be written; said once.
        """
        if self._process != os.getpid():
            raise RuntimeError("Checkpoints: it belongs to the process that this one was forked from; make another")
        if self._saving:
            self._writer.submit(bool).result()  # behind whatever was submitted
            self._saving = False
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def saving(self) -> bool:
        """Whether the last save is on its way to the disk. What became of it `wait` says."""
        return self._saving

    def all(self) -> list[Checkpoint]:
        """The checkpoints under their names, oldest first; what a killed save left is none of them.

        Raises:
            UserError: the folder is there and cannot be read.
        """
        return [Checkpoint(folder) for _, folder in self._found()]

    def _found(self) -> list[tuple[int, Path]]:
        """Step and folder of each. A listing under which names change can miss the old one and the new one."""
        found = self._listed()
        while (again := self._listed()) != found:
            found = again
        return found

    def _listed(self) -> list[tuple[int, Path]]:
        found: dict[int, Path] = {}
        try:
            paths = list(self.folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(f"{printable(self.folder)}: it cannot be read: {_reason(error)}") from error
        for path in paths:
            hidden = HIDDEN.fullmatch(path.name)
            named = FOLDER.fullmatch(hidden[1] if hidden else path.name)
            # One that was to be replaced by another of its step counts where the other is not there.
            counts = hidden is None or (hidden[2] == REPLACED and not (self.folder / hidden[1]).is_dir())
            if named and counts and path.is_dir():
                found[int(named[1])] = path
        return sorted(found.items())

    def newest(self, verify: bool = True) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, None where none is; and a line for each damaged one after it.

        Args:
            verify: read all of its bytes; without, its list of files and their sizes are looked at.
        """
        passed: list[str] = []
        checkpoints = self.all()
        while checkpoints:
            checkpoint = checkpoints.pop()
            try:
                checkpoint.verify() if verify else checkpoint.names()
                return checkpoint, passed
            except UserError as error:
                if checkpoint.folder.is_dir():
                    passed.append(str(error))
                else:
                    # A run has removed it, because there are newer ones.
                    checkpoints, passed = self.all(), []
        return None, passed

    @torch.no_grad()
    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process holds of each, in the CPU's memory, in buffers that are there from the save before."""
        buffers, devices = {}, set()
        for name, tensor in tensors.items():
            part = _local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            buffer.copy_(part, non_blocking=part.is_cuda)
            buffers[name] = buffer
            if part.is_cuda:
                devices.add(part.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers
        return buffers

    def _run(self, job: _Job, ranks: _Ranks) -> None:
        try:
            self._error = self._saved(job, ranks)
        except BaseException as error:
            self._error = RunError(f"{printable(self.folder)}: {_reason(error)}")
        finally:
            self._saving = False

    def _saved(self, job: _Job, ranks: _Ranks) -> RunError | None:
        """What went wrong, in the words for `wait`."""
        name = f"step-{job.step:08}"
        partial = self.folder / f".{name}{PARTIAL}"
        try:
            self._write(job, ranks, name, partial)
        except BaseException as error:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            return RunError(f"{printable(self.folder / name)} was not saved: {_reason(error)}; {self._left()}")
        try:
            ranks.together(lambda: self._remove(job) if ranks.rank == 0 else None)
        except BaseException as error:
            what = f"{name} is whole, and older checkpoints could not be removed"
            return RunError(f"{printable(self.folder)}: {what}: {_reason(error)}")
        return None

    def _left(self) -> str:
        try:
            newest, _ = self.newest()
        except UserError as error:
            return str(error)
        return "there is no older checkpoint" if newest is None else f"{newest.folder.name} is whole"

    @torch.no_grad()
    def _write(self, job: _Job, ranks: _Ranks, name: str, partial: Path) -> None:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        def begin() -> None:
            if ranks.rank == 0:
                if not self.folder.is_dir():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    sync(self.folder.parent)
                self._clear()
                partial.mkdir()

        def written() -> tuple[str, dict[str, Any]]:
            file = f"tensors-{ranks.rank + 1:05}-of-{ranks.count:05}.safetensors"
            entry = _write_tensors(partial / file, plans[ranks.rank].items, job.copies)
            # As whoever reads it will look at it.
            Checkpoint(partial).header(file)
            return file, entry

        def finished() -> None:
            if ranks.rank == 0:
                files = dict(parts) | {ABOUT: _write_bytes(partial / ABOUT, job.about)}
                listing = {"format": FORMAT, "version": VERSION, "step": job.step, "files": files}
                _write_bytes(partial / CHECKSUMS, dumped(listing))
                sync(partial)
                self._name(partial, name)

        ranks.together(begin)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(job.tensors, is_coordinator=ranks.rank == 0)
        # Every process makes the whole plan, of the same parts in the same order.
        plans, _ = planner.create_global_plan(ranks.together(planner.create_local_plan))
        parts = ranks.together(written)
        ranks.together(finished)

    def _name(self, partial: Path, name: str) -> None:
        """Gives a whole checkpoint its name. One that had it has another from then on, and is found under that too."""
        path = self.folder / name
        if path.is_dir():
            path.rename(self.folder / f".{name}{REPLACED}")
        partial.rename(path)
        sync(self.folder)

    def _remove(self, job: _Job) -> None:
        """What the checkpoint of a step makes superfluous. Those of later steps are not counted, and stay."""
        for _, old in [each for each in self._found() if each[0] <= job.step and each[0] != job.best][: -self.keep]:
            # Renamed first: a half removed one would look like a damaged one.
            old.rename(self.folder / f".{old.name}{DELETED}")
        self._clear()

    def _clear(self) -> None:
        """Removes what has no name, of this save or of one that was killed; puts back what nothing has replaced."""
        for path in list(self.folder.iterdir()):
            hidden = HIDDEN.fullmatch(path.name)
            if hidden and hidden[2] == REPLACED and not os.path.lexists(self.folder / hidden[1]):
                path.rename(self.folder / hidden[1])
            elif hidden:
                path.unlink() if path.is_symlink() else shutil.rmtree(path)


class _Job(NamedTuple):
    step: int
    tensors: dict[str, torch.Tensor]  # for their shapes alone: training goes on in them
    copies: dict[str, torch.Tensor]
    about: bytes
    best: int | None


class _Ranks:
    """The processes that save together. Where torch.distributed is not in use there is one."""

    def __init__(self):
        dist = torch.distributed
        self.rank, self.count, self.group = 0, 1, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo")

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns in each process, in their order; what it raises in one is raised in all."""
        if self.group is None:
            return [work()]
        result, reason = None, None
        try:
            result = work()
        except Exception as error:
            reason = _reason(error)
        gathered: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(gathered, (result, reason), group=self.group)
        for rank, (_, failed) in enumerate(gathered):
            if failed is not None:
                raise RunError(f"process {rank}: {failed}")
        return [each for each, _ in gathered]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({printable(error.filename)})" if error.filename else "")
    return shown(str(error)) if str(error) and not isinstance(error, RunError) else str(error) or type(error).__name__


def _text(about: Any) -> bytes:
    try:
        if not isinstance(about, dict):
            raise TypeError(f"it is a {type(about).__name__}, and no dict")
        text = (json.dumps(about, indent=1) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"Checkpoints.save: about needs to be what JSON can hold: {error}") from error
    if len(text) > LARGEST_JSON:
        raise ValueError(f"Checkpoints.save: about is {len(text)} bytes of JSON; it needs at most {LARGEST_JSON}")
    return text


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"Checkpoints.save: {name!r} is a {type(tensor).__name__}; it needs to be a tensor")
    if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.is_meta:
        got = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise ValueError(f"Checkpoints.save: {name!r} is {got}; it needs memory of its own and real numbers")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _write_tensors(path: Path, items: list[Any], copies: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A safetensors file of the planned parts, a tensor after the other, hashed on the way."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {}
    offsets, end = {}, 0
    # What needs the widest alignment first, as safetensors has it.
    ordered = sorted(items, key=lambda item: (-copies[item.index.fqn].dtype.itemsize, item.index.fqn))
    for item in ordered:
        name, chunk, copy = item.index.fqn, item.tensor_data.chunk, copies[item.index.fqn]
        if copy.shape != chunk.sizes or name in header:
            raise ValueError(f"{name!r}: this process holds {tuple(copy.shape)} of it, and plans {tuple(chunk.sizes)}")
        start, end = end, end + copy.numel() * copy.dtype.itemsize
        header[name] = {"dtype": names[copy.dtype], "shape": list(copy.shape), "data_offsets": [start, end]}
        offsets[name] = {"saved_offsets": list(chunk.offsets)}
    about = {SHARDING: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    text = json.dumps({"__metadata__": about, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blocks = [len(text).to_bytes(8, "little") + text]
    blocks += [memoryview(copies[item.index.fqn].reshape(-1).view(torch.uint8).numpy()) for item in ordered]
    return _write_bytes(path, *blocks)


def _write_bytes(path: Path, *blocks: bytes | memoryview) -> dict[str, Any]:
    """A new file, on the disk when this returns: {"bytes", "sha256"}."""
    digest, total = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for block in blocks:
            for start in range(0, len(block), BLOCK):
                part = block[start : start + BLOCK]
                file.write(part)
                digest.update(part)
                total += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": digest.hexdigest()}


def sync(folder: Path) -> None:
    """A folder's names onto the disk, where the system can do it."""
    with contextlib.suppress(PermissionError):  # Windows opens no folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
