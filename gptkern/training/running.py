"""A run from its first update, or from a checkpoint, to its end; run.py says what a run is.

begin      what a folder needs; the untrained model's held-out loss, or what lies in a checkpoint
advance    updates, their lines, an evaluation where one is due
save       the lines first, then the checkpoint
end        the last evaluation, the last checkpoint, the report; or why it ended before
"""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gptkern import formatting
from gptkern.models.gpt import GPTConfig
from gptkern.training import memory, metrics, recipe_files, reporting, speed
from gptkern.training.board import Board
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.data.store import Source
from gptkern.training.devices import synchronize
from gptkern.training.errors import RunError, UserError, kept
from gptkern.training.interrupting import postponed
from gptkern.training.loop import Diverged, Record, Trainer, check_finite
from gptkern.training.run_folder import RunFolder
from gptkern.training.run_records import Keeping, Outcome, Progress
from gptkern.training.stopping import Best, Waiting
from gptkern.version import __version__

# Updates between two looks at a GPU's numbers, for which it is waited; on a CPU each is there at once.
UPDATES_ON_GPU = 10
# Rows of the held-out part that are evaluated at the end.
FINAL_ROWS = 4096
# Nats. A few updates of a warm-up may end a little above the untrained model; what diverged is far above.
WORSE_THAN_UNTRAINED = 0.5
# Updates of whose losses the median is what a spike rises above, and those that it lasts before it ends a run: what a
# large step did to a small model may be over in less.
SPIKE_UPDATES, SPIKE_LASTS = 100, 10
# The shown training loss is the mean over this many last updates.
SHOWN_UPDATES = 20
# Between two reports on the way, and how many times as long as the last one took: the training waits for it.
SECONDS_BETWEEN_REPORTS, REPORTS_APART = 60.0, 100


class Run:
    """A run from its first update, or from a checkpoint, to its end."""

    def __init__(
        self,
        folder: RunFolder,
        trainer: Trainer,
        checkpoints: Checkpoints,
        keeping: Keeping,
        stored: dict[str, Any],
        board: bool,
        talk: tuple[Callable[[], bool], Callable[[Progress], None], Callable[[str], None]],
        about: Mapping[str, Any],
    ):
        self.folder, self.trainer, self.checkpoints, self.keeping = folder, trainer, checkpoints, keeping
        self.recipe, self.stored, self.has_board = trainer.recipe, stored, board
        self.about = about  # more of what about.json of each checkpoint says
        self.stop, self.watch, self.say = talk
        self.save_every, self.evaluate_every = stored["save_every"], stored["evaluate_every"]
        self.losses: collections.deque[float] = collections.deque(maxlen=SPIKE_UPDATES)
        self.speeds: collections.deque[float] = collections.deque(maxlen=SPIKE_UPDATES)
        self.paces: collections.deque[float] = collections.deque(maxlen=SPIKE_UPDATES)  # updates a second
        self.validation: float | None = None
        self.untrained: float | None = None
        self.lowest = math.inf  # of the evaluations
        self.spiking = 0  # updates in a row
        self.doubtful = False  # the evaluation of this update is far above
        self.before_doubt = math.inf  # the lowest evaluation before this one
        self.due = False  # a checkpoint that waits for better losses
        self.waiting_for = Waiting(keeping.patience)  # a better evaluation
        self.saved: int | None = None
        # Of this run, a damaged one that it passed over not among them: what is whole, and what is on its way.
        self.newest: Path | None = None
        self.begun: Path | None = None
        self.last: dict[str, Any] = {}  # the last line
        self.waiting: list[dict[str, Any]] = []  # lines of updates that are done, not written yet
        self.replacing = False  # a run that was there is put back if this one gets no checkpoint
        self.fresh = False  # the folder held no run
        self.noted = trainer.step  # updates that have their lines
        device = trainer.device
        peak = speed.peak(device, self.recipe.precision)
        self.share = None if peak is None else speed.operations(trainer.model.config, self.recipe.length) / peak
        self.at_once = 1 if device.type == "cpu" else UPDATES_ON_GPU
        self.entry: dict[str, Any] = {}
        self.metrics: metrics.Metrics | None = None
        self.board: Board | None = None
        self.report_took = 0.0
        self.before, self.began, self.reported = 0.0, time.perf_counter(), time.perf_counter()

    def go(self, start: Checkpoint | None, resume: bool) -> Outcome:
        if resume:
            # Before anything is written.
            metrics.check(self.folder.metrics, self.trainer.step if start is None else start.step)
        try:
            self._begin(start, resume)
            return self._loop()
        except Diverged as error:
            error.args = (self._failed(f"{error}: a lower learning rate may help"),)
            raise
        except (UserError, RunError) as error:
            if start is None and self.metrics is None:
                self._give_up()
                raise
            self._rescue()
            raise RunError(self._failed(str(error))) from error
        except BaseException as error:
            # A terminal that went away, a memory that is full, Ctrl-C: what was learnt is kept all the same.
            if not (isinstance(error, KeyboardInterrupt) and self.stop()):
                self._rescue()
            with contextlib.suppress(Exception):
                self._failed(f"{type(error).__name__}: {error}")
            raise
        finally:
            with contextlib.suppress(Exception):
                self.checkpoints.wait()
            if self.metrics is not None:
                self.metrics.close()
            if self.board is not None:
                self.board.close()

    def _begin(self, start: Checkpoint | None, resume: bool) -> None:
        folder, trainer = self.folder, self.trainer
        if start is not None:
            tensors, _ = trainer.state()
            # What draws on another kind of device begins anew there.
            there = start.names()
            start.read({name: each for name, each in tensors.items() if name in there or "generators" not in name})
            trainer.load_state(tensors, start.about)
            self.saved = self.noted = start.step
            self.newest = start.folder
        elif not resume:
            self.fresh = folder.held() is None
            if not self.fresh:
                folder.set_aside()
                self.replacing = True
        with kept(folder.path):
            recipe_files.write(folder.recipe, self.stored)
            self.entry = trainer.store.tokenizer.save(folder.path)
        found = metrics.cut(folder.metrics, trainer.step)
        self._take_up(found)
        if start is not None:
            self.waiting_for.take_up(start, found)
        late = {}
        told = bool(found) and found[-1]["step"] == trainer.step
        if told and self._is_evaluated(trainer.step) and "validation_loss" not in found[-1]:
            # It was ended between the update and its evaluation, of which this one may be ended too.
            late = self._evaluated()
            metrics.replace_last(folder.metrics, found[-1] | late)
            self._know(found[-1] | late)
            self.due = False  # of this step there is a checkpoint
        if self.has_board:
            self.board = Board(folder.tensorboard, trainer.step, self.say)
            if late:
                self.board.add({"step": trainer.step} | late)
        self.metrics = metrics.Metrics(folder.metrics)
        self.began = time.perf_counter()
        if trainer.step == 0:
            self.untrained = self.validation = trainer.validate(self.keeping.evaluate_rows)
        self._watch()

    def _take_up(self, lines: list[dict[str, Any]]) -> None:
        """What the run did until its checkpoint."""
        step = self.trainer.step
        if step > 0 and (not lines or lines[-1]["step"] != step):
            self.say(f"{self.folder.metrics} does not reach the checkpoint's step, {step}: what it lacks stays away")
        for line in lines:
            if line.get("loss") is not None and not line.get("skipped"):
                self._compare(line["loss"])
            self._know(line)
        self.before = self.last.get("seconds") or 0.0

    def _know(self, line: Mapping[str, Any]) -> None:
        self.last = dict(line)
        for name in ("untrained_validation_loss", "validation_loss"):
            if line.get(name) is not None:
                self.validation = line[name]
                self.lowest = min(self.lowest, line[name])
        self.untrained = line.get("untrained_validation_loss", self.untrained)

    # --- Updates ------------------------------------------------------------------------------------------------------

    def _loop(self) -> Outcome:
        trainer, steps = self.trainer, self.recipe.steps
        while trainer.step < steps and not self.waiting_for.is_over and not self.stop():
            self._advance()
            if trainer.step == steps:
                self._check_end()
            self.due |= trainer.step % self.save_every == 0 or self.waiting_for.is_over
            if trainer.step == steps or (self.due and not self._is_far_above()):
                self._save(wait=trainer.step == steps)
            self._watch()
        if trainer.step < steps and not self.waiting_for.is_over:
            return self._interrupted()
        if trainer.step == steps:
            self._check_end()
        if self.saved != trainer.step and not (self.waiting_for.is_over and self._is_far_above()):
            self._save(wait=True)
        self._settle()
        self._report(finished(steps, trainer.step, self.waiting_for.best), "good")
        return self._outcome()

    def _outcome(self) -> Outcome:
        best = self.waiting_for.best
        if best is None:
            return Outcome(self.trainer.step, True, self.validation, self.newest)
        return Outcome(self.trainer.step, True, best.loss, self.checkpoints.folder / f"step-{best.step:08}")

    def _advance(self) -> None:
        """Updates up to the next look, and their lines."""
        self.doubtful = False
        trainer, step = self.trainer, self.trainer.step
        ends = [step + self.at_once, self.recipe.steps]
        ends += [step - step % every + every for every in (self.save_every, self.evaluate_every)]
        started = time.perf_counter()
        while trainer.step < min(ends):
            trainer.update()
            if self.stop():
                break
        synchronize(trainer.device)
        self._look(time.perf_counter() - started)
        if self._is_evaluated(trainer.step):
            self._write_lines(self._evaluated())
        else:
            self._write_lines()

    def _look(self, seconds: float | None) -> None:
        """The lines of the updates since the last look, which took so long, None where that is not known.

        Raises Diverged where one is the last of this run.
        """
        records = self.trainer.records()
        each = sum(record.read for record in records) / seconds if seconds else None
        if each is not None:
            self.speeds.append(each)
            self.paces.append(len(records) / seconds)
        for record in records:
            line = _line(record) | {"seconds": round(self.before + time.perf_counter() - self.began, 3)}
            if each is not None:
                line["tokens_per_second"] = round(each, 1)
            if each is not None and self.share is not None:
                line["share_of_peak"] = round(each * self.share, 4)
            if record.step == 1 and self.untrained is not None:
                line["untrained_validation_loss"] = self.untrained
            self.waiting.append(line)
            try:
                check_finite(record)
                median = None if record.skipped else self._compare(record.loss)
                if self.spiking >= SPIKE_LASTS and median is not None:
                    before = f"after {self.spiking} updates far above the median before them,"
                    raise _above(record.step, "loss", record.loss, before, median)
            except Diverged:
                self._write_lines()
                raise
        self.noted = self.trainer.step

    def _compare(self, loss: float) -> float | None:
        """Count what is far above the losses before it, which are none of its kind; their median where it is."""
        median = statistics.median(self.losses) if self.losses and self.keeping.spike else math.inf
        if loss <= median + self.keeping.spike:
            self.losses.append(loss)
            self.spiking = 0
            return None
        self.spiking += 1
        return median

    def _is_evaluated(self, step: int) -> bool:
        return step % self.evaluate_every == 0 or step == self.recipe.steps

    def _evaluated(self) -> dict[str, float]:
        """What the line of this update says of the held-out part."""
        # With a patience they are compared, and so have to be of the same rows.
        final = self.trainer.step == self.recipe.steps and self.keeping.patience is None
        try:
            loss = self.trainer.validate(FINAL_ROWS if final else self.keeping.evaluate_rows)
        except Diverged:
            self._write_lines()
            raise
        lowest = self.lowest if self.untrained is None else min(self.lowest, self.untrained)
        self.doubtful, self.before_doubt = 0 < self.keeping.spike < loss - lowest, lowest
        self.due |= self.waiting_for.note(self.trainer.step, loss, not self._is_far_above())
        return {"validation_loss": loss}

    def _is_far_above(self) -> bool:
        """Whether the last losses, or the evaluation of this update, say that the model is not to be kept."""
        return self.spiking > 0 or self.doubtful

    def _check_end(self) -> None:
        """Whether the end is of use: no far worse than the beginning, or better than guessing among all tokens; and
        not far above what was learnt before."""
        step = self.recipe.steps
        if self.validation is not None and self.validation > math.log(self.trainer.model.config.vocab_size):
            before = "that before the first"
            if self.untrained is not None and self.validation > self.untrained + WORSE_THAN_UNTRAINED:
                raise _above(step, "validation loss", self.validation, before, self.untrained)
        # The loss of one update is of the weights before it; of those that are kept the evaluation speaks.
        if self.spiking > 1:
            before = f"that is far above the median before the last {formatting.count(self.spiking, 'update')},"
            raise _above(step, "loss", self.last["loss"], before, statistics.median(self.losses))
        if self.doubtful:
            raise _above(step, "validation loss", self.validation, "the lowest before it is", self.before_doubt)

    def _write_lines(self, last: Mapping[str, float] | None = None) -> None:
        """Append what waits; `last` goes into the last line."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        waiting[-1] |= last or {}
        self.metrics.append(waiting)
        for line in waiting:
            self._know(line)
            if self.board is not None:
                self.board.add(line)

    def _watch(self) -> None:
        done, steps = self.trainer.step, self.recipe.steps
        recent = [loss for loss in list(self.losses)[-SHOWN_UPDATES:] if math.isfinite(loss)]
        rate, pace = (statistics.median(each) if each else 0.0 for each in (self.speeds, self.paces))
        self.watch(
            Progress(
                done, steps, math.fsum(recent) / len(recent) if recent else None, self.last.get("grad_norm"),
                self.last.get("lr"), self.validation, rate, None if self.share is None else rate * self.share,
                (steps - done) / pace if pace else None, self.saved,
            )
        )  # fmt: skip

    # --- Checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, wait: bool = False) -> None:
        trainer = self.trainer
        if not trainer.finite():
            raise Diverged(trainer.step, math.nan, "a parameter")
        # The lines first: a checkpoint has all of its own beside it.
        self.metrics.sync()
        tensors, about = trainer.state()
        about |= {
            "tokenizer": self.entry,
            "data": {"fingerprint": trainer.store.fingerprint, "name": trainer.store.name},
            "validation_loss": self.validation,
        }
        about |= self.waiting_for.about() | self.about | trainer.store.about
        best = self.waiting_for.best
        self._settle()
        self.checkpoints.save(trainer.step, tensors, about, best=best and best.step)
        self.begun = self.checkpoints.folder / f"step-{trainer.step:08}"
        if wait or self.replacing:
            self._settle()
        self.saved, self.due = trainer.step, False
        if self.replacing:
            self.replacing = False
            self.folder.forget()
        between = max(SECONDS_BETWEEN_REPORTS, REPORTS_APART * self.report_took)
        if trainer.step < self.recipe.steps and time.perf_counter() - self.reported > between:
            self._report(f"Under way: {trainer.step:,} of {self.recipe.steps:,} updates.", "wait")

    def _settle(self) -> None:
        """Wait for the save under way, which is the newest from then on."""
        try:
            self.checkpoints.wait()
        except RunError:
            # What failed may be the removal of the older ones.
            with contextlib.suppress(UserError):
                if self.begun is not None:
                    Checkpoint(self.begun).verify()
                    self.newest = self.begun
            self.begun = None
            raise
        if self.begun is not None:
            self.newest, self.begun = self.begun, None

    def _interrupted(self) -> Outcome:
        step = self.trainer.step
        if step == 0 or self.replacing:
            self._give_up()
            return Outcome(step, False, self.validation, None)
        if self.saved != step and self._is_far_above():
            self.say(f"the losses at step {step} are far above those before them: its model was not saved")
        elif self.saved != step:
            self._save(wait=True)
        self._settle()
        self._report(f"Interrupted after {step:,} of {self.recipe.steps:,} updates.", "wait")
        return Outcome(step, False, self.validation, self.newest)

    def _rescue(self) -> None:
        """A checkpoint of what was done until something else than the training failed, where that is possible."""
        with contextlib.suppress(Exception), postponed():
            self._look(None)
            self._write_lines()
            if self.trainer.step > (self.saved or 0) and not self.replacing and not self._is_far_above():
                self._save(wait=True)

    def _failed(self, message: str) -> str:
        """The message, and where the newest checkpoint is; the report says it too."""
        with contextlib.suppress(RunError):
            self._settle()
        if self.replacing:
            self._give_up()
            return f"{message}; the run in {self.folder} is as it was"
        newest = self.newest
        if message.endswith(("there is no older checkpoint", "is whole")):
            pass  # a save that failed has said so
        elif newest is None:
            message += "; there is no checkpoint yet"
        else:
            message += f"; the checkpoint of step {Checkpoint(newest).step} is {newest}"
        with contextlib.suppress(Exception):
            self._report(f"Ended: {message}.", "bad")
        return message

    def _give_up(self) -> None:
        """Leave the folder as it was found."""
        if self.metrics is not None:
            self.metrics.close()
        if self.board is not None:
            self.board.close()
            self.board = None
        if self.replacing:
            self.replacing = False
            self.folder.put_back()
        elif self.fresh and self.saved is None:
            self.folder.clear()

    def _report(self, status: str, kind: str) -> None:
        """What is learnt does not hang on a page: one that cannot be drawn is a line."""
        if not self.keeping.report:
            return
        started = time.perf_counter()
        try:
            report(self.folder, self.trainer.store, self.trainer.model.config, self.stored, status, kind)
        except Exception as error:
            self.say(f"the report was not written: {error}")
        self.reported = time.perf_counter()
        self.report_took = self.reported - started


def report(
    folder: RunFolder, store: Source, config: GPTConfig, stored: Mapping[str, Any], status: str, kind: str = "good"
) -> None:
    """Write the run's report.html; `kind` as of `reporting.Report`."""
    parameters = f"{memory.parameter_count(config):,} parameters: {config.layers} layers, width {config.width}"
    facts = (
        ("data", f"{store.name}: {store.amount}"),
        ("tokens", store.tokenizer.name),
        ("model", f"{parameters}, {config.heads} heads, context {config.context}"),
        ("versions", f"gptkern {__version__}, PyTorch {torch.__version__}"),
    )
    lines = metrics.lines(folder.metrics)
    unit = "byte" if store.tokenizer.kind == "bytes" else "token"
    reporting.write(folder.report, reporting.Report("gptkern train", status, kind, lines, stored, facts, unit))


def finished(steps: int, done: int, best: Best | None) -> str:
    early = f"Finished: {steps:,} updates." if done == steps else f"Ended early: {done:,} of {steps:,} updates."
    if best is None:
        return early
    return f"{early} The held-out loss was lowest at step {best.step:,}, {best.loss:.4f}: that model is the run's."


def _above(step: int, what: str, loss: float, than: str, other: float) -> Diverged:
    error = Diverged(step, loss)
    error.args = (f"the {what} is {loss:.4f} at step {step}, and {than} {other:.4f}",)
    return error


def _line(record: Record) -> dict[str, Any]:
    line = {"step": record.step, "loss": record.loss, "grad_norm": record.grad_norm, "lr": record.lr}
    line["tokens"] = record.tokens
    if record.scale is not None:
        line |= {"scale": record.scale, "skipped": record.skipped}
    return line
