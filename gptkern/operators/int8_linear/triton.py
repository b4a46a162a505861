"""int8_linear on Triton, with x (M, K), weight (N, K) in int8, one scale for each of its N rows, y (M, N).

    w8a8:   z = (q @ weight^T) * input_scale * weight_scale + bias       y = act(z), (q, input_scale) of quantize_int8
    w8a16:  z = (x @ weight^T) * weight_scale + bias                     y = act(z)

Backward, with dz = dy * act'(z):
    dx = (dz * weight_scale) @ weight,  dbias = sum over rows of dz

w8a8 multiplies int8 by int8 into int32, exactly. w8a16 widens the weight to x's dtype, which holds every int8
exactly, on its way from memory to the matrix unit. z is recomputed in float32 for the backward; a pass over dy then
forms dz * weight_scale and sums dbias (per tile of rows, then over the tiles: no atomics, so it is the same on every
run), and dx is a w8a16 product with the transposed weight, read in place.

    operations  2 M N K; the most that the int8 or 16-bit matrix unit gives is the floor of many rows
    bytes       N K of weight + b M (K + N) of x and y, b bytes each (w8a8: + 2 M K for q); the floor of few rows
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptkern.backends.tables.configurations import Table, descent
from gptkern.backends.triton import quantize
from gptkern.backends.triton.activations import activated, activation_slope
from gptkern.backends.triton.common import INTERPRETED, CompileCase, cdiv, dot, float32_precision
from gptkern.backends.triton.common import architecture as architecture_of
from gptkern.backends.triton.direct import jit
from gptkern.operators.int8_linear.contract import Call, Gradient, rows_of
from gptkern.operators.int8_linear.products import INT32_TERMS

# Rows of tiles that are walked before the next column of tiles: their operands stay in the L2 cache.
GROUP_M = 8


@triton.jit
def _tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """The program's tile: groups of GROUP_M rows of tiles, walked column by column."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = program // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = program % in_group
    return first + within % height, within // height


@jit(do_not_specialize=["M"])
def _w8a8_kernel(
    q_ptr,  # (M, K)            int8, contiguous
    weight_ptr,  # (N, K)       int8, any strides
    input_scale_ptr,  # (M,)    float32
    weight_scale_ptr,  # (N,)   float32, its stride may be 0
    bias_ptr,  # (N,)           where HAS_BIAS
    y_ptr,  # (M, N)            contiguous
    M,
    N,
    K,
    weight_stride_n,
    weight_stride_k,
    weight_scale_stride,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < M, n < N
    q_ptrs = q_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + k.to(tl.int64)[:, None] * weight_stride_k + n.to(tl.int64)[None, :] * weight_stride_n

    # sum over k of q * weight, exact: int8 products into int32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        q = tl.load(q_ptrs, mask=in_m[:, None] & in_k[None, :], other=0)
        weight = tl.load(weight_ptrs, mask=in_k[:, None] & in_n[None, :], other=0)
        total = tl.dot(q, weight, total, out_dtype=tl.int32)
        q_ptrs += BLOCK_K
        weight_ptrs += tl.full((), BLOCK_K, tl.int64) * weight_stride_k

    # z = (q @ weight^T) * input_scale * weight_scale + bias
    input_scale = tl.load(input_scale_ptr + m, mask=in_m, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + n.to(tl.int64) * weight_scale_stride, mask=in_n, other=0.0)
    z = total.to(tl.float32) * input_scale[:, None] * weight_scale[None, :]
    if HAS_BIAS:
        z += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    y = activated(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=in_m[:, None] & in_n[None, :])


@jit(do_not_specialize=["M"])
def _w8a16_kernel(
    x_ptr,  # (M, K)            float16, bfloat16 or float32, any strides
    weight_ptr,  # (N, K)       int8, any strides
    weight_scale_ptr,  # (N,)   float32, its stride may be 0
    bias_ptr,  # (N,)           where HAS_BIAS
    y_ptr,  # (M, N)            contiguous
    M,
    N,
    K,
    x_stride_m,
    x_stride_k,
    weight_stride_n,
    weight_stride_k,
    weight_scale_stride,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # The tile is y's transpose: the weight is then the left operand, which the matrix unit takes from registers,
    # where it is widened, and few rows of x fill the unit's narrow side.
    tile_m, tile_n = _tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_m, in_n = m < M, n < N
    x_ptrs = x_ptr + k.to(tl.int64)[:, None] * x_stride_k + m.to(tl.int64)[None, :] * x_stride_m
    weight_ptrs = weight_ptr + n.to(tl.int64)[:, None] * weight_stride_n + k.to(tl.int64)[None, :] * weight_stride_k

    # sum over k of weight * x in float32
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = k < K - start
        x = tl.load(x_ptrs, mask=in_k[:, None] & in_m[None, :], other=0.0)
        weight = tl.load(weight_ptrs, mask=in_n[:, None] & in_k[None, :], other=0)
        total = dot(weight.to(x.dtype), x, total, INPUT_PRECISION, WIDEN)
        x_ptrs += tl.full((), BLOCK_K, tl.int64) * x_stride_k
        weight_ptrs += tl.full((), BLOCK_K, tl.int64) * weight_stride_k

    # z = (x @ weight^T) * weight_scale + bias
    z = total * tl.load(weight_scale_ptr + n.to(tl.int64) * weight_scale_stride, mask=in_n, other=0.0)[:, None]
    if HAS_BIAS:
        z += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    y = activated(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m.to(tl.int64)[None, :] * N + n[:, None], y, mask=in_m[None, :] & in_n[:, None])


@jit(do_not_specialize=["M"])
def _gradient_kernel(
    dy_ptr,  # (M, N)           any strides
    z_ptr,  # (M, N)            float32, contiguous, where there is an ACTIVATION
    weight_scale_ptr,  # (N,)   float32
    largest_ptr,  # ()          float32, the largest |weight_scale|
    scaled_ptr,  # (M, N)       dz * weight_scale / largest in dy's dtype, contiguous, where NEED_INPUT
    partial_ptr,  # (tiles of rows, N) float32, sums of dz over the rows of a tile, where NEED_BIAS
    M,
    N,
    dy_stride_m,
    dy_stride_n,
    ACTIVATION: tl.constexpr,
    NEED_INPUT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One dimension: a grid's others end at 65,535, which 4 million rows or columns pass.
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = (tl.program_id(0) // tiles_n).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    inside = (m < M)[:, None] & in_n[None, :]
    dy_offsets = m[:, None] * dy_stride_m + n.to(tl.int64)[None, :] * dy_stride_n
    dz = tl.load(dy_ptr + dy_offsets, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        # dz = dy * act'(z)
        dz *= activation_slope(tl.load(z_ptr + m[:, None] * N + n[None, :], mask=inside, other=0.0), ACTIVATION)
    if NEED_BIAS:
        tl.store(partial_ptr + tile_m * N + n, tl.sum(dz, axis=0), mask=in_n)
    if NEED_INPUT:
        # Of the size of dz, whatever the scales: dz * weight_scale alone would underflow in float16.
        largest = tl.load(largest_ptr)
        relative = tl.load(weight_scale_ptr + n, mask=in_n, other=0.0) / tl.where(largest == 0, 1.0, largest)
        scaled = (dz * relative[None, :]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + m[:, None] * N + n[None, :], scaled, mask=inside)


# --- Configuration --------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# kernel, the most rows of the input -> tile, from triton.json. w8a32 is w8a16 with float32 input.
TABLE = Table("int8_linear", {"kernel": ("w8a8", "w8a16", "w8a32"), "rows": None}, Tile)
# Tile of the gradient's elementwise pass, and its warps: 32 elements a thread.
GRADIENT_BLOCK_M, GRADIENT_BLOCK_N, GRADIENT_WARPS = 64, 64, 4


def tile(kernel: str, device: torch.device, rows: int) -> Tile:
    """The tile of a call. Tests put small ones in its place (monkeypatch), to see several tiles at small shapes."""
    return TABLE.find(device, rows, kernel)


def _is_like_100(architecture: int) -> bool:
    """Whether the part has the matrix unit of sm_100."""
    return descent(architecture, (80, 90, 100))[0] == 100


def _input_precision(architecture: int) -> str:
    """tl.dot's input_precision, which counts for float32 alone.

    For sm_100 Triton 3.7 takes "ieee" for TF32 where an operand was widened from int8 (seen in the PTX:
    tcgen05.mma kind::tf32, where sm_80 and sm_90 get float32 multiply-adds). Three TF32 products take its place.
    """
    precision = float32_precision()
    return "tf32x3" if precision == "ieee" and _is_like_100(architecture) else precision


def compile_cases(architecture: int) -> list[CompileCase]:
    """Every tile of the table, with the weight's rows contiguous, and the widest of the backward, with its columns."""

    def case(name, kernel, dtype, num_warps, num_stages=1, matrix_product=False, **constants):
        types = {"q_ptr": "*i8", "weight_ptr": "*i8", "input_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32"}
        types |= {"z_ptr": "*fp32", "largest_ptr": "*fp32", "partial_ptr": "*fp32"}
        signature = {
            argument: types.get(argument, f"*{dtype}" if argument.endswith("_ptr") else "i32")
            for argument in kernel.arg_names
        } | dict.fromkeys(constants, "constexpr")
        aligned = tuple(argument for argument, type_ in signature.items() if type_ == "i32" and argument != "M")
        return CompileCase(name, kernel, signature, constants, num_warps, num_stages, aligned, matrix_product)

    rows = {"weight_stride_k": 1, "weight_scale_stride": 1, "HAS_BIAS": True, "ACTIVATION": "gelu", "GROUP_M": GROUP_M}
    columns = {"weight_stride_n": 1, "bias_ptr": None, "HAS_BIAS": False, "ACTIVATION": None, "GROUP_M": GROUP_M}
    widened = {"x_stride_k": 1, "INPUT_PRECISION": _input_precision(architecture), "WIDEN": False}
    gradient = {"dy_stride_n": 1, "ACTIVATION": "gelu", "NEED_INPUT": True, "NEED_BIAS": True}
    gradient |= {"BLOCK_M": GRADIENT_BLOCK_M, "BLOCK_N": GRADIENT_BLOCK_N}
    cases = [case("gradient", _gradient_kernel, "bf16", GRADIENT_WARPS, **gradient)]
    for device, listed in TABLE.shipped(architecture):
        tiles = {key: row.configuration for key, row in listed.items()}
        for (kernel, _), tile in tiles.items():
            name = f"{kernel} {tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}"
            if kernel == "w8a8":
                # For sm_100 Triton 3.7 takes the older mma.sync.
                constants = rows | tile._asdict() | {"matrix_product": architecture != 100}
                cases.append(case(f"{name}{device}", _w8a8_kernel, "bf16", **constants))
                continue
            dtype = "bf16" if kernel == "w8a16" else "fp32"
            constants = widened | tile._asdict() | {"matrix_product": kernel == "w8a16"}
            cases.append(case(f"{name}{device}", _w8a16_kernel, dtype, **rows, **constants))
            if (kernel, None) in tiles and tile is tiles[kernel, None]:
                cases.append(case(f"{name} backward{device}", _w8a16_kernel, dtype, **columns, **constants))
    return cases


# --- Launchers ------------------------------------------------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    input, weight, mode = call.input, call.weight, call.mode
    if input.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"input is {input.dtype}"
    if mode == "w8a8" and weight.shape[1] > INT32_TERMS:
        return f"w8a8 with in_features {weight.shape[1]}: sums of more than {INT32_TERMS} products can pass int32"
    return None


def forward(call: Call):
    """(…, in_features) -> (…, out_features) in the input's dtype."""
    input, weight, weight_scale, bias, activation, mode = call
    y = _product(input, weight, weight_scale, bias, activation, mode, input.dtype)
    return y.view(*input.shape[:-1], weight.shape[0])


def backward(gradient: Gradient, call: Call):
    """-> dinput (…, in_features) in grad_output's dtype, dbias (out_features,) in float32, empty where not needed."""
    grad_output, need_input, need_bias = gradient
    input, weight, weight_scale, bias, activation, mode = call
    N, K = weight.shape
    dy = rows_of(grad_output)
    M = dy.shape[0]
    z = None
    if activation is not None:
        z = _product(input, weight, weight_scale, bias, None, mode, torch.float32)
    largest = torch.linalg.vector_norm(weight_scale, torch.inf) if N else weight_scale.new_zeros(())
    scaled = torch.empty((M, N) if need_input else 0, dtype=dy.dtype, device=dy.device)
    partial = torch.empty((cdiv(M, GRADIENT_BLOCK_M), N) if need_bias else 0, dtype=torch.float32, device=dy.device)
    if dy.numel():
        _gradient_kernel[(cdiv(M, GRADIENT_BLOCK_M) * cdiv(N, GRADIENT_BLOCK_N),)](
            dy, z, weight_scale.contiguous(), largest, scaled, partial, M, N, *dy.stride(),
            ACTIVATION=activation, NEED_INPUT=need_input, NEED_BIAS=need_bias,
            BLOCK_M=GRADIENT_BLOCK_M, BLOCK_N=GRADIENT_BLOCK_N, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
    dinput = scaled
    if need_input:
        # dx = (dz * weight_scale) @ weight, one scale for all of it left
        dinput = _product(scaled, weight.t(), largest.expand(K), None, None, "w8a16", dy.dtype)
        dinput = dinput.view(*grad_output.shape[:-1], K)
    return dinput, partial.sum(0) if need_bias else partial


def _product(input, weight, weight_scale, bias, activation, mode, dtype):
    """y (rows, out_features) in `dtype`."""
    N, K = weight.shape
    x = rows_of(input)
    M = x.shape[0]
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    wide = "w8a8" if mode == "w8a8" else "w8a32" if x.dtype == torch.float32 else "w8a16"
    config = tile(wide, x.device, M)
    grid = (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N),)
    epilogue = dict(HAS_BIAS=bias is not None, ACTIVATION=activation)
    bias = None if bias is None else bias.contiguous()
    if mode == "w8a8":
        q, input_scale = quantize.quantized_rows(x)
        _w8a8_kernel[grid](
            q, weight, input_scale, weight_scale, bias, y, M, N, K, *weight.stride(), weight_scale.stride(0),
            **epilogue, **config._asdict(), GROUP_M=GROUP_M,
        )  # fmt: skip
    else:
        _w8a16_kernel[grid](
            x, weight, weight_scale, bias, y, M, N, K, *x.stride(), *weight.stride(), weight_scale.stride(0),
            **epilogue, **config._asdict(), GROUP_M=GROUP_M,
            INPUT_PRECISION=_input_precision(architecture_of(x.device)), WIDEN=INTERPRETED,
        )  # fmt: skip
    return y
