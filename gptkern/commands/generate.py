"""`gptkern generate`: text from a checkpoint folder, on stdout."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import gptkern
from gptkern.commands import UserError
from gptkern.commands.options import add_machine_arguments, resolved_dtype

SUMMARY = "generate text from a checkpoint folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="FOLDER", help="what `gptkern train` or `gptkern demo` wrote")
    parser.add_argument("--prompt", default="The ", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=400, help="bytes to generate")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest byte each time")
    parser.add_argument("--top-k", type=int, default=20, help="draw from the k likeliest bytes")
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers first")
    parser.add_argument("--stock", action="store_true", help="leave the model on PyTorch's operators")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise UserError("--prompt is empty; it needs at least one character")
    import torch

    from gptkern.commands import checkpoints, text, training

    device = training.resolve_device(args.device)
    model = checkpoints.load(Path(args.checkpoint), device)
    if not args.stock:
        gptkern.swap(model)
    if args.int8:
        gptkern.quantize(model)
    recipe = training.Recipe(
        steps=0, batch=1, length=1, lr=0.0, device=str(device), dtype=resolved_dtype(args.dtype, device)
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    start = time.perf_counter()
    try:
        with training.autocast(recipe):
            ids = model.generate(text.encode(args.prompt, device), args.tokens, args.temperature, args.top_k, generator)
    except ValueError as error:
        raise UserError(str(error)) from error
    seconds = time.perf_counter() - start
    print(text.decode(ids[0]))
    print(f"[{args.tokens} bytes in {seconds:.2f} s on {device}]", file=sys.stderr)
    return 0
