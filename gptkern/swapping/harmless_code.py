"""Statements that are known to write into no tensor that was there before them.

    loss = None                                 a constant, a name, an attribute, an operation of them
    targets = targets[:, 1:].contiguous()       a method or function of the lists below
    targets = kwargs.pop("targets", targets)    of the call's own **kwargs
    if self.training:                           a condition of these, around these
        loss = 0.0

What runs between a head and its loss may change neither what the head was given nor its weight, under whatever name:
the fused loss would see the change. No list of writes is ever whole, so this is one of what writes nothing.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable

import torch

from gptkern.swapping import edited_code

_EXPRESSIONS = (
    ast.Name,
    ast.Constant,
    ast.Attribute,
    ast.Subscript,
    ast.Slice,
    ast.Tuple,
    ast.List,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.Call,
    ast.keyword,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)
_METHODS = {
    "bool",
    "clone",
    "contiguous",
    "detach",
    "dim",
    "eq",
    "expand",
    "flatten",
    "float",
    "int",
    "long",
    "masked_fill",
    "ne",
    "new_full",
    "new_zeros",
    "numel",
    "repeat",
    "reshape",
    "roll",
    "size",
    "squeeze",
    "to",
    "transpose",
    "unsqueeze",
    "view",
    "where",
}
_FUNCTIONS: tuple[Callable, ...] = (
    torch.arange,
    torch.cat,
    torch.full_like,
    torch.nn.functional.pad,
    torch.ones_like,
    torch.roll,
    torch.where,
    torch.zeros_like,
)


def is_harmless(statement: ast.stmt, function: types.FunctionType, names: set[str], head: tuple[str, str]) -> bool:
    """Whether a statement of the function is of these, and reads none of the names, nor the head, of ("self", name)."""

    code = function.__code__
    at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    kwargs = code.co_varnames[at] if code.co_flags & inspect.CO_VARKEYWORDS else None

    def expression(node: ast.expr | None) -> bool:
        return node is None or all(part(one) for one in ast.walk(node))

    def part(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            return call(node)
        if isinstance(node, ast.Name) and node.id in names:
            return False
        return isinstance(node, _EXPRESSIONS) and edited_code.attributes_of(node, head[0]) != head[1:]

    def call(node: ast.Call) -> bool:
        if any(keyword.arg in (None, "out") for keyword in node.keywords):
            return False
        called = edited_code.value(node.func, function)
        if any(called is known for known in _FUNCTIONS):
            return True
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop") and kwargs is not None:
            return edited_code.is_name(node.func.value, kwargs)
        # A module's own method may do anything, whatever its name.
        is_method = isinstance(node.func, ast.Attribute) and called is None
        return is_method and node.func.attr in _METHODS and not edited_code.is_name(node.func.value, head[0])

    def is_bound(target: ast.expr) -> bool:
        return isinstance(target, ast.Name) or (isinstance(target, ast.Tuple) and all(map(is_bound, target.elts)))

    def known(one: ast.stmt) -> bool:
        if isinstance(one, ast.Pass):
            return True
        if isinstance(one, ast.Expr):
            return isinstance(one.value, ast.Constant)
        if isinstance(one, ast.Assign):
            return all(map(is_bound, one.targets)) and expression(one.value)
        if isinstance(one, ast.AnnAssign):
            # The annotation of a local name is not evaluated.
            return isinstance(one.target, ast.Name) and expression(one.value)
        if isinstance(one, ast.If):
            return expression(one.test) and all(map(known, [*one.body, *one.orelse]))
        return False

    return known(statement)


def writes(node: ast.AST) -> bool:
    """Whether an expression looks as if it writes: it calls `x.add_`, `torch.relu_`, or something with `out=`."""
    for one in ast.walk(node):
        if isinstance(one, ast.Call):
            called = one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")
            if called.endswith("_") or any(keyword.arg in ("out", "inplace") for keyword in one.keywords):
                return True
    return False
