"""Rerouting: a forward made anew with other functions in its names."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import softmax

import gptkern
from gptkern.swapping.reading import calls, followed, names_in
from gptkern.swapping.rerouting import Rerouted
from gptkern.swapping.twins import Replacement

SCALE = 2.0


def doubled(x, dim):
    return 2 * torch.softmax(x, dim)


def find(function):
    return Replacement("softmax", doubled) if function in (F.softmax, torch.softmax) else None


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


def test_the_code_under_a_decorator_is_read():
    assert "softmax" in names_in(Decorated)


def test_of_torch_only_its_modules_are_followed():
    modules = {function.__module__ for function in followed(torch.nn.MultiheadAttention)}
    assert "torch.nn.functional" in modules
    assert all(name.startswith("torch.nn.") for name in modules)


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
