"""What a checkpoint recomputes, and a backward in another thread or after a block, run as the forward did."""

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


def test_a_block_inside_what_is_recomputed_holds_as_far_as_it_did(launches):
    x = torch.randn(2, WIDTH, requires_grad=True)

    def function(x):
        x = norm(x).sin()
        with gptkern.backend("triton"), gptkern.kernels():
            x = norm(x).sin()
        return norm(x)

    for reentrant in (False, True):
        loss = checkpoint(function, x, use_reentrant=reentrant).square().sum()
        assert launches == ["forward"]
        with gptkern.backend("torch"):
            loss.backward()
        assert launches == ["forward", "forward", "backward"]
        launches.clear()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", [norm, twin], ids=["kernels()", "backend"])
def test_what_ran_under_no_block_is_recomputed_under_none(launches, function, reentrant):
    x = torch.randn(2, WIDTH, requires_grad=True)
    loss = checkpoint(two, function, x, use_reentrant=reentrant).square().sum()
    # Of two modes PyTorch pops one for the backward, and the other one sees what is recomputed.
    with gptkern.backend("triton"), gptkern.kernels(), gptkern.kernels():
        loss.backward()
        assert launches == []
        function(x)
        assert launches == ["forward"]


def test_a_hook_of_a_backward_is_no_recomputation(launches):
    x = torch.randn(2, WIDTH, requires_grad=True)
    x.register_hook(twin)
    with gptkern.backend("triton"):
        (x * 2).sum().backward()
    assert launches == ["forward"]


def test_forced_for_the_process_and_automatic_in_a_block(launches, monkeypatch):
    monkeypatch.setattr(dispatch, "_default", "triton")
    monkeypatch.setattr(dispatch._State, "forced", "triton")

    def run():
        x = torch.randn(2, WIDTH, requires_grad=True)
        with gptkern.backend(None):
            return checkpoint(two, twin, x, use_reentrant=False).sum()

    # In a thread that no block is open in, as the process has it.
    loss = in_a_thread(run)
    in_a_thread(loss.backward)
    assert launches == []


def test_a_checkpoint_that_is_not_known_is_warned_of(monkeypatch):
    class Frame(checkpoints._CheckpointFrame):
        def __init__(self, recompute_fn, *rest):
            super().__init__(None, *rest)
            del self.recompute_fn
            self.again = recompute_fn

    monkeypatch.setattr(recomputation, "_warned", set())
    monkeypatch.setattr(checkpoints, "_CheckpointFrame", Frame)
    with gptkern.backend("triton"), pytest.warns(UserWarning, match="has no recompute_fn.*Run the backward inside"):
        checkpoint(twin, torch.randn(2, WIDTH, requires_grad=True), use_reentrant=False)


def test_the_stack_of_hooks_is_left_as_it_was():
    packed = []
    outer = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append("outer") or t, lambda t: t)
    inner = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append("inner") or t, lambda t: t)
    x = torch.randn(2, WIDTH, requires_grad=True)
    with gptkern.backend("triton"), outer:
        with inner:
            twin(x)
        assert set(packed) == {"inner"}
        packed.clear()
        x.sin()
        assert packed == ["outer"]


@operators
def test_every_backward_runs_where_its_forward_ran(kernel_backend, device, operator):
    """In another thread, where nothing is forced, and in a block that asks for PyTorch."""
    call = [t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() and i == 0 else t
            for i, t in enumerate(a_call(operator, device, kernel_backend))]  # fmt: skip
    output = PAIRS[operator][1](*call)
    output = output[0] if isinstance(output, tuple) else output
    seen = []

    def backward(loss):
        with Watched() as watched:
            (gradient,) = torch.autograd.grad(loss, call[0], retain_graph=True)
        seen.extend(watched.calls)
        return gradient

    loss = output.sum()
    expected = backward(loss)
    with gptkern.backend("torch"):
        same_bits("gradient", backward(loss), expected)
    same_bits("gradient", in_a_thread(lambda: backward(loss)), expected)
    assert [name for name, _ in seen] == [f"{operator}_backward"] * 3


def test_checkpoint_wrapper(launches):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = checkpoint_wrapper(
        torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Tanh(), torch.nn.LayerNorm(WIDTH))
    )
    with gptkern.backend("triton"), gptkern.kernels():
        loss = model(torch.randn(2, WIDTH, requires_grad=True)).square().sum()
    in_a_thread(loss.backward)
    assert launches.count("backward") == 2 and launches.count("forward") == 4


def test_compiled_around_a_checkpoint(launches):
    torch._dynamo.reset()
    x = torch.randn(2, WIDTH, requires_grad=True)
    compiled = torch.compile(lambda x: checkpoint(two, twin, x, use_reentrant=False), backend="aot_eager")
    with gptkern.backend("triton"):
        loss = compiled(x).square().sum()
    in_a_thread(loss.backward)
    assert launches.count("backward") == 2 and launches.count("forward") >= 2
    (expected,) = torch.autograd.grad(two(norm, x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)


def test_compiled_inside_of_a_checkpoint(launches):
    torch._dynamo.reset()
    x = torch.randn(2, WIDTH, requires_grad=True)
    compiled = torch.compile(functools.partial(two, twin), backend="aot_eager")
    with gptkern.backend("triton"):
        loss = checkpoint(compiled, x, use_reentrant=False).square().sum()
    in_a_thread(loss.backward)
    assert launches.count("forward") == 4 and launches.count("backward") == 2
