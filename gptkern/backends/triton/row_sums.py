"""The losses of rows, summed or averaged on the device: in a fixed order, without atomics.

loss = sum of losses / sum of own            the latter kept for the backward
"""

from __future__ import annotations

import torch
import triton.language as tl

from gptkern.backends.triton.common import CompileCase, cdiv
from gptkern.backends.triton.direct import jit

# Elements of a program's step, and the most rows that one program sums alone: 32 steps, a few microseconds.
BLOCK, ALONE = 4096, 131072
_WARPS = 8


@jit(do_not_specialize=["rows", "divisor", "each"])
def _row_sums_kernel(
    losses_ptr,  # (rows,) float32
    own_ptr,  # (rows,) float32, or None
    sum_ptr,  # (programs,)
    own_sum_ptr,  # (programs,) float32, or None
    rows,
    divisor,  # of the sum where there is no own
    each,  # rows of a program
    BLOCK: tl.constexpr,
    DIVIDE: tl.constexpr,  # whether the sum is divided by that of own
):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    owns = tl.zeros((BLOCK,), tl.float32)
    end = tl.minimum(rows, (program + 1) * each)
    for start in range(program * each, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + row, mask=row < end, other=0.0)
        if own_ptr is not None:
            owns += tl.load(own_ptr + row, mask=row < end, other=0.0)
    result = tl.sum(total, axis=0) / divisor
    if own_ptr is not None:
        own_sum = tl.sum(owns, axis=0)
        tl.store(own_sum_ptr + program, own_sum)
        if DIVIDE:
            result /= own_sum
    tl.store(sum_ptr + program, result.to(sum_ptr.dtype.element_ty))


def row_sums(
    losses: torch.Tensor, own: torch.Tensor | None, divisor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> the loss () of `dtype`, and the sum of own (), float32, that it was divided by, or None.

    Args:
        losses: (rows,) float32. own: (rows,) float32, or None: divide by `divisor`.
    """
    rows = losses.shape[0]
    if rows > ALONE:
        each = cdiv(cdiv(rows, ALONE // 2), BLOCK) * BLOCK
        programs = cdiv(rows, each)
        partial = losses.new_empty(programs)
        partial_own = None if own is None else losses.new_empty(programs)
        _row_sums_kernel[(programs,)](
            losses, own, partial, partial_own, rows, 1.0, each, BLOCK=BLOCK, DIVIDE=False, num_warps=_WARPS
        )
        return row_sums(partial, partial_own, divisor, dtype)
    loss = losses.new_empty((), dtype=dtype)
    own_sum = None if own is None else losses.new_empty(())
    _row_sums_kernel[(1,)](
        losses, own, loss, own_sum, rows, divisor, max(rows, 1), BLOCK=BLOCK, DIVIDE=own is not None, num_warps=_WARPS
    )
    return loss, own_sum


def compile_case() -> CompileCase:
    """With everything that the kernel can be asked for."""
    constants = {"BLOCK": BLOCK, "DIVIDE": True}
    types = {"rows": "i32", "each": "i32", "divisor": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in _row_sums_kernel.arg_names
    }
    return CompileCase("row sums", _row_sums_kernel, signature, constants, _WARPS, num_stages=3)
