"""gptkern.swapping.edited_code: a function's source, believed only where it is that of the code that runs."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import sys
import traceback
import types

import torch
import torch.nn.functional as F

from gptkern.swapping import edited_code

OUTSIDE = 3


def plain(x, *rest, scale: float = 2.0, **options):
    """A docstring
    of two lines."""
    return F.relu(x) * scale + OUTSIDE, [part + scale for part in rest], options


def closing_over(other):
    def inside(x):
        return lambda y: x + y + other

    return inside


class Holder:
    def method(self, x):
        text = """
          kept as it is"""
        return super().__repr__(), text, x


FUNCTIONS = [plain, closing_over(1), Holder.method, torch.nn.Linear.forward, inspect.getsource, traceback.format_exc]


def again(function, cells=None, changed=None):
    tree = edited_code.tree(function)
    assert tree is not None
    if changed is not None:
        changed(tree)
    edit = edited_code.edit(function, tree, cells or {})
    old = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    new = {name: types.CellType(value) for name, value in edit.cells.items()}
    closure = tuple((old | new)[name] for name in edit.code.co_freevars)
    made = types.FunctionType(edit.code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def test_an_unchanged_tree_gives_the_same():
    for function in FUNCTIONS:
        made = again(function)
        assert made.__code__.co_qualname == function.__code__.co_qualname
        assert [*made.__code__.co_lines()][-1][2] == [*function.__code__.co_lines()][-1][2]
    x = torch.randn(3)
    assert again(plain)(1 + x, 4, a=5)[1:] == ([6.0], {"a": 5})
    assert again(closing_over(1))(2)(3) == 6
    holder = Holder()
    assert again(Holder.method)(holder, 4) == holder.method(4)


def test_a_cell_of_ones_own():
    def changed(tree):
        tree.body[-1].value = edited_code.call(f"{edited_code.OWN}added", tree.body[-1].value)

    made = again(closing_over(1), {f"{edited_code.OWN}added": lambda inner: inner(10)}, changed)
    assert made(2) == 13


def test_lines_stay_those_of_the_file():
    made = again(closing_over("text"))
    try:
        made(1)(2)
    except TypeError:
        (*_, last) = traceback.extract_tb(sys.exc_info()[2])
    assert last.line == "return lambda y: x + y + other" and last.filename == __file__


def module_of(path, source):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_file_that_was_changed_since_is_not_believed(tmp_path):
    path = tmp_path / "edited.py"
    source = "def f(x):\n    return x + 1\n"
    others = [
        "def f(x):\n    return x + 2\n",
        "def f(x):\n    return x - 1\n",
        "def f(x):\n    return y + 1\n",
        "def f(x):\n    return x + 1.0\n",
        "def f(x):\n    return x + True\n",
        "def g(x):\n    return x + 1\n",
        "f = lambda x: x + 1\n",
        "def f(x:\n",
        "class f:\n    x = 1\n",
        "",
    ]
    for changed in others:
        function = module_of(path, source).f
        path.write_text(changed)
        os.utime(path, (1, len(changed)))
        assert edited_code.tree(function) is None, changed
    assert edited_code.tree(module_of(path, source).f) is not None


def test_what_has_no_source_or_looks_at_itself():
    namespace = {}
    exec("def f(x):\n    return x", namespace)
    assert edited_code.tree(namespace["f"]) is None
    assert edited_code.tree(lambda x: x) is None

    def looks(x):
        return locals()

    def own(_gptkern_x):
        return _gptkern_x

    assert edited_code.tree(looks) is None and edited_code.tree(own) is None


def test_what_a_name_gives():
    expression = lambda text: ast.parse(text, mode="eval").body  # noqa: E731
    assert edited_code.value(expression("F.relu"), plain) is F.relu
    assert edited_code.value(expression("torch.nn.functional.relu"), plain) is F.relu
    # A local is no global of that name; an attribute of what is no module may be anything.
    assert edited_code.value(expression("x"), plain) is None
    assert edited_code.value(expression("Holder.method"), plain) is None
    assert edited_code.attributes_of(expression("self.a.b"), "self") == ("a", "b")
    assert edited_code.attributes_of(expression("other.a"), "self") is None
    assert edited_code.attributes_of(expression("self"), "self") is None
