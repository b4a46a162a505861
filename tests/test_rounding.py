"""The floor of the rule: an honest float32 evaluation passes beside the luckiest yardstick, a fault does not."""

from __future__ import annotations

import functools
import math

import oracle_int8_linear
import oracle_layer_norm
import oracle_rms_norm
import oracle_softmax
import pytest
import torch

from gptkern.measuring.rounding import UNIT_ROUNDOFF, noise
from gptkern.measuring.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close, bound

SEEDS = range(20)
FEW = range(4)  # a fault is a fault with any numbers


def of(function, *tensors) -> float:
    """The noise of one float64 result."""
    return noise(lambda: (function(*(tensor.double() for tensor in tensors)),))[0]


# --- What an operation may round --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "exact",
    [
        lambda x: -x.t()[1:].abs().clone(),
        lambda x: torch.where(x > 0, x, 0.0).amax(1),
        lambda x: x.masked_fill(x > 1, -math.inf).flatten().reshape(2, -1).contiguous(),
        lambda x: torch.cat([x, x.index_select(0, torch.tensor([2, 0]))]).repeat_interleave(2, 0),
        lambda x: x.round().clamp(-128, 127) @ torch.arange(-3.0, 4.0, dtype=x.dtype),  # a product of int8
    ],
)
def test_what_rounds_nothing_has_no_noise(exact):
    assert of(exact, 10 * torch.randn(6, 7)) == 0


@pytest.mark.parametrize(
    "function", [lambda x, y: x + y, lambda x, y: x * y, lambda x, y: x / y, lambda x, y: x.sqrt()]
)
def test_one_operation_rounds_once(function):
    x, y = 1 + torch.rand(2, 4096)
    largest = function(x, y).max().item()
    assert 0.8 * UNIT_ROUNDOFF * largest < of(function, x, y) <= UNIT_ROUNDOFF * largest


def test_a_function_rounds_by_its_documented_error():
    x = torch.full((4096,), 2.0)
    assert of(torch.tanh, x) == pytest.approx(4 * UNIT_ROUNDOFF * math.tanh(2), rel=0.01)
    # 4 of the function and 2 of its argument, which is 2
    assert of(torch.exp, x) == pytest.approx(6 * UNIT_ROUNDOFF * math.exp(2), rel=0.01)


def test_operations_that_write_in_place_are_rounded_once():
    x = 1 + torch.rand(4096)
    found = of(lambda x: x.clone().add_(1.0), x)
    assert 0.8 * UNIT_ROUNDOFF * 3 / 2 < found <= UNIT_ROUNDOFF * 3


def test_complex_products_are_rounded():
    x = torch.ones(4096)
    found = of(lambda x: (torch.complex(x, 0 * x) * torch.complex(0 * x, x)).imag, x)
    assert 0.8 * UNIT_ROUNDOFF < found <= UNIT_ROUNDOFF


def test_the_noise_is_the_same_on_every_call_and_grows_with_the_values():
    x = torch.randn(5, 33)
    found = of(lambda x: x.softmax(1).sum(0), x)
    assert found == of(lambda x: x.softmax(1).sum(0), x)
    assert of(lambda x: x.sum(1), 1024 * x) == pytest.approx(1024 * of(lambda x: x.sum(1), x))


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("terms", [2, 3, 8, 64, 1000])
def test_a_sum_moves_as_float32_sums_do(terms, positive):
    """Blocks of sqrt(n), the plain form, in random order: the noise is the worst of about as many draws."""
    x = torch.rand(64, terms) if positive else torch.randn(64, terms)
    found = of(lambda x: x.sum(1), x)
    errors = []
    for _ in range(16):
        shuffled = x[:, torch.randperm(terms)]
        errors.append((in_blocks(shuffled).double() - shuffled.double().sum(1)).abs().max().item())
    assert 0.5 * max(errors) <= found <= 8 * max(errors)


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row in float32, one addition after another in blocks of sqrt(n) terms."""
    width = math.isqrt(x.shape[1] - 1) + 1
    return one_by_one(torch.stack([one_by_one(block) for block in x.split(width, 1)], 1))


def one_by_one(x: torch.Tensor) -> torch.Tensor:
    total = x[:, 0].clone()
    for column in x[:, 1:].unbind(1):
        total += column
    return total


def test_the_gradient_of_a_softmax_of_one_key_has_the_noise_of_its_terms():
    """dx = y (dy - sum(dy y)): exactly 0, and in float32 what the terms, of the size of dy, are rounded to."""
    x, dy = torch.randn(2, 50, 1).double()

    def gradient(size):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(oracle_softmax.softmax(leaf), leaf, size * dy)

    assert gradient(1)[0].abs().max() == 0
    small, large = noise(lambda: gradient(1))[0], noise(lambda: gradient(128))[0]
    assert 0.5 * UNIT_ROUNDOFF < small < 50 * UNIT_ROUNDOFF
    assert large == pytest.approx(128 * small)


def test_gradients_are_rounded_too():
    x = torch.randn(5, 33).double()

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(oracle_softmax.softmax(leaf).square().sum(), leaf)

    assert 0.1 * UNIT_ROUNDOFF < noise(gradient)[0] < 10 * UNIT_ROUNDOFF


def test_what_is_not_finite_is_left_alone():
    x = torch.tensor([[0.0, math.inf, 1.0], [math.nan, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert 0 < of(lambda x: torch.exp(x).sum(1), x) < 1e-4


# --- Honest evaluations, beside a yardstick that is exact by luck -----------------------------------------------------


def softmax(x):
    return oracle_softmax.softmax(x, scale=0.5, is_causal=True, precision=x.dtype)


def layer_norm(x):
    return oracle_layer_norm.layer_norm(x, x.shape[-1:], eps=1e-5, precision=x.dtype)[0]


def rms_norm(x):
    return oracle_rms_norm.rms_norm(x, x.shape[-1:], eps=1e-5, precision=x.dtype)


def gelu(x):
    return oracle_int8_linear.gelu(
        x @ torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).outer(torch.ones_like(x[0, :7])), "gelu"
    )


FUNCTIONS = [softmax, layer_norm, rms_norm, gelu]
# A row of one is left out: its rms_norm has a gradient that is next to nothing, and its layer_norm is 0.
SHAPES = [(1, 2), (1, 3), (3, 3), (130, 3), (5, 40), (2, 1000)]


def results(function, x, dy, precision):
    leaf = x.to(precision).requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, dy.to(precision))[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_honest_evaluation_passes_beside_a_perfect_yardstick(function, shape):
    for seed in SEEDS:
        torch.manual_seed(seed)
        x = torch.randn(shape)
        dy = torch.randn_like(function(x))
        right = results(function, x, dy, torch.float64)
        noises = functools.cache(lambda: noise(lambda: results(function, x, dy, torch.float64)))  # noqa: B023
        # The same terms in the opposite order: other roundings. (A causal mask has no other order.)
        flipped = [x, dy] if function in (softmax, gelu) else [x.flip(1), dy.flip(1)]
        for turned, inputs in ((False, [x, dy]), (True, flipped)):
            found = results(function, *inputs, torch.float32)
            for index, factor in enumerate((FORWARD_FACTOR, GRADIENT_FACTOR)):
                actual = found[index].flip(1) if turned and flipped[0] is not x else found[index]
                assert_close(f"seed {seed}", actual, right[index], right[index], factor, lambda: noises()[index])  # noqa: B023


# --- Faults, beside the worst that the floor allows -------------------------------------------------------------------


def assert_caught(right: torch.Tensor, wrong: torch.Tensor, noise: float, factor: float, margin: float = 2.0):
    """The fault is beyond the rule by `margin`, in float64, with no rounding of its own."""
    allowed = bound(right, right.float(), torch.float32, factor, noise)
    error = (wrong - right).abs().max().item()
    assert error > margin * allowed, f"the fault moves the result by {error:.2e}; the rule allows {allowed:.2e}"


def softmax_of(numerator: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return numerator.exp() / total.exp().sum(1, keepdim=True)


@pytest.mark.parametrize("width", [2, 3, 33, 1000])
def test_a_softmax_that_forgets_the_last_term(width):
    for seed in FEW:
        torch.manual_seed(seed)
        x = torch.randn(4, width).double()
        right, wrong = softmax_of(x, x), softmax_of(x, x[:, :-1])
        assert_caught(right, wrong, of(lambda x: softmax_of(x, x), x), FORWARD_FACTOR)


def test_a_wide_sum_that_forgets_the_last_term():
    x = torch.rand(4, 33_001).double() + 0.5
    assert_caught(x.sum(1), x[:, :-1].sum(1), of(lambda x: x.sum(1), x), FORWARD_FACTOR)


@pytest.mark.parametrize("shape", [(3, 3), (9, 40), (37, 37)], ids=str)
def test_a_causal_mask_that_is_off_by_one(shape):
    for seed in FEW:
        torch.manual_seed(seed)
        x, dy = torch.randn(shape), torch.randn(shape)
        right, gradient = results(softmax, x, dy, torch.float64)
        noises = noise(lambda: results(softmax, x, dy, torch.float64))  # noqa: B023

        def off_by_one(x):
            seen = torch.ones(x.shape, dtype=torch.bool).tril(1)
            return oracle_softmax.softmax(x, scale=0.5, mask=seen, precision=x.dtype)

        wrong, wrong_gradient = results(off_by_one, x, dy, torch.float64)
        assert_caught(right, wrong, noises[0], FORWARD_FACTOR, 100)
        assert_caught(gradient, wrong_gradient, noises[1], GRADIENT_FACTOR, 100)


@pytest.mark.parametrize("inside", [1, 5, 31, 70, 129, 1100])
def test_a_product_whose_scale_is_off_by_a_hundred_thousandth(inside):
    for seed in FEW:
        torch.manual_seed(seed)
        x, weight = torch.randn(17, inside), torch.randint(-128, 128, (inside, 7)).float()
        right = x.double() @ weight.double()
        found = of(lambda x: x @ weight.double(), x)  # noqa: B023
        assert_caught(right, right * (1 + 1e-5), found, FORWARD_FACTOR, 1.5)


@pytest.mark.parametrize("inside", [70, 129, 1100])
def test_a_product_that_lacks_its_last_term(inside):
    for seed in FEW:
        torch.manual_seed(seed)
        x, weight = torch.randn(17, inside).double(), torch.randn(inside, 7).double()
        found = of(lambda x: x @ weight, x)  # noqa: B023
        assert_caught(x @ weight, x[:, :-1] @ weight[:-1], found, FORWARD_FACTOR, 1000)


@pytest.mark.parametrize("rows", [2, 17, 257, 4096])
def test_a_bias_gradient_that_lacks_a_row_or_sums_in_16_bits(rows):
    for seed in FEW:
        torch.manual_seed(seed)
        dy = torch.randn(rows, 7).double()
        found = of(lambda dy: dy.sum(0), dy)
        assert_caught(dy.sum(0), dy[:-1].sum(0), found, GRADIENT_FACTOR, 100)
        assert_caught(dy.sum(0), dy.sum(0).half().double(), found, GRADIENT_FACTOR, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 33), (9, 768), (2, 16_411)], ids=str)
def test_a_layer_norm_whose_statistics_are_in_16_bits(shape, dtype):
    for seed in FEW:
        torch.manual_seed(seed)
        x = (torch.randn(shape) + 2).double()
        right, found = layer_norm(x), of(layer_norm, x)
        mean = x.mean(1, keepdim=True)
        rstd = 1 / ((x - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
        assert_caught(right, (x - mean.to(dtype).double()) * rstd, found, FORWARD_FACTOR, 10)
        assert_caught(right, (x - mean) * rstd.to(dtype).double(), found, FORWARD_FACTOR, 10)


def test_a_layer_norm_whose_gradient_forgets_a_term_or_whose_variance_is_of_width_minus_one():
    for shape in [(7, 33), (9, 768), (2, 16_411)]:
        torch.manual_seed(0)
        x, dy = torch.randn(shape) + 2, torch.randn(shape)
        right, gradient = results(layer_norm, x, dy, torch.float64)
        noises = noise(lambda: results(layer_norm, x, dy, torch.float64))  # noqa: B023
        x_hat = right
        rstd = 1 / (x.double().var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        g = dy.double()
        forgetful = rstd * (g - g.mean(1, keepdim=True))
        sound = forgetful - rstd * x_hat * (g * x_hat).mean(1, keepdim=True)
        torch.testing.assert_close(sound, gradient)
        assert_caught(gradient, forgetful, noises[1], GRADIENT_FACTOR, 100)
        unbiased = 1 / (x.double().var(1, keepdim=True) + 1e-5).sqrt()
        assert_caught(right, right * unbiased / rstd, noises[0], FORWARD_FACTOR, 3)
