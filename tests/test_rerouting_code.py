"""Code made anew: what it gives, by each form that a call can have, and what it shows of itself.

What a form is to give its own source says, run with the other functions in its globals.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import sys
import tarfile
import traceback
import types
import typing

import pytest

from gptkern.swapping.rerouting_code import CannotReroute, cell_names, rerouted

CHAINS = [("act",), ("lib", "act"), ("lib", "deep", "act")]

# `f` of each is called with a list of numbers. What is called: act, lib.act, lib.deep.act, and kept, lib.kept.
FORMS = {
    "calls": "def f(x):\n    return act(x), lib.act(x), lib.deep.act(x), kept(x), lib.kept(x)",
    "keywords and defaults": "def f(x, *, how=2):\n    return act(x=x), lib.act(x=x, by=how), lib.deep.act(x, by=how)",
    "starred": "def f(x):\n    return act(*[x]), lib.act(*[x]), lib.deep.act(**{'x': x}), lib.act(*[x], **{'by': 3})",
    "values": "def f(x):\n    a, b = act, lib.deep.act\n    return [g(x) for g in (a, b, lib.act, kept)]",
    "an attribute of one": "def f(x):\n    return lib.act.__name__, act.__name__",
    "one as the other's argument": "def f(x):\n    return act(lib.act(lib.deep.act(x)))",
    "comprehensions": "def f(x):\n    return [act(x) for i in x], {lib.act([i])[0] for i in x}, {i: act(x) for i in x}",
    "a generator expression": "def f(x):\n    return list(act([i]) for i in x if lib.act([i]))",
    "comprehensions in each other": "def f(x):\n    return [[lib.deep.act([i + j]) for i in x] for j in x]",
    "lambda": "def f(x):\n    return (lambda y: act(y) + x)(x), (lambda: 1)()",
    "a function inside": """
def f(x):
    def g(y, k=2, *, d=3) -> int:
        return act(y) + x + [k, d]
    return g(x)""",
    "a function in a function that calls nothing": """
def f(x):
    def middle():
        def inner(y=x):
            return lib.deep.act(y)
        return inner
    return middle()()""",
    "a function inside under a condition": "def f(x):\n    g = None if not x else lambda: act(x)\n    return g()",
    "a decorated function inside": """
def f(x):
    def twice(g):
        return lambda y: g(g(y))
    @twice
    def inner(y):
        return act(y)
    return inner(x)""",
    "a class inside": """
def f(x):
    class Inner:
        value = lib.act(x)
        kept = act
        def method(self):
            return lib.deep.act(x), type(self).value, __class__.__name__
    return Inner().method(), Inner.kept(x)""",
    "a class inside with a name of its own": """
def f(x):
    class Inner:
        act = len
        value = act(x)
    return Inner.value, act(x)""",
    "locals of the same name": "def f(x):\n    lib = x\n    g = lambda: lib\n    return g(), act(x)",
    "a variable of the name that a function inside closes over": """
def f(x):
    def middle(act):
        return lambda y: act(y)
    return middle(sum)(x), middle(act)(x)""",
    "a function inside whose local has the name": """
def f(x):
    def g(act):
        return act + x
    return g(x), act(x)""",
    "branches": """
def f(x):
    out = []
    for i in x:
        if i % 3 == 0:
            continue
        elif i > 7:
            break
        out += act([i]) if i % 2 else lib.act([i])
        while len(out) % 2:
            out += lib.deep.act([i])
    else:
        out += act(x)
    return out or act(x)""",
    "exceptions": """
def f(x):
    out = []
    for i in (*x, None):
        try:
            try:
                out += act([i + 1])
            except TypeError as error:
                out += lib.act([1])
                raise ValueError(type(error).__name__) from error
            finally:
                out += lib.deep.act([2])
        except ValueError as error:
            return out, str(error), act([3])""",
    "with": """
def f(x):
    with context() as a, context() as b:
        return act(x), a, lib.act(x), b""",
    "a generator": """
@make
def g(x):
    got = yield act(x)
    yield from (lib.act([i]) for i in x)
    return got
def f(x):
    it = g(x)
    return next(it), it.send(5), list(it)""",
    "a coroutine": """
@make
async def g(x):
    async def inner(y):
        return lib.deep.act(y)
    async with context():
        return [await inner(act([i])) for i in x]
def f(x):
    try:
        g(x).send(None)
    except StopIteration as stop:
        return stop.value""",
    "match": """
def f(x):
    match x:
        case [first, *rest]:
            return act([first]), lib.act(rest)
        case _:
            return None""",
    "text": "def f(x):\n    return f'{act(x)!r:>40} {lib.deep.act(x)}'",
    "a global that it writes": """
def f(x):
    global count
    count = sum(act(x))
    def again():
        global count
        count += sum(lib.act(x))
    again()
    return count""",
    "a global that it asks for": "def f(x):\n    return globals()['kept'](x), act(x), globals() is here",
    "names beyond a byte": "def f(x):\n    y = x\n"
    + "".join(f"    y = y + lib.name_{i}\n" for i in range(300))
    + "    return lib.act(y), lib.deep.act(y)",
    "locals beyond a byte": "def f(x):\n"
    + "".join(f"    v_{i} = x\n" for i in range(300))
    + "    g = lambda: (v_299, act(v_3))\n    return g(), lib.act(v_7)",
    "a long way to jump": "def f(x):\n    out = []\n    for i in x:\n        if i % 2:\n"
    + "            out += act([i]) + lib.act([i])\n" * 400
    + "    return len(out), sum(out), lib.deep.act(x)",
}


def library(kind):
    """The functions that a form calls; of another kind those that are rerouted give other results."""

    def named(name, factor):
        def function(x, by=1):
            return [factor * i * by for i in x]

        function.__name__ = f"{name}{factor}"
        return function

    factor = {"stock": 1, "other": 10, "third": 100}[kind]
    lib, deep = types.ModuleType("lib"), types.ModuleType("deep")
    lib.deep, lib.kept, lib.act, deep.act = deep, named("kept", 2), named("a", 3 * factor), named("b", 5 * factor)
    vars(lib).update({f"name_{i}": [i] for i in range(300)})
    return {"lib": lib, "kept": named("kept", 2), "act": named("c", 7 * factor)}


class context:
    def __enter__(self):
        return 4

    def __exit__(self, *_):
        return None

    async def __aenter__(self):
        return 4

    async def __aexit__(self, *_):
        return None


def globals_of(source, kind, make):
    scope = {"context": context, "make": make, "__name__": "forms", **library(kind)}
    scope["here"] = scope
    exec(compile(source, "forms", "exec"), scope)
    return scope


def value_of(chain, scope):
    value = scope[chain[0]]
    for name in chain[1:]:
        value = getattr(value, name)
    return value


def made(function, other):
    """The function with its chains rerouted to what they lead to in the globals `other`."""
    scope = function.__globals__
    values = [value for chain in CHAINS for value in (value_of(chain, scope), value_of(chain, other))]
    cells = (*(function.__closure__ or ()), *map(types.CellType, values))
    again = types.FunctionType(
        rerouted(function.__code__, CHAINS), scope, function.__name__, function.__defaults__, cells
    )
    again.__kwdefaults__ = function.__kwdefaults__
    return again


def as_it_is(function):
    return function


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    source, x = FORMS[form], [1, 2, 3, 4, 5, 6, 8]
    other = globals_of(source, "other", as_it_is)
    expected = other["f"](x)
    scope = globals_of(source, "stock", lambda function: made(function, other))
    function = made(scope["f"], other)
    assert function(x) == expected != globals_of(source, "stock", as_it_is)["f"](x)
    # What is another thing by now than what was known is left as it is.
    known = {name: scope[name] for name in ("act", "lib")}
    scope.update(library("third"))
    assert function(x) == globals_of(source, "third", as_it_is)["f"](x)
    scope.update(known)
    assert function(x) == expected


@pytest.mark.parametrize("form", FORMS)
def test_places_are_those_of_the_source(form):
    """Lines, columns and what a tracer is told; so debuggers and coverage see the source that they know."""
    source, x = FORMS[form], [1, 2, 3]
    other = globals_of(source, "other", as_it_is)

    def lines(function):
        seen = []

        def tracer(frame, event, _):
            if frame.f_code.co_filename == "forms":
                seen.append((event, frame.f_lineno, frame.f_code.co_name))
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            function(x)
        finally:
            sys.settrace(before)
        return seen

    scope = globals_of(source, "stock", as_it_is)
    again = made(scope["f"], other)
    assert lines(again) == lines(scope["f"])
    original, new = scope["f"].__code__, again.__code__
    assert new.co_firstlineno == original.co_firstlineno and new.co_qualname == original.co_qualname
    assert {*new.co_positions()} == {*original.co_positions()}


def test_a_traceback():
    source = "def f(x):\n    a = lib.act(x)\n    return [lib.deep.act(\n        y) for y in a]\n"
    scope = globals_of(source, "stock", as_it_is)

    def places(function):
        with pytest.raises(TypeError) as raised:
            function([1])
        found = traceback.extract_tb(raised.value.__traceback__)
        return [
            (one.name, one.lineno, one.end_lineno, one.colno, one.end_colno) for one in found if one.filename == "forms"
        ]

    assert places(made(scope["f"], scope)) == places(scope["f"])


def test_closures():
    """Cells that a function closes over stay its own; a module there is a chain's begin as a global is."""
    source = """
def maker(lib, count):
    def f(x):
        nonlocal count
        count += 1
        return lib.act(x), (lambda: lib.deep.act(x) + [count])(), act(x)
    return f
f = maker(lib, 5)"""
    other = globals_of(source, "other", as_it_is)
    scope = globals_of(source, "stock", as_it_is)
    again = made(scope["f"], other)
    assert again([1]) == other["f"]([1])
    assert again([1]) == other["f"]([1])
    assert inspect.getclosurevars(scope["f"]).nonlocals["count"] == 7  # of the same cell


def test_a_chain_that_begins_in_two_places():
    scope = globals_of("def f(x):\n    return (lib if x else lib.deep).act(x), act(x)", "stock", as_it_is)
    with pytest.raises(CannotReroute, match="takes act from one of several objects"):
        made(scope["f"], scope)


def test_a_python_that_is_not_known(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 99, 0, "final", 0))
    with pytest.raises(CannotReroute, match=r"Python 3\.99"):
        rerouted((lambda x: act(x)).__code__, CHAINS)  # noqa: F821


def code_objects(code):
    yield code
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from code_objects(constant)


@pytest.mark.parametrize("module", [argparse, asyncio.base_events, dataclasses, tarfile, typing])
def test_what_is_read_is_written_as_it_was(module):
    count = 0
    for code in code_objects(compile(inspect.getsource(module), "here", "exec")):
        if not code.co_flags & inspect.CO_NEWLOCALS:
            continue
        again = rerouted(code, [])
        assert again.co_code == code.co_code and again.co_exceptiontable == code.co_exceptiontable
        assert [*again.co_positions()] == [*code.co_positions()]
        count += 1
    assert count > 30


def test_names_of_cells_are_no_names_of_variables():
    assert not any(name.isidentifier() for name in cell_names(CHAINS))
