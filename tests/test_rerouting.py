"""Rerouting: a forward made anew with other functions in its names."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import softmax

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping.reading import calls, followed, names_in
from gptkern.swapping.rerouting import CannotReroute, Rerouted
from gptkern.swapping.twins import Replacement

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
    """What the rerouted forward gives on a new module."""
    return type("Module", (cls,), Rerouted(cls, find).methods)()(*args)


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


def even(x, depth):
    return softmax(x, dim=-1) if depth == 0 else odd(x, depth - 1)


def odd(x, depth):
    return even(x, depth - 1)


class Mutual(torch.nn.Module):
    def forward(self, x):
        return odd(x, 3)


class Shadows(torch.nn.Module):
    def forward(self, x):
        helper = x + 1
        return helper


class Namespace:
    softmax = staticmethod(F.softmax)


class UsesANamespace(torch.nn.Module):
    def forward(self, x):
        return Namespace.softmax(x, dim=-1)


def noted(function):
    function.note = function.__name__
    return function


class Described(torch.nn.Module):
    @noted
    def forward(self, x: torch.Tensor, *, dim: int = -1) -> torch.Tensor:
        """Of x."""
        return F.softmax(self.attend(x), dim=dim)

    @noted
    def attend(self, x, scale: float = 1.0):
        return F.softmax(x * scale, dim=-1)


class Scale(list):
    """Can be called, and has no hash."""

    def __call__(self, x):
        return x * self[0]


scale = Scale([3.0])


class CallsAnObject(torch.nn.Module):
    def forward(self, x):
        return scale(F.softmax(x, dim=-1))


class Local(torch.nn.Module):
    def forward(self, x):
        class Inner:
            result = F.softmax(x, dim=-1) * SCALE

        return Inner.result


class CallsItsObject(torch.nn.Module):
    scale = Scale([3.0])

    def forward(self, x):
        return self.scale(F.softmax(x, dim=-1))


total = torch.Tensor.sum


class CallsADescriptor(torch.nn.Module):
    """Which has no `__module__`."""

    def forward(self, x):
        return F.softmax(x, dim=-1) * total(x)


class Inherits(Methods):
    """Whose methods are of another package."""


Inherits.__module__ = "another.package"

WRITTEN = 0


def writes_a_global(function):
    @functools.wraps(function)
    def wrapper(*args):
        global WRITTEN
        WRITTEN += 1
        return function(*args)

    return wrapper


class DecoratedByAWriter(torch.nn.Module):
    """The decorator's own globals hold nothing that is replaced: it keeps them."""

    @writes_a_global
    def forward(self, x):
        return F.softmax(x, dim=-1)


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
        (Mutual, lambda p: 2 * p),
        (CallsAnObject, lambda p: 6 * p),
        (Local, lambda p: 2 * p * SCALE),
        (DecoratedByAWriter, lambda p: 2 * p),
        (CallsItsObject, lambda p: 6 * p),
        (Inherits, lambda p: 4 * p),
        # What the class above calls is that class's: only exact types are swapped.
        (Super, lambda p: 2 * torch.softmax(p * SCALE, dim=-1)),
    ],
)
def test_forms_of_calls(cls, expected):
    x = torch.rand(3, 4)
    stock = cls()(x)
    torch.testing.assert_close(run(cls, x), expected(torch.softmax(x, dim=-1)))
    # The class itself, and everybody else who calls these functions, sees nothing of it.
    assert torch.equal(cls()(x), stock)
    assert calls(cls, find).operators == {"softmax"}


def test_a_global_without_a_module():
    x = torch.rand(2, 3)
    torch.testing.assert_close(run(CallsADescriptor, x), 2 * torch.softmax(x, dim=-1) * x.sum())


def test_nothing_to_replace_gives_nothing():
    assert Rerouted(Helper, lambda function: None).methods == {}


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


def test_the_code_under_a_decorator_is_read():
    assert "softmax" in names_in(Decorated)


def test_of_torch_only_its_modules_are_followed():
    modules = {function.__module__ for function in followed(torch.nn.MultiheadAttention)}
    assert "torch.nn.functional" in modules
    assert all(name.startswith("torch.nn.") for name in modules)


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
        assert __name__ == "test_rerouting"
        return F.softmax(x, dim=-1)


@pytest.mark.parametrize("cls", [Writes, AsksForGlobals, Evaluates, Executes, AsksForItsName])
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


def long_forward(names):
    """forward of a module with so many other names in front of its softmax."""
    lines = [f"    x = x + NAMES.name_{i}" for i in range(names)]
    scope = {"F": F, "NAMES": type("Names", (), {f"name_{i}": 0.0 for i in range(names)})}
    exec("\n".join(["def forward(self, x):", *lines, "    return F.softmax(x, dim=-1)"]), scope)
    return scope["forward"]


@pytest.mark.parametrize("names", [100, 130, 300])
def test_a_forward_of_many_names(names):
    """The index of a name that does not fit into a byte has an instruction of its own in front."""
    cls = type("Long", (torch.nn.Module,), {"forward": long_forward(names)})
    x = torch.rand(2, 3)
    torch.testing.assert_close(run(cls, x), 2 * torch.softmax(x, dim=-1))


def test_a_relative_import_in_a_forward():
    scope = {"F": F, "__package__": "gptkern.models"}
    exec("def forward(self, x):\n    from .gpt import GPTConfig\n    return F.softmax(x, dim=-1)", scope)
    cls = type("Imports", (torch.nn.Module,), {"forward": scope["forward"]})
    x = torch.rand(2, 3)
    torch.testing.assert_close(run(cls, x), 2 * torch.softmax(x, dim=-1))


def test_a_local_of_the_name_of_a_function_is_not_that_function():
    assert calls(Shadows, find).operators == set()


def test_attributes_are_followed_of_modules_alone():
    """What takes a module's place is a module; another object's place it cannot take."""
    assert calls(UsesANamespace, find).operators == set()


def test_signatures_and_attributes_are_kept():
    rerouted = Rerouted(Described, find)
    for name in ("forward", "attend"):
        made, own = rerouted.methods[name], vars(Described)[name]
        assert inspect.signature(made) == inspect.signature(own) and made is not own
        assert (made.__name__, made.__qualname__, made.__module__, made.__doc__, made.note) == (
            own.__name__, own.__qualname__, own.__module__, own.__doc__, own.note
        )  # fmt: skip
