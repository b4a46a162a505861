"""What an activation checkpoint recomputes runs as its forward ran.

A block (`with gptkern.backend(…)`, `with gptkern.kernels()`) is one thread's and ends with its `with`; what was
computed inside it may be recomputed by a backward in another thread, after the block, or inside another one. So a call
under a block looks for the checkpoints that were begun inside it and lets each recompute under the same block. And
inside a recomputation the blocks that were opened before it do not count.

torch.utils.checkpoint has no place for that, so its own objects are asked, those of the one call:

    use_reentrant=False    hooks for saved tensors, whose closures hold the frame with its `recompute_fn`
    use_reentrant=True     an autograd.Function: its call is found on the Python stack, and its backward runs under them

So does the backward of any other autograd.Function that is on the stack: other libraries recompute in their own.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_CHECKPOINT_FILE = checkpoint.__file__


class Place(NamedTuple):
    """Where a thread is: inside which checkpoint, or which recomputation of one."""

    hook: Callable | None  # the innermost hook for saved tensors
    call: types.FrameType | None  # the innermost call of an autograd.Function that may recompute


class Block(NamedTuple):
    """A `with` block, as a recomputation opens it again."""

    place: Place
    again: Callable[[], AbstractContextManager]
    backend: str | None = None


class _State(threading.local):
    blocks: tuple[Block, ...] = ()


_state = _State()
_warned: set[str] = set()


def here() -> Place:
    """Where this thread is, for a block that it opens."""
    hooks = _top_hooks(True)
    call = None
    if not torch.is_grad_enabled() or _in_a_backward():
        call = next((call for call, _, _ in _calls()), None)
    return Place(hooks and hooks[0], call)


@contextlib.contextmanager
def opened(block: Block):
    """The block counts for this thread's calls inside the `with`."""
    before = _state.blocks
    _state.blocks = (*before, block)
    try:
        yield
    finally:
        _state.blocks = before


def blocks() -> tuple[Block, ...]:
    """The blocks of backends that this thread has opened and that count here, the innermost last."""
    return tuple(block for block in _state.blocks if counts(block))


def counts(block: Block) -> bool:
    """Whether a block was opened inside the recomputation that this thread is in, if it is in one."""
    if _top_hooks(True) is None and not _in_a_backward():
        return True
    hooks = _hooks()
    for index, hook in enumerate(hooks):
        if _of_checkpoint(hook) is _RECOMPUTES:
            if not any(block.place.hook is inner for inner in hooks[: index + 1]):
                return False
            break
    calls = []
    for call, _, recomputes in _calls():
        calls.append(call)
        if recomputes:
            return any(block.place.call is inner for inner in calls)
    return True


def blocks_are_open() -> bool:
    """Whether this thread is inside a block of a backend."""
    return bool(_state.blocks)


def carry(mode: Block | None = None) -> None:
    """Lets the checkpoints that this thread is in recompute under the blocks that were open when they began.

    Args:
        mode: the block of the mode that is asking, which PyTorch has popped.
    """
    hooks = _top_hooks(True)
    may_be_reentrant = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if hooks is None and not may_be_reentrant:
        return
    modes = [block for block in map(_block_of, _get_current_function_mode_stack()) if block is not None]
    open_blocks = [*blocks(), *(block for block in (*modes, *([mode] if mode else ())) if counts(block))]
    hooks = _hooks()
    for index, hook in enumerate(hooks):
        frame = _of_checkpoint(hook)
        if frame is _RECOMPUTES:
            break
        if frame is not None:
            outer = [b for b in open_blocks if not any(b.place.hook is inner for inner in hooks[: index + 1])]
            _recompute_under(outer, frame)
    if may_be_reentrant:
        inner_calls: list[types.FrameType] = []
        for call, first, recomputes in _calls():
            if recomputes:
                break
            inner_calls.append(call)
            outer = [b for b in open_blocks if not any(b.place.call is inner for inner in inner_calls)]
            if outer:
                _backward_under(outer, call, first)


class _Again:
    """A function that runs under blocks opened anew."""

    def __init__(self, function: Callable, under: list[Block]):
        self.function, self.under = function, under

    def __call__(self, *args):
        with contextlib.ExitStack() as stack:
            for block in self.under:
                stack.enter_context(block.again())
            return self.function(*args)

    def widen(self, under: list[Block]) -> None:
        """An outer mode does not see the inner ones, which PyTorch has popped when it is asked; those see it."""
        if len(under) > len(self.under):
            self.under = under


class _BackwardAgain(_Again):
    """The same of an autograd.Function's backward. Its frame says where the recomputation begins."""

    def __call__(self, *gradients):
        return super().__call__(*gradients)


def _recompute_under(under: list[Block], frame: Any) -> None:
    function = getattr(frame, "recompute_fn", None)
    if not callable(function):
        _warn_once(f"{type(frame).__name__} has no recompute_fn")
    elif type(function) is _Again:
        function.widen(under)
    elif under:
        frame.recompute_fn = _Again(function, under)


def _backward_under(under: list[Block], call: types.FrameType, first: types.FrameType) -> None:
    ctx = _ctx_of(first)
    if ctx is None:
        if any(callable(argument) for argument in call.f_locals["args"]):
            _warn_once(f"the ctx of {call.f_locals['cls'].__name__} is not found in its forward")
        return
    # What the engine asks the ctx for.
    name = "apply_boxed" if getattr(type(ctx)._forward_cls, "boxed_grads_call", False) else "apply"
    if type(again := ctx.__dict__.get(name)) is _BackwardAgain:
        again.widen(under)
    else:
        # A ctx that held itself would keep what it has saved until Python looks for cycles.
        held = weakref.ref(ctx)
        setattr(ctx, name, _BackwardAgain(lambda *gradients: getattr(type(held()), name)(held(), *gradients), under))


def _block_of(mode: Any) -> Block | None:
    block = getattr(mode, "block", None)
    return block if isinstance(block, Block) else None


# --- What PyTorch's checkpoints look like ---------------------------------------------------------------------------

_RECOMPUTES = object()


def _in_a_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _hooks() -> list[Callable]:
    """The hooks that pack this thread's saved tensors, the innermost first: only that one can be asked for."""
    pairs: list[tuple[Callable, Callable]] = []
    try:
        while (pair := _top_hooks(True)) is not None:
            pairs.append(pair)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for pair in reversed(pairs):
            torch._C._autograd._push_saved_tensors_default_hooks(*pair)
    return [pack for pack, _ in pairs]


def _of_checkpoint(hook: Callable) -> Any:
    """The frame of the checkpoint whose forward a hook packs, _RECOMPUTES for a recomputation's, None for others'."""
    code = getattr(hook := inspect.unwrap(hook), "__code__", None)
    if code is None or code.co_filename != _CHECKPOINT_FILE:
        return None
    if "target_frame_ref" in code.co_freevars:
        return _RECOMPUTES
    if "frame" in code.co_freevars:
        return hook.__closure__[code.co_freevars.index("frame")].cell_contents
    _warn_once(f"{hook.__qualname__} holds {', '.join(code.co_freevars)}")
    return None


def _calls() -> Iterator[tuple[types.FrameType, types.FrameType, bool]]:
    """The calls of autograd.Functions on the stack, the innermost first: (call, what it called first, recomputes).

    A backward is among them if it recomputes: under blocks opened anew, or with a function that its ctx holds.
    """
    inner, call = None, sys._getframe(1)
    while call is not None:
        code = call.f_code
        if code is _FORWARD:
            if not call.f_locals["cls"].__module__.startswith(_NOT_OF_USERS):
                yield call, inner, False
        elif code is _AGAIN or ((code is _BACKWARD or code is _BOXED) and _recomputes_as_it_is(call.f_locals["self"])):
            yield call, inner, True
        inner, call = call, call.f_back


_FORWARD = torch.autograd.Function.apply.__func__.__code__
_BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__
# PyTorch 2.13 has a second one.
_BOXED = getattr(torch.autograd.function.BackwardCFunction, "apply_boxed", torch.autograd.Function.apply).__code__
_AGAIN = _BackwardAgain.__call__.__code__
# These run nobody's code in their forward but that of PyTorch's compiler and that of kernels.
_NOT_OF_USERS = ("gptkern.", "torch._")


def _recomputes_as_it_is(ctx: Any) -> bool:
    function = type(ctx)._forward_cls
    # Of one with a setup_context no forward is followed: what its backward does counts as any other call.
    if function.setup_context is not _NO_SETUP or function.__module__.startswith(_NOT_OF_USERS):
        return False
    held = [value for value in ctx.__dict__.values() if callable(value) and not isinstance(value, type)]
    # Around one that runs under blocks opened anew, `_BackwardAgain` is on the stack.
    return bool(held) and not any(type(value) is _BackwardAgain for value in held)


_NO_SETUP = torch.autograd.Function.setup_context


def _ctx_of(first: types.FrameType) -> Any:
    """The ctx that a forward, or what it is wrapped into, was called with; None for one with a setup_context."""
    code = first.f_code
    if code.co_argcount:
        given = first.f_locals.get(code.co_varnames[0])
    elif code.co_flags & inspect.CO_VARARGS:
        given = next(iter(first.f_locals.get(code.co_varnames[code.co_kwonlyargcount], ())), None)
    else:
        given = None
    return given if isinstance(given, torch.autograd.function.BackwardCFunction) else None


def _warn_once(found: str) -> None:
    if found not in _warned:
        _warned.add(found)
        warnings.warn(
            f"gptkern: activations that are recomputed outside of a gptkern.backend or gptkern.kernels block may run "
            f"otherwise than they did inside it: what recomputes them is not known "
            f"({found}, PyTorch {torch.__version__}). Run the backward inside the block.",
            stacklevel=6,
        )
