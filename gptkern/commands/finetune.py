"""`gptkern finetune`: a model learns from examples, into a run's folder."""

from __future__ import annotations

import argparse
import os

from gptkern.commands import UserError, places, runs
from gptkern.commands.options import add_recipe_arguments
from gptkern.training import recipe_files
from gptkern.training.recipe_files import Given
from gptkern.training.run_folder import RunFolder

SUMMARY = "fine-tune a model on examples: prompts and completions, labels, translations, texts"

# What is of new models, and what has another name here.
OTHERS = {"text", "data", "examples", "from", "preset", "layers", "width", "heads", "mup"}
NAMES = {"examples": "--data", "from": "CHECKPOINT"}
# Learning rate, batch and epochs of Radford et al., "Improving Language Understanding by Generative Pre-Training",
# 2018, section 4.1. An evaluation looks at enough rows for two of them to be told apart.
DEFAULTS = {"lr": 6.25e-5, "batch": 32, "epochs": 3, "evaluate_rows": 256}
# Adapters want about ten times the learning rate (Schulman et al., "LoRA Without Regret", 2025).
LORA_LR = 10 * DEFAULTS["lr"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT",
        help="the folder of a run, of a model that gptkern exported, or of a GPT-2 as transformers saves it",
    )  # fmt: skip
    parser.add_argument(
        "--data", dest="examples", metavar="FILE",
        help="JSONL of {text}, {prompt, completion}, {text, label} or {source, target}, TACRED's JSON, or two parallel "
        "texts with a comma between; plain, gzip or zstd",
    )  # fmt: skip
    runs.add_folder_arguments(parser, "out/finetune")
    add_recipe_arguments(parser, without=OTHERS, defaults=DEFAULTS | {"steps": None})


def run(args: argparse.Namespace) -> int:
    out = places.folder("--out", args.out)
    given = recipe_files.of_options(vars(args))
    given = Given(dict(given.values), given.names | NAMES)
    if args.checkpoint is not None:
        # As a run stores it, so that one that goes on can be asked for in the same words.
        given.values["from"] = os.path.abspath(args.checkpoint) if args.checkpoint else ""
    folder = RunFolder(out)
    if not args.resume and args.recipe is None:
        for name, words in (("from", "the folder of a model"), ("examples", "a file of examples")):
            if name not in given.values:
                raise UserError(f"{NAMES[name]} is missing; it needs {words}, or --resume a run's --out")
    own = DEFAULTS | ({} if args.lora is None else {"lr": LORA_LR})
    defaults = Given(own, dict.fromkeys(own, "a default of gptkern finetune"))
    values, pending = runs.values_of(args, folder, given, defaults)
    for name, words in NAMES.items():
        if values[name] is None:
            raise UserError(f"{words} is missing: the run in {folder} is one of `gptkern train`" if args.resume else
                            f"{words} is missing; neither the command line nor --recipe says it")  # fmt: skip
    return runs.train_in(args, out, values, pending, NAMES)
