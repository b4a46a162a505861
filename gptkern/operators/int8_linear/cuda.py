"""int8_linear in CUDA C++: launchers over csrc/int8_linear/.

One call of the compiled module starts all kernels of a forward, or of a backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import ACTIVATIONS, DTYPES, multiprocessors
from gptkern.backends.tables.configurations import Table
from gptkern.operators.int8_linear.contract import Call, Gradient
from gptkern.operators.int8_linear.products import INT32_TERMS

# csrc/int8_linear/w8a8.cu: rows that a block of the gradient sums; and what q's rows are padded to, in bytes.
GRADIENT_ROWS = 64
Q_ALIGNMENT = 16
# csrc/int8_linear/int8_linear.h: the most rows of the input that its narrowest tiles take.
FEW_ROWS = 16
# Rows and columns of the largest tile.
LARGEST = 128
# Rows and columns are 32-bit integers in the kernels, which run over them by less than a block's tile.
_MAX_COUNT = 2**31 - 2**20


def unsupported(call: Call) -> str | None:
    input, weight, mode = call.input, call.weight, call.mode
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


def forward(call: Call):
    """(…, in_features) -> (…, out_features) in the input's dtype."""
    input, weight, weight_scale, bias, activation, mode = call
    *rows, K = input.shape
    device = input.device
    y = torch.empty(*rows, weight.shape[0], dtype=input.dtype, device=device)
    q = input_scale = None
    if mode == "w8a8":
        q, input_scale = _quantised(math.prod(rows), K, device)
    common.start(
        "int8_linear_forward", input, weight, weight_scale, _as_read(bias), q, input_scale, y, ACTIVATIONS[activation],
        *tile(call, math.prod(rows)),
    )  # fmt: skip
    return y


def backward(gradient: Gradient, call: Call):
    """-> dinput (…, in_features) in grad_output's dtype, dbias (out_features,) in float32, empty where not needed."""
    grad_output, need_input, need_bias = gradient
    input, weight, weight_scale, bias, activation, mode = call
    N, K = weight.shape
    *rows, _ = grad_output.shape
    M = math.prod(rows)
    dtype, device, float32 = grad_output.dtype, grad_output.device, torch.float32
    dbias = torch.empty(N if need_bias else 0, dtype=float32, device=device)
    x = q = input_scale = z = largest = scaled = partial = None
    z_tile = 0, 0  # where there is no z to be computed
    if activation is not None:
        x, z_tile = input, tile(call, M)
        z = torch.empty(M, N, dtype=float32, device=device)
        if mode == "w8a8":
            q, input_scale = _quantised(M, K, device)
    if need_input:
        dinput = torch.empty(*rows, K, dtype=dtype, device=device)
        scaled = torch.empty(M, N, dtype=dtype, device=device)
        # Of no weights there is none to be the largest.
        largest = (torch.empty if N else torch.zeros)(1, dtype=float32, device=device)
    else:
        dinput = torch.empty(0, dtype=dtype, device=device)
    if need_bias:
        partial = torch.empty(-(-M // GRADIENT_ROWS) * N, dtype=float32, device=device)
    common.start(
        "int8_linear_backward", grad_output, x, weight, weight_scale, _as_read(bias), q, input_scale, z, largest,
        scaled, partial, dinput, dbias, ACTIVATIONS[activation], *z_tile,
    )  # fmt: skip
    return dinput, dbias


class Tile(NamedTuple):
    """A tile of the product's result."""

    block_m: int
    block_n: int


def _instances(kernel: str, rows: int | None, share: int | None) -> set[Tile]:
    """The tiles that the compiled module has for a row of the table; without one, those of the table."""
    try:
        found = {Tile(*sizes) for sizes in common.compiled().int8_linear_tiles()[kernel]}
    except ImportError:
        found = {row.configuration for (of, *_), row in TABLE.defaults(80).items() if of == kernel}
    return {tile for tile in found if tile.block_m > FEW_ROWS or (rows is not None and rows <= FEW_ROWS)}


TABLE = Table(
    "int8_linear", {"kernel": ("w8a8", "w8a16", "w8a32"), "rows": None, "share": None}, Tile, backend="cuda",
    instances=_instances,
)  # fmt: skip


def tile(call: Call, M: int) -> Tile:
    """The tile of the product of M rows, from cuda.json: one of the module's int8_linear_tiles()."""
    kernel = "w8a32" if call.mode == "w8a16" and call.input.dtype is torch.float32 else call.mode
    if kernel != "w8a8" and call.weight.stride(0) == 1 and call.weight.stride(1) != 1:
        # The kernel of few rows reads the weight along in_features.
        M = max(M, FEW_ROWS + 1)
    device = call.weight.device
    largest = FEW_ROWS if M <= FEW_ROWS else LARGEST
    results = -(-M // largest) * largest * -(-call.weight.shape[0] // LARGEST) * LARGEST
    return TABLE.find(device, (M, results // multiprocessors(device)), kernel)


def _quantised(M, K, device):
    """(q, input_scale), to be written."""
    q = torch.empty(M, -(-K // Q_ALIGNMENT) * Q_ALIGNMENT, dtype=torch.int8, device=device)
    return q, torch.empty(M, dtype=torch.float32, device=device)


def _as_read(bias):
    """The bias in a dtype that the kernels read."""
    return bias if bias is None or bias.dtype in DTYPES else bias.float()
