"""What an activation checkpoint recomputes runs as its forward ran.

A block (`with gptkern.backend(…)`, `with gptkern.kernels()`) is one thread's and ends with its `with`; what was
computed inside it may be recomputed by a backward in another thread, after the block, or inside another one. So a call
under a block looks for the checkpoints that were begun inside it and lets each recompute under the same block. And
inside a recomputation the blocks that were opened before it do not count.

torch.utils.checkpoint has no place for that, so its own objects are asked, those of the one call:

    use_reentrant=False    hooks for saved tensors, whose closures hold the frame with its `recompute_fn`
    use_reentrant=True     an autograd.Function, whose ctx holds `run_function`: found on the Python stack
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import types
import warnings
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
    call: types.FrameType | None  # the innermost call of a checkpoint's autograd.Function


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
        call = next((call for call, _ in _calls()), None)
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
    for call, recomputes in _calls():
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
            _recompute_under(outer, frame, "recompute_fn")
    if may_be_reentrant:
        inner_calls: list[types.FrameType] = []
        for call, recomputes in _calls():
            if recomputes:
                break
            inner_calls.append(call)
            outer = [b for b in open_blocks if not any(b.place.call is inner for inner in inner_calls)]
            _recompute_under(outer, call.f_locals["ctx"], "run_function")


class _Again:
    """A function that runs under blocks opened anew."""

    def __init__(self, function: Callable, under: list[Block]):
        self.function, self.under = function, [block.again for block in under]

    def __call__(self, *args):
        with contextlib.ExitStack() as stack:
            for again in self.under:
                stack.enter_context(again())
            return self.function(*args)


def _recompute_under(under: list[Block], holder: Any, name: str) -> None:
    function = getattr(holder, name, None)
    if not callable(function):
        _warn_once(f"{type(holder).__name__} has no {name}")
    elif under and type(function) is not _Again:
        setattr(holder, name, _Again(function, under))


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


def _calls() -> Iterator[tuple[types.FrameType, bool]]:
    """The calls of a reentrant checkpoint's autograd.Function on the stack, the innermost first: (call, recomputes).

    Other libraries have such Functions too, under the same names.
    """
    call = sys._getframe(1)
    while call is not None:
        name = call.f_code.co_name
        if (name == "forward" or name == "backward") and _knows_its_function(call.f_code):
            yield call, name == "backward"
        call = call.f_back


def _knows_its_function(code: types.CodeType) -> bool:
    return "run_function" in code.co_names and "ctx" in code.co_varnames


def _warn_once(found: str) -> None:
    if found not in _warned:
        _warned.add(found)
        warnings.warn(
            f"gptkern: activations that are recomputed outside of a gptkern.backend or gptkern.kernels block may run "
            f"otherwise than they did inside it: torch.utils.checkpoint of PyTorch {torch.__version__} is not known "
            f"({found}). Run the backward inside the block.",
            stacklevel=6,
        )
