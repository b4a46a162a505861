"""`gptkern generate`: text from a model's folder, on stdout as it is drawn."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

import gptkern
from gptkern import formatting
from gptkern.commands import INTERRUPTED, UserError, places
from gptkern.commands.interrupts import import_torch, interruptible
from gptkern.commands.options import add_machine_arguments, real, resolved_dtype, whole
from gptkern.formatting import shown

if TYPE_CHECKING:
    import torch

    from gptkern.training.data.tokenizers import Tokenizer
    from gptkern.training.loading import Loaded

SUMMARY = "generate text from a run or a model's folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    temperature = real("of at least 0", lambda number: number >= 0)
    top_k = whole(1, hint="; the number of tokens of the model, or more, leaves none out")
    parser.add_argument(
        "model", metavar="FOLDER",
        help="a run, one of its checkpoints, what `gptkern demo` or `gptkern export` wrote, or a GPT-2 of transformers",
    )  # fmt: skip
    parser.add_argument("--prompt", default="The ", help="what the text begins with")
    parser.add_argument(
        "--tokens", type=whole(0), default=400, help="the most to generate; the end of a text is the end"
    )
    parser.add_argument("--temperature", type=temperature, default=0.7, help="0 takes the likeliest token each time")
    parser.add_argument("--top-k", type=top_k, default=20, help="draw from the k likeliest tokens")
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers first")
    parser.add_argument("--stock", action="store_true", help="leave the model on PyTorch's operators")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if not args.prompt:
        raise UserError("--prompt is empty; it needs at least one character")
    places.named("FOLDER", args.model, "a folder that `gptkern train` or `gptkern export` wrote")
    import_torch()

    import torch

    from gptkern.training import loading, model_files
    from gptkern.training.devices import resolve_device
    from gptkern.training.precision import autocast

    device = resolve_device(args.device)
    _check_text(args.prompt)
    loaded = loading.load_model(args.model, device)
    name = f"FOLDER {shown(args.model)}"
    tokenizer = loading.with_tokenizer(loaded, name)
    ids = _encoded(args.prompt, tokenizer, device)
    model_files.check_finite(loaded.model, name)
    say_passed_over("generate", loaded)
    if not args.stock:
        gptkern.swap(loaded.model)
    if args.int8:
        gptkern.quantize(loaded.model)
    precision = {"float32": "fp32", "bfloat16": "bf16"}[resolved_dtype(args.dtype, device)]
    generator = torch.Generator(device).manual_seed(args.seed)
    # A character's bytes, or the tokens that they are in, come one by one.
    decoder = tokenizer.decoder()
    begun = "".join(decoder.feed(token) for token in ids[0].tolist())
    # Bytes may go on in the middle of a character; of other tokens the prompt may not be what they are written as.
    print(begun if tokenizer.kind == "bytes" else args.prompt, end="", flush=True)
    count, ended, interrupted, start = 0, False, False, time.perf_counter()
    try:
        with interruptible(), autocast(device, precision):
            for drawn in loaded.model.stream(ids, args.tokens, args.temperature, args.top_k, generator):
                token = int(drawn)
                if token == tokenizer.end_of_text:
                    ended = True
                    break
                print(decoder.feed(token), end="", flush=True)
                count += 1
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    print(decoder.end(), flush=True)
    of = f" of {args.tokens}, interrupted" if interrupted else ", then the end of the text," if ended else ""
    print(f"[{formatting.count(count, 'token')}{of} in {seconds:.2f} s on {device}]", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def say_passed_over(command: str, loaded: Loaded) -> None:
    """What is damaged of a run is said, where an older checkpoint is taken in its place."""
    for line in loaded.about.get("passed_over", ()):
        print(f"gptkern {command}: passed over: {line}; step {loaded.about['step']} is taken", file=sys.stderr)


def _check_text(prompt: str) -> None:
    """Raises UserError where a prompt is no text and no bytes: it has surrogates that stand for nothing."""
    try:
        prompt.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError:
        raise UserError(f"--prompt {shown(prompt)}: it needs to be text, or bytes") from None


def _encoded(prompt: str, tokenizer: Tokenizer, device: torch.device) -> torch.Tensor:
    """(1, tokens), int64, of a prompt."""
    import torch

    try:
        ids = tokenizer.encode(prompt)
    except UnicodeError:
        raise UserError(
            f"--prompt {shown(prompt)}: it needs to be text; tokens by {tokenizer.name} are no bytes"
        ) from None
    if not len(ids):
        raise UserError(f"--prompt {shown(prompt)}: none of it is a token by {tokenizer.name}; it needs one at least")
    return torch.tensor([ids.tolist()], device=device)
