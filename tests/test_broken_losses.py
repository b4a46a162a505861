"""cross_entropy's kernels, broken on purpose where faults hide: the test meant for each has to see it.

As in test_broken_rows.py one expression is changed in a copy of a kernel of Triton's, on the CPU; the same call passes
with the kernel as it is.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import DEVICE
from mutants import Mutation, cases, plant_in_triton, seen

if DEVICE != "cpu":
    pytest.skip("there is a GPU: kernels are changed where they are interpreted", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

import bounds
import test_cross_entropy
import test_cross_entropy_faults as faults

import gptkern


def of(test, **arguments):
    """A test as the check of a mutation; of its arguments those that no fixture gives."""

    def check(backend, monkeypatch):
        names = inspect.signature(test).parameters
        if "narrow_rows" in names:
            faults.narrow(monkeypatch)
        fixtures = dict.fromkeys(("triton_backend", "plain_or_triton", "narrow_rows"), backend)
        fixtures |= {"device": DEVICE, "monkeypatch": monkeypatch, "poisoned_memory": None} | arguments
        test(**{name: fixtures[name] for name in names})

    return check


def every(kernel="odd rows", name="everything"):
    return of(faults.test_every_kernel, kernel=kernel, name=name)


def near_1(classes):
    test = test_cross_entropy.test_the_true_classs_gradient_where_its_probability_is_near_1
    return of(test, dtype=torch.bfloat16, rest=1e-6, classes=classes)


def rows(classes, dtype=torch.bfloat16):
    return of(test_cross_entropy.test_rows_in_steps, dtype=dtype, classes=classes)


def a_kernel(test, kernel="odd rows", **more):
    return of(test, kernel=kernel, **more)


def far(shape, along):
    return of(faults.test_an_operand_that_is_far_apart, shape=shape, along=along)


SPREAD = every("rows", "smoothed, weights")
STATS = of(
    test_cross_entropy.test_stats,
    dtype=torch.float32, shape=(7, 75), options={}, make=test_cross_entropy.classes_for,
)  # fmt: skip
OWN_STRIDES = test_cross_entropy.test_every_operand_has_strides_of_its_own
MANY_ROWS = test_cross_entropy.test_more_rows_than_one_program_sums

TRITON = {
    "cross_entropy": [
        # The sums of a row
        Mutation("the sum is not moved to the new maximum", "accumulated", r"others \* factor", "others", rows(200)),
        Mutation(
            "the target is among the others",
            "accumulated",
            r"tl\.where\(n == y, 0\.0, e\) if CLASSES else e",
            "e",
            rows(75),
        ),
        Mutation(
            "a step of -inf is subtracted",
            "accumulated",
            r"finite\(new_m\)",
            "new_m",
            a_kernel(faults.test_a_first_step_of_minus_infinity, "rows"),
        ),
        Mutation("the entropy's sum is not moved", "accumulated", r"product \+ moved \* total", "product", STATS),
        Mutation(
            "the entropy's sums of groups are not moved", "gathered", r"product \+ moved \* total", "product", STATS
        ),
        Mutation(
            "the last of equal ones counts",
            "accumulated",
            r"tiles_best > best",
            "tiles_best >= best",
            a_kernel(faults.test_the_first_of_equal_ones, "rows"),
        ),
        Mutation(
            "any group's first counts",
            "_forward_row_kernel",
            r"tl\.where\(best == row_best, first, NO_CLASS\)",
            "first",
            a_kernel(faults.test_the_first_of_equal_ones),
        ),
        Mutation("what is spread is not moved", "accumulated", r"rest \* moved", "0.0 * moved", SPREAD),
        Mutation("what groups spread is not moved", "gathered", r"spread \+ rest \* moved", "spread", SPREAD),
        # The loss and what is kept
        Mutation("a small loss loses its digits", "store_row", r"log1p\(others\)", "tl.log(1.0 + others)", near_1(80)),
        Mutation("p - 1 in a difference", "gradient_of", r"of_target, p", "p - 1.0, p", near_1(80)),
        Mutation(
            "the same of tiles",
            "load_row",
            r"-exponential\(log_others - log_total\)",
            "exponential(-log_total + tl.log(exponential(log_total) - exponential(log_others))) - 1.0",
            near_1(9),
        ),
        Mutation(
            "the z-loss of a weighed row", "store_row", r"lse \* lse \* own", "lse * lse", every("tiles", "z-loss")
        ),
        Mutation("half of the z-loss's gradient", "load_row", r"2\.0 \* z_loss", "z_loss", every("tiles", "z-loss")),
        Mutation(
            "the z-loss's gradient of a weighed row",
            "load_row",
            r"\(m \+ log_total\) \* own",
            "(m + log_total)",
            every("positions", "z-loss"),
        ),
        Mutation(
            "a softcap has the slope 1",
            "slopes",
            r"logit_scale \* \(4\.0 \* e / \(\(1\.0 \+ e\) \* \(1\.0 \+ e\)\)\)",
            "logit_scale",
            every(),
        ),
        Mutation(
            "tanh near 0 of another series",
            "tanh",
            r"-1\.0 / 3",
            "-1.0 / 4",
            of(faults.test_tanh, least=6.0, most=9.0, softcap=30.0),
        ),
        Mutation(
            "tanh near 0 in a difference",
            "tanh",
            r"tl\.abs\(v\) < 0\.25",
            "tl.abs(v) < 0.0",
            of(faults.test_tanh, least=-1.0, most=1.0, softcap=1000.0),
        ),
        Mutation(
            "probabilities are not smoothed",
            "load_rest",
            r"1\.0 - smoothing",
            "1.0",
            every("rows", "probabilities, everything"),
        ),
        # Edges
        Mutation(
            "a vector behind the last whole one",
            "vectors_of",
            r"\(classes - head\) // VECTOR \* VECTOR",
            "((classes - head) // VECTOR + 1) * VECTOR",
            rows(75),
        ),
        Mutation(
            "the last edge has all of a vector",
            "edges_of",
            r"tl\.where\(edge == 0, head, classes\)",
            "tl.where(edge == 0, head, classes + VECTOR)",
            rows(75),
        ),
        Mutation("the first edge is left out", "edges_of", r"edge == 0, head", "edge == 0, 0", rows(75)),
        Mutation(
            "the edges' maximum is left out",
            "_forward_row_kernel",
            r"tl\.maximum\(row_m, tl\.max\(m_2, axis=0\)\)",
            "row_m",
            of(faults.test_the_largest_is_in_an_edge),
        ),
        Mutation(
            "no edge of the gradient",
            "_backward_row_kernel",
            r"tl\.program_id\(1\) == 0",
            "tl.program_id(1) == 1",
            rows(17),
        ),
        Mutation(
            "a lane too many", "lanes_of", r"lane < lanes", "lane <= lanes", of(faults.test_lanes_beside_tiles, rows=33)
        ),
        # Rare values
        Mutation(
            "an ignored row has a gradient",
            "_backward_row_kernel",
            r"tl\.where\(counts, dx, 0\.0\)",
            "dx",
            a_kernel(faults.test_ignored_rows_are_zeros, "rows"),
        ),
        Mutation(
            "an ignored row of a tile has a gradient",
            "_backward_tile_kernel",
            r"tl\.where\(counts, dx, 0\.0\)",
            "dx",
            a_kernel(faults.test_ignored_rows_are_zeros, "tiles"),
        ),
        Mutation(
            "an ignored edge has a gradient",
            "_backward_row_kernel",
            r"edge_dx = tl\.where\(counts, edge_dx, 0\.0\)",
            "edge_dx = edge_dx",
            a_kernel(faults.test_ignored_rows_are_zeros),
        ),
        Mutation(
            "a class behind the last is read",
            "load_class",
            r"\(y < classes\)",
            "(y < classes * 2000)",
            a_kernel(faults.test_a_class_behind_the_last_is_not_read, "rows"),
        ),
        # Layouts, reductions
        Mutation(
            "the same gradient for each row",
            "load_row",
            r"grad_ptr \+ row",
            "grad_ptr + row * 0",
            a_kernel(faults.test_each_row_by_its_own_gradient, "rows"),
        ),
        Mutation(
            "probabilities by the logits' strides",
            "_backward_row_kernel",
            r"lane \* target_stride_lane",
            "lane * x_stride_lane",
            of(OWN_STRIDES, shape=(5, 33)),
        ),
        Mutation(
            "the gradient by the logits' strides",
            "_backward_tile_kernel",
            r"at \* dx_stride_n",
            "at * x_stride_n",
            of(OWN_STRIDES, shape=(3, 40, 5)),
        ),
        Mutation(
            "a program sums a row of the next one's",
            "_row_sums_kernel",
            r"\(program \+ 1\) \* each",
            "(program + 1) * each + 1",
            of(MANY_ROWS, rows=100, name="plain"),
        ),
        Mutation(
            "programs' sums are divided too",
            "row_sums",
            r"partial_own, rows, 1\.0, each",
            "partial_own, rows, divisor, each",
            of(MANY_ROWS, rows=100, name="probabilities"),
        ),
        # Offsets past 2^31
        Mutation(
            "rows in 32 bits",
            "_forward_row_kernel",
            r"tl\.program_id\(0\)\.to\(tl\.int64\)",
            "tl.program_id(0)",
            far((4, 80), 0),
        ),
        Mutation("classes in 32 bits", "_forward_tile_kernel", r"n\.to\(tl\.int64\)", "n", far((4, 9), 1)),
        Mutation(
            "the gradient's classes in 32 bits", "_backward_tile_kernel", r"n\.to\(tl\.int64\)", "n", far((3, 7, 5), 1)
        ),
        Mutation(
            "lanes in 32 bits",
            "lanes_of",
            r"tl\.arange\(0, LANES\)\)\.to\(tl\.int64\)",
            "tl.arange(0, LANES))",
            far((4, 9), 0),
        ),
        Mutation("groups in 32 bits", "lanes_of", r"blocks\)\.to\(tl\.int64\)", "blocks)", far((3, 7, 5), 0)),
        Mutation(
            "the target's logit in 32 bits",
            "load_class",
            r"y \* x_stride_n",
            "(y.to(tl.int32) * x_stride_n)",
            far((4, 9), 1),
        ),
    ],
}

SHARP = {"the sum is not moved to the new maximum", "p - 1 in a difference", "a vector behind the last whole one",
         "a class behind the last is read", "rows in 32 bits"}  # fmt: skip


@cases(TRITON, SHARP)
def test_a_fault_is_seen(operator, mutation, tmp_path, monkeypatch):
    with bounds.inside_bounds(), gptkern.backend("triton"):
        with monkeypatch.context() as unchanged:
            mutation.check("triton", unchanged)
        torch.manual_seed(0)
        plant_in_triton(operator, mutation, tmp_path, monkeypatch)
        with seen():
            mutation.check("triton", monkeypatch)
