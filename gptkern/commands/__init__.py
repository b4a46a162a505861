"""The subcommands of `gptkern`, one module each; gptkern/cli.py imports the one that is chosen."""

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended, as the shell gives it
PARTIAL = 3  # of `check` and `bench`: nothing failed, and what `--seconds` did not reach was left out


class UserError(Exception):
    """What the person at the command line has to mend: shown as one line, with exit status 2."""


class RunError(Exception):
    """A run that began and could not be brought to its end: shown as one line, with exit status 1."""
