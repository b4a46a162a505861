"""`gptkern generate`: text from a checkpoint folder, on stdout as it is drawn."""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from pathlib import Path

import gptkern
from gptkern.commands import INTERRUPTED, UserError, places
from gptkern.commands.interrupts import import_torch, interruptible
from gptkern.commands.options import add_machine_arguments, real, resolved_dtype, whole
from gptkern.formatting import shown

SUMMARY = "generate text from a checkpoint folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    temperature = real("of at least 0", lambda number: number >= 0)
    top_k = whole(1, hint="; 256, the number of bytes, leaves none out")
    parser.add_argument("checkpoint", metavar="FOLDER", help="what `gptkern train` or `gptkern demo` wrote")
    parser.add_argument("--prompt", default="The ", help="what the text begins with")
    parser.add_argument("--tokens", type=whole(0), default=400, help="bytes to generate")
    parser.add_argument("--temperature", type=temperature, default=0.7, help="0 takes the likeliest byte each time")
    parser.add_argument("--top-k", type=top_k, default=20, help="draw from the k likeliest bytes; 256 are all")
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers first")
    parser.add_argument("--stock", action="store_true", help="leave the model on PyTorch's operators")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise UserError("--prompt is empty; it needs at least one character")
    import_torch()
    folder = _folder(args.checkpoint)
    import torch

    from gptkern.commands import checkpoints, text, training

    device = training.resolve_device(args.device)
    try:
        ids = text.encode(args.prompt, device)
    except UnicodeEncodeError:
        raise UserError(f"--prompt {shown(args.prompt)}: it needs to be text, or bytes") from None
    model = checkpoints.load(folder, device)
    _check(model, args.checkpoint)
    if not args.stock:
        gptkern.swap(model)
    if args.int8:
        gptkern.quantize(model)
    recipe = training.Recipe(
        steps=0, batch=1, length=1, lr=0.0, device=str(device), dtype=resolved_dtype(args.dtype, device)
    )
    generator = torch.Generator(device).manual_seed(args.seed)
    # A character's bytes come one by one.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(decoder.decode(bytes(ids[0].tolist())), end="", flush=True)
    count, interrupted, start = 0, False, time.perf_counter()
    try:
        with interruptible(), training.autocast(recipe):
            for token in model.stream(ids, args.tokens, args.temperature, args.top_k, generator):
                print(decoder.decode(bytes(token[0].tolist())), end="", flush=True)
                count += 1
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    print(decoder.decode(b"", final=True), flush=True)
    of = f" of {args.tokens}, interrupted" if interrupted else ""
    print(f"[{count} bytes{of} in {seconds:.2f} s on {device}]", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _folder(name: str) -> Path:
    """The folder; where what is asked for is not a checkpoint and the one beside it is, that is said."""
    from gptkern.commands import checkpoints

    folder = places.named("FOLDER", name, "a folder that `gptkern train` or `gptkern demo` wrote")
    within = folder.parent if folder.is_file() else folder / "checkpoint"
    if not checkpoints.held(folder) and checkpoints.held(within):
        raise UserError(f"FOLDER {shown(name)} is no checkpoint; did you mean {within}?")
    return folder


def _check(model, name: str) -> None:
    """Whether text can come out of it."""
    from gptkern.models.gpt import BYTES

    if model.config.vocab_size != BYTES:
        tokens = model.config.vocab_size
        raise UserError(f"FOLDER {shown(name)} is a model of {tokens} tokens; it needs one of {BYTES}, which are bytes")
    for key, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(f"FOLDER {shown(name)} holds NaN or an infinity in {key}: its training has failed")
