"""How the commands train: AdamW, warm-up and cosine, clipped gradients, loss on held-out text.

learning rate(step) = peak * (step + 1) / warmup                                      while step < warmup
                    = floor + (peak - floor) * (1 + cos(pi * progress)) / 2           afterwards
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time

import torch

from gptkern.commands import text
from gptkern.commands.interrupts import postponed
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import memory
from gptkern.training.devices import resolve_device, synchronize
from gptkern.training.optimizers import optimizer_of

__all__ = [
    "DTYPES", "Diverged", "Recipe", "Trainer", "Worse", "autocast", "check_memory", "new_model", "optimizer_of",
    "parameter_bytes", "resolve_device", "synchronize", "text", "validation_loss",
]  # fmt: skip

GRADIENT_NORM = 1.0  # GPT-3, appendix B
FINAL_LR = 0.1  # of the peak; GPT-3, appendix B
WARMUP = 0.1  # of the steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Rows of the held-out text that are evaluated at once.
EVALUATION_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training does, apart from the model.

    Args:
        steps: number of updates. batch: rows of each. length: tokens of a row. lr: the peak learning rate.
        seed: of the model's first weights and of the batches.
        dtype: float32, or bfloat16 for the matrix products (autocast; parameters stay float32).
    """

    steps: int
    batch: int
    length: int
    lr: float
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.length

    def lr_at(self, step: int) -> float:
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        floor = FINAL_LR * self.lr
        return floor + (self.lr - floor) * (1 + math.cos(math.pi * progress)) / 2


class Diverged(Exception):
    """A loss that is no finite number: what the model holds is of no use any more."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss is {loss} at step {step}")


class Worse(Diverged):
    """A loss that is far above that of the untrained model."""

    def __init__(self, step: int, loss: float, untrained: float):
        Exception.__init__(
            self, f"the validation loss is {loss:.4f} at step {step}, and {untrained:.4f} before the first"
        )


def parameter_bytes(config: GPTConfig) -> int:
    return memory.FLOAT32 * memory.parameter_count(config)


def check_memory(config: GPTConfig, recipe: Recipe, preset: str, *, models: int = 1, copies: int = 0) -> None:
    """Before anything is allocated: whether the models can be trained here.

    Args:
        preset: the name of the sizes, for people.
        models: trained in turn. copies: of a model's parameters, held beside it in the CPU's memory.

    Raises:
        UserError: they need more memory than there is.
    """
    from gptkern.training.recipe import Recipe as FullRecipe

    full = recipe
    if not isinstance(recipe, FullRecipe):
        precision = {"float32": "fp32", "bfloat16": "bf16"}[recipe.dtype]
        full = FullRecipe(
            recipe.steps, recipe.batch, recipe.length, recipe.lr, precision=precision, device=recipe.device
        )
    memory.check(config, full, name=f"--preset {preset}", models=models, copies=copies, saves=False)


def new_model(config: GPTConfig, recipe: Recipe) -> GPT:
    """A model whose first weights depend on the seed alone: drawn on the CPU, then moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return GPT(config).to(recipe.device)


class Trainer:
    """One model on its way through a recipe.

    `losses` holds the training loss of each step done, `validations` pairs (step, loss on held-out text), `speeds`
    the tokens per second of each call of `run`. `run` and `validate` note a loss that is no finite number, and raise
    Diverged.
    """

    def __init__(self, model: GPT, data: text.Text, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.device = torch.device(recipe.device)
        self.batches = text.Batches(data.train, recipe.batch, recipe.length, recipe.seed, self.device)
        self.held_out = text.windows(data.validation, recipe.length).to(self.device)
        self.optimizer = optimizer_of(model, recipe.lr)
        self.losses: list[float] = []
        self._done: list[torch.Tensor] = []  # losses of updates, on the device, until `run` ends
        self.validations: list[tuple[int, float]] = []
        self.speeds: list[float] = []
        # The step of the lowest validation loss that was noted, the loss, and a copy of the parameters.
        self.best: tuple[int, float, list[torch.Tensor]] | None = None
        self.model.train()

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        """The median over the calls of `run`: what else the machine did at times is left out."""
        return statistics.median(self.speeds) if self.speeds else 0.0

    def run(self, steps: int) -> None:
        """The next `steps` updates. The device is waited for at the end alone; what ends them early leaves the done."""
        before = self.step
        synchronize(self.device)
        start = time.perf_counter()
        try:
            for step in range(before, before + steps):
                self._update(step)
        finally:
            if self._done:
                self.losses += torch.stack(self._done).tolist()  # waits for the device
                self._done.clear()
        self.speeds.append(steps * self.recipe.tokens_per_step / (time.perf_counter() - start))
        for step, value in enumerate(self.losses[before:], before + 1):
            if not math.isfinite(value):
                raise Diverged(step, value)

    def _update(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(step)
        ids, targets = self.batches.next()
        with autocast(self.recipe):
            _, loss = self.model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        # Half of the parameters from before and half from after would be no step's model.
        with postponed():
            self.optimizer.step()
            self._done.append(loss.detach())
        self.optimizer.zero_grad(set_to_none=True)

    def validate(self, windows: int | None = None) -> float:
        """Note the mean loss over the held-out text, or over about `windows` of its windows, evenly spread."""
        loss = validation_loss(self.model, self.held_out, self.recipe, windows)
        self.validations.append((self.step, loss))
        if not math.isfinite(loss):
            raise Diverged(self.step, loss)
        return loss

    def untrained(self, windows: int | None = None) -> float:
        """What `validate` would have returned before the first step; it is computed now, of a second model."""
        return validation_loss(new_model(self.model.config, self.recipe), self.held_out, self.recipe, windows)

    def finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def note_best(self) -> None:
        """Keep a copy of the parameters if the validation before was the best one."""
        step, loss = self.validations[-1]
        if self.best is None or loss < self.best[1]:
            copies = [parameter.detach().to("cpu", copy=True) for parameter in self.model.parameters()]
            self.best = step, loss, copies

    @torch.no_grad()
    def back_to_best(self) -> bool:
        """Put the noted parameters back, and forget what came after them; False where nothing was noted."""
        if self.best is None:
            return False
        step, _, copies = self.best
        for parameter, kept in zip(self.model.parameters(), copies):
            parameter.copy_(kept)
        del self.losses[step:]
        self.validations = [(at, loss) for at, loss in self.validations if at <= step]
        return True


@torch.no_grad()
def validation_loss(model: GPT, held_out: torch.Tensor, recipe: Recipe, windows: int | None = None) -> float:
    """Mean cross-entropy of `held_out`, (windows, length + 1), in eval mode; the mode is put back."""
    if windows is not None and windows < len(held_out):
        held_out = held_out[:: math.ceil(len(held_out) / windows)]
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros((), dtype=torch.float64)
        for rows in held_out.split(EVALUATION_BATCH):
            with autocast(recipe):
                _, loss = model(rows[:, :-1], rows[:, 1:])
            total += loss.cpu().double() * len(rows)
    finally:
        model.train(was_training)
    return (total / len(held_out)).item()


def autocast(recipe: Recipe):
    """What a forward runs under: autocast where the recipe's dtype is a 16-bit one."""
    if recipe.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(recipe.device).type, DTYPES[recipe.dtype])
