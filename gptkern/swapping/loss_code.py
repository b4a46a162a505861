"""Where a forward takes the loss of its logits, read off its source.

    logits = self.lm_head(hidden)               the head, and what it is given
    loss = None
    if labels is not None:                      the condition: an argument that is given
        logits = logits.view(-1, self.vocabulary)       the flow, by which the logits come to the loss
        loss = cross_entropy(logits, labels.view(-1))   the loss
    return Output(loss=loss, logits=logits)     where they are returned

What may be done with the logits in between, logits_code.py knows; other statements there must be known to write nothing
(harmless_code.py). Then the logits may be returned, and nothing else may be done with them. The loss is
F.cross_entropy, a torch.nn.CrossEntropyLoss that the forward makes or the module holds, or transformers'
`self.loss_function`; it is taken where an argument is not None, or always. Any other forward is left alone, with the
reason. loss_change.py changes those that are known.
"""

from __future__ import annotations

import ast
import dis
import os
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch

from gptkern.formatting import LONGEST_SHOWN, shown
from gptkern.swapping import edited_code, harmless_code
from gptkern.swapping.logits_code import KNOWN, Logits, NotKnown, head_of

CROSS_ENTROPY = torch.nn.functional.cross_entropy
CRITERION = torch.nn.CrossEntropyLoss
# What F.cross_entropy takes that linear_cross_entropy takes by the same name.
_OPTIONS = {"weight", "ignore_index", "reduction", "label_smoothing"}
# What a loss may stand in; all but an if are run whole.
_KNOWN_AROUND = (ast.If, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
_IN_A_FUNCTION = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_READS = "does something else with the logits than to return them"
# How the loss is called; the last by an attribute of the module, of which the module says what it is.
FUNCTION, TRANSFORMERS, MADE, HELD = "F.cross_entropy", "self.loss_function", "nn.CrossEntropyLoss", "self"


class Site(NamedTuple):
    """Where a forward takes its loss, and what the loss has to know.

    Attributes:
        where: the file and line of the head, or, where it stands in the loss, of that.
        head: the attribute that is the output layer.
        kind: how the loss is called: FUNCTION, TRANSFORMERS, MADE (a CrossEntropyLoss of the forward) or HELD.
        criterion: of HELD, the attribute.
        factor: the path of attributes to what the logits are multiplied with, or divided by; or a number, or None.
        softcap: likewise to what caps them.
        is_float: the loss is float32, whatever the logits are.
        is_moved: it is given the classes as the second dimension.
        rank: how many dimensions the logits have; None: any number.
        sizes: of what is to be the vocabulary's size, as the code has it, and the path of attributes of self, a number,
            or None where it is neither.
    """

    where: str
    head: str
    kind: str = FUNCTION
    criterion: str | None = None
    factor: tuple[str, ...] | float | None = None
    is_divided: bool = False
    softcap: tuple[str, ...] | float | None = None
    is_float: bool = False
    is_moved: bool = False
    rank: int | None = None
    sizes: tuple[tuple[str, tuple[str, ...] | int | None], ...] = ()


def place(function: types.FunctionType, node: ast.AST | dis.Positions | None = None) -> str:
    """`model.py:45`, of a node in a function's source, or in its code, or of the function."""
    line = function.__code__.co_firstlineno if node is None else node.lineno
    return f"{shown(os.path.basename(function.__code__.co_filename))}:{line}"


def takes_a_loss(function: types.FunctionType) -> bool:
    """Whether a forward takes a loss that this file is about; not of an attribute of the module."""
    names = set(_names(function.__code__))
    if "loss_function" in names:
        return True
    losses = (CROSS_ENTROPY, CRITERION)
    is_named = any(loss.__name__ in names for loss in losses)
    return is_named and any(found is loss for found in _called(function, names) for loss in losses)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names in the code, and in the functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _called(function: types.FunctionType, names: set[str]) -> Iterator[object]:
    # Without its source: F and the like are modules.
    for name in names:
        found = function.__globals__.get(name)
        yield found
        if isinstance(found, types.ModuleType):
            inside = found, getattr(found, "functional", None), getattr(found, "nn", None)
            for module in (*inside, getattr(inside[-1], "functional", None)):
                yield getattr(module, CROSS_ENTROPY.__name__, None)
                yield getattr(module, CRITERION.__name__, None)


def held(function: types.FunctionType, found: ast.FunctionDef) -> list[str]:
    """The attributes of a module that its forward calls as a loss is called: `self.criterion(logits, targets)`."""
    this = function.__code__.co_varnames[0] if function.__code__.co_argcount else ""
    names = (_held(node, this) for node in ast.walk(found))
    return list(dict.fromkeys(name for name in names if name is not None))


def _held(node: ast.AST, this: str) -> str | None:
    if not isinstance(node, ast.Call) or len(node.args) + len(node.keywords) != 2:
        return None
    attributes = edited_code.attributes_of(node.func, this)
    named = {keyword.arg for keyword in node.keywords}
    return attributes[0] if attributes is not None and len(attributes) == 1 and named <= {"input", "target"} else None


class _Step(NamedTuple):
    """A statement that runs before the loss, and how many of the statements around the loss it stands in."""

    statement: ast.stmt
    level: int


class Loss:
    """The loss that a forward takes, read off its tree.

    Args:
        attribute: the attribute of the module that takes the loss; None: its forward takes the loss itself.

    Attributes:
        call: the call that takes the loss; argument: what of it holds the logits.
        called: what has to be PyTorch's own for the loss to be the one that is known.
        head: the call of the layer that makes the logits; makes: the statement that it is in, or None where it is in
            the loss itself.
        logits: the names that hold logits, and what was done with them; flow: the statements by which they come from
            there to the loss.
        condition: the argument which, where it is not None, has the loss taken; None where it always is.
        after: the statements behind the head; returned: the logits that they return; shapes: the sizes that they read.
        site: what of it the calls of the changed code have to know.

    Raises:
        NotKnown: its loss, or what it does with its logits, is of a form of its own.
    """

    def __init__(self, function: types.FunctionType, found: ast.FunctionDef, attribute: str | None = None):
        self.function, self.found, self.attribute = function, found, attribute
        self.call: ast.Call | None = None
        if not function.__code__.co_argcount:
            raise NotKnown(f"{place(function)}: its forward has no self")
        self.this = function.__code__.co_varnames[0]
        self.parameters = {argument.arg for argument in ast.walk(found.args) if isinstance(argument, ast.arg)}
        self.call, self.kind, self.called = self.loss()
        self.path = self.around()
        if any(isinstance(node, _IN_A_FUNCTION) for node, _ in self.expressions()):
            raise self.error(self.call, "is called in a function inside its forward")
        self.run = [*self.before()]
        self.argument = self.given_logits()
        self.logits = Logits(function, self.this, self.error)
        # How the logits come to the loss, and where in the run they are made: None in the loss itself.
        self.flow: list[ast.stmt] = []
        self.at = self.made()
        self.makes = None if self.at is None else self.run[self.at].statement
        self.condition: str | None = None
        # What runs only where the loss is not taken.
        self.without: list[ast.stmt] = []
        self.site = self.read()

    def error(self, node: ast.AST, what: str) -> NotKnown:
        code = " ".join(ast.unparse(node).split())
        code = code if len(code) <= LONGEST_SHOWN else f"{code[: LONGEST_SHOWN - 1]}…"
        line = place(self.function, node if hasattr(node, "lineno") else None)
        loss = "" if self.call is None else f"; the loss is {ast.unparse(self.call.func)}, line {self.call.lineno}"
        return NotKnown(f"{line}: {code!r} {what}{loss}")

    def read(self) -> Site:
        self.head_call = self.logits.base(self.argument if self.makes is None else self.makes.value)
        self.head = head_of(self.head_call, self.this)
        self.find_condition()
        between: list[ast.stmt] = []
        if self.makes is not None:
            self.logits.names[self.makes.targets[0].id] = self.logits.read(self.makes.value)
            between = [one.statement for one in self.run[self.at + 1 :]]
            between = [one for one in between if not edited_code.is_among(one, self.without)]
        for statement in between:
            self.step(statement)
        form = self.logits.of_loss(self.argument, self.kind == TRANSFORMERS)
        self.look_at_arguments()
        sizes = self.sizes(between)
        self.after = [*between, self.path[-1], *self.behind()]
        self.returned, self.shapes = self.look_at_reads(self.after)
        return Site(
            place(self.function, self.head_call),
            self.head.attribute,
            self.kind,
            self.attribute,
            self.logits.factor,
            self.logits.is_divided,
            self.logits.softcap,
            self.logits.is_float or self.kind == TRANSFORMERS,
            form.is_moved,
            self.logits.rank,
            sizes,
        )

    def loss(self) -> tuple[ast.Call, str, ast.expr]:
        """The one call that takes the loss, how, and what has to be PyTorch's for it to be the loss that is known."""
        if self.attribute is None:
            found = [(node, *kind) for node in ast.walk(self.found) if (kind := self.kind_of(node)) is not None]
        else:
            calls = (node for node in ast.walk(self.found) if _held(node, self.this) == self.attribute)
            found = [(node, HELD, node.func) for node in calls]
        if len(found) == 1:
            return found[0]
        where = place(self.function)
        if not found:
            raise NotKnown(f"{where}: its forward takes no loss itself")
        lines = ", ".join(map(str, sorted(node.lineno for node, *_ in found)))
        raise NotKnown(f"{where}: {len(found)} losses are taken in its forward, on lines {lines}; known is one")

    def kind_of(self, node: ast.AST) -> tuple[str, ast.expr] | None:
        if not isinstance(node, ast.Call):
            return None
        if edited_code.attributes_of(node.func, self.this) == ("loss_function",):
            return TRANSFORMERS, ast.Constant(None)
        if edited_code.value(node.func, self.function) is CROSS_ENTROPY:
            return FUNCTION, node.func
        made, _ = self.maker(node)
        return None if made is None else (MADE, made.func)

    def maker(self, node: ast.Call) -> tuple[ast.Call | None, ast.stmt | None]:
        """The call that makes the criterion which another calls, and the statement in which that gets its name."""
        made, statement = node.func, None
        if isinstance(made, ast.Name) and made.id not in self.parameters:
            # loss_fct = CrossEntropyLoss()
            stored = [n for n in ast.walk(self.found) if edited_code.binds(n, made.id)]
            if len(stored) == 1 and edited_code.stores(self.found).count(made.id) == 1:
                (statement,) = stored
                made = statement.value
        is_made = isinstance(made, ast.Call) and edited_code.value(made.func, self.function) is CRITERION
        return (made, statement) if is_made else (None, None)

    def around(self) -> list[ast.stmt]:
        """The statements around the loss, from the outermost on."""
        path, body = [], self.found.body
        while body:
            statement = next((s for s in body if edited_code.holds(s, self.call)), None)
            if statement is None:
                raise self.error(self.call, "is called in a function inside its forward")
            path.append(statement)
            if not isinstance(statement, _KNOWN_AROUND):
                raise self.error(self.call, f"is called inside the block of line {statement.lineno}")
            body = self.inner(statement)
        return path

    def inner(self, statement: ast.stmt) -> list[ast.stmt]:
        """The block of an if in which the loss is."""
        if not isinstance(statement, ast.If):
            return []
        return next(
            (b for b in (statement.body, statement.orelse) if any(edited_code.holds(s, self.call) for s in b)), []
        )

    def before(self) -> Iterator[_Step]:
        """What runs before the statement of the loss, in order, without the statements around it."""
        body = self.found.body
        for level, statement in enumerate(self.path):
            yield from (_Step(one, level) for one in body[: body.index(statement)])
            body = self.inner(statement)

    def behind(self) -> list[ast.stmt]:
        """What runs after it."""
        found, body = [], self.found.body
        for statement in self.path:
            found += body[body.index(statement) + 1 :]
            body = self.inner(statement)
        return found

    def given_logits(self) -> ast.expr:
        """The argument of the loss that holds the logits."""
        named = {keyword.arg: keyword.value for keyword in self.call.keywords}
        found = named.get("logits" if self.kind == TRANSFORMERS else "input")
        if found is None and self.call.args and not isinstance(self.call.args[0], ast.Starred):
            found = self.call.args[0]
        if found is None:
            raise self.error(self.call, "is given no logits by name or as the first argument")
        return found

    def made(self) -> int | None:
        """The place in the run at which a layer makes the logits; None: in the loss itself. Fills the flow."""
        base = self.logits.base(self.argument)
        if head_of(base, self.this) is not None:
            return None
        if not isinstance(base, ast.Name):
            raise self.error(base, f"does more with the logits than to flatten them; known is {KNOWN}")
        name = base.id
        for at, (statement, _) in reversed([*enumerate(self.run)]):
            if name not in edited_code.stores(statement) or _leaves_without(statement) is not None:
                continue
            if isinstance(statement, ast.If | ast.AugAssign):
                self.flow.append(statement)
                continue
            if not edited_code.binds(statement, name):
                break
            base = self.logits.base(statement.value)
            if head_of(base, self.this) is not None:
                return at
            if not isinstance(base, ast.Name):
                raise self.error(statement, f"makes other logits; known is {KNOWN}")
            self.flow.append(statement)
            name = base.id
        raise self.error(self.argument, "is not of a layer that its forward calls itself")

    def find_condition(self) -> None:
        """The argument which, where it is not None, has the loss taken; None where it always is."""
        if self.at is None:
            # The head is in the loss: where one runs the other does.
            return
        first, tested = self.run[self.at].level, -1
        for at, (statement, _) in enumerate(self.run):
            if at > self.at and any(_leaves(part) for part in ast.walk(statement)):
                argument = _leaves_without(statement)
                if argument is None or self.condition not in (None, argument):
                    raise self.error(statement, "may leave without the loss; known is `if targets is None: return …`")
                self.condition, tested = argument, at
                self.without.append(statement)
        for level, outer in enumerate(self.path[:-1]):
            if level >= first:
                self.hangs_on(outer.test, any(self.path[level + 1] is one for one in outer.body))
                tested = max([tested, *(at for at, one in enumerate(self.run) if one.level <= level)])
        for node, inside in self.expressions():
            if isinstance(node, ast.IfExp) and inside is not node.test:
                self.hangs_on(node.test, inside is node.body)
                tested = len(self.run) - 1
            elif isinstance(node, ast.IfExp | ast.BoolOp):
                raise self.error(node, "takes the loss under a condition of its own")
        stored = [name for one in self.run[: tested + 1] for name in edited_code.stores(one.statement)]
        if self.condition is not None and (self.condition not in self.parameters or self.condition in stored):
            raise self.error(self.call, f"hangs on {self.condition!r}, which is no argument, or is made anew")

    def expressions(self) -> Iterator[tuple[ast.AST, ast.AST]]:
        """What is around the call of the loss in its statement, each with what of it holds the call."""
        node: ast.AST = self.path[-1]
        while node is not self.call:
            inside = next(child for child in ast.iter_child_nodes(node) if edited_code.holds(child, self.call))
            yield node, inside
            node = inside

    def hangs_on(self, test: ast.expr, is_true: bool) -> None:
        argument = _none_test(test, ast.IsNot if is_true else ast.Is)
        if argument is None or self.condition not in (None, argument):
            raise self.error(test, "is another condition for the loss than an argument that is given")
        self.condition = argument

    def step(self, statement: ast.stmt) -> None:
        """Notes what a statement between the head and the loss does with the logits."""
        stored = edited_code.stores(statement)
        if not edited_code.is_among(statement, self.flow):
            if set(stored) & set(self.logits.names):
                raise self.error(statement, f"makes other logits; known is {KNOWN}")
            if self.unknown_reads(statement):
                raise self.error(statement, _READS)
            self.writes_nothing(statement)
            self.logits.forget(stored)
            self.logits.unpack(statement)
            return
        self.logits.forget(stored)
        if isinstance(statement, ast.Assign):
            self.writes_nothing(statement)
            self.logits.names[statement.targets[0].id] = self.logits.read(statement.value)
        elif not self.logits.changes(statement, stored):
            raise self.error(statement, f"makes other logits; known is {KNOWN}")

    def unknown_reads(self, statement: ast.AST) -> bool:
        """Whether a statement before the loss, or a part of one, does more with the logits than to read their sizes."""
        sizes = self.logits.shapes_read(statement).values()
        known = {id(node) for size in sizes for node in ast.walk(size)}
        return any(id(n) not in known for name in self.logits.names for n in edited_code.loads(statement, name))

    def writes_nothing(self, node: ast.stmt | ast.expr) -> None:
        if not harmless_code.is_harmless(node, self.function, self.this):
            raise self.error(node, "may write into what the head is given, or into the head")

    def look_at_arguments(self) -> None:
        """Raises where the loss has arguments that are not known, or its statement may write what the head reads."""
        others = [one for one in self.call.args if one is not self.argument]
        others += [keyword.value for keyword in self.call.keywords if keyword.value is not self.argument]
        if self.kind == TRANSFORMERS:
            sizes = [keyword.value for keyword in self.call.keywords if keyword.arg == "vocab_size"]
            self.logits.sizes += [size for size in sizes if not self.logits.is_classes(size)]
        else:
            known = {"target", *_OPTIONS} if self.kind == FUNCTION else {"target"}
            names = {keyword.arg for keyword in self.call.keywords} - {"input"}
            if names - known or len(self.call.args) > (3 if self.kind == FUNCTION else 2):
                raise self.error(self.call, f"has other arguments than {', '.join(sorted(known))}")
        made, _ = self.maker(self.call)
        if made is not None:
            # Its options are computed once more, for the loss without logits.
            others += [*made.args, *(keyword.value for keyword in made.keywords)]
            if len(made.args) > 1 or not {keyword.arg for keyword in made.keywords} <= _OPTIONS:
                raise self.error(made, f"has other options than {', '.join(sorted(_OPTIONS))}")
        for one in others:
            if self.unknown_reads(one):
                raise self.error(one, _READS)
            self.writes_nothing(one)
        if harmless_code.writes(self.path[-1]):
            raise self.error(self.path[-1], "may write into what the head is given, or into the head")
        start = self.call.lineno, self.call.col_offset
        for node in ast.walk(self.path[-1]):
            # What is computed in the statement before the loss is.
            if isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) <= start:
                self.writes_nothing(node)

    def sizes(self, between: list[ast.stmt]) -> tuple[tuple[str, tuple[str, ...] | int | None], ...]:
        """What has to be the vocabulary's size, of which each is asked where the logits are to be made."""
        stored = {name for statement in between for name in edited_code.stores(statement)}
        for size in self.logits.sizes:
            for node in ast.walk(size):
                is_known = isinstance(node, ast.Name | ast.Attribute | ast.Constant | ast.expr_context)
                if not is_known or (isinstance(node, ast.Name) and node.id in stored):
                    raise self.error(size, "is not known to be the vocabulary's size")
        return tuple(
            (
                ast.unparse(size),
                size.value if isinstance(size, ast.Constant) else edited_code.attributes_of(size, self.this),
            )
            for size in self.logits.sizes
        )

    def look_at_reads(self, after: list[ast.stmt]) -> tuple[list[ast.Name], dict[int, ast.expr]]:
        """Where the logits are returned, and where their sizes are read.

        Raises:
            NotKnown: something else is done with them, or with their names.
        """
        returned: list[ast.Name] = []
        shapes: dict[int, ast.expr] = {}
        for statement in after:
            returned += self.returned_in(statement)
            shapes |= self.logits.shapes_read(statement)
        known = {id(name) for name in returned} | self.logits.bases
        known |= {id(n) for one in shapes.values() for n in ast.walk(one) if isinstance(n, ast.Name)}
        for statement in after:
            if not isinstance(statement, ast.Assign) and edited_code.is_among(statement, self.flow):
                continue
            for node, inside in edited_code.nodes(statement, self.without):
                if not isinstance(node, ast.Name) or node.id not in self.logits.names or id(node) in known:
                    continue
                if isinstance(node.ctx, ast.Load):
                    raise self.error(inside, _READS)
                if not edited_code.is_among(inside, self.flow):
                    raise self.error(inside, f"makes other logits; known is {KNOWN}")
        return returned, shapes

    def returned_in(self, statement: ast.stmt) -> list[ast.Name]:
        """Where the logits are part of what is returned, as they are: of a tuple, or of an output's field."""
        found: list[ast.Name] = []
        for node, _ in edited_code.nodes(statement, self.without):
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
            found += [value for value in values if isinstance(value, ast.Name) and value.id in self.logits.names]
        return found


def _leaves(node: ast.AST) -> bool:
    return isinstance(node, ast.Return | ast.Break | ast.Continue)


def _leaves_without(statement: ast.stmt) -> str | None:
    """The name in `if name is None: … return …`; None of anything else."""
    if not isinstance(statement, ast.If) or statement.orelse or not isinstance(statement.body[-1], ast.Return):
        return None
    return _none_test(statement.test, ast.Is)


def _none_test(test: ast.expr, operation: type) -> str | None:
    """The name in `name is None`, or `name is not None`."""
    is_test = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], operation)
    if is_test and isinstance(test.left, ast.Name) and ast.unparse(test.comparators[0]) == "None":
        return test.left.id
    return None
