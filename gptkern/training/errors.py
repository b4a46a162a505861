"""What goes wrong with what a user gave, and with a run that began: the command line shows each as one line."""


class UserError(Exception):
    """What a user has to mend: an option, a recipe, a file. Exit status 2, before any work."""


class RunError(Exception):
    """A run that began and could not be brought to its end. Exit status 1."""
