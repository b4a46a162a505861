"""Tensors that are not dense: nested and sparse ones, which have no strides that arithmetic on rows could go by."""

from __future__ import annotations

import torch


def is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def described(tensor: torch.Tensor) -> str:
    """For an error: "a nested tensor (torch.jagged)"."""
    return f"a {'nested' if tensor.is_nested else 'sparse'} tensor ({tensor.layout})"
