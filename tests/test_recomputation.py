"""What a checkpoint recomputes, and a backward in another thread or after a block, run as the forward did."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from checking import Watched, same_bits
from recomputing import WAYS, WIDTH, Boxed, SetLate, WithRandomState, WithSetup, norm, twin, two
from small_calls import PAIRS, a_call, operators
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch, recomputation

pytestmark = pytest.mark.usefixtures("automatic_choice")


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
    plain, calls = x.detach().clone().requires_grad_(), []
    loss = WAYS[way](lambda x: calls.append(1) or norm(x), plain).square().sum()
    forwards = len(calls)
    loss.backward()
    recomputed, expected = len(calls) - forwards, plain.grad
    assert recomputed > 0 or way == "none"
    routing = gptkern.kernels() if function is norm else contextlib.nullcontext()
    with gptkern.backend("triton"), routing:
        loss = WAYS[way](function, x).square().sum()
        assert launches == ["forward"] * forwards
        if backward == "inside":
            loss.backward()
    if backward == "inside another block":
        with gptkern.backend("torch"), gptkern.kernels(["softmax"]):
            loss.backward()
    elif backward != "inside":
        BACKWARDS[backward](loss)
    torch.testing.assert_close(x.grad, expected, atol=1e-5, rtol=1e-5)
    assert launches.count("forward") == forwards + recomputed
    assert launches.count("backward") == forwards


def names_of(function):
    """The operators whose twins are called by function(), in order."""
    seen = []

    def tell(choice):
        frame = sys._getframe(1)
        while not frame.f_globals["__name__"].startswith("gptkern.operators."):
            frame = frame.f_back
        seen.append(frame.f_globals["__name__"].split(".")[2])

    with dispatch.telling(tell):
        function()
    return seen


BLOCKS = {
    "outer first": (["layer_norm"], ["softmax"]),
    "inner first": (["softmax"], ["layer_norm"]),
    "three": (["layer_norm"], ["softmax"], ["rms_norm"]),
    "three, the middle one last": (["softmax"], ["rms_norm"], ["layer_norm"]),
}
OWN = {
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "own": SetLate.apply,
    "own, boxed": Boxed.apply,
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("way", OWN)
def test_nested_kernels_blocks_are_opened_again_together(way, blocks):
    def function(x):
        x = F.softmax(F.layer_norm(x, (WIDTH,)), -1)
        return F.rms_norm(x, (WIDTH,)) * x

    losses = []

    def forward():
        x = torch.randn(2, WIDTH, requires_grad=True)
        with contextlib.ExitStack() as stack:
            for block in BLOCKS[blocks]:
                stack.enter_context(gptkern.kernels(block))
            losses.append(OWN[way](function, x).sum())

    forwards = names_of(forward)
    assert forwards == ["layer_norm", "softmax", "rms_norm"][: len(BLOCKS[blocks])]
    assert names_of(losses[0].backward) == forwards


@pytest.mark.parametrize("way", OWN)
def test_what_ran_unrouted_is_recomputed_unrouted(way):
    x = torch.randn(2, WIDTH, requires_grad=True)
    loss = OWN[way](functools.partial(two, norm), x).sum()
    # Tensor.backward is called with all modes popped; they see what torch.autograd.backward recomputes.
    with gptkern.kernels():
        assert names_of(lambda: torch.autograd.backward(loss)) == []
        assert names_of(lambda: norm(x)) == ["layer_norm"]


@pytest.mark.parametrize("way", OWN)
def test_what_one_block_did_not_route_no_other_one_routes(way):
    x = torch.randn(2, WIDTH, requires_grad=True)
    with gptkern.kernels(["layer_norm"]):
        loss = OWN[way](lambda x: F.softmax(norm(x), -1) * x, x).sum()
    with gptkern.kernels(["softmax"]):
        assert names_of(lambda: torch.autograd.backward(loss)) == ["layer_norm"]


@pytest.mark.parametrize("way", OWN)
def test_forced_for_the_process_and_recomputed_inside_another_block(launches, monkeypatch, way):
    monkeypatch.setattr(dispatch, "_default", "triton")
    monkeypatch.setattr(dispatch._State, "forced", "triton")

    def run():
        loss = OWN[way](functools.partial(two, twin), torch.randn(2, WIDTH, requires_grad=True)).sum()
        with gptkern.backend("torch"):
            loss.backward()

    # In a thread that no block is open in, as the process has it.
    in_a_thread(run)
    assert launches == ["forward"] * 4 + ["backward"] * 2


@pytest.mark.parametrize("grad", [True, False])
def test_forced_for_the_process_nobody_looks_for_checkpoints(monkeypatch, grad):
    """Which costs more host time than the call, the more the deeper the stack of Python is."""
    monkeypatch.setattr(dispatch, "_default", "torch")
    monkeypatch.setattr(dispatch._State, "forced", "torch")
    called = set()

    def trace(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == recomputation.__file__:
            called.add(frame.f_code.co_name)

    def run():
        x = torch.randn(2, WIDTH)
        with torch.set_grad_enabled(grad):
            sys.setprofile(trace)
            try:
                twin(x)
            finally:
                sys.setprofile(None)

    in_a_thread(run)
    assert called == {"blocks_are_open"}


def test_an_own_function_draws_the_same_dropout_after_the_block(triton_backend):
    """The backends' random numbers differ: another one would hide other probabilities, and say nothing."""

    def attention(query):
        return G.scaled_dot_product_attention(query, query, query, dropout_p=0.5)

    def gradient(way, inside):
        query = torch.linspace(-1, 1, 256).reshape(1, 2, 16, 8).requires_grad_()
        torch.manual_seed(1)
        with gptkern.backend("triton"):
            loss = way(query).square().sum()
            if inside:
                loss.backward()
        if not inside:
            with gptkern.backend("torch"):
                loss.backward()
        return query.grad

    expected = gradient(attention, True)
    for way in (
        lambda q: WithRandomState.apply(q, [attention]),
        lambda q: checkpoint(attention, q, use_reentrant=True),
    ):
        torch.testing.assert_close(gradient(way, False), expected)


def test_an_own_functions_backward_runs_where_its_forward_ran(launches):
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kind = type(x)  # can be called, and recomputes nothing
            return twin(x)

        @staticmethod
        def backward(ctx, gradient):
            return twin(gradient)

    x = torch.randn(2, WIDTH, requires_grad=True)
    with gptkern.backend("triton"):
        loss = Own.apply(x).sum()
    with gptkern.backend("torch"):
        loss.backward(retain_graph=True)
    assert launches == ["forward", "forward"]
    loss.backward()
    assert launches == ["forward"] * 3
    # What its forward did not call has no other place than the block.
    launches.clear()
    loss = Own.apply(x).sum()
    with gptkern.backend("triton"):
        loss.backward()
    assert launches == ["forward"]


def test_an_own_function_is_freed_as_soon_as_nobody_holds_it():
    with gptkern.backend("triton"):
        output = SetLate.apply(twin, torch.randn(2, WIDTH, requires_grad=True))
    held = weakref.ref(output.grad_fn)
    assert "apply" in vars(held())
    gc.disable()
    try:
        del output
        assert held() is None
    finally:
        gc.enable()


def test_kernels_own_functions_run_their_backward_as_it_is():
    """It knows its backend; to open the blocks again would cost more host time than to launch it."""
    with gptkern.backend("triton"):
        output = G.softmax(torch.randn(2, WIDTH, requires_grad=True), -1)
    assert "apply" not in vars(output.grad_fn)


def test_a_function_whose_ctx_is_set_up_apart_is_warned_of_and_right_inside_the_block(launches, monkeypatch):
    monkeypatch.setattr(recomputation, "_warned", set())
    x = torch.randn(2, WIDTH, requires_grad=True)
    with gptkern.backend("triton"):
        with pytest.warns(UserWarning, match="ctx of WithSetup.*Run the backward inside"):
            loss = WithSetup.apply(x, twin).sum()
        loss.backward()
    assert launches == ["forward", "forward", "backward"]


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
    # Tensor.backward is called with all modes popped.
    with gptkern.backend("triton"), gptkern.kernels():
        torch.autograd.backward(loss)
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


@pytest.mark.deep
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
