"""A forward that takes a loss which is known (loss_code.py), without its logits: the same source, changed.

    logits = self.lm_head(hidden)               logits = hidden if fused else self.lm_head(hidden)
    loss = None
    if labels is not None:                      fused: the labels are given, and the head is one that is known
        loss = cross_entropy(logits.view(…), labels.view(-1))
                                            ours(lm_head, hidden.reshape(…), …) if fused else cross_entropy(…)
    return Output(loss=loss, logits=logits)     logits=None if fused else logits

fused_loss.py is what the changed code calls.
"""

from __future__ import annotations

import ast

from gptkern.swapping import edited_code
from gptkern.swapping.edited_code import OWN
from gptkern.swapping.logits_code import ReadShapes
from gptkern.swapping.loss_code import HELD, MADE, Loss

FUSED, MAY_FUSE, OURS, HIDDEN = f"{OWN}is_fused", f"{OWN}may_fuse", f"{OWN}loss", f"{OWN}hidden"
OPTIONS, MADE_OPTIONS = f"{OWN}options", f"{OWN}made_options"


def change(loss: Loss) -> None:
    """Changes the tree that the loss was read off."""
    this, fused = edited_code.name(loss.this), edited_code.name(FUSED)
    layer = ast.Attribute(this, loss.site.head, ast.Load())
    for statement in loss.after:
        ReadShapes(loss.shapes, FUSED, layer).visit(statement)
        _Returned(loss.returned).visit(statement)
    numbers = [_number(this, loss.site.factor), _number(this, loss.site.softcap)]
    hidden, makes_hidden = _hidden(loss)
    decided = edited_code.call(MAY_FUSE, this, layer, *numbers, loss.called, hidden, *loss.logits.sizes)
    if loss.condition is not None:
        given = ast.Compare(edited_code.name(loss.condition), [ast.IsNot()], [ast.Constant(None)])
        decided = ast.BoolOp(ast.And(), [given, decided])
    test = decided if loss.makes is None else fused
    either = ast.IfExp(test, _ours(loss, layer, numbers), ast.Call(loss.call.func, loss.call.args, loss.call.keywords))
    _Replace(loss.call, ast.copy_location(either, loss.call)).visit(loss.found)
    if loss.makes is None:
        return
    for statement in [loss.makes, *loss.flow]:
        if isinstance(statement, ast.Assign):
            statement.value = ast.IfExp(fused, loss.logits.ours(statement.value, layer), statement.value)
        else:
            _replace(loss.found, statement, [ast.If(ast.UnaryOp(ast.Not(), fused), [_again(statement)], [])])
    decides = ast.Assign([ast.Name(FUSED, ast.Store())], decided)
    _replace(loss.found, loss.makes, [*makes_hidden, decides, loss.makes])
    docstring = ast.get_docstring(loss.found, clean=False) is not None
    loss.found.body.insert(int(docstring), ast.Assign([ast.Name(FUSED, ast.Store())], ast.Constant(False)))


def _hidden(loss: Loss) -> tuple[ast.expr, list[ast.stmt]]:
    """What the head is given, where its dimensions are asked for, and what has to run for that before; else None."""
    hidden = loss.head.hidden
    if loss.site.rank is None:
        return ast.Constant(None), []
    if isinstance(hidden, ast.Name):
        return hidden, []
    # Computed once, before it is asked.
    loss.head_call.args[0] = edited_code.name(HIDDEN)
    if loss.makes is None:
        return ast.NamedExpr(ast.Name(HIDDEN, ast.Store()), hidden), []
    return edited_code.name(HIDDEN), [ast.Assign([ast.Name(HIDDEN, ast.Store())], hidden)]


def _ours(loss: Loss, layer: ast.expr, numbers: list[ast.expr]) -> ast.Call:
    """The call that takes the loss without logits; a criterion's options are kept where it is made."""
    criterion = [loss.call.func] if loss.site.kind == HELD else []
    if loss.site.kind == MADE:
        # Not the criterion itself, of which torch.compile knows nothing but its call.
        made, statement = loss.maker(loss.call)
        options: ast.expr = ast.Call(edited_code.name(OPTIONS), made.args, made.keywords)
        if statement is not None:
            kept = ast.Assign([ast.Name(MADE_OPTIONS, ast.Store())], options)
            _replace(loss.found, statement, [statement, ast.copy_location(kept, statement)])
            options = edited_code.name(MADE_OPTIONS)
        criterion = [options]
    changed = loss.logits.ours(loss.argument, layer)
    arguments = [changed if one is loss.argument else one for one in loss.call.args]
    found = edited_code.call(OURS, layer, *numbers, *criterion, *arguments)
    for keyword in loss.call.keywords:
        value = changed if keyword.value is loss.argument else keyword.value
        found.keywords.append(ast.keyword(keyword.arg, value))
    return found


def _number(this: ast.expr, number: tuple[str, ...] | float | None) -> ast.expr:
    if not isinstance(number, tuple):
        return ast.Constant(number)
    found = this
    for attribute in number:
        found = ast.Attribute(found, attribute, ast.Load())
    return found


def _again(statement: ast.stmt) -> ast.stmt:
    """The same statement as another object, so that it can stand inside of what takes its place."""
    return ast.copy_location(type(statement)(**dict(ast.iter_fields(statement))), statement)


def _replace(found: ast.AST, old: ast.stmt, new: list[ast.stmt]) -> None:
    for node in ast.walk(found):
        for _, block in ast.iter_fields(node):
            if isinstance(block, list) and edited_code.is_among(old, block):
                at = next(place for place, one in enumerate(block) if one is old)
                block[at : at + 1] = new
                return


class _Returned(ast.NodeTransformer):
    """None in the place of some names, where the loss was fused."""

    def __init__(self, names: list[ast.Name]):
        self.names = {id(name) for name in names}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if id(node) in self.names:
            return ast.copy_location(ast.IfExp(edited_code.name(FUSED), ast.Constant(None), node), node)
        return node


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)
