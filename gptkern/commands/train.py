"""`gptkern train`: the reference GPT on a text file, into a checkpoint folder."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path

import gptkern
from gptkern.commands import INTERRUPTED, RunError, UserError, places
from gptkern.commands.interrupts import interruptible, uninterrupted
from gptkern.commands.options import (
    PRESETS,
    above_zero,
    add_machine_arguments,
    configured,
    positive,
    probability,
    resolved_dtype,
    shown,
)

SUMMARY = "train the reference GPT on a text file, into a checkpoint folder"

EVALUATIONS = 10
# Windows of the held-out text that are looked at on the way; at the end it is all of them.
EVALUATION_WINDOWS = 64
STEPS_BETWEEN_UPDATES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="the text; Python's language reference where none is given")
    parser.add_argument("--out", metavar="FOLDER", default="out/train", help="where the checkpoint goes")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that is there")
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

    from gptkern.commands import checkpoints, text, training
    from gptkern.commands.display import new_console

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
    try:
        loss = _trained(trainer, console, "stock" if args.stock else "swapped")
    except KeyboardInterrupt:
        ended = f"interrupted at step {trainer.step} of {recipe.steps}"
        if not (trainer.step and trainer.finite()):
            console.print(f"{ended}: {_rescued(trainer, out, data.name)}", soft_wrap=True)
            return INTERRUPTED
    except training.Diverged as error:
        raise RunError(f"{error}: a lower --lr may help; {_rescued(trainer, out, data.name)}") from None
    except Exception:
        # A terminal that went away, a memory that is full: what was learnt is kept all the same.
        with contextlib.suppress(Exception):
            _rescued(trainer, out, data.name, as_it_is=trainer.step > 0 and trainer.finite())
        raise
    else:
        ended = None
    _save(trainer, out, data.name)
    console.print(f"validation loss {loss:.4f} nats per byte" if ended is None else ended)
    console.print(f"checkpoint: {out}   (gptkern generate {out})", soft_wrap=True)
    return 0 if ended is None else INTERRUPTED


def _trained(trainer, console, name: str) -> float:
    """The validation loss at the end; on the way the trainer notes the best that it has been."""
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
        return trainer.validate()


def _save(trainer, out: Path, text: str) -> None:
    from gptkern.commands import checkpoints

    history = {"text": text, "recipe": dataclasses.asdict(trainer.recipe), "step": trainer.step}
    history["validation_losses"] = trainer.validations
    with uninterrupted():
        checkpoints.save(trainer.model, out, history)


def _rescued(trainer, out: Path, text: str, as_it_is: bool = False) -> str:
    """Write what a training that failed has to show, unless a finished one has its checkpoint there; says what it did.

    Args:
        as_it_is: the model is of use; else it goes back to the best that it has been.
    """
    from gptkern.commands import checkpoints

    if checkpoints.held(out):
        return f"the checkpoint in {out} is as it was"
    if not (as_it_is or trainer.back_to_best()):
        return "nothing was written"
    _save(trainer, out, text)
    return f"the checkpoint in {out} is that of step {trainer.step}"
