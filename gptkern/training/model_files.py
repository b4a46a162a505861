"""A model's folder as gptkern writes it: `model.safetensors`, the parameters, and `config.json`, the sizes and how it
was trained. And what every other kind of folder shares with it: what is checked, what is read, how it is replaced.

The keys are those of the stock model, swapped or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import memory
from gptkern.training.checkpoints import sync
from gptkern.training.errors import RunError, UserError, kept, reason
from gptkern.training.interrupting import postponed
from gptkern.training.tensor_files import Header, SafetensorsFiles, Tensors, json_object, said

PARAMETERS = "model.safetensors"
CONFIG = "config.json"

LARGEST = 2**63 - 1  # what a size of a tensor can be

_NEW, _ASIDE = ".checkpoint-", "replaced"  # of `replace`
_FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors writes them
_NAMED_AT_MOST = 3


# --- Folders ----------------------------------------------------------------------------------------------------------


def held(folder: Path) -> bool:
    """Whether there is a checkpoint in the folder, or a part of one."""
    return any((folder / name).exists() for name in (CONFIG, PARAMETERS))


def save(model: GPT, folder: Path, training: dict | None = None) -> None:
    """Write the checkpoint, beside one that is there already, and then put it in its place; other files stay.

    Args:
        training: kept beside the sizes, for people.

    Raises:
        RunError: it cannot be written, as on a full disk; a checkpoint that was there is whole.
    """
    from safetensors.torch import save_model

    def write(new: Path) -> None:
        # save_model, not save_file: the embedding is also the output weight, and is written once.
        save_model(model, str(new / PARAMETERS))
        content = {"model": dataclasses.asdict(model.config), "training": training or {}}
        (new / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    replace(folder, write, (PARAMETERS, CONFIG), "the checkpoint there is as it was" if held(folder) else "")


def replace(folder: Path, write: Callable[[Path], Any], order: Sequence[str], stays: str, stale=()) -> None:
    """Call `write` with a new folder inside of `folder`, and put the files that it writes there in their places.

    A kill leaves what was there, or what is new, or a folder without the last of `order`; what else one left, the next
    call removes: half-written files before it writes, a model that had been set aside once the new one is in place.

    Args:
        order: names of the files that are put in their places, one after another. The last one makes the folder a
            model: it is taken away before anything else changes. stays: what a RunError says of what was there.
        stale: names of files that go.

    Raises:
        RunError: they cannot be written; what was there is as it was, or the message says where it is.
    """
    from safetensors import SafetensorError

    with kept(folder, stays):
        existed = folder.is_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            left = list(folder.glob(f"{_NEW}*"))
            new, done = Path(tempfile.mkdtemp(dir=folder, prefix=_NEW)), False
            try:
                write(new)
                names = [name for name in order if (new / name).exists()]
                # safetensors makes files that their owner alone can read, whatever the umask.
                usual = new / ".usual"
                usual.touch()
                for name in names:
                    shutil.copymode(usual, new / name)
                    with open(new / name, "rb") as file:
                        # A disk may find out late that it is full.
                        os.fsync(file.fileno())
                with postponed():
                    _exchange(folder, new, names, stale)
                    done = True
            finally:
                # What could not be put back stays.
                if done or not _holds_old(new):
                    shutil.rmtree(new, ignore_errors=True)
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if not existed:
                sync(folder.absolute().parent)
        except BaseException as error:
            if not existed:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, SafetensorError):
                raise OSError(None, reason(error)) from error
            raise


def sweep(folder: Path) -> None:
    """Remove what a killed `replace` had written by then; a model that it had set aside stays."""
    for path in folder.glob(f"{_NEW}*"):
        if not _holds_old(path):
            shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path) -> list[str]:
    """Folders, by their names in `folder`, with a model that a killed `replace` had set aside."""
    return sorted(str((path / _ASIDE).relative_to(folder)) for path in folder.glob(f"{_NEW}*") if _holds_old(path))


def _holds_old(new: Path) -> bool:
    return (new / _ASIDE).is_dir() and any((new / _ASIDE).iterdir())


def _exchange(folder: Path, new: Path, names: Sequence[str], stale: Iterable[str]) -> None:
    """The old files into a folder inside of `new`, and the new ones in their places: all of it, or nothing."""
    old = [name for name in (*reversed(names), *stale) if os.path.lexists(folder / name)]
    for name in old:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise OSError(None, f"{shown(name)} is a folder")
    aside, moved = new / _ASIDE, []

    def move(source: Path, target: Path) -> None:
        os.replace(source, target)
        moved.append((source, target))

    try:
        aside.mkdir()
        for number, name in enumerate(old):
            move(folder / name, aside / name)
            if number == 0:
                # The disk must not see what follows without this.
                sync(folder)
        for name in names:
            if name == names[-1]:
                sync(folder)
            move(new / name, folder / name)
        sync(folder)
    except BaseException as error:
        try:
            for source, target in reversed(moved):
                os.replace(target, source)
        except OSError as again:
            what = f"{folder} cannot be written: {reason(error)}; nor can what was there be put back: {reason(again)}"
            raise RunError(f"{what}; its files are in {aside}") from error
        raise


def load(folder: Path, device: torch.device | str = "cpu", option: str = "") -> GPT:
    """The stock model of a folder that `save` wrote.

    Args:
        option: what an error calls the folder.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit together, or that no memory holds.
    """
    name = f"{option} {shown(str(folder))}".lstrip()
    missing = [file for file in (CONFIG, PARAMETERS) if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{name} is no checkpoint: {' and '.join(missing)} not found in it")
    with refused(name):
        config = config_of(json_object(folder / CONFIG))
        tensors = SafetensorsFiles(folder, [PARAMETERS])
        return filled(config, tensors, own_places, (PARAMETERS, "blocks."), device)


@contextlib.contextmanager
def refused(name: str) -> Iterator[None]:
    """What does not fit inside the block is a UserError that says so of the folder; one without a name gets it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{name} is no checkpoint of this GPT: {' '.join(str(error).split())}") from error


def config_of(content: dict[str, Any]) -> GPTConfig:
    """What config.json says; a ValueError or TypeError names what is wrong with it."""
    if not isinstance(content.get("model"), dict):
        raise ValueError(f'{CONFIG} has no "model" with its sizes')
    return sizes(content["model"], CONFIG)


def sizes(model: dict[str, Any], file: str) -> GPTConfig:
    """The GPTConfig of which `dataclasses.asdict` was written to a file.

    Raises:
        ValueError, TypeError: it is none; the message names the file and the key.
    """
    fields = {field.name: field for field in dataclasses.fields(GPTConfig)}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    for words, names in (
        ("has no", needed - model.keys()),
        ("is of another model, it has", model.keys() - fields.keys()),
    ):
        if names:
            raise ValueError(f"{file} {words} {_first([shown(name) for name in sorted(names)])}")
    for name, value in model.items():
        if isinstance(value, bool) or not isinstance(value, int if name in needed else int | float):
            whole = ", a whole one" if name in needed else ""
            raise TypeError(f"{file}: {name} is {said(value)}; it needs a number{whole}")
        if name in needed and value > LARGEST:
            raise ValueError(f"{file}: {name} is {said(value)}; it needs a size that a tensor can have")
    return GPTConfig(**model)


# --- Parameters -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a file has a parameter.

    Args:
        names: of which it has at least one; where it has several they are the same values.
        transposed: rows there are columns here.
    """

    names: tuple[str, ...]
    transposed: bool = False


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each parameter of a GPT, of which nothing is made."""
    width = config.width
    shapes = {
        "token_embedding.weight": (config.vocab_size, width),
        "position_embedding.weight": (config.context, width),
        "final_norm.weight": (width,),
        "final_norm.bias": (width,),
    }
    linear = {
        "attention.qkv": (3 * width, width), "attention.project": (width, width),
        "perceptron.expand": (4 * width, width), "perceptron.project": (width, 4 * width),
    }  # fmt: skip
    for block in range(config.layers):
        for name in ("attention_norm", "perceptron_norm"):
            shapes |= {f"blocks.{block}.{name}.{part}": (width,) for part in ("weight", "bias")}
        for name, shape in linear.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    return shapes


def own_places(config: GPTConfig) -> dict[str, Place]:
    """Parameter -> Place, under the stock model's own keys."""
    tied = {"token_embedding.weight": Place(("token_embedding.weight", "lm_head.weight"))}
    return {name: Place((name,)) for name in parameter_shapes(config)} | tied


def filled(
    config: GPTConfig,
    tensors: Tensors,
    places: Callable[[GPTConfig], dict[str, Place]],
    blocks: tuple[str, str],
    device: torch.device | str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> GPT:
    """The stock model, of float32, with what files hold: `unfilled`, of which the arguments are, and then its values.

    Raises:
        ValueError: also where a parameter is there under two names, with other values.
    """
    headers = {name: header for name, header in tensors.headers.items() if not ignored(name)}
    model = unfilled(config, headers, places, blocks, device)
    where = places(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = where[name]
            first, *more = [stored for stored in place.names if stored in headers]
            tensor = tensors.read(first)
            for other in more:
                if not torch.equal(tensor, tensors.read(other)):
                    raise ValueError(f"{first} and {other} differ; they need to be the same, one weight in this GPT")
            parameter.copy_(tensor.T if place.transposed else tensor)
    return model.to(device)


def unfilled(
    config: GPTConfig,
    headers: dict[str, Header],
    places: Callable[[GPTConfig], dict[str, Place]],
    blocks: tuple[str, str],
    device: torch.device | str,
) -> GPT:
    """The stock model on the CPU, its parameters without values, once a file's headers are seen to fit it.

    Args:
        places: gives parameter -> Place; called when the number of blocks is known to be one that a file can hold.
        blocks: the file's name, and what the names of a block's tensors begin with, before its number.

    Raises:
        ValueError: a tensor is missing, is too many, or has another shape or dtype. UserError: no memory holds it.
    """
    file, prefix = blocks
    found = {name.removeprefix(prefix).partition(".")[0] for name in headers if name.startswith(prefix)}
    if config.layers > len(found):
        raise ValueError(
            f"{CONFIG}: layers is {config.layers}; it needs to be the number of blocks in {file}, {len(found)}"
        )
    check(headers, parameter_shapes(config), places(config), file)
    check_memory(config, device)
    return empty_model(config)


def check(headers: dict[str, Header], shapes: dict[str, tuple[int, ...]], places: dict[str, Place], file: str) -> None:
    """A ValueError names the parameters that do not fit, with what they are and what they need to be.

    Nothing of these sizes is allocated.
    """
    int8 = [name for name, header in headers.items() if header.dtype == "I8"]
    if int8:
        raise ValueError(
            f"{_first(int8)} in {file} is int8; it needs the model in floating point, which --int8 quantises. "
            "In Python gptkern.load_quantized loads this one"
        )
    needed = {
        name: shapes[parameter][::-1] if place.transposed else shapes[parameter]
        for parameter, place in places.items()
        for name in place.names
    }
    wrong = [
        f"{name} is {header.shape}; it needs {needed[name]}"
        for name, header in headers.items()
        if name in needed and header.shape != needed[name]
    ]
    wrong += [
        f"{shown(name)} is {header.dtype}; it needs floating point"
        for name, header in headers.items()
        if header.dtype not in _FLOATING
    ]
    missing = [place.names[0] for place in places.values() if not headers.keys() & set(place.names)]
    more = [shown(name) for name in headers if name not in needed]
    wrong += [f"{_first(missing)} not found in {file}"] if missing else []
    wrong += [f"{_first(more)} in {file} is none of its parameters"] if more else []
    if wrong:
        raise ValueError(_first(wrong, "; "))


def check_memory(config: GPTConfig, device: torch.device | str) -> None:
    """Raises UserError where the parameters, in float32, are more than there is memory."""
    size = memory.FLOAT32 * memory.parameter_count(config)
    for each in dict.fromkeys(("cpu", torch.device(device).type)):
        free = memory.available(torch.device(device) if each != "cpu" else torch.device("cpu"))
        if free is not None and size > free:
            raise UserError(
                f"the model needs {formatting.size(size)} of memory and there are {formatting.size(free)} ({each})"
            )


def empty_model(config: GPTConfig) -> GPT:
    """A GPT on the CPU of which no parameter has a value yet; no random number is drawn for it."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    # Each of the two modules got a new one.
    model.lm_head.weight = model.token_embedding.weight
    return model


def check_finite(model: GPT, name: str) -> None:
    """Raises UserError where a parameter is no finite number: `name` is what it calls the folder."""
    for key, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"{name} holds NaN or an infinity in {key}: its training has failed")


def _first(items: list[str], separator: str = ", ") -> str:
    more = len(items) - _NAMED_AT_MOST
    return separator.join([*items[:_NAMED_AT_MOST], *([f"and {more} more"] if more > 0 else [])])
