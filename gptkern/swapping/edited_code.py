"""A function's code again, with changes that are made in its source.

    return self.down(self.act(self.gate(x)) * self.up(x))       the tree of the source, as `tree` gives it, changed,
                                                                and compiled with the function's globals and closure

What runs is bytecode, and a source may be another one by now: it is compiled as it is first, and believed only where
that gives the code that runs. What the changed code calls in addition comes from closure cells of its own, under names
that no source of a user's has. Lines and columns, what a traceback shows, stay those of the file.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import tokenize
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# No name of the function's own begins so.
OWN = "_gptkern_"
# Code that asks for its variables would see those that are added.
_LOOKS_AT_ITSELF = {"locals", "vars", "dir", "eval", "exec"}


class Edit(NamedTuple):
    """What takes the place of a function's code."""

    code: types.CodeType
    cells: dict[str, object]  # the free variables that it has in addition, and what they hold


# A code -> the tree of its source, which can only be one: reading it takes the time of many a swap.
_trees: weakref.WeakKeyDictionary[types.CodeType, ast.FunctionDef] = weakref.WeakKeyDictionary()


def tree(function: types.FunctionType) -> ast.FunctionDef | None:
    """The function's source, its lines those of the file; None where there is none that gives the code that runs."""
    code = function.__code__
    found = _trees.get(code) or _read(function, code)
    if found is not None:
        _trees[code] = found
    return copy.deepcopy(found)


def _read(function: types.FunctionType, code: types.CodeType) -> ast.FunctionDef | None:
    if _LOOKS_AT_ITSELF.intersection(code.co_names) or any(name.startswith(OWN) for name in _names(code)):
        return None
    try:
        whole, _ = inspect.findsource(function)
        lines, first = inspect.getsourcelines(function)
        source, before = "".join(lines), 1
        if source[:1].isspace():
            # The source of a method keeps its indentation, so that no text inside it loses any.
            source, before = f"if True:\n{source}", 2
        body = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError, tokenize.TokenError):
        return None
    found = body[0].body[0] if isinstance(body[0], ast.If) else body[0]
    if not isinstance(found, ast.FunctionDef) or found.name != code.co_name:
        return None
    ast.increment_lineno(found, first - before)
    # They are no part of its code.
    found.decorator_list, found.returns = [], None
    arguments = found.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    return found if _same(_compiled(found, code, (), _imported("".join(whole))), code) else None


def edit(function: types.FunctionType, changed: ast.FunctionDef, cells: Mapping[str, object]) -> Edit:
    """The changed tree of a function, to run in its place; `cells` are the names that it has in addition."""
    return Edit(_compiled(ast.fix_missing_locations(changed), function.__code__, cells), dict(cells))


@functools.lru_cache(maxsize=16)
def _imported(source: str) -> tuple[str, ...]:
    """The names that a file imports for all that is in it: Python calls what they hold in another way."""
    found, waiting = [], [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += [alias.asname or alias.name.partition(".")[0] for alias in node.names]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return tuple(dict.fromkeys(found))


def _compiled(
    found: ast.FunctionDef, code: types.CodeType, names: Mapping[str, object] | tuple, imported: tuple[str, ...] = ()
) -> types.CodeType:
    free = [ast.arg(name) for name in sorted({*code.co_freevars, *names})]
    around = ast.FunctionDef(
        name="around",
        args=ast.arguments(posonlyargs=[], args=free, kwonlyargs=[], kw_defaults=[], defaults=[]),
        body=[found],
        decorator_list=[],
        type_params=[],
    )
    ast.copy_location(around, found)
    imports = [ast.Import([ast.alias(name)]) for name in imported if name != "*"]
    module = ast.fix_missing_locations(ast.Module(body=[*imports, around], type_ignores=[]))
    made = compile(module, code.co_filename, "exec", dont_inherit=True)
    for _ in range(2):
        made = next(constant for constant in made.co_consts if isinstance(constant, types.CodeType))
    return made.replace(co_qualname=code.co_qualname)


def _same(ours: types.CodeType, theirs: types.CodeType) -> bool:
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    if any(getattr(ours, part) != getattr(theirs, part) for part in parts):
        return False
    pairs = list(zip(ours.co_consts, theirs.co_consts))
    return len(ours.co_consts) == len(theirs.co_consts) and all(
        _same(one, other) if isinstance(one, types.CodeType) else (type(one), one) == (type(other), other)
        for one, other in pairs
    )


def _names(code: types.CodeType) -> tuple[str, ...]:
    return (*code.co_varnames, *code.co_names, *code.co_freevars, *code.co_cellvars)


# --- What changes are made of -----------------------------------------------------------------------------------------


def name(text: str) -> ast.Name:
    return ast.Name(text, ast.Load())


def call(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(name(function), list(arguments), [])


def is_name(node: ast.AST, text: str) -> bool:
    return isinstance(node, ast.Name) and node.id == text


def attributes_of(node: ast.AST, first: str) -> tuple[str, ...] | None:
    """("config", "scale") of `self.config.scale`, where `first` is "self"; None of anything else."""
    found: list[str] = []
    while isinstance(node, ast.Attribute):
        found.append(node.attr)
        node = node.value
    return tuple(reversed(found)) if found and is_name(node, first) else None


def value(node: ast.AST, function: types.FunctionType) -> object:
    """What a global, or an attribute … of a module that is one, is now; None of anything else."""
    if isinstance(node, ast.Attribute):
        module = value(node.value, function)
        return getattr(module, node.attr, None) if isinstance(module, types.ModuleType) else None
    local = isinstance(node, ast.Name) and node.id in (*function.__code__.co_varnames, *function.__code__.co_cellvars)
    if not isinstance(node, ast.Name) or local or node.id in function.__code__.co_freevars:
        return None
    return function.__globals__.get(node.id)


def stores(node: ast.AST) -> list[str]:
    """The names that are bound anywhere in it."""
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]


def loads(node: ast.AST, text: str) -> list[ast.Name]:
    """Where the name is read in it."""
    return [n for n in ast.walk(node) if is_name(n, text) and isinstance(n.ctx, ast.Load)]


def holds(node: ast.AST, searched: ast.AST) -> bool:
    """Whether the one is a part of the other, that very object."""
    return any(one is searched for one in ast.walk(node))


def is_among(node: ast.AST, nodes: list) -> bool:
    return any(node is one for one in nodes)


def binds(statement: ast.stmt, name: str) -> bool:
    """Whether it is `name = …`."""
    is_one = isinstance(statement, ast.Assign) and len(statement.targets) == 1
    return is_one and is_name(statement.targets[0], name)


def nodes(statement: ast.stmt, without: list[ast.stmt]) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """Each node of a statement, and the innermost statement that it is in; not in `without`."""
    waiting: list[tuple[ast.AST, ast.stmt]] = [(statement, statement)]
    while waiting:
        node, inside = waiting.pop()
        if is_among(node, without):
            continue
        inside = node if isinstance(node, ast.stmt) else inside
        yield node, inside
        waiting += [(child, inside) for child in ast.iter_child_nodes(node)]
