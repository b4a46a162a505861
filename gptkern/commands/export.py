"""`gptkern export`: a model as other programs read it, in transformers' GPT-2 layout."""

from __future__ import annotations

import argparse

from gptkern import formatting
from gptkern.commands import places
from gptkern.commands.interrupts import import_torch, uninterrupted

SUMMARY = "write a run's model as safetensors that transformers loads"

# The keys of training.exporting.DTYPES once more: that module imports PyTorch, and `--help` does not wait for it.
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FOLDER", help="a run, one of its checkpoints, or a model's folder")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the model goes")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument(
        "--byte-planes", action="store_true",
        help="the same weights in a smaller file, which `gptkern` reads (--from, generate, export) and others do not",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the model that is in --out")


def run(args: argparse.Namespace) -> int:
    places.named("FOLDER", args.model, "a folder that `gptkern train` wrote, or a model's")
    out = places.folder("--out", args.out)
    import_torch()

    from gptkern.commands.generate import say_passed_over
    from gptkern.training import exporting, loading

    exporting.check_target(out, args.overwrite)
    loaded = loading.load_model(args.model)
    say_passed_over("export", loaded)
    with uninterrupted():
        done = exporting.export(loaded, out, args.dtype, planes=args.byte_planes, overwrite=args.overwrite)
    sizes = f"{done.parameters:,} parameters, {done.dtype}, {formatting.size(done.stored)}"
    if args.byte_planes:
        print(f"{sizes} in byte planes: {done.ratio:.3f} × the {formatting.size(done.raw)} of the weights as they are")
        print(f"model: {args.out}   (gptkern generate {args.out})")
    else:
        print(sizes)
        kind = "SequenceClassification" if "labels" in loaded.about else "CausalLM"
        print(f'model: {args.out}   (AutoModelFor{kind}.from_pretrained("{args.out}"))')
    if loaded.tokenizer is None:
        print(f"no tokenizer: {args.model} has none")
    return 0
