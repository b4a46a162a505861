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

from gptkern.commands import UserError, text
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.optimizers import optimizer_of

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


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one, else the CPU.

    Raises:
        UserError: PyTorch does not know the device or cannot reach it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def new_model(config: GPTConfig, recipe: Recipe) -> GPT:
    """A model whose first weights depend on the seed alone: drawn on the CPU, then moved."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return GPT(config).to(recipe.device)


class Trainer:
    """One model on its way through a recipe.

    `losses` holds the training loss of each step done, `validations` pairs (step, loss on held-out text), `speeds`
    the tokens per second of each call of `run`.
    """

    def __init__(self, model: GPT, data: text.Text, recipe: Recipe):
        self.model, self.recipe = model, recipe
        self.device = torch.device(recipe.device)
        self.batches = text.Batches(data.train, recipe.batch, recipe.length, recipe.seed, self.device)
        self.held_out = text.windows(data.validation, recipe.length).to(self.device)
        self.optimizer = optimizer_of(model, recipe.lr)
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []
        self.speeds: list[float] = []
        self.model.train()

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def tokens_per_second(self) -> float:
        """The median over the calls of `run`: what else the machine did at times is left out."""
        return statistics.median(self.speeds) if self.speeds else 0.0

    def run(self, steps: int) -> None:
        """The next `steps` updates. The device is waited for at the end alone."""
        losses = []
        synchronize(self.device)
        start = time.perf_counter()
        for step in range(self.step, self.step + steps):
            losses.append(self._update(step))
        values = torch.stack(losses).tolist()  # waits for the device
        self.speeds.append(steps * self.recipe.tokens_per_step / (time.perf_counter() - start))
        self.losses += values

    def _update(self, step: int) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(step)
        ids, targets = self.batches.next()
        with autocast(self.recipe):
            _, loss = self.model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def validate(self, windows: int | None = None) -> float:
        """Note the mean loss over the held-out text, or over about `windows` of its windows, evenly spread."""
        loss = validation_loss(self.model, self.held_out, self.recipe, windows)
        self.validations.append((self.step, loss))
        return loss


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
