"""A sum and its norm in one call, where the norm is one of gptkern's.

    sum = left + right                      normalised, sum = layer_norm(right, …, residual=left)
    normalised = self.norm(sum)

What takes an addition's place in code that is made anew (rerouting_code) asks at each call whether anybody could see
the difference. If so it adds, and the norm is called where it was; as it does where PyTorch runs both, on a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.modules import module as torch_modules

from gptkern.backends import dispatch, handing, tracing

# Where a module's class, itself and not one above it, says how it normalises a sum:
# (module, input, residual) -> (normalised, input + residual), or None for a call that it leaves alone.
NORMALISES_SUM = "_gptkern_normalise_sum"


def adding(name: str) -> Callable:
    """What takes the place of the addition whose sum the module `name` normalises next ("": what is returned)."""
    if not name:
        return adding_and_handing_on()

    def add(holder, operands, *conditions):
        left, right = operands
        if isinstance(right, torch.Tensor) and not dispatch.is_pytorchs(right) and False not in conditions:
            found = _normalised(getattr(holder, name), right, left)
            if found is not None:
                return found
        return None, left + right

    return add


class Border(NamedTuple):
    """What the code of a class's forward says of the sums that pass its border.

    Attributes:
        entry: the attributes that it calls for its first argument, as that came.
        last: those that it calls for one variable.
        lists: those that it takes.
        has_loop, returns_sum: whether there is a loop, and a call of `last`; whether what it returns is a sum.
    """

    entry: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    has_loop: bool = False
    returns_sum: bool = False


# Where a routed class keeps its Border.
BORDER = "_gptkern_border"


class _Running:
    """A model whose forward is running, and which norm follows which of its blocks."""

    def __init__(self, model: torch.nn.Module, border: Border):
        self.model, self.border = model, border
        self.following: dict[int, tuple[torch.nn.Module, torch.nn.Module | None]] | None = None

    def after(self, block: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module | None] | None:
        """The norm that comes next, and the block that it is in, where it is in one."""
        if self.following is None:
            found = links(self.model, self.border, _border_of, _is_ours)
            self.following = {id(block): (norm, next_block) for block, norm, next_block in found}
        return self.following.get(id(block))


class _Thread(threading.local):
    running: _Running | None = None


_thread = _Thread()


def links(
    model: torch.nn.Module, border: Border, border_of: Callable, is_norm: Callable
) -> Iterator[tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module | None]]:
    """(a block whose result is a sum, the norm that comes next, the block of that or None) in a model's lists.

    Args:
        border: the model's. border_of: a module -> its Border, or None. is_norm: whether a module is a norm.
    """
    lasts = [model._modules[name] for name in border.last if is_norm(model._modules.get(name))]
    for name in border.lists:
        blocks = model._modules.get(name)
        blocks = list(blocks) if isinstance(blocks, torch.nn.ModuleList) else []
        for block, after in zip(blocks, [*blocks[1:], None]):
            if not (border_of(block) or Border()).returns_sum:
                continue
            if after is not None:
                entries = (after._modules.get(entry) for entry in (border_of(after) or Border()).entry)
                norm = next(filter(is_norm, entries), None)
            else:
                norm = lasts[0] if len(lasts) == 1 else None
            if norm is not None:
                yield block, norm, after


def _border_of(module: torch.nn.Module) -> Border | None:
    return vars(type(module)).get(BORDER)


def _is_ours(module: torch.nn.Module | None) -> bool:
    return getattr(type(module), NORMALISES_SUM, None) is not None


def running(border: Border, forward: Callable) -> Callable:
    """The forward of a model; while it runs, what is handed on within it counts."""

    def forward_of_model(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return forward(*args, **kwargs)
        before, _thread.running = _thread.running, _Running(args[0], border)
        try:
            return forward(*args, **kwargs)
        finally:
            _thread.running = before
            handing.thread.handed = None

    return forward_of_model


def adding_and_handing_on() -> Callable:
    """What takes the place of the addition whose sum a block returns."""

    def add(block, operands, *conditions):
        left, right = operands
        if (
            not torch.compiler.is_dynamo_compiling()
            and _thread.running is not None
            and isinstance(right, torch.Tensor)
            and not dispatch.is_pytorchs(right)
            and False not in conditions
        ):
            following = _thread.running.after(block)
            summed = None if following is None else _handed_on(block, *following, right, left)
            if summed is not None:
                return None, summed
        return None, left + right

    return add


def _handed_on(block, norm, next_block, input, residual):
    """The sum, whose norm waits for being asked; None where it has to be computed apart."""
    # Without gradients in training it may be that the block is a checkpoint's.
    if (block.training and not torch.is_grad_enabled()) or not handing.can_wait(norm):
        return None
    if _is_watched(block) or (next_block is not None and _is_watched(next_block)):
        return None
    found = _normalised(norm, input, residual)
    if found is None:
        return None
    normalised, summed = found
    handing.hand_on(norm, summed, normalised)
    return summed


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
