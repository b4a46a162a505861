"""A sum and its norm in one call, where the norm is one of gptkern's.

    sum = left + right                      normalised, sum = layer_norm(right, …, residual=left)
    normalised = self.norm(sum)

What takes an addition's place in code that is made anew (rerouting_code) asks at each call whether anybody could see
the difference. If so it adds, and the norm is called where it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.modules import module as torch_modules

from gptkern.backends import tracing

# Where a module's class, itself and not one above it, says how it normalises a sum:
# (module, input, residual) -> (normalised, input + residual), or None for a call that it leaves alone.
NORMALISES_SUM = "_gptkern_normalise_sum"


def adding(name: str) -> Callable:
    """What takes the place of the addition whose sum the module `name` normalises next."""

    def add(holder, operands, *conditions):
        left, right = operands
        if False not in conditions:
            found = _normalised(getattr(holder, name), right, left)
            if found is not None:
                return found
        return None, left + right

    return add


def _normalised(norm, input, residual):
    """norm(input + residual) and input + residual; None where they have to be computed apart."""
    if not isinstance(norm, torch.nn.Module) or _is_watched(norm) or not _are_alike(input, residual):
        return None
    normalise = getattr(type(norm), NORMALISES_SUM, None)
    return normalise and normalise(norm, input, residual)


def _is_watched(norm: torch.nn.Module) -> bool:
    """Whether a call of the module is more than its class's forward."""
    return bool(
        norm._forward_hooks
        or norm._forward_pre_hooks
        or norm._backward_hooks
        or norm._backward_pre_hooks
        or "forward" in norm.__dict__
        or norm._compiled_call_impl is not None
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
        or tracing.in_jit_trace()  # which notes the module that is called
    )


def _are_alike(input, residual) -> bool:
    """Whether two dense tensors of one kind are added: nothing is widened, or repeated."""
    return (
        isinstance(input, torch.Tensor)
        and isinstance(residual, torch.Tensor)
        and input.dtype == residual.dtype
        and input.device == residual.device
        and input.layout == residual.layout == torch.strided
        and not (input.is_nested or residual.is_nested)
        and input.shape == residual.shape
    )
