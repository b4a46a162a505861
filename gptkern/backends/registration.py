"""What the operators share: registration with PyTorch, the way past it where nobody looks on, autocast, and the refusal
of second derivatives.

A call of an operator is one record, a NamedTuple of its contract. The schema of the registered op, the order of the
launchers' arguments and what dispatch looks at are read from its fields: a new option is one field and its meaning.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

import torch

from gptkern.backends import dispatch, recomputation
from gptkern.backends.unseen import is_unseen

_library = torch.library.Library("gptkern", "FRAGMENT")

# A field of a call that the operator writes in place: the schema says so, and nothing is returned for it.
Written = Annotated[torch.Tensor, "written"]

_SCHEMA_TYPES = {
    torch.Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str", torch.dtype: "ScalarType",
}  # fmt: skip


def schema_of(records: Iterable[type], *, read_only: type | None = None) -> Iterator[str]:
    """The arguments of a schema, as torch.library writes them, of the fields of NamedTuple classes.

    Args:
        read_only: the call's record in a backward, which writes none of its tensors and is not given what it does not
            read: there a tensor may be None.

    Raises:
        TypeError: a field has a type that no schema knows.
    """
    aliases = (f"({letter}!)" for letter in "abcdefghijklmnop")
    for record in records:
        for name, hint in typing.get_type_hints(record, include_extras=True).items():
            written = _schema_type(name, hint, aliases)
            if record is read_only:
                written = re.sub(r"\(\w!\)", "", written)
                written = "Tensor?" if written == "Tensor" else written
            yield f"{written} {name}"


def _schema_type(name: str, hint: Any, aliases: Iterator[str]) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_SCHEMA_TYPES[arguments[0]]}{next(aliases)}"
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and type(None) in arguments:
        (present,) = (argument for argument in arguments if argument is not type(None))
        return f"{_schema_type(name, present, aliases)}?"
    if origin is list:
        return f"{_schema_type(name, arguments[0], aliases)}[]"
    if hint not in _SCHEMA_TYPES:
        raise TypeError(f"field {name} is {hint!r}; a registered op takes {', '.join(map(str, _SCHEMA_TYPES))}, "
                        "lists of these, None, and what is Written")  # fmt: skip
    return _SCHEMA_TYPES[hint]


class Operator:
    """The registered ops of an operator, `gptkern::<name>_forward` and, where it has gradients, `…_backward`.

    Args:
        name: the room's.
        call: the NamedTuple class of a call; its first tensor says on which device the kernels run.
        results: how many tensors the forward returns; 0 for an operator that only writes in place.
        fake: fake(call) -> the forward's results, allocated and not computed.
        gradient: the NamedTuple class of what the backward gets besides the call: gradients of results, what the
            forward kept, which gradients are needed. What is `Written | None` in it is None in the op
            `…_backward`, and stands in another one, `…_in_place_backward`, which returns nothing.
        gradients: how many tensors the backward returns.
        gradient_fake: gradient_fake(gradient, call) -> the backward's results.
        room: of the launchers, where the operator is the second of a room: it then has a name of its own.
        launcher: the forward's name in a backend's module.

    A backend's launchers are forward(call) and backward(gradient, call), where tensors of the call that the backward
    does not read are None. A result that a call does not have is None; of a registered op, which cannot return that, it
    is an empty tensor.

    `forward` and `backward` start the launcher themselves where nobody would see the registered op (`is_unseen`):
    PyTorch's dispatcher takes longer than most launchers do.
    """

    def __init__(
        self,
        name: str,
        call: type,
        results: int,
        fake: Callable[[Any], Any],
        gradient: type | None = None,
        gradients: int = 0,
        gradient_fake: Callable[[Any, Any], Any] | None = None,
        *,
        room: str | None = None,
        launcher: str = "forward",
    ):
        self.name, self.room, self._launcher = name, room or name, launcher
        arguments = list(schema_of([call]))
        self._forward = self._registered("forward", arguments, results, (call,), fake)
        # Fields of the gradient that a backward writes where they are there.
        self._written: tuple[str, ...] = ()
        if gradient is not None:
            arguments = list(schema_of([gradient, call], read_only=call))
            written = [argument for argument in arguments if "!" in argument.split()[0]]
            self._written = tuple(argument.split()[-1] for argument in written)
            if written:
                self._in_place = self._registered(
                    "in_place_backward", arguments, 0, (gradient, call), lambda gradient, call: None
                )
            # An op that may write is none to compilers and batches of gradients: without these fields it does not.
            arguments = [argument for argument in arguments if argument not in written]
            self._backward = self._registered("backward", arguments, gradients, (gradient, call), gradient_fake)

    def forward(self, call, backend: str, unseen: bool | None = None):
        """What the backend's forward launcher returns for the call.

        Args:
            unseen: is_unseen(call), where it is known.
        """
        op, start = self._forward
        if is_unseen(call) if unseen is None else unseen:
            return start(backend, call)
        return op(*call, backend)

    def backward(self, gradient, call, backend: str):
        """What the backend's backward launcher returns.

        Raises:
            RuntimeError: a tensor that the forward has saved came back on another device.
        """
        op, start = self._backward
        given = passed = (*gradient, *call)
        if self._written:
            if any(getattr(gradient, name) is not None for name in self._written):
                op, start = self._in_place
            else:
                read = [value for name, value in zip(gradient._fields, gradient) if name not in self._written]
                passed = (*read, *call)
        device = dispatch.first_tensor(given).device
        if is_unseen(given, device):
            return start(backend, gradient, call)
        # A kernel would be handed an address of another memory.
        for name, argument in zip((*gradient._fields, *call._fields), given):
            if isinstance(argument, torch.Tensor) and argument.device != device:
                raise RuntimeError(
                    f"{self.name}: in the backward {name} is on {argument.device}; it needs to be on {device}, where "
                    "the forward ran: a hook on saved tensors has to put it back"
                )
        return op(*passed, backend)

    def _registered(self, direction: str, arguments: list[str], results: int, records: tuple, fake: Callable):
        """Registers an op; returns it, and what it does: start(backend, *records).

        `Library.define` and `impl`, not the `custom_op` decorator: half the host time of a call.
        """
        operator, name = self.room, f"{self.name}_{direction}"
        names = [argument.split()[-1] for argument in arguments]
        if len({*names, "backend"}) <= len(names):
            needs = "each needs a name of its own, and none is `backend`"
            raise TypeError(f"{name}: the records' fields are {', '.join(names)}; {needs}")
        returned = {0: "()", 1: "Tensor"}.get(results, f"({', '.join(['Tensor'] * results)})")
        _library.define(f"{name}({', '.join([*arguments, 'str backend'])}) -> {returned}")
        sizes = [len(record._fields) for record in records]
        written = [index for index, argument in enumerate(arguments) if "!" in argument.split()[0]]

        def split(given: tuple) -> list:
            if len(records) == 1:
                return [records[0]._make(given)]
            if direction == "backward" and self._written:
                values = iter(given)
                gradient = [None if name in self._written else next(values) for name in records[0]._fields]
                return [records[0]._make(gradient), records[1]._make(values)]
            return [records[0]._make(given[: sizes[0]]), records[1]._make(given[sizes[0] :])]

        is_forward = direction == "forward"
        attribute = self._launcher if is_forward else "backward"
        loaded = dispatch._modules

        def start(backend, *records):
            # What torch.compile made calls no twin.
            if is_forward and recomputation.blocks_are_open():
                recomputation.carry()
            module = loaded.get((backend, operator))
            if module is None:
                module = dispatch.load(backend, operator)
            launcher, first = getattr(module, attribute), records[0][0]
            if not isinstance(first, torch.Tensor):
                first = dispatch.first_tensor(records[0])
            if _is_elsewhere(first):
                with on_device_of(first):
                    results = launcher(*records)
            else:
                results = launcher(*records)
            # A kernel writes unseen by autograd, which would take what it has saved for what it was.
            for index in written:
                tensor = [*itertools.chain(*records)][index]
                if tensor is not None:
                    torch.autograd.graph.increment_version(tensor)
            return results

        def whole(found, given):
            """The results, an empty tensor for each that the call does not have."""
            if type(found) is not tuple or not any(result is None for result in found):
                return found
            empty = dispatch.first_tensor(given).new_empty
            return tuple(empty(0) if result is None else result for result in found)

        def run(*given):
            with without_autocast(dispatch.first_tensor(given).device.type):
                return whole(start(given[-1], *split(given[:-1])), given)

        def shapes(*given):
            return whole(fake(*split(given[:-1])), given)

        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gptkern::{name}", shapes, lib=_library)
        return getattr(torch.ops.gptkern, name).default, start


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on another GPU than the current one."""
    return tensor.is_cuda and tensor.get_device() != torch._C._cuda_getDevice()


def on_device_of(tensor: torch.Tensor):
    """Makes the tensor's GPU the current one: a kernel is launched on the current device."""
    return torch.cuda.device(tensor.device) if _is_elsewhere(tensor) else contextlib.nullcontext()


def _autocast_is_on(device_type: str) -> bool:
    # PyTorch has no autocast for meta tensors and raises where it is asked.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str):
    """Keeps autocast out of a launcher: the twin has already cast what autocast would."""
    if _autocast_is_on(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def autocast(policy: str, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as PyTorch's autocast would hand them to an operator.

    Args:
        policy: "float32" for the operators that CUDA's autocast runs in float32 (layer_norm, softmax) and the
            CPU's leaves alone; "lower" for those that run in the autocast dtype on both (matrix products).
    """
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    # Both take a tenth of the host time of `device.type`.
    device_type = "cuda" if first.is_cuda else "cpu" if first.is_cpu else first.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    if policy == "float32" and device_type != "cuda":
        return tensors
    dtype = torch.float32 if policy == "float32" else torch.get_autocast_dtype(device_type)

    def cast(tensor):
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(map(cast, tensors))


class KernelFunction(torch.autograd.Function):
    """An autograd.Function of an operator. The public ones' forward ends with `unseen`, as Operator.forward has it;
    those for the most usual calls get the call itself, or None where somebody looks on.

    `apply_unseen` is autograd's own `apply`, for where nobody looks on: torch.autograd.Function does in Python what
    torch.func and a setup_context need, which takes as long as all of autograd's work in C++.
    """

    apply_unseen: Callable

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.apply_unseen = super(torch.autograd.Function, cls).apply


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd has to know of a call with these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def on_kernels(operator: Operator, function: type[KernelFunction], call, backend: str, unseen: bool | None, *wanted):
    """What the kernels return for a call, through the autograd.Function where one of the tensors wants a gradient.

    Args:
        function: its `apply` takes the fields of the call, the backend and `unseen`.
        unseen: is_unseen(call), or None where that is not known.
    """
    if unseen is None:
        unseen = is_unseen(call)
    if not needs_gradient(*wanted):
        return operator.forward(call, backend, unseen)
    return (function.apply_unseen if unseen else function.apply)(*call, backend, unseen)


class _OnceDifferentiable(torch.autograd.Function):
    """The identity on gradients, whose own backward raises."""

    @staticmethod
    def forward(ctx, operator, remedy, count, *tensors):
        ctx.message = f"gptkern: {operator} has no second derivative. {remedy}".rstrip()
        ctx.count = count
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(ctx.message)


def once_differentiable(
    operator: str,
    gradients: list[torch.Tensor | None],
    sources,
    remedy: str = 'Compute it under gptkern.backend("torch"), which differentiates PyTorch\'s own operator.',
) -> tuple:
    """The gradients as they are; under create_graph=True, tied to a node that refuses to be differentiated.

    Args:
        gradients: what a backward is about to return.
        sources: the tensors that the gradients depend on.
        remedy: what to do instead, the end of the error's message.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    present = [gradient for gradient in gradients if gradient is not None]
    tied = iter(
        _OnceDifferentiable.apply(operator, remedy, len(present), *present, *(s for s in sources if s is not None))
    )
    return tuple(None if gradient is None else next(tied) for gradient in gradients)
