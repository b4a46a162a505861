"""What a forward does with its logits before their loss, as far as the hidden states can stand in for them.

    the code                                            with the hidden states in the logits' place
    logits.size(-1), logits.shape                       of the logits: the head's outputs are the last size
    logits.view(-1, self.vocabulary)                    hidden.reshape(-1, width)
    logits[..., :-1, :].contiguous()                    the same
    logits.flatten(0, 1)                                the same
    logits.transpose(1, 2), in the loss alone           hidden; the loss is told
    logits / self.scale, 30 * torch.tanh(logits / 30)   hidden; the loss scales and caps what it computes
    logits.float()                                      hidden; the loss is taken in float32

All of these leave a row of logits a row, whatever its length, which is what the loss makes of a row of hidden states.
How many dimensions the logits have is read off what is done with them (`B, T, C = logits.shape`), and asked of the
hidden states when it runs.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Callable
from typing import NamedTuple

import torch

from gptkern.swapping import edited_code
from gptkern.swapping.edited_code import OWN

RESHAPED, SHAPE = f"{OWN}reshaped", f"{OWN}shape"
KNOWN = "a factor, a softcap, .float(), .contiguous(), a view as rows of the vocabulary, a slice of positions"
_RESHAPES, _MOVES = ("view", "reshape"), ("transpose", "permute")
_METHODS = ("float", "to", "contiguous", "flatten", *_RESHAPES, *_MOVES)
# What the hidden states have in common with the logits.
_ALIKE = ("device", "ndim")


class NotKnown(Exception):
    """A forward does something else between its head and its loss; the message says what, and where."""


class Form(NamedTuple):
    """What a name holds in the place of logits.

    Attributes:
        rank: how many dimensions it has; None: as many as what the head gives, of which nothing is known.
        is_moved: the classes are its second dimension, not its last.
        is_cut: it holds a part of the positions.
    """

    rank: int | None = None
    is_moved: bool = False
    is_cut: bool = False


class Head(NamedTuple):
    """`self.lm_head(hidden)`."""

    attribute: str
    hidden: ast.expr


def head_of(node: ast.expr, this: str) -> Head | None:
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        attributes = edited_code.attributes_of(node.func, this)
        if attributes is not None and len(attributes) == 1 and not isinstance(node.args[0], ast.Starred):
            return Head(attributes[0], node.args[0])
    return None


def number_of(node: ast.expr, this: str) -> tuple[str, ...] | float | None:
    """A factor or a cap: the path of attributes of self, or a number that the code holds."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    return edited_code.attributes_of(node, this)


class Logits:
    """The names that hold logits in a function, and what was done with them.

    Attributes:
        names: name -> Form.
        rank: how many dimensions the head's result needs to have; None: any number.
        factor, is_divided, softcap, is_float: what the loss is to do with what it computes.
        classes: the names that hold the vocabulary's size, read from the logits.
        sizes: the expressions that have to be it, and are not read from them.
    """

    def __init__(self, function: types.FunctionType, this: str, error: Callable[[ast.AST, str], NotKnown]):
        self.function, self.this, self.error = function, this, error
        self.names: dict[str, Form] = {}
        self.rank: int | None = None
        self.factor: tuple[str, ...] | float | None = None
        self.softcap: tuple[str, ...] | float | None = None
        self.is_divided = self.is_float = False
        self.classes: set[str] = set()
        self.rows: dict[str, int] = {}  # the name of a size of the logits -> of which of three dimensions
        self.sizes: list[ast.expr] = []
        self.bases: set[int] = set()  # the ids of the nodes at which `read` began

    # --- Reading

    def base(self, node: ast.expr) -> ast.expr:
        """The name, or the call of a layer, at which an expression of logits begins; or what is not known in it."""
        while not isinstance(node, ast.Name) and head_of(node, self.this) is None:
            inside = self._inside(node)
            if inside is None:
                return node
            node = inside
        return node

    def _inside(self, node: ast.expr) -> ast.expr | None:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS:
            return node.func.value
        if isinstance(node, ast.Call) and self._is_tanh(node):
            return node.args[0]
        if isinstance(node, ast.Subscript):
            return node.value
        if isinstance(node, ast.Attribute) and node.attr == "mT":
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
            if number_of(node.right, self.this) is not None:
                return node.left
            if isinstance(node.op, ast.Mult) and number_of(node.left, self.this) is not None:
                return node.right
        return None

    def _is_tanh(self, node: ast.Call) -> bool:
        return edited_code.value(node.func, self.function) is torch.tanh and len(node.args) == 1 and not node.keywords

    def read(self, node: ast.expr) -> Form:
        """What an expression of logits gives; what it does is noted.

        Raises:
            NotKnown: it does something else.
        """
        if isinstance(node, ast.Name) and node.id in self.names:
            self.bases.add(id(node))
            return self.names[node.id]
        if head_of(node, self.this) is not None:
            self.bases.add(id(node))
            return Form()
        inside = self._inside(node)
        if inside is None:
            raise self.error(node, "does more with the logits than to flatten them")
        if isinstance(node, ast.BinOp):
            return self._scaled(node, inside)
        form = self.read(inside)
        if isinstance(node, ast.Subscript):
            return self._sliced(node, form)
        if isinstance(node, ast.Attribute):
            return self._moved(node, form)
        return self._called(node, form)

    def _called(self, node: ast.Call, form: Form) -> Form:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        if name == "float" and not arguments:
            self.is_float = True
            return form
        is_to = name == "to" and len(arguments) == 1 and [k.arg for k in node.keywords] in ([], ["dtype"])
        if is_to and edited_code.value(arguments[0], self.function) is torch.float32:
            self.is_float = True
            return form
        if name == "contiguous" and not arguments:
            return form
        if name in _RESHAPES and not node.keywords:
            return self._reshaped(node, form)
        if name in _MOVES:
            return self._moved(node, form)
        if name == "flatten" and not form.is_moved:
            given = dict(zip(("start_dim", "end_dim"), map(ast.unparse, node.args)))
            given |= {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if given.pop("start_dim", "0") == "0" and list(given) == ["end_dim"] and given["end_dim"] in ("1", "-2"):
                self._need(node, form, 3)
                return Form(2)
        raise self.error(node, "does more with the logits than to flatten them")

    def _reshaped(self, node: ast.Call, form: Form) -> Form:
        shape = _shape_of(node)
        if form.is_moved or len(shape) < 2 or any(isinstance(size, ast.Starred) for size in shape):
            raise self.error(node, "does more with the logits than to flatten them")
        if ast.unparse(shape[-1]) == "-1":
            # The rest is the vocabulary where the sizes before it are those of the logits.
            factors = _factors(shape[0])
            form_of = {self.rows.get(name) for name in factors}
            is_whole = len(factors) == 2 and form_of == {0, 1} and self._rank_of(form) == 3 and not form.is_cut
            if len(shape) != 2 or not is_whole:
                raise self.error(node, "gives its rows a length that is not known to be the vocabulary's")
        elif not self.is_classes(shape[-1], is_asked=True):
            self.sizes.append(shape[-1])
        return Form(len(shape))

    def _sliced(self, node: ast.Subscript, form: Form) -> Form:
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        dots = [place for place, one in enumerate(indices) if isinstance(one, ast.Constant) and one.value is ...]
        slices = [one for one in indices if isinstance(one, ast.Slice)]
        if form.is_moved or len(dots) > 1 or len(slices) + len(dots) != len(indices):
            raise self.error(node, "takes a part of the logits that is no slice")
        if not dots and self._rank_of(form) is None and len(indices) > 1:
            self._need(node, form, 3)
        rank = self._rank_of(form)
        # Whether the last index is of the classes, which have to stay whole.
        reaches_last = dots != [len(indices) - 1] if dots else rank is not None and len(indices) >= rank
        if reaches_last and ast.unparse(indices[-1]) != ":":
            raise self.error(node, "takes a part of the vocabulary")
        return form._replace(is_cut=True)

    def _moved(self, node: ast.expr, form: Form) -> Form:
        is_known = isinstance(node, ast.Attribute)
        if isinstance(node, ast.Call) and not node.keywords:
            order = [*map(ast.unparse, node.args)]
            known = (["1", "2"], ["2", "1"], ["-1", "-2"], ["-2", "-1"], ["1", "-1"], ["-1", "1"])
            is_known = order in known if node.func.attr == "transpose" else order == ["0", "2", "1"]
        if not is_known or form.is_moved:
            raise self.error(node, "moves the logits' dimensions in a way of its own")
        self._need(node, form, 3)
        return form._replace(is_moved=True)

    def _scaled(self, node: ast.BinOp, inside: ast.expr) -> Form:
        number = number_of(node.right if inside is node.left else node.left, self.this)
        capped = _bare_tanh(inside)
        if isinstance(capped, ast.Call) and self._is_tanh(capped) and isinstance(node.op, ast.Mult):
            # cap * torch.tanh(logits / cap)
            quotient = capped.args[0]
            is_quotient = isinstance(quotient, ast.BinOp) and isinstance(quotient.op, ast.Div)
            if not is_quotient or number_of(quotient.right, self.this) != number or self.softcap is not None:
                raise self.error(node, "caps the logits in a way of its own")
            form = self.read(quotient.left)
            self.is_float |= capped is not inside
            self.softcap = number
            return form
        form = self.read(inside)
        self.scale(node, number, isinstance(node.op, ast.Div))
        return form

    def scale(self, node: ast.AST, number: tuple[str, ...] | float, is_divided: bool) -> None:
        """Notes a factor.

        Raises:
            NotKnown: it is the second one, or comes behind a cap.
        """
        if self.factor is not None or self.softcap is not None:
            raise self.error(node, "scales the logits a second time, or behind a cap")
        self.factor, self.is_divided = number, is_divided

    def changes(self, node: ast.stmt, stored: list[str]) -> bool:
        """Whether a statement that is no assignment scales or caps the logits in a way that is known: it is noted."""
        if isinstance(node, ast.AugAssign):
            # logits /= self.scale
            number = number_of(node.value, self.this)
            if number is None or not isinstance(node.op, ast.Mult | ast.Div):
                return False
            self.scale(node, number, isinstance(node.op, ast.Div))
            return True
        return isinstance(node, ast.If) and len(set(stored)) == 1 and self._is_cap(node, stored[0])

    def _is_cap(self, node: ast.If, name: str) -> bool:
        """Whether it is Gemma's softcap of the name."""
        if not isinstance(node.test, ast.Compare) or self.softcap is not None:
            return False
        cap = ast.unparse(node.test.left)
        tanh = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "tanh"]
        text = (
            f"if {cap} is not None:\n    {name} = {name} / {cap}\n    {name} = torch.tanh({name})\n"
            f"    {name} = {name} * {cap}"
        )
        path = edited_code.attributes_of(node.test.left, self.this)
        is_cap = path and ast.unparse(node) == text and edited_code.value(tanh[0], self.function) is torch.tanh
        if is_cap:
            self.softcap = path
        return bool(is_cap)

    def is_classes(self, node: ast.expr, is_asked: bool = False) -> bool:
        """Whether an expression is the vocabulary's size, read from the logits.

        Args:
            is_asked: the code takes it for that, which says how many dimensions the logits have.
        """
        if isinstance(node, ast.Name):
            return node.id in self.classes
        index = self._index_of_shape(node)
        if index is None:
            return False
        name, place = index
        rank = self._rank_of(self.names[name])
        if rank is None and is_asked and place > 0:
            rank = self.rank = place + 1
        return place == -1 or (rank is not None and place == rank - 1)

    def _index_of_shape(self, node: ast.expr) -> tuple[str, int] | None:
        """(name, i) of `logits.size(i)` and `logits.shape[i]`."""
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            shape, place = node.func, node.args[0]
            is_known = isinstance(shape, ast.Attribute) and shape.attr == "size"
        elif isinstance(node, ast.Subscript):
            shape, place = node.value, node.slice
            is_known = isinstance(shape, ast.Attribute) and shape.attr == "shape"
        else:
            return None
        if not is_known or not isinstance(shape.value, ast.Name) or shape.value.id not in self.names:
            return None
        if self.names[shape.value.id].is_moved:
            return None
        try:
            found = ast.literal_eval(place)
        except ValueError:
            return None
        return (shape.value.id, found) if type(found) is int else None

    def unpack(self, statement: ast.stmt) -> None:
        """Notes the sizes that a statement reads: `B, T, C = logits.shape`."""
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Name) and self.is_classes(value):
            self.classes.add(target.id)
        shape = value.func if isinstance(value, ast.Call) and not value.args and not value.keywords else value
        is_shape = isinstance(shape, ast.Attribute) and shape.attr == ("size" if shape is not value else "shape")
        if not is_shape or not isinstance(target, ast.Tuple) or not isinstance(shape.value, ast.Name):
            return
        form = self.names.get(shape.value.id)
        names = [one.id for one in target.elts if isinstance(one, ast.Name)]
        if form is None or form.is_moved or len(names) != len(target.elts):
            return
        self._need(statement, form, len(names))
        if names.count(names[-1]) == 1:
            self.classes.add(names[-1])
        if len(names) == 3 and not form.is_cut:
            self.rows |= {name: place for place, name in enumerate(names[:-1]) if names.count(name) == 1}

    def forget(self, names: list[str]) -> None:
        """These names hold something else from here on."""
        self.classes -= set(names)
        for name in names:
            self.rows.pop(name, None)

    def _rank_of(self, form: Form) -> int | None:
        return self.rank if form.rank is None else form.rank

    def _need(self, node: ast.AST, form: Form, rank: int) -> None:
        known = self._rank_of(form)
        if known not in (None, rank):
            raise self.error(node, f"takes {known} dimensions of the logits for {rank}")
        if form.rank is None:
            self.rank = rank

    def of_loss(self, node: ast.expr, any_rank: bool) -> Form:
        """What a loss is given: rows of logits, or classes as the second dimension; or, of any rank, the last.

        Raises:
            NotKnown: anything else.
        """
        form = self.read(node)
        if not any_rank or (form.is_cut and self._rank_of(form) is None):
            self._need(node, form, 3 if form.is_moved or any_rank else 2)
        elif form.is_moved:
            raise self.error(node, "has the classes in another place than the last")
        return form

    def shapes_read(self, statement: ast.AST) -> dict[int, ast.expr]:
        """Where a statement reads a size of what holds logits: the id of the node -> the node."""
        found: dict[int, ast.expr] = {}
        for node in ast.walk(statement):
            read = node
            if isinstance(node, ast.Call) and len(node.args) <= 1 and not node.keywords:
                read = node.func
            if not isinstance(read, ast.Attribute) or not isinstance(read.value, ast.Name):
                continue
            is_shape = read.attr == "size" if read is not node else read.attr in ("shape", *_ALIKE)
            form = self.names.get(read.value.id)
            if is_shape and form is not None and not form.is_moved:
                found[id(node)] = node
        return found

    # --- Writing

    def ours(self, node: ast.expr, layer: ast.expr) -> ast.expr:
        """The same expression, of which `read` knows all, with the hidden states in the logits' place."""
        if isinstance(node, ast.Name):
            return node
        head = head_of(node, self.this)
        if head is not None:
            return head.hidden
        inside = self.ours(self._inside(node), layer)
        if isinstance(node, ast.Subscript):
            return ast.Subscript(inside, node.slice, ast.Load())
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            return inside
        name = node.func.attr
        if name in _RESHAPES:
            return edited_code.call(RESHAPED, inside, layer, *_shape_of(node))
        if name in ("contiguous", "flatten"):
            return ast.Call(ast.Attribute(inside, name, ast.Load()), node.args, node.keywords)
        return inside


class ReadShapes(ast.NodeTransformer):
    """The logits' own sizes in the place of those of what stands in for them, where `fused` is true.

    Args:
        found: what `Logits.shapes_read` gives.
    """

    def __init__(self, found: dict[int, ast.expr], fused: str, layer: ast.expr):
        self.found, self.fused, self.layer = found, fused, layer

    def visit(self, node: ast.AST) -> ast.AST:
        if id(node) not in self.found or (isinstance(node, ast.Attribute) and node.attr in _ALIKE):
            return self.generic_visit(node)
        name = node.value if isinstance(node, ast.Attribute) else node.func.value
        ours: ast.expr = edited_code.call(SHAPE, name, self.layer)
        if isinstance(node, ast.Call) and node.args:
            ours = ast.Subscript(ours, node.args[0], ast.Load())
        return ast.copy_location(ast.IfExp(edited_code.name(self.fused), ours, node), node)


def _shape_of(node: ast.Call) -> list[ast.expr]:
    """The sizes that a view is given, one by one or as a tuple."""
    only = node.args[0] if len(node.args) == 1 else None
    return only.elts if isinstance(only, ast.Tuple | ast.List) else node.args


def _factors(node: ast.expr) -> list[str]:
    """The names of a product: B and T of `B * T`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*_factors(node.left), *_factors(node.right)]
    return [node.id] if isinstance(node, ast.Name) else ["", ""]


def _bare_tanh(node: ast.expr) -> ast.expr:
    """`torch.tanh(…)` of `torch.tanh(…).float()`."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "float":
        return node.func.value if not node.args and not node.keywords else node
    return node


# --- What the changed code calls --------------------------------------------------------------------------------------


def reshaped(hidden: torch.Tensor, head: torch.nn.Linear, *shape) -> torch.Tensor:
    """`logits.view(*shape)` of hidden states: (…, width) -> (*shape[:-1], width)."""
    return hidden.reshape(*shape[:-1], hidden.shape[-1])


def shape(hidden: torch.Tensor, head: torch.nn.Linear) -> torch.Size:
    """The shape of the logits that the head would make of hidden states."""
    return torch.Size((*hidden.shape[:-1], head.weight.shape[0]))


CELLS = {RESHAPED: reshaped, SHAPE: shape}
