"""The command line: `gptkern info | check | demo | data | train | finetune | search | export | grow | generate |
evaluate | bench | tune`.

Every subcommand is a module `gptkern/commands/<name>.py` with

    SUMMARY: str                      one line for `gptkern --help`
    add_arguments(parser)             its options
    run(args) -> int                  the exit status

A module is imported only when its command is chosen: one command's missing package does not stop the others. What it
imports at its top, and what add_arguments needs, is neither PyTorch nor anything else that is slow to import, so that
`gptkern COMMAND --help` answers at once; `run` imports the rest.
What a module needs beyond gptkern's own dependencies is in the extra `gptkern[cli]`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import importlib.util
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator

from gptkern.commands import INTERRUPTED, RunError, UserError
from gptkern.version import __version__

# The summaries stand here too, because asking the modules would import them. A test holds the two together.
COMMANDS = {
    "info": "what this machine has: versions, device, backends, and why one is missing",
    "check": "run this machine's kernels against float64 references",
    "demo": "train a GPT stock and swapped, quantise it to int8, generate text, write a report",
    "data": "prepare texts for training: a folder of compressed token ids",
    "train": "train the reference GPT on a text or on tokens, into a run's folder",
    "search": "search for the recipe that learns a text best, by experience, experiment and learning",
    "bench": "time this machine's kernels against their peers; `bench report DIR` draws the report",
    "tune": "choose tiles and backends for this machine's GPU by measuring them",
    "export": "write a run's model as safetensors that transformers loads",
    "finetune": "fine-tune a model on examples: prompts and completions, labels, translations, texts",
    "grow": "widen and deepen a model so that it computes the same, to train it on",
    "generate": "generate text from a run or a model's folder",
    "evaluate": "what a model is worth on a text or on labelled data: a table, and JSON",
}

# The packages of the extra gptkern[cli], each imported by the name that it has on the package index.
EXTRA = ("rich", "matplotlib", "safetensors", "tokenizers", "zstandard")


# What a word that belongs to no option is likely to be.
LIKELY = {
    "train": "--text",
    "demo": "--text",
    "generate": "--prompt",
    "evaluate": "--data",
    "check": "--op",
    "tune": "--op",
}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it says something and the text does not."""

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing or "default:" in (action.help or "") else super()._get_help_string(action)


class _Commands(argparse.ArgumentParser):
    """Of the whole program: refuses in one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"gptkern: {_one_line(message.removeprefix('argument '))}\n")


class _Options(argparse.ArgumentParser):
    """Of a command: refuses in one line, which `main` prints."""

    def error(self, message: str):
        # "argument --lr: is nan; it needs …", as the types of commands/options.py go on from the name.
        raise UserError(re.sub(r"^argument ([^:]+): (is )?", lambda m: m[1] + (" is " if m[2] else ": "), message))


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; argparse exits by itself after --help, and without a command."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with _escaping():
        try:
            try:
                return _run(arguments)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()
        except BrokenPipeError:
            # `gptkern tune --show | head`: nobody reads on.
            _drop_output()
            return 1
        except OSError as error:
            # Of a file, a disk or a terminal, standard output among them: none of them is a defect of the program.
            try:
                sys.stdout.flush()
            except (OSError, AttributeError):
                _drop_output()
            where = "" if error.filename is None else f"{error.filename}: "
            return _ended(arguments, f"{where}{error.strerror or error}", 1)


def _run(arguments: list[str]) -> int:
    parser = _Commands(prog="gptkern", description="Fused GPU kernels for GPT models, swapped in with one line.")
    parser.add_argument("--version", action="version", version=f"gptkern {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Options)
    chosen = _chosen(arguments)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            formatter_class=_Help,
        )  # fmt: skip
        if name == chosen:
            try:
                module = importlib.import_module(f"gptkern.commands.{name}")
            except ModuleNotFoundError as error:
                return _missing(name, error)
            module.add_arguments(subparser)
            options = re.findall(r"--[\w-]+", subparser.format_usage())
    try:
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise UserError(_unrecognized(unknown[0], args.command, options))
        _check_environment()
        return module.run(args)
    except ModuleNotFoundError as error:
        return _missing(args.command, error)
    except KeyboardInterrupt:
        return _ended(arguments, "interrupted", INTERRUPTED)
    except UserError as error:
        return _ended(arguments, error, 2)
    except (RunError, MemoryError) as error:
        return _ended(arguments, str(error) or "there is not enough memory", 1)
    except RuntimeError as error:
        # Imported where it is needed: it brings PyTorch along.
        import torch

        from gptkern.backends.dispatch import BackendError

        if isinstance(error, BackendError):
            return _ended(arguments, error, 2)
        # PyTorch's allocator of the CPU has no exception of its own.
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return _ended(arguments, f"there is not enough memory: {str(error).splitlines()[0]}", 1)
        raise


def _chosen(arguments: list[str]) -> str | None:
    return next((argument for argument in arguments if argument in COMMANDS), None)


def _unrecognized(argument: str, command: str, options: list[str]) -> str:
    likely = difflib.get_close_matches(argument.partition("=")[0], options, 1)
    if not argument.startswith("-") and command in LIKELY:
        # What has to be escaped is not to be typed again as it is shown.
        likely = [f"{LIKELY[command]} {shlex.quote(argument) if argument.isprintable() else argument}"]
    return f"unrecognized argument {argument}" + (f"; did you mean {likely[0]}?" if likely else "")


def _check_environment() -> None:
    """What gptkern reads of the environment, before it is read: elsewhere a wrong value passes for none.

    Raises:
        UserError: a variable's value means nothing.
    """
    for name in ("GPTKERN_EMULATE_CUDA", "TRITON_INTERPRET"):
        value = os.environ.get(name, "")
        if value not in ("", "0", "1"):
            raise UserError(f"{name} is {value!r}; it needs 1, or 0 for off")
    seed = os.environ.get("GPTKERN_EMULATE_CUDA_SEED", "0")
    if not seed.isdecimal() or int(seed) >= 2**63:
        raise UserError(f"GPTKERN_EMULATE_CUDA_SEED is {seed!r}; it needs a whole number below 2^63")
    cache = os.environ.get("GPTKERN_CACHE")
    if cache:
        _check_cache(cache)
    if os.environ.get("GPTKERN_BACKEND"):
        try:
            from gptkern.commands.interrupts import import_torch

            import_torch()
            # The import raises, unless it was one before the variable was set.
            dispatch = importlib.import_module("gptkern.backends.dispatch")
            dispatch.checked_name(os.environ["GPTKERN_BACKEND"], "GPTKERN_BACKEND")
        except ValueError as error:
            raise UserError(str(error)) from error


def _check_cache(value: str) -> None:
    from gptkern.formatting import cut

    # It need not exist, nor be writable: what somebody else has measured and built can be read.
    path = os.path.abspath(value)
    try:
        while not os.path.lexists(path) and len(path) > 1:
            # ENAMETOOLONG, of which `lexists` says nothing.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.stat(path)
            path = os.path.dirname(path)
    except OSError as error:
        raise UserError(f"GPTKERN_CACHE is {cut(value)!r}; it needs a folder: {error.strerror}") from error
    if not os.path.isdir(path):
        raise UserError(f"GPTKERN_CACHE is {cut(value)!r}; it needs a folder, and {cut(path)} is none")


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    r"""Inside the block, what the encoding of a stream does not have is written as \u2026: printing never fails."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before):
            # It flushes, and nobody may be reading.
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def _drop_output() -> None:
    """What is still buffered has nowhere to go: Python would fail on it at its end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _ended(arguments: list[str], message: object, status: int) -> int:
    """Says in one line why the command ended, and returns its exit status."""
    command = _chosen(arguments)
    line = _one_line(str(message))
    # Standard error may be closed, or full.
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(f"gptkern {command}: {line}" if command else f"gptkern: {line}", file=sys.stderr)
    return status


def _missing(command: str, error: ModuleNotFoundError) -> int:
    """Says which package is missing and how to get it; anything that is not of the extra is a defect, and raised."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        raise error
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    print(
        f"gptkern {command} needs {' and '.join(missing or [package])}: install the extra cli (README)",
        file=sys.stderr,
    )
    return 2
