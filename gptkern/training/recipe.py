"""What a training does, in one record: the options of `gptkern train`, the keys of a recipe's file."""

from __future__ import annotations

import dataclasses

from gptkern.training.values import Choice, Kind, Real, Switch, Text, Whole, WordOrWhole

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("cosine", "linear", "wsd", "constant")

_at_least_0 = Real("of at least 0", lambda value: value >= 0)
_share = Real("from 0 to 1", lambda value: 0 <= value <= 1)
_below_1 = Real("of at least 0 and below 1", lambda value: 0 <= value < 1)
# What each field may be; these may be None too.
OPTIONAL = ("mup", "threads")
KINDS: dict[str, Kind] = {
    "steps": Whole(1), "batch": Whole(1), "length": Whole(1), "lr": Real("above 0", lambda value: value > 0),
    "accumulate": Whole(1), "schedule": Choice(SCHEDULES), "warmup": _share, "decay": _share, "final_lr": _share,
    "mup": Whole(1), "weight_decay": _at_least_0, "beta1": _below_1, "beta2": _below_1, "clip": _at_least_0,
    "label_smoothing": _below_1, "z_loss": _at_least_0, "precision": Choice(PRECISIONS),
    "recompute": WordOrWhole(("none", "full")), "compile": Switch(), "deterministic": Switch(),
    # What PyTorch's generators take.
    "seed": Whole(-(2**63), 2**64 - 1), "device": Text("a device's name"), "threads": Whole(1, 4096),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training does, apart from its text and its model's first weights.

    Args:
        steps: number of updates. batch: rows of an update, over all processes. length: tokens of a row.
        accumulate: pieces in which each process computes its share of an update, one after another.
        lr: the peak learning rate. schedule: how it goes on from there. warmup: the part of the steps in which it rises
            to the peak. decay: the part of the steps, at the end, in which "wsd" lets it fall. final_lr: what it ends
            at, as a part of the peak.
        mup: the width of the model for which lr was found, of which a wider one has µP's scales (mup.py); None for the
            standard parametrisation.
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
    mup: int | None = None
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
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            try:
                kind.checked(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
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
