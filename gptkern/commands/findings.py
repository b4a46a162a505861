"""What the demo found out, stage by stage, and the verdict on it. The report and the exit status are made from this."""

from __future__ import annotations

import dataclasses
import math

from gptkern.commands.kernel_check import KernelCheck
from gptkern.commands.observing import NOT_CALLED, SwappedModules

# The largest difference of a loss, stock against swapped, in nats per byte. Kernels round otherwise than PyTorch, and
# a training makes a rounding grow: layer_norm and attention written out in other float32 operations moved the nano
# model's training loss by up to 0.0064 in 475 steps on a CPU. What is small and wrong is found by the kernels' check.
LOSS_BOUNDS = {"float32": 0.05, "bfloat16": 0.1}

# int8 linears may change the validation loss by so much, in nats per byte.
INT8_BOUND = 0.02


@dataclasses.dataclass
class Curve:
    """One training: the loss of every step, (step, loss) on held-out text, and the speed."""

    losses: list[float]
    validations: list[tuple[int, float]]
    tokens_per_second: float

    @property
    def final(self) -> float | None:
        """The validation loss at the end, over all of the held-out text."""
        return self.validations[-1][1] if self.validations else None


@dataclasses.dataclass
class Int8:
    """The trained swapped model with int8 linear layers."""

    layers: int
    loss: float
    full_loss: float
    linear_bytes: int  # of the quantised layers, before and after
    linear_bytes_int8: int
    model_bytes: int  # of the whole model
    model_bytes_int8: int

    @property
    def change(self) -> float:
        return self.loss - self.full_loss


@dataclasses.dataclass
class Sample:
    prompt: str
    stock: str
    swapped: str
    int8: str


@dataclasses.dataclass
class Findings:
    """Empty at first; every stage fills in its part."""

    text: str = ""
    text_bytes: tuple[int, int] = (0, 0)  # to train on, held out
    model: str = ""
    parameters: int = 0
    dtype: str = "float32"
    device: str = ""
    steps: int = 0
    tokens_per_step: int = 0
    recipe: str = ""
    swapped_modules: list[SwappedModules] = dataclasses.field(default_factory=list)
    skipped_modules: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    stock: Curve | None = None
    swapped: Curve | None = None
    cut_short: str = ""
    training_report: str = ""  # the file beside the report
    int8: Int8 | None = None
    samples: list[Sample] = dataclasses.field(default_factory=list)
    kernel_check: KernelCheck | None = None
    environment: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    # What could not be brought to its end, a line each.
    failures: list[str] = dataclasses.field(default_factory=list)
    interrupted: str = ""  # the stage that Ctrl-C ended
    seconds: float = 0.0

    @property
    def steps_done(self) -> int:
        """Steps that both trainings have done."""
        return min(len(self.stock.losses), len(self.swapped.losses)) if self.stock and self.swapped else 0

    @property
    def differences(self) -> list[float]:
        """|stock - swapped| of the training loss, step by step."""
        return [abs(a - b) for a, b in zip(self.stock.losses, self.swapped.losses)] if self.steps_done else []

    @property
    def largest_difference(self) -> float | None:
        """Over the training losses and the validation losses; NaN where a loss is NaN."""
        if not self.steps_done:
            return None
        pairs = zip(self.stock.validations, self.swapped.validations)
        differences = [*self.differences, *(abs(a[1] - b[1]) for a, b in pairs)]
        # max() would pass over a NaN that is not in the first place.
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    @property
    def loss_bound(self) -> float:
        return LOSS_BOUNDS[self.dtype]

    @property
    def backends(self) -> list[str]:
        return sorted({row.backend for row in self.swapped_modules} - {NOT_CALLED})

    @property
    def speed_up(self) -> float | None:
        if not self.steps_done or not self.stock.tokens_per_second:
            return None
        return self.swapped.tokens_per_second / self.stock.tokens_per_second

    def problems(self) -> list[str]:
        """What is wrong, one line each; the exit status is 1 where there is anything."""
        found = [*self.failures]
        difference = self.largest_difference
        if difference is not None and not difference <= self.loss_bound:
            found.append(
                f"stock and swapped differ by {difference:.4g} nats per byte; the bound is {self.loss_bound:g}"
            )
        if self.int8 is not None and not abs(self.int8.change) <= INT8_BOUND:
            found.append(f"int8 changes the validation loss by {signed(self.int8.change)}; the bound is {INT8_BOUND:g}")
        if self.kernel_check is not None:
            found += self.kernel_check.failures
        return found

    def exit_status(self, interrupted_status: int) -> int:
        if self.problems():
            return 1
        return interrupted_status if self.interrupted else 0

    def verdict(self) -> str:
        """The whole of it in a paragraph."""
        sentences = []
        if not self.steps_done:
            sentences.append("Nothing was trained.")
        else:
            sentences.append(
                f"A GPT of {self.parameters:,} parameters was trained twice on {self.text}, {self.steps_done:,} steps "
                f"each, from the same first weights on the same batches: once on PyTorch's operators, and once after "
                f"gptkern.swap(model). The two loss curves differ by at most {self.largest_difference:.2g} nats a byte."
            )
            if self.swapped.final is not None:
                sentences.append(f"Validation loss: {nats(self.swapped.final)}.")
            if self.backends == ["torch"]:
                sentences.append("No kernels ran in the swapped model here (the table of modules says why).")
            elif self.speed_up:
                sentences.append(f"The swapped model trained at {self.speed_up:.2f} times the stock model's speed.")
        if self.int8:
            smaller = self.int8.model_bytes / self.int8.model_bytes_int8
            change = signed(self.int8.change)
            sentences.append(
                f"With int8 linear layers it is {smaller:.2f} times smaller, its loss changes by {change}."
            )
        check = self.kernel_check
        if check and (check.passed or check.failed):
            compared = check.passed + check.failed
            sentences.append(f"Kernels against float64, {check.note}: {check.passed} of {compared} comparisons passed.")
        if self.interrupted:
            sentences.append(f"The run was interrupted ({self.interrupted}); this is what was done until then.")
        return " ".join(sentences)


def signed(change: float) -> str:
    """A change of a loss, with its sign; what rounds to nothing is +0.0000."""
    return f"{round(change, 4) + 0.0:+.4f}"


def nats(loss: float) -> str:
    """A loss in both units."""
    return f"{loss:.4f} nats per byte ({loss / math.log(2):.3f} bits)"
