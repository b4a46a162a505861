"""The classes of calls that backends.json tells apart: coarse, since within one the fastest backend is the same.

A class is found from what an operator's launchers get. It is only asked for where something was measured, and then at
every call on a GPU: comparisons and nothing else, so that torch.compile can trace them with sizes that vary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Classes(NamedTuple):
    """The classes of one operator.

    Args:
        parts: {name of a part: the values that it may have}. Of a size: the largest that a class serves; None: any.
        of: of(*call) -> the values, in the order of the parts.
    """

    parts: dict[str, tuple]
    of: Callable[..., tuple]


BITS = (16, 32, 64)
HEAD_DIMS = (64, 128, 256, None)
# Generation reads a query or a few at a time: another bottleneck than many.
LENGTHS = (16, 512, 2048, 8192, None)
WIDTHS = (1024, 4096, 16384, None)
ROWS = (1, 16, 64, 512, None)
TRUTH = (False, True)


def _least(sizes: tuple, size: Any) -> int | None:
    """The least of `sizes` that is not below `size`."""
    for most in sizes:
        if most is None or size <= most:
            return most
    raise LookupError(f"{sizes} does not end with None")


def _bits(tensor: Any) -> int:
    return 8 * tensor.dtype.itemsize


def _attention(query, key, value, is_causal, scale, attn_mask=None, dropout_p=0.0, lower_right=False):
    return _bits(query), _least(HEAD_DIMS, query.shape[-1]), _least(LENGTHS, query.shape[-2]), is_causal


def _layer_norm(input, residual, weight, bias, eps):
    return _bits(input), _least(WIDTHS, input.shape[-1]), residual is not None


def _rms_norm(input, weight, eps):
    return _bits(input), _least(WIDTHS, input.shape[-1])


def _rotary(input, cos, sin, rotary_dim, interleaved):
    return _bits(input), _least(HEAD_DIMS, input.shape[-1]), interleaved


def _softmax(input, dim, dtype, scale, mask, is_causal):
    dimensions = input.dim()
    width = input.shape[dim] if dimensions else 1
    is_last = dim in (-1, max(dimensions, 1) - 1)
    # PyTorch takes a pass over memory for each of the three.
    is_fused = mask is not None or is_causal or scale != 1.0
    return _bits(input), _least(WIDTHS, width), is_last, is_fused


def _int8_linear(input, weight, weight_scale, bias, activation, mode):
    return _bits(input), mode, _least(ROWS, math.prod(input.shape[:-1]))


def _quantize_int8(input, dim):
    return _bits(input), _least(WIDTHS, input.shape[dim])


CLASSES = {
    "attention": Classes(dict(bits=BITS, head_dim=HEAD_DIMS, length=LENGTHS, causal=TRUTH), _attention),
    "layer_norm": Classes(dict(bits=BITS, width=WIDTHS, residual=TRUTH), _layer_norm),
    "rms_norm": Classes(dict(bits=BITS, width=WIDTHS), _rms_norm),
    "rotary": Classes(dict(bits=BITS, head_dim=HEAD_DIMS, interleaved=TRUTH), _rotary),
    "softmax": Classes(dict(bits=BITS, width=WIDTHS, last=TRUTH, fused=TRUTH), _softmax),
    "int8_linear": Classes(dict(bits=BITS, mode=("w8a8", "w8a16"), rows=ROWS), _int8_linear),
    "quantize_int8": Classes(dict(bits=BITS, width=WIDTHS), _quantize_int8),
}


def described(operator: str, key: tuple) -> str:
    """ "16 bits, head_dim up to 128, length above 8192, causal": a class in words."""
    words = []
    for (name, values), value in zip(CLASSES[operator].parts.items(), key):
        if values is TRUTH:
            words.append(name if value else f"not {name}")
        elif name == "bits":
            words.append(f"{value} bits")
        elif isinstance(value, str):
            words.append(value)
        else:
            words.append(f"{name} above {values[-2]}" if value is None else f"{name} up to {value}")
    return ", ".join(words)
