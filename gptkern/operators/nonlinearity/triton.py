"""nonlinearity on Triton: GELU and SiLU, plain and gated.

    y = f(x + bias)             gated: y = f(x) * up
    dx = dy * f'(x + bias)      gated: dx = dy * up * f'(x), dup = dy * f(x)        dbias = sum over rows of dx

Memory is the floor: of a plain one the forward moves 2 widths a row and the backward 3, of a gated one 3 and 5; each
element is read once and written once. Of 16 bits an element has some 20 instructions of a thread until memory has moved
a width (H100, 3.35 TB/s), and the largest of these functions takes as many for three widths.

Tensors are walked as rows of any stride whose elements are contiguous, the halves of a packed tensor among them; where
all are contiguous and no column has a bias, as rows of FLAT elements, whatever their width. A program has one tile; one
of a backward with a bias walks tiles of the same columns and sums dx in float32 (float64): partial sums that one kernel
adds in a fixed order, so that the gradient is the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptkern.backends.triton import norms
from gptkern.backends.triton.activations import activated, activated_with_slope
from gptkern.backends.triton.common import CompileCase, as_rows, cdiv, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.rows import Tile
from gptkern.operators.nonlinearity.contract import Call, Gradient, output_shape

# --- Forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_of_program(rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Of a program's tile: its rows, int64, (BLOCK_ROWS, 1); its columns, (1, BLOCK_WIDTH); what is inside."""
    columns = tl.cdiv(width, BLOCK_WIDTH)
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tl.program_id(0) % columns) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    return row, column, (row < rows) & (column < width)


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,  # (rows, width)
    up_ptr,  # (rows, width)   or None
    bias_ptr,  # (width,)      or None
    y_ptr,  # (rows, width)    contiguous
    x_stride,  # from a row to the next
    up_stride,
    rows,
    width,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, column, inside = _tile_of_program(rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(COMPUTE)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(COMPUTE)
    # y = f(x), or f(x) * up
    y = activated(x, FUNCTION)
    if up_ptr is not None:
        y *= tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(COMPUTE)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


# --- Backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gradient_of_tile(
    dy_ptr,
    x_ptr,
    up_ptr,
    bias,  # (1, BLOCK_WIDTH), or None
    dx_ptr,
    dup_ptr,
    dy_stride,
    x_stride,
    up_stride,
    gradient_stride,
    row,
    column,
    inside,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Writes dx and dup of a tile where they are needed; -> dx."""
    dy = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(COMPUTE)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(COMPUTE)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(COMPUTE)
    if bias is not None:
        x += bias
    value, slope = activated_with_slope(x, FUNCTION)
    if dup_ptr is not None:
        # dup = dy * f(x)
        dup = (dy * value).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + row * gradient_stride + column, dup, mask=inside)
    # dx = dy * f'(x), or dy * up * f'(x)
    dx = dy * slope
    if up_ptr is not None:
        dx *= up
    if dx_ptr is not None:
        tl.store(dx_ptr + row * gradient_stride + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    return dx


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr,  # (rows, width)
    x_ptr,  # (rows, width)
    up_ptr,  # (rows, width)      or None
    dx_ptr,  # (rows, width)      or None where it is not needed
    dup_ptr,  # (rows, width)     or None
    dy_stride,  # from a row to the next
    x_stride,
    up_stride,
    gradient_stride,  # of dx and dup
    rows,
    width,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row, column, inside = _tile_of_program(rows, width, BLOCK_ROWS, BLOCK_WIDTH)
    _gradient_of_tile(
        dy_ptr, x_ptr, up_ptr, None, dx_ptr, dup_ptr, dy_stride, x_stride, up_stride, gradient_stride,
        row, column, inside, FUNCTION, COMPUTE,
    )  # fmt: skip


@jit(do_not_specialize=["rows"])
def _bias_backward_kernel(
    dy_ptr,  # (rows, width)
    x_ptr,  # (rows, width)
    bias_ptr,  # (width,)         or None where x has it already
    dx_ptr,  # (rows, width)      contiguous, or None where it is not needed
    dbias_ptr,  # (splits, width) partial sums in COMPUTE
    dy_stride,  # from a row to the next
    x_stride,
    rows,
    width,
    FUNCTION: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,  # tiles under way, with the one that is computed
):
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    split = tl.program_id(1).to(tl.int64)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(COMPUTE)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=COMPUTE)
    # A program takes every num_programs-th tile, so the sums do not depend on the order in which programs run.
    step = tl.num_programs(1).to(tl.int64) * BLOCK_ROWS
    for start in tl.range(split * BLOCK_ROWS, rows, step, num_stages=STAGES):
        # An interpreter makes Python's int of it.
        row = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_ROWS)[:, None]
        # What is outside is of dy 0, and adds nothing to the sum.
        dbias += _gradient_of_tile(
            dy_ptr, x_ptr, None, bias, dx_ptr, None, dy_stride, x_stride, 0, width,
            row, column, (row < rows) & (column < width), FUNCTION, COMPUTE,
        )  # fmt: skip
    place = split * width + tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH) < width
    tl.store(dbias_ptr + place, tl.sum(dbias, axis=0), mask=inside)


# --- Tiles ------------------------------------------------------------------------------------------------------------

# Elements of a tile, 8 a thread: of 16 bits one load of each operand, and of the 2048 threads of a multiprocessor 32 KB
# of each under way. Reasoned, not measured.
_ELEMENTS, _WARPS = 1024, 4
FLAT = _ELEMENTS
# The widest tile of those that sum a bias's gradient: 256 bytes of a row at a time, and few partial sums.
_BIAS_WIDTH = 128
_STAGES = 3


def tile_of(width: int, widest: int = _ELEMENTS) -> Tile:
    block_width = min(next_power_of_2(width), widest)
    return Tile(_ELEMENTS // block_width, block_width, _WARPS)


# --- Launchers --------------------------------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Rows and columns are counted in int32 and run over by less than a tile; so are programs, a tile each.
_MAX_COUNT = 2**31 - 2**20


def unsupported(call: Call) -> str | None:
    input, up, bias, *_ = call
    for name, tensor in (("input", input), ("up", up), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}; the kernels cover float16, bfloat16, float32 and float64"
    # A tile has at least a row of up to 1024 elements.
    width = input.shape[-1] if input.dim() else 1
    if width > _MAX_COUNT or (input.numel() > _MAX_COUNT and input.numel() // max(width, 1) > _MAX_COUNT):
        return f"the input has shape {tuple(input.shape)}; the kernels count its rows and columns in 32 bits"
    return None


def _compute_dtype(tensor: torch.Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def _walked(tensors: list, has_columns: bool) -> tuple[list, int, int]:
    """Tensors of one shape, each None or (…, width), as rows that are contiguous: -> they, rows and width.

    Args:
        has_columns: whether a column is told apart from another one.
    """
    first = tensors[0]
    is_flat = not has_columns and first.numel() % FLAT == 0
    if is_flat and all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return tensors, first.numel() // FLAT, FLAT
    width = first.shape[-1] if first.dim() else 1
    as_they_lie = [None if tensor is None else as_rows(tensor if tensor.dim() else tensor[None]) for tensor in tensors]
    return as_they_lie, first.numel() // width, width


def _stride(tensor: torch.Tensor | None, width: int) -> int:
    """Elements from a row to the next."""
    if tensor is None or tensor.is_contiguous():
        return width
    return tensor.stride(0)


def _halves(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) each, of (…, 2 width)."""
    rows = as_rows(packed)
    width = rows.shape[-1] // 2
    return rows[:, :width], rows[:, width:]


def forward(call: Call):
    """-> output (…, width)."""
    input, up, bias, function, packed = call
    output = torch.empty(output_shape(call), dtype=input.dtype, device=input.device)
    if output.numel() == 0:
        return output
    x, up = _halves(input) if packed else (input, up)
    (x, up), rows, width = _walked([x, up], bias is not None)
    if bias is not None:
        bias = bias.contiguous()
    block_rows, block_width, num_warps = tile_of(width)
    _forward_kernel[(cdiv(rows, block_rows) * cdiv(width, block_width),)](
        x, up, bias, output, _stride(x, width), _stride(up, width), rows, width,
        FUNCTION=function, COMPUTE=_compute_dtype(input), BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width,
        num_warps=num_warps,
    )  # fmt: skip
    return output


def backward(gradient: Gradient, call: Call):
    """-> dinput as input, dup (…, width), dbias (width,) in `bias_dtype`; what is not needed is empty."""
    dy, need_input, need_up, bias_dtype = gradient
    input, up, bias, function, packed = call
    # three tensors: a registered op may not return one twice
    dinput, dup = (
        torch.empty(input.shape if need_input else 0, dtype=input.dtype, device=input.device),
        torch.empty(dy.shape if need_up else 0, dtype=input.dtype, device=input.device),
    )
    dbias = input.new_empty(0 if bias_dtype is None else dy.shape[-1], dtype=bias_dtype)
    if dy.numel() == 0 or not (need_input or need_up or bias_dtype is not None):
        return dinput, dup, dbias.zero_()
    dx = dinput if need_input else None
    if bias_dtype is not None or bias is not None:
        _with_bias(dy, input, bias, dx, dbias if bias_dtype is not None else None, function)
        return dinput, dup, dbias
    of_up = dup if need_up else None
    if packed:
        input, up = _halves(input)
        dx, of_up = _halves(dinput)
    (dy, x, up), rows, width = _walked([dy, input, up], packed)
    block_rows, block_width, num_warps = tile_of(width)
    _backward_kernel[(cdiv(rows, block_rows) * cdiv(width, block_width),)](
        dy, x, up, dx, of_up, _stride(dy, width), _stride(x, width), _stride(up, width), width * (2 if packed else 1),
        rows, width, FUNCTION=function, COMPUTE=_compute_dtype(x), BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width,
        num_warps=num_warps,
    )  # fmt: skip
    return dinput, dup, dbias


def _with_bias(dy, x, bias, dx, dbias, function) -> None:
    (dy, x), rows, width = _walked([dy, x], True)
    tile = tile_of(width, _BIAS_WIDTH)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    grid = norms.partial_sums(rows, width, tile, x.device)
    partial = torch.empty(grid[1], width, dtype=compute, device=x.device)
    _bias_backward_kernel[grid](
        dy, x, None if bias is None else bias.contiguous(), dx, partial, _stride(dy, width), _stride(x, width),
        rows, width, FUNCTION=function, COMPUTE=_compute_dtype(x), BLOCK_ROWS=tile.block_rows,
        BLOCK_WIDTH=tile.block_width, STAGES=_STAGES, num_warps=tile.num_warps,
    )  # fmt: skip
    if dbias is not None:
        norms.sum_partials(None, partial, None, dbias)


# --- Ahead-of-time compilation ----------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    """Each function in each kernel, of tiles of one row and of several, and one of each other dtype."""

    def case(kernel, name, function, width, dtype="bf16", absent=()):
        tile = tile_of(width, _BIAS_WIDTH if kernel is _bias_backward_kernel else _ELEMENTS)
        constants = dict.fromkeys(absent) | {
            "FUNCTION": function, "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
            "BLOCK_ROWS": tile.block_rows, "BLOCK_WIDTH": tile.block_width,
        }  # fmt: skip
        if kernel is _bias_backward_kernel:
            constants["STAGES"] = _STAGES
        types = {"dbias_ptr": "*fp64" if dtype == "fp64" else "*fp32"}
        signature = {
            argument: "constexpr" if argument in constants
            else types.get(argument, f"*{dtype}" if argument.endswith("_ptr") else "i32")
            for argument in kernel.arg_names
        }  # fmt: skip
        aligned = tuple(argument for argument in signature if argument.endswith(("stride", "width")))
        name = f"{name} {function} width {width} {dtype}"
        return CompileCase(name, kernel, signature, constants, tile.num_warps, 3, aligned)

    no_up, no_gate = ("up_ptr",), ("up_ptr", "dup_ptr")
    cases = []
    for function in ("gelu", "gelu_tanh", "silu"):
        cases += [
            case(_forward_kernel, "forward", function, FLAT, absent=("up_ptr", "bias_ptr")),
            case(_forward_kernel, "forward gated", function, FLAT, absent=("bias_ptr",)),
            case(_backward_kernel, "backward", function, FLAT, absent=no_gate),
            case(_backward_kernel, "backward gated", function, FLAT),
        ]
    for function in ("gelu", "gelu_tanh"):
        cases += [
            case(_forward_kernel, "forward with bias", function, 3072, absent=no_up),
            case(_bias_backward_kernel, "backward with bias", function, 3072),
        ]
    return [
        *cases,
        case(_backward_kernel, "backward gated", "silu", 64),
        case(_backward_kernel, "backward gated", "silu", FLAT, "fp32"),
        case(_backward_kernel, "backward gated", "gelu_tanh", FLAT, "fp64"),
        case(_bias_backward_kernel, "backward of a product", "gelu_tanh", 3072, absent=("bias_ptr",)),
        case(_bias_backward_kernel, "backward with bias", "gelu", 3072, "fp32"),
    ]
