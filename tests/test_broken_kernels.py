"""Kernels that are broken on purpose: a check that cannot fail is worth nothing.

Each mutation changes one expression in the source of a Triton kernel. The same case of checking.py has to pass
with the kernel as it is and to fail, by its numbers, with the broken one.
"""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import pytest
import torch
from mutants import plant_in_triton

from gptkern.backends import dispatch
from gptkern.measuring import checking

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Mutation(NamedTuple):
    name: str
    operator: str
    function: str  # of mutants.changed_triton_module, as are the two below
    old: str
    new: str
    shape_class: str  # of the small checks of the operator's problem.py
    direction: str  # the result that has to fail
    dtype: torch.dtype = torch.float32
    settings: tuple[tuple[str, int], ...] = ()  # of the module: what sends a small case to the kernels for wide ones


MUTATIONS = [
    Mutation(
        "the causal limit is shifted by one", "attention", "scores_of",
        r"scores = tl\.where\(\(keys < length_k\) & \(keys <= queries\)",
        "scores = tl.where((keys < length_k) & (keys <= queries + 1)",
        "grouped heads", "forward", torch.float16,
    ),
    Mutation(
        "the causal limit of the queries' gradient is shifted by one", "attention", "scores_of",
        r"scores = tl\.where\(\(keys < length_k\) & \(keys <= queries\)",
        "scores = tl.where((keys < length_k) & (keys <= queries + 1)",
        "grouped heads", "grad query", torch.float16,
    ),
    Mutation(
        "the causal limit of the keys' gradient is shifted by one", "attention", "scores_of",
        r"elif PARTIAL and CAUSAL: scores = tl\.where\(keys <= queries",
        "elif PARTIAL and CAUSAL:\n        scores = tl.where(keys <= queries + 1",
        "grouped heads", "grad key", torch.float16,
    ),
    Mutation(
        "keys beyond the last one are seen", "attention", "scores_of",
        r"elif PARTIAL and CHECK_KEYS: scores = tl\.where\(keys < length_k",
        "elif PARTIAL and CHECK_KEYS:\n        scores = tl.where(keys <= length_k",
        "more keys than queries, additive mask", "forward",
    ),
    Mutation(
        "the queries' last tile of keys is left out", "attention", "key_range",
        r"LOWER_RIGHT\) \+ BLOCK_M", "LOWER_RIGHT) + 1",
        "grouped heads", "grad query", torch.float16,
    ),
    Mutation(
        "tiles on the diagonal count as seen whole", "attention", "key_range",
        r"LOWER_RIGHT\) \+ 1", "LOWER_RIGHT) + BLOCK_M",
        "grouped heads", "forward", torch.float16,
    ),
    Mutation(
        "a tile of queries too late for the keys", "attention", "query_range",
        r"partial = first // BLOCK_M", "partial = tl.cdiv(first + BLOCK_M, BLOCK_M)",
        "grouped heads", "grad value", torch.float16,
    ),
    Mutation(
        "the tile that is cut short is left out", "attention", "query_range",
        r"count \+= 1", "count += 0",
        "more keys than queries, additive mask", "grad key",
    ),
    Mutation(
        "lse is the neighbour's", "attention", "load_lse",
        r"tl\.load\(lse_ptr \+ rows, mask", "tl.load(lse_ptr + tl.maximum(rows - 1, 0), mask",
        "more keys than queries, additive mask", "grad query",
    ),
    Mutation(
        "the probabilities' maximum is not subtracted", "attention", "probabilities_of",
        r"\(scores - row_max\)", "scores",
        "additive mask", "grad value",
    ),
    Mutation(
        "the accumulator is not rescaled", "attention", "_forward_tiles",
        r"accumulator = accumulator \* correction\[:, None\]", "accumulator = accumulator",
        "grouped heads", "forward", torch.float16,
    ),
    Mutation(
        "the mask is shifted by a key", "attention", "_forward_tiles",
        r"mask_ptr \+ first \* mask_column_stride", "mask_ptr + tl.maximum(first - 1, 0) * mask_column_stride",
        "additive mask", "forward",
    ),
    Mutation(
        "the mask's rows and keys are swapped in the keys' gradient", "attention", "_key_value_tiles",
        r"mask_ptr \+ first \* mask_row_stride, mask_row_stride, mask_column_stride",
        "mask_ptr + first * mask_row_stride, mask_column_stride, mask_row_stride",
        "more keys than queries, additive mask", "grad key",
    ),
    Mutation(
        "the lower right is the upper left", "attention", "causal_offset",
        r"return length_k - length_q", "return 0",
        "lower right", "forward",
    ),
    Mutation(
        "the variance is divided by width - 1", "layer_norm", "_forward_kernel",
        r"tl\.sum\(centred \* centred, axis=1\) / width", "tl.sum(centred * centred, axis=1) / (width - 1)",
        "tail", "forward",
    ),
    Mutation(
        "the backward forgets avg(g * x_hat)", "layer_norm", "backward_kernel",
        r"\[:, None\] - x_hat \* average_gx\[:, None\]\)", "[:, None])",
        "tail", "grad input",
    ),
    Mutation(
        "the backward of wide rows forgets avg(g)", "layer_norm", "input_gradient_wide_kernel",
        r"g -= average_g", "g -= 0.0",
        "wide", "grad input",
    ),
    Mutation(
        "the weight of a wide row is its neighbour's", "layer_norm", "_load_g",
        r"weight_ptr \+ column", "weight_ptr + tl.maximum(column - 1, 0)",
        "wide", "grad input",
    ),
    Mutation(
        "the mean of a wide row is not subtracted", "layer_norm", "_load_x_hat",
        r"\(x - mean\)", "x",
        "wide", "grad input",
    ),
    Mutation(
        "the bias's gradient of wide rows is the weight's", "layer_norm", "parameter_gradient_wide_kernel",
        r"dbias \+= dy", "dbias += dy * dy",
        "wide", "grad bias",
    ),
    Mutation(
        "the mean square is divided by width - 1", "rms_norm", "_forward_kernel",
        r"axis=1\) / width", "axis=1) / (width - 1)",
        "tail", "forward",
    ),
    Mutation(
        "the backward forgets avg(g * x_hat)", "rms_norm", "backward_kernel",
        r"dx = rstd \* \(g - x_hat \* \(tl\.sum\(g \* x_hat, axis=1\) / width\)\[:, None\]\)", "dx = rstd * g",
        "tail", "grad input",
    ),
    Mutation(
        "programs sum each other's rows into the weight's gradient", "rms_norm", "backward_kernel",
        r"tl\.num_programs\(0\)\.to\(tl\.int64\) \* BLOCK_ROWS", "BLOCK_ROWS",
        "Llama", "grad weight",
    ),
    Mutation(
        "up is left out of the gate's gradient", "nonlinearity", "_gradient_of_tile",
        r"dx \*= up", "dx *= 1.0",
        "swiglu", "grad input",
    ),
    Mutation(
        "up's gradient is of the slope", "nonlinearity", "_gradient_of_tile",
        r"\(dy \* value\)", "(dy * slope)",
        "swiglu packed tail", "grad input", torch.bfloat16,
    ),
    Mutation(
        "the second half begins one column early", "nonlinearity", "_halves",
        r"rows\[:, width:\]", "rows[:, width - 1 : -1]",
        "swiglu packed", "forward", torch.float16,
    ),
    Mutation(
        "programs sum each other's rows into the bias's gradient", "nonlinearity", "_bias_backward_kernel",
        r"tl\.range\(split \* BLOCK_ROWS, rows, step", "tl.range(split * BLOCK_ROWS, rows, step - BLOCK_ROWS",
        "bias tail", "grad bias",
    ),
    Mutation(
        "the slope of the tanh form leaves out u'", "nonlinearity", "activated_with_slope",
        r"rest \* inner", "rest * _TWO_SQRT_2_PI",
        "geglu", "grad input", torch.bfloat16,
    ),
    Mutation(
        "the exact form is the tanh form", "nonlinearity", "activated",
        r'ACTIVATION == "gelu"', 'ACTIVATION == "gelu_exact"',
        "gelu", "forward",
    ),
    Mutation(
        "the angle has the wrong sign", "rotary", "_turn",
        r"x_a \* cos - x_b \* sin, x_b \* cos \+ x_a \* sin", "x_a * cos + x_b * sin, x_b * cos - x_a * sin",
        "half-split, tails", "forward",
    ),
    Mutation(
        "the backward turns as the forward does", "rotary", "_rotary_kernel",
        r"sin = -sin", "pass",
        "interleaved, tails", "grad input",
    ),
    Mutation(
        "the second half begins one element late", "rotary", "_rotary_kernel",
        r"x_b = tl\.load\(x_rows \+ HALF \+ pair", "x_b = tl.load(x_rows + HALF + 1 + pair",
        "partial", "forward",
    ),
    Mutation(
        "the angle is the head's, not the position's", "rotary", "_rotary_kernel",
        r"cos_rows = (.*) \+ row_64 \* cos_stride_row", r"cos_rows = \1 + head_64 * cos_stride_row",
        "half-split, tails", "forward",
    ),
    Mutation(
        "the sequences of a batch share positions", "rotary", "_rotary_kernel",
        r"sin_ptr \+ batch \* sin_stride_batch", "sin_ptr",
        "interleaved, tails", "forward",
    ),
    Mutation(
        "what passes through is turned to 0", "rotary", "_rotary_kernel",
        r"tl\.store\(y_rows \+ column, tl\.load\((.*)\), mask=in_rest\)",
        r"tl.store(y_rows + column, tl.load(\1) * 0, mask=in_rest)",
        "partial, interleaved", "forward",
    ),
    Mutation(
        "the running sum is not rescaled", "softmax", "_forward_chunked_kernel",
        r"total = total \* tl\.exp2\([^\n]*", "total = total",
        "wide first dimension", "forward",
    ),
    Mutation(
        "a chunk too few of a causal row is walked", "softmax", "last_visible",
        r"causal_rows\) \+ 1", "causal_rows) - 15",
        "causal", "forward", settings=(("ONE_PASS_LIMIT", 16),),
    ),
    Mutation(
        "ones stand right of the causal limit", "softmax", "store_zeros",
        r"zero = tl\.zeros\(", "zero = 1 + tl.zeros(",
        "causal", "forward", settings=(("ONE_PASS_LIMIT", 16),),
    ),
    Mutation(
        "the last element of a row is not seen", "softmax", "_forward_kernel",
        r"n < width", "n < width - 1",
        "tail", "forward",
    ),
    Mutation(
        "the mask of the K tail is one too wide", "int8_linear", "_w8a8_kernel",
        r"k < K - start", "k <= K - start",
        "w8a8, tails", "forward",
    ),
    Mutation(
        "the mask of the K tail is one too wide", "int8_linear", "_w8a16_kernel",
        r"k < K - start", "k <= K - start",
        "w8a16, tails", "forward",
    ),
    Mutation(
        "the two scales are swapped", "int8_linear", "_w8a8_kernel",
        r"input_scale\[:, None\] \* weight_scale\[None, :\]", "weight_scale[:, None] * input_scale[None, :]",
        "w8a8", "forward",
    ),
    Mutation(
        "the quotient is cut off", "quantize_int8", "_quantized",
        r"shifted\.to\(tl\.int32, bitcast=True\) - _ROUNDER_BITS", "(shifted - _ROUNDER - 0.5).to(tl.int32)",
        "tail", "forward",
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.operator}: {mutation.name}")
def test_the_check_sees_a_broken_kernel(mutation, monkeypatch, tmp_path, device):
    case = next(
        case
        for case in checking.cases_of(mutation.operator, ("small",))
        if case.shape_class == mutation.shape_class and case.dtype == mutation.dtype
    )

    def results():
        for name, value in mutation.settings:
            monkeypatch.setattr(dispatch.load("triton", mutation.operator), name, value)
        return {result.direction: result for result in checking.check(case, "triton", torch.device(device))}

    sound = results()
    assert all(result.ok for result in sound.values()), sound
    plant_in_triton(mutation.operator, mutation, tmp_path, monkeypatch)
    broken = results()
    # A kernel that does not run at all would prove nothing about the comparison.
    assert not any(result.note for result in broken.values()), broken
    result = broken[mutation.direction]
    assert result.ok is False and not math.isnan(result.error) and result.error > result.bound
