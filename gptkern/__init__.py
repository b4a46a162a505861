"""gptkern: fused GPU kernels for GPT models, checked against PyTorch, swapped in with one line."""

from gptkern import autograd, functional, nn
from gptkern.backends.dispatch import BackendError, backend, explain
from gptkern.quantizing import QuantizeReport, load_quantized, quantize
from gptkern.swapping import SwapReport, kernels, swap, unswap
from gptkern.version import __version__

__all__ = [
    "BackendError",
    "QuantizeReport",
    "SwapReport",
    "__version__",
    "autograd",
    "backend",
    "explain",
    "functional",
    "kernels",
    "load_quantized",
    "nn",
    "quantize",
    "swap",
    "unswap",
]
