"""What the tests of every operator do: judge a call against its oracle, watch the registered ops."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from oracles import ORACLE, YARDSTICK, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from gptkern.measuring.rounding import noise
from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close, worst_error


def check(
    twin: Callable,
    oracle: Callable,
    *tensors: torch.Tensor,
    grad_output: torch.Tensor | None = None,
    need: tuple[bool, ...] | None = None,
    floor: float = 0.0,
) -> torch.Tensor:
    """Runs `twin(*tensors)` and its backward; judges the result and every gradient; returns the result.

    On the way: neither the inputs nor the incoming gradient may change, and a frozen tensor gets no gradient.

    Args:
        oracle: called as oracle(*tensors, precision=…).
        tensors: the floating-point arguments that gradients are taken of, as they are: strides are kept.
        grad_output: random by default.
        need: which of the tensors require a gradient; all by default.
        floor: an absolute error that passes in any case, for what the oracle's operations do not have: a log-sum-exp
            that is kept in float32, an exp that PyTorch approximates.
    """
    need = (True,) * len(tensors) if need is None else need
    leaves = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(tensors, need)]
    before = [tensor.clone() for tensor in tensors]
    output = twin(*leaves)
    reference, yardstick = (oracle(*before, precision=precision) for precision in (ORACLE, YARDSTICK))
    noises = functools.cache(lambda: noise(lambda: (oracle(*before, precision=ORACLE),)))
    _judge("forward", output, reference, yardstick, FORWARD_FACTOR, floor, lambda: noises()[0])

    if grad_output is None:
        grad_output = torch.randn(output.shape, device=output.device).to(output.dtype)
    grad_before = grad_output.clone()
    if any(need):
        output.backward(grad_output)

        def evaluated(precision):
            return gradients(lambda *t: oracle(*t, precision=precision), before, grad_before, precision)

        references, yardsticks = evaluated(ORACLE), evaluated(YARDSTICK)
        of_gradients = functools.cache(lambda: noise(lambda: evaluated(ORACLE)))
        for index, leaf in enumerate(leaves):
            if not need[index]:
                assert leaf.grad is None, f"tensor {index} requires no gradient and got one"
                continue
            assert leaf.grad is not None, f"tensor {index} requires a gradient and got none"
            assert leaf.grad.dtype == leaf.dtype
            name = f"gradient of tensor {index}"
            _judge(
                name, leaf.grad, references[index], yardsticks[index], GRADIENT_FACTOR, floor,
                lambda index=index: of_gradients()[index],
            )  # fmt: skip
    same_bits("the incoming gradient", grad_output, grad_before)
    for index, (tensor, copy) in enumerate(zip(tensors, before)):
        same_bits(f"tensor {index}", tensor, copy)
    return output


def _judge(name, actual, reference, yardstick, factor, floor, noise):
    if floor == 0 or not worst_error(actual, reference) <= floor:
        assert_close(name, actual, reference, yardstick, factor, noise)


def same_bits(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises AssertionError unless both are equal, NaN to NaN."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    assert equal.all(), f"{name} differs in {(~equal).sum().item()} of {equal.numel()} places"


class Watched(TorchDispatchMode):
    """Records the calls of the registered ops `gptkern::*` made inside the `with` block: (name, results)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, object]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        if op.namespace == "gptkern":
            self.calls.append((op._schema.name.removeprefix("gptkern::"), results))
        return results

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def raised_by(function: Callable, *args, **kwargs) -> BaseException:
    """The exception that a call raises; an AssertionError where it raises none."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        return error
    raise AssertionError(f"nothing was raised; the result is {result!r}")


def assert_compiles(twin: Callable, *tensors: torch.Tensor) -> None:
    """torch.compile traces twin(*tensors) in one graph, and forward and backward give what eager gives."""
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    runs = []
    grad_output = None
    for function in (twin, compiled):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        if grad_output is None:
            grad_output = torch.randn(output.shape, device=output.device).to(output.dtype)
        output.backward(grad_output)
        runs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for name, eager, traced in zip(["forward", *(f"gradient of tensor {i}" for i in range(len(tensors)))], *runs):
        same_bits(f"compiled {name}", traced, eager)
