"""What the norms ask of a residual, which is added to their input in the same pass, and the sum's own node."""

from __future__ import annotations

import torch

from gptkern.backends import tracing
from gptkern.backends.layouts import described, is_dense
from gptkern.backends.registration import KernelFunction


class SumFunction(KernelFunction):
    """autograd's node of input + residual, which a kernel has computed.

    A norm that takes its result as its input, and not as a second result of its own, gives it the gradients that the
    sum has in PyTorch: all of them, for who keeps the sum, hooks it or asks for its gradient.

    `apply(input, residual, [sum])` -> sum; in a list, as autograd takes no argument for a new result.
    """

    @staticmethod
    def forward(ctx, input, residual, computed):
        ctx.dtypes = input.dtype, residual.dtype
        return computed.pop()

    @staticmethod
    def backward(ctx, grad_output):
        return *(
            grad_output.to(dtype) if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad)
        ), None


def check(operator: str, input: torch.Tensor, residual: torch.Tensor) -> None:
    """Raises ValueError where the residual's shape or dtype is none that is added to the input."""
    shape, wanted = residual.shape, input.shape
    if tracing.in_jit_trace():
        shape, wanted = tracing.sizes(residual), tracing.sizes(input)
    if shape != wanted:
        raise ValueError(
            f"{operator}: residual has shape {tuple(residual.shape)}; it needs the input's, {tuple(input.shape)}"
        )
    if not residual.is_floating_point():
        raise ValueError(f"{operator}: residual is {residual.dtype}; it needs a floating-point dtype")


def check_device(operator: str, input: torch.Tensor, residual: torch.Tensor) -> None:
    if residual.device != input.device:
        raise RuntimeError(f"{operator}: residual is on {residual.device}; it needs the input's device, {input.device}")


def check_layouts(operator: str, input: torch.Tensor, residual: torch.Tensor) -> None:
    """Raises an error that names a tensor of a layout in which PyTorch does not add, or does not normalise the sum."""
    for name, tensor in (("input", input), ("residual", residual)):
        if not is_dense(tensor) and tensor.layout != torch.jagged:
            raise RuntimeError(
                f"{operator}: {name} is {described(tensor)}; beside a residual it needs to be dense, or nested in the "
                "layout torch.jagged"
            )
