"""Rerouting and globals that change: while a forward runs, and between a swap and torch.compile."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

import gptkern
from gptkern.backends import dispatch
from gptkern.swapping.rerouting import CannotReroute, Rerouted
from gptkern.swapping.twins import find
from gptkern.swapping.writers import written

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
    with pytest.raises(CannotReroute, match=r"STATE|any global"):
        Rerouted(module.Net, find)


BYSTANDERS = {
    "another global is written": """
def build():
    global OTHER
    OTHER = 1
""",
    "globals are read": """
def build():
    return globals()["STATE"]
""",
    "another object's attribute of that name": """
class Clock:
    def tick(self):
        self.STATE = 1
""",
}


@pytest.mark.parametrize("bystander", BYSTANDERS)
def test_what_writes_none_of_the_globals_that_are_read_changes_nothing(bystander, module_of):
    module = module_of(BYSTANDERS[bystander] + FORWARD.format(call="pass"))
    assert set(Rerouted(module.Net, find).methods) == {"forward"}


def test_a_global_that_is_deleted_is_written(module_of):
    module = module_of("def build():\n    global STATE\n    del STATE\n")
    assert written(vars(module)) == {"STATE": "build"}


class RefusesToBeRead:
    @property
    def __class__(self):
        raise RuntimeError("not bound")

    @property
    def __dict__(self):
        raise RuntimeError("not bound")


def test_an_object_in_the_globals_that_refuses_to_be_read(module_of):
    module = module_of(FORWARD.format(call="pass"))
    module.proxy = RefusesToBeRead()
    assert written(vars(module)) == {}


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
