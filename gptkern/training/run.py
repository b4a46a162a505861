"""A training with a folder: what it did so far can be killed at any moment, and goes on bit for bit.

    for each update:      a line of metrics.jsonl
    evaluate_every:       the held-out loss, in the line of that update
    save_every:           the lines until then are on the disk first, then a checkpoint is written beside the training

So a checkpoint of step N has all lines up to N beside it; a run that goes on from it cuts off the later ones.

What ends a run early leaves the newest checkpoint as it is. A signal, a full disk, damaged data or a terminal that went
away first save what was done until then, unless its last losses are far above those before them; a loss that is no
number saves nothing, and losses that stay far above, or are so at the end, neither.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gptkern import formatting
from gptkern.formatting import shown
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import board, memory, metrics, model_files, mup, recipe_files
from gptkern.training.adapting import Adaptation
from gptkern.training.checkpoints import Checkpoint, Checkpoints
from gptkern.training.data.store import Source
from gptkern.training.errors import UserError
from gptkern.training.loop import Trainer, new_model
from gptkern.training.recipe import Recipe
from gptkern.training.run_folder import RunFolder
from gptkern.training.run_records import Keeping, Outcome, Progress
from gptkern.training.running import Run, finished, report
from gptkern.training.stopping import Waiting, best_of
from gptkern.version import __version__

__all__ = ["Keeping", "Outcome", "Progress", "train"]

# Bytes of a parameter in a checkpoint: float32, and AdamW's two averages.
CHECKPOINT_BYTES = 12


def train(
    recipe: Recipe,
    store: Source,
    out: str | Path,
    *,
    config: GPTConfig | None = None,
    model: Callable[[], GPT] | GPT | None = None,
    swap: bool = True,
    keeping: Keeping | None = None,
    resume: bool = False,
    overwrite: bool = False,
    keys: Mapping[str, Any] | None = None,
    adaptation: Adaptation | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train a model into a run's folder, from the start or from the folder's newest whole checkpoint.

    Args:
        out: the run's folder. store: the tokens.
        config: of a new model, whose first weights the recipe's seed draws. model: one that has weights, in its place,
            or what returns it; beside a function `config` is of what it returns, which is then called once the memory
            is seen to suffice. A run that goes on from a checkpoint asks for neither, but with LoRA for the model.
        swap: run the model on gptkern's operators. keeping: checkpoints, evaluations, when a run ends itself.
        resume: go on with the run in the folder. overwrite: take the place of one, once there is a checkpoint.
        keys: more of what recipe.toml shall hold. adaptation: what is added to the model, adapters or a head.
        stop: asked after each update; once it is true the run ends, with a checkpoint of that step.
        watch: called after each look at the device's numbers. say: lines for people.

    Raises:
        UserError: something does not fit, or the folder may not be written to; nothing was changed.
        RunError: the run could not be brought to its end; the message says where the newest checkpoint is. Diverged: a
            loss was no finite number, or far above those before it.
    """
    _check_alone()
    folder, keeping, adaptation = RunFolder(out), keeping or Keeping(), adaptation or Adaptation()
    before = torch.get_num_threads()
    has_board = board.wanted(keeping.tensorboard)
    recipe = _checked(folder, recipe, swap, resume, overwrite)
    if overwrite and adaptation.rank is not None and Path(out).resolve() in _and_around(Path(adaptation.base)):
        raise UserError(
            f"--overwrite: {folder.option} {folder} holds the model that the adapters are for, without which they are "
            f"none; it needs another {folder.option}"
        )
    torch.set_num_threads(recipe.threads)
    try:
        with folder.locked():
            checkpoints = Checkpoints(folder.checkpoints, keeping.keep)
            # Another program may have been here before the lock was this one's.
            recipe = _checked(folder, recipe, swap, resume, overwrite)
            if mended := folder.mend():
                say(mended)
            folder.sweep()
            start = _start(folder, checkpoints, store, say) if resume else None
            config, made = _model(folder, config, model, start, resume, adaptation.rank is not None)
            stored = _stored(keys or {}, recipe, keeping, config, swap)
            if start is not None and (outcome := _finished(folder, start, recipe, keeping)) is not None:
                if keeping.report and not _is_reported(folder, start):
                    report(folder, store, config, stored, finished(recipe.steps, start.step, best_of(start)))
                return outcome
            if recipe.mup is not None:
                _check_mup(config, recipe.mup, made)
            check_rows(store, recipe)
            preset = stored.get("preset")
            adaptation.check(config)
            learning = adaptation.learns(config, memory.parameter_count(config))
            need = memory.check(
                config, recipe, name=preset and f"--preset {preset}", swapped=swap,
                learning=None if adaptation.rank is None else learning,
            )  # fmt: skip
            _check_room(folder, learning, stored, checkpoints)
            if made is not None and not isinstance(made, torch.nn.Module):
                made = made()
                if made.config != config:
                    raise ValueError(f"train: config is {config}; it needs to be the model's, {made.config}")
            for line in _other_versions(start):
                say(line)
            say(f"{_described(config, store, stored, adaptation.described(learning))}\n{need.described()}")
            if made is None:
                made = new_model(config, recipe.seed, recipe.device, base_width=recipe.mup)
            adapted = adaptation.add(made, recipe.seed)
            if start is not None and adaptation.rank is not None:
                said = start.about.get("lora")
                if not isinstance(said, dict) or said.get("digest") != adapted["lora"]["digest"]:
                    raise UserError(
                        f"the model in {shown(adaptation.base)} is not the one that the run in {folder} began with"
                    )
            if swap:
                from gptkern.swapping import swap as swapped

                say(str(swapped(made)))
            trainer = Trainer(made, store, recipe)
            try:
                run = Run(folder, trainer, checkpoints, keeping, stored, has_board, (stop, watch, say), adapted)
                return run.go(start, resume)
            finally:
                trainer.close()
    finally:
        torch.set_num_threads(before)


# --- Before the first update ------------------------------------------------------------------------------------------


def _and_around(folder: Path) -> list[Path]:
    """A folder, without symbolic links, and those that it is in."""
    found = folder.resolve()
    return [found, *found.parents]


def _check_alone() -> None:
    """A run's lines, its lock and its decisions to end are one process's."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"train: torch.distributed has {dist.get_world_size()} processes; a run needs to be one: "
            "gptkern.training.loop.Trainer and gptkern.training.checkpoints.Checkpoints take several"
        )


def _checked(folder: RunFolder, recipe: Recipe, swap: bool, resume: bool, overwrite: bool) -> Recipe:
    """The recipe with its number of threads, once the folder may be trained in."""
    if not resume:
        folder.check_free(overwrite)
        return dataclasses.replace(recipe, threads=recipe.threads or torch.get_num_threads())
    given = folder.stored()
    stored = recipe_files.completed(given)
    if given.values.get("stock") is swap:
        raise UserError(f"swap is {swap}; the run in {folder} began with {not swap}")
    for field in dataclasses.fields(Recipe):
        name = "context" if field.name == "length" else field.name
        ours, theirs = getattr(recipe, field.name), stored[name]
        if recipe_files.KEYS[name].resume == recipe_files.SAME and ours != theirs:
            raise UserError(f"{name} is {shown(str(ours))}; the run in {folder} began with {shown(str(theirs))}")
    return dataclasses.replace(recipe, threads=recipe.threads or stored["threads"] or torch.get_num_threads())


def _start(folder: RunFolder, checkpoints: Checkpoints, store: Source, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None where the run has none yet."""
    start, damaged = checkpoints.newest()
    for line in damaged:
        say(f"passed over a damaged checkpoint: {line}")
    if start is None:
        if damaged:
            raise UserError(f"--resume: {folder.option} {folder} has no whole checkpoint ({damaged[0]})")
        say("there is no checkpoint yet: from the first update")
        return None
    data = start.about.get("data")
    if not isinstance(data, dict) or data.get("fingerprint") != store.fingerprint:
        name = shown(str(data.get("name"))) if isinstance(data, dict) else "others"
        raise UserError(f"the data, {store.name}, are not what the run in {folder} is trained on: {name}")
    return start


def _other_versions(start: Checkpoint | None) -> list[str]:
    """A warning where the checkpoint was computed by other versions, which may round in another way."""
    before = start.about.get("versions") if start is not None else None
    if not isinstance(before, dict):
        return []
    ours = {"gptkern": __version__, "torch": str(torch.__version__)}
    others = {name: str(before.get(name)) for name, now in ours.items() if before.get(name) != now}
    if not others:
        return []
    here = ", ".join(f"{name} is {ours[name]} from here on, and was {shown(was)}" for name, was in others.items())
    return [f"{here}: the rest is not bit for bit what the run would have been"]


def _finished(folder: RunFolder, start: Checkpoint, recipe: Recipe, keeping: Keeping) -> Outcome | None:
    """How a run ended that has done all of its updates, the last evaluation included, or waited long enough."""
    waiting = Waiting(keeping.patience)
    waiting.take_up(start, metrics.lines(folder.metrics))
    if start.step < recipe.steps and not waiting.is_over:
        return None
    last = collections.deque(metrics.lines(folder.metrics), maxlen=1)
    if last and last[0]["step"] >= start.step and "validation_loss" not in last[0]:
        return None
    if (best := waiting.best) is not None:
        return Outcome(start.step, True, best.loss, folder.checkpoints / f"step-{best.step:08}")
    return Outcome(start.step, True, last[0].get("validation_loss") if last else None, start.folder)


def _is_reported(folder: RunFolder, start: Checkpoint) -> bool:
    """Whether the report is younger than the last checkpoint: it is what comes after it."""
    with contextlib.suppress(OSError):
        return folder.report.stat().st_mtime_ns >= start.folder.stat().st_mtime_ns
    return False


def _model(folder, config, model, start, resume, with_base) -> tuple[GPTConfig, Callable[[], GPT] | GPT | None]:
    """The sizes of what is trained, and the model, or what returns it, where its weights are from elsewhere than a
    checkpoint of the run; `with_base`: those of a checkpoint are adapters.
    """
    if start is not None:
        of = _config_of(start)
        if config is not None and config != of:
            raise UserError(f"the run in {folder} is of a model of other sizes: {of}")
        if with_base and model is None:
            raise UserError(f"the run in {folder} is of adapters; to go on it needs the model that they are for")
        return of, model if with_base else None
    if resume and config is None and model is None:
        raise UserError(
            f"the run in {folder} has no checkpoint yet, and {folder.recipe.name} does not say the sizes of its model: "
            "go on with it from Python, where they were given"
        )
    is_late = config is not None and model is not None and not isinstance(model, torch.nn.Module)
    if is_late:
        return config, model
    if (config is None) == (model is None):
        raise ValueError("train: it needs one of config and model")
    made = model if model is None or isinstance(model, torch.nn.Module) else model()
    return config or made.config, made


def _config_of(start: Checkpoint) -> GPTConfig:
    with model_files.refused(shown(str(start.folder))):
        return model_files.sizes(start.about.get("config") or {}, "about.json")


def _check_mup(config: GPTConfig, base_width: int, made: Any) -> None:
    mup.check(config, base_width)
    if made is not None:
        raise UserError(f"mup is {base_width}; it needs config alone: µP is of a model's first weights too")


def check_rows(store: Source, recipe: Recipe) -> None:
    """Whether each split has a row."""
    store.rows(recipe.length, recipe.seed)
    store.held_out(recipe.length, 1)


def _check_room(folder: RunFolder, learning: int, stored: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """A new checkpoint is written before the oldest goes."""
    saves = math.ceil(stored["steps"] / stored["save_every"])
    kept = stored["keep"] + 1 + (stored.get("patience") is not None)
    more = max(1, min(saves, kept) - len(checkpoints.all()))
    needed = more * CHECKPOINT_BYTES * learning
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise UserError(
            f"{folder.option} {folder}: {formatting.count(more, 'checkpoint')} need {formatting.size(needed)} on the "
            f"disk and there are {formatting.size(free)}"
        )


def _described(config: GPTConfig, store: Source, stored: Mapping[str, Any], adapted: str) -> str:
    keys = ", ".join(recipe_files.text(stored).splitlines())
    return (
        f"{stored.get('preset') or 'model'}: {memory.parameter_count(config):,} parameters, {stored['precision']} on "
        f"{stored['device']}; {store.amount}\n{adapted and adapted + chr(10)}"
        f"recipe: {keys}"
    )


def _every(updates: int | None, recipe: Recipe) -> int:
    return updates or max(1, recipe.steps // 10)


def _stored(keys: Mapping[str, Any], recipe: Recipe, keeping: Keeping, config: GPTConfig, swap: bool) -> dict[str, Any]:
    """What recipe.toml holds: all that was decided."""
    found = dict(keys) | dataclasses.asdict(recipe) | dataclasses.asdict(keeping)
    found |= {"context": recipe.length, "dropout": config.dropout, "stock": not swap}
    for name in ("save_every", "evaluate_every"):
        found[name] = _every(found[name], recipe)
    return {name: found[name] for name in recipe_files.KEYS if name in found}
