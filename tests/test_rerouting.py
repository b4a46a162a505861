"""Rerouting: a forward made anew with other functions in its names."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import softmax

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping.rerouting import CannotReroute, Replacement, Rerouted, calls

SCALE = 2.0
COUNTER = 0


def doubled(x, dim):
    return 2 * torch.softmax(x, dim)


def find(function):
    return Replacement("softmax", doubled) if function in (F.softmax, torch.softmax) else None


@contextlib.contextmanager
def counting(monkeypatch):
    """A list that grows by one with each call of one of gptkern's operators."""
    count = []
    settled = dispatch.settled
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "settled", lambda tensor: count.append(1) or settled(tensor))
        yield count


def run(cls, *args):
    """The rerouted forward on a new module."""
    rerouted = Rerouted(cls, find)
    module = type("Module", (cls,), rerouted.methods)()
    return module(*args), rerouted, module


def helper(x):
    return F.softmax(x, dim=-1)


def other_helper(x):
    return x + 1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


def recursive(x, depth):
    return softmax(x, dim=-1) if depth == 0 else recursive(x, depth - 1)


class Alias(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1) * SCALE


class Imported(torch.nn.Module):
    def forward(self, x):
        return softmax(x, dim=-1)


class FullPath(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.softmax(torch.relu(x), dim=-1)


class Helper(torch.nn.Module):
    def forward(self, x):
        return other_helper(helper(x))


class Recursive(torch.nn.Module):
    def forward(self, x):
        return recursive(x, 2)


class Decorated(torch.nn.Module):
    @decorated
    def forward(self, x):
        return F.softmax(x, dim=-1)


class Methods(torch.nn.Module):
    def forward(self, x):
        return self.attend(x) + self.static(x)

    def attend(self, x, *, dim=-1):
        return F.softmax(x, dim=dim)

    @staticmethod
    def static(x):
        return softmax(x, dim=-1)


class Nested(torch.nn.Module):
    def forward(self, x):
        return torch.stack([(lambda row: F.softmax(row, dim=-1))(row) for row in x])


class Closure(torch.nn.Module):
    normalise = F.softmax

    def _make(function):
        def forward(self, x):
            return function(x, dim=-1)

        return forward

    forward = _make(F.softmax)


class Super(Alias):
    def forward(self, x):
        return F.softmax(super().forward(x), dim=-1)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Alias, lambda p: 2 * p * SCALE),
        (Imported, lambda p: 2 * p),
        (FullPath, lambda p: 2 * p),
        (Helper, lambda p: 2 * p + 1),
        (Recursive, lambda p: 2 * p),
        (Decorated, lambda p: 2 * p + 1),
        (Methods, lambda p: 4 * p),
        (Nested, lambda p: 2 * p),
        (Closure, lambda p: 2 * p),
        # What the class above calls is that class's: only exact types are swapped.
        (Super, lambda p: 2 * torch.softmax(p * SCALE, dim=-1)),
    ],
)
def test_forms_of_calls(cls, expected):
    x = torch.rand(3, 4)
    stock = cls()(x)
    actual, _, _ = run(cls, x)
    torch.testing.assert_close(actual, expected(torch.softmax(x, dim=-1)))
    # The class itself, and everybody else who calls these functions, sees nothing of it.
    assert torch.equal(cls()(x), stock)
    assert calls(cls, find).operators == {"softmax"}


def test_nothing_to_replace_gives_nothing():
    assert Rerouted(Helper, lambda function: None).methods == {}


def test_globals_are_as_the_module_has_them_now(monkeypatch):
    x = torch.rand(2, 3)
    before, rerouted, module = run(Alias, x)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert torch.equal(module(x), before)
    rerouted.refresh()
    torch.testing.assert_close(module(x), before * 3 / 2)
    _, rerouted, module = run(Helper, x)
    monkeypatch.setitem(globals(), "other_helper", lambda x: x + 5)
    monkeypatch.setitem(globals(), "helper", lambda x: 0 * x)
    rerouted.refresh()
    assert torch.equal(module(x), torch.full((2, 3), 5.0))
    # Not there yet when the forward is made anew: found once it is.
    with monkeypatch.context() as patch:
        patch.delitem(globals(), "SCALE")
        rerouted = Rerouted(Alias, find)
        module = type("Module", (Alias,), rerouted.methods)()
        with pytest.raises(NameError, match="SCALE"):
            module(x)
    rerouted.refresh()
    torch.testing.assert_close(module(x), before * 3 / 2)


def test_the_swapped_forward_brings_itself_up_to_date(monkeypatch):
    model, x = Alias(), torch.rand(2, 3)
    gptkern.swap(model)
    before = model(x)
    monkeypatch.setitem(globals(), "SCALE", 4.0)
    torch.testing.assert_close(model(x), 2 * before)


class Writes(torch.nn.Module):
    def forward(self, x):
        global COUNTER
        COUNTER += 1
        return F.softmax(x, dim=-1)


class AsksForGlobals(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1) * globals()["SCALE"]


class AsksForItsName(torch.nn.Module):
    def forward(self, x):
        assert __name__ == "test_rerouting"
        return F.softmax(x, dim=-1)


@pytest.mark.parametrize("cls", [Writes, AsksForGlobals, AsksForItsName])
def test_code_that_needs_its_own_globals_is_routed_by_a_mode(cls, monkeypatch):
    with pytest.raises(CannotReroute):
        Rerouted(cls, find)
    model, x = cls(), torch.rand(2, 3)
    expected = model(x)
    gptkern.swap(model)
    written = COUNTER
    with counting(monkeypatch) as count:
        assert torch.equal(model(x), expected)
    assert COUNTER - written == (cls is Writes)
    assert len(count) == 1


def test_a_recomputed_activation_takes_the_same_way(monkeypatch):
    """Under activation checkpointing forward runs a second time, from within the backward."""

    class Checkpointed(torch.nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.attend, x, use_reentrant=False)

        def attend(self, x):
            return F.softmax(x, dim=-1)

    model, x = Checkpointed(), torch.rand(2, 3, requires_grad=True)
    gptkern.swap(model)
    with counting(monkeypatch) as count:
        loss = model(x).square().sum()
        assert len(count) == 1
        loss.backward()
        assert len(count) == 2


@pytest.mark.parametrize("cls", [Alias, FullPath, Helper, Decorated, Methods, Nested])
def test_compiles_in_one_graph_with_the_calls_rerouted(cls, triton_backend):
    """A compiled model that silently ran on PyTorch would have no registered op in its graph."""
    model, x = cls(), torch.rand(2, 4)
    gptkern.swap(model)
    expected = model(x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), expected)
    assert "gptkern.softmax_forward" in str(graphs[0].code)


def counted(function):
    """A decorator that writes a closure variable, and reads another one."""
    calls, factor = 0, 1.0

    @functools.wraps(function)
    def wrapper(self, x):
        nonlocal calls
        calls += 1
        return factor * function(self, x)

    def set_factor(value):
        nonlocal factor
        factor = value

    wrapper.calls, wrapper.set_factor = lambda: calls, set_factor
    return wrapper


def test_closure_variables_stay_shared():
    class Counted(torch.nn.Module):
        @counted
        def forward(self, x):
            return F.softmax(x, dim=-1)

    model, x = Counted(), torch.rand(2, 3)
    expected = model(x)
    gptkern.swap(model)
    Counted.forward.set_factor(3.0)
    torch.testing.assert_close(model(x), 3 * expected)
    assert Counted.forward.calls() == 2


def test_a_replaced_function_in_a_closure_is_as_it_is_now():
    function = F.softmax

    class Local(torch.nn.Module):
        def forward(self, x):
            return function(x, dim=-1)

    x = torch.rand(2, 3)
    _, rerouted, module = run(Local, x)
    function = F.log_softmax
    rerouted.refresh()
    assert torch.equal(module(x), F.log_softmax(x, dim=-1))
