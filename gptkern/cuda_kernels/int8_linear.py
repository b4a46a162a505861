"""int8_linear in CUDA C++: launchers of csrc/int8_linear.cu and csrc/int8_linear_w8a16.cu.

One call of the compiled module starts all kernels of a forward, or of a backward.
"""

from __future__ import annotations

import math

import torch

from gptkern.cuda_kernels import common
from gptkern.cuda_kernels.common import DTYPES, multiprocessors
from gptkern.ops.int8_linear import INT32_TERMS, rows_of

# csrc/device/linear.cuh, enum Activation.
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2}
# csrc/int8_linear.cu: rows that a block of the gradient sums; and what q's rows are padded to, in bytes.
GRADIENT_ROWS = 64
Q_ALIGNMENT = 16
# Rows and columns are 32-bit integers in the kernels, which run over them by less than a block's tile.
_MAX_COUNT = 2**31 - 2**20


def unsupported(input, weight, weight_scale, bias, activation, mode):
    if input.dtype not in DTYPES:
        return f"input is {input.dtype}"
    if mode == "w8a8" and weight.shape[1] > INT32_TERMS:
        return f"w8a8 with in_features {weight.shape[1]}: sums of more than {INT32_TERMS} products can pass int32"
    if math.prod(input.shape[:-1]) > _MAX_COUNT or weight.shape[0] > _MAX_COUNT or weight.shape[1] > _MAX_COUNT:
        return (
            f"the input has shape {tuple(input.shape)} and the weight {tuple(weight.shape)}; the kernels count rows "
            "and columns in 32 bits"
        )
    return None


def forward(input, weight, weight_scale, bias, activation, mode):
    """(…, in_features) -> (…, out_features) in the input's dtype."""
    N, K = weight.shape
    if input.dim() == 2:
        x, M = input, input.shape[0]
        y = input.new_empty((M, N))
    else:
        x = rows_of(input)
        M = x.shape[0]
        y = input.new_empty((*input.shape[:-1], N))
    if M == 0 or N == 0:
        return y
    address = common.address
    q = input_scale = 0
    if mode == "w8a8":
        # Held until the call has started the kernels.
        buffers = _quantised(x, M, K)
        q, input_scale = map(address, buffers)
    bias, bias_stride, bias_dtype = _bias(bias)
    common.call(
        "int8_linear_forward", x, address(x), address(weight), address(weight_scale), address(bias), q, input_scale,
        address(y), M, N, K, *x.stride(), *weight.stride(), weight_scale.stride(0), bias_stride,
        DTYPES[x.dtype], bias_dtype, ACTIVATIONS[activation], multiprocessors(x.device),
    )  # fmt: skip
    return y


def backward(grad_output, input, weight, weight_scale, bias, activation, mode, need_input, need_bias):
    """-> dinput (…, in_features) in grad_output's dtype, dbias (out_features,) in float32, empty where not needed."""
    N, K = weight.shape
    dy = grad_output if grad_output.dim() == 2 else rows_of(grad_output)
    M = dy.shape[0]
    dtype = dy.dtype

    def empty(shape):
        return dy.new_empty(shape, dtype=torch.float32)

    dinput = dy.new_empty((*grad_output.shape[:-1], K) if need_input else 0)
    dbias = empty(N if need_bias else 0)
    x = q = input_scale = z = largest = scaled = partial = None
    if activation is not None:
        x = input if input.dim() == 2 else rows_of(input)
        z = empty((M, N))
        if mode == "w8a8":
            q, input_scale = _quantised(x, M, K)
    if need_input:
        # One more element: the address of no elements would be that of no tensor.
        scaled = dy.new_empty(M * N + 1)
        largest = empty(1) if N else dy.new_zeros(1, dtype=torch.float32)
    if need_bias:
        partial = empty(-(-M // GRADIENT_ROWS) * N)
    bias, bias_stride, bias_dtype = _bias(bias)
    address = common.address
    common.call(
        "int8_linear_backward", dy, address(dy), address(x), address(weight), address(weight_scale), address(bias),
        address(q), address(input_scale), address(z), address(largest), address(scaled), address(partial),
        address(dinput), address(dbias), M, N, K, *dy.stride(), *((0, 0) if x is None else x.stride()),
        *weight.stride(), weight_scale.stride(0), bias_stride, DTYPES[dtype],
        0 if x is None else DTYPES[x.dtype], bias_dtype, ACTIVATIONS[activation], multiprocessors(dy.device),
    )  # fmt: skip
    return dinput, dbias


def _quantised(x, M, K):
    """(q, input_scale), to be written."""
    q = x.new_empty((M, -(-K // Q_ALIGNMENT) * Q_ALIGNMENT), dtype=torch.int8)
    return q, x.new_empty(M, dtype=torch.float32)


def _bias(bias):
    """(bias, stride, dtype) as the kernels take them."""
    if bias is None:
        return None, 0, 0
    if bias.dtype not in DTYPES:
        bias = bias.float()
    return bias, bias.stride(0), DTYPES[bias.dtype]
