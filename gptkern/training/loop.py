"""The training loop: one model on its way through a recipe.

    for each update:
        for each of `accumulate` pieces of the rows:
            gradients += d/dθ (scale · objective(piece) / targets of the whole update)
        gradients = gradients / scale                                            float16 alone has a scale
        gradients = gradients · min(1, clip / (‖gradients‖ + 1e-6))              where clip is above 0
        AdamW(gradients, lr_at(step)), left out where a gradient is not finite under a scale

The objective is the sum of losses.py; divided by the targets that count in the whole update, over all pieces and
processes, it is the mean, however these are spread.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any, NamedTuple

import torch

from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import losses, mup, optimizers, trainer_state
from gptkern.training.adapting import output_weight
from gptkern.training.data.loader import Batch, Batches
from gptkern.training.data.store import Source
from gptkern.training.errors import RunError, UserError
from gptkern.training.interrupting import postponed
from gptkern.training.precision import LEAST_SCALE, autocast, scaler_of
from gptkern.training.process_state import Generators, check_deterministic, computing
from gptkern.training.recipe import Recipe
from gptkern.training.schedule import lr_at
from gptkern.version import __version__

# Rows of the held-out text that are evaluated at once.
EVALUATION_BATCH = 16


class Diverged(RunError):
    """A loss, or a norm of the gradients, that is no finite number: what the model holds is of no use any more."""

    def __init__(self, step: int, value: float, what: str = "the loss"):
        super().__init__(f"{what} is {value} at step {step}")
        self.step = step


class Record(NamedTuple):
    """An update that was done.

    Args:
        step: updates done with it. loss: the objective's mean over the targets of the whole update.
        grad_norm: before it was clipped. lr: the learning rate. tokens: targets that counted.
        skipped: a gradient overflowed float16 under this scale: the parameters stayed as they were. Of such an update
            loss and grad_norm may be no finite numbers.
        scale: of the loss, None where there is none. read: ids that the model was given, padding left out.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: bool = False
    scale: float | None = None
    read: int = 0


class _Done(NamedTuple):
    """A record of which the numbers are still on the device."""

    lr: float
    tokens: int
    read: int
    loss: torch.Tensor
    grad_norm: torch.Tensor
    scale: torch.Tensor | None
    next_scale: torch.Tensor | None


def new_model(
    config: GPTConfig, seed: int, device: torch.device | str = "cpu", *, base_width: int | None = None
) -> GPT:
    """A model whose first weights depend on the seed alone: drawn on the CPU, then moved.

    Args:
        base_width: of µP, in which they are then; None for the standard parametrisation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config)
    if base_width is not None:
        mup.initialise(model, base_width)
    return model.to(device)


class Trainer:
    """One model on its way through a recipe.

    `step` is the number of updates done, `losses` the loss of each that this trainer did, `validations` pairs (step,
    loss on held-out text), `speeds` the tokens per second of each call of `run`.

    Its random numbers (dropout) are its own, seeded by the recipe: what the process draws elsewhere changes nothing
    here, and the other way round. So are the number of threads and the deterministic algorithms, where the recipe says
    them.

    Args:
        model: on the recipe's device; it is put in training mode. store: a text or examples, as tokens.
        rank, world: which of how many processes this is; they sum their gradients through torch.distributed.

    Raises:
        UserError: model, text and recipe do not fit together.
    """

    def __init__(self, model: GPT, store: Source, recipe: Recipe, *, rank: int = 0, world: int = 1):
        self.model, self.store, self.recipe = model, store, recipe
        self.rank, self.world = rank, world
        self.device = torch.device(recipe.device)
        _check(model, store, recipe, world)
        rows = store.rows(recipe.length, recipe.seed, full=recipe.compile)
        self.batches = Batches(rows, recipe.batch, rank=rank, world=world, device=self.device)
        self.optimizer = optimizers.optimizer_of(
            model, recipe.lr, betas=(recipe.beta1, recipe.beta2), weight_decay=recipe.weight_decay,
            scales=None if recipe.mup is None else mup.scales(model, recipe.mup),
        )  # fmt: skip
        optimizers.begin(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.scaler = scaler_of(self.device, recipe.precision)
        self._one = torch.ones((), device=self.device)
        self.generators = Generators(self.device, recipe.seed, rank)
        model.recompute(recipe.recompute_every)
        self._objective = _objective_of(model, recipe)
        self.step = 0
        self.validations: list[tuple[int, float]] = []
        self.speeds: list[float] = []
        self._losses: list[float] = []
        self._records: list[Record] = []
        self._done: list[_Done] = []
        model.train()

    @property
    def losses(self) -> list[float]:
        self._fetch()
        return self._losses

    @property
    def tokens_per_second(self) -> float:
        """The median over the calls of `run`: what else the machine did at times is left out."""
        return statistics.median(self.speeds) if self.speeds else 0.0

    # --- Updates ------------------------------------------------------------------------------------------------------

    def run(self, steps: int) -> None:
        """The next `steps` updates. The device is waited for at the end alone; what ends them early leaves the done.

        Raises:
            Diverged: a loss or a norm of the gradients was no finite number; with float16, overflows went on when the
                scale was down to 1.
        """
        self._fetch()
        before = len(self._records)
        start = time.perf_counter()
        for _ in range(steps):
            self.update()
        self._fetch()  # waits for the device
        done = self._records[before:]
        self.speeds.append(sum(record.read for record in done) / (time.perf_counter() - start))
        for record in done:
            check_finite(record)

    def update(self) -> None:
        """One update. What ends it early, an error or a signal, leaves model, optimizer and generators as they were."""
        lr = lr_at(self.recipe, self.step)
        optimizers.set_lr(self.optimizer, lr)
        # An update that was ended early, or a state that was loaded, left them at another place.
        self.batches.update = self.step
        batch = self.batches.next()
        step, generators, scale = self.step, self.generators.states, self._scale()
        # Of what others computed with the model meanwhile.
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with computing(self.recipe.threads, self.recipe.deterministic):
                with self.generators.drawing():
                    loss = self._backward(batch)
                # Half of the parameters from before and half from after would be no step's model.
                with postponed():
                    grad_norm = self._clip()
                    if self.scaler is None:
                        self.optimizer.step()
                    else:
                        self.scaler.step(self.optimizer)
                        self.scaler.update()
                    self._done.append(_Done(lr, batch.tokens, batch.read, loss, grad_norm, scale, self._scale()))
                    self.step += 1
        finally:
            if self.step == step:
                self.generators.states = generators
                self._renew_scaler()
            self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Leaves the gradients of the whole update; the loss, a float32 scalar."""
        tokens = max(1, batch.tokens)
        losses_of_pieces = []
        for ids, targets in zip(batch.ids.chunk(self.recipe.accumulate), batch.targets.chunk(self.recipe.accumulate)):
            with autocast(self.device, self.recipe.precision):
                loss = self._objective(ids, targets) / tokens
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            losses_of_pieces.append(loss.detach())
        loss = losses_of_pieces[0] if len(losses_of_pieces) == 1 else torch.stack(losses_of_pieces).sum()
        if self.world > 1:
            for tensor in (*self._gradients(), loss):
                torch.distributed.all_reduce(tensor)
        return loss

    def _clip(self) -> torch.Tensor:
        """The norm of the gradients, unscaled, before they are clipped."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(self._gradients())
        if self.recipe.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.recipe.clip, norm)
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _scale(self) -> torch.Tensor | None:
        """On the device: nothing waits for it."""
        return None if self.scaler is None else self.scaler.scale(self._one)

    def _renew_scaler(self) -> None:
        """The same scale without the notes of an update that was begun: a second one would be refused."""
        if self.scaler is not None:
            state, self.scaler = self.scaler.state_dict(), scaler_of(self.device, self.recipe.precision)
            self.scaler.load_state_dict(state)

    def _fetch(self) -> None:
        """The numbers of the updates done, from the device, in one go."""
        if not self._done:
            return
        done, self._done = self._done, []
        first = self.step - len(done)
        numbers = [tensor for one in done for tensor in one[3:] if tensor is not None]
        values = iter(torch.stack([number.float() for number in numbers]).tolist())
        for step, one in enumerate(done, first + 1):
            loss, norm = next(values), next(values)
            scale, next_scale = (None, None) if one.scale is None else (next(values), next(values))
            skipped = scale is not None and next_scale < scale
            self._losses.append(loss)
            self._records.append(Record(step, loss, norm, one.lr, one.tokens, skipped, scale, one.read))

    def records(self) -> list[Record]:
        """Of the updates done since this was asked last."""
        self._fetch()
        records, self._records = self._records, []
        return records

    def close(self) -> None:
        """End the thread that reads batches ahead: no update can follow."""
        self.batches.close()

    # --- Held-out text ------------------------------------------------------------------------------------------------

    def validate(self, windows: int | None = None) -> float:
        """Note the mean loss over the held-out text, or over `windows` of its windows, evenly spread.

        Raises:
            Diverged: it is no finite number.
        """
        loss = validation_loss(self.model, self.store, self.recipe, windows)
        self.validations.append((self.step, loss))
        if not math.isfinite(loss):
            raise Diverged(self.step, loss)
        return loss

    def finite(self) -> bool:
        """Whether every parameter is a finite number."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        # A sum that is finite has no term that is none, and takes a tenth of the time; large terms may overflow it.
        if bool(torch.stack([parameter.sum() for parameter in parameters]).isfinite().all()):
            return True
        return all(bool(parameter.isfinite().all()) for parameter in parameters)

    # --- State --------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, about): all that the training is between two updates; `load_state` goes on from it bit for bit.

        The tensors are named as in trainer_state.py and are the training's own. Those of model and optimizer are the
        same ones from before the first update on, and the next update writes into them; the generators' stay as they
        are now, and are others after it. `about` is JSON: step, scaler, config, recipe, world, threads, versions.
        """
        tensors = trainer_state.tensors_of(self.model, self.optimizer, self.generators)
        return tensors, {
            "step": self.step,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "config": dataclasses.asdict(self.model.config),
            "recipe": dataclasses.asdict(self.recipe),
            "world": self.world,
            "threads": torch.get_num_threads(),
            "versions": {"gptkern": __version__, "torch": str(torch.__version__)},
        }

    def load_state(self, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        """Go on where `state` was asked for. All of it is checked first. The recipes are not compared: this one counts.

        The tensors may be those that `state` returns here, read into in place.

        Raises:
            UserError: names what does not fit.
        """
        step, scaler = about.get("step"), about.get("scaler")
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= self.recipe.steps:
            raise UserError(f"the state's step is {step!r}; it needs a whole number from 0 to {self.recipe.steps}")
        if (scaler is None) != (self.scaler is None):
            of = "fp16" if self.scaler is None else "no fp16"
            raise UserError(f"the state is of a training in {of}; precision is {self.recipe.precision}")
        mine = trainer_state.tensors_of(self.model, self.optimizer, self.generators)
        trainer_state.check(mine, tensors)
        if self.scaler is not None:
            trainer_state.check_scaler(self.scaler.state_dict(), scaler)
            self.scaler.load_state_dict(scaler)
        trainer_state.load(mine, tensors, self.generators)
        self.step = step
        self._done, self._records, self._losses, self.validations = [], [], [], []
        self.optimizer.zero_grad(set_to_none=True)


def _check(model: GPT, store: Source, recipe: Recipe, world: int) -> None:
    config, pieces = model.config, recipe.accumulate * world
    if recipe.length > config.context:
        raise UserError(f"length is {recipe.length}; the model's context is {config.context}")
    if store.tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the text has {store.tokenizer.vocab_size} tokens; the model's vocabulary has {config.vocab_size}"
        )
    if recipe.batch % pieces:
        raise UserError(
            f"batch is {recipe.batch}; it needs to be a multiple of {pieces}, {recipe.accumulate} pieces in each of "
            f"{world} process{'es' if world > 1 else ''}"
        )
    if recipe.mup is not None:
        mup.check(config, recipe.mup)
    if recipe.deterministic:
        check_deterministic(torch.device(recipe.device))
    places = {parameter.device for parameter in model.parameters()}
    device = torch.device(recipe.device)
    if any(place.type != device.type or device.index not in (None, place.index) for place in places):
        raise UserError(f"device is {device}; the model's parameters are on {', '.join(sorted(map(str, places)))}")


def _objective_of(model: GPT, recipe: Recipe):
    """(ids, targets) -> the objective's sum, compiled as one where the recipe says so."""

    def objective(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        features, _ = model(ids, head=False)
        return losses.objective(features, output_weight(model), targets, recipe.label_smoothing, recipe.z_loss)

    return torch.compile(objective, dynamic=False) if recipe.compile else objective


def check_finite(record: Record) -> None:
    """Raises Diverged where an update has no finite loss or norm, and was not skipped for the sake of its scale."""
    if record.skipped:
        if record.scale <= LEAST_SCALE:
            raise Diverged(record.step, record.grad_norm, f"at a scale of {record.scale:g} the gradients' norm")
        return
    if not math.isfinite(record.loss):
        raise Diverged(record.step, record.loss)
    if not math.isfinite(record.grad_norm):
        raise Diverged(record.step, record.grad_norm, "the norm of the gradients")


@torch.no_grad()
def validation_loss(model: GPT, store: Source, recipe: Recipe, most: int | None = None) -> float:
    """Mean cross-entropy of what is held out, in eval mode, row by row in order; the mode is put back.

    Args:
        most: rows, evenly spread over the held-out part; None for all of them.
    """
    device = torch.device(recipe.device)
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64), 0
    try:
        with computing(recipe.threads, recipe.deterministic):
            # No more of them than a piece of an update has: what can be trained can be evaluated.
            rows = min(EVALUATION_BATCH, recipe.batch // recipe.accumulate)
            for batch in store.held_out(recipe.length, most).batches(rows, device):
                with autocast(device, recipe.precision):
                    features, _ = model(batch.ids, head=False)
                    total += losses.objective(features, output_weight(model), batch.targets).cpu().double()
                count += batch.tokens
    finally:
        model.train(was_training)
    return (total / count).item()
