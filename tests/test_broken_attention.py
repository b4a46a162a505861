"""attention's kernels, broken on purpose where faults hide: operators/test_attention_faults.py has to see each.

As in test_broken_kernels.py and test_broken_cuda_kernels.py one expression is changed in a copy of a kernel, of Triton
or CUDA C++, on the CPU. That the test passes with the kernel as it is is said by the test itself.
"""

from __future__ import annotations

import pytest
import test_attention_faults as faults
import torch
from conftest import DEVICE
from mutants import Mutation, cases, plant_in_cuda, plant_in_triton, seen

from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels are changed where they are interpreted and emulated", allow_module_level=True)

HALF = torch.float16


def layouts(options):
    return lambda backend, monkeypatch: faults.check_own_layouts(backend, "cpu", options)


def lengths(length_q, length_k, is_causal=False, head_dim=16):
    return lambda backend, monkeypatch: faults.check_low_scores(
        backend, "cpu", HALF, (length_q, length_k), is_causal, head_dim
    )


def one_score(height):
    return lambda backend, monkeypatch: faults.test_rows_of_one_score(backend, "cpu", height)


def window(kind):
    return lambda backend, monkeypatch: faults.test_low_scores_under_a_window(backend, "cpu", None, kind)


def far(dim):
    return lambda backend, monkeypatch: faults.test_sequences_or_heads_far_apart(backend, "cpu", monkeypatch, dim)


def far_rows(*of):
    return lambda backend, monkeypatch: faults.test_rows_far_apart(backend, "cpu", monkeypatch, of)


def spread(backend, monkeypatch):
    faults.test_rows_that_a_tile_cannot_span_are_copied(backend, "cpu")


def first_queries(backend, monkeypatch):
    faults.test_low_scores_where_the_first_queries_see_nothing(backend, "cpu", None)


CAUSAL, FULL, MASK = layouts("causal"), layouts("full"), layouts("bool mask")
SHIFT = r"\(tl\.program_id\(0\) // blocks\)\.to\(tl\.int64\)"
UNSHIFTED = "tl.program_id(0) // blocks"
QUERIES, KEYS = far_rows(289, 5), far_rows(5, 289)

TRITON = [
    # Layouts
    Mutation(
        "value's batch by the key's",
        "_forward_kernel",
        r"batch \* value_batch_stride",
        "batch * key_batch_stride",
        CAUSAL,
    ),
    Mutation(
        "value's head by the key's", "_forward_kernel", r"group \* value_head_stride", "group * key_head_stride", CAUSAL
    ),
    Mutation(
        "value's tile by the key's", "_forward_tiles", r"first \* value_row_stride", "first * key_row_stride", CAUSAL
    ),
    Mutation(
        "value's rows by the key's", "_forward_tiles", r"value_row_stride, columns", "key_row_stride, columns", CAUSAL
    ),
    Mutation(
        "output's tile by the query's",
        "_forward_kernel",
        r"first \* output_row_stride",
        "first * query_row_stride",
        CAUSAL,
    ),
    Mutation(
        "output's rows by the query's",
        "_forward_kernel",
        r"output_ptr, output_row_stride",
        "output_ptr, query_row_stride",
        CAUSAL,
    ),
    Mutation(
        "mask's batch by its head's", "_forward_kernel", r"batch \* mask_batch_stride", "batch * mask_head_stride", MASK
    ),
    Mutation(
        "delta: dO by the output's",
        "_delta_kernel",
        r"head \* grad_output_head_stride",
        "head * output_head_stride",
        CAUSAL,
    ),
    Mutation(
        "dK/dV: value's head by the key's",
        "_key_value_kernel",
        r"kv_head \* value_head_stride",
        "kv_head * key_head_stride",
        CAUSAL,
    ),
    Mutation(
        "dK/dV: dO's rows by the query's",
        "_key_value_tiles",
        r"grad_output_row_stride, rows",
        "query_row_stride, rows",
        CAUSAL,
    ),
    Mutation(
        "dV's rows by dK's",
        "_key_value_kernel",
        r"grad_value_ptr, grad_value_row_stride",
        "grad_value_ptr, grad_key_row_stride",
        CAUSAL,
    ),
    Mutation(
        "dK/dV: the mask of a group's first head",
        "_key_value_kernel",
        r"mask_batch_stride \+ head \*",
        "mask_batch_stride + kv_head * group *",
        MASK,
    ),
    Mutation(
        "dK/dV: dropout of the key's head",
        "_key_value_kernel",
        r"query_batch_head, start_n, positions",
        "batch_head, start_n, positions",
        layouts("additive mask dropout"),
    ),
    Mutation(
        "dQ: value's tile by the key's", "_query_tiles", r"first \* value_row_stride", "first * key_row_stride", CAUSAL
    ),
    Mutation(
        "dQ: dO's batch by the query's",
        "_query_kernel",
        r"batch \* grad_output_batch_stride",
        "batch * query_batch_stride",
        CAUSAL,
    ),
    Mutation(
        "dQ: mask's head by its batch's", "_query_kernel", r"head \* mask_head_stride", "head * mask_batch_stride", MASK
    ),
    # Lengths
    Mutation(
        "a key past 64 n - 1 is seen",
        "scores_of",
        r"PARTIAL and CHECK_KEYS: scores = tl\.where\(keys < length_k",
        "PARTIAL and CHECK_KEYS:\n        scores = tl.where(keys < length_k + (length_k % 64 == 63)",
        lengths(17, 127),
    ),
    Mutation(
        "a key past 64 n - 1 is seen, causal",
        "scores_of",
        r"\(keys < length_k\) & \(",
        "(keys < length_k + (length_k % 64 == 63)) & (",
        lengths(65, 63, True),
    ),
    Mutation(
        "a tile of one key too few is whole",
        "key_range",
        r"return seen_by_all",
        "return (seen_by_all + 1)",
        lengths(17, 127),
    ),
    Mutation(
        "a tile of one query too few is left out",
        "query_range",
        r"whole\) < tiles:",
        "whole) < tiles and length_q % BLOCK_M != BLOCK_M - 1:",
        lengths(63, 65),
    ),
    # Values
    Mutation("the maximum begins at -1e9", "_forward_kernel", r"else LOWEST", "else -1.0e9", one_score(-1e30)),
    Mutation(
        "lse ends at -128",
        "probabilities_of",
        r"score_scale - lse",
        "score_scale - tl.maximum(lse, -128.0)",
        lengths(16, 31),
    ),
    Mutation("lse of no key, bool mask", "load_lse", r"MASK != NO_MASK or", "MASK == ADDITIVE_MASK or", window("bool")),
    Mutation("lse of no key, lower right", "load_lse", r"or LOWER_RIGHT", "or False", first_queries),
    Mutation(
        "the sum of no key, lower right",
        "_forward_kernel",
        r"MASK != NO_MASK or LOWER_RIGHT",
        "MASK != NO_MASK",
        first_queries,
    ),
    Mutation(
        "the maximum of no key",
        "_forward_kernel",
        r"tl\.where\(row_sum == 0\.0, 0\.0, row_max\)",
        "row_max",
        window("-inf"),
    ),
    # Sizes
    Mutation("batch in 32 bits", "_forward_kernel", SHIFT, UNSHIFTED, far(0)),
    Mutation("delta: heads in 32 bits", "_delta_kernel", SHIFT, UNSHIFTED, far(1)),
    Mutation("dK/dV: batch in 32 bits", "_key_value_kernel", SHIFT, UNSHIFTED, far(0)),
    Mutation("dQ: heads in 32 bits", "_query_kernel", SHIFT, UNSHIFTED, far(1)),
    Mutation("queries in 32 bits", "_forward_kernel", r"start_m\.to\(tl\.int64\)", "start_m", QUERIES),
    Mutation("keys in 32 bits", "_forward_tiles", r"tl\.cast\(start_n, tl\.int64\)", "start_n", KEYS),
    Mutation("dK/dV: queries in 32 bits", "_key_value_tiles", r"tl\.cast\(start_m, tl\.int64\)", "start_m", QUERIES),
    Mutation("dQ: keys in 32 bits", "_query_tiles", r"tl\.cast\(start_n, tl\.int64\)", "start_n", KEYS),
    Mutation(
        "rows are read however far apart",
        "read",
        r"strides\[2\] \* _LARGEST_BLOCK >= _INT32_RANGE",
        "False",
        spread,
    ),
]

FORWARD, KEY_VALUE, QUERY = (
    "attention_forward_kernel(const AttentionForward", "attention_backward_key_value(", "attention_backward_query(",
)  # fmt: skip
CUDA = [
    # Layouts
    Mutation(
        "value by the key's strides",
        FORWARD,
        "first_of(call.value, call.value_strides",
        "first_of(call.value, call.key_strides",
        FULL,
    ),
    Mutation(
        "value's tile by the key's rows",
        FORWARD,
        "value + int64_t(start) * call.value_strides.row",
        "value + int64_t(start) * call.key_strides.row",
        FULL,
    ),
    Mutation(
        "output's rows by the query's",
        FORWARD,
        "output, call.output_strides.row",
        "output, call.query_strides.row",
        FULL,
    ),
    Mutation(
        "delta: dO by the output's strides",
        "attention_backward_delta(",
        "call.grad_output.row<T>(batch, head, row)",
        "Heads{call.grad_output.address, call.output.batch_stride, call.output.head_stride, "
        "call.output.row_stride}.row<T>(batch, head, row)",
        FULL,
    ),
    Mutation(
        "dK/dV: dO's rows by the query's", KEY_VALUE, ": call.grad_output.row_stride", ": call.query.row_stride", FULL
    ),
    Mutation(
        "dK/dV: value's rows by the key's",
        KEY_VALUE,
        "start), call.value.row_stride",
        "start), call.key.row_stride",
        FULL,
    ),
    Mutation("dQ: value's rows by the key's", QUERY, "call.value.row_stride", "call.key.row_stride", FULL),
    Mutation("dQ's rows by the query's", QUERY, "call.grad_query.row_stride", "call.query.row_stride", FULL),
    # Lengths and values
    Mutation("a tail of 64 n - 1 is not masked", FORWARD, "> seen_by_all)", "> seen_by_all + 1)", lengths(17, 127)),
    Mutation(
        "a key past 64 n - 1 is seen, causal",
        "void mask(",
        "8 * j + i >= tail",
        "8 * j + i >= tail + (is_causal && length_k % 64 == 63)",
        lengths(65, 63, True),
    ),
    Mutation(
        "a query of a warp of 31 is left out",
        FORWARD,
        "rows - first_row);",
        "rows - first_row - (rows - first_row == 31));",
        lengths(31, 65),
    ),
    Mutation(
        "dQ: a tail of 32 n - 1 is not masked", QUERY, "> call.length_k)", "> call.length_k + 1)", lengths(16, 31)
    ),
    Mutation(
        "dQ: a key past 32 n - 1 is seen where lse is low",
        QUERY,
        "key >= call.length_k ||",
        "(key >= call.length_k && !(call.length_k % 32 == 31 && statistics[m][i / 2] < -128.0f)) ||",
        lengths(16, 31),
    ),
    Mutation(
        "dQ: what is hidden is multiplied by 0",
        QUERY,
        "key > query)) z[m][n][i] = 0.0f",
        "key > query)) z[m][n][i] *= 0.0f",
        lengths(16, 31),
    ),
    Mutation("the reference begins at -1e5", "void clear()", "= LOWEST", "= -1.0e5f", one_score(-1e6)),
    Mutation(
        "lse ends at -128",
        "void finish(Tile<",
        "reference[f][h] + log2f",
        "fmaxf(reference[f][h], -128.0f) + log2f",
        lengths(16, 31),
    ),
    # Sizes
    Mutation("batch and head in 32 bits", FORWARD, "batch * strides.batch", "int(batch * strides.batch)", far(0)),
    Mutation("queries in 32 bits", FORWARD, "int64_t(row) * strides.row", "row * strides.row", QUERIES),
    Mutation("keys in 32 bits", FORWARD, "key + int64_t(start)", "key + start", KEYS),
    Mutation("backward: rows in 32 bits", "struct Heads", "int64_t(row) * row_stride", "row * row_stride", QUERIES),
    Mutation("backward: heads in 32 bits", "struct Heads", "head * head_stride", "int(head * head_stride)", far(1)),
    Mutation(
        "rows are read however far apart",
        "bool is_readable(",
        "step_of(tensor, 2) < LARGEST_ROW_STRIDE",
        "true",
        spread,
    ),
]
# Of each kind one, in `make test`.
SHARP = {"value's tile by the key's", "a key past 64 n - 1 is seen, causal", "lse ends at -128", "dQ: heads in 32 bits"}


@cases({"attention": TRITON}, SHARP)
def test_the_fault_is_seen(operator, mutation, triton_backend, monkeypatch, tmp_path):
    plant_in_triton(operator, mutation, tmp_path, monkeypatch)
    with seen():
        mutation.check("triton", monkeypatch)


@pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler for the emulated CUDA kernels")
@cases({"attention": CUDA}, ("dQ: a key past 32 n - 1 is seen where lse is low",))
def test_the_fault_is_seen_on_cuda(operator, mutation, cuda_backend, monkeypatch, tmp_path):
    plant_in_cuda(operator, mutation, tmp_path, monkeypatch)
    with seen():
        mutation.check("cuda", monkeypatch)
