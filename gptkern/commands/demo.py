"""`gptkern demo`: train a GPT stock and swapped, quantise it, generate, check the kernels, write a report."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time

from gptkern.commands import INTERRUPTED, places
from gptkern.commands.interrupts import import_torch, interruptible, uninterrupted
from gptkern.commands.options import PRESETS, above_zero, add_machine_arguments, duration, positive, some_duration

SUMMARY = "train a GPT stock and swapped, quantise it to int8, generate text, write a report"

SAMPLE_BYTES = 320


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="the text; Python's language reference where none is given")
    parser.add_argument("--out", metavar="FOLDER", default="out/demo", help="where the report and the checkpoint go")
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME", help="model; nano on a CPU, gpt2 on a GPU")
    parser.add_argument("--context", type=positive, help="tokens that the model sees at once")
    parser.add_argument("--batch", type=positive, help="rows of an update")
    parser.add_argument("--lr", type=above_zero, help="peak learning rate")
    parser.add_argument("--steps", type=positive, help="updates of each training; as many as --seconds allow otherwise")
    parser.add_argument("--seconds", type=some_duration, help="time for both trainings together")
    parser.add_argument("--check-seconds", type=duration, default=20.0, help="time for checking kernels; 0: not at all")
    parser.add_argument("--sample-bytes", type=positive, default=SAMPLE_BYTES, help="length of a generated sample")
    add_machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    places.folder("--out", args.out)
    import_torch()
    # What is missing is said now and not after minutes of training.
    for package in ("matplotlib", "rich", "safetensors"):
        importlib.import_module(package)
    from gptkern.commands.stages import Demo

    start = time.monotonic()
    demo = Demo(args)
    try:
        with interruptible():
            demo.run()
    except KeyboardInterrupt:
        demo.findings.interrupted = f"during: {demo.stage}"
        # The terminal may be what went away.
        with contextlib.suppress(OSError):
            demo.console.print(
                f"\ninterrupted during: {demo.stage}; writing the report of what is done", style="yellow"
            )
    with uninterrupted():
        demo.findings.seconds = time.monotonic() - start
        demo.write()
    return demo.findings.exit_status(INTERRUPTED)
