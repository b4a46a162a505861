"""What of a class's forward is changed in its source: products with activations, and its loss.

Both are changed in one tree, so that a forward that holds both gets one new code.
"""

from __future__ import annotations

import ast
import copy
import dis
import inspect
import types
from typing import NamedTuple

import torch

from gptkern.swapping import activations, edited_code, fused_loss, loss_change, loss_code
from gptkern.swapping.edited_code import Edit
from gptkern.swapping.logits_code import NotKnown
from gptkern.swapping.reading import method
from gptkern.swapping.twins import ACTIVATION, LOSS


class Found(NamedTuple):
    """What a class's forward holds.

    Attributes:
        products: the products with an activation, or None.
        site: where it takes its loss, or None; why its loss is left alone, or None.
        attributes: of losses that an attribute of the module may take, why each is left alone.
    """

    products: activations.Products | None = None
    site: loss_code.Site | None = None
    reason: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()


def holds_criterion(module: torch.nn.Module) -> bool:
    """Whether a module of PyTorch's that takes a loss is among those that it holds."""
    return any(isinstance(child, loss_code.CRITERION) for child in module.children())


def found(cls: type, criterion: bool = False) -> Found:
    """What the class's forward holds; nothing where its source is not to be had.

    Args:
        criterion: whether a module of the class holds one that takes a loss.
    """
    return _changed(cls, (ACTIVATION, LOSS), criterion)[0]


def edits(cls: type, operators: tuple[str, ...]) -> dict[types.FunctionType, Edit]:
    """The code that the class's forward has instead, to run on these operators."""
    return _changed(cls, operators, LOSS in operators)[1]


def _changed(cls: type, operators: tuple[str, ...], criterion: bool) -> tuple[Found, dict[types.FunctionType, Edit]]:
    function = inspect.unwrap(method(cls, "forward"))
    if not isinstance(function, types.FunctionType) or cls.__module__.startswith("torch."):
        return Found(), {}
    products, takes_a_loss = activations.may_hold_products(function), loss_code.takes_a_loss(function)
    if not products and not takes_a_loss and not criterion:
        return Found(), {}
    tree = edited_code.tree(function)
    if tree is None:
        reason = f"{loss_code.place(function)}: its source is not to be had"
        return Found(reason=reason if takes_a_loss or criterion else None), {}
    holds, cells, before = Found(), {}, ast.dump(tree)
    if (takes_a_loss or criterion) and LOSS in operators:
        tree, holds = _with_loss(function, tree, takes_a_loss)
        cells |= {} if holds.site is None else fused_loss.cells(holds.site)
    if products and ACTIVATION in operators:
        changed = activations.change_products(function, tree)
        if changed.modules or changed.functions:
            holds = holds._replace(products=changed)
            cells |= activations.CELLS
    return holds, {} if ast.dump(tree) == before else {function: edited_code.edit(function, tree, cells)}


def _with_loss(
    function: types.FunctionType, tree: ast.FunctionDef, takes_a_loss: bool
) -> tuple[ast.FunctionDef, Found]:
    """The tree of a forward without its logits, or, with the reason, as it was."""
    ways = [None] if takes_a_loss else loss_code.held(function, tree)
    # Which of its modules takes a loss the code does not tell: it is one that is given what a head gives.
    found, reasons = [], {}
    for attribute in ways:
        changed = copy.deepcopy(tree)
        try:
            found.append((changed, loss_code.Loss(function, changed, attribute)))
        except NotKnown as reason:
            reasons[attribute] = str(reason)
    if len(found) > 1:
        names = ", ".join(f"self.{loss.attribute}" for _, loss in found)
        return tree, Found(reason=f"{loss_code.place(function)}: {names} may each take its loss; known is one")
    if not found:
        of_attributes = tuple((name, reason) for name, reason in reasons.items() if name is not None)
        return tree, Found(reason=reasons.get(None), attributes=of_attributes)
    ((tree, loss),) = found
    loss_change.change(loss)
    return tree, Found(site=loss.site)


def activates(holds: Found, module: torch.nn.Module) -> bool:
    """Whether a product in the module's forward runs on gptkern's operators, by the activations that it has now."""
    return holds.products is not None and activations.are_known(holds.products, module)


def reason_against_activation(cls: type, module: torch.nn.Module) -> str | None:
    """Why a module of an activation class of transformers is left alone; None where it is not, or is of another."""
    if activations.replaced(cls) is None or activations.form(module) is not None:
        return None
    return "its activation is written out in Python"


def takes_loss(holds: Found, module: torch.nn.Module) -> bool:
    """Whether the module's forward takes a loss in a way that is known, by what the module holds now."""
    site = holds.site
    if site is None or site.criterion is None:
        return site is not None
    return isinstance(getattr(module, site.criterion, None), loss_code.CRITERION)


def reason_against_loss(holds: Found, module: torch.nn.Module) -> str | None:
    """Why the module's loss is left alone; None where it is fused, or it takes none."""
    if holds.site is None:
        criteria = (
            why for name, why in holds.attributes if isinstance(getattr(module, name, None), loss_code.CRITERION)
        )
        reason = holds.reason or next(criteria, None)
        return reason and f"its loss: {reason}"
    if not takes_loss(holds, module):
        return None
    site = holds.site
    sizes = tuple(fused_loss.UNKNOWN if path is None else _held(module, path) for _, path in site.sizes)
    called = {loss_code.FUNCTION: loss_code.CROSS_ENTROPY, loss_code.MADE: loss_code.CRITERION}.get(site.kind)
    called = called if site.criterion is None else getattr(module, site.criterion, None)
    numbers = _held(module, site.factor), _held(module, site.softcap)
    reason = fused_loss.reason_against(module, getattr(module, site.head, None), *numbers, called, site, sizes)
    return reason and f"its loss: {site.where}: {reason}"


def loss_elsewhere(cls: type) -> str | None:
    """Why `cross_entropy` does not reach a class's loss: it is a function that the module looks up; None where it has
    none of these."""
    function = inspect.unwrap(method(cls, "forward"))
    code = function.__code__ if isinstance(function, types.FunctionType) else None
    found = [] if code is None else [one for one in dis.get_instructions(code) if one.argval == "loss_function"]
    if not found:
        return None
    where = loss_code.place(function, found[0].positions)
    return (
        f"{where}: its loss is self.loss_function, which is looked up when it runs; known is F.cross_entropy, called "
        "in the forward: fused_loss=True takes it, and `with gptkern.kernels():` routes it"
    )


def _held(module: object, path: tuple[str, ...] | float | None) -> object:
    """What a path of attributes leads to; a number as it is."""
    if not isinstance(path, tuple):
        return path
    for attribute in path:
        module = getattr(module, attribute, None)
    return module
