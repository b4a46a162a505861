"""Rerouting and torch.compile: what is compiled for a class is not found for the other, in either order.

Kernels are interpreted, and their launches counted: the swapped model's each call, the stock one's never.
"""

from __future__ import annotations

import copy
import functools
import inspect
import traceback
import types

import pytest
import torch
import torch.nn.functional as F

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping import twins
from gptkern.swapping.rerouting import Rerouted, own_code

pytestmark = pytest.mark.usefixtures("triton_backend", "_fresh_compiler")

compiled = functools.partial(torch.compile, backend="eager")
in_one_graph = functools.partial(compiled, fullgraph=True)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def launches(monkeypatch):
    """launches(action): how often softmax's kernel is launched while it runs."""
    kernels, count = dispatch.load("triton", "softmax"), []
    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda call: count.append(1) or forward(call))

    def counted(action):
        count.clear()
        action()
        return len(count)

    return counted


# --- What people compile inside of a model ----------------------------------------------------------------------------


@compiled
def helper(x):
    return F.softmax(x, dim=-1)


@in_one_graph
def helper_in_one_graph(x):
    return F.softmax(x, dim=-1)


def breaks(x):
    y = F.softmax(x, dim=-1)
    torch._dynamo.graph_break()
    return y + F.softmax(y, dim=-1)


def plus_one(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


@plus_one
@compiled
def decorated(x):
    return F.softmax(x, dim=-1)


@compiled
@torch.no_grad()
def without_gradients(x):
    return F.softmax(x, dim=-1)


@torch.compiler.disable
def disabled(x):
    return F.softmax(x, dim=-1)


@torch.compiler.disable(recursive=False)
def disabled_alone(x):
    return F.softmax(x, dim=-1)


compiled_with_a_break = compiled(breaks)


def closes_over(function):
    class ClosesOverAHelper(torch.nn.Module):
        def forward(self, x):
            return function(x + 1) * 2

    return ClosesOverAHelper


ClosesOverAHelper = closes_over(helper)


def calling_by_name(name):
    """The name is one of this file's: it is in the globals of the forward, not in its closure."""
    scope = {}
    exec(f"def forward(self, x):\n    return {name}(x + 1) * 2", globals(), scope)
    return type("Calls", (torch.nn.Module,), {"forward": scope["forward"]})


class CompiledForward(torch.nn.Module):
    @compiled
    def forward(self, x):
        return F.softmax(x, dim=-1) * 2


class CompiledMethods(torch.nn.Module):
    def forward(self, x):
        return self.method(x) + self.static(x)

    @compiled
    def method(self, x):
        return F.softmax(x, dim=-1)

    @staticmethod
    @compiled
    def static(x):
        return F.softmax(x, dim=-1)


class CompilesAnInnerFunction(torch.nn.Module):
    def forward(self, x):
        @compiled
        def inner(x):
            return F.softmax(x, dim=-1)

        return inner(x) * 2


class BreaksInForward(torch.nn.Module):
    def forward(self, x):
        y = F.softmax(x, dim=-1)
        torch._dynamo.graph_break()
        rows = torch.stack([F.softmax(row, dim=-1) for row in y])
        torch._dynamo.graph_break()
        return F.softmax(rows, dim=-1)


class BreaksInAnInnerFunction(torch.nn.Module):
    def forward(self, x):
        def inner(x):
            torch._dynamo.graph_break()
            return F.softmax(x, dim=-1)

        return inner(x) * 2


def is_as_stock_in_either_order(cls, launches, first, around=lambda model: model):
    """Three calls of each; then unswapped, and swapped again."""
    x = torch.randn(2, 2)
    with torch.compiler.set_stance("force_eager"):
        expected = cls()(x)
    stock, swapped = cls(), cls()
    gptkern.swap(swapped)
    models = {"stock": around(stock), "swapped": around(swapped)}
    order = list(models) if first == "stock" else list(models)[::-1]

    def run(name):
        return launches(lambda: torch.testing.assert_close(models[name](x), expected))

    counts = {name: [] for name in models}
    for _ in range(3):
        for name in order:
            counts[name].append(run(name))
    per_call = counts["swapped"][0]
    assert per_call > 0
    assert counts == {"stock": [0] * 3, "swapped": [per_call] * 3}
    gptkern.unswap(swapped)
    assert run("swapped") == 0
    gptkern.swap(swapped)
    assert run("swapped") == per_call


either_order = pytest.mark.parametrize("first", ["stock", "swapped"])


def each_of(*classes, quick):
    """Parameters: classes, and functions of this file that a forward calls by name; in `make test` the quick ones."""
    parameters = []
    for cls in classes:
        name = cls if isinstance(cls, str) else cls.__name__
        marks = () if name in quick else pytest.mark.deep
        parameters.append(pytest.param(calling_by_name(cls) if isinstance(cls, str) else cls, id=name, marks=marks))
    return pytest.mark.parametrize("cls", parameters)


@each_of(
    *("helper", "helper_in_one_graph", "compiled_with_a_break", "decorated", "without_gradients"),
    *(ClosesOverAHelper, CompiledForward, CompiledMethods, CompilesAnInnerFunction),
    quick=("helper", "without_gradients", "CompiledMethods", "CompilesAnInnerFunction"),
)
@either_order
def test_what_is_compiled_inside_of_a_model(cls, launches, first):
    is_as_stock_in_either_order(cls, launches, first)


@each_of(
    *("helper", "helper_in_one_graph", "breaks", "without_gradients", "disabled", "disabled_alone"),
    *(CompiledForward, CompiledMethods, BreaksInForward, BreaksInAnInnerFunction),
    quick=("helper", "disabled_alone", "CompiledForward", "BreaksInAnInnerFunction"),
)
@either_order
def test_a_compiled_model(cls, launches, first):
    """With helpers that are compiled themselves, or are not to be, and with breaks in its graph."""
    is_as_stock_in_either_order(cls, launches, first, around=compiled)


@pytest.mark.deep
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cls", [calling_by_name("breaks"), CompiledMethods, BreaksInForward])
@either_order
def test_other_compilers(cls, launches, first, backend):
    is_as_stock_in_either_order(cls, launches, first, around=functools.partial(torch.compile, backend=backend))


def test_a_module_that_compiles_itself(launches):
    """`Module.compile` compiles the one `_call_impl` that all modules have."""

    def compiling_itself(model):
        model.compile(backend="eager")
        return model

    is_as_stock_in_either_order(BreaksInAnInnerFunction, launches, "stock", compiling_itself)


def test_a_compiled_helper_that_is_disabled_in_a_forward_is_not_compiled(launches):
    class Disables(torch.nn.Module):
        def forward(self, x):
            return torch.compiler.disable(helper)(x)

    model, x = Disables(), torch.randn(2, 2)
    gptkern.swap(model)
    torch._dynamo.utils.counters.clear()
    assert launches(lambda: model(x)) == 1
    assert torch._dynamo.utils.counters["frames"]["total"] == 0


def numbered(number):
    scope = {}
    source = (
        f"def forward(self, x):\n    y = F.softmax(x + {number}, -1)\n    torch._dynamo.graph_break()\n    return y"
    )
    exec(source, globals(), scope)
    return type(f"Numbered{number}", (torch.nn.Module,), {"forward": scope["forward"]})


def test_classes_beyond_what_is_compiled_of_one_function(launches):
    """With a break in the graph, the function in front of each class's forward is compiled for itself."""
    limit = 1
    model, x = torch.nn.Sequential(*(numbered(number)() for number in range(limit + 1))), torch.randn(2, 2)
    expected = model(x)
    gptkern.swap(model)
    with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
        assert launches(lambda: torch.testing.assert_close(compiled(model)(x), expected)) == len(model)


def test_copies_of_a_compiled_model_compile_nothing_again():
    """deepcopy makes the class again, which is the same one as long as a model has it."""
    model, x = CompiledForward(), torch.randn(2, 2)
    gptkern.swap(model)
    compiled(model)(x)
    torch._dynamo.utils.counters.clear()
    compiled(copy.deepcopy(model))(x)
    assert torch._dynamo.utils.counters["frames"]["total"] == 0


def test_swapping_to_and_fro_is_not_limited(launches):
    model, x = calling_by_name("helper")(), torch.randn(2, 2)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(3):
            gptkern.swap(model)
            assert launches(lambda: model(x)) == 1
            gptkern.unswap(model)
            assert launches(lambda: model(x)) == 0


def test_globals_are_not_touched():
    """They are the original's, in which torch.compile puts names of its own, and takes none that is there."""
    model = calling_by_name("breaks")()
    gptkern.swap(model)
    before = dict(globals())
    compiled(model)(torch.randn(2, 2))
    assert all(globals()[name] is value for name, value in before.items())


# --- The copy of a code object ----------------------------------------------------------------------------------------


def code_objects(code):
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from code_objects(constant)


def test_a_copied_code_equals_no_other_and_shows_the_same_places():
    def outer(x):
        return [F.softmax(row, dim=(lambda: -1)()) for row in x]

    originals = list(code_objects(outer.__code__))
    copies = [list(code_objects(own_code(outer.__code__))) for _ in range(2)]
    assert len(originals) == 3
    for original, *made in zip(originals, *copies):
        assert len({original, *made}) == 3
        for code in made:
            assert list(code.co_lines()) == list(original.co_lines())
            assert list(code.co_positions()) == list(original.co_positions())
            for place in ("co_filename", "co_firstlineno", "co_name", "co_qualname", "co_code", "co_flags"):
                assert getattr(code, place) == getattr(original, place)


class Raises(torch.nn.Module):
    def forward(self, x):
        return F.softmax(x, dim=-1) + x.wrong


def test_a_traceback_shows_the_line_of_the_forward():
    def line_of(model):
        with pytest.raises(AttributeError) as raised:
            model(torch.randn(2, 2))
        last = traceback.extract_tb(raised.value.__traceback__)[-1]
        return last.filename, last.lineno, last.name, last.line

    model = Raises()
    expected = line_of(model)
    assert expected[2:] == ("forward", "return F.softmax(x, dim=-1) + x.wrong")
    gptkern.swap(model)
    assert line_of(model) == expected
    assert inspect.getsource(type(model).forward) == inspect.getsource(Raises.forward)


def test_a_function_without_a_docstring_gets_none():
    """Python takes the first constant of a code for it, where that is text."""
    code = compile("def empty(): pass", "here", "exec").co_consts[0].replace(co_consts=())
    assert types.FunctionType(own_code(code), {}).__doc__ is None


def test_torch_compile_s_own_wrappers_keep_their_code():
    """It knows the one of `disable(recursive=False)` by that."""
    forward = Rerouted(calling_by_name("disabled_alone"), twins.find).methods["forward"]
    (made,) = (value for value in inspect.getclosurevars(forward).nonlocals.values() if value is not disabled_alone)
    assert made is not disabled_alone and made.__code__ is disabled_alone.__code__


def test_a_compiled_forward_in_front_of_another(launches):
    """What stands in front of a class's forward is not taken for the wrapper around the original one."""
    model, x = torch.nn.Sequential(CompiledForward(), CompiledForward()), torch.randn(2, 2)
    gptkern.swap(model)
    assert not any(name.startswith("_torchdynamo_") for name in vars(type(model[0]).forward))
    assert launches(lambda: compiled(model)(x)) == 2
