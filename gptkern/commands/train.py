"""`gptkern train`: the reference GPT on a text file or on a folder of tokens, into a run's folder."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptkern.commands import INTERRUPTED, UserError, places
from gptkern.commands.interrupts import import_torch, noted
from gptkern.commands.options import add_recipe_arguments, configured
from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.run_folder import CHECKPOINTS, RunFolder

if TYPE_CHECKING:
    from gptkern.models.gpt import GPT, GPTConfig
    from gptkern.training.data.store import Store
    from gptkern.training.run import Outcome

SUMMARY = "train the reference GPT on a text or on tokens, into a run's folder"

KEEPING = ("save_every", "keep", "evaluate_every", "evaluate_rows", "spike", "tensorboard", "patience")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="FILE", help="TOML with options as keys; those given here come first")
    parser.add_argument("--out", metavar="FOLDER", default="out/train", help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    out = places.folder("--out", args.out)
    folder = RunFolder(out)
    values, pending = _values(args, folder)
    keys = recipe_files.absolute(values)
    import_torch()
    # What is missing is said now and not after minutes of training.
    for package in ("matplotlib", "rich", "safetensors"):
        importlib.import_module(package)

    from gptkern.commands.display import RunDisplay, new_console
    from gptkern.training.devices import resolve_device
    from gptkern.training.memory import return_freed
    from gptkern.training.process_state import CUBLAS_WORKSPACE, FIXED_WORKSPACES
    from gptkern.training.run import Keeping, train

    device = str(resolve_device(values["device"]))
    store = _store(values)
    goes_on = args.resume and any(folder.place(CHECKPOINTS).glob("step-*"))
    config, model, length = _model(values, store, device, goes_on)
    recipe = recipe_files.recipe_of(values, length=length, device=device)
    if recipe.deterministic:
        # cuBLAS reads it when the GPU is first used.
        os.environ.setdefault(CUBLAS_WORKSPACE, FIXED_WORKSPACES[0])
    return_freed(recipe)
    console = new_console()

    def say(line: str) -> None:
        # Warnings go first, and nothing before all of the input was tried.
        while pending:
            console.print(pending.pop(0), soft_wrap=True)
        console.print(line, soft_wrap=True)

    with noted() as came, RunDisplay(console) as display:
        outcome = train(
            recipe, store, out, config=config, model=model, swap=not values["stock"],
            keeping=Keeping(**{name: values[name] for name in KEEPING}), resume=args.resume, overwrite=args.overwrite,
            keys=keys, stop=came, watch=display.update, say=say,
        )  # fmt: skip
    # The terminal may be what went away.
    with contextlib.suppress(OSError):
        say(_ending(args.out, outcome, recipe.steps, "byte" if store.tokenizer.kind == "bytes" else "token"))
    return 0 if outcome.finished else INTERRUPTED


def _values(args: argparse.Namespace, folder: RunFolder) -> tuple[dict[str, Any], list[str]]:
    """Every key with its value, and lines of warning."""
    if args.resume and args.overwrite:
        raise UserError("--overwrite has no effect on --resume, which goes on with the run that is there")
    given = recipe_files.of_options(vars(args))
    if args.recipe is not None:
        given = given.over(recipe_files.read(args.recipe))
    if args.resume:
        stored = folder.stored()
        values, warnings = recipe_files.resumed(stored, given)
        if not stored.values.keys() & {"preset", "from"}:
            # Begun from Python: its sizes are in its checkpoints alone.
            values["preset"] = given.values.get("preset")
        return values, warnings
    folder.check_free(args.overwrite)
    return recipe_files.completed(given), []


def _store(values: dict[str, Any]) -> Store:
    if values["data"] is not None:
        from gptkern.training.data.store import Store

        return Store.open(values["data"])
    from gptkern.training.data import text

    # The shortest that a row of the preset's own context needs; of another model's the run says it.
    shortest = 2 if values["preset"] is None else configured(values["preset"], values["context"]).context + 1
    return text.text_store(text.load(values["text"], shortest=shortest))


def _model(
    values: dict[str, Any], store: Store, device: str, goes_on: bool
) -> tuple[GPTConfig | None, Callable[[], GPT] | None, int]:
    """(config, what loads a model that has weights, tokens of a row)"""
    if values["preset"] is None and values["from"] is None:
        return None, None, values["context"]
    if values["from"] is None:
        sizes = {name: values[name] for name in ("layers", "width", "heads")}
        config = configured(values["preset"], values["context"], values["dropout"], store.tokenizer.vocab_size, **sizes)
        return config, None, config.context

    def found() -> tuple[GPTConfig, Callable[[], GPT]]:
        from gptkern.training.loading import starting

        config, load = starting(
            values["from"], store.tokenizer, length=values["context"], dropout=values["dropout"], device=device
        )
        return config, lambda: load().model

    if goes_on:
        # From a checkpoint, with its length: the folder is not asked for.
        return None, lambda: found()[1](), values["context"]
    config, load = found()
    return config, load, values["context"] or config.context


def _ending(out: str, outcome: Outcome, steps: int, unit: str) -> str:
    from gptkern.training.checkpoints import Checkpoint

    # Of a run that was interrupted in a spike it is an earlier one.
    step = outcome.step if outcome.checkpoint is None else Checkpoint(outcome.checkpoint).step
    there = f"the checkpoint of step {step} is in {outcome.checkpoint}"
    if not outcome.finished:
        if outcome.checkpoint is None:
            return f"interrupted at step {outcome.step} of {steps}: {shown(out)} is as it was"
        return f"interrupted at step {outcome.step} of {steps}: {there}   (gptkern train --resume --out {out})"
    loss = "" if outcome.validation_loss is None else f"validation loss {outcome.validation_loss:.4f} nats per {unit}\n"
    return f"{loss}{steps} updates are done: {there}   (gptkern generate {out})"
