"""The folder in which tokens are being prepared: resumed, refused, and moved to its place as a whole.

    FOLDER/.preparing/state.json      what was asked for, and from where to go on
    FOLDER/.preparing/…               shards, tokenizer.json, at last manifest.json: then the state says so

The state is written after what it speaks of is on the disk, so that a power cut loses what came after it and no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from gptkern.formatting import shown
from gptkern.training.data.plain_files import sync_folder
from gptkern.training.data.store import FORMAT, MANIFEST, Store, read_manifest
from gptkern.training.data.tokenizers import FILE as TOKENIZER
from gptkern.training.errors import UserError, kept

try:
    import fcntl
except ImportError:  # Windows: two runs at once are not told apart
    fcntl = None

NAME = ".preparing"
STATE = "state.json"
_SHARD = re.compile(r"(train|validation)-\d{5,}\.zst")
# All that stands in the folder of the work, whole or half written.
_OF_WORK = re.compile(
    rf"((train|validation)-\d{{5,}}\.zst|{re.escape(STATE)}|{re.escape(MANIFEST)})(\.new)?"
    rf"|{re.escape(TOKENIZER)}|\.{re.escape(TOKENIZER)}\.new|pipe-\d+"
)


class Work:
    """Of one preparation, which has the folder for itself inside the `with` block.

    Whatever raises UserError in the block leaves the folder as it was found; all else leaves the work, to go on from.
    """

    def __init__(self, out: Path):
        self.out, self.folder = out, out / NAME
        self._mine = False

    def __enter__(self) -> Work:
        self._made: list[Path] = []
        with kept(self.out):
            for each in reversed([self.out, *self.out.parents]):
                if not each.is_dir():
                    with contextlib.suppress(FileExistsError):
                        each.mkdir()
                        self._made.append(each)
        self._lock = self._locked()
        try:
            self._refuse_strangers()
        except BaseException:
            if self._lock is not None:
                os.close(self._lock)
            raise
        return self

    def _locked(self) -> int | None:
        if fcntl is None:
            return None
        lock = None
        try:
            lock = os.open(self.out, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A program that made the folder and failed has removed it.
            if not os.path.samestat(os.fstat(lock), os.stat(self.out)):
                raise FileNotFoundError
        except (BlockingIOError, FileNotFoundError) as error:
            if lock is not None:
                os.close(lock)
            raise UserError(f"{self._called}: another program is preparing tokens in it") from error
        return lock

    def _refuse_strangers(self) -> None:
        """What is in the folder of the work may be deleted: nothing else may be in it."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise UserError(f"{self._called} holds {NAME}, which is no folder; remove it, or name another --out")
        with os.scandir(self.folder) as found:
            others = [each.name for each in found
                      if not (_OF_WORK.fullmatch(each.name) and each.is_file(follow_symlinks=False))]  # fmt: skip
        if others:
            raise UserError(
                f"{self._called}: its folder {NAME} holds {shown(min(others))}, which gptkern did not write; move it "
                "away, or name another --out"
            )

    def make(self) -> Path:
        """The folder of the work, which is there from now on."""
        with kept(self.folder):
            self.folder.mkdir(exist_ok=True)
        return self.folder

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None and issubclass(kind, UserError) and self._mine:
            shutil.rmtree(self.folder, ignore_errors=True)
        # Where something is in it, it stays.
        for folder in (self.folder, *reversed(self._made)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)

    @property
    def _called(self) -> str:
        return f"--out {shown(str(self.out))}"

    def complete(self, inputs: str) -> dict[str, Any] | None:
        """The manifest, where what was asked for is there already and whole."""
        if not (self.out / MANIFEST).exists():
            return None
        manifest = self._manifest()
        if manifest.get("inputs") != inputs:
            return None
        Store.open(self.out, "--out")
        # A run that was killed in its last moment leaves it.
        if (self._read_state() or {}).get("asked", {}).get("inputs") == inputs:
            shutil.rmtree(self.folder, ignore_errors=True)
        return manifest

    def begin(self, asked: dict[str, Any], overwrite: bool, keep: set[str]) -> dict[str, Any] | None:
        """The state from which to go on; None to begin anew, in a folder that is empty but for the files to `keep`.

        Args:
            asked: what the state has to have been taken for.

        Raises:
            UserError: something else is there, and is not to be overwritten.
        """
        state = self._read_state()
        same = state is not None and state.get("asked") == asked
        if not overwrite:
            if state is not None and not same:
                raise UserError(
                    f"{self._called} holds what another command began and did not finish, or the texts have changed "
                    "since; --overwrite begins anew, another --out leaves it"
                )
            self._refuse_others(moving=same and "moving" in state)
        elif (self.out / MANIFEST).exists():
            self._manifest()
        self._mine = True
        if same:
            return state
        with kept(self.make()):
            for path in sorted(self.folder.iterdir()):
                if path.name not in keep:
                    path.unlink()
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state. All that it speaks of has to be on the disk."""
        self._write(STATE, json.dumps(state))

    def finish(self, manifest: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, and move everything to its place."""
        self._write(MANIFEST, json.dumps(manifest, indent=1) + "\n")
        self.save({"asked": asked, "moving": True})
        return self.move()

    def move(self) -> dict[str, Any]:
        """Move what has not been moved yet; returns the manifest."""
        if not (self.folder / MANIFEST).exists():
            with kept(self.folder):
                shutil.rmtree(self.folder)
            return self._manifest()
        manifest = json.loads((self.folder / MANIFEST).read_text())
        names = {entry["file"] for split in manifest["splits"].values() for entry in split["shards"]}
        names |= {manifest["tokenizer"]["file"]} if "file" in manifest["tokenizer"] else set()
        if not all(map(_is_ours, names)):
            raise UserError(f"{self._called}: {self.folder / MANIFEST} is not what was written there")
        with kept(self.out, f"what is missing is in {self.folder}, and the same command goes on"):
            # Of the old files none is of use without the others.
            (self.out / MANIFEST).unlink(missing_ok=True)
            for path in sorted(self.out.iterdir()):
                if path.name not in names and _is_ours(path.name):
                    path.unlink()
            for name in sorted(names):
                if (self.folder / name).exists():
                    os.replace(self.folder / name, self.out / name)
            sync_folder(self.out)
            os.replace(self.folder / MANIFEST, self.out / MANIFEST)
            sync_folder(self.out)
            shutil.rmtree(self.folder)
        return manifest

    def _refuse_others(self, moving: bool) -> None:
        if (self.out / MANIFEST).exists():
            self._manifest()
            raise UserError(f"{self._called} holds other tokens: --overwrite replaces them, another --out leaves them")
        found = next((path.name for path in sorted(self.out.iterdir()) if _is_ours(path.name)), None)
        if found and not moving:
            raise UserError(f"{self._called} holds {found}: --overwrite replaces it, another --out leaves it")

    def _manifest(self) -> dict[str, Any]:
        """The one that is there.

        Raises:
            UserError: it is not of tokens; nothing that was asked for allows to replace it.
        """
        try:
            manifest = read_manifest(self.out)
        except UserError as error:
            raise UserError(f"{self._called}: {error}; it needs another folder") from error
        if manifest.get("format") != FORMAT:
            raise UserError(f"{self._called} holds a {MANIFEST} that is not of gptkern; it needs another folder")
        return manifest

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state = json.loads((self.folder / STATE).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            return {}
        return state if isinstance(state, dict) and isinstance(state.get("asked"), dict) else {}

    def _write(self, name: str, text: str) -> None:
        new = self.folder / f"{name}.new"
        with kept(new, "what is there is whole, and the same command goes on"):
            with open(new, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.folder / name)
            sync_folder(self.folder)


def _is_ours(name: str) -> bool:
    return name == TOKENIZER or _SHARD.fullmatch(name) is not None
