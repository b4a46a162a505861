"""`gptkern train`: the reference GPT on a text file, into a checkpoint folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
from pathlib import Path

import gptkern
from gptkern.commands import INTERRUPTED, RunError, UserError, places
from gptkern.commands.interrupts import import_torch, interruptible, uninterrupted
from gptkern.commands.options import (
    PRESETS,
    above_zero,
    add_machine_arguments,
    configured,
    positive,
    probability,
    resolved_dtype,
)
from gptkern.formatting import shown

SUMMARY = "train the reference GPT on a text file, into a checkpoint folder"

EVALUATIONS = 10
# Windows of the held-out text that are looked at on the way; at the end it is all of them.
EVALUATION_WINDOWS = 64
STEPS_BETWEEN_UPDATES = 10
# Nats. A few updates of a warm-up may end a little above the untrained model; what diverged is far above.
WORSE_THAN_UNTRAINED = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="the text; Python's language reference where none is given")
    parser.add_argument("--out", metavar="FOLDER", default="out/train", help="where the checkpoint goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is there, at the end")
    parser.add_argument("--preset", choices=PRESETS, default="nano", metavar="NAME", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--context", type=positive, help="tokens that the model sees at once; the preset's otherwise")
    parser.add_argument("--dropout", type=probability, default=0.0, help="while training")
    parser.add_argument("--steps", type=positive, default=1000, help="updates")
    parser.add_argument("--batch", type=positive, default=8, help="rows of an update, each as long as the context")
    parser.add_argument("--lr", type=above_zero, default=3e-3, help="peak learning rate")
    parser.add_argument("--stock", action="store_true", help="leave the model on PyTorch's operators")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    out = places.folder("--out", args.out)
    import_torch()

    from gptkern.commands import checkpoints, text, training
    from gptkern.commands.display import new_console

    found = _state(out)
    if checkpoints.held(out) and not args.overwrite:
        raise UserError(f"--out {shown(args.out)} holds a checkpoint: --overwrite replaces it, another --out leaves it")
    checkpoints.check_writable("--out", out)
    device = training.resolve_device(args.device)
    config = configured(args.preset, args.context, args.dropout)
    data = text.load(args.text, shortest=config.context + 1)
    recipe = training.Recipe(
        steps=args.steps, batch=args.batch, length=config.context, lr=args.lr, seed=args.seed,
        device=str(device), dtype=resolved_dtype(args.dtype, device),
    )  # fmt: skip
    training.check_memory(config, recipe, args.preset, copies=1)
    places.room("--out", out, training.parameter_bytes(config))
    model = training.new_model(config, recipe)
    console = new_console()
    console.print(
        f"{args.preset}: {model.parameter_count():,} parameters, {recipe.dtype} on {device}; "
        f"{len(data.train):,} bytes to train on, {len(data.validation):,} held out"
    )
    if not args.stock:
        console.print(str(gptkern.swap(model)), soft_wrap=True)
    trainer = training.Trainer(model, data, recipe)
    result = _Result(out, found, trainer, data.name)
    try:
        loss = _trained(trainer, console, "stock" if args.stock else "swapped")
    except KeyboardInterrupt:
        step = trainer.step
        where = result.rescued() if step > 0 and trainer.finite() else result.best()
        console.print(f"interrupted at step {step} of {recipe.steps}: {where}", soft_wrap=True)
        return INTERRUPTED
    except training.Diverged as error:
        raise RunError(f"{error}: a lower --lr may help; {result.best()}") from None
    except Exception:
        # A terminal that went away, a memory that is full: what was learnt is kept all the same.
        with contextlib.suppress(Exception):
            if trainer.step > 0 and trainer.finite():
                result.rescued()
            else:
                result.best()
        raise
    if result.replaced_by_others():
        raise RunError(f"another program has written the checkpoint in {out} meanwhile: {result.rescued()}")
    result.save(out)
    console.print(f"validation loss {loss:.4f} nats per byte")
    console.print(f"checkpoint: {out}   (gptkern generate {out})", soft_wrap=True)
    return 0


def _trained(trainer, console, name: str) -> float:
    """The validation loss at the end; on the way the trainer notes the best that it has been."""
    from gptkern.commands import training
    from gptkern.commands.display import TrainingDisplay

    steps = trainer.recipe.steps
    evaluate_every = max(1, steps // EVALUATIONS)
    with interruptible(), TrainingDisplay(console, [(name, trainer)], steps) as display:
        while trainer.step < steps:
            to_evaluation = evaluate_every - trainer.step % evaluate_every
            trainer.run(min(STEPS_BETWEEN_UPDATES, to_evaluation, steps - trainer.step))
            if trainer.step % evaluate_every == 0 and trainer.step < steps:
                trainer.validate(EVALUATION_WINDOWS)
                trainer.note_best()
            display.update()
        loss = trainer.validate()
        # What guesses evenly among the bytes; the untrained model is asked where that may matter alone.
        if loss > math.log(trainer.model.config.vocab_size):
            untrained = trainer.untrained()
            if loss > untrained + WORSE_THAN_UNTRAINED:
                raise training.Worse(trainer.step, loss, untrained)
        return loss


class _Result:
    """Where a training's checkpoint goes: into its folder at the end, if nobody else has written there."""

    def __init__(self, out: Path, found: list, trainer, text: str):
        self.out, self.found, self.trainer, self.text = out, found, trainer, text

    def save(self, folder: Path) -> None:
        from gptkern.commands import checkpoints

        trainer = self.trainer
        history = {"command": "train", "text": self.text, "recipe": dataclasses.asdict(trainer.recipe)}
        history |= {"step": trainer.step, "validation_losses": trainer.validations}
        with uninterrupted():
            checkpoints.save(trainer.model, folder, history)

    def replaced_by_others(self) -> bool:
        from gptkern.commands import checkpoints

        return checkpoints.held(self.out) and _state(self.out) != self.found

    def rescued(self) -> str:
        """Write the model as it is, beside a checkpoint that is there; says where."""
        from gptkern.commands import checkpoints

        beside = checkpoints.held(self.out)
        folder = _beside(self.out) if beside else self.out
        try:
            self.save(folder)
        except BaseException:
            if beside:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        where = f"the checkpoint of step {self.trainer.step} is in {folder}"
        return f"{where}; the one in {self.out} is as it was" if beside else where

    def best(self) -> str:
        """Write the best that the model has been, where no checkpoint is there and it is of use; says what it did."""
        from gptkern.commands import checkpoints

        if checkpoints.held(self.out):
            return f"the checkpoint in {self.out} is as it was"
        trainer = self.trainer
        if trainer.best is None or trainer.best[1] >= trainer.untrained(EVALUATION_WINDOWS):
            return "nothing was written"
        trainer.back_to_best()
        self.save(self.out)
        return f"the checkpoint in {self.out} is that of step {trainer.step}"


def _state(folder: Path) -> list[tuple | None]:
    """Of the files of a checkpoint: another where one of them has been written since."""
    from gptkern.commands import checkpoints

    files = [folder / name for name in (checkpoints.CONFIG, checkpoints.PARAMETERS)]
    states = [file.stat() if file.exists() else None for file in files]
    return [state and (state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _beside(folder: Path) -> Path:
    """A new folder of a name like this one's."""
    folder = folder.resolve() if folder.name in ("", "..") else folder
    for number in itertools.count(1):
        beside = folder.with_name(f"{folder.name}-{number}")
        # Made here and now: of two trainings one has it.
        with places.kept(beside), contextlib.suppress(FileExistsError):
            beside.mkdir()
            return beside
