"""Rerouting: what a forward's names stand for is looked up as the original looks it up, when it runs."""

from __future__ import annotations

import contextlib
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import softmax

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping.rerouting import CannotReroute, Rerouted
from gptkern.swapping.twins import Replacement

SCALE = 2.0
COUNTER = 0


@contextlib.contextmanager
def counting(monkeypatch):
    """A list that grows by one with each call of one of gptkern's operators."""
    count = []
    settled = dispatch.settled
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "settled", lambda tensor: count.append(1) or settled(tensor))
        yield count


def helper(x):
    return F.softmax(x, dim=-1)


def other_helper(x):
    return x + 1


class Alias(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1) * SCALE


class Helper(torch.nn.Module):
    def forward(self, x):
        return other_helper(helper(x))


def test_globals_are_as_the_module_has_them_now(monkeypatch):
    model, x = Alias(), torch.rand(2, 3)
    gptkern.swap(model)
    before = model(x)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    with counting(monkeypatch) as count:
        torch.testing.assert_close(model(x), before * 3 / 2)
        assert len(count) == 1
    with monkeypatch.context() as patch:
        patch.delitem(globals(), "SCALE")
        with pytest.raises(NameError, match="SCALE"):
            model(x)
    torch.testing.assert_close(model(x), before * 3 / 2)


def test_globals_that_are_not_there_yet_are_found_once_they_are(monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(globals(), "SCALE")
        model = Alias()
        gptkern.swap(model)
    torch.testing.assert_close(model(torch.zeros(1, 2)), torch.ones(1, 2))


LIBRARY = types.ModuleType("library")
LIBRARY.softmax, LIBRARY.scale = F.softmax, 2.0


class UsesALibrary(torch.nn.Module):
    def forward(self, x):
        return LIBRARY.softmax(x, dim=-1) * LIBRARY.scale


def test_a_module_in_the_globals_is_as_it_is_now_but_for_what_was_replaced(monkeypatch):
    model, x = UsesALibrary(), torch.rand(2, 3)
    gptkern.swap(model)
    before = model(x)
    monkeypatch.setattr(LIBRARY, "scale", 6.0)
    with counting(monkeypatch) as count:
        torch.testing.assert_close(model(x), 3 * before)
        assert len(count) == 1


def test_functions_that_were_replaced_in_the_globals_are_routed_again(monkeypatch):
    model, x = Helper(), torch.rand(2, 3)
    gptkern.swap(model)
    monkeypatch.setitem(globals(), "other_helper", lambda x: x + 5)
    monkeypatch.setitem(globals(), "helper", lambda x: 2 * softmax(x, dim=-1))
    with counting(monkeypatch) as count:
        torch.testing.assert_close(model(x), 2 * torch.softmax(x, -1) + 5)
        assert len(count) == 1
    monkeypatch.setitem(globals(), "helper", lambda x: 0 * x)
    with counting(monkeypatch) as count:
        assert torch.equal(model(x), torch.full((2, 3), 5.0))
        assert len(count) == 0


class Writes(torch.nn.Module):
    def forward(self, x):
        global COUNTER
        COUNTER += 1
        return F.softmax(x, dim=-1)


class AsksForGlobals(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1) * globals()["SCALE"]


class Evaluates(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1) * eval("COUNTER + 1")


class Executes(torch.nn.Module):
    def forward(self, x):
        found = {}
        exec("found['scale'] = SCALE", None, {"found": found})
        return F.softmax(x, dim=-1) * found["scale"]


class AsksForItsName(torch.nn.Module):
    def forward(self, x):
        assert __name__ == "test_rerouting_names"
        return F.softmax(x, dim=-1)


def find_softmax(function):
    return Replacement("softmax", torch.softmax) if function is F.softmax else None


@pytest.mark.parametrize("cls", [Writes, AsksForGlobals, Evaluates, Executes, AsksForItsName])
def test_code_that_writes_its_globals_or_asks_for_them(cls, monkeypatch):
    """They are its own; text that it runs alone needs a mode."""
    if cls in (Evaluates, Executes):
        with pytest.raises(CannotReroute):
            Rerouted(cls, find_softmax)
    else:
        assert Rerouted(cls, find_softmax).methods["forward"].__globals__ is globals()
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


def test_a_replaced_function_in_a_closure_is_as_it_is_now(monkeypatch):
    function = F.softmax

    class Local(torch.nn.Module):
        def forward(self, x):
            return function(x, dim=-1)

    model, x = Local(), torch.rand(2, 3)
    gptkern.swap(model)
    with counting(monkeypatch) as count:
        model(x)
        assert len(count) == 1
    function = F.log_softmax
    assert torch.equal(model(x), F.log_softmax(x, dim=-1))


def test_a_closure_variable_that_is_not_there_yet():
    class Local(torch.nn.Module):
        def forward(self, x):
            return later(F.softmax(x, dim=-1))

    model, x = Local(), torch.rand(2, 3)
    gptkern.swap(model)
    later = torch.exp
    assert torch.equal(model(x), torch.exp(F.softmax(x, dim=-1)))


@pytest.mark.parametrize("after", [torch.softmax, F.softmax, lambda x, dim: 2 * F.softmax(x, dim=dim)])
def test_what_a_closure_variable_is_set_to_is_routed(after, monkeypatch):
    """Another function that is replaced, or one that calls such a one."""
    function = helper_of_one_argument

    class Local(torch.nn.Module):
        def forward(self, x):
            return function(x, dim=-1)

    model, x = Local(), torch.rand(2, 3)
    gptkern.swap(model)
    function = after
    for _ in range(2):
        with counting(monkeypatch) as count:
            assert torch.equal(model(x), after(x, dim=-1))
        # The expected value is stock: one call is the model's.
        assert len(count) == 1


def helper_of_one_argument(x, dim):
    return F.softmax(x, dim=dim) + 1


@pytest.mark.parametrize("after", [torch.softmax, helper_of_one_argument])
def test_an_empty_closure_variable_is_routed_once_it_is_filled(after, monkeypatch):
    class Local(torch.nn.Module):
        def forward(self, x):
            return F.softmax(x, dim=-1) + later(x, dim=-1)

    model, x = Local(), torch.rand(2, 3)
    gptkern.swap(model)
    later = after
    with counting(monkeypatch) as count:
        torch.testing.assert_close(model(x), F.softmax(x, dim=-1) + after(x, dim=-1))
    assert len(count) == 2
