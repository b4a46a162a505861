"""The loss of a model's own forward on gptkern's linear_cross_entropy, where the caller does not read the logits.

    logits = self.lm_head(hidden)                   hidden, where the loss will be taken
    loss = None
    if labels is not None:
        loss = self.loss_function(logits, labels, …)    linear_cross_entropy(hidden, lm_head.weight, labels, …)
    return Output(loss=loss, logits=logits)         logits=None, where the loss was taken

The forward is known by its source (edited_code.py): what comes between the head and the loss may be a factor
(`logits * self.scale`, `logits / self.config.scaling`), a softcap, a `.float()` and a `.contiguous()`; the logits may
then be returned, and nothing else may be done with them; other statements there must be known to write nothing
(harmless_code.py). The loss is transformers' `self.loss_function`, or a call of
F.cross_entropy with the logits, flattened; it is taken where an argument is not None. Any other forward is left
alone, with the reason.

What a module is may change after a swap. So a call looks whether the head is a plain nn.Linear without hooks, the loss
function transformers' own, and the factor a number. Where they are not, the forward is the stock one, logits and all,
and a warning says why, once.
"""

from __future__ import annotations

import ast
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from gptkern import functional as F
from gptkern.swapping import edited_code, harmless_code
from gptkern.swapping.activations import is_bare
from gptkern.swapping.edited_code import OWN

_FUSED, _MAY_FUSE = f"{OWN}is_fused", f"{OWN}may_fuse"
_CAUSAL_LOSS, _INLINE_LOSS = f"{OWN}causal_loss", f"{OWN}loss"
_CROSS_ENTROPY = torch.nn.functional.cross_entropy
# What F.cross_entropy takes that linear_cross_entropy takes by the same name.
_OPTIONS = {"weight", "ignore_index", "reduction", "label_smoothing"}


class NotKnown(Exception):
    """A forward does something else between its head and its loss; the message says what."""


def takes_a_loss(function: types.FunctionType) -> bool:
    """Whether a forward takes a loss that this file is about."""
    names = function.__code__.co_names
    return "loss_function" in names or (
        _CROSS_ENTROPY.__name__ in names and any(found is _CROSS_ENTROPY for found in _called(function))
    )


def _called(function: types.FunctionType) -> Iterator[object]:
    # Without its source: F and the like are modules.
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        yield found
        if isinstance(found, types.ModuleType):
            yield getattr(found, _CROSS_ENTROPY.__name__, None)
            yield getattr(getattr(found, "functional", None), _CROSS_ENTROPY.__name__, None)


class Site(NamedTuple):
    """Where a forward takes its loss.

    Attributes:
        head: the attribute that is the output layer.
        factor: the path of attributes to what the logits are multiplied with, or divided by, or None.
        softcap: the path of attributes to what caps them, or None.
        is_transformers: whether the loss is transformers' `self.loss_function`, or F.cross_entropy called inline.
    """

    head: str
    factor: tuple[str, ...] | None = None
    is_divided: bool = False
    softcap: tuple[str, ...] | None = None
    is_transformers: bool = True


def change_loss(function: types.FunctionType, found: ast.FunctionDef) -> Site:
    """Changes the tree of a forward, so that it runs with `cells`.

    Raises:
        NotKnown: its loss, or what it does with its logits, is of a form of its own.
    """
    return _Changing(function, found).site()


class _Changing:
    def __init__(self, function: types.FunctionType, found: ast.FunctionDef):
        self.function, self.found = function, found
        if not function.__code__.co_argcount:
            raise NotKnown("its forward has no self")
        self.this = function.__code__.co_varnames[0]
        self.parameters = {argument.arg for argument in ast.walk(found.args) if isinstance(argument, ast.arg)}

    def site(self) -> Site:
        path, loss = self.loss()
        block, place, head = self.head(path)
        logits = head.targets[0].id
        site, hidden = self.of_head(head)
        site = site._replace(is_transformers=self.is_transformers(loss))
        known: set[int] = set()  # the ids of the names that are read in a way that is known
        skipped: list[tuple[int, ast.stmt]] = []
        last = next(at for at, statement in enumerate(block) if statement in path or _holds(statement, loss))
        for at in range(place + 1, last):
            changed = self.scaled(block[at], logits, site)
            if changed is not None:
                site = changed
                skipped.append((at, block[at]))
                known |= {id(n) for n in ast.walk(block[at]) if edited_code.is_name(n, logits)}
            elif logits in edited_code.stores(block[at]):
                raise NotKnown(f"line {block[at].lineno} makes other logits")
        condition = self.condition(path, block, place, last, loss)
        known |= self.read_by_loss(loss, logits)
        after = [statement for statement in block[place + 1 :]] + self.behind(path, block)
        for statement in after:
            known |= {id(n) for n in self.returned(statement, logits)}
        for statement in after:
            for one in edited_code.loads(statement, logits):
                if id(one) not in known:
                    raise NotKnown(f"line {one.lineno} does something else with the logits")
            if logits in edited_code.stores(statement) and not any(statement is s for _, s in skipped):
                raise NotKnown(f"line {statement.lineno} makes other logits")
        self.writes_nothing(path, block[place + 1 : last], block[last], loss, hidden, site, [s for _, s in skipped])
        self.change(block, place, head, hidden, skipped, loss, logits, site, condition, after)
        return site

    # --- Reading

    def is_transformers(self, call: ast.Call) -> bool:
        return edited_code.attributes_of(call.func, self.this) == ("loss_function",)

    def loss(self) -> tuple[list[ast.stmt], ast.Call]:
        """The one call that takes the loss, and the statements around it from the outermost on."""
        calls = [
            node
            for node in ast.walk(self.found)
            if isinstance(node, ast.Call)
            and (self.is_transformers(node) or edited_code.value(node.func, self.function) is _CROSS_ENTROPY)
        ]
        if len(calls) != 1:
            raise NotKnown(
                f"{len(calls)} losses are taken in its forward" if calls else "its forward takes no loss itself"
            )
        path, body = [], self.found.body
        while body:
            statement = next((s for s in body if _holds(s, calls[0])), None)
            if statement is None:
                raise NotKnown("its loss is taken in a function inside its forward")
            path.append(statement)
            blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
            body = next((b for b in blocks if isinstance(b, list) and any(_holds(s, calls[0]) for s in b)), [])
            if isinstance(statement, ast.For | ast.While | ast.With | ast.Try | ast.FunctionDef | ast.AsyncFunctionDef):
                raise NotKnown(f"its loss is taken inside the block of line {statement.lineno}")
        return path, calls[0]

    def logits_of(self, loss: ast.Call) -> ast.expr:
        """The argument that holds the logits."""
        named = {keyword.arg: keyword.value for keyword in loss.keywords}
        found = named.get("logits" if self.is_transformers(loss) else "input")
        if found is None and loss.args and not isinstance(loss.args[0], ast.Starred):
            found = loss.args[0]
        if found is None:
            raise NotKnown(f"line {loss.lineno} gives its loss no logits by name or as the first argument")
        return found

    def head(self, path: list[ast.stmt]) -> tuple[list[ast.stmt], int, ast.Assign]:
        """The statement that makes the logits: the block that it is in, and its place there."""
        logits = {n.id for n in ast.walk(self.logits_of(self.loss()[1])) if isinstance(n, ast.Name)}
        blocks = [self.found.body]
        for statement in path[:-1]:
            blocks.append(statement.body if path[len(blocks)] in statement.body else statement.orelse)
        for block, inside in reversed([*zip(blocks, path)]):
            for place in reversed(range(block.index(inside))):
                statement = block[place]
                if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                    target = statement.targets[0]
                    if isinstance(target, ast.Name) and target.id in logits and self.of_head(statement) is not None:
                        return block, place, statement
        raise NotKnown("its logits are not those of a layer that its forward calls itself")

    def of_head(self, statement: ast.Assign) -> tuple[Site, ast.expr] | None:
        """The layer, and the expression that it is called with, of `logits = self.lm_head(hidden)`."""
        value, factor, is_divided = statement.value, None, False
        while True:
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not value.keywords:
                attributes = edited_code.attributes_of(value.func, self.this)
                if attributes is not None and len(attributes) == 1 and len(value.args) == 1:
                    return Site(attributes[0], factor, is_divided), value.args[0]
                if value.func.attr in ("float", "contiguous") and not value.args:
                    value = value.func.value
                    continue
            if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Mult | ast.Div) and factor is None:
                factor = edited_code.attributes_of(value.right, self.this)
                if factor is not None:
                    value, is_divided = value.left, isinstance(value.op, ast.Div)
                    continue
            return None

    def scaled(self, statement: ast.stmt, logits: str, site: Site) -> Site | None:
        """The site with what a statement does to the logits: `logits = logits / self.scaling`, or a softcap."""
        text = ast.unparse(statement)
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp):
            operation = statement.value
            factor = edited_code.attributes_of(operation.right, self.this)
            is_known = isinstance(operation.op, ast.Mult | ast.Div) and edited_code.is_name(operation.left, logits)
            is_first = site.factor is None and site.softcap is None
            if factor and is_known and is_first and [*map(ast.unparse, statement.targets)] == [logits]:
                return site._replace(factor=factor, is_divided=isinstance(operation.op, ast.Div))
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Compare) and site.softcap is None:
            cap = ast.unparse(statement.test.left)
            tanh = [n for n in ast.walk(statement) if isinstance(n, ast.Attribute) and n.attr == "tanh"]
            softcap = (
                f"if {cap} is not None:\n    {logits} = {logits} / {cap}\n    {logits} = torch.tanh({logits})\n"
                f"    {logits} = {logits} * {cap}"
            )
            path = edited_code.attributes_of(statement.test.left, self.this)
            if path and text == softcap and edited_code.value(tanh[0], self.function) is torch.tanh:
                return site._replace(softcap=path)
        return None

    def condition(self, path, block, place: int, last: int, loss: ast.Call) -> str | None:
        """The argument which, where it is not None, has the loss taken; None where it always is."""
        inner = path[path.index(block[last]) :] if block[last] in path else [block[last]]
        found = None
        for statement in block[place + 1 : last]:
            if isinstance(statement, ast.If) and _leaves(statement):
                argument = _none_test(statement.test, ast.Is)
                if argument is None or statement.orelse or found is not None:
                    raise NotKnown(f"line {statement.lineno} may leave without the loss")
                found = argument
            elif any(_leaves(part) for part in ast.walk(statement) if isinstance(part, ast.stmt)):
                raise NotKnown(f"line {statement.lineno} may leave without the loss")
        for outer, inside in zip(inner, [*inner[1:], None]):
            if not isinstance(outer, ast.If):
                break
            argument = _none_test(outer.test, ast.IsNot)
            if argument is None or inside not in outer.body or found not in (None, argument):
                raise NotKnown(f"line {outer.lineno} has another condition for the loss than an argument that is given")
            found = argument
        if found is not None and (found not in self.parameters or found in edited_code.stores(self.found)):
            raise NotKnown(f"{found!r}, on which the loss hangs, is no argument, or is made anew")
        if any(isinstance(n, ast.IfExp | ast.BoolOp) and _holds(n, loss) for n in ast.walk(path[-1])):
            raise NotKnown(f"line {loss.lineno} takes the loss under a condition of its own")
        return found

    def writes_nothing(self, path, between, last: ast.stmt, loss: ast.Call, hidden, site: Site, skipped) -> None:
        """Raises where what runs from the head to the loss may change what the head is given, or the head."""
        names = {n.id for n in ast.walk(hidden) if isinstance(n, ast.Name)} - {self.this}
        # What leaves does so where no loss is taken: `condition` has looked.
        run = [one for one in between if not any(one is s for s in skipped) and not _leaves(one)]
        inner = path[path.index(last) :] if last in path else [last]
        for outer, inside in itertools.pairwise(inner):
            around = outer.body if inside in outer.body else outer.orelse
            run += around[: around.index(inside)]
        for one in run:
            if not harmless_code.is_harmless(one, self.function, names, (self.this, site.head)):
                raise NotKnown(f"line {one.lineno} may write into what the head is given, or into the head")
        if harmless_code.writes(inner[-1]):
            raise NotKnown(f"line {loss.lineno} may write into what the head is given, or into the head")

    def read_by_loss(self, loss: ast.Call, logits: str) -> set[int]:
        """The ids of the names of the logits in the loss's arguments, where each stays right with the hidden states."""
        argument = self.logits_of(loss)
        names = {id(n) for n in edited_code.loads(argument, logits)}
        if len(edited_code.loads(loss, logits)) != len(names):
            if not self.is_transformers(loss):
                raise NotKnown(f"line {loss.lineno} gives its loss more of the logits than themselves")
            # transformers' `vocab_size=logits.shape[-1]` would be the hidden states' width.
            raise NotKnown(f"line {loss.lineno} takes the vocabulary's size from the logits")
        if self.is_transformers(loss):
            if not edited_code.is_name(argument, logits):
                raise NotKnown(f"line {loss.lineno} does something to the logits before the loss")
            return names
        if {keyword.arg for keyword in loss.keywords} - {"input", "target", *_OPTIONS} or len(loss.args) > 3:
            raise NotKnown(f"line {loss.lineno} gives its loss other arguments than {', '.join(sorted(_OPTIONS))}")
        if not _is_flattened(argument, logits):
            raise NotKnown(f"line {loss.lineno} does more with the logits than to flatten them")
        return names

    def behind(self, path: list[ast.stmt], block: list[ast.stmt]) -> list[ast.stmt]:
        """What runs behind the block that the head stands in."""
        found, body = [], self.found.body
        for statement in path:
            if body is block:
                break
            found += body[body.index(statement) + 1 :]
            body = statement.body if any(s in statement.body for s in path) else statement.orelse
        return found

    def returned(self, statement: ast.stmt, logits: str) -> list[ast.Name]:
        """Where the logits are part of what is returned, as they are: of a tuple, or of an output's field."""
        found: list[ast.Name] = []
        for node in ast.walk(statement):
            values: list[ast.expr] = []
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                values = node.value.elts
            elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
                if isinstance(edited_code.value(node.value.func, self.function), type):
                    values = [keyword.value for keyword in node.value.keywords if keyword.arg == "logits"]
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
                # output = (logits,) + outputs[1:]
                sum_of, is_output = node.value, [*map(ast.unparse, node.targets)] == ["output"]
                if is_output and isinstance(sum_of.op, ast.Add) and isinstance(sum_of.left, ast.Tuple):
                    values = sum_of.left.elts
            found += [value for value in values if edited_code.is_name(value, logits)]
        return found

    # --- Writing

    def change(self, block, place, head, hidden, skipped, loss, logits, site, condition, after) -> None:
        this, fused = edited_code.name(self.this), edited_code.name(_FUSED)
        layer = ast.Attribute(this, site.head, ast.Load())
        factor = _attribute(self.this, site.factor)
        if site.is_divided:
            factor = ast.BinOp(ast.Constant(1.0), ast.Div(), factor)
        given = (
            ast.Constant(True)
            if condition is None
            else ast.Compare(edited_code.name(condition), [ast.IsNot()], [ast.Constant(None)])
        )
        may_fuse = edited_code.call(_MAY_FUSE, this, layer, _attribute(self.this, site.factor))
        decided = ast.Assign([ast.Name(_FUSED, ast.Store())], ast.BoolOp(ast.And(), [given, may_fuse]))
        for statement in after:
            _Returned(self.returned(statement, logits)).visit(statement)
        for at, statement in skipped:
            block[at] = ast.If(ast.UnaryOp(ast.Not(), fused), [statement], [])
        head.value = ast.IfExp(fused, hidden, head.value)
        ours = edited_code.call(
            _CAUSAL_LOSS if site.is_transformers else _INLINE_LOSS, layer, factor, _attribute(self.this, site.softcap)
        )
        arguments, keywords = loss.args, loss.keywords
        if not site.is_transformers:
            # In float32 are the logits, not what they are made of.
            argument = self.logits_of(loss)
            bare = _without_float(argument)
            arguments = [bare if one is argument else one for one in arguments]
            keywords = [ast.keyword(k.arg, bare if k.value is argument else k.value) for k in keywords]
        ours = ast.Call(ours.func, [*ours.args, *arguments], keywords)
        stock = ast.Call(loss.func, loss.args, loss.keywords)
        _Replace(loss, ast.IfExp(fused, ours, stock)).visit(self.found)
        block.insert(place, decided)
        docstring = ast.get_docstring(self.found, clean=False) is not None
        self.found.body.insert(int(docstring), ast.Assign([ast.Name(_FUSED, ast.Store())], ast.Constant(False)))


def _holds(node: ast.AST, searched: ast.AST) -> bool:
    return any(one is searched for one in ast.walk(node))


def _leaves(statement: ast.stmt) -> bool:
    return any(isinstance(n, ast.Return | ast.Break | ast.Continue) for n in ast.walk(statement))


def _none_test(test: ast.expr, operation: type) -> str | None:
    """The name in `name is None`, or `name is not None`."""
    is_test = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], operation)
    if is_test and isinstance(test.left, ast.Name) and ast.unparse(test.comparators[0]) == "None":
        return test.left.id
    return None


def _attribute(this: str, path: tuple[str, ...] | None) -> ast.expr:
    if path is None:
        return ast.Constant(None)
    found: ast.expr = edited_code.name(this)
    for attribute in path:
        found = ast.Attribute(found, attribute, ast.Load())
    return found


def _is_flattened(node: ast.expr, logits: str) -> bool:
    """Whether it is the logits in another shape: their last dimension, whatever its size, stays the last."""
    while not edited_code.is_name(node, logits):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.keywords:
            return False
        shape = [ast.unparse(argument) for argument in node.args]
        last = (f"{logits}.size(-1)", f"{logits}.shape[-1]")
        if node.func.attr in ("view", "reshape"):
            if len(shape) != 2 or shape[0] != "-1" or shape[1] not in last:
                return False
        elif (node.func.attr, shape) not in (("float", []), ("contiguous", []), ("flatten", ["0", "1"])):
            return False
        node = node.func.value
    return True


def _without_float(node: ast.expr) -> ast.expr:
    if not isinstance(node, ast.Call):
        return node
    inside = _without_float(node.func.value)
    if node.func.attr == "float":
        return inside
    return ast.Call(ast.Attribute(inside, node.func.attr, ast.Load()), node.args, [])


class _Returned(ast.NodeTransformer):
    """None in the place of some names, where the loss was fused."""

    def __init__(self, names: list[ast.Name]):
        self.names = {id(name) for name in names}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if id(node) in self.names:
            return ast.IfExp(edited_code.name(_FUSED), ast.Constant(None), node)
        return node


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


# --- What the changed code calls --------------------------------------------------------------------------------------


def cells(site: Site) -> dict[str, Callable]:
    """What the changed code calls: whether the loss is fused, and the loss."""
    said: set[str] = set()

    def may_fuse(model, head, factor) -> bool:
        reason = reason_against(model, head, factor, site)
        if reason is None:
            return True
        if not torch.compiler.is_compiling() and reason not in said:
            said.add(reason)
            name = type(model).__name__
            warnings.warn(f"{name} computes its logits whole, and its loss of them: {reason}", stacklevel=3)
        return False

    return {_MAY_FUSE: may_fuse, _CAUSAL_LOSS: _causal_loss, _INLINE_LOSS: _loss}


def reason_against(model: torch.nn.Module, head: object, factor: object, site: Site) -> str | None:
    """Why a model's head and loss cannot run as one, as they are now; None where they can."""
    name = site.head
    if type(head) is not torch.nn.Linear:
        return f"its {name} is a {type(head).__name__}, not a torch.nn.Linear"
    if not is_bare(head):
        return f"its {name} has hooks, or a forward of its own"
    if type(head.weight) not in (torch.nn.Parameter, torch.Tensor):
        return f"the weight of its {name} is a {type(head.weight).__name__}"
    if site.factor is not None and not isinstance(factor, int | float):
        return f"its logits are scaled by a {type(factor).__name__}, not by a number"
    if site.is_transformers and model.loss_function is not _causal_lm_loss():
        return "its loss function is not transformers' ForCausalLMLoss"
    return None


def _causal_lm_loss() -> Callable | None:
    return getattr(sys.modules.get("transformers.loss.loss_utils"), "ForCausalLMLoss", None)


def _causal_loss(
    head,
    factor,
    softcap,
    logits,  # in their place the hidden states (batch, length, width)
    labels,  # (batch, length), the tokens themselves: the next one is the target
    vocab_size,
    num_items_in_batch=None,
    ignore_index=-100,
    shift_labels=None,  # (batch, length), the targets
    **kwargs,
):
    """ForCausalLMLoss of the logits that the head would make of the hidden states."""
    if vocab_size != head.weight.shape[0]:
        raise ValueError(f"the head has {head.weight.shape[0]} outputs; the loss's vocab_size is {vocab_size}")
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = _loss(head, factor, softcap, logits.flatten(0, -2), target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _loss(head, factor, softcap, input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    # Stock models take it of float32 logits, whatever their own dtype is.
    return F.linear_cross_entropy(
        input,
        head.weight,
        target,
        linear_bias=head.bias,
        loss_dtype=torch.promote_types(input.dtype, torch.float32),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        logit_scale=1.0 if factor is None else factor,
    )
