"""Statements that are known to write into no tensor that was there before them.

    loss = None                                 a constant, a name, an attribute, an operation of them
    targets = targets[:, 1:].contiguous()       a method or function of the lists below
    targets = kwargs.pop("targets", targets)    of the call's own **kwargs
    if self.training:                           a condition of these, around these
        loss = 0.0

    loss_fct = CrossEntropyLoss()               a module that is made

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
    "all",
    "any",
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
    "permute",
    "repeat",
    "reshape",
    "roll",
    "size",
    "squeeze",
    "sum",
    "to",
    "transpose",
    "unsqueeze",
    "view",
    "where",
}
# Of a module they change the module.
_OF_MODULES = {"float", "to"}
_FUNCTIONS: tuple[Callable, ...] = (
    torch.arange,
    torch.cat,
    torch.full_like,
    torch.nn.CrossEntropyLoss,
    torch.nn.functional.pad,
    torch.ones_like,
    torch.roll,
    torch.tanh,
    torch.where,
    torch.zeros_like,
)


def is_harmless(node: ast.stmt | ast.expr, function: types.FunctionType, this: str) -> bool:
    """Whether a statement, or an expression, of the function is of these; `this` is its "self"."""

    code = function.__code__
    at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    kwargs = code.co_varnames[at] if code.co_flags & inspect.CO_VARKEYWORDS else None

    def expression(node: ast.expr | None) -> bool:
        return node is None or all(isinstance(one, _EXPRESSIONS) and is_call(one) for one in ast.walk(node))

    def is_call(node: ast.AST) -> bool:
        """Whether it is a call that is known, or none."""
        if not isinstance(node, ast.Call):
            return True
        if any(keyword.arg in (None, "out") for keyword in node.keywords):
            return False
        called = edited_code.value(node.func, function)
        if any(called is known for known in _FUNCTIONS):
            return True
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop") and kwargs is not None:
            return edited_code.is_name(node.func.value, kwargs)
        # A module's own method may do anything, whatever its name.
        is_method = isinstance(node.func, ast.Attribute) and called is None
        if not is_method or node.func.attr not in _METHODS or edited_code.is_name(node.func.value, this):
            return False
        return node.func.attr not in _OF_MODULES or edited_code.attributes_of(node.func.value, this) is None

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

    return expression(node) if isinstance(node, ast.expr) else known(node)


def writes(node: ast.AST) -> bool:
    """Whether an expression looks as if it writes: it calls `x.add_`, `torch.relu_`, or something with `out=`."""
    for one in ast.walk(node):
        if isinstance(one, ast.Call):
            called = one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")
            if called.endswith("_") or any(keyword.arg in ("out", "inplace") for keyword in one.keywords):
                return True
    return False
