"""What the commands share that train in a run's folder: `train` and `finetune`."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkern.commands import INTERRUPTED, UserError
from gptkern.commands.interrupts import import_torch, noted
from gptkern.commands.options import configured
from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.run_folder import CHECKPOINTS, RunFolder

if TYPE_CHECKING:
    import argparse

    from gptkern.models.gpt import GPT, GPTConfig
    from gptkern.training.data.example_rows import ExampleStore
    from gptkern.training.data.store import Source
    from gptkern.training.run import Outcome

KEEPING = ("save_every", "keep", "evaluate_every", "evaluate_rows", "spike", "tensorboard", "patience")


def add_folder_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--recipe", metavar="FILE", help="TOML with options as keys; those given here come first")
    parser.add_argument("--out", metavar="FOLDER", default=out, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is in --out")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")


def values_of(
    args: argparse.Namespace, folder: RunFolder, given: recipe_files.Given, defaults: recipe_files.Given | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Every key with its value, and lines of warning.

    Args:
        given: on the command line. defaults: of the command, where neither that nor a recipe says another.
    """
    if args.resume and args.overwrite:
        raise UserError("--overwrite has no effect on --resume, which goes on with the run that is there")
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
    return recipe_files.completed(given if defaults is None else given.over(defaults)), []


def train_in(
    args: argparse.Namespace, out: Path, values: dict[str, Any], pending: list[str], names: dict[str, str]
) -> int:
    """Train as the keys say, and return the exit status.

    Args:
        pending: lines of warning. names: what errors call keys that are not called by their own option.
    """
    folder = RunFolder(out)
    keys = recipe_files.absolute(values)
    import_torch()
    # What is missing is said now and not after minutes of training.
    for package in ("matplotlib", "rich", "safetensors"):
        importlib.import_module(package)

    from gptkern.commands.display import RunDisplay, new_console
    from gptkern.training.adapting import Adaptation
    from gptkern.training.devices import resolve_device
    from gptkern.training.memory import return_freed
    from gptkern.training.process_state import CUBLAS_WORKSPACE, FIXED_WORKSPACES
    from gptkern.training.run import Keeping, train

    device = str(resolve_device(values["device"]))
    goes_on = args.resume and any(folder.place(CHECKPOINTS).glob("step-*"))
    if values["examples"] is not None:
        store, changes = _examples(values, out if goes_on else None, names)
        values, keys = values | changes, keys | changes
        pending += store.notes
    else:
        store = store_of(values)
    labels = store.labels if values["head"] else ()
    adaptation = Adaptation(values["lora"], values["lora_alpha"] or 1.0, keys["from"] or "", labels)
    config, model, length = _model(values, store, device, goes_on, names.get("from", "--from"))
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
            keys=keys, adaptation=adaptation, stop=came, watch=display.update, say=say,
        )  # fmt: skip
    # The terminal may be what went away.
    with contextlib.suppress(OSError):
        unit = "target" if values["examples"] is not None else "byte" if store.tokenizer.kind == "bytes" else "token"
        then = f"evaluate {args.out} --data FILE" if values["head"] else f"generate {args.out}"
        say(_ending(args.command, args.out, outcome, recipe.steps, unit, then))
    return 0 if outcome.finished else INTERRUPTED


def _examples(values: dict[str, Any], run: Path | None, names: dict[str, str]) -> tuple[ExampleStore, dict[str, Any]]:
    """(the examples as the model's tokens, the keys that they decide)

    Args:
        run: the folder of one that goes on from its own checkpoint.
    """
    from gptkern.training.data.example_rows import load_examples
    from gptkern.training.loading import reading

    folder, option = (values["from"], names.get("from", "--from")) if run is None else (run, "--out")
    config, tokenizer = reading(folder, option)
    length = values["context"] or config.context
    if length > config.context:
        raise UserError(f"--context {length} is longer than the model's, {config.context}")
    held_out = {} if values["held_out"] is None else {"held_out": values["held_out"]}
    store = load_examples(
        values["examples"], tokenizer, length, validation=values["validation"],
        option=names.get("examples", "--examples"), head=values["head"], **held_out,
    )  # fmt: skip
    changes = recipe_files.counted(values, len(store.train))
    # No row is longer: neither has the memory to be there for one.
    changes["context"] = values["context"] or store.length
    return store, {name: changes[name] for name in ("steps", "epochs", "context")}


def store_of(values: dict[str, Any]) -> Source:
    if values["data"] is not None:
        from gptkern.training.data.store import Store

        return Store.open(values["data"])
    from gptkern.training.data import text

    # The shortest that a row of the preset's own context needs; of another model's the run says it.
    shortest = 2 if values["preset"] is None else configured(values["preset"], values["context"]).context + 1
    return text.text_store(text.load(values["text"], shortest=shortest))


def _model(
    values: dict[str, Any], store: Source, device: str, goes_on: bool, option: str
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
            values["from"], store.tokenizer, length=values["context"], dropout=values["dropout"], device=device,
            option=option, alone=values["lora"] is not None,
        )  # fmt: skip
        return config, lambda: load().model

    if goes_on:
        # From a checkpoint, with its length: the folder is not asked for.
        return None, lambda: found()[1](), values["context"]
    config, load = found()
    return config, load, values["context"] or config.context


def _ending(command: str, out: str, outcome: Outcome, steps: int, unit: str, then: str) -> str:
    from gptkern.training.checkpoints import Checkpoint

    # Of a run that was interrupted in a spike it is an earlier one.
    step = outcome.step if outcome.checkpoint is None else Checkpoint(outcome.checkpoint).step
    there = f"the checkpoint of step {step} is in {outcome.checkpoint}"
    if not outcome.finished:
        if outcome.checkpoint is None:
            return f"interrupted at step {outcome.step} of {steps}: {shown(out)} is as it was"
        return f"interrupted at step {outcome.step} of {steps}: {there}   (gptkern {command} --resume --out {out})"
    loss = "" if outcome.validation_loss is None else f"validation loss {outcome.validation_loss:.4f} nats per {unit}\n"
    done = f"{steps} updates are done" if outcome.step == steps else f"{outcome.step} of {steps} updates are done"
    return f"{loss}{done}: {there}   (gptkern {then})"
