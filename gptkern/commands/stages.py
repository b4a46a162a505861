"""The stages of `gptkern demo`: train a GPT stock and swapped, quantise it, generate, check kernels, write a report.

The two trainings advance in turn, a few steps each, from the same first weights on the same batches: their losses can
be compared at any moment, and what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import gptkern
from gptkern.commands import RunError, UserError, checkpoints, places
from gptkern.commands.findings import Curve, Findings, Int8, Sample, nats, signed
from gptkern.commands.interrupts import uninterrupted
from gptkern.commands.kernel_check import check
from gptkern.commands.observing import observed
from gptkern.commands.options import configured, resolved_dtype
from gptkern.formatting import shown
from gptkern.models.gpt import GPT
from gptkern.training import memory, reporting
from gptkern.training.data import text
from gptkern.training.data.loader import Batches
from gptkern.training.data.rows import Rows
from gptkern.training.devices import resolve_device
from gptkern.training.loop import Diverged, Trainer, new_model, validation_loss
from gptkern.training.precision import autocast
from gptkern.training.recipe import Recipe
from gptkern.training.run_folder import RunFolder

PROMPTS = ("The ", "If the object ")
TEMPERATURE = 0.7
TOP_K = 20

REPORT, RESULTS = "report.html", "results.json"
# Of the swapped training alone, as `gptkern train` writes it.
RECIPE_REPORT = "training.html"

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}

# Windows of the held-out text that are looked at on the way; at the end it is all of them.
EVALUATION_WINDOWS = 64
EVALUATIONS = 8

# Calibration: steps that only warm up, and steps that are timed.
WARM_UP_STEPS, TIMED_STEPS = 2, 5
# A calibration that fell on a busy moment does not end in a training of nothing.
FEWEST_STEPS = 50
# A machine that has become slower than its calibration: the trainings end after so many times their budget.
PATIENCE = 1.25


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is trained where nobody says otherwise.

    Args:
        seconds: for both trainings together. turn: steps that each does at a time.
        passes: the most times over the text; more of them would learn it by heart.
    """

    preset: str
    batch: int
    lr: float
    seconds: float
    turn: int
    passes: float
    context: int | None = None


# The CPU's were the best of those measured on two cores in equal time (nano at lengths 64 and 128, batches of 4 to 16,
# learning rates of 3e-3 and 5e-3; widths of 128 and 192): many small steps learn the most. The GPU's learning rate is
# that of GPT-3 125M.
DEFAULTS = {
    "cpu": Defaults("nano", batch=8, lr=3e-3, seconds=130.0, turn=5, passes=8.0, context=64),
    "cuda": Defaults("gpt2", batch=16, lr=6e-4, seconds=60.0, turn=10, passes=12.0),
}


class Demo:
    """The stages, in order; what they find out is in `findings`, and `stage` names the one under way."""

    def __init__(self, args: argparse.Namespace):
        from gptkern.commands.display import new_console

        self.args = args
        self.out = Path(args.out)
        self.console = new_console()
        self.findings = Findings()
        self.stage = "start"
        self.number = 0
        self.saved = False  # the checkpoint of this run
        self.lines: list[dict] = []  # of the swapped training, an update each

    def run(self) -> None:
        threads = torch.get_num_threads()
        try:
            self._prepare()
            self._swap()
            self._train()
            self._quantise()
            self._generate()
            self._check_kernels()
        except Diverged as error:
            self.findings.failures.append(f"{error}, during: {self.stage}; a lower --lr may help")
        finally:
            torch.set_num_threads(threads)

    def _begin(self, stage: str) -> None:
        self.stage = stage
        self.number += 1
        self._rule(f"{self.number}  {stage}", "dim")

    def _rule(self, title: str, style: str) -> None:
        from rich.text import Text

        self.console.rule(Text(title, style="bold"), align="left", style=style)

    def _say(self, line: str) -> None:
        """A line; wrapped at words in a terminal, left whole in a log."""
        self.console.print(line, soft_wrap=not self.console.is_terminal)

    # --- the stages ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        args = self.args
        self._check_checkpoint()
        for name in (REPORT, RESULTS, RECIPE_REPORT):
            if self.out.is_dir():
                places.file("--out", str(self.out / name))
        device = resolve_device(args.device)
        defaults = DEFAULTS.get(device.type, DEFAULTS["cpu"])
        preset = args.preset or defaults.preset
        config = configured(preset, args.context or (defaults.context if preset == defaults.preset else None))
        self.data = text.text_store(text.load(args.text, shortest=config.context + 1))
        self.defaults = defaults
        dtype = resolved_dtype(args.dtype, device)
        self.recipe = Recipe(
            steps=args.steps or 1, batch=args.batch or defaults.batch, length=config.context,
            lr=args.lr or defaults.lr, seed=args.seed, device=str(device), precision=PRECISIONS[dtype],
        )  # fmt: skip
        # The int8 model is made beside the two that are trained.
        memory.check(config, self.recipe, name=f"--preset {preset}", models=2, copies=1, saves=False)
        places.room("--out", self.out, memory.FLOAT32 * memory.parameter_count(config))
        self._begin("the model and the text")
        self.stock = new_model(config, self.recipe.seed, device)
        findings = self.findings
        findings.text = self.data.name
        findings.text_bytes = len(self.data.train), len(self.data.validation)
        findings.model = f"GPT, {config.layers} layers of width {config.width}, {config.heads} heads"
        findings.parameters = self.stock.parameter_count()
        findings.dtype, findings.device = dtype, _device_name(device)
        findings.tokens_per_step = self.recipe.tokens_per_step
        findings.environment = _environment(device)
        self._say(
            f"{findings.model}: {findings.parameters:,} parameters, {findings.dtype} on {findings.device}\n"
            f"{findings.text}: {findings.text_bytes[0]:,} bytes to train on, {findings.text_bytes[1]:,} held out"
        )

    def _check_checkpoint(self) -> None:
        """Raises UserError where a checkpoint is in the way that no demo wrote, or that cannot be replaced."""
        folder, out = self.out / "checkpoint", shown(str(self.out))
        if RunFolder(self.out).recipe.exists():
            raise UserError(f"--out {out} holds a run of `gptkern train`: give another --out")
        if RunFolder(folder).held() and not _is_of_a_demo(folder):
            raise UserError(f"--out {out}: {shown(str(folder))} holds a checkpoint of no demo: give another --out")
        checkpoints.check_writable("--out", folder)

    def _swap(self) -> None:
        from rich.table import Table

        self._begin("gptkern.swap(model)")
        self.swapped = copy.deepcopy(self.stock)
        report = gptkern.swap(self.swapped)
        rows = Rows(self.data.train, self.recipe.length, self.recipe.seed)
        batch = Batches(rows, self.recipe.batch, device=self.recipe.device, prefetch=0).next()
        with self._autocast():
            self.findings.swapped_modules = observed(self.swapped, report, batch.ids, batch.targets)
        self.findings.skipped_modules = [tuple(entry) for entry in report.skipped]
        table = Table(box=None, padding=(0, 2, 0, 0))
        for heading in ("module", "class", "operator", "backend", "why"):
            table.add_column(heading, no_wrap=heading != "why")
        for row in self.findings.swapped_modules:
            names = f"{row.names} ({row.count})"
            table.add_row(names, row.original, row.operator, row.backend, row.reason)
        for name, original, reason in self.findings.skipped_modules:
            table.add_row(name, original, "-", "-", f"left alone: {reason}")
        self.console.print(table)

    def _train(self) -> None:
        from gptkern.commands.display import TrainingDisplay

        self._begin("training, stock and swapped in turn")
        seconds = self.args.seconds or self.defaults.seconds
        deadline = None
        if self.args.steps is None:
            self.recipe = dataclasses.replace(self.recipe, steps=self._steps_in(seconds))
            deadline = time.monotonic() + PATIENCE * seconds
        recipe, findings = self.recipe, self.findings
        findings.steps = recipe.steps
        findings.recipe = (
            f"AdamW, peak learning rate {recipe.lr:g}, warm-up and cosine, gradients clipped, seed {recipe.seed}; "
            f"batches of {recipe.batch} rows of {recipe.length} bytes."
        )
        trainers = [
            ("stock", Trainer(self.stock, self.data, recipe)),
            ("swapped", Trainer(self.swapped, self.data, recipe)),
        ]
        evaluate_every = max(1, recipe.steps // EVALUATIONS)
        try:
            with TrainingDisplay(self.console, trainers, recipe.steps) as display:
                while (step := trainers[0][1].step) < recipe.steps:
                    turn = min(self.defaults.turn, evaluate_every - step % evaluate_every, recipe.steps - step)
                    for _, trainer in trainers:
                        trainer.run(turn)
                    self._note(trainers[1][1])
                    if (step + turn) % evaluate_every == 0 and step + turn < recipe.steps:
                        for _, trainer in trainers:
                            trainer.validate(EVALUATION_WINDOWS)
                        self.lines[-1]["validation_loss"] = trainers[1][1].validations[-1][1]
                    display.update()
                    if deadline is not None and time.monotonic() > deadline:
                        findings.cut_short = "This machine became slower than its calibration: ended early, on time."
                        break
                for _, trainer in trainers:
                    trainer.validate()
                self.lines[-1]["validation_loss"] = trainers[1][1].validations[-1][1]
                display.update()
        finally:
            for _, trainer in trainers:
                trainer.close()
            findings.stock, findings.swapped = (
                Curve(trainer.losses, trainer.validations, trainer.tokens_per_second) for _, trainer in trainers
            )
        self.trainer = trainers[1][1]
        self._say(
            f"validation loss: stock {findings.stock.final:.4f}, swapped {nats(findings.swapped.final)}; "
            f"largest difference {findings.largest_difference:.2g}; speed {findings.speed_up:.2f} x stock"
        )
        history = {"command": "demo", "text": self.data.name, "recipe": dataclasses.asdict(recipe)}
        history["step"] = self.trainer.step
        try:
            with uninterrupted():
                checkpoints.save(self.swapped, self.out / "checkpoint", history)
            self.saved = True
        except RunError as error:
            # The stages that follow need no file.
            findings.failures.append(str(error))

    def _note(self, trainer: Trainer) -> None:
        """The updates since the last time, as lines of a run's metrics.jsonl."""
        speed, tokens = trainer.speeds[-1], self.recipe.tokens_per_step
        for record in trainer.records():
            seconds = (self.lines[-1]["seconds"] if self.lines else 0.0) + tokens / speed
            self.lines.append({**record._asdict(), "seconds": seconds, "tokens_per_second": speed})

    def _steps_in(self, seconds: float) -> int:
        """How many steps of both trainings fit into the time, from a few steps of throw-away copies."""
        elapsed = self._fastest_threads() + self._step_seconds(self.swapped)
        # An evaluation is a forward alone, a third of a step's work.
        rows = EVALUATIONS * EVALUATION_WINDOWS + len(self.data.validation) / self.recipe.length
        evaluation = elapsed * rows / self.recipe.batch / 3
        most = self.defaults.passes * len(self.data.train) / self.recipe.tokens_per_step
        return max(1, min(max(FEWEST_STEPS, int((seconds - evaluation) / elapsed)), int(most)))

    def _fastest_threads(self) -> float:
        """Set the number of threads that trains this model fastest; the seconds of a step of the stock model.

        A small model's matrices are soon too small for more threads, and threads that wait for one another on a
        busy machine are slower than one.
        """
        if torch.device(self.recipe.device).type != "cpu":
            return self._step_seconds(self.stock)
        most = torch.get_num_threads()
        fastest, best = 1, float("inf")
        for threads in sorted({most, *(2**power for power in range(most.bit_length()) if 2**power < most)}):
            torch.set_num_threads(threads)
            elapsed = self._step_seconds(self.stock, hopeless=2 * best)
            if elapsed < best:
                fastest, best = threads, elapsed
            else:
                break
        torch.set_num_threads(fastest)
        if fastest < most:
            self._say(f"{fastest} of {most} threads: the fastest for this model on this machine at this moment")
        device = torch.device("cpu")
        self.findings.device, self.findings.environment = _device_name(device), _environment(device)
        return best

    def _step_seconds(self, model: GPT, hopeless: float = float("inf")) -> float:
        """The median time of a few steps of a copy; the first one's where that is already hopeless."""
        trainer = Trainer(copy.deepcopy(model), self.data, self.recipe)
        with contextlib.closing(trainer):
            trainer.run(WARM_UP_STEPS)
            for _ in range(TIMED_STEPS):
                trainer.run(1)
                if self.recipe.tokens_per_step / trainer.speeds[-1] > hopeless:
                    break
        return self.recipe.tokens_per_step / statistics.median(trainer.speeds[1:])

    def _quantise(self) -> None:
        self._begin("int8")
        self.int8 = copy.deepcopy(self.swapped).eval()
        report = gptkern.quantize(self.int8)
        loss = validation_loss(self.int8, self.data, self.recipe)
        before, after = report.bytes_before, report.bytes_after
        int8 = self.findings.int8 = Int8(
            len(report.quantized), loss, self.findings.swapped.final, before, after,
            report.model_bytes_before, report.model_bytes_after,
        )  # fmt: skip
        self._say(
            f"{int8.layers} linear layers: {before:,} -> {after:,} bytes ({before / after:.2f} x smaller); "
            f"validation loss {loss:.4f} ({signed(int8.change)})"
        )

    def _generate(self) -> None:
        self._begin("samples")
        for prompt in PROMPTS:
            sample = Sample(prompt, *(self._sample(model, prompt) for model in (self.stock, self.swapped, self.int8)))
            self.findings.samples.append(sample)
            for title, generated in (("swapped", sample.swapped), ("int8", sample.int8)):
                self.console.print(title, style="bold")
                self.console.print(generated, style="dim")

    def _sample(self, model: GPT, prompt: str) -> str:
        device = torch.device(self.recipe.device)
        generator = torch.Generator(device).manual_seed(self.args.seed)
        ids = torch.from_numpy(self.data.tokenizer.encode(prompt)).long().to(device)[None]  # (1, tokens)
        with self._autocast():
            ids = model.generate(ids, self.args.sample_bytes, TEMPERATURE, TOP_K, generator)
        return self.data.tokenizer.decode(ids[0].tolist())

    def _autocast(self):
        return autocast(torch.device(self.recipe.device), self.recipe.precision)

    def _check_kernels(self) -> None:
        if self.args.check_seconds <= 0:
            return
        self._begin("this machine's kernels against float64")
        result = self.findings.kernel_check = check(self.recipe.device, self.args.check_seconds)
        self._say(
            f"{result.passed} comparisons passed, {result.failed} failed, {result.left_out} cases left out "
            f"({result.note}, {result.seconds:.0f} s)"
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """The report, the figures as JSON, and the verdict on the terminal.

        An interrupted run that has no checkpoint of its own leaves the report of a finished one, and its checkpoint.
        """
        findings = self.findings
        if findings.interrupted and not self.saved and self._holds_a_finished_run():
            where = f"{self.out / REPORT} is that of an earlier run, which was finished"
        else:
            where = f"report: {self.out / REPORT}"
            try:
                self._write_files()
                if findings.training_report:
                    where += f"\nthe swapped training alone: {self.out / findings.training_report}"
            except RunError as error:
                findings.failures.append(str(error))
                where = ""
        problems = findings.problems()
        self._rule("verdict", "red" if problems else "green")
        self._say(findings.verdict())
        for problem in problems:
            self.console.print(problem, style="bold red")
        self._say(f"\n{where}")

    def _write_files(self) -> None:
        from gptkern.commands.demo_report import render

        findings = self.findings
        if self.lines:
            findings.training_report = RECIPE_REPORT
            reporting.write(self.out / RECIPE_REPORT, self._training_report())
        content = {**dataclasses.asdict(findings), "problems": findings.problems()}
        places.write(self.out / RESULTS, json.dumps(content, indent=1) + "\n")
        places.write(self.out / REPORT, render(findings))

    def _training_report(self) -> reporting.Report:
        """Of the swapped training, as a run of `gptkern train` has it."""
        done, steps = self.lines[-1]["step"], self.recipe.steps
        kind, status = ("good", "Finished") if done == steps else ("wait", "Ended early")
        facts = [("model", f"{self.findings.model}, swapped"), ("text", self.data.name), *self.findings.environment]
        status = f"{status}: {done:,} of {steps:,} updates."
        recipe = dataclasses.asdict(self.recipe)
        return reporting.Report("gptkern demo: the swapped training", status, kind, self.lines, recipe, facts, "byte")

    def _holds_a_finished_run(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return json.loads((self.out / RESULTS).read_text(encoding="utf-8")).get("interrupted") == ""
        return False


def _is_of_a_demo(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        content = json.loads((checkpoint / checkpoints.CONFIG).read_text(encoding="utf-8"))
        return content["training"]["command"] == "demo"
    return False


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return device.type


def _environment(device: torch.device) -> list[tuple[str, str]]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    rows = [
        ("gptkern", gptkern.__version__),
        ("PyTorch", torch.__version__),
        ("Triton", triton_version),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("device", _device_name(device)),
        ("processor", f"{_processor()}, {os.cpu_count()} cores"),
    ]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        rows.append(("CUDA", f"{torch.version.cuda}, compute capability {major}.{minor}"))
    return rows


def _processor() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
