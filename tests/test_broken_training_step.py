"""The operators of a training step's end, the loss and the optimizer, in CUDA C++: broken on purpose where faults hide.

As in test_broken_rows.py, which has the harness: the test meant for each fault has to see it.
"""

from __future__ import annotations

import test_adamw
import test_cross_entropy_cuda
import torch
from mutants import Mutation, cases
from test_broken_rows import check_in_cuda, compiler, far, of

CE_FORWARD, CE_BACKWARD = "cross_entropy_forward_kernel(const", "cross_entropy_backward_kernel(const"
CUDA = {
    "adamw": [
        Mutation(
            "a tensor's last chunk is a whole one", "adamw_update_kernel(const",
            "min(row[COUNT] - first, int64_t(call.chunk))", "int64_t(call.chunk)",
            of(test_adamw.test_an_update, dtype=torch.float32, options={}),
        ),
        Mutation(
            "amsgrad keeps the last v", "adamw_update_kernel(const",
            "if (!stays) largest[e] = v[e];", "largest[e] = v[e];",
            of(test_adamw.test_an_update, dtype=torch.float32, options={"amsgrad": True}),
        ),
        Mutation(
            "the correction is a difference of numbers near 1", "Update(const Hyper& hyper, const Row& row)",
            "-expm1f(t * hyper.log_beta2)", "1.0f - expf(t * hyper.log_beta2)",
            of(test_adamw.test_hyperparameters_at_their_ends, hyper=dict(betas=(0.999, 0.9999))),
        ),
        Mutation(
            "an overflow of 2 is none", "bool overflowed()",
            "!(load_global(found_inf) == 0.0f)", "load_global(found_inf) == 1.0f",
            of(test_adamw.test_an_overflow_leaves_everything, state_dtype=None, rounding=False),
        ),
        Mutation(
            "both halves of a counter's words are the first", "void round_at_random(",
            "if (V < DRAWS && half)", "if (false && half)",
            of(test_adamw.test_the_bits_of_the_rounding_are_pytorchs, shape=(2, 512), state_dtype=torch.float32),
        ),
        Mutation(
            "the key does not move on", "PhiloxWords philox(",
            "k1 += 0xBB67AE85u;", "k1 += 0xBB67AE84u;",
            of(test_adamw.test_the_bits_of_the_rounding_are_pytorchs, shape=(2, 512), state_dtype=torch.float32),
        ),
        Mutation(
            "the last chunk has no part in the norm", "adamw_squares_kernel(const",
            "chunk >= call.chunks", "chunk >= call.chunks - 1",
            of(test_adamw.test_the_norm, dtype=torch.float32),
        ),
        Mutation(
            "blocks begin as if rows had no tail", "adamw_update_blocks_kernel(const",
            "block / in_a_row * width +", "block / in_a_row * in_a_row * BLOCK +",
            of(test_adamw.test_an_update_in_8_bits, shape=(2, 257), dtype=torch.float32),
        ),
        Mutation(
            "a NaN does not show in its block", "float largest_of(",
            "ballot(is_nan) ? __int_as_float(0x7fc00000) : value", "value",
            of(test_adamw.test_numbers_that_are_none_stay_where_they_are),
        ),
    ],
    "cross_entropy": [
        Mutation(
            "what lies beyond the row is summed", CE_FORWARD,
            "fill_outside(s, n, end, -INFINITE);", "",
            of(test_cross_entropy_cuda.test_rows_that_begin_anywhere, dtype=torch.float32, offset=1),
        ),
        Mutation(
            "p_y - 1 is computed as that", CE_BACKWARD,
            "-exp_of(kept(2) - log_total)", "1.0f - exp_of(kept(2) - log_total) - 1.0f",
            of(test_cross_entropy_cuda.test_the_true_classs_gradient_where_its_probability_is_near_1,
               dtype=torch.float32, rest=1e-6, classes=9),
        ),
        Mutation(
            "the target's class is summed with the others", CE_FORWARD,
            "if (e == int(target_at)) s[e] = -INFINITE;", "s[e] += 0.0f;",
            of(test_cross_entropy_cuda.test_options, dtype=torch.float32, name="plain", classes=33),
        ),
        Mutation(
            "the running sum is not moved", "void move(float larger)",
            "others *= factor;", "",
            of(test_cross_entropy_cuda.test_variants, dtype=torch.float32, vectors=1025, odd=False),
        ),
        Mutation(
            "the entropy's sum is not moved", "void move(float larger)",
            "(product + moved * others) * factor", "product * factor",
            of(test_cross_entropy_cuda.test_stats, dtype=torch.float32, classes=4000, options={}),
        ),
        Mutation(
            "of equal logits the last counts, in a vector", CE_FORWARD,
            "z >= z_y : e > int(target_at)", "z > z_y : e > int(target_at)",
            of(test_cross_entropy_cuda.test_stats, dtype=torch.bfloat16, classes=4000, options={}),
        ),
        Mutation(
            "of equal logits the last counts, in a row", CE_FORWARD,
            "n < y ? largest >= z_y", "n < y ? largest > z_y",
            of(test_cross_entropy_cuda.test_stats, dtype=torch.float32, classes=4000, options={}),
        ),
        Mutation(
            "a smoothed loss is the difference of large sums", CE_FORWARD,
            "const float reference = finite(s_y);", "const float reference = 0.0f;",
            of(test_cross_entropy_cuda.test_a_smoothed_loss_of_far_logits_keeps_its_digits, dtype=torch.float32),
        ),
        Mutation(
            "groups read one another's losses without a barrier", CE_FORWARD,
            "__syncthreads();", "",
            of(test_cross_entropy_cuda.test_many_rows, classes=9),
        ),
        Mutation(
            "the groups beyond a warp are left out", CE_FORWARD,
            "g < groups; g += WARP", "g < min(groups, WARP); g += WARP",
            of(test_cross_entropy_cuda.test_many_rows, classes=9),
        ),
        Mutation(
            "the last chunk of a gradient is not written", "const int of_thread = ceil_div(",
            "ceil_div(of_thread, backward.steps)", "max(of_thread / backward.steps, 1)",
            of(test_cross_entropy_cuda.test_gpt2s_odd_rows, dtype=torch.float32, name="plain"),
        ),
        Mutation(
            "the gradient of an ignored row is not written", CE_BACKWARD,
            "i < last && columns[i] < end; ++i)", "target.counts && i < last && columns[i] < end; ++i)",
            of(test_cross_entropy_cuda.test_an_ignored_row_is_not_read, name="each row", classes=80),
        ),
    ],
}  # fmt: skip

CUDA_SIZES = {
    "cross_entropy": [
        Mutation(
            "rows in 32 bits", CE_FORWARD,
            "row * call.x.stride", "int(row * call.x.stride)",
            far("cross_entropy of 61 classes", 0, 0),
        ),
    ],
}  # fmt: skip


@compiler
@cases(CUDA, ())
def test_the_fault_is_seen_on_cuda(operator, mutation, cuda_backend, poisoned_memory, monkeypatch, tmp_path, request):
    check_in_cuda(operator, mutation, monkeypatch, tmp_path, request.node.nodeid)


@compiler
@cases(CUDA_SIZES, ())
def test_an_offset_in_32_bits_is_seen_on_cuda(operator, mutation, cuda_backend, monkeypatch, tmp_path, request):
    check_in_cuda(operator, mutation, monkeypatch, tmp_path, request.node.nodeid)
