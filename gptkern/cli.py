"""The command line: `gptkern info | check | demo | train | generate | bench | tune`.

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
import importlib
import importlib.util
import os
import sys

from gptkern.commands import INTERRUPTED, UserError
from gptkern.version import __version__

# The summaries stand here too, because asking the modules would import them. A test holds the two together.
COMMANDS = {
    "info": "what this machine has: versions, device, backends, and why one is missing",
    "check": "run this machine's kernels against float64 references",
    "demo": "train a GPT stock and swapped, quantise it to int8, generate text, write a report",
    "train": "train the reference GPT on a text file, into a checkpoint folder",
    "bench": "time this machine's kernels against their peers; `bench report DIR` draws the report",
    "tune": "choose tiles and backends for this machine's GPU by measuring them",
    "generate": "generate text from a checkpoint folder",
}

# import name -> name on the package index, for the packages of the extra gptkern[cli]
EXTRA = {"rich": "rich", "matplotlib": "matplotlib", "safetensors": "safetensors"}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it says something and the text does not."""

    def _get_help_string(self, action):
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing or "default:" in (action.help or "") else super()._get_help_string(action)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; argparse exits by itself (status 2) on arguments it cannot read."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="gptkern", description="Fused GPU kernels for GPT models, swapped in with one line."
    )
    parser.add_argument("--version", action="version", version=f"gptkern {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
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
    args = parser.parse_args(arguments)
    try:
        return module.run(args)
    except ModuleNotFoundError as error:
        return _missing(args.command, error)
    except BrokenPipeError:
        # `gptkern tune --show | head`: nobody reads on. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("gptkern: interrupted", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        return _refused(args.command, error)
    except RuntimeError as error:
        # Imported where it is needed: it brings PyTorch along.
        from gptkern.backends.dispatch import BackendError

        if not isinstance(error, BackendError):
            raise
        return _refused(args.command, error)


def _refused(command: str, error: Exception) -> int:
    print(f"gptkern {command}: {error}", file=sys.stderr)
    return 2


def _missing(command: str, error: ModuleNotFoundError) -> int:
    """Says which package is missing and how to get it; anything that is not of the extra is a defect, and raised."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRA:
        raise error
    missing = [EXTRA[name] for name in EXTRA if importlib.util.find_spec(name) is None]
    print(
        f"gptkern {command} needs {' and '.join(missing or [EXTRA[package]])}: install the extra cli (README)",
        file=sys.stderr,
    )
    return 2
