"""`gptkern data`: texts to shards of token ids, in a folder that `gptkern train --data` reads."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from pathlib import Path

from gptkern import formatting
from gptkern.commands import INTERRUPTED, UserError, places
from gptkern.commands.interrupts import interruptible
from gptkern.commands.options import probability
from gptkern.formatting import count, shown

SUMMARY = "prepare texts for training: a folder of compressed token ids"

# Without a terminal (a log, a CI job) a line is written this often.
SECONDS_BETWEEN_LINES = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT",
        help="a file (text or JSONL, plain, gzip or zstd), a folder with all but hidden ones, or - for standard input",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where the tokens go")
    parser.add_argument(
        "--tokenizer", metavar="NAME", default="bytes",
        help="bytes, bpe:N to train a byte-pair encoding of N tokens on the texts, or a tokenizer.json",
    )  # fmt: skip
    parser.add_argument("--field", metavar="NAME", help="of JSONL, that holds the text (default: text)")
    parser.add_argument("--held-out", type=probability, default=0.05, metavar="PART", help="of the text, to test on")
    parser.add_argument("--overwrite", action="store_true", help="replace the tokens that are there, at the end")


def run(args: argparse.Namespace) -> int:
    out = places.folder("--out", args.out)
    if args.field == "":
        raise UserError("--field is empty; it needs the name of a field")
    from gptkern.commands.display import new_console
    from gptkern.training.data.preparing import prepare

    console = new_console()
    start = time.perf_counter()
    try:
        with interruptible(), _Display(console) as display:
            prepared = prepare(
                args.texts, out, tokenizer=args.tokenizer, field=args.field, held_out=args.held_out,
                overwrite=args.overwrite, watch=display.watch,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on from there", soft_wrap=True)
        return INTERRUPTED
    _show(console, prepared, out, time.perf_counter() - start)
    return 0


class _Display(contextlib.AbstractContextManager):
    """A live bar in a terminal, a plain line now and then elsewhere."""

    def __init__(self, console):
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(None), DownloadColumn(),
                TextColumn("{task.fields[speed]}", markup=False), TimeRemainingColumn(compact=True),
                console=console, expand=True, transient=True,
            )  # fmt: skip
        self.stage, self.task, self.start, self.tokens = "", None, 0.0, 0
        self.last = time.monotonic()

    def __enter__(self) -> _Display:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def watch(self, progress) -> None:
        now = time.monotonic()
        if progress.stage != self.stage:
            self.stage, self.start, self.tokens = progress.stage, now, progress.tokens
            if self.bar:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(progress.stage, total=progress.total, speed="")
        if self.bar:
            self.bar.update(self.task, completed=progress.done, total=progress.total, speed=self._speed(progress, now))
        elif now - self.last >= SECONDS_BETWEEN_LINES:
            of = "" if progress.total is None else f" of {formatting.size(progress.total)}"
            line = f"{progress.stage}: {formatting.size(progress.done)}{of}"
            speed = self._speed(progress, now)
            self.console.print(f"{line}, {speed}" if speed else line, soft_wrap=True)
            self.last = now

    def _speed(self, progress, now: float) -> str:
        seconds = now - self.start
        if not progress.tokens or seconds <= 0:
            return ""
        return formatting.rate((progress.tokens - self.tokens) / seconds, "tokens/s")


def _show(console, prepared, out: Path, seconds: float) -> None:
    from gptkern.training.data.shards import DTYPES

    manifest, size = prepared.manifest, formatting.size
    on_disk = {name: sum(shard["bytes"] for shard in split["shards"]) for name, split in manifest["splits"].items()}
    rows = [
        [
            name,
            *(f"{number:,}" for number in (split["documents"], split["tokens"], len(split["shards"]))),
            size(on_disk[name]),
        ]
        for name, split in manifest["splits"].items()
    ]
    print_ = functools.partial(console.print, soft_wrap=True)
    print_(formatting.columns(["", ">documents", ">tokens", ">shards", ">on the disk"], rows))
    total, text = sum(on_disk.values()), manifest["text_bytes"]
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    itemsize = DTYPES[manifest["dtype"]].itemsize
    print_(f"{text / tokens:.2f} bytes of text a token, of {manifest['vocab_size']:,}")
    print_(
        f"{size(total)}: {total / (itemsize * tokens):.2f} × raw ids of {8 * itemsize} bits ({size(itemsize * tokens)})"
    )
    if prepared.gzip_bytes:
        about = "about " if prepared.sampled else ""
        gzipped = f"{about}{size(prepared.gzip_bytes)} for {size(text)}"
        print_(f"{' ' * len(size(total))}  {total / prepared.gzip_bytes:.2f} × the text under gzip ({gzipped})")
    if prepared.empty:
        print_(f"{count(prepared.empty, 'empty document')} left out")
    how = {"new": "", "continued": ", after an earlier run", "complete": ", where it was already"}[prepared.how]
    folder = shown(str(out))
    print_(f"tokens: {folder}, in {formatting.seconds(seconds)}{how}   (gptkern train --data {folder})")
