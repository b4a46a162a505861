"""cross_entropy in CUDA C++: launchers over csrc/cross_entropy/, where the mathematics is."""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import DTYPES, as_read
from gptkern.operators.cross_entropy.contract import Call, Gradient

# Classes are 32-bit integers in the kernels, with room for what a block walks beyond the row.
MOST_CLASSES = 2**30


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    input, target, weight = call.input, call.target, call.weight
    for name, tensor in (("input", input), ("weight", weight)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    if target.is_floating_point():
        return "the targets are class probabilities; the kernel is for classes"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "the weight requires a gradient, which the backward does not compute"
    if input.dim() > 2 or (input.stride(1) != 1 and input.shape[1] > 1):
        return (
            f"the classes of a row do not lie next to each other (shape {tuple(input.shape)}, strides "
            f"{tuple(input.stride())}); the kernel reads rows"
        )
    if not 0 < input.shape[1] <= MOST_CLASSES:
        return f"there are {input.shape[1]} classes; the kernel counts from 1 to {MOST_CLASSES}"
    return None


def _options(call: Call) -> tuple:
    """The numbers of a call, as the launchers take them."""
    return call.ignore_index, call.label_smoothing, call.z_loss, call.softcap or 0.0, call.logit_scale


def _read(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The target and the weight, in dtypes that the kernels read."""
    return call.target.long(), as_read(call.weight, call.input.dtype)


def forward(call: Call):
    """-> loss, statistics (4, rows), denominator, lse, entropy, correct: the contract's."""
    input, float32 = call.input, torch.float32
    rows, each = input.shape[0], call.reduction == "none"
    loss = input.new_empty((rows,) if each else (), dtype=call.dtype)
    statistics = input.new_empty((4, rows), dtype=float32)
    partial = None if each else input.new_empty((2, rows), dtype=float32)
    denominator = input.new_empty((), dtype=float32) if call.reduction == "mean" else None
    lse = entropy = correct = None
    if call.need_stats:
        lse, entropy = (input.new_empty(rows, dtype=float32) for _ in range(2))
        correct = input.new_empty(rows, dtype=torch.bool)
    common.start(
        "cross_entropy_forward", input, *_read(call), loss, statistics, partial, denominator, lse, entropy, correct,
        *_options(call),
    )  # fmt: skip
    return loss, statistics, denominator, lse, entropy, correct


def backward(gradient: Gradient, call: Call):
    """-> dinput in the input's strides, or None where it was written over the logits."""
    grad_output, statistics, denominator, written = gradient
    input = call.input
    dx = torch.empty_like(input) if written is None else written
    common.start(
        "cross_entropy_backward", input, *_read(call), statistics, grad_output, denominator, dx, *_options(call),
        written=(dx,),
    )  # fmt: skip
    return dx if written is None else None
