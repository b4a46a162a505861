"""`gptkern search`: the recipe that learns a text best, by experience, by experiment and by learning."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkern import formatting
from gptkern.commands import INTERRUPTED, RunError, UserError, places
from gptkern.commands.interrupts import import_torch, noted
from gptkern.commands.options import add_recipe_arguments, positive, typed
from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.search.settings import BUDGETS, METHODS, PRUNERS, SAMPLERS, Settings
from gptkern.training.search.space import VARIED, Space, default
from gptkern.training.search.study import BEST, ENDED, FILE, WAYS, Study, best, taken
from gptkern.training.values import Whole

if TYPE_CHECKING:
    from gptkern.training.data.store import Store

SUMMARY = "search for the recipe that learns a text best, by experience, experiment and learning"

MOST_WORKERS = 256
# Of a study, and their defaults; None where one is not given, so that --resume can refuse it.
_OF_A_STUDY = {
    "eta": 2, "rungs": 4, "method": "random", "points": 4, "sampler": "tpe", "startup": 8, "pruner": "median",
}  # fmt: skip
# Keys that a trial decides by itself, and those of a training that starts from a model.
_OF_A_TRIAL = ("save_every", "keep", "evaluate_every", "patience")
_OF_ANOTHER = ("from", "examples", "validation", "held_out", "epochs", "lora", "lora_alpha", "head")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="STUDY", default="out/search", help="the study's folder")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the study in --out, or help another command with it"
    )
    parser.add_argument(
        "--way", choices=(*WAYS, "all"), metavar="NAME", help=f"{', '.join(WAYS)} or all (default: all)"
    )
    parser.add_argument("--trials", type=positive, metavar="N", help="budget of each way, in trials (default: 16)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="budget of each way, in tokens trained on")
    parser.add_argument("--minutes", type=positive, metavar="M", help="budget of each way, in minutes of training")
    parser.add_argument(
        "--workers",
        type=typed(Whole(1, MOST_WORKERS)),
        metavar="N",
        default=1,
        help="trials at once, each in a process of its own",
    )
    parser.add_argument("--space", metavar="FILE", help="TOML with the keys that are varied, and their values")
    parser.add_argument(
        "--vary", metavar="KEY=VALUES", action="append",
        help=f"vary a key: lr=1e-4:1e-2:log, batch=8,16,32, width=64:256:64; keys: {', '.join(VARIED)}",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=METHODS, metavar="NAME", help="of the experiment: random or grid (default: random)"
    )
    parser.add_argument(
        "--points", type=typed(Whole(1, 1000)), metavar="N", help="values of a range in the grid, at most (default: 4)"
    )
    parser.add_argument(
        "--eta", type=typed(Whole(2, 64)), metavar="N", help="halving lets one trial in N go on at a rung (default: 2)"
    )
    parser.add_argument(
        "--rungs", type=typed(Whole(1, 13)), metavar="N", help="of halving, the end among them (default: 4)"
    )
    parser.add_argument(
        "--sampler", choices=SAMPLERS, metavar="NAME", help="Optuna's, of learning: tpe or gp (default: tpe)"
    )
    parser.add_argument(
        "--startup",
        type=positive,
        metavar="N",
        help="random trials before the sampler and the pruner begin (default: 8)",
    )
    parser.add_argument(
        "--pruner", choices=PRUNERS, metavar="NAME", help="Optuna's, of learning: median or none (default: median)"
    )
    parser.add_argument("--recipe", metavar="FILE", help="TOML with what is not varied; options given here come first")
    parser.add_argument(
        "--rules", action="store_true", help="print what experience says, as a recipe with its reasons; train nothing"
    )
    parser.add_argument("--helper", action="store_true", help=argparse.SUPPRESS)
    add_recipe_arguments(parser, without=(*_OF_A_TRIAL, *_OF_ANOTHER))


def run(args: argparse.Namespace) -> int:
    out = places.folder("--out", args.out)
    settings = None
    if args.resume:
        _check_resumed(args)
        with Study(out) as study:
            settings = Settings.of(study.about)
        moved = _moved(args)
        values, ways = settings.base | moved, settings.ways
        sampler = settings.sampler
    else:
        moved = {}
        given = _given(args)
        values = recipe_files.absolute(recipe_files.completed(given))
        ways, sampler = _ways(args), _option(args, "sampler")
        space = _space(args, values, given)
        if os.path.lexists(out / FILE) and not args.rules:
            raise UserError(taken(out))
    if "learning" in ways and not args.rules:
        from gptkern.training.search import sampling

        sampling.check(sampler)
    import_torch()
    for package in ("matplotlib", "safetensors"):
        importlib.import_module(package)

    from gptkern.commands.runs import store_of
    from gptkern.training.memory import return_freed
    from gptkern.training.search import working

    store = store_of(values)
    if settings is None:
        settings, advice = _settings(args, values, ways, space, given, store)
        if args.rules:
            print(advice, end="")
            return 0
    if settings.base["deterministic"]:
        from gptkern.training.process_state import CUBLAS_WORKSPACE, FIXED_WORKSPACES

        # cuBLAS reads it when the GPU is first used.
        os.environ.setdefault(CUBLAS_WORKSPACE, FIXED_WORKSPACES[0])
    return_freed(settings.recipe(settings.trial(0, "learning", {})))
    with Study(out) if args.resume else working.begin(out, settings, store) as study:
        working.check_data(study, store)
        if not args.helper:
            _say(_described(settings, store, study))
        with noted() as came, _helpers(args.workers - 1, out, moved) as helpers:
            is_alone = _parent_gone() if args.helper else came
            is_done = working.work(study, store, moved=moved, stop=lambda: came() or is_alone(), say=_say)
            failed = helpers(is_done)
        if not args.helper:
            _end(study, out, is_done, failed)
    return 0 if is_done else INTERRUPTED


def _say(line: str) -> None:
    # The terminal may be what went away.
    with contextlib.suppress(OSError):
        print(line, flush=True)


# --- What was given ---------------------------------------------------------------------------------------------------


def _check_resumed(args: argparse.Namespace) -> None:
    """Raises UserError where an option was given that would make it another study."""
    free = ("command", "out", "resume", "workers", "helper", "text", "data")
    for name, value in vars(args).items():
        if name not in free and value is not None and value is not False:
            raise UserError(
                f"--{name.replace('_', '-')} has no effect on --resume, which goes on with the study as it was begun"
            )
    _moved(args)


def _moved(args: argparse.Namespace) -> dict[str, Any]:
    """Where the data lie now."""
    given = recipe_files.of_options({"text": args.text, "data": args.data})
    if not given.values:
        return {}
    values = recipe_files.absolute(recipe_files.completed(given))
    return {name: values[name] for name in ("text", "data")}


def _given(args: argparse.Namespace) -> recipe_files.Given:
    given = recipe_files.of_options(vars(args))
    if args.recipe is not None:
        given = given.over(recipe_files.read(args.recipe))
    for name in _OF_ANOTHER:
        if name in given.values:
            raise UserError(f"{given.names[name]}: a search trains new models on a text alone")
    for name in _OF_A_TRIAL:
        if name in given.values:
            raise UserError(
                f"{given.names[name]} has no effect on a search: each part of a trial "
                "ends with an evaluation and a checkpoint (--rungs, --eta)"
            )
    return given


def _ways(args: argparse.Namespace) -> tuple[str, ...]:
    ways = WAYS if args.way in (None, "all") else (args.way,)
    needed = {
        "method": "experiment",
        "points": "experiment",
        "sampler": "learning",
        "startup": "learning",
        "pruner": "learning",
    }
    for name, way in needed.items():
        if getattr(args, name) is not None and way not in ways:
            raise UserError(f"--{name} has no effect on --way {args.way}")
    if args.points is not None and args.method != "grid":
        raise UserError("--points has no effect without --method grid")
    for name in ("space", "vary"):
        if getattr(args, name) is not None and ways == ("experience",):
            raise UserError(f"--{name} has no effect on --way experience")
    budgets = [name for name in BUDGETS if getattr(args, name) is not None]
    if len(budgets) > 1:
        raise UserError(f"{' and '.join('--' + name for name in budgets)}: a study has one of them")
    return ways


def _option(args: argparse.Namespace, name: str) -> Any:
    given = getattr(args, name)
    return _OF_A_STUDY[name] if given is None else given


def _space(args: argparse.Namespace, values: dict[str, Any], given: recipe_files.Given) -> Space:
    if args.way == "experience":
        return Space({})
    if args.space is None and args.vary is None:
        return default(values)
    parameters = {} if args.space is None else dict(Space.read(args.space).parameters)
    parameters |= Space.parsed(args.vary or []).parameters
    for key in parameters.keys() & given.values.keys():
        # Of the batch given the tokens of a trial are counted.
        if key != "batch":
            raise UserError(f"{given.names[key]} has no effect: {key} is varied")
    return Space(parameters)


def _settings(
    args: argparse.Namespace,
    values: dict[str, Any],
    ways: tuple[str, ...],
    space: Space,
    given: recipe_files.Given,
    store: Store,
) -> tuple[Settings, str]:
    """What the study is begun with, all of it decided and checked; and what experience says, as a recipe file."""
    import torch

    from gptkern.training.devices import resolve_device
    from gptkern.training.search import experience, trials

    kind = next((name for name in BUDGETS if getattr(args, name) is not None), BUDGETS[0])
    device = str(resolve_device(values["device"]))
    config = trials.config_of(values, store.tokenizer.vocab_size)
    precision = recipe_files.recipe_of(values, length=config.context, device=device).precision
    threads = values["threads"] or (
        torch.get_num_threads() if args.workers == 1 else max(1, (os.cpu_count() or 1) // args.workers)
    )
    base = values | {"device": device, "precision": precision, "threads": threads, "context": config.context}
    settings = Settings(
        base=base, length=config.context, space=space, ways=ways, kind=kind, amount=getattr(args, kind) or 16,
        seed=values["seed"], **{name: _option(args, name) for name in _OF_A_STUDY},
    )  # fmt: skip
    settings.check()
    chosen = _advised(settings, config, store, given)
    # What was given stands, unless it is varied.
    decided = ({*VARIED, "mup"} - given.values.keys()) | space.parameters.keys()
    advice = tuple(choice._asdict() for choice in chosen if choice.key in decided)
    return dataclasses.replace(settings, advice=advice), experience.text(
        chosen, {key: base[key] for key in given.values}
    )


def _advised(settings: Settings, config: Any, store: Store, given: recipe_files.Given) -> list[Any]:
    from gptkern.training.search import experience

    sizes = {
        "text": len(store.train),
        "length": settings.length,
        "device": settings.base["device"],
        "precision": settings.base["precision"],
    }
    batch = given.values.get("batch") if "batch" not in settings.space.parameters else None
    chosen = experience.choices(config, settings.tokens, batch=batch, **sizes)
    rows = experience.recipe(chosen)["batch"]
    if settings.steps(rows) < settings.parts or rows % settings.base["accumulate"]:
        # What suits so many tokens leaves too few updates to look at, or does not fall into the pieces that were given.
        chosen = experience.choices(config, settings.tokens, batch=settings.base["batch"], **sizes)
    return chosen


# --- Workers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _helpers(count: int, out: Path, moved: dict[str, Any]) -> Iterator[Callable[[bool], int]]:
    """So many more processes that work on the study. Yields what waits for them, and says how many failed.

    They end themselves when this process ends, however it does.
    """
    command = [sys.executable, "-m", "gptkern", "search", "--resume", f"--out={out}", "--helper"]
    command += [f"--{name}={value}" for name, value in moved.items() if value is not None]
    processes: list[subprocess.Popen] = []

    def ended(is_done: bool = False) -> int:
        """They come to the end of the study by themselves, or, where it is not to be done, of their updates."""
        if not is_done:
            for process in processes:
                process.stdin.close()
        return sum(process.wait() not in (0, INTERRUPTED) for process in processes)

    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
        yield ended
    finally:
        ended()


def _parent_gone() -> Callable[[], bool]:
    """Whether the process that started this one has ended, or wants this one to: its end of the pipe is closed."""
    gone = threading.Event()

    def read() -> None:
        # Not sys.stdin, whose lock this thread would hold when the interpreter ends.
        while os.read(0, 1):
            pass
        gone.set()

    threading.Thread(target=read, daemon=True, name="parent").start()
    return gone.is_set


# --- What is said -----------------------------------------------------------------------------------------------------


def _described(settings: Settings, store: Store, study: Study) -> str:
    space = ", ".join(f"{key} {_values(value)}" for key, value in settings.space.described().items())
    ended = sum(trial.state in ENDED for trial in study.trials())
    varied = f"\nvaried: {space}" if space else ""
    done = "1 trial is done" if ended == 1 else f"{ended} trials are done"
    goes_on = f"\n{done}" if ended else ""
    return (
        f"search by {', '.join(settings.ways)}: {settings.amount:,} {settings.kind} for each; a trial trains on "
        f"{settings.tokens:,} tokens of {store.name}, in {settings.parts} parts{varied}{goes_on}"
    )


def _values(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(str, value))
    return f"{value['low']:g} to {value['high']:g}"


def _end(study: Study, out: Path, is_done: bool, failed: int) -> None:
    from gptkern.training.run_folder import REPORT
    from gptkern.training.search import report

    found = study.trials()
    report.write(out / REPORT, study)
    the_best = best(found)
    if the_best is not None:
        loss = f"held-out loss {the_best.loss:.4f} nats per {report.unit_of(study.about)}"
        params = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in the_best.params.items()
        )
        _say(f"best: trial {the_best.number} ({the_best.way}), {loss}; {params}")
        _say(
            f"its checkpoint is in {out / (the_best.checkpoint or '')}, its recipe in {out / BEST}   "
            f"(gptkern train --recipe {out / BEST} --out run)"
        )
    _say(f"the ways side by side, importances and slices: {out / REPORT}")
    if failed:
        raise RunError(f"{failed} of the other workers failed: --resume --out {shown(str(out))} goes on with the study")
    if not is_done:
        trials = formatting.count(len(found), "trial")
        _say(f"interrupted: {shown(str(out))} holds {trials}   (gptkern search --resume --out {out})")
    elif the_best is None:
        raise RunError("no trial came to a held-out loss: see the lines above")
