"""`gptkern evaluate`: what a model is worth on a text or on labelled data, as a table and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import gptkern
from gptkern import formatting
from gptkern.commands import UserError, places
from gptkern.commands.interrupts import import_torch, interruptible
from gptkern.commands.options import add_machine_arguments, positive, probability, resolved_dtype, whole
from gptkern.formatting import shown

if TYPE_CHECKING:
    from rich.console import Console

    from gptkern.training.evaluation.evaluating import Evaluation

SUMMARY = "what a model is worth on a text or on labelled data: a table, and JSON"

# evaluating.AUTO, reading.TASKS, BATCH and DRAWS once more: `--help` does not wait for these modules' imports. A test
# holds them together.
TASKS = ("auto", "language", "choice", "classification", "relation", "translation")
BATCH, DRAWS = 16, 1000

# What a table says of more labels than this is which two are confused most often.
MOST_SHOWN_LABELS, CONFUSIONS = 8, 5
_WORDS = {
    "nats_per_byte": "nats per byte", "bits_per_byte": "bits per byte", "nats_per_token": "nats per token",
    "accuracy_per_byte": "accuracy, per byte", "macro_f1": "macro-F1", "micro_f1": "micro-F1",
    "exact_match": "exact match", "bleu": "BLEU", "chrf": "chrF",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="FOLDER",
        help="a run, one of its checkpoints, what `gptkern demo` or `gptkern export` wrote, or a GPT-2 of transformers",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="FILE", required=True,
        help="a text, JSONL, TACRED's JSON, two parallel texts (a.en,a.de), or a folder that `gptkern data` wrote, of "
        "which the held-out part counts",
    )  # fmt: skip
    parser.add_argument(
        "--task", choices=TASKS, metavar="NAME", default="auto", help=f"{', '.join(TASKS)}, by the data"
    )
    parser.add_argument(
        "--stride", type=positive, metavar="N", help="of language: tokens from a window to the next (default: half of "
        "the context)",
    )  # fmt: skip
    parser.add_argument(
        "--labels", metavar="A,B,…", help="of classification and relation: all that there are (default: those of the "
        "model's head, or of the data)",
    )  # fmt: skip
    parser.add_argument(
        "--negative", metavar="LABEL", help="of relation: the label that stands for none (default: no_relation)"
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="of translation: the most that one has (default: 128, or half of "
        "the context)",
    )  # fmt: skip
    parser.add_argument(
        "--noise", type=probability, metavar="RATE", help="the same once more with so many of the prompts' characters "
        "swapped, dropped, inserted or replaced",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=whole(0), metavar="N", default=DRAWS, help="draws for the 95%% intervals; 0 for none"
    )
    parser.add_argument("--batch", type=positive, metavar="N", default=BATCH, help="rows that are computed together")
    parser.add_argument("--json", metavar="FILE", help="write all of it here, too")
    parser.add_argument("--int8", action="store_true", help="quantise the linear layers first")
    parser.add_argument("--stock", action="store_true", help="leave the model on PyTorch's operators")
    add_machine_arguments(parser, seed_of="of the noise and of the bootstrap's draws")


def run(args: argparse.Namespace) -> int:
    places.named("FOLDER", args.model, "a folder that `gptkern train` or `gptkern export` wrote")
    places.named("--data", args.data, "a file")
    labels = None if args.labels is None else _labels(args.labels)
    out = None if args.json is None else places.file("--json", args.json)
    import_torch()

    from gptkern.commands.display import new_console
    from gptkern.commands.generate import say_passed_over
    from gptkern.training import evaluate, loading, model_files
    from gptkern.training.devices import resolve_device

    device = resolve_device(args.device)
    name = f"FOLDER {shown(args.model)}"
    with interruptible() as raise_if_dropped:
        loaded = loading.load_model(args.model, device)
        model_files.check_finite(loaded.model, name)
        say_passed_over("evaluate", loaded)
        if not args.stock:
            gptkern.swap(loaded.model)
        if args.int8:
            head = ("score",) if "labels" in loaded.about else ()
            gptkern.quantize(loaded.model, skip=("lm_head", *head))
        console = new_console()
        with _Progress(console, raise_if_dropped) as progress:
            found = evaluate(
                loaded, args.data, args.task, stride=args.stride, labels=labels, negative=args.negative,
                tokens=args.tokens, noise=args.noise, draws=args.bootstrap, seed=args.seed, batch=args.batch,
                device=device, precision={"float32": "fp32", "bfloat16": "bf16"}[resolved_dtype(args.dtype, device)],
                called=progress.advance, name=name,
            )  # fmt: skip
    if out is not None:
        model = {"folder": args.model, "int8": args.int8, "swapped": not args.stock}
        content = found.as_json()
        content["model"] = model | content["model"]
        places.write(out, json.dumps(content, indent=2, allow_nan=False) + "\n")
    _show(console, found)
    if out is not None:
        console.print(f"all of it: {args.json}", soft_wrap=True)
    return 0


def _labels(text: str) -> list[str]:
    labels = [label.strip() for label in text.split(",")]
    if len(labels) < 2 or not all(labels) or len(set(labels)) < len(labels):
        raise UserError(f"--labels {shown(text)}: it needs two labels at least, each once, with commas between")
    return labels


class _Progress(contextlib.AbstractContextManager):
    """In a terminal, how many rows were computed."""

    def __init__(self, console: Console, raise_if_dropped: Callable[[], None]):
        self.status, self.rows = console.status("reading") if console.is_terminal else None, 0
        self.raise_if_dropped = raise_if_dropped

    def __enter__(self) -> _Progress:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.status:
            self.status.stop()

    def advance(self, rows: int) -> None:
        self.raise_if_dropped()
        self.rows += rows
        if self.status:
            self.status.update(f"{self.rows:,} rows")


def _show(console: Console, found: Evaluation) -> None:
    from rich.table import Table

    for line in _lines(found):
        console.print(line, soft_wrap=True)
    table = Table(box=None, padding=(0, 3, 0, 0))
    table.add_column("")
    table.add_column("value", justify="right")
    intervals = any(each.low is not None for each in found.metrics.values())
    if intervals:
        table.add_column("95% interval", justify="right")
    if found.noisy is not None:
        table.add_column(f"noise {found.about['settings']['noise']:g}", justify="right")
        if intervals:
            table.add_column("95% interval", justify="right")
    for name in found.metrics:
        row = [_words(name, found)]
        for metrics in (found.metrics, found.noisy):
            if metrics is not None:
                row.append(_number(name, metrics[name].value))
                if intervals:
                    low, high = metrics[name].low, metrics[name].high
                    row.append(formatting.NONE if low is None else f"{_number(name, low)} … {_number(name, high)}")
        table.add_row(*row)
    console.print(table)
    if "confusion_matrix" in found.details:
        _show_confusion(console, found)


def _words(name: str, found: Evaluation) -> str:
    if name == "perplexity":
        return f"perplexity per token (context {found.details['context']}, stride {found.details['stride']})"
    return _WORDS.get(name, name)


def _number(name: str, value: float) -> str:
    if name in ("bleu", "chrf"):
        return f"{value:.2f}"
    return (
        f"{value:,.2f}" if name == "perplexity" and value < 1e9 else f"{value:.4g}" if value >= 10 else f"{value:.4f}"
    )


def _lines(found: Evaluation) -> list[str]:
    """What is to be known beside the numbers."""
    details, context = found.details, found.about["model"]["context"]
    lines = []
    if found.task == "language":
        of = formatting.count(details["documents"], "document")
        parts = "" if details["parts"] == details["documents"] else f" in {formatting.count(details['parts'], 'part')}"
        lines.append(f"{details['tokens']:,} tokens, {details['bytes']:,} bytes, {of}{parts}")
        if details["skipped"]:
            lines[-1] += f"; {formatting.count(details['skipped'], 'empty one')} skipped"
        if details["altered_parts"]:
            lines.append(
                f"{details['altered_parts']} of {details['parts']} parts are not what their tokens stand for (the "
                "tokenizer changes or drops characters): numbers per byte are lower than they should be"
            )
    else:
        lines.append(formatting.count(found.examples, "example"))
    if "by" in details:
        lines[-1] += f", {formatting.count(len(details['labels']), 'label')}, decided by {details['by']}"
    if found.cut:
        beginning = "lost its beginning" if found.cut == 1 else "lost their beginnings"
        lines.append(f"{formatting.count(found.cut, 'prompt')} {beginning}: the context has {context} tokens")
    if "signatures" in details:
        missing = found.examples - details["ended"]
        if missing:
            lines.append(f"{missing} of {found.examples} translations did not end within {details['tokens']} tokens")
        lines += [f"{_WORDS[name]}: {signature}" for name, signature in details["signatures"].items()]
    return lines


def _show_confusion(console: Console, found: Evaluation) -> None:
    from rich.table import Table

    labels, matrix = found.details["labels"], found.details["confusion_matrix"]
    if len(labels) <= MOST_SHOWN_LABELS:
        table = Table(box=None, padding=(0, 3, 0, 0))
        table.add_column("true \\ decided")
        for label in labels:
            table.add_column(shown(label), justify="right")
        for label, row in zip(labels, matrix):
            table.add_row(shown(label), *map(str, row))
        console.print(table)
        return
    wrong = [
        (times, labels[i], labels[j]) for i, row in enumerate(matrix) for j, times in enumerate(row) if i != j and times
    ]
    for times, truth, decided in sorted(wrong, key=lambda each: -each[0])[:CONFUSIONS]:
        console.print(
            f"{shown(truth)} was taken for {shown(decided)} {formatting.count(times, 'time')}", soft_wrap=True
        )
