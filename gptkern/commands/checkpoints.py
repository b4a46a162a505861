"""A checkpoint is a folder: `model.safetensors`, the parameters, and `config.json`, the sizes and how it was trained.

The keys are those of the stock model, swapped or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from pathlib import Path

import torch

from gptkern.commands import UserError, places
from gptkern.models.gpt import GPT, GPTConfig

PARAMETERS = "model.safetensors"
CONFIG = "config.json"

_FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors writes them
_NAMED_AT_MOST = 3


def held(folder: Path) -> bool:
    """Whether there is a checkpoint in the folder, or a part of one."""
    return any((folder / name).exists() for name in (CONFIG, PARAMETERS))


def check_writable(option: str, folder: Path) -> None:
    """Raises UserError where a part of a checkpoint that is in the folder cannot be replaced."""
    for name in (CONFIG, PARAMETERS):
        if folder.is_dir():
            places.file(option, str(folder / name))


def save(model: GPT, folder: Path, training: dict | None = None) -> None:
    """Write the checkpoint, beside one that is there already, and then put it in its place; other files stay.

    Args:
        training: kept beside the sizes, for people.

    Raises:
        RunError: it cannot be written, as on a full disk; a checkpoint that was there is whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    with places.kept(folder, "the checkpoint there is as it was" if held(folder) else ""):
        existed = folder.is_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".checkpoint-") as new:
                # save_model, not save_file: the embedding is also the output weight, and is written once.
                save_model(model, str(Path(new, PARAMETERS)))
                content = {"model": dataclasses.asdict(model.config), "training": training or {}}
                Path(new, CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                for name in (PARAMETERS, CONFIG):
                    with open(Path(new, name), "rb") as file:
                        # A disk may find out late that it is full.
                        os.fsync(file.fileno())
                for name in (PARAMETERS, CONFIG):
                    os.replace(Path(new, name), folder / name)
        except BaseException as error:
            if not existed:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, SafetensorError):
                raise OSError(None, places.reason(error)) from error
            raise


def load(folder: Path, device: torch.device) -> GPT:
    """The stock model of a checkpoint.

    Raises:
        UserError: the folder holds no checkpoint, or one that does not fit together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    missing = [name for name in (CONFIG, PARAMETERS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no checkpoint: {' and '.join(missing)} not found in it")
    try:
        sizes = _sizes(folder / CONFIG)
        _check(_parameters(folder / PARAMETERS), sizes)
        # Not larger than the file, now.
        model = GPT(sizes)
        load_model(model, str(folder / PARAMETERS))
    except (ValueError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(f"{folder} is no checkpoint of this GPT: {' '.join(str(error).split())}") from error
    return model.to(device)


def _sizes(path: Path) -> GPTConfig:
    """What config.json says; a ValueError or TypeError names what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG} is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f'{CONFIG} has no "model" with its sizes')
    fields = {field.name: field for field in dataclasses.fields(GPTConfig)}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    model = content["model"]
    for words, names in (
        ("has no", needed - model.keys()),
        ("is of another model, it has", model.keys() - fields.keys()),
    ):
        if names:
            raise ValueError(f"{CONFIG} {words} {', '.join(sorted(names))}")
    for name, value in model.items():
        if isinstance(value, bool) or not isinstance(value, int if name in needed else int | float):
            raise TypeError(
                f"{CONFIG}: {name} is {value!r}; it needs a number{', a whole one' if name in needed else ''}"
            )
    return GPTConfig(**model)


def _parameters(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (dtype as the file writes it, shape), of which nothing is read but the header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{PARAMETERS} cannot be read, it may be cut off: {error}") from error


def _check(parameters: dict[str, tuple[str, tuple[int, ...]]], sizes: GPTConfig) -> None:
    """A ValueError names the parameters that do not fit, with what they are and what they need to be.

    Nothing of these sizes is allocated.
    """
    int8 = [name for name, (dtype, _) in parameters.items() if dtype == "I8"]
    if int8:
        raise ValueError(
            f"{_first(int8)} in {PARAMETERS} is int8; it needs the model in floating point, which --int8 quantises. "
            "In Python gptkern.load_quantized loads this one"
        )
    blocks = {name.split(".")[1] for name in parameters if name.startswith("blocks.")}
    if sizes.layers > len(blocks):
        raise ValueError(
            f"{CONFIG}: layers is {sizes.layers}; it needs to be the number of blocks in {PARAMETERS}, {len(blocks)}"
        )
    state_dict = _on_meta(parameters, sizes).state_dict(keep_vars=True)
    # A tensor of several names is in the file under one.
    names: dict[int, list[str]] = {}
    for name, tensor in state_dict.items():
        names.setdefault(id(tensor), []).append(name)
    wrong = [
        f"{name} is {shape}; it needs {tuple(state_dict[name].shape)}"
        for name, (_, shape) in parameters.items()
        if name in state_dict and shape != tuple(state_dict[name].shape)
    ]
    wrong += [
        f"{name} is {dtype}; it needs floating point"
        for name, (dtype, _) in parameters.items()
        if dtype not in _FLOATING
    ]
    missing = [same[0] for same in names.values() if not parameters.keys() & set(same)]
    more = [name for name in parameters if name not in state_dict]
    wrong += [f"{_first(missing)} not found in {PARAMETERS}"] if missing else []
    wrong += [f"{_first(more)} in {PARAMETERS} is none of its parameters"] if more else []
    if wrong:
        raise ValueError(_first(wrong, "; "))


def _on_meta(parameters: dict[str, tuple[str, tuple[int, ...]]], sizes: GPTConfig) -> GPT:
    try:
        with torch.device("meta"):
            return GPT(sizes)
    except (RuntimeError, TypeError, OverflowError) as error:
        # More elements than a tensor can have.
        tokens, positions = (sizes.vocab_size, sizes.width), (sizes.context, sizes.width)
        # A file has the first two under one of their names.
        needed = {"token_embedding.weight": tokens, "lm_head.weight": tokens, "position_embedding.weight": positions}
        wrong = [
            f"{name} is {parameters[name][1]}; it needs {shape}"
            for name, shape in needed.items()
            if name in parameters and parameters[name][1] != shape
        ]
        raise ValueError("; ".join(wrong) or str(error)) from error


def _first(items: list[str], separator: str = ", ") -> str:
    more = len(items) - _NAMED_AT_MOST
    return separator.join([*items[:_NAMED_AT_MOST], *([f"and {more} more"] if more > 0 else [])])
