"""The folder of a run: what lies in it, who may write there, and how another run takes its place.

recipe.toml       what it ran with                    checkpoints/      step-00000100, …
metrics.jsonl     a line an update                    tokenizer.json    where the data has one
report.html       curves                              tensorboard/      where that is written
.lock             held by the program that trains     .replaced/        the run that was there, until the new one
                                                                        has a checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.data.plain_files import sync_folder
from gptkern.training.errors import RunError, UserError, kept

RECIPE, METRICS, REPORT, CHECKPOINTS = "recipe.toml", "metrics.jsonl", "report.html", "checkpoints"
TOKENIZER, TENSORBOARD = "tokenizer.json", "tensorboard"
# A checkpoint as `gptkern train` wrote it before runs had folders.
FORMER = ("config.json", "model.safetensors")
# The recipe comes last: what has one is a run.
ITEMS = (METRICS, REPORT, CHECKPOINTS, TOKENIZER, TENSORBOARD, *FORMER, RECIPE)
LOCK, REPLACED, MOVED = ".lock", ".replaced", "moved"
CHECKSUMS = "checksums.json"  # of a checkpoint, which has its name once it is whole


class RunFolder:
    """A run's folder.

    Args:
        path: the folder. option: what an error calls it.
    """

    def __init__(self, path: str | Path, option: str = "--out"):
        self.path, self.option = Path(path), option
        self.recipe, self.metrics, self.report = self.path / RECIPE, self.path / METRICS, self.path / REPORT
        self.checkpoints, self.tensorboard = self.path / CHECKPOINTS, self.path / TENSORBOARD
        self._replaced = self.path / REPLACED

    def __str__(self) -> str:
        return shown(str(self.path))

    def held(self) -> str | None:
        """The name of something of a run that is there."""
        return next((name for name in (RECIPE, *ITEMS) if os.path.lexists(self.place(name))), None)

    def place(self, name: str) -> Path:
        """Where that of the run lies which counts: not here where a program was killed while it replaced one."""
        mended, aside = self.path / name, self._replaced / name
        if not self._replaced.is_dir() or self._has_new():
            return mended
        return aside if os.path.lexists(aside) or self._is_moved() else mended

    def is_run(self) -> bool:
        """Whether a training wrote what is there, so that another may replace it."""
        if os.path.lexists(self.place(RECIPE)):
            return True
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            return json.loads(self.place(FORMER[0]).read_text(encoding="utf-8"))["training"]["command"] == "train"
        return False

    def stored(self) -> recipe_files.Given:
        """What the run that is there began with. Raises UserError where no run is there."""
        recipe = self.place(RECIPE)
        if not recipe.is_file():
            raise UserError(f"{self.option} {self} holds no run that --resume could go on with: it has no {RECIPE}")
        stored = recipe_files.read(recipe, self.option)
        for name in ("steps", "context", "seed"):
            if name not in stored.values:
                raise UserError(f"{self.option} {self}: {RECIPE} has no {name}; it needs to be as a run stored it")
        return stored

    def check_free(self, overwrite: bool) -> None:
        """Before a new run. Raises UserError where something is there that it may not replace."""
        held = self.held()
        if held is None:
            return
        if not self.is_run():
            raise UserError(f"{self.option} {self} holds {held}, which no training wrote: give another {self.option}")
        if not overwrite:
            raise UserError(
                f"{self.option} {self} holds a run: --resume goes on with it, --overwrite replaces it, another "
                f"{self.option} leaves it"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the block no other program trains here. Makes the folder; one that is left empty goes.

        Raises:
            UserError: another program does.
        """
        made = _make(self.path)
        path = self.path / LOCK
        with kept(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock(handle, path):
                raise UserError(f"{self.option} {self}: another program is training there")
            yield
        finally:
            # Where nothing came of it the name goes before the lock does.
            made = made if self.held() is None else []
            if made:
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(handle)
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    # --- Another run in its place -------------------------------------------------------------------------------------

    def set_aside(self) -> None:
        """Move what is there into `.replaced`, from where `put_back` and `forget` take it.

        The mark is on the disk after what was moved: what lies beside one is the new run's, after a power cut too.
        """
        with kept(self.path, "the run that is there is as it was"):
            self._replaced.mkdir(exist_ok=True)
            try:
                for name in ITEMS:
                    if os.path.lexists(self.path / name):
                        os.rename(self.path / name, self._replaced / name)
                self._sync()
                (self._replaced / MOVED).touch()
                self._sync()
            except BaseException:
                self._return()
                raise

    def put_back(self) -> None:
        """The run that was there is there again; what the new one wrote goes."""
        with kept(self.path):
            for name in ITEMS:
                _remove(self.path / name)
            (self._replaced / MOVED).unlink(missing_ok=True)
            self._sync()
            self._return()

    def forget(self) -> None:
        """The run that was there is no longer needed. Raises RunError where it cannot be removed.

        The new one is on the disk before that, with its name in the folder; the mark goes after what it speaks of.
        """
        if self._replaced.is_dir():
            with kept(self._replaced):
                self._sync()
                for name in os.listdir(self._replaced):
                    if name != MOVED:
                        _remove(self._replaced / name)
                self._sync()
                (self._replaced / MOVED).unlink(missing_ok=True)
                self._replaced.rmdir()

    def mend(self) -> str | None:
        """Bring to an end what a program left that was killed while it replaced a run; says in a line what was done.

        Inside of `locked` alone: a program that was not killed is training here.
        """
        if not self._replaced.is_dir():
            return None
        if not self._is_moved():
            # Moving had not come to its end, either way.
            with kept(self.path):
                self._return()
            return None
        if self._has_new():
            self.forget()
            return None
        self.put_back()
        return f"what was to replace the run in {self} was ended before its first checkpoint: the run is back"

    def _is_moved(self) -> bool:
        return (self._replaced / MOVED).exists()

    def _has_new(self) -> bool:
        """Whether the run that takes another's place has a checkpoint."""
        return self._is_moved() and any(self.checkpoints.glob(f"step-*/{CHECKSUMS}"))

    def sweep(self) -> None:
        """Remove what a killed program had begun to write, of the files that are written whole."""
        for name in (RECIPE, REPORT):
            for left in self.path.glob(f".{name}.*.new"):
                with contextlib.suppress(OSError):
                    left.unlink()

    def _return(self) -> None:
        for name in reversed(ITEMS):
            if os.path.lexists(self._replaced / name):
                os.rename(self._replaced / name, self.path / name)
        sync_folder(self.path)
        with contextlib.suppress(FileNotFoundError):
            self._replaced.rmdir()

    def _sync(self) -> None:
        """What was moved or removed is so on the disk: in the folder, and in `.replaced`."""
        sync_folder(self.path)
        sync_folder(self._replaced)

    def clear(self) -> None:
        """Remove what a run began with and never used."""
        for name in ITEMS:
            with contextlib.suppress(OSError):
                _remove(self.path / name)


def _make(path: Path) -> list[Path]:
    """The folders that had to be made."""
    made: list[Path] = []
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():
                folder.mkdir()
                made.append(folder)
    except FileExistsError:
        # Another program made it in between.
        if not path.is_dir():
            raise
    except OSError as error:
        raise RunError(f"{shown(str(path))} cannot be made: {error.strerror or error}") from error
    return made


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(handle: int, path: Path) -> bool:
    """Whether this program has the lock now; it goes with the handle, however the program ends."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    with kept(path):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A program whose run came to nothing may have taken the name away in between.
            return os.path.samestat(os.fstat(handle), os.stat(path))
        except (BlockingIOError, FileNotFoundError):
            return False
