"""Where nobody looks on, launchers are called without the dispatcher; whoever looks on sees the registered ops."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern
import gptkern.functional as G
from gptkern import operators
from gptkern.backends import registration, tracing, unseen
from gptkern.backends.cuda import emulated

OPS = ["gptkern::layer_norm_forward", "gptkern::layer_norm_backward"]
OPERATOR = operators.contract("layer_norm").OPERATOR


@pytest.fixture(autouse=True, params=["in Python", "compiled"])
def on_launchers(request, monkeypatch):
    """And who looks on is asked in Python, or by csrc/unseen.h."""
    monkeypatch.setattr(unseen, "look", unseen.look_in_python)
    monkeypatch.setattr(unseen, "signature", unseen.signature_in_python)
    if request.param == "compiled":
        if emulated.compiler() is None:
            pytest.skip("there is no C++ compiler for csrc/")
        unseen.ask(emulated.load())
    with gptkern.backend("torch:launchers"):
        yield


@pytest.fixture
def counted(monkeypatch):
    """The directions that went through the dispatcher, in turn."""
    found = []
    for direction in ("forward", "backward"):
        op, start = getattr(OPERATOR, f"_{direction}")

        def counting(*given, op=op, direction=direction):
            found.append(direction)
            return op(*given)

        monkeypatch.setattr(OPERATOR, f"_{direction}", (counting, start))
    return found


def leaves(count: int = 3):
    x, weight, bias = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)[:count]]


def call(x, weight, bias):
    return G.layer_norm(x, (8,), weight, bias)


def gradients(tensors):
    return torch.autograd.grad(call(*tensors).sin().sum(), tensors)


def test_nobody_looks_on(counted):
    tensors = leaves()
    gradients(tensors)
    with torch.no_grad():
        call(*tensors)
    with torch.inference_mode():
        call(*tensors)
    assert counted == []


def test_without_a_gradient_autograd_is_not_asked(monkeypatch):
    def refuse(*_):
        raise AssertionError("an autograd.Function was applied")

    contract = operators.contract("layer_norm")
    for function in (contract.LayerNormFunction, contract._LayerNormAloneFunction):
        monkeypatch.setattr(function, "apply", refuse)
        monkeypatch.setattr(function, "apply_unseen", refuse)
    tensors = leaves()
    with torch.no_grad():
        assert not call(*tensors).requires_grad
    assert not call(*(tensor.detach() for tensor in tensors)).requires_grad
    with pytest.raises(AssertionError, match="was applied"):
        call(*tensors)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_ops():
    with Dispatched() as mode:
        gradients(leaves())
    assert [name for name in mode.names if name in OPS] == OPS


def test_a_profiler_sees_the_ops():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        gradients(leaves())
    assert {event.name for event in profiler.events()} >= {*OPS}


def test_make_fx_records_the_ops():
    tensors = leaves()
    for pre_dispatch in (False, True):
        traced = make_fx(lambda *given: call(*given), pre_dispatch=pre_dispatch)
        graph = traced(*(tensor.detach() for tensor in tensors))
        assert OPS[0] in {node.target.name() for node in graph.graph.nodes if hasattr(node.target, "name")}


def test_fake_tensors_are_not_handed_to_launchers():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    x, weight, bias = (mode.from_tensor(tensor.detach()) for tensor in leaves())
    # Inside the mode and outside: a fake tensor brings its own.
    for inside in (mode, contextlib.nullcontext()):
        with inside:
            found, *_ = OPERATOR.forward(operators.contract("layer_norm").Call(x, None, weight, bias, 1e-5), "triton")
        assert type(found).__name__ == "FakeTensor" and found.shape == (4, 8)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "watching",
    [Dispatched, Functions, lambda: torch.autocast("cpu", torch.bfloat16), torch.autograd.profiler.profile],
    ids=["dispatch mode", "function mode", "autocast", "profiler"],
)
def test_who_looks_on_gets_the_dispatcher(counted, watching):
    tensors = leaves()
    output = call(*tensors)
    assert counted == []
    with watching():
        call(*tensors)
        # PyTorch pops a function mode while it is asked of torch.autograd.grad, which ends outside of it.
        output.grad_fn.apply(torch.ones_like(output)) if watching is Functions else output.backward(torch.ones(4, 8))
    assert counted == ["forward", "backward"]


def test_a_compiled_graph_holds_the_op():
    torch._dynamo.reset()
    tensors = leaves()
    expected = gradients(tensors)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    found = torch.autograd.grad(torch.compile(call, fullgraph=True, backend=keep)(*tensors).sin().sum(), tensors)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
    assert len(graphs) == 1


def negated(tensor):
    return torch._neg_view(-tensor)


def left_by_a_transform(tensor):
    kept = []
    torch.func.grad(lambda inside: (kept.append(inside), inside.sum())[1])(tensor)
    return kept[0]


@pytest.mark.parametrize("make", [negated, left_by_a_transform])
def test_what_memory_does_not_hold_goes_to_the_dispatcher(make, counted):
    """A view that is negated when it is read, and what a transform has left behind, are not what their memory says."""
    x, weight, bias = (tensor.detach() for tensor in leaves())
    expected = call(x, weight, bias)
    assert counted == []
    torch.testing.assert_close(call(make(x), weight, bias), expected)
    assert counted == ["forward"]
    output = call(x.requires_grad_(), weight, bias)
    grad = torch.randn_like(output)
    (wanted,) = torch.autograd.grad(output, x, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, x, make(grad))[0], wanted)


def test_zeros_without_memory_are_seen():
    call_of = operators.contract("layer_norm").Call(torch._efficientzerotensor(4, 8), None, None, None, 1e-5)
    assert not registration.is_unseen(call_of)
    assert registration.is_unseen(call_of._replace(input=torch.zeros(4, 8)))


def test_a_subclass_is_asked_for_its_operators(counted):
    class Logged(torch.Tensor):
        pass

    x, weight, bias = (tensor.detach() for tensor in leaves())
    operators.contract("layer_norm").LayerNormFunction.apply(
        x.as_subclass(Logged), None, weight, bias, 1e-5, "torch:launchers"
    )
    assert counted == ["forward"]


def test_the_launcher_of_a_call_on_another_gpu_has_that_one_current(monkeypatch):
    current = []

    @contextlib.contextmanager
    def on(tensor):
        current.append(tensor)
        yield

    monkeypatch.setattr(registration, "_is_elsewhere", lambda tensor: True)
    monkeypatch.setattr(registration, "on_device_of", on)
    x, weight, bias = leaves()
    output = call(x, weight, bias)
    assert len(current) == 1 and current[0].data_ptr() == x.data_ptr()
    output.sum().backward()
    assert len(current) == 2


# --- The same answers from both -------------------------------------------------------------------------------------


def in_forward_mode(look):
    with torch.autograd.forward_ad.dual_level():
        return look()


def in_a_transform(look):
    found = []
    torch.func.vmap(lambda x: (found.append(look()), x)[1])(torch.zeros(2))
    return found[0]


def in_a_trace(look):
    found = []
    torch.jit.trace(lambda x: (found.append(look()), x + 1)[1], torch.zeros(2), check_trace=False)
    return found[0]


def before_dispatch(look):
    found = []
    make_fx(lambda x: (found.append(look()), x + 1)[1], pre_dispatch=True)(torch.zeros(2))
    return found[0]


def with_a_key_before_dispatch(look):
    """What is left of it where torch functions are no longer seen."""
    torch._C._dispatch_tls_set_dispatch_key_included(torch._C.DispatchKey.PreDispatch, True)
    try:
        return look()
    finally:
        torch._C._dispatch_tls_set_dispatch_key_included(torch._C.DispatchKey.PreDispatch, False)


def inside(block):
    def run(look):
        with block():
            return look()

    return run


WATCHED = {
    "a dispatch mode": inside(Dispatched),
    "a function mode": inside(Functions),
    "autocast": inside(lambda: torch.autocast("cpu", torch.bfloat16)),
    "a profiler": inside(torch.autograd.profiler.profile),
    "forward mode": in_forward_mode,
    "a transform": in_a_transform,
    "a trace": in_a_trace,
    "make_fx before dispatch": before_dispatch,
    "the key before dispatch": with_a_key_before_dispatch,
}


@pytest.mark.parametrize("watched", WATCHED.values(), ids=WATCHED)
def test_whoever_looks_on_is_seen(watched):
    given = torch.zeros(2), None, 1.0

    def look():
        asked = any(question() for question in tracing.WATCHERS)
        assert bool(tracing.is_watched()) == asked and registration.is_unseen(given) == (not asked)
        assert (unseen.signature(given) is None) == asked
        return asked

    assert not look() and watched(look) and not look()


def test_what_is_no_plain_tensor_is_seen():
    dense = torch.zeros(2)
    parameter, subclass = torch.nn.Parameter(dense), dense.as_subclass(type("Own", (torch.Tensor,), {}))
    offset = torch._efficientzerotensor(8)[3:]
    for argument in (dense, parameter, None, True, 1, 1.0, "same", torch.float16, torch.zeros(0)):
        assert registration.is_unseen((dense, argument)) and registration.is_unseen((dense, argument), dense.device)
    for argument in (subclass, offset, negated(dense), left_by_a_transform(dense), [dense], object()):
        assert not registration.is_unseen((dense, argument)) and unseen.signature((dense, argument)) is None


def test_what_checks_hang_on_tells_calls_apart():
    """By what a tensor is and not by what it holds; arguments by type and value."""
    dense = torch.zeros(2, 3)
    alike = [dense, torch.ones(2, 3), torch.zeros(2, 3).requires_grad_(), torch.nn.Parameter(dense)]
    others = [dense.double(), dense.bfloat16(), dense.half(), dense.int(), dense.to("meta"), dense.T.contiguous()]
    others += [
        dense[0],
        dense[None],
        0,
        0.0,
        False,
        None,
        1,
        True,
        1.0,
        "",
        "1",
        torch.int8,
        torch.float16,
        (),
        (1,),
        (1, 2),
    ]
    assert len({unseen.signature((each, 1)) for each in alike}) == 1
    found = [unseen.signature(arguments) for each in [dense, *others] for arguments in ((each,), (each, 1))]
    # A meta tensor has no memory that C could ask of: no signature.
    assert len(set(found) - {None}) == len(found) - found.count(None) and found.count(None) in (0, 2)
    for argument in ([1], (1.0,), (True,), ("1",), dense.to_sparse(), torch.nested.nested_tensor([dense])):
        assert unseen.signature((dense, argument)) is None


def test_tensors_of_two_devices_are_seen():
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    assert not registration.is_unseen((here, None, there), here.device)
    assert registration.is_unseen((here, None, here), here.device)


def test_a_saved_tensor_that_comes_back_on_another_device_is_named():
    tensors = leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor.to("meta")):
        output = call(*tensors)
    with pytest.raises(RuntimeError, match=r"layer_norm: in the backward .* is on meta; it needs to be on cpu"):
        output.sum().backward()
