"""Ways in which a forward is recomputed: those of torch.utils.checkpoint, and autograd.Functions of one's own."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

import gptkern.functional as G

WIDTH = 8


def norm(x):
    return F.layer_norm(x, (WIDTH,)) * 2


def twin(x):
    return G.layer_norm(x, (WIDTH,)) * 2


def two(function, x):
    return function(function(x).sin())


def composable(function, x):
    """As torch.distributed's composable checkpoint: hooks around a module's forward, and no call of checkpoint()."""
    steps = checkpoints._checkpoint_without_reentrant_generator(
        function, True, checkpoints.noop_context_fn, "default", False, True, x
    )
    next(steps)
    result = function(x)
    next(steps, None)
    return result


def nested(function, x):
    return checkpoint(lambda x: checkpoint(function, checkpoint(function, x, use_reentrant=False), use_reentrant=False),
                      x, use_reentrant=False)  # fmt: skip


def selective(function, x):
    contexts = functools.partial(checkpoints.create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


def in_a_hook(function, x):
    def offloaded(x):
        with torch.autograd.graph.save_on_cpu():
            return function(x)

    return checkpoint(lambda x: offloaded(x).sin() * x, x, use_reentrant=False)


def sequential(function, x):
    return checkpoints.checkpoint_sequential([function, torch.sin, function, torch.cos], 2, x, use_reentrant=False)


def without_early_stop(function, x):
    with checkpoints.set_checkpoint_early_stop(False):
        return checkpoint(two, function, x, use_reentrant=False)


def recomputed(function, x, gradient):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = function(x)
    torch.autograd.backward(output, gradient)
    return x.grad


class SetLate(torch.autograd.Function):
    """Recomputes what it was given, and keeps it under a name of its own after it has called it."""

    @staticmethod
    def forward(ctx, forward_function, x):
        output = forward_function(x)
        ctx.save_for_backward(x)
        ctx.forward_function = forward_function
        return output

    @staticmethod
    def backward(ctx, gradient):
        return None, recomputed(ctx.forward_function, *ctx.saved_tensors, gradient)


class WithRandomState(torch.autograd.Function):
    """With the state of the random numbers, and its function in a list."""

    @staticmethod
    def forward(context, x, steps):
        context.steps, context.state = steps, torch.get_rng_state()
        context.save_for_backward(x)
        with torch.no_grad():
            return steps[0](x)

    @staticmethod
    def backward(context, gradient):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(context.state)
            return recomputed(context.steps[0], *context.saved_tensors, gradient), None


class Wrapped(torch.autograd.Function):
    """Its forward and its backward are decorated, and it keeps a module."""

    @staticmethod
    @torch.no_grad()
    def forward(ctx, x, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return recomputed(ctx.module, *ctx.saved_tensors, gradient), None


class Boxed(SetLate):
    """Gets its gradients in a list, where PyTorch knows of that."""

    boxed_grads_call = True

    @staticmethod
    def backward(ctx, gradient):
        return SetLate.backward(ctx, gradient[0] if isinstance(gradient, list) else gradient)


class WithSetup(torch.autograd.Function):
    """Nothing that is on the stack of its forward knows its ctx."""

    @staticmethod
    def forward(x, function):
        return function(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.function = inputs
        ctx.save_for_backward(x)

    backward = staticmethod(lambda ctx, gradient: (recomputed(ctx.function, *ctx.saved_tensors, gradient), None))


class AsModule(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


WAYS = {
    "none": two,
    "not reentrant": lambda function, x: checkpoint(two, function, x, use_reentrant=False),
    "reentrant": lambda function, x: checkpoint(lambda x: two(function, x), x, use_reentrant=True),
    "reentrant in a checkpoint": lambda f, x: checkpoint(
        lambda x: checkpoint(f, f(x).sin(), use_reentrant=True), x, use_reentrant=False
    ),
    "nested": nested,
    "composable": composable,
    "selective": selective,
    "sequential": sequential,
    "in another hook": in_a_hook,
    "no early stop": without_early_stop,
    "own, set late": lambda function, x: SetLate.apply(functools.partial(two, function), x),
    "own, random state": lambda function, x: WithRandomState.apply(x, [functools.partial(two, function)]),
    "own, a module, wrapped": lambda function, x: Wrapped.apply(x, AsModule(functools.partial(two, function))),
    "own in a checkpoint": lambda f, x: checkpoint(lambda x: SetLate.apply(f, f(x).sin()), x, use_reentrant=False),
    "own in a reentrant one": lambda f, x: checkpoint(lambda x: SetLate.apply(f, f(x).sin()), x, use_reentrant=True),
}  # fmt: skip
