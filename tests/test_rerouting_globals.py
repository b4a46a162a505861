"""Rerouting and globals that change: while a forward runs, and between a swap and torch.compile."""

from __future__ import annotations

import inspect
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping.rerouting import CannotReroute, Rerouted
from gptkern.swapping.twins import find

HEAD = """
import functools, sys, torch
import torch.nn.functional as F
this = sys.modules[__name__]
STATE = None

"""
numbers = itertools.count()


@pytest.fixture
def module_of(monkeypatch):
    """module_of(source): a module, as one is that was imported."""

    def made(source):
        # torch.compile remembers modules by their names.
        module = types.ModuleType(f"written_here_{next(numbers)}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(HEAD + source.replace("MODULE", module.__name__), vars(module))
        return module

    return made


FORWARD = """
class Net(torch.nn.Module):
    def forward(self, x):
        {call}
        return F.softmax(x * STATE, dim=-1)
"""

# What writes the global that the forward reads, and how the forward has it run.
WRITERS = {
    "a cache that a function fills": (
        """
def build(size):
    global STATE
    if STATE is None or len(STATE) < size:
        STATE = torch.arange(size) + 1.0
""",
        "build(x.shape[-1])",
    ),
    "a counter in a method of another class": (
        """
class Clock:
    def tick(self):
        global STATE
        STATE = 1.0 if STATE is None else STATE + 1

clock = Clock()
""",
        "clock.tick()",
    ),
    "a property": (
        """
class Clock:
    @property
    def now(self):
        global STATE
        STATE = (STATE or 0.0) + 1
        return STATE

clock = Clock()
""",
        "clock.now",
    ),
    "a function inside another, under a decorator": (
        """
def maker():
    def build():
        global STATE
        STATE = (STATE or 0.0) + 1
    return functools.cache(build)

build = maker()
""",
        "build(); build.cache_clear()",
    ),
    "globals()": (
        """
def build():
    globals()["STATE"] = (STATE or 0.0) + 1
""",
        "build()",
    ),
    "setattr": (
        """
def build():
    setattr(sys.modules[__name__], "STATE", (STATE or 0.0) + 1)
""",
        "build()",
    ),
    "the module under another name": (
        """
def build():
    this.STATE = (STATE or 0.0) + 1
""",
        "build()",
    ),
    "an import of the module itself": (
        """
def build():
    import MODULE
    MODULE.STATE = (STATE or 0.0) + 1
""",
        "build()",
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_global_that_is_written_while_the_forward_runs(writer, module_of, monkeypatch):
    source, call = WRITERS[writer]
    module = module_of(source + FORWARD.format(call=call))
    inputs = [torch.rand(2, size) for size in (3, 3, 5)]
    expected = [module.Net()(x) for x in inputs]

    module.STATE = None
    model = module.Net()
    report = gptkern.swap(model)
    assert [entry.operator for entry in report.replaced] == ["softmax"]
    count, settled = [], dispatch.settled
    monkeypatch.setattr(dispatch, "settled", lambda tensor: count.append(1) or settled(tensor))
    for x, result in zip(inputs, expected):
        torch.testing.assert_close(model(x), result)
    assert len(count) == len(inputs)
    assert type(model).forward.__wrapped__.__globals__ is vars(module)


def test_functions_made_anew_have_their_own_globals(module_of):
    module = module_of("def helper(x):\n    return F.softmax(x, -1)\n" + FORWARD.format(call="x = helper(x)"))
    forward = Rerouted(module.Net, find).methods["forward"]
    cells = inspect.getclosurevars(forward).nonlocals
    assert forward.__globals__ is cells["helper, rerouted"].__globals__ is vars(module)
    assert set(cells) == {f"{name}, {what}" for name in ("helper", "F.softmax") for what in ("known", "rerouted")}


def test_a_function_that_takes_a_replaced_ones_place_while_the_forward_runs(module_of):
    module = module_of("""
ACTIVATION = F.softmax

class Clock:
    def tick(self):
        global ACTIVATION
        ACTIVATION = F.log_softmax if ACTIVATION is F.softmax else F.softmax

clock = Clock()

class Net(torch.nn.Module):
    def forward(self, x):
        first = ACTIVATION(x, dim=-1)
        clock.tick()
        return first, ACTIVATION(x, dim=-1)
""")
    x = torch.rand(2, 3)
    both = F.softmax(x, -1), F.log_softmax(x, -1)
    model = module.Net()
    gptkern.swap(model)
    torch.testing.assert_close(model(x), both)
    torch.testing.assert_close(model(x), both[::-1])


@pytest.mark.parametrize("text", ["eval('F.softmax(x, -1)')", "[*locals()] and F.softmax(x, -1)"])
def test_code_that_runs_text_or_asks_for_its_variables(text, module_of, monkeypatch):
    """Its own code, and a mode that sees each call, those in the text too."""
    module = module_of(FORWARD.format(call=f"STATE = {text}").replace("x * STATE", "x"))
    with pytest.raises(CannotReroute, match=r"uses (eval|locals)"):
        Rerouted(module.Net, find)
    model, x = module.Net(), torch.rand(2, 3)
    gptkern.swap(model)
    count, settled = [], dispatch.settled
    monkeypatch.setattr(dispatch, "settled", lambda tensor: count.append(1) or settled(tensor))
    torch.testing.assert_close(model(x), torch.softmax(x, -1))
    assert len(count) == 2


# --- Between a swap and torch.compile ---------------------------------------------------------------------------------

TWO_NAMES = """
STATE, ACTIVATION = 1.0, F.softmax

def helper(x):
    return x * 3

class Net(torch.nn.Module):
    def scaled(self, x):
        return x + 1

    def forward(self, x):
        return ACTIVATION(helper(self.scaled(x)) * STATE, dim=-1)
"""


def traced(model, x):
    return torch.compile(model, backend="eager", fullgraph=True)(x)


def exported(model, x):
    return torch.export.export(model, (x,)).module()(x)


def exported_strictly(model, x):
    return torch.export.export(model, (x,), strict=True).module()(x)


CHANGES = {
    "a number": lambda module: setattr(module, "STATE", 5.0),
    "a tensor": lambda module: setattr(module, "STATE", torch.arange(3.0)),
    "a function of the module": lambda module: setattr(module, "helper", lambda x: x - 1),
    "a function that is replaced": lambda module: setattr(module, "ACTIVATION", torch.nn.functional.log_softmax),
    "a method": lambda module: setattr(module.Net, "scaled", lambda self, x: 2 * torch.softmax(x, -1)),
    "forward": lambda module: setattr(module.Net, "forward", lambda self, x: torch.softmax(x, -1) + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trace", [traced, exported, exported_strictly])
def test_what_changed_before_the_first_trace_counts(trace, change, module_of):
    torch.compiler.reset()
    module, x = module_of(TWO_NAMES), torch.rand(2, 3)
    model, after = module.Net(), module.Net()
    gptkern.swap(model)
    CHANGES[change](module)
    expected = after(x)
    torch.testing.assert_close(trace(model, x), expected)
    torch.testing.assert_close(model(x), expected)


FACTORY = """
def maker(factor):
    def helper(x):
        return F.softmax(x, dim=-1) * factor
    return helper

def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) - 1

    def change(other):
        nonlocal function
        function = other

    wrapper.change = change
    return wrapper

STATE, ACTIVATION, helper, another = 1.0, F.softmax, maker(2), decorated(maker(4))

class Net(torch.nn.Module):
    def forward(self, x):
        return ACTIVATION(helper(x) * STATE + another(x), dim=-1)
"""
CHANGES_OF_ONE_CODE = {
    "another of one factory": lambda module: setattr(module, "helper", module.maker(3)),
    "its decorated self": lambda module: setattr(module, "helper", module.decorated(module.helper)),
    "under a decorator": lambda module: module.another.change(F.relu),
    "another of one factory under a decorator": lambda module: module.another.change(module.maker(5)),
}


@pytest.mark.parametrize(
    ("source", "change"),
    [(TWO_NAMES, change) for change in CHANGES.items() if change[0] != "a method"]
    + [(FACTORY, change) for change in CHANGES_OF_ONE_CODE.items()],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_changes_after_a_trace_counts(source, change, module_of):
    """A method that is patched is the exception: torch.compile does not look at it, swapped or not."""
    torch.compiler.reset()
    module, x, graphs = module_of(source), torch.rand(2, 3), []
    model, stock = module.Net(), module.Net()
    gptkern.swap(model)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph, fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), stock(x))
    assert len(graphs) == 1
    change[1](module)
    torch.testing.assert_close(compiled(x), stock(x))
    compiled(x)
    settled = len(graphs)
    compiled(x)
    assert len(graphs) == settled > 1
