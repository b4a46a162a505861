"""The operators that walk rows, broken on purpose where faults hide: the test meant for each has to see it.

As in test_broken_attention.py one expression is changed in a copy of a kernel, of Triton or CUDA C++, on the CPU; the
same call passes with the kernel as it is. More mutants of these kernels are in test_broken_kernels.py and
test_broken_cuda_kernels.py, those of CUDA C++ at edges and of rare values among them.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from conftest import DEVICE
from mutants import Mutation, cases, plant_in_cuda, plant_in_triton, seen

from gptkern.backends.cuda import emulated

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels are changed where they are interpreted and emulated", allow_module_level=True)

import emulation
import test_far_memory
import test_int8_linear_faults
import test_int8_linear_inputs
import test_layer_norm_faults
import test_layer_norm_inputs
import test_nonlinearity
import test_nonlinearity_faults
import test_nonlinearity_inputs
import test_quantize_int8_faults
import test_rms_norm_faults
import test_rms_norm_inputs
import test_rms_norm_residual
import test_rotary_faults
import test_rotary_inputs
import test_softmax_faults

BACKENDS = ("kernel_backend", "triton_backend", "cuda_backend", "backend", "kernels")


def of(test, **arguments):
    """A test as the check of a mutation; of its arguments those that no fixture gives."""
    operator = "rms_norm" if test.__module__ == "test_rms_norm_residual" else "layer_norm"

    def check(backend, monkeypatch):
        def narrow(chunks):
            if chunks:
                test_far_memory.narrow(operator, monkeypatch)

        fixtures = dict.fromkeys(BACKENDS, backend) | {
            "device": DEVICE,
            "monkeypatch": monkeypatch,
            "poisoned_memory": None,
            "narrow": narrow,
        }
        named = fixtures | arguments
        test(**{name: named[name] for name in inspect.signature(test).parameters})

    return check


def far(name, index, along):
    return of(test_far_memory.test_an_operand_of_which_one_dimension_is_far_apart, name=name, index=index, along=along)


def far_of_wide_rows(name, index, along):
    return of(test_far_memory.test_the_same_of_wide_rows, name=name, index=index, along=along)


BF16 = torch.bfloat16

# Whether a tensor is aligned Triton finds out by itself, at each launch: there is no such code to break.
TRITON = {
    "layer_norm": [
        # Layouts
        Mutation(
            "the sum's gradient by dy's stride", "backward_kernel",
            r"below \* incoming_stride", "below * dy_stride",
            of(test_layer_norm_inputs.test_every_operand_has_strides_of_its_own, width=33),
        ),
        Mutation(
            "the sum's gradient of wide rows by dy's stride", "input_gradient_wide_kernel",
            r"row \* incoming_stride", "row * dy_stride",
            of(test_layer_norm_inputs.test_every_operand_of_wide_rows_has_strides_of_its_own),
        ),
        # Edges
        Mutation(
            "the row after a tile's is left out", "forward",
            r"cdiv\(rows, block_rows\)",
            "max(cdiv(rows - 1, block_rows), 1)",
            of(test_layer_norm_faults.test_widths_and_rows_beside_tiles, edge=512),
        ),
        # Rare values
        Mutation(
            "the unrounded sum is normalised", "_forward_kernel",
            r"x = summed\n", "x = x.to(statistic) + residual.to(statistic)\n",
            of(test_layer_norm_faults.test_what_is_normalised_is_the_rounded_sum, width=64, chunks=False),
        ),
        Mutation(
            "the unrounded sum of a wide row is normalised", "_load_summed",
            r"\(x \+ residual\)\.to\(rounded\)\.to\(statistic\)", "x + residual",
            of(test_layer_norm_faults.test_what_is_normalised_is_the_rounded_sum, width=48, chunks=True),
        ),
    ],
    "rms_norm": [
        Mutation(
            "x by dy's stride in the weight's gradient of wide rows", "parameter_gradient_wide_kernel",
            r"row\[:, None\] \* x_stride", "row[:, None] * dy_stride",
            of(test_rms_norm_inputs.test_every_operand_of_wide_rows_has_strides_of_its_own),
        ),
        Mutation(
            "the last column of a whole tile is not summed", "_forward_kernel",
            r"tl\.sum\(x \* x, axis=1\)", "tl.sum(tl.where(column < BLOCK_WIDTH - 1, x * x, 0.0), axis=1)",
            of(test_rms_norm_faults.test_widths_and_rows_beside_tiles, edge=32),
        ),
        Mutation(
            "an infinity in a wide row is passed over", "_forward_wide_kernel",
            r"squares \+= x \* x", "squares += tl.minimum(x * x, 3.0e38)",
            of(test_rms_norm_faults.test_a_special_value_stays_in_its_row, width=48, chunks=True, poison=math.inf),
        ),
        Mutation(
            "the unrounded sum is normalised", "_forward_kernel",
            r"x = summed\.to\(tl\.float32\)\n", "x += residual.to(tl.float32)\n",
            of(test_rms_norm_residual.test_what_is_normalised_is_the_rounded_sum, width=64, chunks=False),
        ),
        Mutation(
            "the unrounded sum of a wide row is normalised", "_load_summed",
            r"\(x \+ residual\)\.to\(rounded\)\.to\(tl\.float32\)", "x + residual",
            of(test_rms_norm_residual.test_what_is_normalised_is_the_rounded_sum, width=48, chunks=True),
        ),
        Mutation(
            "the residual of a wide row by x's stride", "_forward_wide_kernel",
            r"residual_ptr \+= row \* residual_stride", "residual_ptr += row * x_stride",
            of(test_rms_norm_residual.test_every_operand_has_strides_of_its_own, width=37, chunks=True),
        ),
    ],
    "nonlinearity": [
        Mutation(
            "up by the gate's stride", "_forward_kernel",
            r"row \* up_stride", "row * x_stride",
            of(test_nonlinearity_inputs.test_every_operand_has_strides_of_its_own, kind="pair", width=33),
        ),
        Mutation(
            "dy by the gradient's stride", "_gradient_of_tile",
            r"row \* dy_stride", "row * gradient_stride",
            of(test_nonlinearity_inputs.test_every_operand_has_strides_of_its_own, kind="bias", width=64),
        ),
        Mutation(
            "the slope of the tanh form has no limit", "activated_with_slope",
            r"tl\.where\(tl\.abs\(z\) > _SATURATED, s, (s \+ z \* s \* rest \* inner)\)", r"\1",
            of(test_nonlinearity.test_far_away_it_is_the_identity_or_nothing, function="gelu_tanh", dtype=BF16),
        ),
        Mutation(
            "1 - s has lost its digits", "_sigmoid_and_rest",
            r"tl\.where\(t > 0, e, 1\.0\) \* reciprocal", "1.0 - tl.where(t > 0, 1.0, e) * reciprocal",
            of(test_nonlinearity.test_near_the_limit_the_slope_is_right, function="silu"),
        ),
        Mutation(
            "the row after a tile's is left out", "_forward_kernel",
            r"column, inside = _tile_of_program\(rows, width, BLOCK_ROWS",
            "column, inside = _tile_of_program(rows // BLOCK_ROWS * BLOCK_ROWS, width, BLOCK_ROWS",
            of(test_nonlinearity.test_shapes, kind="bias", shape=(9, 9), dtype=BF16),
        ),
    ],
    "softmax": [
        Mutation(
            "the mask by the input's lanes", "_forward_chunked_kernel",
            r"lane\.to\(tl\.int64\) \* mask_stride_lane", "lane.to(tl.int64) * x_stride_lane",
            of(test_softmax_faults.test_neighbours_of_one_operand_lie_apart, chunks=True, dim=1),
        ),
        Mutation(
            "dy by y's elements", "_backward_kernel",
            r"dy_lane, n, y_stride_n, dy_stride_n", "dy_lane, n, y_stride_n, y_stride_n",
            of(test_softmax_faults.test_neighbours_of_one_operand_lie_apart, chunks=False, dim=2),
        ),
        Mutation(
            "the row after a tile's is left out", "_forward_kernel",
            r"in_row = \(n < width\) & \(lane < lanes\)",
            "in_row = (n < width) & (lane < lanes - ((lanes % LANES == 1) & (LANES > 1)))",
            of(test_softmax_faults.test_widths_beside_tiles, edge=256, dtype=torch.float32),
        ),
        Mutation(
            "a causal limit at a chunk's edge hides a chunk", "last_visible",
            r"causal_rows\) \+ 1\)", "causal_rows) + tl.where(tl.max(lane % causal_rows) % 16 == 0, 0, 1))",
            of(test_softmax_faults.test_causal_limits_beside_tiles, edge=16, chunks=True),
        ),
        Mutation(
            "a causal row of -inf is NaN", "_forward_chunked_kernel",
            r"CAUSAL or MASK != NO_MASK", "MASK != NO_MASK",
            of(
                test_softmax_faults.test_a_causal_row_of_minus_infinity_is_zero,
                width=40, chunks=True, dtype=BF16,
            ),
        ),
        Mutation(
            "y is not divided by its own sum", "_backward_kernel",
            r"primitive_bitwidth == 16", "primitive_bitwidth == 8",
            of(test_softmax_faults.test_what_is_added_to_a_whole_gradient_changes_nothing, kernel=((6, 40), 1)),
        ),
    ],
    "rotary": [
        Mutation(
            "sin's rows by cos's stride", "_rotary_kernel",
            r"row_64 \* sin_stride_row", "row_64 * cos_stride_row",
            of(test_rotary_inputs.test_every_operand_has_strides_of_its_own, step=1, interleaved=False),
        ),
        Mutation(
            "dy's heads by the output's stride", "_rotary_kernel",
            r"head_64 \* x_stride_head", "head_64 * y_stride_head",
            of(test_rotary_inputs.test_every_operand_has_strides_of_its_own, step=4, interleaved=True),
        ),
        Mutation(
            "the position after a tile's is left out", "_rotary_kernel",
            r"& \(row < length\)\n", "& (row < length - (length % BLOCK_L == 1))\n",
            of(test_rotary_faults.test_lengths_beside_tiles, length=33),
        ),
    ],
    "int8_linear": [
        Mutation(
            "the weight's steps by x's stride", "_w8a16_kernel",
            r"weight_ptrs \+= tl\.full\(\(\), BLOCK_K, tl\.int64\) \* weight_stride_k",
            "weight_ptrs += tl.full((), BLOCK_K, tl.int64) * x_stride_k",
            of(test_int8_linear_faults.test_neighbours_of_one_operand_lie_apart, mode="w8a16", dtype=BF16, rows=5),
        ),
        Mutation(
            "a strided bias is read side by side", "_product",
            r"bias\.contiguous\(\)", "bias",
            of(test_int8_linear_inputs.test_strides_of_scale_and_bias, mode="w8a8"),
        ),
        Mutation(
            "the row after a tile's is left out of the sums", "_gradient_kernel",
            r"inside = \(m < M\)", "inside = (m < M - (M % BLOCK_M == 1))",
            of(test_int8_linear_faults.test_sizes_beside_tiles, mode="w8a8", edge=64),
        ),
        Mutation(
            "scales that are all zero are divided by", "_gradient_kernel",
            r"tl\.where\(largest == 0, 1\.0, largest\)", "largest",
            of(test_int8_linear_faults.test_all_scales_are_zero, dtype=BF16, rows=5, activation=None),
        ),
    ],
    "quantize_int8": [
        Mutation(
            "columns lie side by side", "_rows_kernel",
            r"\* x_column_stride", "* 1",
            of(test_quantize_int8_faults.test_no_stride_follows_from_another, step=1, dim=1),
        ),
        Mutation(
            "the last column of a whole tile is left out", "_rows_kernel",
            r"\(column < width\)", "(column < tl.minimum(width, BLOCK - 1))",
            of(test_quantize_int8_faults.test_widths_beside_tiles, edge=32, dtype=BF16),
        ),
        Mutation(
            "the row after a tile's is left out", "_rows_kernel",
            r"inside = \(row < rows\)", "inside = (row < rows - ((rows % ROWS == 1) & (ROWS > 1)))",
            of(test_quantize_int8_faults.test_widths_beside_tiles, edge=1024, dtype=BF16),
        ),
        Mutation(
            "a NaN of a wide row does not show in the scale", "_wide_row_kernel",
            r"has_nan \|= \(x != x\)\.to\(tl\.int32\)", "has_nan |= 0",
            of(
                test_quantize_int8_faults.test_a_special_value_shows_in_its_scale_alone,
                shape=(4, 20_000), dim=1, value=math.nan,
            ),
        ),
    ],
}  # fmt: skip

# Offsets past 2^31. A result of that size takes no memory as long as nobody fills it: it is not poisoned.
ROW = r"tl\.program_id\(0\)\.to\(tl\.int64\)"
TRITON_SIZES = {
    "layer_norm": [
        Mutation("rows in 32 bits", "_forward_kernel", ROW, "tl.program_id(0)", far("layer_norm 64", 0, 0)),
        Mutation(
            "wide rows of the gradient in 32 bits", "input_gradient_wide_kernel", ROW, "tl.program_id(0)",
            far_of_wide_rows("layer_norm 64", 4, 0),
        ),
    ],
    "rms_norm": [
        Mutation(
            "rows of the gradient in 32 bits", "backward_kernel",
            r"of_tile\[:, None\]\.to\(tl\.int64\)", "of_tile[:, None]",
            far("rms_norm 61", 3, 0),
        ),
    ],
    "softmax": [
        Mutation(
            "lanes in 32 bits", "_forward_kernel",
            r"lane\.to\(tl\.int64\) \* x_stride_lane", "lane * x_stride_lane",
            far("softmax over dimension 1", 0, 2),
        ),
        Mutation(
            "results in 32 bits", "position_of",
            r"group\.to\(tl\.int64\), tl", "group, tl",
            of(test_far_memory.test_results_of_softmax, last=(4,), inner=(64,), dim=1, limit=None),
        ),
    ],
    "nonlinearity": [
        Mutation(
            "rows in 32 bits", "_tile_of_program",
            r"\(tl\.program_id\(0\) // columns\)\.to\(tl\.int64\)", "(tl.program_id(0) // columns)",
            far("swiglu 61", 1, 0),
        ),
    ],
    "rotary": [
        Mutation("heads in 32 bits", "_rotary_kernel", r"head_64 \* x_stride", "head * x_stride", far("rotary", 0, 1)),
        Mutation("angles in 32 bits", "_rotary_kernel", r"row_64 \* cos_", "row * cos_", far("rotary", 1, 1)),
    ],
    "int8_linear": [
        Mutation(
            "the weight's rows in 32 bits", "_w8a8_kernel",
            r"n\.to\(tl\.int64\)\[None, :\] \* weight_stride_n", "n[None, :] * weight_stride_n",
            far(f"int8_linear w8a8, 18 rows of {BF16}", 1, 0),
        ),
        Mutation(
            "results in 32 bits", "_w8a16_kernel",
            r"m\.to\(tl\.int64\)\[None, :\] \* N", "m[None, :] * N",
            of(test_far_memory.test_results_of_int8_linear, mode="w8a16", activation=None),
        ),
    ],
    "quantize_int8": [
        Mutation("rows in 32 bits", "_rows_kernel", ROW, "tl.program_id(0)",
                 far("quantize_int8 over dimension 1", 0, 0)),
        Mutation("wide rows in 32 bits", "_wide_row_kernel", ROW, "tl.program_id(0)",
                 of(test_far_memory.test_results_of_quantize_int8, width=17_000)),
    ],
}  # fmt: skip

CUDA = {
    "layer_norm": [
        # Layouts
        Mutation(
            "the sum's gradient by dy's stride", "layer_norm_backward_kernel(",
            "(call.incoming, row, 0, shift)", "(Rows{call.incoming.start, call.dy.stride}, row, 0, shift)",
            of(test_layer_norm_inputs.test_every_operand_has_strides_of_its_own, width=33),
        ),
        # Alignment
        Mutation(
            "the residual's rows are not asked for alignment", "const bool whole = is_whole(x,",
            "is_whole(residual, *residual_stride, vector) &&", "true &&",
            of(test_layer_norm_faults.test_one_operand_is_not_aligned, which="residual", width=64),
        ),
        Mutation(
            "the sum's gradient is not asked for alignment", "const bool whole = width % vector == 0",
            "is_whole(incoming, *incoming_stride, vector) &&", "true &&",
            of(test_layer_norm_faults.test_one_operand_is_not_aligned, which="ds", width=64),
        ),
    ],
    "rms_norm": [
        Mutation(
            "rows that begin anywhere take vectors", "bool takes_vectors(int shift)",
            "% ALIGNED == 0)", "% ALIGNED >= 0)",
            of(test_rms_norm_faults.test_one_operand_is_not_aligned, which=0, width=64),
        ),
        Mutation(
            "rows of 16 bits are normalised without the residual", "void add(Raw<BYTES, V>& held",
            "held = from_floats", "if (BYTES == 4) held = from_floats",
            of(test_rms_norm_residual.test_what_is_normalised_is_the_rounded_sum, width=64, chunks=False),
        ),
        Mutation(
            "the residual by x's stride", "const auto x_stride = row_stride(x), residual_stride",
            "(residual.address), *residual_stride}", "(residual.address), *x_stride}",
            of(test_rms_norm_residual.test_every_operand_has_strides_of_its_own, width=61, chunks=False),
        ),
        Mutation(
            "the sum's gradient by dy's stride", "const auto dy_stride = row_stride(dy), incoming_stride",
            "(incoming.address), *incoming_stride}", "(incoming.address), *dy_stride}",
            of(test_rms_norm_residual.test_every_operand_has_strides_of_its_own, width=61, chunks=False),
        ),
        Mutation(
            "the sum's gradient of long rows is left out", "rms_norm_backward_long_kernel(const",
            "dy[e] += x[e];", "dy[e] += 0.0f;",
            of(test_rms_norm_residual.test_every_operand_has_strides_of_its_own, width=32_776, chunks=False),
        ),
        Mutation(
            "what a residual widens is read as the sum's own", "void load_row_of(",
            "dtype == FLOAT16", "false",
            of(test_rms_norm_residual.test_a_residual_of_another_dtype,
               dtype=torch.float32, of_residual=torch.float16, width=64),
        ),
    ],
    "softmax": [
        Mutation(
            "columns are not asked for their rows' alignment", "inline bool lanes_take_vectors(",
            "walk.in_stride_n % piece == 0;", "true;",
            of(test_softmax_faults.test_columns_of_one_operand_are_not_aligned, which=0, dim=1),
        ),
    ],
    "nonlinearity": [
        Mutation(
            "up is not asked for alignment", "void forward_of(const Tensor& x, const Tensor& up",
            "whole_vectors<V>(call.up, call.rows) &&", "true &&",
            of(test_nonlinearity_faults.test_one_operand_is_not_aligned, kind="pair", which=1),
        ),
        Mutation(
            "dy is not asked for alignment", "void backward_of(const Tensors& of",
            "whole = fits(call.dy) &&", "whole =",
            of(test_nonlinearity_faults.test_one_operand_is_not_aligned, kind="bias", which=2),
        ),
        Mutation(
            "the last of the partial sums are left out", "void backward_of(const Tensors& of",
            "int(blocks), call.width", "int(blocks) - 1, call.width",
            of(test_nonlinearity_faults.test_any_number_of_partial_sums_on_cuda, partials=5),
        ),
        Mutation(
            "the slope of the tanh form has no limit", "Activated activated_with_slope(",
            "fabsf(z) > SATURATED ? s : s +", "s +",
            of(test_nonlinearity.test_far_away_it_is_the_identity_or_nothing, function="gelu_tanh", dtype=BF16),
        ),
        Mutation(
            "up by the gate's stride", "void forward_of(const Tensor& x, const Tensor& up",
            "call.y = walked", "call.up.stride = call.x.stride, call.y = walked",
            of(test_nonlinearity_inputs.test_every_operand_has_strides_of_its_own, kind="pair", width=64),
        ),
    ],
    "rotary": [
        Mutation(
            "the angles' batches are not asked for alignment", "bool aligned(",
            "for (int d = 0; d + 1 < tensor.rank; ++d)", "for (int d = tensor.rank - 2; d + 1 < tensor.rank; ++d)",
            of(test_rotary_faults.test_one_dimension_of_one_operand_is_not_aligned,
               which=1, dim=0, dtype=BF16, interleaved=False),
        ),
    ],
    "int8_linear": [
        Mutation(
            "the bias by the scale's stride", "float2 of_column",
            "n * epilogue.bias_stride", "n * epilogue.column_scale_stride",
            of(test_int8_linear_inputs.test_every_operand_has_strides_of_its_own, mode="w8a16", step=1, rows=5),
        ),
        Mutation(
            "rows are not asked for alignment", "Operand<T> operand(",
            "uintptr_t(width | row_stride)", "uintptr_t(width)",
            of(test_int8_linear_inputs.test_every_operand_has_strides_of_its_own, mode="w8a8", step=1, rows=18),
        ),
    ],
}  # fmt: skip

CUDA_SIZES = {
    "layer_norm": [
        Mutation(
            "rows in 32 bits", "line_of(const Rows& rows",
            "row * rows.stride", "int(row * rows.stride)",
            far("layer_norm 61", 1, 0),
        ),
    ],
    "rms_norm": [
        Mutation(
            "results of long rows in 32 bits", "rms_norm_forward_long_kernel(const",
            "row * end", "int(row) * end",
            of(test_far_memory.test_results_of_rms_norm, width=32_776, wide=False, every_row_a_program=None),
        ),
    ],
    "softmax": [
        Mutation(
            "rows in 32 bits", "Offsets offsets_of(",
            "int64_t(place) * dimension.in_stride", "int(place) * int(dimension.in_stride)",
            far("softmax over dimension 2", 0, 0),
        ),
        Mutation(
            "results in 32 bits", "Offsets offsets_of(",
            "int64_t(place) * dimension.out_stride", "int(place) * int(dimension.out_stride)",
            of(test_far_memory.test_results_of_softmax, last=(4,), inner=(64,), dim=1, limit=None),
        ),
    ],
    "nonlinearity": [
        Mutation(
            "rows in 32 bits", "struct Walked {",
            "(row * stride + column)", "(int(row * stride) + column)",
            far("swiglu 61", 1, 0),
        ),
    ],
    "rotary": [
        Mutation(
            "the angles' rows in 32 bits", "void load_angles(const Angles",
            "row * of.row_stride", "int(row * of.row_stride)",
            far("rotary", 1, 1),
        ),
    ],
    "int8_linear": [
        Mutation(
            "rows of a tile in 32 bits", "void copy_rows(",
            "first + row * from.row_stride", "first + row * int(from.row_stride)",
            far(f"int8_linear w8a8, 18 rows of {BF16}", 1, 0),
        ),
    ],
    "quantize_int8": [
        Mutation(
            "columns in 32 bits", "    quantize_columns_kernel(",
            "x_column + i * width_stride))));", "x_column + i * int(width_stride)))));",
            far("quantize_int8 over dimension 0", 0, 0),
        ),
    ],
}  # fmt: skip
# Of each class one, in `make test`.
SHARP = {
    "x by dy's stride in the weight's gradient of wide rows",
    "the last column of a whole tile is left out",
    "y is not divided by its own sum",
    "angles in 32 bits",
}
compiler = pytest.mark.skipif(
    emulated.compiler() is None, reason="there is no C++ compiler for the emulated CUDA kernels"
)


def check_in_triton(operator, mutation, monkeypatch, folder):
    mutation.check("triton", monkeypatch)
    plant_in_triton(operator, mutation, folder, monkeypatch)
    with seen():
        mutation.check("triton", monkeypatch)


def check_in_cuda(operator, mutation, monkeypatch, folder, schedule):
    mutation.check("cuda", monkeypatch)
    plant_in_cuda(operator, mutation, folder, monkeypatch)
    emulation.schedule_of(schedule)
    with seen():
        mutation.check("cuda", monkeypatch)


@cases(TRITON, SHARP)
def test_the_fault_is_seen(operator, mutation, triton_backend, poisoned_memory, monkeypatch, tmp_path):
    check_in_triton(operator, mutation, monkeypatch, tmp_path)


@cases(TRITON_SIZES, SHARP)
def test_an_offset_in_32_bits_is_seen(operator, mutation, triton_backend, monkeypatch, tmp_path):
    check_in_triton(operator, mutation, monkeypatch, tmp_path)


@compiler
@cases(CUDA, ())
def test_the_fault_is_seen_on_cuda(operator, mutation, cuda_backend, poisoned_memory, monkeypatch, tmp_path, request):
    check_in_cuda(operator, mutation, monkeypatch, tmp_path, request.node.nodeid)


@compiler
@cases(CUDA_SIZES, ())
def test_an_offset_in_32_bits_is_seen_on_cuda(operator, mutation, cuda_backend, monkeypatch, tmp_path, request):
    check_in_cuda(operator, mutation, monkeypatch, tmp_path, request.node.nodeid)
