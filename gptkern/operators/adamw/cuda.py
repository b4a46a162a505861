"""adamw in CUDA C++: launchers over csrc/adamw/, where the mathematics is."""

from __future__ import annotations

import torch

from gptkern.backends.cuda import common
from gptkern.backends.cuda.common import DTYPES
from gptkern.operators.adamw.contract import Call, Norm, counted
from gptkern.operators.adamw.table import Rows, cdiv
from gptkern.operators.adamw.walking import kinds_of, numbers, of_norm

# Elements that a block of 256 threads does, and blocks of 8-bit averages. Reasoned, not measured.
CHUNK, BLOCKS = 4096, 16
# Chunks whose squares one block of threads sums: the second kernel then has few sums to read.
CHUNKS_OF_A_SUM = 8


def unsupported(call: Call | Norm) -> str | None:
    """Why these kernels do not cover a call, or None."""
    lists = [("gradients", call.grads)]
    if isinstance(call, Call):
        lists += [("parameters", call.params)]
        if not call.exp_avg_scales:
            lists += [("averages", call.exp_avgs)]
    for name, tensors in lists:
        for tensor in tensors:
            if tensor.dtype not in DTYPES:
                return f"{name} are {tensor.dtype}; the kernels are for float16, bfloat16 and float32"
    return None


def _on(rows: Rows, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and the map of chunks; what the table leads to is known to whoever watches addresses."""
    for tensor in rows.held:
        common.address(tensor)
    return rows.on(device)


def norm(call: Norm) -> torch.Tensor:
    """-> 0-d float32: √(Σ g²) of all gradients."""
    first = call.grads[0]
    rows = Rows(CHUNK)
    for grad in of_norm(call.grads):
        rows.add(grad=grad, count=grad.numel())
    if not rows.chunks:
        return first.new_zeros((), dtype=torch.float32)
    found = first.new_empty((), dtype=torch.float32)
    sums = first.new_empty(cdiv(rows.chunks, CHUNKS_OF_A_SUM), dtype=torch.float32)
    common.start("adamw_norm", *_on(rows, first.device), sums, found, DTYPES[first.dtype], CHUNK, CHUNKS_OF_A_SUM)
    return found


def forward(call: Call) -> None:
    """The update, in place."""
    torch._foreach_add_(call.steps, counted(call))
    device, back = call.params[0].device, []
    lr = None if call.lr_on_device is None else call.lr_on_device.float()
    dtypes = DTYPES[call.params[0].dtype], DTYPES[call.grads[0].dtype]
    for kind, rows in kinds_of(call, lambda places: CHUNK, BLOCKS, back).items():
        given = (*_on(rows, device), lr, call.grad_scale, call.found_inf, call.clip, *numbers(call), call.maximize)
        if call.exp_avg_scales:
            common.start("adamw_update_blocks", *given, kind.places, *dtypes, BLOCKS)
        else:
            state_dtype = DTYPES[call.exp_avgs[0].dtype]
            common.start(
                "adamw_update", *given, bool(call.max_exp_avg_sqs), kind.places, *dtypes, state_dtype, CHUNK
            )  # fmt: skip
    for tensor, copy in back:
        tensor.copy_(copy)
