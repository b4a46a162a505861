"""The subcommands of `gptkern`, one module each; gptkern/cli.py imports the one that is chosen."""

from gptkern.training.errors import RunError, UserError

__all__ = ["INTERRUPTED", "PARTIAL", "RunError", "UserError"]

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended, as the shell gives it
PARTIAL = 3  # of `check` and `bench`: nothing failed, and what `--seconds` did not reach was left out
