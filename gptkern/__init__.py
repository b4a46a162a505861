"""gptkern: fused GPU kernels for GPT models, checked against PyTorch, swapped in with one line.

The names are imported when they are first used (PEP 562): PyTorch takes seconds to import, and `gptkern --help` needs
none of it.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from gptkern.version import __version__

if TYPE_CHECKING:
    from gptkern import autograd, functional, nn, optim
    from gptkern.backends.dispatch import BackendError, backend
    from gptkern.quantizing import QuantizeReport, load_quantized, quantize
    from gptkern.swapping import ExplainReport, SwapReport, UnswapReport, explain, kernels, swap, unswap

__all__ = [
    "BackendError",
    "ExplainReport",
    "QuantizeReport",
    "SwapReport",
    "UnswapReport",
    "__version__",
    "autograd",
    "backend",
    "explain",
    "functional",
    "kernels",
    "load_quantized",
    "nn",
    "optim",
    "quantize",
    "swap",
    "unswap",
]

# name -> the module that defines it; None where the name is that of a module. The imports above, for Python.
_HOMES = {
    "BackendError": "gptkern.backends.dispatch",
    "ExplainReport": "gptkern.swapping",
    "QuantizeReport": "gptkern.quantizing",
    "SwapReport": "gptkern.swapping",
    "UnswapReport": "gptkern.swapping",
    "autograd": None,
    "backend": "gptkern.backends.dispatch",
    "explain": "gptkern.swapping",
    "functional": None,
    "kernels": "gptkern.swapping",
    "load_quantized": "gptkern.quantizing",
    "nn": None,
    "optim": None,
    "quantize": "gptkern.quantizing",
    "swap": "gptkern.swapping",
    "unswap": "gptkern.swapping",
}


# Packages that are no public names, and are there without an import of their own all the same.
_PACKAGES = ("quantizing", "swapping")


def __getattr__(name: str):
    try:
        home = _HOMES[name]
    except KeyError:
        if name not in _PACKAGES:
            raise AttributeError(f"module 'gptkern' has no attribute {name!r}") from None
        home = None
    # With any name come the operators: `explain` knows PyTorch's functions by those that registered as their twins.
    importlib.import_module("gptkern.functional")
    value = importlib.import_module(f"gptkern.{name}") if home is None else getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether Python was started as `gptkern` or `python -m gptkern`."""
    if sys.argv[:1] == ["-m"]:  # the module is still being looked for
        return sys.orig_argv[-len(sys.argv)].endswith("gptkern")
    return os.path.splitext(os.path.basename(sys.argv[0]))[0] == "gptkern" if sys.argv else False


if os.environ.get("GPTKERN_BACKEND") and not _is_command_line():
    # A wrong name is refused here, and not at the first call of an operator. The command line says so in a line.
    importlib.import_module("gptkern.backends.dispatch")
