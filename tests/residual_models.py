"""Blocks that add and then normalise, and how a test looks at what was computed together."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptkern import operators

WIDTH = 16


class Block(torch.nn.Module):
    """A pre-norm block, as people write it; subclasses differ in the forward alone."""

    def __init__(self, norm=torch.nn.LayerNorm):
        super().__init__()
        self.first_norm, self.second_norm = norm(WIDTH), norm(WIDTH)
        self.mix, self.feed = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.mix(self.first_norm(x))
        x = x + self.feed(self.second_norm(x))
        return x


class SumsOnly(TorchDispatchMode):
    """Counts additions of two whole tensors of hidden states, (rows, length, WIDTH)."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.width, self.count = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.add.Tensor:
            shapes = [getattr(argument, "shape", None) for argument in args[:2]]
            self.count += shapes[0] == shapes[1] and len(shapes[0]) == 3 and shapes[0][-1] == self.width
        return function(*args, **(kwargs or {}))


def sums_in(action, width=WIDTH) -> int:
    with SumsOnly(width) as mode, torch.no_grad():
        action()
    return mode.count


@contextlib.contextmanager
def noted_calls(monkeypatch):
    """("layer_norm" or "rms_norm", whether it has a residual) of each call that reaches a kernel, in a list."""
    found: list[tuple[str, bool]] = []
    with monkeypatch.context() as patch:
        for name in ("layer_norm", "rms_norm"):
            operator = operators.contract(name).OPERATOR

            def noted(call, *arguments, name=name, forward=operator.forward):
                found.append((name, call.residual is not None))
                return forward(call, *arguments)

            patch.setattr(operator, "forward", noted)
        yield found
