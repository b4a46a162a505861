"""A model as other programs read it: safetensors in the layout of transformers' GPT-2, with its tokenizer.

config.json                    GPT2Config's
model.safetensors              the weights; or model.byte-planes.safetensors, smaller, which gptkern alone reads
tokenizer.json                 and tokenizer_config.json: the tokenizer, of bytes too
generation_config.json         where a text ends
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.models.gpt import GPTConfig
from gptkern.training import byte_planes, bytes_file, gpt2_layout, model_files
from gptkern.training.checkpoint_reading import Checkpoint
from gptkern.training.data.store import MANIFEST
from gptkern.training.data.tokenizers import Tokenizer
from gptkern.training.errors import UserError
from gptkern.training.loading import CHECKPOINTS, INDEX, PLANES, TOKENIZER, Loaded
from gptkern.training.model_files import CONFIG, PARAMETERS
from gptkern.version import __version__

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

GENERATION, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
# config.json comes last: a folder without it is no model to anybody.
_ORDER = (PARAMETERS, PLANES, TOKENIZER, TOKENIZER_CONFIG, GENERATION, CONFIG)
# What a folder of a model may hold beside these, and would be read in place of them.
_OTHERS = (
    INDEX, "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "chat_template.jinja",
)  # fmt: skip
_SHARDS = "model-*-of-*.safetensors"


class Exported(NamedTuple):
    """What was written.

    Args:
        weights: the file's name. raw: bytes of the weights in their dtype. stored: bytes of the file.
    """

    folder: Path
    weights: str
    dtype: str
    parameters: int
    raw: int
    stored: int

    @property
    def ratio(self) -> float:
        return self.stored / self.raw


def export(
    loaded: Loaded,
    folder: str | Path,
    dtype: str = "float32",
    *,
    planes: bool = False,
    overwrite: bool = False,
    option: str = "--out",
) -> Exported:
    """Write a model so that AutoModelForCausalLM and AutoTokenizer load it. Other files in the folder stay.

    Args:
        dtype: of the weights: float32, bfloat16 or float16. planes: the weights without loss in fewer bytes, as byte
            planes, which `load_model` reads and transformers does not. overwrite: replace a model that is there.
        option: what an error calls the folder.

    Raises:
        ValueError: the dtype is none of the three.
        UserError: the folder holds a model (without `overwrite`) or a run, the disk has no room, or a weight is no
            finite number in that dtype. RunError: it cannot be written; what was there is as it was.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"export: dtype is {dtype!r}; it needs one of {', '.join(DTYPES)}")
    check_target(folder, overwrite, option)
    config = loaded.model.config
    name = f"{option} {shown(str(folder))}"
    raw = loaded.model.parameter_count() * DTYPES[dtype].itemsize
    model_files.sweep(folder)
    _check_room(folder, raw, name)
    model_files.check_finite(loaded.model, "the model")
    try:
        tensors = gpt2_layout.tensors_of(loaded.model, DTYPES[dtype])
    except ValueError as error:
        raise UserError(f"--dtype {dtype}: {error}") from error
    weights = PLANES if planes else PARAMETERS

    def write(new: Path) -> None:
        if planes:
            byte_planes.save(tensors, new / weights)
        else:
            from safetensors.torch import save_file

            save_file(tensors, str(new / weights), {"format": "pt"})
        _write_tokenizer(new, loaded.tokenizer, config)
        end_of_text = loaded.tokenizer.end_of_text if loaded.tokenizer is not None else None
        labels = loaded.about.get("labels", ())
        content = gpt2_layout.config_json(config, dtype, end_of_text, labels) | {"gptkern": _history(loaded)}
        _write_json(new / CONFIG, content)
        ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        _write_json(new / GENERATION, {key: value for key, value in ends.items() if value is not None})

    stays = "the model there is as it was" if _model_files(folder) else ""
    model_files.replace(folder, write, _ORDER, stays, stale=_stale(folder, weights, loaded.tokenizer))
    return Exported(folder, weights, dtype, loaded.model.parameter_count(), raw, (folder / weights).stat().st_size)


def check_target(folder: Path, overwrite: bool, option: str = "--out") -> None:
    """Raises UserError where a model must not be written into the folder."""
    name = f"{option} {shown(str(folder))}"
    if folder.is_dir() and ((folder / CHECKPOINTS).is_dir() or (folder / "recipe.toml").exists()):
        raise UserError(f"{name} holds a run; it needs another folder")
    if folder.is_dir() and Checkpoint.is_one(folder):
        raise UserError(f"{name} holds a run's checkpoint; it needs another folder")
    if (folder / MANIFEST).exists():
        raise UserError(f"{name} holds tokens ({MANIFEST}); it needs another folder")
    there = [*_model_files(folder), *model_files.set_aside(folder)]
    if there and not overwrite:
        raise UserError(f"{name} holds a model ({there[0]}): --overwrite replaces it, another {option} leaves it")


def _model_files(folder: Path) -> list[str]:
    """Names of what is in the folder of a model."""
    if not folder.is_dir():
        return []
    names = [name for name in (*_ORDER, *_OTHERS) if (folder / name).exists()]
    return names + sorted(path.name for path in folder.glob(_SHARDS))


def _stale(folder: Path, weights: str, tokenizer: Tokenizer | None) -> list[str]:
    """What is there of another model, and is not replaced by a file of the same name."""
    written = {weights, CONFIG, GENERATION} | ({TOKENIZER, TOKENIZER_CONFIG} if tokenizer is not None else set())
    return [name for name in _model_files(folder) if name not in written]


def _check_room(folder: Path, size: int, name: str) -> None:
    import shutil

    free = shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free
    if size > free:
        raise UserError(f"{name}: it needs {formatting.size(size)} on the disk and there are {formatting.size(free)}")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | None, config: GPTConfig) -> None:
    if tokenizer is None:
        return
    if tokenizer.kind == "bytes":
        content = bytes_file.text(end_of_text=tokenizer.end_of_text is not None)
        (folder / TOKENIZER).write_text(content, encoding="utf-8")
        end = bytes_file.END_OF_TEXT if tokenizer.end_of_text is not None else None
    else:
        tokenizer.save(folder)
        end = _end_token(folder / TOKENIZER, tokenizer.end_of_text)
    about: dict[str, Any] = {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer splits words of its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    if end is not None:
        about |= {"bos_token": end, "eos_token": end}
    _write_json(folder / TOKENIZER_CONFIG, about)


def _end_token(path: Path, end_of_text: int | None) -> str | None:
    from tokenizers import Tokenizer

    return None if end_of_text is None else Tokenizer.from_file(str(path)).id_to_token(end_of_text)


def _history(loaded: Loaded) -> dict[str, Any]:
    """What is kept for people."""
    return {"version": __version__} | {key: loaded.about[key] for key in ("step", "grown") if key in loaded.about}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
