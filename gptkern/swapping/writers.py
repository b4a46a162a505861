"""Which of a module's globals its own functions write, read off their code.

What is read is every function that has the same globals: those of the module, the methods of its classes, what is
nested in them or stands under a decorator. Written are

    NAME = ...                          under `global NAME`
    this_module.NAME = ...              where the code knows its module: a global, `sys.modules[__name__]`, an import
    globals()[...] = ..., setattr(this_module, ...)         any name

What another module's functions write is not found.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
from collections.abc import Iterable, Iterator

from gptkern.swapping.reading import contents, instructions

_STORES = {dis.opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL")}
_ATTRIBUTE_STORES = {dis.opmap[name] for name in ("STORE_ATTR", "DELETE_ATTR")}
_ITEM_STORES = {dis.opmap[name] for name in ("STORE_SUBSCR", "DELETE_SUBSCR")}
_IMPORT_FROM = dis.opmap["IMPORT_FROM"]
_DICT_WRITERS = {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__"}

# Stands for every name.
ANY = "*"


def written(own: dict[str, object], functions: Iterable[types.FunctionType] = ()) -> dict[str, str]:
    """Name -> the function that writes it, of the globals `own`; under `ANY`, one that may write each of them.

    Args:
        functions: such as may not be found from the globals, as those that were made by a function that is gone.
    """
    found: dict[str, str] = {}
    codes: set[int] = set()
    module = sys.modules.get(own.get("__name__"))
    module = module if getattr(module, "__dict__", None) is own else None
    for function in (*_functions(own), *functions):
        if function.__globals__ is own and id(function.__code__) not in codes:
            codes.add(id(function.__code__))
            for name in _written_by(function.__code__, own, module):
                found.setdefault(name, function.__qualname__)
    return found


def _written_by(code: types.CodeType, own: dict[str, object], module: types.ModuleType | None) -> Iterator[str]:
    # Of a module's functions hardly one writes: the bytes say that in far less time than the instructions.
    operations = set(code.co_code[::2])
    names = set(code.co_names)
    if operations & _STORES:
        yield from (i.argval for i in instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"))
    if "globals" in names and (operations & _ITEM_STORES or names & _DICT_WRITERS):
        yield ANY
    if module is not None and _knows_its_module(names, operations, own, module):
        if names & {"setattr", "delattr", "__dict__", "vars"}:
            yield ANY
        if operations & _ATTRIBUTE_STORES:
            yield from (i.argval for i in instructions(code) if i.opname in ("STORE_ATTR", "DELETE_ATTR"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _written_by(constant, own, module)


def _knows_its_module(names: set[str], operations: set[int], own: dict[str, object], module: types.ModuleType) -> bool:
    full = module.__name__
    return (
        {"modules", "__name__"} <= names
        or full in names
        or (_IMPORT_FROM in operations and full.rpartition(".")[2] in names)
        or any(own.get(name) is module for name in names)
    )


def _functions(own: dict[str, object]) -> Iterator[types.FunctionType]:
    """The functions that can be found from a module's globals."""
    name = own.get("__name__")
    seen: set[int] = set()
    waiting = list(own.values())
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = type(value)  # a proxy's own `__class__` runs code
        if issubclass(kind, types.FunctionType):
            yield value
            waiting += [contents(cell) for cell in value.__closure__ or ()]
        elif issubclass(kind, (staticmethod, classmethod, types.MethodType)):
            waiting.append(value.__func__)
        elif issubclass(kind, property):
            waiting += [value.fget, value.fset, value.fdel]
        elif issubclass(kind, (functools.partial, functools.partialmethod)):
            waiting.append(value.func)
        elif issubclass(kind, type):
            if value.__module__ == name:
                waiting += list(vars(value).values())
            continue
        elif issubclass(kind, types.ModuleType):
            continue
        # Of functools.wraps and functools.cache. Any object may stand here, and refuse.
        with contextlib.suppress(Exception):
            waiting.append(vars(value).get("__wrapped__"))
