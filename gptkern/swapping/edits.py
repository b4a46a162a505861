"""What of a class's forward is changed in its source: products with activations, and its loss.

Both are changed in one tree, so that a forward that holds both gets one new code.
"""

from __future__ import annotations

import ast
import inspect
import types
from typing import NamedTuple

import torch

from gptkern.swapping import activations, edited_code, fused_loss
from gptkern.swapping.edited_code import Edit
from gptkern.swapping.reading import method
from gptkern.swapping.twins import ACTIVATION, LOSS


class Found(NamedTuple):
    """What a class's forward holds.

    Attributes:
        products: the products with an activation, or None.
        site: where it takes its loss, or None; why its loss is left alone, or None.
    """

    products: activations.Products | None = None
    site: fused_loss.Site | None = None
    reason: str | None = None


def found(cls: type) -> Found:
    """What the class's forward holds; nothing where its source is not to be had."""
    return _changed(cls, (ACTIVATION, LOSS))[0]


def edits(cls: type, operators: tuple[str, ...]) -> dict[types.FunctionType, Edit]:
    """The code that the class's forward has instead, to run on these operators."""
    return _changed(cls, operators)[1]


def _changed(cls: type, operators: tuple[str, ...]) -> tuple[Found, dict[types.FunctionType, Edit]]:
    function = inspect.unwrap(method(cls, "forward"))
    if not isinstance(function, types.FunctionType) or cls.__module__.startswith("torch."):
        return Found(), {}
    products, takes_a_loss = activations.may_hold_products(function), fused_loss.takes_a_loss(function)
    if not products and not takes_a_loss:
        return Found(), {}
    tree = edited_code.tree(function)
    if tree is None:
        return Found(reason="its source is not to be had" if takes_a_loss else None), {}
    holds, cells, before = Found(), {}, ast.dump(tree)
    if takes_a_loss and LOSS in operators:
        try:
            holds = holds._replace(site=fused_loss.change_loss(function, tree))
            cells |= fused_loss.cells(holds.site)
        except fused_loss.NotKnown as reason:
            holds = holds._replace(reason=str(reason))
    if products and ACTIVATION in operators:
        changed = activations.change_products(function, tree)
        if changed.modules or changed.functions:
            holds = holds._replace(products=changed)
            cells |= activations.CELLS
    return holds, {} if ast.dump(tree) == before else {function: edited_code.edit(function, tree, cells)}


def activates(holds: Found, module: torch.nn.Module) -> bool:
    """Whether a product in the module's forward runs on gptkern's operators, by the activations that it has now."""
    return holds.products is not None and activations.are_known(holds.products, module)


def reason_against_activation(cls: type, module: torch.nn.Module) -> str | None:
    """Why a module of an activation class of transformers is left alone; None where it is not, or is of another."""
    if activations.replaced(cls) is None or activations.form(module) is not None:
        return None
    return "its activation is written out in Python"


def reason_against_loss(holds: Found, module: torch.nn.Module) -> str | None:
    """Why the module's loss is left alone; None where it is fused, or it takes none."""
    if holds.site is None:
        return holds.reason and f"its loss: {holds.reason}"
    head = getattr(module, holds.site.head, None)
    factor: object = module
    for attribute in holds.site.factor or ():
        factor = getattr(factor, attribute, None)
    reason = fused_loss.reason_against(module, head, factor, holds.site)
    return reason and f"its loss: {reason}"
