"""What a training shows while it runs: a live bar and table in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gptkern import formatting

if TYPE_CHECKING:
    from gptkern.training.loop import Trainer
    from gptkern.training.run import Progress as RunProgress

# Without a terminal (a log, a CI job) a line is written this often.
SECONDS_BETWEEN_LINES = 15.0

# The shown training loss is the mean over this many last steps.
SHOWN_LOSS_STEPS = 20


def new_console() -> Console:
    """Where commands print: what they are given, file names among it, is never read as markup or as an emoji's code."""
    # Of COLUMNS=0 rich makes lines of no width; what is no number is an error there.
    given = [os.environ[name] for name in ("COLUMNS", "LINES") if name in os.environ]
    odd = any(not value.isdecimal() or int(value) == 0 for value in given)
    width, height = shutil.get_terminal_size() if odd else (None, None)
    return Console(highlight=False, markup=False, emoji=False, width=width, height=height)


class TrainingDisplay(contextlib.AbstractContextManager):
    """Shows trainers that advance together.

    Args:
        trainers: each with the name that it is shown under.
    """

    def __init__(self, console: Console, trainers: Sequence[tuple[str, Trainer]], steps: int):
        self.console, self.trainers, self.steps = console, trainers, steps
        self.progress = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(None), TimeRemainingColumn(compact=True),
            console=console, expand=True,
        )  # fmt: skip
        self.task = self.progress.add_task("steps", total=steps)
        self.live = Live(self._renderable(), console=console, refresh_per_second=4) if console.is_terminal else None
        self.last_line, self.last_time = "", -math.inf

    def __enter__(self) -> TrainingDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()
        else:
            self._line()

    def update(self) -> None:
        """After each advance of the trainers."""
        if self.live:
            self.progress.update(self.task, completed=min(trainer.step for _, trainer in self.trainers))
            self.live.update(self._renderable())
        elif time.monotonic() - self.last_time >= SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        step = min(trainer.step for _, trainer in self.trainers)
        parts = [f"step {step}/{self.steps}"]
        for name, trainer in self.trainers:
            loss, validation, speed = _figures(trainer)
            parts.append(f"{name}: loss {loss}, validation {validation}, {speed} tokens/s")
        line = "  |  ".join(parts)
        if line != self.last_line:
            self.console.print(line, soft_wrap=True, highlight=False)
        self.last_line, self.last_time = line, time.monotonic()

    def _renderable(self) -> Group:
        table = Table(box=None, padding=(0, 3, 0, 0))
        table.add_column("")
        for heading in ("training loss", "validation loss", "tokens/s"):
            table.add_column(heading, justify="right")
        for name, trainer in self.trainers:
            table.add_row(name, *_figures(trainer))
        return Group(self.progress, table)


def _figures(trainer: Trainer) -> tuple[str, str, str]:
    recent = trainer.losses[-SHOWN_LOSS_STEPS:]
    loss = f"{sum(recent) / len(recent):.4f}" if recent else "-"
    validation = f"{trainer.validations[-1][1]:.4f}" if trainer.validations else "-"
    return loss, validation, f"{trainer.tokens_per_second:,.0f}"


class RunDisplay(contextlib.AbstractContextManager):
    """Shows a run: how far it is, its losses and its speed. Nothing is printed before the first `update`."""

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[left]}"),
            console=console, expand=True,
        )  # fmt: skip
        self.task = self.progress.add_task("steps", total=None, left="")
        self.live: Live | None = None
        self.shown: RunProgress | None = None
        self.last_line, self.last_time = "", -math.inf

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()
        elif self.shown is not None and exception[0] is None:
            self._line()

    def update(self, now: RunProgress) -> None:
        self.shown = now
        if not self.console.is_terminal:
            if time.monotonic() - self.last_time >= SECONDS_BETWEEN_LINES:
                self._line()
            return
        left = "" if now.seconds_left is None else f"{duration(now.seconds_left)} left"
        self.progress.update(self.task, completed=now.step, total=now.steps, left=left)
        if self.live is None:
            self.live = Live(self._renderable(), console=self.console, refresh_per_second=4)
            self.live.start()
        else:
            self.live.update(self._renderable())

    def _line(self) -> None:
        now = self.shown
        line = f"step {now.step}/{now.steps}: " + ", ".join(f"{name} {value}" for name, value in _run_figures(now))
        if now.seconds_left:
            line += f", {duration(now.seconds_left)} left"
        if line != self.last_line:
            self.console.print(line, soft_wrap=True, highlight=False)
        self.last_line, self.last_time = line, time.monotonic()

    def _renderable(self) -> Group:
        table = Table(box=None, padding=(0, 3, 0, 0))
        figures = _run_figures(self.shown)
        for name, _ in figures:
            table.add_column(name, justify="right")
        table.add_row(*(value for _, value in figures))
        return Group(self.progress, table)


def _run_figures(now: RunProgress) -> list[tuple[str, str]]:
    def number(value: float | None, form: str) -> str:
        return formatting.NONE if value is None else format(value, form)

    figures = [
        ("loss", number(now.loss, ".4f")),
        ("validation", number(now.validation, ".4f")),
        ("gradient norm", number(now.grad_norm, ".3g")),
        ("learning rate", number(now.lr, ".3g")),
        ("tokens/s", number(now.tokens_per_second or None, ",.0f")),
    ]
    if now.share is not None:
        figures.append(("of the peak", formatting.percent(now.share)))
    figures.append(("checkpoint", number(now.saved, "d")))
    return figures


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
