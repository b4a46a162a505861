"""linear_cross_entropy on Triton: what is done to a chunk's logits between PyTorch's products.

    z = x W_c^T (float32, from a product)          s = logit_scale * (z + bias), capped: softcap * tanh(s / softcap)

    update     m' = max(m, max s);   rest' = rest * exp(m - m') + sum of exp(s - m') over all but the target;  s_y
               moment' = exp(m - m') * (moment + (m - m') * sum exp(s - m)) + sum exp(s - m') (s - m')   for the entropy
               smooth' = smooth + sum weight_c s_c                                                  for label smoothing
    gradient   G = (slope * exp(s - m) / total - smooth * weight_c) * ds/dz;   at the target what the row's sums gave

Memory is the floor: `update` reads a chunk of z once, 4 bytes a logit; `gradient` reads it once and writes G, 2 bytes
(in 16 bits) or over z, 4. A program has a row; one whose target is ignored is not read, and its G is 0. Everything else
of a call is PyTorch's: products (gptkern/backends/vocabulary.py), and sums that are one number a row (chunks.py).
"""

from __future__ import annotations

import torch
import triton.language as tl

from gptkern.backends.triton.common import CompileCase, next_power_of_2
from gptkern.backends.triton.direct import jit
from gptkern.backends.triton.logits import exponential, finite, scores, slopes
from gptkern.operators.linear_cross_entropy import chunks, parallel
from gptkern.operators.linear_cross_entropy.call import Call, Gradient
from gptkern.operators.linear_cross_entropy.chunks import Known, Statistics

# Most classes that a program holds at once, 32 numbers a thread of 8 warps; tests lower it.
MOST_BLOCK = 8192
# Elements a thread: four loads of 16 bytes in flight.
_A_THREAD, _WARP, _MOST_WARPS = 16, 32, 8


@jit(do_not_specialize=["start", "first", "ignore_index", "logit_scale", "softcap"])
def _update_kernel(
    z_ptr,  # (rows, count)   float32
    bias_ptr,  # (count,)     of the chunk; or None
    weight_ptr,  # (count,)   of the chunk, for label smoothing; or None
    target_ptr,  # (rows,)    int64
    maximum_ptr,  # (rows,)   float32, as all that follow
    rest_ptr,  # (rows,)
    score_ptr,  # (rows,)     of the target
    moment_ptr,  # (rows,)    or None
    smooth_ptr,  # (rows,)    or None
    largest_ptr,  # (rows,)   or None
    likeliest_ptr,  # (rows,) int64, or None
    z_stride,  # from a row to the next
    count,  # classes of the chunk
    start,  # the class that the chunk's first column is
    first,  # the class that this process's first row of the weight is
    ignore_index,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    if target != ignore_index:
        z_ptr += row * z_stride
        m, rest = tl.load(maximum_ptr + row), tl.load(rest_ptr + row)
        score = tl.load(score_ptr + row)
        # Kept in registers: what one thread stores another one need not see.
        if moment_ptr is not None:
            moment = tl.load(moment_ptr + row)
        if smooth_ptr is not None:
            smooth = tl.load(smooth_ptr + row)
        if largest_ptr is not None:
            most, likeliest = tl.load(largest_ptr + row), tl.load(likeliest_ptr + row)
        # The target's column in this chunk: below 0 in an earlier one, from count on in a later one.
        at = target - start
        is_here = target >= first
        for begin in range(0, count, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < count
            x = tl.load(z_ptr + column, mask=inside, other=0.0)
            if bias_ptr is not None:
                x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            s = scores(x, logit_scale, softcap, SOFTCAP)
            if smooth_ptr is not None:
                # smooth += sum of weight_c * s_c
                weighted = s
                if weight_ptr is not None:
                    weighted *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
                smooth += tl.sum(tl.where(inside, weighted, 0.0), axis=0)
            if largest_ptr is not None:
                # Before the cap, which may make ties; NaN counts as the largest.
                scaled = tl.where(inside, x * logit_scale, float("-inf"))
                scaled = tl.where(scaled != scaled, float("inf"), scaled)
                largest = tl.max(scaled, axis=0)
                here = tl.min(tl.where((scaled == largest) & inside, column, count), axis=0)
                likeliest = tl.where(largest > most, here + start, likeliest)
                most = tl.maximum(most, largest)
            s = tl.where(inside, s, float("-inf"))
            largest_s = tl.maximum(m, tl.max(s, axis=0))
            shift = finite(largest_s)
            # of another maximum what was summed is rescaled; -inf before the first class, of which 0 is left
            before = exponential(m - shift)
            e = exponential(s - shift)
            if moment_ptr is not None:
                own = tl.where(is_here & (at < begin), exponential(score - shift), 0.0)
                moved = tl.where(m == float("-inf"), 0.0, m - shift)
                moment = moment * before + moved * (rest * before + own)
                moment += tl.sum(tl.where(e == 0.0, 0.0, e * (s - shift)), axis=0)
            is_target = column == at
            score += tl.sum(tl.where(is_target & inside, s, 0.0), axis=0)
            rest = rest * before + tl.sum(tl.where(is_target, 0.0, e), axis=0)
            m = largest_s
        tl.store(maximum_ptr + row, m)
        tl.store(rest_ptr + row, rest)
        tl.store(score_ptr + row, score)
        if moment_ptr is not None:
            tl.store(moment_ptr + row, moment)
        if smooth_ptr is not None:
            tl.store(smooth_ptr + row, smooth)
        if largest_ptr is not None:
            tl.store(largest_ptr + row, most)
            tl.store(likeliest_ptr + row, likeliest)


@jit(do_not_specialize=["start", "ignore_index", "logit_scale", "softcap"])
def _gradient_kernel(
    z_ptr,  # (rows, count)        float32
    bias_ptr,  # (count,)          of the chunk; or None
    weight_ptr,  # (count,)        of the chunk, for label smoothing; or None
    target_ptr,  # (rows,)         int64
    maximum_ptr,  # (rows,)        float32, as all that follow
    total_ptr,  # (rows,)
    slope_ptr,  # (rows,)
    smooth_ptr,  # (rows,)         or None
    derivative_ptr,  # (rows,)     dloss/ds of the target
    g_ptr,  # (rows, count)        of the product's dtype; may be z
    z_stride,  # from a row to the next
    g_stride,
    count,
    start,
    ignore_index,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    z_ptr += row * z_stride
    g_ptr += row * g_stride
    counts = target != ignore_index
    m = tl.load(maximum_ptr + row)
    # p_c times what it counts: slope * exp(s_c - m) / total
    slope = tl.load(slope_ptr + row) / tl.load(total_ptr + row)
    derivative = tl.load(derivative_ptr + row)
    at = target - start
    for begin in range(0, count, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < count
        x = tl.load(z_ptr + column, mask=inside & counts, other=0.0)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        s = scores(x, logit_scale, softcap, SOFTCAP)
        # dloss/ds_c = slope * p_c - smooth * weight_c
        g = slope * exponential(s - m)
        if smooth_ptr is not None:
            smooth = tl.load(smooth_ptr + row)
            if weight_ptr is not None:
                g -= smooth * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            else:
                g -= smooth
        g = tl.where(column == at, derivative, g)
        g *= slopes(x, logit_scale, softcap, SOFTCAP)
        g = tl.where(counts, g, 0.0)
        tl.store(g_ptr + column, g.to(g_ptr.dtype.element_ty), mask=inside)


# --- Launchers ------------------------------------------------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    """Why these kernels do not cover a call, or None: tensors of a call have one dtype."""
    if call.input.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"input is {call.input.dtype}; the kernels are for float16, bfloat16 and float32"
    return None


def _tile(count: int) -> dict:
    """A row of the chunk at once, or of a wider one MOST_BLOCK classes."""
    block = min(next_power_of_2(max(count, 1)), MOST_BLOCK)
    return dict(BLOCK=block, num_warps=min(max(block // (_A_THREAD * _WARP), 1), _MOST_WARPS))


def _of_chunk(call: Call, start: int, count: int) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """bias (count,) and class weights (count,) of a chunk, and the class that its first column is."""
    bias, first = call.linear_bias, parallel.first_class(call) + start
    weight = call.weight if call.label_smoothing else None
    return (
        None if bias is None else bias.contiguous()[start : start + count],
        None if weight is None else weight.contiguous()[first : first + count],
        first,
    )


def _scale(call: Call) -> tuple[int, float, float]:
    return call.ignore_index, call.logit_scale, 1.0 if call.softcap is None else call.softcap


def update(call: Call, statistics: Statistics, z: torch.Tensor, start: int) -> None:
    count = z.shape[1]
    bias, weight, first = _of_chunk(call, start, count)
    _update_kernel[(z.shape[0],)](
        z, bias, weight, call.target, *statistics, z.stride(0), count, first, parallel.first_class(call),
        *_scale(call), SOFTCAP=call.softcap is not None, **_tile(count),
    )  # fmt: skip


def gradient(call: Call, known: Known, z: torch.Tensor, start: int, out: torch.Tensor) -> None:
    count = z.shape[1]
    bias, weight, first = _of_chunk(call, start, count)
    smooth = known.smooth if call.label_smoothing else None
    _gradient_kernel[(z.shape[0],)](
        z, bias, weight, call.target, known.maximum, known.total, known.slope, smooth, known.target, out,
        z.stride(0), out.stride(0), count, first, *_scale(call), SOFTCAP=call.softcap is not None, **_tile(count),
    )  # fmt: skip


_ROWS = chunks.Rows(update, gradient)


def forward(call: Call):
    """As the contract's forward: loss, maximum, total, miss, entropy, correct; it computes no gradients ahead."""
    call = call._replace(target=call.target.contiguous())
    found = chunks.forward(call, _ROWS)
    return chunks.reduced(call, found.loss), *found[1:], None, None, None


def backward(gradient: Gradient, call: Call):
    """-> dinput (rows, width), dweight (classes, width), dbias (classes,), None where it is not needed."""
    return chunks.backward(gradient, call._replace(target=call.target.contiguous()), _ROWS)


# --- Ahead-of-time compilation --------------------------------------------------------------------------------------

_NUMBERS = dict(first="i64", start="i64", ignore_index="i32", logit_scale="fp32", softcap="fp32")


def compile_cases(architecture: int) -> list[CompileCase]:
    """Whole chunks, with everything at once and with what a GPT asks for."""
    cases = []
    plain = dict(
        bias_ptr=None, weight_ptr=None, moment_ptr=None, smooth_ptr=None, largest_ptr=None, likeliest_ptr=None,
        SOFTCAP=False,
    )  # fmt: skip
    for kernel, name in ((_update_kernel, "update"), (_gradient_kernel, "gradient")):
        for dtype in ("bf16", "fp32"):
            for options, what in ((plain, "plain"), (dict(SOFTCAP=True), "everything")):
                tile = _tile(MOST_BLOCK)
                constants = dict(options, BLOCK=tile["BLOCK"])
                constants = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}

                def kind(argument, dtype=dtype, constants=constants):
                    if argument in constants:
                        return "constexpr"
                    if argument in ("target_ptr", "likeliest_ptr"):
                        return "*i64"
                    if argument.endswith("_ptr"):
                        return f"*{dtype if argument in ('bias_ptr', 'weight_ptr', 'g_ptr') else 'fp32'}"
                    return _NUMBERS.get(argument, "i32")

                signature = {argument: kind(argument) for argument in kernel.arg_names}
                aligned = tuple(argument for argument in signature if argument.endswith(("stride", "count")))
                name_of = f"{name} {what} {dtype}"
                cases.append(CompileCase(name_of, kernel, signature, constants, tile["num_warps"], 3, aligned))
    return cases
