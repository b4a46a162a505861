"""What a training does, in one record: the options of `gptkern train`, the keys of a recipe's file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training does, apart from its text and its model's first weights.

    Args:
        steps: number of updates. batch: rows of an update, over all processes. length: tokens of a row.
        accumulate: pieces in which each process computes its share of an update, one after another.
        lr: the peak learning rate. schedule: how it goes on from there. warmup: the part of the steps in which it rises
            to the peak. decay: the part of the steps, at the end, in which "wsd" lets it fall. final_lr: what it ends
            at, as a part of the peak.
        weight_decay: of matrices; biases and norms have none. beta1, beta2: AdamW's averages.
        clip: the most that the gradients' norm may be; 0 for no limit.
        label_smoothing: the part of a target's probability that is spread evenly over the vocabulary.
        z_loss: the weight of the mean of lse² beside the cross-entropy.
        precision: of matrix products; parameters and sums stay float32.
        recompute: blocks whose activations the backward computes again: "none", "full" for every block, or a whole
            number N as text, for every Nth.
        compile: torch.compile the model. deterministic: PyTorch's deterministic algorithms alone.
        seed: of the model's first weights, the order of the rows and the dropout.
        threads: of the CPU, on which sums depend; None for PyTorch's number.

    Raises:
        ValueError: names the argument, what it got and what it needs.
    """

    steps: int
    batch: int
    length: int
    lr: float
    accumulate: int = 1
    schedule: str = "cosine"
    warmup: float = 0.1
    decay: float = 0.2
    final_lr: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    precision: str = "fp32"
    recompute: str = "none"
    compile: bool = False
    deterministic: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self):
        for name, (needs, holds) in _NEEDS.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} is {value!r}; it needs {needs}")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}; it needs to divide batch, {self.batch}")
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup is {self.warmup!r} and decay {self.decay!r}; they need to be at most 1 together under wsd"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    @property
    def recompute_every(self) -> int | None:
        """As GPT.recompute takes it."""
        return {"none": None, "full": 1}[self.recompute] if self.recompute in ("none", "full") else int(self.recompute)


def _whole(least: int, most: int = 2**63 - 1) -> tuple[str, Callable[[object], bool]]:
    limits = f"of at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
    return f"a whole number {limits}", lambda value: _is_whole(value) and least <= value <= most


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(needs: str, holds: Callable[[float], bool]) -> tuple[str, Callable[[object], bool]]:
    return (
        f"a finite number {needs}",
        lambda value: (_is_whole(value) or isinstance(value, float)) and abs(value) < math.inf and holds(value),
    )


def _one_of(names: tuple[str, ...]) -> tuple[str, Callable[[object], bool]]:
    return f"one of {', '.join(names)}", lambda value: value in names


def _is_recompute(value: object) -> bool:
    if not isinstance(value, str):
        return False
    return value in ("none", "full") or (value.isascii() and value.isdecimal() and 1 <= int(value[:18]) == int(value))


_AT_LEAST_0 = _real("of at least 0", lambda value: value >= 0)
_SHARE = _real("from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_1 = _real("of at least 0 and below 1", lambda value: 0 <= value < 1)
_TRUTH = "true or false", lambda value: isinstance(value, bool)
_NEEDS = {
    "steps": _whole(1), "batch": _whole(1), "length": _whole(1), "lr": _real("above 0", lambda value: value > 0),
    "accumulate": _whole(1), "schedule": _one_of(SCHEDULES), "warmup": _SHARE, "decay": _SHARE, "final_lr": _SHARE,
    "weight_decay": _AT_LEAST_0, "beta1": _BELOW_1, "beta2": _BELOW_1, "clip": _AT_LEAST_0,
    "label_smoothing": _BELOW_1, "z_loss": _AT_LEAST_0, "precision": _one_of(PRECISIONS),
    "recompute": ("none, full, or a whole number of at least 1 as text", _is_recompute),
    "compile": _TRUTH, "deterministic": _TRUTH, "seed": _whole(-(2**63), 2**64 - 1),
    "device": ("a device's name", lambda value: isinstance(value, str) and bool(value)),
    "threads": ("a whole number of at least 1, or none", lambda value: value is None or _whole(1)[1](value)),
}  # fmt: skip
