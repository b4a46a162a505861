"""Sums and their norms in a function's code: which are found, and that the code made anew computes the same."""

from __future__ import annotations

import dis
import textwrap
import types

import pytest

from gptkern.swapping import residual_code
from gptkern.swapping.rerouting_code import rerouted, sum_cell_names

# A body of `f(self, x, other=None)`, and the norms that are found in it.
FOUND = {
    "in the same variable": ("x = x + self.a(x)\nreturn x + self.b(self.n(x))", ["n"]),
    "kept as a residual": ("r = x\nx = self.a(x)\nx = r + x\nr = x\nx = self.n(x)\nreturn r + x", ["n"]),
    "into another variable": ("s = self.a(x) + x\ny = self.n(s)\nreturn s, y, x", ["n"]),
    "a norm whose sum is not used again": ("s = x + self.a(x)\nreturn self.n(s)", ["n"]),
    "an argument of another call": ("s = x + self.a(x)\nreturn self.b(self.n(s), s)", ["n"]),
    "as the inner call": ("s = x + self.a(x)\nreturn self.b(self.n(s))", ["n"]),
    "twice": ("x = x + self.a(x)\nx = x + self.b(self.n(x))\nx = self.m(x)\nreturn x", ["n", "m"]),
    "one norm twice": ("x = x + self.a(x)\nx = x + self.b(self.n(x))\nx = self.n(x)\nreturn x", ["n", "n"]),
    "in a loop": ("for _ in range(3):\n    x = x + self.a(x)\n    x = self.n(x)\nreturn x", ["n"]),
    "under a condition before": ("if other is None:\n    x = x + self.a(x)\n    x = self.n(x)\nreturn x", ["n"]),
    "with a scale": ("x = x + 3 * self.a(x)\ny = self.n(x)\nreturn x, y", ["n"]),
    "GPT-2's": ("""
x = self.a(x) + x
if other is not None:
    if not hasattr(self, "b"):
        raise ValueError
    r = x
    x = r + self.b(self.m(x))
r = x
x = self.n(x)
return r + x""", ["n", "n"]),
    "the other way round": ("""
x = self.a(x) + x
if other is None:
    x = self.n(x)
else:
    x = self.b(x)
return x""", ["b"]),
    "or not added": ("if other is None:\n    x = x + self.a(x)\nx = self.n(x)\nreturn x", ["n"]),
    "or scaled": ("x = x + self.a(x)\nif other is None:\n    x = self.n(x)\n    return x\nreturn 5 * x", ["n"]),
    "or returned": ("x = x + self.a(x)\nif other is None:\n    return x\nreturn self.n(x), x", ["n"]),
    "with a function inside": ("g = lambda: other\nx = x + self.a(x)\nx = self.n(x)\nreturn x, g()", ["n"]),
    "an exception in between": ("""
try:
    x = x + self.a(x)
    x = self.n(x)
    raise ValueError
except ValueError as error:
    return x, type(error)""", ["n"]),
    # Not found.
    "a difference": ("x = x - self.a(x)\nreturn x + self.b(self.n(x))", []),
    "in place": ("x += self.a(x)\ny = self.n(x)\nreturn x + y", []),
    "a sum that is scaled": ("x = (x + self.a(x)) * 2\ny = self.n(x)\nreturn x + y", []),
    "of what no variable holds": ("return self.n(x + self.a(x))", []),
    "of another value": ("s = x + self.a(x)\ny = self.n(x)\nreturn s + y", []),
    "after another call": ("s = x + self.a(x)\nz = self.b(x)\nreturn self.n(s) + z", []),
    "of a sum that was overwritten": ("s = x + self.a(x)\ns = x\nreturn self.n(s)", []),
    "with more arguments": ("s = x + self.a(x)\nt = self.n(s, 1)\nu = self.n(s, by=2)\nreturn t, u", []),
    "by a keyword": ("s = x + self.a(x)\nt = self.n(x=s)\nreturn t", []),
    "of a part": ("s = x + self.a(x)\nt = self.p.n(s)\nreturn t", []),
    "of another object": ("o = self.p\ns = x + self.a(x)\nt = o.n(s)\nreturn t", []),
    "where self is another": ("s = x + self.a(x)\nself = self.p\nt = self.n(s)\nreturn t", []),
    "where a function inside has self": ("g = lambda: self.a\ns = x + g()(x)\nt = self.n(s)\nreturn t", []),
    "where a function inside has the sum": ("s = x + self.a(x)\ng = lambda: s\nt = self.n(s)\nreturn t, g()", []),
    "on a condition that was changed": ("""
s = x + self.a(x)
other = x
if other is not None:
    s = self.n(s)
return s""", []),
    "a generator": ("x = x + self.a(x)\nx = self.n(x)\nyield x", []),
}  # fmt: skip


class Log:
    """What a block is called with: numbers, and the order of what was called."""

    def __init__(self):
        self.calls = []

    def a(self, x):
        self.calls.append("a")
        return 10 * x

    def b(self, x, y=0):
        self.calls.append("b")
        return 7 * x + y

    def n(self, x, by=1):
        self.calls.append("n")
        return x + 0.5 * by

    def m(self, x):
        self.calls.append("m")
        return x + 0.25

    @property
    def p(self):
        return Log()


def function(body: str):
    scope: dict = {}
    exec(f"def f(self, x, other=None):\n{textwrap.indent(body, '    ')}", scope)
    return scope["f"]


def again(f, add):
    """The function made anew; `add` of a norm's name takes the place of its additions."""
    found = residual_code.sums(f.__code__)
    cells = [types.CellType(add(norm)) for norm in dict.fromkeys(place.norm for place in found)]
    assert len(cells) == len(sum_cell_names(found))
    code = rerouted(f.__code__, [], found)
    return types.FunctionType(code, f.__globals__, f.__name__, f.__defaults__, (*(f.__closure__ or ()), *cells))


def adding_alone(norm):
    return lambda holder, operands, *conditions: (None, operands[0] + operands[1])


def adding_and_normalising(norm):
    def add(holder, operands, *conditions):
        total = operands[0] + operands[1]
        return (getattr(holder, norm)(total) if norm and False not in conditions else None), total

    return add


@pytest.mark.parametrize("body, norms", FOUND.values(), ids=FOUND)
def test_sums_are_found(body, norms):
    assert [place.norm for place in residual_code.sums(function(body).__code__) if place.norm] == norms


@pytest.mark.parametrize(
    "body, count",
    [
        ("return x + self.a(x)", 1),
        ("r = x\nx = self.a(x)\nx = r + x\nreturn x", 1),
        ("if other is None:\n    x = x + self.a(x)\nelse:\n    x = self.b(x) + self.a(x) + x\nreturn x", 2),
        ("return x + self.a(x), x", 0),
        ("g = lambda: self\nreturn x + g().a(x)", 0),
        ("return (x + self.a(x)) * 2", 0),
        ("return x - self.a(x)", 0),
        ("x += self.a(x)\nreturn x", 0),
        ("s = x + self.a(x)\nreturn x", 0),
        ("s = x + self.a(x)\nself.b(x)\nreturn s", 0),
    ],
)
def test_sums_that_are_returned(body, count):
    code = function(body).__code__
    assert [place.norm for place in residual_code.sums(code)].count("") == count
    assert residual_code.border([function(body)]).returns_sum == (count > 0)
    for add in (adding_alone, adding_and_normalising):
        assert again(function(body), add)(Log(), 2.0, 3.0) == function(body)(Log(), 2.0, 3.0)


def test_what_a_forward_calls_its_first_argument_for():
    found = residual_code.border([function("r = self.n(x)\nx = self.m(r)\ny = self.b(x)\nreturn y")])
    assert found.entry == ("n",) and found.last == ("n", "m", "b") and not found.has_loop
    found = residual_code.border([function("for layer in self.layers:\n    x = layer(x)\nreturn self.n(x)")])
    assert found.has_loop and "layers" in found.lists and found.entry == () and found.last == ("n",)


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, (body, norms) in FOUND.items() if norms])
@pytest.mark.parametrize("add", [adding_alone, adding_and_normalising])
@pytest.mark.parametrize("other", [None, 4])
def test_code_made_anew_computes_the_same(body, add, other):
    f, results = function(body), []
    for g in (f, again(f, add), again(f, add)):
        log = Log()
        results.append((g(log, 3.0, other), log.calls))
    assert results[1:] == results[:1] * 2


def test_the_norms_result_is_taken_and_not_computed_again():
    def instead(norm):
        return lambda holder, operands, *conditions: ("normalised", sum(operands))

    log = Log()
    f = again(function("s = x + self.a(x)\ny = self.n(s)\nreturn s, y"), instead)
    assert f(log, 1.0) == (11.0, "normalised") and log.calls == ["a"]


def test_many_variables_and_constants():
    """Arguments of instructions beyond a byte, and cells behind the variables."""
    names = "".join(f"v{i} = {i}.5\n" for i in range(300))
    body = names + "g = lambda: (v7, v299)\nx = x + self.a(x)\nx = self.n(x)\nreturn x, g(), v255, v298"
    f = function(body)
    for add in (adding_alone, adding_and_normalising):
        made = again(f, add)
        assert made(Log(), 1.0) == f(Log(), 1.0)
        # A cell's number that is another variable's may work by chance: Python does not look.
        assert [loaded for loaded in cells_in(made.__code__) if not loaded.startswith("+, ")] == cells_in(f.__code__)


def cells_in(code: types.CodeType) -> list[str]:
    numbers = {*dis.hasfree, *dis.haslocal}
    cells = (*code.co_cellvars, *code.co_freevars)
    found = (one for one in dis.get_instructions(code) if one.opcode in numbers)
    return [one.argval for one in found if one.argval in cells]
