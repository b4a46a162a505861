"""`gptkern train`: the reference GPT on a text file or on a folder of tokens, into a run's folder."""

from __future__ import annotations

import argparse

from gptkern.commands import places, runs
from gptkern.commands.options import add_recipe_arguments
from gptkern.training import recipe_files
from gptkern.training.run_folder import RunFolder

SUMMARY = "train the reference GPT on a text or on tokens, into a run's folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs.add_folder_arguments(parser, "out/train")
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    out = places.folder("--out", args.out)
    values, pending = runs.values_of(args, RunFolder(out), recipe_files.of_options(vars(args)))
    return runs.train_in(args, out, values, pending, {})
