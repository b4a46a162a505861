"""Numbers that PyTorch's operators take and kernels do not: NumPy's, tensors of one element, what has an index.

A plain int or float need not come here: a check asks for its type first. Each function returns None for what PyTorch
refuses.
"""

from __future__ import annotations

import operator
from typing import Any

import torch


def as_size(value: Any) -> int | torch.SymInt | None:
    """The int of a size, as PyTorch reads the elements of a shape: anything with an index but a bool."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):
        return None


def as_int(value: Any) -> int | None:
    """The int of an argument that is one number: unlike a size, not of any type with an index."""
    is_number = value.dim() == 0 if isinstance(value, torch.Tensor) else isinstance(value, int) or _is_numpys(value)
    return as_size(value) if is_number else None


def as_float(value: Any) -> float | None:
    """The float of an argument that is one number."""
    if isinstance(value, torch.Tensor):
        is_number = value.dim() == 0 and not value.requires_grad
    else:
        is_number = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or _is_numpys(value)
    return float(value) if is_number else None


def _is_numpys(value: Any) -> bool:
    # By their names: PyTorch need not have NumPy.
    return any(
        kind.__module__ == "numpy" and kind.__name__ in ("number", "bool", "bool_") for kind in type(value).__mro__
    )
