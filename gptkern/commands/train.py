"""`gptkern train`: the reference GPT on a text file, into a checkpoint folder."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import gptkern
from gptkern.commands import INTERRUPTED
from gptkern.commands.interrupts import interruptible
from gptkern.commands.options import PRESETS, add_machine_arguments, configured, positive, resolved_dtype

SUMMARY = "train the reference GPT on a text file, into a checkpoint folder"

EVALUATIONS = 10
# Windows of the held-out text that are looked at on the way; at the end it is all of them.
EVALUATION_WINDOWS = 64
STEPS_BETWEEN_UPDATES = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="the text; Python's language reference where none is given")
    parser.add_argument("--out", metavar="FOLDER", default="out/train", help="where the checkpoint goes")
    parser.add_argument("--preset", choices=PRESETS, default="nano", metavar="NAME", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--context", type=positive, help="tokens that the model sees at once; the preset's otherwise")
    parser.add_argument("--dropout", type=float, default=0.0, help="while training")
    parser.add_argument("--steps", type=positive, default=1000, help="updates")
    parser.add_argument("--batch", type=positive, default=8, help="rows of an update, each as long as the context")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--stock", action="store_true", help="leave the model on PyTorch's operators")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from gptkern.commands import checkpoints, text, training
    from gptkern.commands.display import TrainingDisplay

    device = training.resolve_device(args.device)
    config = configured(args.preset, args.context, args.dropout)
    data = text.load(args.text, shortest=config.context + 1)
    recipe = training.Recipe(
        steps=args.steps, batch=args.batch, length=config.context, lr=args.lr, seed=args.seed,
        device=str(device), dtype=resolved_dtype(args.dtype, device),
    )  # fmt: skip
    model = training.new_model(config, recipe)
    console = Console(highlight=False)
    console.print(
        f"{args.preset}: {model.parameter_count():,} parameters, {recipe.dtype} on {device}; "
        f"{len(data.train):,} bytes to train on, {len(data.validation):,} held out"
    )
    if not args.stock:
        console.print(str(gptkern.swap(model)), soft_wrap=True)
    trainer = training.Trainer(model, data, recipe)
    interrupted = False
    try:
        with (
            interruptible(),
            TrainingDisplay(console, [("stock" if args.stock else "swapped", trainer)], recipe.steps) as display,
        ):
            evaluate_every = max(1, recipe.steps // EVALUATIONS)
            while trainer.step < recipe.steps:
                to_evaluation = evaluate_every - trainer.step % evaluate_every
                trainer.run(min(STEPS_BETWEEN_UPDATES, to_evaluation, recipe.steps - trainer.step))
                if trainer.step % evaluate_every == 0 and trainer.step < recipe.steps:
                    trainer.validate(EVALUATION_WINDOWS)
                display.update()
            loss = trainer.validate()
        console.print(f"validation loss {loss:.4f} nats per byte")
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"interrupted at step {trainer.step} of {recipe.steps}")
    history = {"text": data.name, "recipe": dataclasses.asdict(recipe), "step": trainer.step}
    history["validation_losses"] = trainer.validations
    checkpoints.save(model, Path(args.out), history)
    console.print(f"checkpoint: {args.out}   (gptkern generate {args.out})", soft_wrap=True)
    return INTERRUPTED if interrupted else 0
