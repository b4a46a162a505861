"""nonlinearity in CUDA C++: launchers over csrc/nonlinearity/, where the mathematics is.

How tensors are walked is worked out in C++, from shapes and strides.
"""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import ACTIVATIONS, DTYPES
from gptkern.operators.nonlinearity.contract import Call, Gradient, output_shape

# Columns are 32-bit integers in the kernels, with room for a block's beyond the row.
WIDEST = 2**30
# Blocks over the columns of a bias's gradient, 32 each or more, are counted in 16 bits.
WIDEST_OF_BIAS = 2**20
# A bias's gradient: rows of a block at a time, columns of a block (16 bytes of 16 bits a lane, or one element of rows
# that are not aligned), and blocks of 256 threads that a multiprocessor has at a time.
_ROWS, _COLUMNS, _BLOCKS = 8, 256, 2


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None."""
    input, up, bias, *_ = call
    widest = WIDEST if bias is None else WIDEST_OF_BIAS
    if input.dim() and input.shape[-1] > widest:
        return f"rows are {input.shape[-1]} wide; the kernel counts columns up to {widest}"
    for name, tensor in (("input", input), ("up", up), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(call: Call):
    """-> output (…, width)."""
    input, up, bias, function, packed = call
    output = torch.empty(output_shape(call), dtype=input.dtype, device=input.device)
    common.start("nonlinearity_forward", input, up, bias, output, ACTIVATIONS[function], packed)
    return output


def backward(gradient: Gradient, call: Call):
    """-> dinput as input, dup (…, width), dbias (width,) in `bias_dtype`; what is not needed is empty."""
    dy, need_input, need_up, bias_dtype = gradient
    input, up, bias, function, packed = call
    # three tensors: a registered op may not return one twice
    dinput = torch.empty(input.shape if need_input else 0, dtype=input.dtype, device=input.device)
    dup = torch.empty(dy.shape if need_up else 0, dtype=input.dtype, device=input.device)
    needs_bias = bias_dtype is not None
    if dy.numel() == 0 or not (need_input or need_up or needs_bias):
        return dinput, dup, input.new_zeros(dy.shape[-1] if needs_bias else 0, dtype=bias_dtype)
    dbias, partial = input.new_empty(0), None
    if needs_bias:
        width = dy.shape[-1]
        dbias = torch.empty(width, dtype=torch.float32, device=input.device)
        partial = torch.empty(
            partials(dy.numel() // width, width, input), width, dtype=torch.float32, device=input.device
        )
    common.start(
        "nonlinearity_backward", dy, input, up, bias, dinput if need_input else None, dup if need_up else None,
        dbias if needs_bias else None, partial, ACTIVATIONS[function], packed,
    )  # fmt: skip
    return dinput, dup, dbias if bias_dtype is None else dbias.to(bias_dtype)


def partials(rows: int, width: int, input: torch.Tensor) -> int:
    """How many partial sums of a bias's gradient are made: blocks that share the rows."""
    most = _BLOCKS * common.multiprocessors(input.device)
    return max(1, min(-(-rows // _ROWS), most // -(-width // _COLUMNS)))
