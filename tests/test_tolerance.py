"""The rule that judges every kernel, judged itself: what has to pass passes, what has to fail fails."""

from __future__ import annotations

import math

import pytest
import torch

from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close, bound, verdict, worst_error

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def a_reference() -> torch.Tensor:
    """float64 values between 1 and 2, where one rounding of a dtype is at most half its eps."""
    return 1 + torch.rand(64, dtype=torch.float64)


def test_the_factors_are_those_of_the_design():
    assert (FORWARD_FACTOR, GRADIENT_FACTOR) == (2.0, 3.0)


@dtypes
def test_the_rounded_reference_passes(dtype):
    reference = a_reference()
    assert_close("y", reference.to(dtype), reference, reference)


@dtypes
def test_an_error_of_one_rounding_passes(dtype):
    reference = a_reference()
    actual = reference.to(dtype)
    actual[3] += torch.finfo(dtype).eps
    assert_close("y", actual, reference, reference.float())


@dtypes
@pytest.mark.parametrize("factor", [FORWARD_FACTOR, GRADIENT_FACTOR])
def test_an_error_beyond_the_bound_of_a_perfect_yardstick_fails(dtype, factor):
    reference = a_reference().to(dtype).double()  # exact in dtype: the yardstick has no error of its own
    allowed = bound(reference, reference, dtype, factor)
    eps = torch.finfo(dtype).eps
    assert 0 < allowed <= 3 * eps
    actual = reference.to(dtype)
    actual[5] += 4 * eps
    with pytest.raises(AssertionError, match="dq: worst error"):
        assert_close("dq", actual, reference, reference, factor)


@dtypes
def test_an_error_of_three_roundings_fails(dtype):
    # Exact values below 0.3: adding and taking away 0.3 costs them one rounding at most.
    eps = torch.finfo(dtype).eps
    reference = (torch.rand(64, dtype=torch.float64) * 0.25).to(dtype).double()
    actual = reference.to(dtype)
    actual[7] = reference[7] + 3 * eps
    with pytest.raises(AssertionError):
        assert_close("y", actual, reference, reference)


@dtypes
def test_the_yardsticks_error_is_allowed_times_the_factor(dtype):
    reference = torch.zeros(8, dtype=torch.float64)
    yardstick = reference + 2.0**-4  # exact in every dtype: the yardstick is wrong by this much
    rounding = bound(reference, reference, dtype)
    for factor in (FORWARD_FACTOR, GRADIENT_FACTOR):
        assert bound(reference, yardstick, dtype, factor) == factor * 2.0**-4 + rounding
        assert_close("y", (reference + factor * 2.0**-4).to(dtype), reference, yardstick, factor)
        with pytest.raises(AssertionError):
            assert_close("y", (reference + (factor + 1) * 2.0**-4).to(dtype), reference, yardstick, factor)


@dtypes
def test_the_last_rounding_passes_beside_a_yardstick_without_error(dtype):
    # 0.75 + 0.3 - 0.3 is exact in every dtype, or nearly so: what the dtype may round is not left to that chance.
    eps = torch.finfo(dtype).eps
    reference = torch.tensor([0.75 + eps / 4], dtype=torch.float64)  # half-way between two numbers of the dtype
    for actual in (0.75, 0.75 + eps / 2):
        assert_close("y", torch.tensor([actual], dtype=dtype), reference, reference)
    assert bound(torch.tensor([2.0**-3], dtype=torch.float64), torch.tensor([2.0**-3]), dtype) >= eps / 16


@dtypes
def test_the_noise_is_allowed_times_the_factor_where_the_yardstick_is_better(dtype):
    reference = torch.zeros(8, dtype=torch.float64)
    rounding = bound(reference, reference, dtype)
    for factor in (FORWARD_FACTOR, GRADIENT_FACTOR):
        assert bound(reference, reference, dtype, factor, noise=2.0**-4) == factor * 2.0**-4 + rounding
        # not in addition: a yardstick that is as wrong as the noise is allows no more
        assert bound(reference, reference + 2.0**-4, dtype, factor, noise=2.0**-4) == factor * 2.0**-4 + rounding
        assert bound(reference, reference + 2.0**-3, dtype, factor, noise=2.0**-4) == factor * 2.0**-3 + rounding


def test_the_noise_is_asked_for_where_the_yardstick_does_not_do():
    reference = torch.zeros(8, dtype=torch.float64)
    asked = []

    def noise():
        asked.append(1)
        return 1.0

    assert verdict(reference.float(), reference, reference, noise=noise) == (
        0.0,
        bound(reference, reference, torch.float32),
    )
    assert_close("y", (reference + 1).float(), reference, reference + 1, noise=noise)
    assert not asked
    assert verdict((reference + 2).float(), reference, reference, noise=noise) == (2.0, 2.0)
    assert_close("y", (reference + 2).float(), reference, reference, noise=noise)
    with pytest.raises(AssertionError, match=r"worst error 3\.000e\+00 in torch\.float32; the rule allows 2\.000e\+00"):
        assert_close("y", (reference + 3).float(), reference, reference, noise=noise)
    # a NaN is wrong whatever the noise
    assert verdict(reference.float() * math.nan, reference, reference, noise=lambda: math.inf)[1] < math.inf


@dtypes
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_result_that_is_not_finite_fails_where_the_reference_is(dtype, broken):
    reference = a_reference()
    actual = reference.to(dtype)
    actual[0] = broken
    with pytest.raises(AssertionError, match="worst error inf"):
        assert_close("y", actual, reference, reference)


@dtypes
def test_nan_never_passes_wherever_it_stands(dtype):
    reference, nan = a_reference(), torch.full((64,), math.nan, dtype=torch.float64)
    for actual, expected, yardstick in [
        (nan, reference, reference),  # the result
        (reference, nan, reference),  # the reference
        (nan, nan, nan),  # all of them
        (nan, reference, nan),  # a yardstick that is NaN allows nothing
    ]:
        with pytest.raises(AssertionError):
            assert_close("y", actual.to(dtype), expected, yardstick)


@dtypes
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_yardstick_allows_no_error_of_its_own(dtype, broken):
    reference = a_reference().to(dtype).double()
    yardstick = reference.clone()
    yardstick[0] = broken
    assert bound(reference, yardstick, dtype) == bound(reference, reference, dtype)
    with pytest.raises(AssertionError):
        assert_close("y", yardstick.to(dtype), reference, yardstick)


@dtypes
def test_equal_infinities_pass_and_unequal_ones_fail(dtype):
    reference = torch.tensor([1.0, math.inf, -math.inf], dtype=torch.float64)
    assert_close("y", reference.to(dtype), reference, reference)
    with pytest.raises(AssertionError):
        assert_close("y", reference.flip(0).to(dtype), reference, reference)
    with pytest.raises(AssertionError):
        assert_close("y", torch.tensor([1.0, 2.0, -math.inf], dtype=dtype), reference, reference)


@dtypes
def test_a_reference_beyond_the_dtypes_range_does_not_widen_the_bound(dtype):
    reference = torch.tensor([1.0, 1e300], dtype=torch.float64)
    assert bound(reference, reference, dtype) < 3 * torch.finfo(dtype).eps


def test_another_shape_fails_even_where_it_would_broadcast():
    reference = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_close("y", torch.ones(1, 3), reference, reference)


def test_nothing_is_right():
    empty = torch.empty(0, 4, dtype=torch.float64)
    assert worst_error(empty.float(), empty) == 0.0
    assert_close("y", empty.float(), empty, empty)


def test_the_message_has_the_numbers_and_the_dtype():
    reference = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"dkey: worst error 1\.000e\+00 in torch\.float16; the rule allows \d"):
        assert_close("dkey", torch.ones(2, dtype=torch.float16), reference, reference)


def test_the_rule_is_evaluated_in_the_results_dtype():
    reference = a_reference()
    almost = reference + 1e-3  # less than a rounding of bfloat16, thousands of those of float32
    assert_close("y", almost.to(torch.bfloat16), reference, reference)
    with pytest.raises(AssertionError):
        assert_close("y", almost.float(), reference, reference)


def test_float64_is_judged_by_a_bound_of_its_own():
    reference = 100 * a_reference()
    assert_close("y", reference + 1e-10, reference, reference.float())
    for wrong in (reference + 1e-8, reference.float().double(), reference * math.nan):
        with pytest.raises(AssertionError):
            assert_close("y", wrong, reference, reference.float())
