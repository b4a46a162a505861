"""Mends Triton's interpreter where it is wrong or slow. Imported only while TRITON_INTERPRET=1.

Seen in Triton 3.6 to 3.9; each mend is left out where the interpreter no longer has what it replaces.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Applies every mend once."""
    _convert_bfloat16_as_gpus_do()
    _count_to_tensors()
    _patch_the_language_once()


def _convert_bfloat16_as_gpus_do() -> None:
    """Makes the interpreter round to bfloat16 to nearest, halves to even, and widen subnormal bfloat16 rightly.

    By itself it cuts float32 off, which doubles the error, turns float64 and integers into other numbers, and widens
    subnormal bfloat16 to wrong values (seen in Triton 3.7).
    """
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl

    def mended_cast(self, source, dst_type):
        source_type, target = source.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and (source_type in (tl.float32, tl.float64) or source_type.is_int()):
            x = torch.from_numpy(np.ascontiguousarray(source.data))
            return interpreter.TensorHandle(x.to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)
        if source_type == tl.bfloat16 and target == tl.float32:
            # bfloat16 is the upper half of a float32
            return interpreter.TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(self, source, dst_type)

    builder.cast_impl = mended_cast


def _count_to_tensors() -> None:
    """Lets `range` take a tensor as its bound, which Triton 3.6 does not under NumPy 2.4 and newer.

    There NumPy no longer converts an array of one element to an integer unless it has no dimension.
    """
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def mended_patch(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = mended_patch


def _patch_the_language_once() -> None:
    """Keeps a device function's call from patching triton.language where it is patched already.

    That search through the language at each call is half the time of an interpreted attention kernel (1.8 times as
    fast without it, on one core of an AMD EPYC).
    """
    function = interpreter.InterpretedFunction
    call = function.__call__
    if not hasattr(function, "rewrite"):
        return

    @functools.cache
    def languages(fn):
        return [module for module in fn.__globals__.values() if module is tl or module is tl.core]

    def call_patched(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.load) for language in languages(self.fn)):
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    function.__call__ = call_patched
