"""What an activation checkpoint recomputes, and a backward in another thread or after a block, run as the forward did."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from checking import Watched, same_bits
from small_calls import PAIRS, a_call, operators
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch, recomputation

pytestmark = pytest.mark.usefixtures("automatic_choice")
WIDTH = 8


def in_a_thread(function):
    """The result of function(), called in another thread; its exception is raised here."""
    results = []

    def run():
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((result, error),) = results
    if error is not None:
        raise error
    return result


@pytest.fixture
def launches(monkeypatch):
    """The forwards and backwards of the interpreted layer_norm that have run."""
    kernels, seen = dispatch.load("triton", "layer_norm"), []
    for name in ("forward", "backward"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, run=original: seen.append(name) or run(*a))
    return seen


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
}  # fmt: skip
BACKWARDS = {
    "inside": lambda loss: loss.backward(),
    "after": lambda loss: loss.backward(),
    "in a thread": lambda loss: in_a_thread(loss.backward),
    "inside another block": lambda loss: loss.backward(),
}


@pytest.mark.parametrize("function", [norm, twin], ids=["kernels()", "backend"])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("way", WAYS)
def test_recomputed_as_the_forward_ran(launches, way, backward, function):
    x = torch.randn(2, WIDTH, requires_grad=True)
    plain = x.detach().clone().requires_grad_()
    WAYS[way](norm, plain).square().sum().backward()
    expected = plain.grad
    modes = [gptkern.kernels()] if function is norm else []

    def run():
        return WAYS[way](function, x).square().sum()

    with gptkern.backend("triton"):
        if modes:
            with gptkern.kernels():
                loss = run()
                if backward == "inside":
                    loss.backward()
        else:
            loss = run()
            if backward == "inside":
                loss.backward()
    forwards = launches.count("forward")
    assert forwards > 0
    if backward == "inside another block":
        with gptkern.backend("torch"), gptkern.kernels(["softmax"]):
            loss.backward()
    elif backward != "inside":
        BACKWARDS[backward](loss)
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)
    assert launches.count("backward") > 0
    if way != "none":
        assert launches.count("forward") > (0 if backward == "inside" else forwards), (
            "nothing was recomputed by the kernels"
        )
