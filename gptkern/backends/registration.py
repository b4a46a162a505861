"""What the operators share: registration with PyTorch, autocast, and the refusal of second derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from gptkern.backends import dispatch

_library = torch.library.Library("gptkern", "FRAGMENT")


def register(operator: str, direction: str, schema: str, fake: Callable):
    """Register `gptkern::<operator>_<direction>` and return it.

    Args:
        direction: "forward" or "backward", the launcher of the backend's module that the op calls.
        schema: arguments and results as torch.library writes them. A tensor comes first, `str backend` last.
        fake: the shape function: allocates the results and computes nothing.

    `Library.define` and `impl`, not the `custom_op` decorator: it costs half the host time of a call.
    """
    name = f"{operator}_{direction}"
    _library.define(f"{name}{schema}")

    def run(*call):
        *arguments, backend = call
        launcher = getattr(dispatch.load(backend, operator), direction)
        with on_device_of(arguments[0]), without_autocast(arguments[0].device.type):
            return launcher(*arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptkern::{name}", fake, lib=_library)
    return getattr(torch.ops.gptkern, name).default


def on_device_of(tensor: torch.Tensor):
    """Makes the tensor's GPU the current one: a kernel is launched on the current device."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _autocast_is_on(device_type: str) -> bool:
    # PyTorch has no autocast for meta tensors and raises where it is asked.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """Keeps autocast out of a launcher: the twin has already cast what autocast would."""
    if _autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def autocast(policy: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as PyTorch's autocast would hand them to an operator.

    Args:
        policy: "float32" for the operators that CUDA's autocast runs in float32 (layer_norm, softmax) and the
            CPU's leaves alone; "lower" for those that run in the autocast dtype on both (matrix products).
    """
    device_type = tensors[0].device.type
    if not _autocast_is_on(device_type) or (policy == "float32" and device_type != "cuda"):
        return tensors
    dtype = torch.float32 if policy == "float32" else torch.get_autocast_dtype(device_type)

    def cast(tensor):
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(map(cast, tensors))


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on gradients, whose own backward raises."""

    @staticmethod
    def forward(ctx, operator, remedy, count, *tensors):
        ctx.message = f"gptkern: {operator} has no second derivative. {remedy}".rstrip()
        ctx.count = count
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(ctx.message)


def once_differentiable(
    operator: str,
    gradients: list[torch.Tensor | None],
    sources,
    remedy: str = 'Compute it under gptkern.backend("torch"), which differentiates PyTorch\'s own operator.',
) -> tuple:
    """The gradients as they are; under create_graph=True, tied to a node that refuses to be differentiated.

    Args:
        gradients: what a backward is about to return.
        sources: the tensors that the gradients depend on.
        remedy: what to do instead, the end of the error's message.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    present = [gradient for gradient in gradients if gradient is not None]
    tied = iter(
        _OnceDifferentiable.apply(operator, remedy, len(present), *present, *(s for s in sources if s is not None))
    )
    return tuple(None if gradient is None else next(tied) for gradient in gradients)
