"""adamw on Triton: one launch for all tensors of a kind, through a table on the device.

    g = grad / grad_scale * clip
    θ = θ − lr · weight_decay · θ
    m = m + (1 − β₁) (g − m)
    v = β₂ v + (1 − β₂) g²
    θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)

Memory is the floor: contract.py says the bytes. A program does one chunk of one tensor; `chunk_ptr` says of which, and
a row of the table where that tensor, its gradient and its states lie. Full chunks and those at a tensor's end are two
branches: under a mask that hangs on a size from memory no load is wider than one element. Averages in 8 bits have a
kernel of their own, triton_blockwise.py.

The norm is summed in a fixed order: a program's chunks one after another, then the programs' sums in one program.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from gptkern.backends.triton.common import CompileCase, cdiv
from gptkern.backends.triton.direct import jit
from gptkern.operators.adamw import triton_blockwise
from gptkern.operators.adamw.contract import Call, Norm, counted
from gptkern.operators.adamw.table import Rows, is_aligned
from gptkern.operators.adamw.triton_elements import (
    COLUMNS,
    COUNT,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST_CHUNK,
    GRAD,
    MAX_EXP_AVG_SQ,
    PARAM,
    STEP,
    at,
    correction,
    draws,
    load,
    moved_parameter,
    pointer,
    rounded_at_random,
    scaled,
    store,
)
from gptkern.operators.adamw.walking import ANYWHERE, IN_A_RUN, NEAREST, kinds_of, numbers, of_norm

# Elements of a chunk: 16 of a thread; 8 where each draws its own random bits, or registers spill. Not measured.
CHUNK, CHUNK_ANYWHERE, WARPS = 4096, 2048, 8
# Chunks whose squares one program sums: the second kernel then has few sums to read.
CHUNKS_OF_A_SUM = 8
# Sums that it reads at once.
SUMS = 4096

NUMBERS = ("lr", "one_less_beta1", "log_beta1", "beta2", "one_less_beta2", "log_beta2", "eps", "weight_decay")
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _update_chunk(
    row_ptr, e, first, count, t, correction1, correction2, lr, one_less_beta1, beta2, one_less_beta2, eps,
    weight_decay, grad_scale_ptr, clip_ptr, PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr, AMSGRAD: tl.constexpr, MAXIMIZE: tl.constexpr, PLACES: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    inside = e < count
    p_at = at(pointer(row_ptr, PARAM, PARAM_DTYPE), e, ALIGNED)
    m_at = at(pointer(row_ptr, EXP_AVG, STATE_DTYPE), e, ALIGNED)
    v_at = at(pointer(row_ptr, EXP_AVG_SQ, STATE_DTYPE), e, ALIGNED)
    g = load(at(pointer(row_ptr, GRAD, GRAD_DTYPE), e, ALIGNED), inside, MASKED)
    p, m, v = load(p_at, inside, MASKED), load(m_at, inside, MASKED), load(v_at, inside, MASKED)

    g = scaled(g, grad_scale_ptr, clip_ptr, MAXIMIZE)
    # m = m + (1 − β₁) (g − m)
    m = m + one_less_beta1 * (g - m)
    # v = β₂ v + (1 − β₂) g²
    v = beta2 * v + one_less_beta2 * g * g
    largest = v
    if AMSGRAD:
        largest_at = at(pointer(row_ptr, MAX_EXP_AVG_SQ, STATE_DTYPE), e, ALIGNED)
        before = load(largest_at, inside, MASKED)
        # NaN stays, as torch.maximum has it.
        largest = tl.maximum(before, v, propagate_nan=tl.PropagateNan.ALL)
        store(largest_at, largest, inside, MASKED)
    p = moved_parameter(p, m, largest, correction1, correction2, lr, eps, weight_decay)
    if PLACES != 0:
        p = rounded_at_random(p, draws(row_ptr, t, e, first, PLACES, CHUNK))
    store(p_at, p, inside, MASKED)
    store(m_at, m, inside, MASKED)
    store(v_at, v, inside, MASKED)


@jit(do_not_specialize=NUMBERS)
def _update_kernel(
    table_ptr,  # (tensors, COLUMNS)  int64
    chunk_ptr,  # (programs,)         int32: the tensor of each
    lr_ptr,  # (1,)                float32, or None: `lr` counts
    grad_scale_ptr,  # (1,)           float32, or None
    found_inf_ptr,  # (1,)            float32, or None: nothing is written where it is not 0
    clip_ptr,  # (1,)                float32, or None
    lr,
    one_less_beta1,
    log_beta1,
    beta2,
    one_less_beta2,
    log_beta2,
    eps,
    weight_decay,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PLACES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tensor = tl.load(chunk_ptr + tl.program_id(0))
    row_ptr = table_ptr + tensor.to(tl.int64) * COLUMNS
    first = (tl.program_id(0) - tl.load(row_ptr + FIRST_CHUNK)) * CHUNK
    count = tl.load(row_ptr + COUNT)
    # The host has counted this update already.
    t = tl.load(pointer(row_ptr, STEP, tl.float32))
    correction1, correction2 = correction(t, log_beta1), correction(t, log_beta2)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float32)
    e = first + tl.arange(0, CHUNK)
    if found_inf_ptr is not None:
        # Nothing of the tensor is read or written.
        count = tl.where(tl.load(found_inf_ptr) == 0.0, count, 0)
    if first + CHUNK <= count:
        _update_chunk(
            row_ptr, e, first, count, t, correction1, correction2, lr, one_less_beta1, beta2, one_less_beta2,
            eps, weight_decay, grad_scale_ptr, clip_ptr, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, AMSGRAD, MAXIMIZE,
            PLACES, ALIGNED, False, CHUNK,
        )  # fmt: skip
    else:
        _update_chunk(
            row_ptr, e, first, count, t, correction1, correction2, lr, one_less_beta1, beta2, one_less_beta2,
            eps, weight_decay, grad_scale_ptr, clip_ptr, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, AMSGRAD, MAXIMIZE,
            PLACES, ALIGNED, True, CHUNK,
        )  # fmt: skip


# --- Norm -------------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["chunks"])
def _squares_kernel(
    table_ptr,  # (tensors, COLUMNS)  int64
    chunk_ptr,  # (chunks,)           int32: the tensor of each
    sums_ptr,  # (programs,)          float32
    chunks,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_OF_A_SUM: tl.constexpr,
):
    squares = tl.zeros((CHUNK,), tl.float32)
    for index in range(0, CHUNKS_OF_A_SUM):
        chunk = tl.program_id(0) * CHUNKS_OF_A_SUM + index
        if chunk < chunks:
            tensor = tl.load(chunk_ptr + chunk)
            row_ptr = table_ptr + tensor.to(tl.int64) * COLUMNS
            first = (chunk - tl.load(row_ptr + FIRST_CHUNK)) * CHUNK
            count = tl.load(row_ptr + COUNT)
            e = first + tl.arange(0, CHUNK)
            g_at = at(pointer(row_ptr, GRAD, GRAD_DTYPE), e, ALIGNED)
            if first + CHUNK <= count:
                g = load(g_at, e < count, False)
            else:
                g = load(g_at, e < count, True)
            squares += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@jit(do_not_specialize=["count"])
def _root_kernel(
    sums_ptr,  # (count,)  float32
    norm_ptr,  # (1,)      float32
    count,
    BLOCK: tl.constexpr,
):
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        sums += tl.load(sums_ptr + index, mask=index < count, other=0.0)
    # ‖g‖ = √(Σ g²)
    tl.store(norm_ptr, tl.sqrt(tl.sum(sums, axis=0)))


# --- Launchers ------------------------------------------------------------------------------------------------------


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


def norm(call: Norm) -> torch.Tensor:
    """-> 0-d float32: √(Σ g²) of all gradients."""
    device = call.grads[0].device
    found = torch.zeros((), dtype=torch.float32, device=device)
    kinds: dict[bool, Rows] = {}
    for grad in of_norm(call.grads):
        kinds.setdefault(is_aligned([grad]), Rows(CHUNK)).add(grad=grad, count=grad.numel())
    sums = torch.empty(sum(cdiv(rows.chunks, CHUNKS_OF_A_SUM) for rows in kinds.values()), device=device)
    done = 0
    for aligned, rows in kinds.items():
        table, chunks = rows.on(device)
        programs = cdiv(rows.chunks, CHUNKS_OF_A_SUM)
        _squares_kernel[(programs,)](
            table, chunks, sums[done:], rows.chunks, GRAD_DTYPE=DTYPES[call.grads[0].dtype], ALIGNED=aligned,
            CHUNK=CHUNK, CHUNKS_OF_A_SUM=CHUNKS_OF_A_SUM, num_warps=WARPS,
        )  # fmt: skip
        done += programs
    if done:
        _root_kernel[(1,)](sums, found, done, BLOCK=SUMS, num_warps=WARPS)
    return found


def forward(call: Call) -> None:
    """The update, in place."""
    torch._foreach_add_(call.steps, counted(call))
    device, back = call.params[0].device, []
    hyperparameters = numbers(call)
    named = dict(
        PARAM_DTYPE=DTYPES[call.params[0].dtype], GRAD_DTYPE=DTYPES[call.grads[0].dtype], MAXIMIZE=call.maximize
    )
    for kind, rows in kinds_of(call, _chunk, triton_blockwise.TILE, back).items():
        table, chunks = rows.on(device)
        pointers = table, chunks, call.lr_on_device, call.grad_scale, call.found_inf, call.clip
        if call.exp_avg_scales:
            triton_blockwise.launch(kind, rows.chunks, pointers, hyperparameters, named)
        else:
            _update_kernel[(rows.chunks,)](
                *pointers, *hyperparameters, STATE_DTYPE=DTYPES[call.exp_avgs[0].dtype],
                AMSGRAD=bool(call.max_exp_avg_sqs), PLACES=kind.places, ALIGNED=kind.aligned,
                CHUNK=_chunk(kind.places), num_warps=WARPS, **named,
            )  # fmt: skip
    for tensor, copy in back:
        tensor.copy_(copy)


def _chunk(places: int) -> int:
    return CHUNK_ANYWHERE if places == ANYWHERE else CHUNK


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------


def compile_cases(architecture: int) -> list[CompileCase]:
    return [*_cases(), *triton_blockwise.cases()]


def _cases() -> Iterator[CompileCase]:
    pointers = dict(
        table_ptr="*i64", chunk_ptr="*i32", lr_ptr="*fp32", grad_scale_ptr="*fp32", found_inf_ptr="*fp32",
        clip_ptr="*fp32",
    )  # fmt: skip
    for name, param, state, places, amsgrad in (
        ("float32", tl.float32, tl.float32, NEAREST, False),
        ("float32 amsgrad", tl.float32, tl.float32, NEAREST, True),
        ("bf16", tl.bfloat16, tl.bfloat16, NEAREST, False),
        ("bf16 at random, float32 states", tl.bfloat16, tl.float32, IN_A_RUN, False),
        ("bf16 at random, anywhere", tl.bfloat16, tl.float32, ANYWHERE, False),
    ):
        constants = dict(
            PARAM_DTYPE=param, GRAD_DTYPE=param, STATE_DTYPE=state, AMSGRAD=amsgrad, MAXIMIZE=False, PLACES=places,
            ALIGNED=True, CHUNK=_chunk(places),
        )  # fmt: skip
        signature = {**pointers, **dict.fromkeys(NUMBERS, "fp32"), **dict.fromkeys(constants, "constexpr")}
        yield CompileCase(f"update {name}", _update_kernel, signature, constants, WARPS, 1)
    constants = dict(GRAD_DTYPE=tl.bfloat16, ALIGNED=True, CHUNK=CHUNK, CHUNKS_OF_A_SUM=CHUNKS_OF_A_SUM)
    signature = dict(table_ptr="*i64", chunk_ptr="*i32", sums_ptr="*fp32", chunks="i32")
    signature |= dict.fromkeys(constants, "constexpr")
    yield CompileCase("norm", _squares_kernel, signature, constants, WARPS, 1)
    signature = dict(sums_ptr="*fp32", norm_ptr="*fp32", count="i32", BLOCK="constexpr")
    yield CompileCase("norm, root", _root_kernel, signature, {"BLOCK": SUMS}, WARPS, 1)
