"""Who else is there while a call runs: torch.func, forward mode, torch.jit.trace, a compiler, modes and fake tensors,
autocast, a profiler.

Kernels know none of the tracers and transforms, and PyTorch's own operators all. A tensor that one of them holds may
have no values to look at, or ones that a graph must not keep; a size that torch.jit.trace hands out is a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# Where make_fx and torch.export keep their modes while they trace above autograd.
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# Of the batches from before torch.func, in which autograd takes gradients of many at once (is_grads_batched). The enum
# has no such member.
_VMAP = torch._C._dispatch_key_parse("VmapMode")


def constant_while_compiling(function: Callable) -> Callable:
    """torch.compile calls the function once and keeps the result.

    What torch.compiler.assume_constant_result does, without its import of torch._dynamo (and of triton), which
    would take most of the time of `import gptkern`.
    """
    function._dynamo_marked_constant = True
    return function


# A compiler traces a transform by entering it, and guards on it.
@constant_while_compiling
def in_torch_func() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, …) is active."""
    return torch._C._are_functorch_transforms_active()


def in_jit_trace() -> bool:
    """Whether torch.jit.trace, and with it the older ONNX export, records what runs."""
    return torch._C._get_tracing_state() is not None


def is_dual(tensor: torch.Tensor) -> bool:
    """Whether the tensor carries a tangent (torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_transformed() -> bool:
    """Whether torch.func, forward mode or torch.jit.trace is there: PyTorch's operators, and no autograd.Function."""
    return in_torch_func() or forward_ad._current_level >= 0 or in_jit_trace()


@constant_while_compiling
def in_derivative() -> bool:
    """Whether torch.func or forward mode may be taking a derivative, for which no tensor need require grad."""
    if forward_ad._current_level >= 0:
        return True
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    # Inside of vmap a tensor does not say whether the batch that it is of requires grad.
    is_batched = all(transform.key() == torch._C._functorch.TransformType.Vmap for transform in transforms)
    return bool(transforms) and (torch.is_grad_enabled() or not is_batched)


def is_for_any_size(size: int | torch.SymInt | torch.Tensor) -> bool:
    """Whether a graph is made that is kept whatever the size will be: by torch.jit.trace, make_fx or torch.export.

    A compiler looks at the size again at each call.
    """
    if type(size) is int:
        return False
    return isinstance(size, torch.Tensor) or not torch.compiler.is_compiling() or torch.compiler.is_exporting()


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the tensor's values may be looked at: it is plain, and nothing records, transforms or fakes it."""
    return (
        type(tensor) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not in_torch_func()
        and not in_jit_trace()
        and not in_dispatch_mode()
        and not _is_included(_VMAP)
    )


def in_dispatch_mode() -> bool:
    """Whether something sees each operator that runs: make_fx, torch.export, fake tensors, a mode of a user's."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def is_watched() -> bool:
    """Whether somebody looks on while operators run, or takes their place, compilers apart: a mode, a tracer, a
    transform, forward mode, autocast, or a profiler. What is asked here WATCHERS asks too.
    """
    return (
        _dispatch_modes()
        or _function_modes()
        or _in_transform()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _in_autocast()
        or _in_profiler()
        or _is_included(_PRE_DISPATCH)
        or _is_included(_VMAP)
    )


# Each is asked at every call of an operator.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_in_transform = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_in_autocast = torch._C._is_any_autocast_enabled
_in_profiler = torch._C._autograd._profiler_enabled
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
# What `is_watched` asks, for whoever can ask faster: functions of nothing. Python's own loop over them is slower.
WATCHERS = (
    _dispatch_modes,
    _function_modes,
    _in_transform,
    lambda: forward_ad._current_level >= 0,
    _tracing_state,
    _in_autocast,
    _in_profiler,
    functools.partial(_is_included, _PRE_DISPATCH),
    functools.partial(_is_included, _VMAP),
)


def sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's shape, to be compared: of numbers, also while torch.jit.trace makes them tensors."""
    return tensor.shape if torch._C._get_tracing_state() is None else tuple(torch.ops.aten.size(tensor))


class untraced:
    """Sizes are numbers inside the block, also while torch.jit.trace makes them tensors; nothing in it is recorded."""

    __slots__ = ("_state",)

    def __enter__(self):
        self._state = torch._C._get_tracing_state()
        if self._state is not None:
            torch._C._set_tracing_state(None)

    def __exit__(self, *_):
        if self._state is not None:
            torch._C._set_tracing_state(self._state)
