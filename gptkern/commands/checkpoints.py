"""A checkpoint is a folder: `model.safetensors`, the parameters, and `config.json`, the sizes and how it was trained.

The keys are those of the stock model, swapped or not.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from gptkern.commands import UserError
from gptkern.models.gpt import GPT, GPTConfig

PARAMETERS = "model.safetensors"
CONFIG = "config.json"


def save(model: GPT, folder: Path, training: dict | None = None) -> None:
    """Write the checkpoint; `training` is kept beside the sizes, for people."""
    from safetensors.torch import save_model

    folder.mkdir(parents=True, exist_ok=True)
    # save_model, not save_file: the embedding is also the output weight, and is written once.
    save_model(model, str(folder / PARAMETERS))
    content = {"model": dataclasses.asdict(model.config), "training": training or {}}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


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
        model = GPT(GPTConfig(**json.loads((folder / CONFIG).read_text())["model"]))
        load_model(model, str(folder / PARAMETERS))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is no checkpoint of this GPT: {str(error).splitlines()[0]}") from error
    return model.to(device)
