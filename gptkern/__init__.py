"""gptkern: fused GPU kernels for GPT models, checked against PyTorch, swapped in with one line."""

from gptkern import autograd, functional
from gptkern.dispatch import BackendError, backend, explain
from gptkern.version import __version__

__all__ = ["BackendError", "__version__", "autograd", "backend", "explain", "functional"]
