"""Folders with a model that the tests of loading, exporting and generating share: runs, and GPT-2s of transformers."""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from pathlib import Path

import torch

from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.data.tokenizers import Tokenizer, bytes_tokenizer, train_bpe

BPE = 300
TEXTS = [f"der Löwe {n} und die Maus {n * n} … 😀 日本語" for n in range(60)]


@functools.cache
def bpe(size: int = BPE) -> Tokenizer:
    return train_bpe(TEXTS, size)


def model(**changes) -> GPT:
    torch.manual_seed(3)
    config = GPTConfig(**{"vocab_size": BPE, "context": 24, "layers": 2, "width": 48, "heads": 3} | changes)
    made = GPT(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            # No bias is 0 and no gain 1: each has its place.
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def save_run(folder: Path, of: GPT, tokenizer: Tokenizer | None = None, step: int = 7, about=None) -> Path:
    """A run's folder with a checkpoint of that step, as `gptkern train` leaves it. Returns the checkpoint's folder."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizer or bpe()
    entry = tokenizer.save(folder)
    tensors = {f"model.{name}": parameter for name, parameter in of.named_parameters()}
    tensors["optimizer.exp_avg"] = torch.zeros(3)
    said = {"step": step, "config": dataclasses.asdict(of.config), "tokenizer": entry} | (about or {})
    Checkpoints(folder / "checkpoints").save(step, tensors, said, wait=True)
    return folder / "checkpoints" / f"step-{step:08}"


def save_text_run(folder: Path, of: GPT, end_of_text: bool) -> Path:
    return save_run(folder, of, bytes_tokenizer(end_of_text))


def transformers_gpt2(seed: int = 0, **changes):
    """A GPT2LMHeadModel of random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": BPE, "n_positions": 24, "n_embd": 48, "n_layer": 2, "n_head": 3}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    made = GPT2LMHeadModel(GPT2Config(**sizes | ends | changes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def logits(of, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = of(ids)
    return out.logits if hasattr(out, "logits") else out[0]


def some_ids(vocab_size: int, length: int = 12) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(path: Path, header: dict) -> None:
    """Put another header before the same tensors."""
    data = path.read_bytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])


def edited(path: Path, **changes) -> None:
    """Change keys of a JSON file; what is ... goes."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
