"""Activations of models, and products of one with something else, on gptkern's gelu, silu, swiglu and geglu.

    act(gate(x)) * up(x)                    swiglu(gate(x), up(x)) where act is SiLU, geglu where it is GELU
    gate, up = packed.chunk(2, -1)
    up * act(gate)                          swiglu(packed), geglu(packed): no copy, and one gradient for both; where
                                            a half is read anywhere else (a hook, retain_grad), of the two halves

The product is found in a forward's source, whatever the model; what `act` is, is asked when it runs: the module may be
another one by then, or have hooks, which want it called. The linear layers around stay calls of their modules, so they
may be int8 before a swap or after it.

A GELU or SiLU by itself: torch.nn's modules become twins, transformers' get a forward on gptkern's, and F.gelu and
F.silu lead there as F.softmax does. While torch.compile compiles, and no backend is forced, they stay PyTorch's:
Inductor writes such a function into the kernel of what stands around it, which no kernel of its own can better.

transformers' NewGELU is GELU's tanh form written out in eight operators, each rounded; here it is rounded once.
"""

from __future__ import annotations

import ast
import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.modules import module as torch_module

from gptkern import functional as F
from gptkern import nn
from gptkern.backends import dispatch, tracing
from gptkern.swapping import edited_code
from gptkern.swapping.edited_code import OWN

_GELU, _SILU, _TANH = "gelu", "silu", "tanh"
_PRODUCT, _PRODUCT_BEHIND, _IS_ACTIVATION = f"{OWN}product", f"{OWN}product_behind", f"{OWN}is_activation"


class Form(NamedTuple):
    """A function that an activation module computes: GELU in one of its two forms, or SiLU."""

    function: str
    approximate: str = "none"


def form(module: torch.nn.Module) -> Form | None:
    """What a module of exactly a known class computes, swapped or not; None of any other."""
    cls = type(module)
    if cls is torch.nn.SiLU or cls is nn.SiLU:
        return None if module.inplace else Form(_SILU)
    if cls is torch.nn.GELU or cls is nn.GELU:
        return Form(_GELU, module.approximate)
    if not cls.__module__.startswith("transformers."):
        return None
    known = sys.modules["transformers.activations"]
    # A swapped one has a subclass of its own.
    cls = cls.__base__ if "_gptkern_routed" in cls.__dict__ else cls
    if cls is known.SiLUActivation:
        return Form(_SILU)
    if cls is known.NewGELUActivation:
        return Form(_GELU, _TANH)
    act = module.__dict__.get("act")
    if cls is known.GELUActivation and act is torch.nn.functional.gelu:
        return Form(_GELU)
    is_partial = isinstance(act, functools.partial) and act.func is torch.nn.functional.gelu and not act.args
    if cls is known.GELUTanh and is_partial and act.keywords == {"approximate": _TANH}:
        return Form(_GELU, _TANH)
    return None


# --- An activation by itself ------------------------------------------------------------------------------------------


def replaced(cls: type) -> Callable | None:
    """The forward that takes the place of an activation class's of transformers, where it is known."""
    known = sys.modules.get("transformers.activations")
    if known is None or cls.__module__ != known.__name__:
        return None
    found = {
        known.SiLUActivation: Form(_SILU),
        known.NewGELUActivation: Form(_GELU, _TANH),
        known.GELUActivation: Form(_GELU),
        known.GELUTanh: Form(_GELU, _TANH),
    }.get(cls)
    if found is None or cls.forward.__qualname__ != f"{cls.__qualname__}.forward" or not _computes(cls, found):
        return None

    def forward(self, input):
        of_it = None if dispatch.is_left_to_compiler() else form(self)
        if of_it is None:
            return cls.forward(self, input)
        return F.silu(input) if of_it.function == _SILU else F.gelu(input, approximate=of_it.approximate)

    return forward


@functools.cache
def _computes(cls: type, found: Form) -> bool:
    """Whether a new module of the class computes this, on a few numbers in float64."""
    with torch.no_grad():
        x = torch.linspace(-6, 6, 25, dtype=torch.float64, device="cpu")
        theirs = cls().forward(x)
        if found.function == _SILU:
            return torch.allclose(theirs, torch.nn.functional.silu(x), rtol=1e-12, atol=1e-12)
        ours = torch.nn.functional.gelu(x, approximate=found.approximate)
        return torch.allclose(theirs, ours, rtol=1e-12, atol=1e-12)


def _alone(ours: Callable, theirs: Callable) -> Callable:
    @functools.wraps(ours)
    def function(*args, **kwargs):
        return (theirs if dispatch.is_left_to_compiler() else ours)(*args, **kwargs)

    return function


# What takes the place of PyTorch's functions where a forward calls them.
FUNCTIONS = {
    torch.nn.functional.gelu: _alone(F.gelu, torch.nn.functional.gelu),
    torch.nn.functional.silu: _alone(F.silu, torch.nn.functional.silu),
}
_NAMES = {torch.nn.functional.gelu: _GELU, torch.nn.functional.silu: _SILU}
_NAMES |= {ours: _NAMES[theirs] for theirs, ours in FUNCTIONS.items()}


# --- A product with an activation -------------------------------------------------------------------------------------


class Products(NamedTuple):
    """The products with an activation that a forward's source holds.

    Attributes:
        modules: the attributes of the module in which the activations are.
        functions: how many are with F.silu or F.gelu.
    """

    modules: frozenset[str]
    functions: int


def may_hold_products(function: types.FunctionType) -> bool:
    """Whether it is worth to read the function's source: it multiplies."""
    return any(found.opname == "BINARY_OP" and found.argrepr == "*" for found in dis.get_instructions(function))


def change_products(function: types.FunctionType, found: ast.FunctionDef) -> Products:
    """Changes the tree: `act(gate) * up` and `up * act(gate)` become calls of what CELLS gives."""
    changing = _Changing(function, found)
    changing.generic_visit(found)
    return Products(frozenset(changing.modules), changing.functions)


def are_known(products: Products, module: torch.nn.Module) -> bool:
    """Whether any of the products of the module's forward is with an activation that is known."""
    held = (getattr(module, name, None) for name in products.modules)
    return products.functions > 0 or any(isinstance(act, torch.nn.Module) and form(act) is not None for act in held)


class _Changing(ast.NodeTransformer):
    def __init__(self, function: types.FunctionType, found: ast.FunctionDef):
        self.function = function
        self.this = function.__code__.co_varnames[0] if function.__code__.co_argcount else ""
        self.modules: list[str] = []
        self.functions = 0
        # The halves of a packed tensor that still are what a chunk made them -> the statement, made anew where needed.
        self.halves: dict[tuple[str, str], _Chunk] = {}
        self.statement: ast.stmt = found
        self.reads = [*_reads(found)]
        loops = [node for node in ast.walk(found) if isinstance(node, ast.For | ast.While)]
        self.in_loops = {id(node) for loop in loops for node in ast.walk(loop)}

    def not_entered(self, node: ast.AST) -> ast.AST:
        # Names may be others in there.
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_Lambda = not_entered
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = not_entered

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult):
            return node
        first, behind = self.product(node.left, node.right, True), self.product(node.right, node.left, False)
        if first is not None and behind is not None:
            # Which of the two is the activation, the modules say: self.act(gate) * self.up(x).
            return ast.IfExp(edited_code.call(_IS_ACTIVATION, node.left.func), first, behind)
        return first or behind or node

    def product(self, call: ast.expr, other: ast.expr, comes_first: bool) -> ast.expr | None:
        gate = self.gate(call)
        if gate is None:
            return None
        arguments = [gate, other] if comes_first else [other, gate]
        packed = self.packed(gate, other) or ast.Constant(None)
        options = [keyword.value for keyword in call.keywords]
        return edited_code.call(_PRODUCT if comes_first else _PRODUCT_BEHIND, call.func, *arguments, packed, *options)

    def gate(self, call: ast.expr) -> ast.expr | None:
        """The argument, where it is the call of an activation: of an attribute of self, or of PyTorch's function."""
        if not isinstance(call, ast.Call) or len(call.args) != 1 or isinstance(call.args[0], ast.Starred):
            return None
        attributes = edited_code.attributes_of(call.func, self.this) if self.this else None
        if attributes is not None:
            if len(attributes) == 1 and not call.keywords:
                self.modules.append(attributes[0])
                return call.args[0]
            return None
        function = edited_code.value(call.func, self.function)
        is_function = isinstance(function, types.FunctionType | types.BuiltinFunctionType)
        known = _NAMES.get(function) if is_function else None
        options = [keyword.arg for keyword in call.keywords]
        if known is None or options not in ([], ["approximate"] if known == _GELU else []):
            return None
        self.functions += 1
        return call.args[0]

    # --- gate, up = packed.chunk(2, -1)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field, old in ast.iter_fields(node):
            if isinstance(old, list) and old and isinstance(old[0], ast.stmt):
                setattr(node, field, list(self.block(old)))
            elif isinstance(old, list):
                setattr(node, field, [self.visit(one) if isinstance(one, ast.AST) else one for one in old])
            elif isinstance(old, ast.AST):
                setattr(node, field, self.visit(old))
        return node

    def block(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        around, self.halves = (self.halves, self.statement), {}
        for statement in statements:
            self.statement = statement
            statement = self.visit(statement)
            for pair in [pair for pair in self.halves if set(pair) & set(edited_code.stores(statement))]:
                del self.halves[pair]
            chunk = _chunk(statement)
            if chunk is not None:
                self.halves[chunk.pair] = chunk
                yield chunk.packed
            yield statement
        self.halves, self.statement = around

    def packed(self, gate: ast.expr, other: ast.expr) -> ast.expr | None:
        """The tensor of which these two are the first half and the second, where that is so."""
        if isinstance(gate, ast.Name) and isinstance(other, ast.Name):
            chunk = self.halves.get((gate.id, other.id))
            if chunk is not None and self.is_all(gate, chunk) and self.is_all(other, chunk):
                return edited_code.name(chunk.name)
        return None

    def is_all(self, half: ast.Name, chunk: _Chunk) -> bool:
        """Whether the half is read here and nowhere else: with the whole in its place no gradient reaches it."""
        code = self.function.__code__
        if half.id not in code.co_varnames or half.id in code.co_cellvars:
            return False
        others = [_place(name) for name in self.reads if name.id == half.id and name is not half]
        made, product = _end(chunk.packed), self.statement
        if isinstance(product, ast.Assign) and any(edited_code.is_name(one, half.id) for one in product.targets):
            # up = up * act(gate): what reads the name behind it reads the product.
            return not any(made <= place < _end(product) for place in others)
        is_in_a_loop = id(product) in self.in_loops
        return not others if is_in_a_loop else all(place < made for place in others)


def _reads(node: ast.AST) -> Iterator[ast.Name]:
    """Where names of the function are read in it: those that a comprehension binds are its own."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node
    own: set[str] = set()
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        yield from _reads(node.generators[0].iter)
        own = {name for generator in node.generators for name in edited_code.stores(generator.target)}
    for child in ast.iter_child_nodes(node):
        yield from (name for name in _reads(child) if name.id not in own)


def _place(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset


class _Chunk(NamedTuple):
    pair: tuple[str, str]
    name: str  # of the packed tensor
    packed: ast.Assign  # which gives it that name


def _chunk(statement: ast.stmt) -> _Chunk | None:
    """`gate, up = packed.chunk(2, dim=-1)`, in which the packed tensor then has a name of its own."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, call = statement.targets[0], statement.value
    names = [one.id for one in target.elts if isinstance(one, ast.Name)] if isinstance(target, ast.Tuple) else []
    if len(names) != 2 or len(set(names)) != 2 or len(target.elts) != 2 or not isinstance(call, ast.Call):
        return None
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "chunk" or len(arguments) != 2:
        return None
    if [keyword.arg for keyword in call.keywords] not in ([], ["dim"]) or [*map(ast.unparse, arguments)] != ["2", "-1"]:
        return None
    name = f"{OWN}packed_{names[0]}_{names[1]}"
    packed = ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], call.func.value), statement)
    call.func.value = edited_code.name(name)
    return _Chunk((names[0], names[1]), name, packed)


def _product(act, gate, up, packed=None, *approximate):
    """act(gate) * up: (…, width) each, or packed (…, 2 width), which holds both."""
    found = _form_of(act, *approximate)
    # What broadcasts, or has two dtypes, is no product of these operators.
    if found is None or not _are_alike(gate, up):
        return (act(gate, approximate=approximate[0]) if approximate else act(gate)) * up
    both = (gate, up) if packed is None else (packed,)
    return F.swiglu(*both) if found.function == _SILU else F.geglu(*both, approximate=found.approximate)


def _product_behind(act, up, gate, packed=None, *approximate):
    """up * act(gate), of which the left is computed first."""
    found = _form_of(act, *approximate)
    if found is None or not _are_alike(gate, up):
        return up * (act(gate, approximate=approximate[0]) if approximate else act(gate))
    return _product(act, gate, up, packed, *approximate)


def _are_alike(gate: object, up: object) -> bool:
    are_tensors = isinstance(gate, torch.Tensor) and isinstance(up, torch.Tensor)
    return are_tensors and gate.dtype == up.dtype and tracing.sizes(gate) == tracing.sizes(up)


# What the changed code calls.
CELLS = {
    _PRODUCT: _product,
    _PRODUCT_BEHIND: _product_behind,
    _IS_ACTIVATION: lambda act: _form_of(act) is not None,
}


def _form_of(act: object, approximate: str = "none") -> Form | None:
    if isinstance(act, torch.nn.Module):
        return form(act) if is_bare(act) else None
    function = _NAMES.get(act) if isinstance(act, types.FunctionType | types.BuiltinFunctionType) else None
    return None if function is None else Form(function, approximate)


def is_bare(module: torch.nn.Module) -> bool:
    """Whether a call of the module does no more than its class's forward: no hooks, no forward of its own."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )
