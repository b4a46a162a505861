"""layer_norm in CUDA C++: launchers over csrc/layer_norm.cu, where the mathematics is."""

from __future__ import annotations

import torch

from gptkern.cuda_kernels import common
from gptkern.cuda_kernels.common import DTYPES

# Blocks a multiprocessor that share the rows of a backward: with 256 threads of at most 128 registers, as many as fit.
BLOCKS_PER_MULTIPROCESSOR = 2
# Of wider rows one block takes more of a multiprocessor, and its partial sums more memory: there are fewer of them.
FULL_BLOCKS_WIDTH = 8192
# Of a width that is no multiple of this, groups of threads walk in steps of as many rows, which are aligned alike.
ROWS_OF_ONE_ALIGNMENT = 8
# Columns are 32-bit integers in the kernels, with room for a chunk beyond the row.
WIDEST = 2**30


def unsupported(input, residual, weight, bias, eps) -> str | None:
    """Why these kernels do not cover a call, or None."""
    if input.shape[-1] > WIDEST:
        return f"rows are {input.shape[-1]} wide; the kernel counts columns up to {WIDEST}"
    for name, tensor in (("input", input), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; the kernel is for float16, bfloat16 and float32"
    return None


def forward(input, residual, weight, bias, eps):
    """(…, width) -> output (…, width), summed (…, width) or empty, mean (rows,), rstd (rows,)."""
    shape, width, device = input.shape, input.shape[-1], input.device
    dtype = input.dtype if residual is None else torch.result_type(input, residual)
    output = torch.empty(shape, dtype=dtype, device=device)
    summed = torch.empty(0 if residual is None else shape, dtype=dtype, device=device)
    size = output.numel()
    rows = size // width if width else shape[:-1].numel()
    mean = torch.empty(rows, dtype=torch.float32, device=device)
    rstd = torch.empty(rows, dtype=torch.float32, device=device)
    if size == 0:
        return output, summed, mean, rstd
    address = common.address
    x, x_stride = as_rows(input, width)
    added, added_stride, added_dtype, sum_address = None, 0, 0, 0
    if residual is not None:
        added, added_stride = as_rows(residual, width)
        added_dtype, sum_address = DTYPES[added.dtype], address(summed)
    weight, bias, parameter_dtype = _parameters(weight, bias, dtype)
    common.call(
        "layer_norm_forward", x, address(x), address(added), address(weight), address(bias), address(output),
        sum_address, address(mean), address(rstd), x_stride, added_stride, rows, width, DTYPES[x.dtype], added_dtype,
        parameter_dtype, DTYPES[dtype], eps,
    )  # fmt: skip
    return output, summed, mean, rstd


def backward(grad_output, grad_summed, summed, weight, mean, rstd, need_input, need_weight, need_bias):
    """-> dsummed (…, width), dweight (width,), dbias (width,) in float32; what is not needed is empty."""
    shape, width, dtype, device = summed.shape, summed.shape[-1], summed.dtype, summed.device
    # What is not needed is a tensor of its own: a registered op may not return one twice.
    dsummed = torch.empty(shape if need_input else 0, dtype=dtype if need_input else torch.float32, device=device)
    rows = mean.numel()
    if rows == 0 or width == 0:
        return dsummed, mean.new_zeros(width if need_weight else 0), mean.new_zeros(width if need_bias else 0)
    dweight = torch.empty(width if need_weight else 0, dtype=torch.float32, device=device)
    dbias = torch.empty(width if need_bias else 0, dtype=torch.float32, device=device)
    address = common.address
    dy, dy_stride = as_rows(grad_output, width)
    s, s_stride = as_rows(summed, width)
    incoming, incoming_stride = None, 0
    if grad_summed is not None and need_input:
        incoming, incoming_stride = as_rows(grad_summed, width)
    weight, _, weight_dtype = _parameters(weight, None, dtype)
    partials = BLOCKS_PER_MULTIPROCESSOR * common.multiprocessors(device)
    if width > FULL_BLOCKS_WIDTH:
        partials = partials * FULL_BLOCKS_WIDTH // width
    partials = min(rows, max(partials, ROWS_OF_ONE_ALIGNMENT if width % ROWS_OF_ONE_ALIGNMENT else 1))
    wanted = need_weight + need_bias
    partial = torch.empty(wanted * partials * width, dtype=torch.float32, device=device) if wanted else None
    common.call(
        "layer_norm_backward", s, address(dy), address(incoming), address(s), address(weight), address(mean),
        address(rstd), address(dsummed) if need_input else 0, address(dweight) if need_weight else 0,
        address(dbias) if need_bias else 0, address(partial), dy_stride, incoming_stride, s_stride, rows, width,
        weight_dtype, DTYPES[dtype], partials,
    )  # fmt: skip
    return dsummed, dweight, dbias


def as_rows(tensor: torch.Tensor, width: int) -> tuple[torch.Tensor, int]:
    """(…, width) -> (a tensor with contiguous rows, elements from a row to the next); copied only if it must be."""
    if not tensor.is_contiguous():
        if tensor.stride(-1) != 1 and width != 1:
            tensor = tensor.contiguous()
        elif tensor.dim() > 1:
            tensor = tensor.reshape(-1, width)
            return tensor, tensor.stride(0)
    return tensor, width


def _parameters(weight, bias, dtype):
    """(weight, bias, their dtype): of `dtype` or float32, as the kernels read them."""
    given = bias if weight is None else weight
    if given is None:
        return None, None, 0
    if given.dtype is not dtype and given.dtype is not torch.float32:
        # 16-bit parameters beside a sum that a residual has widened.
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        return weight, bias, DTYPES[torch.float32]
    return weight, bias, DTYPES[given.dtype]
