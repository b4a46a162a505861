"""What a fine-tuning adds to a model: LoRA's adapters, which alone learn then, and a head over labels.

    score      class logits = features at the text's last token @ score.weight^T      (labels, width), no bias

as transformers' GPT2ForSequenceClassification has it. A run's checkpoints hold what learns: with LoRA adapters and head
alone, and about.json says of which model they are, by its folder and a digest of its weights; it has to be there, as it
was, for the run to go on or to be read, when the adapters are merged into it.

Sources: a linear layer on the last token: Radford et al., "Improving Language Understanding by Generative
Pre-Training", 2018, section 3.2; lora.py has LoRA's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.models.gpt import GPT, INIT_STD, GPTConfig
from gptkern.training import lora
from gptkern.training.errors import UserError

HEAD = "score"
HEAD_WEIGHT = f"{HEAD}.weight"
MOST_LABELS = 2**16  # as example_rows has it


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What a fine-tuning adds to a model.

    Args:
        rank: of LoRA's adapters beside every linear layer of the blocks; None for none: all of the model learns.
        alpha: of their factor alpha / rank. base: the folder of the model that they are for, as its run names it.
        labels: of the head; none of them for no head.
    """

    rank: int | None = None
    alpha: float = 1.0
    base: str = ""
    labels: tuple[str, ...] = ()

    def check(self, config: GPTConfig) -> None:
        """Raises UserError where a model of these sizes cannot have it."""
        if self.rank is not None and self.rank > config.width:
            raise UserError(f"lora is {self.rank}; it needs a rank of at most the model's width, {config.width}")

    def learns(self, config: GPTConfig, parameters: int) -> int:
        """Numbers that learn, of a model that has so many parameters."""
        head = len(self.labels) * config.width
        if self.rank is None:
            return parameters + head
        # qkv, project, expand, project: (in + out) · rank each
        sides = (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)
        return config.layers * sides * config.width * self.rank + head

    def add(self, model: GPT, seed: int) -> dict[str, Any]:
        """Put it into the model, in place; a head's first weights and the adapters' depend on the seed alone.

        Returns:
            What about.json says of it.
        """
        about: dict[str, Any] = {}
        generator = torch.Generator().manual_seed(seed % 2**63)
        if self.rank is not None:
            about["lora"] = {"rank": self.rank, "alpha": self.alpha, "base": self.base, "digest": digest(model)}
            lora.add(model, self.rank, alpha=self.alpha, generator=generator)
        if self.labels:
            about["head"] = {"labels": list(self.labels)}
            add_head(model, self.labels, generator)
        return about

    def described(self, learning: int) -> str:
        """For people; '' of a model of which all learns."""
        parts = [f"LoRA of rank {self.rank}: {learning:,} numbers learn"] if self.rank is not None else []
        parts += [f"a head of {formatting.count(len(self.labels), 'label')}"] if self.labels else []
        return "; ".join(parts)


def add_head(model: GPT, labels: tuple[str, ...], generator: torch.Generator | None = None) -> None:
    """Give a model a head over labels, which learns."""
    weight = torch.randn(len(labels), model.config.width, generator=generator) * INIT_STD
    with torch.device("meta"):
        head = nn.Linear(model.config.width, len(labels), bias=False)
    head.weight = nn.Parameter(weight.to(model.lm_head.weight.device))
    model.add_module(HEAD, head)


def strip_head(model: GPT) -> None:
    """Take a head away, where there is one."""
    if hasattr(model, HEAD):
        delattr(model, HEAD)


def output_weight(model: GPT) -> torch.Tensor:
    """(classes, width), that makes logits of the features: the head's where there is one, else the vocabulary's."""
    return getattr(model, HEAD, model.lm_head).weight


def is_partly_trained(model: nn.Module) -> bool:
    """Whether a checkpoint holds what learns alone."""
    return any(name.endswith(".lora_A") for name, _ in model.named_parameters())


def digest(model: GPT) -> str:
    """64 hexadecimal digits, other ones for other weights."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)}\n".encode())
        found.update(parameter.detach().cpu().contiguous().numpy())
    return found.hexdigest()


def check_base(model: GPT, about: dict[str, Any], name: str) -> None:
    """Raises UserError where a base model is not the one that a run's adapters are for."""
    if digest(model) != about.get("digest"):
        raise UserError(
            f"{name}: the model in {shown(str(about.get('base')))} is not the one that its adapters are for"
        )


def labels_of(about: dict[str, Any]) -> tuple[str, ...]:
    """Of the head that about.json tells of; none of them where there is none.

    Raises:
        ValueError: it is none.
    """
    head = about.get("head")
    if head is None:
        return ()
    labels = head.get("labels") if isinstance(head, dict) else None
    fits = isinstance(labels, list) and 1 <= len(labels) <= MOST_LABELS
    if not fits or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise ValueError("about.json: head is none; it needs labels, each of them once")
    return tuple(labels)
