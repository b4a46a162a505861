"""The norm of a block's result, computed together with the sum that it is, and handed on to the module that it is for.

    block:  return x + f(x)             x + f(x) is returned, as ever; its norm waits here
    model:  x = self.norm(x)            takes what waits, where it is that of this very sum

What waits is for the next norm of the thread alone, and for no other than the one that it was computed for, called with
the same tensor, unchanged, with the same parameters, unchanged, under the same autograd. All else computes its norm
itself. It does not outlive the model's forward (gptkern.swapping.residual_norms); nothing waits while a compiler
traces.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Handed(NamedTuple):
    """What waits, and what it was computed from."""

    norm: torch.nn.Module
    summed: torch.Tensor  # (…, width)
    normalised: torch.Tensor  # (…, width)
    version: int  # of `summed`
    parameters: tuple[tuple[str, torch.Tensor | None, int], ...]  # of the norm: name, parameter, its version
    with_gradients: bool


class _Thread(threading.local):
    handed: Handed | None = None


thread = _Thread()


def can_wait(norm: torch.nn.Module) -> bool:
    """Whether a change of a tensor would be seen, and the norm would be computed under the same autograd later."""
    # Saved tensors go to the hooks that are there when they are saved: a checkpoint's block has its own.
    return not torch.is_inference_mode_enabled() and _top_hooks(True) is None and not _has_inference_tensors(norm)


def _has_inference_tensors(norm: torch.nn.Module) -> bool:
    return any(p is not None and p.is_inference() for p in norm._parameters.values())


def hand_on(norm: torch.nn.Module, summed: torch.Tensor, normalised: torch.Tensor) -> None:
    """`norm(summed)` is `normalised`, if it is called next."""
    if not summed.is_inference():
        thread.handed = Handed(
            norm, summed, normalised, summed._version, _parameters(norm), torch.is_grad_enabled()
        )  # fmt: skip


def take(norm: torch.nn.Module, input: torch.Tensor) -> torch.Tensor | None:
    """norm(input), where it waits; whatever waits, waits no longer."""
    handed, thread.handed = thread.handed, None
    if (
        handed is None
        or handed.norm is not norm
        or handed.summed is not input
        or handed.with_gradients != torch.is_grad_enabled()
        or not can_wait(norm)
        or handed.version != input._version
    ):
        return None
    now = _parameters(norm)
    same = len(now) == len(handed.parameters) and all(
        name == old_name and parameter is old and version == old_version
        for (name, parameter, version), (old_name, old, old_version) in zip(now, handed.parameters)
    )
    return handed.normalised if same else None


def _parameters(norm: torch.nn.Module) -> tuple[tuple[str, torch.Tensor | None, int], ...]:
    return tuple((name, p, 0 if p is None else p._version) for name, p in norm._parameters.items())
