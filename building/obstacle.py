"""Says in one line why `make` cannot set itself up with the Python that runs this, and nothing where it can.

Any Python can run it, 2.7 too: what is too old has to be able to say so.
"""

import sys

LEAST = (3, 11)


def obstacle():
    """The line, or None."""
    if sys.version_info[:2] < LEAST:
        return "this is Python " + _dotted(sys.version_info) + " and gptkern needs " + _dotted(LEAST) + " or newer"
    for module, purpose in (("venv", "make an environment"), ("ensurepip", "put pip into an environment")):
        try:
            __import__(module)
        except ImportError:
            return "no module " + module + " to " + purpose + "; on Debian and Ubuntu it is in python3-venv"
    return None


def _dotted(version):
    return ".".join(str(number) for number in version[:2])


if __name__ == "__main__":
    sys.stdout.write(obstacle() or "")
