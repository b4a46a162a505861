"""`gptkern grow`: a larger model that computes what a smaller one does."""

from __future__ import annotations

import argparse
import sys

from gptkern.commands import RunError, UserError, places
from gptkern.commands.interrupts import import_torch, uninterrupted
from gptkern.commands.options import positive, seed
from gptkern.formatting import shown

SUMMARY = "widen and deepen a model so that it computes the same, to train it on"

# Of the largest logit: what rounding makes of it is a thousand times less, and any mistake more.
WRONG = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="CHECKPOINT", help="a run, one of its checkpoints, or a model's folder")
    parser.add_argument("--width", type=positive, metavar="W", help="size of a token's vector (default: the model's)")
    parser.add_argument("--layers", type=positive, metavar="L", help="number of blocks (default: the model's)")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the larger model goes")
    parser.add_argument("--seed", type=seed, default=0, help="of what makes copies learn differently")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is in --out")


def run(args: argparse.Namespace) -> int:
    if args.width is None and args.layers is None:
        raise UserError("--width and --layers are not given; one of them is needed")
    places.named("CHECKPOINT", args.model, "a folder that `gptkern train` or `gptkern export` wrote")
    out = places.folder("--out", args.out)
    import_torch()

    import torch

    from gptkern.commands.generate import say_passed_over
    from gptkern.training import exporting, growing, loading, memory, model_files

    exporting.check_target(out, args.overwrite)
    config, load = loading.opened(args.model, option="CHECKPOINT")
    try:
        larger = growing.grown(config, args.width, args.layers)
    except ValueError as error:
        raise UserError(f"--{error}") from None
    growing.check_memory(config, larger)
    places.room("--out", out, memory.FLOAT32 * memory.parameter_count(larger))
    loaded = load()
    model_files.check_finite(loaded.model, f"CHECKPOINT {shown(args.model)}")
    say_passed_over("grow", loaded)
    try:
        made = growing.grow(loaded.model, args.width, args.layers, torch.Generator().manual_seed(args.seed))
    except ValueError as error:
        raise UserError(f"CHECKPOINT {shown(args.model)}: {str(error).removeprefix('grow: ')}") from None
    apart, largest = growing.difference(loaded.model, made)
    if not apart <= WRONG * largest:
        raise RunError(f"the larger model's logits differ by {apart:g} of {largest:g}; nothing was written")
    was = {"width": config.width, "layers": config.layers, "heads": config.heads, "seed": args.seed}
    loaded = loaded._replace(model=made, about={**loaded.about, "grown": was})
    with uninterrupted():
        exporting.export(loaded, out, overwrite=args.overwrite)
    for words, sizes in (("from", config), ("to", larger)):
        count = memory.parameter_count(sizes)
        print(f"{words:4} {sizes.layers} layers, width {sizes.width}, {sizes.heads} heads: {count:,} parameters")
    print(f"logits differ by at most {apart:.2g}, and the largest is {largest:.3g}")
    print(f"model: {args.out}   (gptkern train --from {args.out} …)")
    if loaded.tokenizer is None:
        print(f"no tokenizer: {args.model} has none, and --from needs one", file=sys.stderr)
    return 0
