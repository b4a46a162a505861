"""gptkern: fused GPU kernels for GPT models, checked against PyTorch, swapped in with one line."""

from gptkern import autograd, functional, nn
from gptkern.dispatch import BackendError, backend, explain
from gptkern.swapping import SwapReport, kernels, swap, unswap
from gptkern.version import __version__

__all__ = [
    "BackendError",
    "SwapReport",
    "__version__",
    "autograd",
    "backend",
    "explain",
    "functional",
    "kernels",
    "nn",
    "swap",
    "unswap",
]
