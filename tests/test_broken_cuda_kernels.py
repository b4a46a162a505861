"""CUDA kernels that are broken on purpose, on the emulator: a check that cannot fail is worth nothing.

Each mutation changes one expression in a copy of csrc/. The same call has to pass the check that is meant for such a
fault with the kernel as it is, and to fail it with the broken one: the comparison with plain mathematics, a report of
the emulator, or a limit of its counters. What the emulator reports is tested by kernels of its own in
test_emulator_broken.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE
from cuda_modules import changed_module

from gptkern.backends.cuda import emulated
from gptkern.measuring import checking

if DEVICE != "cpu":
    pytest.skip("there is a GPU: the CUDA backend's tests run on it, not on the emulator", allow_module_level=True)
if emulated.compiler() is None:
    pytest.skip("there is no C++ compiler for the emulated CUDA kernels", allow_module_level=True)

import count_cuda
import emulation
import test_attention
import test_cuda_counters
import test_int8_linear_faults
import test_quantize_int8_faults
import test_rotary_faults
import test_softmax_faults


class Case(NamedTuple):
    """A case of checking.py: one of its numbers is wrong or, where a message is given, a launch is refused."""

    operator: str
    shape_class: str  # of the small checks of the operator's problem.py
    direction: str = "forward"  # the result that has to fail
    dtype: torch.dtype = torch.float16
    refused: str = ""  # what the emulator says, a regular expression

    def results(self) -> dict[str, checking.Result]:
        (case,) = (
            case
            for case in checking.cases_of(self.operator, ("small",))
            if case.shape_class == self.shape_class and case.dtype == self.dtype
        )
        return {result.direction: result for result in checking.check(case, "cuda", torch.device("cpu"))}

    def passes(self) -> None:
        results = self.results()
        assert all(result.ok for result in results.values()), results

    def fails(self) -> None:
        results = self.results()
        if self.refused:
            assert [bool(re.search(self.refused, result.note)) for result in results.values()] == [True], results
            return
        # A kernel that does not run at all would prove nothing about the comparison.
        assert not any(result.note for result in results.values()), results
        result = results[self.direction]
        assert result.ok is False and not math.isnan(result.error) and result.error > result.bound


class Limit(NamedTuple):
    """A test of the project: its assertion fails, though the numbers of `sound` stay right."""

    function: Callable
    arguments: tuple = ()
    sound: Case | None = None

    def passes(self) -> None:
        count_cuda.counted.cache_clear()
        self.function(*self.arguments)

    def fails(self) -> None:
        if self.sound:
            self.sound.passes()
        try:
            with pytest.raises(AssertionError):
                self.passes()
        finally:
            count_cuda.counted.cache_clear()


class Mutation(NamedTuple):
    name: str
    operator: str
    function: str  # of cuda_modules.changed_module, as are the two below
    old: str
    new: str
    check: Case | Limit


COVERED = "is writing: no cp_async_wait has covered it"
OUTSIDE = "the address is outside of the launcher's tensors"

MUTATIONS = [
    Mutation(
        "the causal mask is shifted by one", "attention", "void mask(",
        "> diagonal)", "> diagonal + 1)",
        Case("attention", "causal"),
    ),
    Mutation(
        "the accumulator is not rescaled", "attention", "void rescale(float scale_log2e)",
        "accumulator[f][j][2 * h + i] *= correction;", "{}",
        Limit(test_attention.test_scores_that_grow_along_the_row, ("cuda", "cpu")),
    ),
    Mutation(
        "keys are read before they have come", "attention", "attention_forward_kernel(const AttentionForward",
        "cp_async_wait<0>(); __syncthreads(); if constexpr (TWO_STAGES)", "__syncthreads(); if constexpr (TWO_STAGES)",
        Case("attention", "causal", refused=COVERED),
    ),
    Mutation(
        "keys overwrite queries without a barrier", "attention", "attention_forward_kernel(const AttentionForward",
        "warp.load_query(shared.rows, first_row); __syncthreads();", "warp.load_query(shared.rows, first_row);",
        Case("attention", "causal", refused="a race in shared memory: nothing orders the"),
    ),
    Mutation(
        "rows beyond the last query are written", "attention", "void finish(Tile<",
        "t == 0 && row < rows", "t == 0",
        Case("attention", "more queries than keys", refused=f"store of 4 bytes .*{OUTSIDE}"),
    ),
    Mutation(
        "rows beyond the last are copied", "attention", "void load_tile(Tile<",
        "row < rows && chunk", "chunk",
        Case("attention", "more queries than keys", refused=f"cp_async .*{OUTSIDE}"),
    ),
    Mutation(
        "operands are read from other places than they were copied to", "attention", "int offset(int base,",
        "(odd ^ row % 8 /", "(odd ^ row % 4 /",
        Case("attention", "causal"),
    ),
    Mutation(
        "dS lacks delta", "attention", "attention_backward_key_value(",
        "p[i] * (z[m][n][i] - delta[i % 2])", "p[i] * z[m][n][i]",
        Case("attention", "causal", "grad key"),
    ),
    Mutation(
        "the wait leaves one copy too many under way", "int8_linear", "w8a8_kernel(Operand<int8_t> q",
        "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();",
        Case("int8_linear", "w8a8", refused=COVERED),
    ),
    Mutation(
        "tiles are not swizzled", "int8_linear", "int swizzled(",
        "return chunk ^ (row >> 1 & 3);", "return chunk;",
        Limit(
            test_cuda_counters.test_no_bank_conflicts,
            (test_cuda_counters.find("int8_linear", "100x256->200 float32, w8a8"),),
            Case("int8_linear", "w8a8"),
        ),
    ),
    Mutation(
        "columns are scaled by their neighbour's scale", "int8_linear", "void write_tile(",
        "of_column(epilogue, column + i)", "of_column(epilogue, column)",
        Case("int8_linear", "w8a8"),
    ),
    Mutation(
        "the variance is divided by width - 1", "layer_norm", "layer_norm_forward_kernel(const",
        "m2 / float(width)", "m2 / float(width - 1)",
        Case("layer_norm", "tail", dtype=torch.float32),
    ),
    Mutation(
        "the mean square is divided by width - 1", "rms_norm", "float rstd_of(",
        "squares / float(width)", "squares / float(width - 1)",
        Case("rms_norm", "tail", dtype=torch.float32),
    ),
    Mutation(
        "warps read one another's sums without a barrier", "rms_norm", "void over_group(float (&values)[N]",
        "__syncthreads();", "",
        Case("rms_norm", "wide", dtype=torch.float32, refused="a race in shared memory: nothing orders the"),
    ),
    Mutation(
        "the last of the partial sums are left out", "rms_norm", "void reduce_partials(",
        "row < partials", "row < partials - 1",
        Case("rms_norm", "Llama", "grad weight"),
    ),
    Mutation(
        "up's gradient is of the slope", "nonlinearity", "nonlinearity_backward_kernel(const __grid",
        "of_y * value", "of_y * slope",
        Case("nonlinearity", "swiglu", "grad up"),
    ),
    Mutation(
        "a row's last vector is written whole", "nonlinearity", "void store_part(",
        "if (count < V) {", "if (count < 0) {",
        Case("nonlinearity", "swiglu tail", refused=OUTSIDE),
    ),
    Mutation(
        "a block sums the rows of seven of its warps", "nonlinearity", "nonlinearity_bias_kernel(const __grid",
        "WARPS, min(range", "WARPS - 1, min(range",
        Case("nonlinearity", "bias", "grad bias", torch.float32),
    ),
    Mutation(
        "the second half begins one column late", "nonlinearity", "Walked<T> second_half(",
        "first.start + width", "first.start + width + 1",
        Case("nonlinearity", "swiglu packed", refused=OUTSIDE),
    ),
    Mutation(
        "the backward turns as the forward does", "rotary", "void launch(const Tensor& x,",
        ".sign = options.inverse ? -1.0f : 1.0f", ".sign = 1.0f",
        Case("rotary", "partial", "grad input"),
    ),
    Mutation(
        "the second half is read one element late", "rotary", "    rotary_kernel(const T* x,",
        "(source + call.gap))", "(source + call.gap + 1))",
        Case("rotary", "any head_dim"),
    ),
    Mutation(
        "slots beyond the last position are turned too", "rotary", "    rotary_kernel(const T* x,",
        "if (index >= call.length * call.slots) return;", "",
        Case("rotary", "half-split, tails", refused=OUTSIDE),
    ),
    Mutation(
        "the angle is the head's, not the position's", "rotary", "    rotary_kernel(const T* x,",
        "load_angles(cos, batch, row,", "load_angles(cos, batch, first,",
        Case("rotary", "half-split, tails"),
    ),
    Mutation(
        # Not a plain return: memory that nothing wrote may hold the right values by chance.
        "what passes through is another column", "rotary", "    rotary_kernel(const T* x,",
        "x + (head + i) * call.x.head + column));", "x + (head + i) * call.x.head));",
        Case("rotary", "partial, interleaved"),
    ),
    Mutation(
        "the running sum is not rescaled", "softmax", "void rescale(float larger)",
        "total *= exp_of(m - finite(larger));", "",
        Case("softmax", "wide first dimension", dtype=torch.float32),
    ),
    Mutation(
        "what the causal limit hides is read all the same", "softmax", "softmax_forward_rows_kernel(",
        "load<V>(x_line, n, visible, width)", "load<V>(x_line, n, width, width)",
        Limit(
            test_cuda_counters.test_no_more_bytes_than_needed,
            (test_cuda_counters.find("softmax", "2x256x256 bfloat16, causal"),),
            Case("softmax", "causal"),
        ),
    ),
    Mutation(
        "scales that are all zero are divided by", "int8_linear", "    gradient_kernel(Operand",
        "if (divisor == 0.0f) divisor = 1.0f;", "",
        Limit(test_int8_linear_faults.test_all_scales_are_zero, ("cuda", "cpu", torch.bfloat16, 5, None)),
    ),
    Mutation(
        "the ninth row is left out", "int8_linear", "w8a16_few_rows_kernel(Operand",
        "bool two = M > MMA_N;", "bool two = M > MMA_N + 1;",
        Limit(
            test_int8_linear_faults.test_rows_beside_those_of_a_matrix_instruction,
            ("cuda", "cpu", None, torch.bfloat16),
        ),
    ),
    Mutation(
        "a NaN of a column does not show in the scale", "quantize_int8", "    quantize_columns_kernel(",
        "store_shared(&shared.largest[warp][lane], largest);",
        "store_shared(&shared.largest[warp][lane], min(largest, INFINITY_BITS));",
        Limit(
            test_quantize_int8_faults.test_a_special_value_shows_in_its_scale_alone,
            ("cuda", "cpu", (33, 40), 0, math.nan),
        ),
    ),
    Mutation(
        "the slot after a block's is left out", "rotary", "void launch(const Tensor& x,",
        "tiles = ceil_div<int64_t>(length * slots, threads);", "tiles = (length * slots + threads - 2) / threads;",
        Limit(test_rotary_faults.test_lengths_beside_tiles, ("cuda", "cpu", None, 257)),
    ),
    Mutation(
        "a causal row of -inf is NaN", "softmax", "softmax_forward_rows_kernel(",
        "options.causal_rows || options.mask_kind != NO_MASK", "options.mask_kind != NO_MASK",
        Limit(
            test_softmax_faults.test_a_causal_row_of_minus_infinity_is_zero,
            ("cuda", "cpu", None, 37, False, torch.bfloat16),
        ),
    ),
    Mutation(
        "y is not divided by its own sum", "softmax", "softmax_backward_columns_kernel(",
        "dot[e], OUT == 2)", "dot[e], false)",
        Limit(
            test_softmax_faults.test_what_is_added_to_a_whole_gradient_changes_nothing, (((40, 7), 0), "cpu"),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.operator}: {mutation.name}")
def test_the_check_sees_a_broken_kernel(mutation, cuda_backend, monkeypatch, tmp_path, request):
    mutation.check.passes()
    broken = changed_module(mutation.operator, mutation.function, mutation.old, mutation.new, tmp_path / "csrc")
    monkeypatch.setattr(emulated, "load", lambda: broken)
    emulation.schedule_of(request.node.nodeid)
    mutation.check.fails()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "void no_such_function("}, r"'void no_such_function\(' stands in 0 places of csrc; it needs 1"),
        ({"function": "namespace gptkern"}, r"'namespace gptkern' stands in \d+ places of csrc; it needs 1"),
        ({"old": "no such expression"}, r"attention/forward.cu, .*: 0 places like 'no such expression'; it needs 1"),
        ({"old": "lane % 4"}, r"attention/forward.cu, .*: \d+ places like 'lane % 4'; it needs 1"),
    ],
)
def test_a_mutation_that_does_not_fit_the_source_is_an_error(change, message, tmp_path):
    mutation = MUTATIONS[0]._replace(**change)
    with pytest.raises(AssertionError, match=message):
        changed_module(mutation.operator, mutation.function, mutation.old, mutation.new, tmp_path / "csrc")
