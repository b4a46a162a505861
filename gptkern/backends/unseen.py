"""Whether anybody would see a call of an operator, and what its checks hang on: asked at every call.

From Python or, once a compiled module was loaded, from C (csrc/unseen.h), where it takes less of the host's time.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import ModuleType

import torch

from gptkern.backends import tracing

# The types of tensors that kernels read, and of what most often stands beside them in a call.
PLAIN_TENSORS = _Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_NO_TENSORS = frozenset((type(None), bool, int, float, str, torch.dtype))
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_strided = torch.strided


def is_unseen(call: tuple, device: torch.device | None = None) -> bool:
    """Whether a launcher may be called as it is: nobody looks on while operators run (tracing.is_watched), and each
    tensor is what lies in memory: of no subclass, no view that PyTorch negates when it is read, no zeros without
    memory, nothing that a transform of torch.func has left behind.

    Args:
        device: the first tensor's, where all need to be on one.
    """
    return not torch.compiler.is_compiling() and look(call, device)


def look_in_python(call: tuple, device: torch.device | None) -> bool:
    """`is_unseen`, where no compiler runs."""
    if tracing.is_watched():
        return False
    for argument in call:
        kind = type(argument)
        if kind is _Tensor or kind is _Parameter:
            if argument.is_neg() or argument._is_zerotensor() or _is_wrapped(argument):
                return False
            if device is not None and argument.device != device:
                return False
        elif kind not in _NO_TENSORS:
            return False
    return True


def signature_in_python(arguments: tuple) -> Hashable | None:
    """Of a twin's arguments, where no compiler runs: what is equal for two calls only where the contract's checks, and
    what kernels cover, say the same of both. None where the call would not be unseen, or has other arguments than most.

    It has shapes, dtypes and devices of tensors, and other arguments by their types and values.
    """
    if tracing.is_watched():
        return None
    found: list = []
    for argument in arguments:
        kind = type(argument)
        if kind is _Tensor or kind is _Parameter:
            if argument.is_neg() or argument._is_zerotensor() or _is_wrapped(argument):
                return None
            if argument.layout != _strided or argument.is_nested:
                return None
            found += argument.shape, argument.dtype, argument.device
        elif kind in _NO_TENSORS:
            found += kind, argument
        elif isinstance(argument, tuple):
            for size in argument:
                if type(size) is not int:
                    return None
            found.append(argument)
        else:
            return None
    return tuple(found)


look, signature = look_in_python, signature_in_python


def ask(module: ModuleType) -> None:
    """From now on the compiled module answers."""
    global look, signature
    of_tensor = _Tensor.is_neg, _Tensor._is_zerotensor
    module.ask_whether_unseen(tracing.WATCHERS, of_tensor, PLAIN_TENSORS, tuple(_NO_TENSORS))
    look, signature = module.is_unseen, module.signature
