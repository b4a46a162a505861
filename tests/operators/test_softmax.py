"""softmax: every backend against the oracle; the same bits every time; the PyTorch launchers."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import oracle_softmax
import pytest
import torch
import torch.nn.functional as F
from checking import check, same_bits
from hypothesis import HealthCheck, given, settings
from layouts import of_own_strides
from softmax_calls import (
    CALLS,
    DTYPES,
    arguments_of,
    check_softmax,
    dtypes,
    dtypes_and_float64,
    random,
    refuses_float64,
)

import gptkern
import gptkern.functional as G
from gptkern.autograd import SoftmaxFunction


@pytest.fixture
def narrow_chunks(kernel_backend, monkeypatch):
    """Rows wider than 16 go through the kernels for rows that registers do not hold, in chunks of 16."""
    monkeypatch.setattr(gptkern.backends.dispatch.load(kernel_backend, "softmax"), "ONE_PASS_LIMIT", 16)
    return kernel_backend


# --- Against the oracle ---------------------------------------------------------------------------------------------


@dtypes_and_float64
@pytest.mark.parametrize("width", [1, 2, 7, 16, 17, 63, 64, 65, 129, 1000])
def test_widths(backend, device, dtype, width):
    input = random(32, width, device=device, dtype=dtype)
    if refuses_float64(backend, lambda: G.softmax(input, -1), dtype):
        return
    output = check_softmax(input)
    assert output.dtype == dtype
    if width == 1:
        assert (output == 1).all()


@dtypes
@pytest.mark.parametrize("shape", [(9,), (1, 1), (3, 5, 7), (2, 1, 5, 3), (130, 3)], ids=str)
def test_every_dim(backend, device, dtype, shape):
    for dim in range(-len(shape), len(shape)):
        check_softmax(random(*shape, device=device, dtype=dtype), dim)


@dtypes
def test_a_row_wider_than_a_tile(backend, device, dtype):
    check_softmax(random(2, 5000, device=device, dtype=dtype))


def test_the_widest_row(backend, device):
    width = 262_144
    check_softmax(random(1, width, device=device), mask=torch.rand(width, device=device) > 0.5, scale=0.5)


def test_a_wide_causal_row_of_which_little_is_seen(backend, device):
    check_softmax(random(3, 40_000, device=device), is_causal=True)


@pytest.mark.parametrize("width", [16, 17, 31, 32, 33, 50])
def test_rows_in_chunks(narrow_chunks, device, width):
    check_softmax(random(4, width, device=device), scale=0.5)


@dtypes_and_float64
def test_rows_in_chunks_of_every_dtype(narrow_chunks, device, dtype):
    input = random(4, 40, device=device, dtype=dtype)
    if not refuses_float64(narrow_chunks, lambda: G.softmax(input, -1), dtype):
        check_softmax(input, mask=torch.randn(40, device=device))


@pytest.mark.parametrize("shape, dim", [((40, 2, 3), 0), ((2, 33, 5), 1), ((2, 3, 50), 2)], ids=str)
def test_rows_in_chunks_over_every_dim(narrow_chunks, device, poisoned_memory, shape, dim):
    check_softmax(random(*shape, device=device), dim)
    check_softmax(random(*shape, device=device), dim, mask=torch.randn(shape[-1], device=device))


@pytest.mark.parametrize("shape, dim", [((40, 2, 3), 0), ((2, 33, 5), 1), ((2, 3, 50), 2), ((2, 3, 48), 2)], ids=str)
def test_rows_in_chunks_of_which_every_operand_has_strides_of_its_own(narrow_chunks, device, shape, dim):
    tensors = (random(*shape, device=device) for _ in range(3))
    input, mask, grad_output = of_own_strides(*tensors, step=1 if shape[-1] % 4 else 4)
    check_softmax(input, dim, mask=mask, grad_output=grad_output)


@pytest.mark.parametrize("rows, columns", [(5, 50), (36, 35), (1, 33)])
def test_causal_rows_in_chunks(narrow_chunks, device, poisoned_memory, rows, columns):
    mask = torch.rand(columns, device=device) > 0.3
    check_softmax(random(rows, columns, device=device), is_causal=True, mask=None if rows == 1 else mask)


def test_a_row_in_chunks_whose_maximum_grows(narrow_chunks, device):
    # Every chunk has a larger maximum than those before it: what was summed has to be rescaled each time.
    # 600 elements are several chunks for each thread of a CUDA block; every chunk of Triton's has each thread.
    row = torch.linspace(-10, 10, 600 if narrow_chunks == "cuda" else 100, device=device)
    check_softmax(torch.stack([row, row.flip(0)]))
    check_softmax(torch.stack([row, row.flip(0)], 1), 0)


def test_a_row_in_chunks_of_which_the_first_are_masked(narrow_chunks, device):
    # The running maximum is -inf for several chunks: exp(-inf - (-inf)) must not become NaN.
    mask = torch.zeros(3, 60, dtype=torch.bool, device=device)
    mask[0, 55:] = True
    mask[1, 20:34] = True
    for input in (random(3, 60, device=device), random(60, 3, device=device).T):
        check_softmax(input, mask=mask)
        check_softmax(input, mask=torch.where(mask, 0.0, -math.inf))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_in_chunks(narrow_chunks, device, value):
    input = random(4, 50, device=device)
    input[1, 20], input[2] = value, -math.inf
    torch.testing.assert_close(G.softmax(input, -1), F.softmax(input, -1), equal_nan=True)


@pytest.mark.parametrize(
    "from_dtype, to_dtype",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_in_chunks_converted(narrow_chunks, device, poisoned_memory, from_dtype, to_dtype, dim):
    width = 600 if narrow_chunks == "cuda" else 40
    input = random(*((width, 3) if dim == 0 else (3, width)), device=device, dtype=from_dtype)
    check_softmax_of(input, input.to(to_dtype), dim, to_dtype)


def check_softmax_of(input, converted, dim, dtype):
    """softmax(input, dtype=dtype) is that of the converted input, and its gradient that of another rounding."""
    input, converted = input.detach().requires_grad_(), converted.detach().requires_grad_()
    output = G.softmax(input, dim, dtype=dtype)
    same_bits("forward", output, check_softmax(converted, dim))
    grad_output = torch.randn(output.shape, device=output.device).to(dtype)
    output.backward(grad_output)
    converted.grad = None
    G.softmax(converted, dim).backward(grad_output)
    tolerance = 4 * max(torch.finfo(dtype).eps, torch.finfo(input.dtype).eps)
    torch.testing.assert_close(input.grad.float(), converted.grad.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape, dim", [((2, 200, 16), 1), ((1, 40, 200), 1), ((300, 8), 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_columns_in_chunks_of_whole_vectors(narrow_chunks, device, poisoned_memory, dtype, shape, dim):
    check_softmax(random(*shape, device=device, dtype=dtype), dim)
    check_softmax(random(*shape, device=device, dtype=dtype), dim, mask=torch.rand(shape[-1], device=device) > 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [2500, 20_001])
def test_long_rows_that_begin_anywhere(kernel_backend, device, poisoned_memory, dtype, width):
    # An odd width: every row begins at another place in a vector.
    mask = torch.randn(3, width, device=device)
    check_softmax(random(3, width, device=device, dtype=dtype), mask=mask > -1)
    check_softmax(random(3, width, device=device, dtype=dtype), mask=mask, scale=0.5)


def test_a_row_that_shared_memory_holds_a_part_of(kernel_backend, device, poisoned_memory):
    check_softmax(random(1, 60_001, device=device, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty_and_scalar_inputs(backend, device, shape):
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        input = torch.randn(shape, device=device, requires_grad=True)
        output = G.softmax(input, dim)
        same_bits("forward", output, F.softmax(input, dim))
        output.sum().backward()
        assert input.grad.shape == input.shape
        assert (input.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 4, 4)], ids=str)
def test_empty_inputs_with_extensions(backend, device, shape):
    mask = torch.ones(shape[-1], dtype=torch.bool, device=device)
    for extensions in ({"mask": mask}, {"mask": mask.float()}, {"is_causal": True}, {"scale": 2.0}):
        input = torch.randn(shape, device=device, requires_grad=True)
        output = G.softmax(input, -1, **extensions)
        output.sum().backward()
        assert output.shape == input.grad.shape == input.shape


@dtypes
@pytest.mark.parametrize("scale", [0.125, -1.5, 0.0, 30.0])
def test_scale(backend, device, dtype, scale):
    check_softmax(random(32, 33, device=device, dtype=dtype), scale=scale)


@dtypes
def test_scale_over_another_dim(backend, device, dtype):
    check_softmax(random(3, 33, 4, device=device, dtype=dtype), 1, scale=0.5)


@dtypes
@pytest.mark.parametrize("rows, columns", [(17, 17), (1, 1), (5, 33), (33, 5), (1, 9), (9, 1), (65, 66)])
def test_is_causal(backend, device, dtype, rows, columns):
    output = check_softmax(random(2, rows, columns, device=device, dtype=dtype), is_causal=True, scale=0.5)
    hidden = ~torch.ones(rows, columns, dtype=torch.bool, device=device).tril()
    assert (output[:, hidden] == 0).all()


def test_is_causal_of_two_and_of_four_dimensions(backend, device):
    check_softmax(random(9, 12, device=device), is_causal=True)
    check_softmax(random(2, 3, 5, 7, device=device), 3, is_causal=True)


def check_nothing_is_read_right_of_the_causal_limit(shape, device, poison):
    clean = random(*shape, device=device)
    hidden = ~torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()
    results = []
    grad_output = torch.linspace(-1, 1, clean.numel(), device=device).view(clean.shape)
    for input, gradient in ((clean, grad_output), tuple(t.masked_fill(hidden, poison) for t in (clean, grad_output))):
        input.requires_grad_()
        output = G.softmax(input, -1, is_causal=True)
        output.backward(gradient)
        results.append((output.detach(), input.grad))
    same_bits("forward", results[1][0], results[0][0])
    same_bits("gradient", results[1][1], results[0][1])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_right_of_the_causal_limit_is_not_read(kernel_backend, device, poison):
    check_nothing_is_read_right_of_the_causal_limit((2, 9, 12), device, poison)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_right_of_the_causal_limit_is_not_read_in_chunks(narrow_chunks, device, poison):
    check_nothing_is_read_right_of_the_causal_limit((1, 19, 24), device, poison)


def check_zeros_right_of_the_causal_limit_beside_a_nan(shape, device):
    input = random(*shape, device=device)
    input[..., -2, 0] = math.nan
    input.requires_grad_()
    output = G.softmax(input, -1, is_causal=True)
    output.backward(torch.randn_like(output))
    hidden = ~torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()
    assert output.isnan().any() and input.grad.isnan().any()
    assert (output[..., hidden] == 0).all() and (input.grad[..., hidden] == 0).all()


def test_right_of_the_causal_limit_are_zeros_beside_a_nan(kernel_backend, device):
    check_zeros_right_of_the_causal_limit_beside_a_nan((2, 9, 12), device)


def test_right_of_the_causal_limit_are_zeros_beside_a_nan_in_chunks(narrow_chunks, device):
    check_zeros_right_of_the_causal_limit_beside_a_nan((1, 19, 24), device)


MASK_SHAPES = [(2, 3, 9, 17), (9, 17), (17,), (1, 17), (2, 1, 1, 17), (2, 1, 9, 1), (1, 3, 1, 17), (1,), ()]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bool_masks(backend, device, shape):
    mask = torch.rand(shape, device=device) > 0.4
    check_softmax(random(2, 3, 9, 17, device=device), mask=mask)
    check_softmax(random(2, 3, 9, 17, device=device), 1, mask=mask)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_additive_masks(backend, device, shape):
    mask = torch.randn(shape, device=device)
    check_softmax(random(2, 3, 9, 17, device=device), mask=mask, scale=0.5)
    check_softmax(random(2, 3, 9, 17, device=device), 2, mask=mask, scale=0.5)


@dtypes_and_float64
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, "the input's"], ids=str)
def test_mask_and_input_dtypes(backend, device, dtype, mask_dtype):
    mask = torch.randn(5, 33, device=device)
    mask = mask > 0 if mask_dtype == torch.bool else mask.to(dtype if mask_dtype == "the input's" else mask_dtype)
    input = random(2, 5, 33, device=device, dtype=dtype)
    if refuses_float64(backend, lambda: G.softmax(input, -1, mask=mask), dtype):
        return
    output = check_softmax(input, mask=mask, scale=0.5)
    assert output.dtype == dtype


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_any_strides(backend, device, additive):
    input = random(2, 3, 9, 17, device=device)
    scores = torch.randn(17, 9, device=device)
    for mask in (
        scores.T,
        torch.randn(18, 34, device=device)[::2, ::2],
        scores.T[0].expand(3, 9, 17),
        torch.randn(9, 1, device=device).expand(9, 17),
    ):
        check_softmax(input, mask=mask if additive else mask > 0)


@pytest.mark.parametrize("additive", [False, True])
def test_mask_together_with_is_causal(backend, device, additive):
    mask = torch.randn(9, 17, device=device)
    check_softmax(random(2, 9, 17, device=device), mask=mask if additive else mask > -0.5, is_causal=True, scale=0.25)


@dtypes
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_which_nothing_takes_part_are_zero(backend, device, dtype, additive, is_causal):
    mask = torch.rand(9, 17, device=device) > 0.3
    mask[[0, 4]] = False
    mask[:, 0] &= mask.any(1)
    if additive:
        mask = torch.zeros(9, 17, device=device).masked_fill(~mask, -math.inf)
    output = check_softmax(random(2, 9, 17, device=device, dtype=dtype), mask=mask, is_causal=is_causal)
    assert (output[:, [0, 4]] == 0).all()


def test_a_row_of_minus_infinity_is_nan_as_in_pytorch(backend, device):
    input = random(3, 9, device=device)
    input[1] = -math.inf
    same_bits("NaN", G.softmax(input, -1).isnan(), F.softmax(input, -1).isnan())


def test_a_row_of_minus_infinity_is_zero_with_a_mask(backend, device):
    input = random(3, 9, device=device)
    input[1] = -math.inf
    mask = torch.ones(9, dtype=torch.bool, device=device)
    assert (G.softmax(input, -1, mask=mask)[1] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_as_in_pytorch(backend, device, value):
    input = random(4, 9, device=device)
    input[1, 3] = value
    torch.testing.assert_close(G.softmax(input, -1), F.softmax(input, -1), equal_nan=True)


@dtypes
def test_huge_values(backend, device, dtype):
    # 6e4 is near the largest float16; exp of anything like it overflows unless the maximum is taken off first.
    input = random(5, 65, device=device) * 1e4
    input[0], input[1, ::2] = 6e4, -6e4
    output = check_softmax(input.clamp(-6e4, 6e4).to(dtype))
    assert output.isfinite().all()


@dtypes
def test_huge_values_with_a_mask(backend, device, dtype):
    input = (random(5, 65, device=device) * 1e4).clamp(-6e4, 6e4).to(dtype)
    check_softmax(input, mask=torch.rand(5, 65, device=device) > 0.5)
    # Adding -1e4 is how many models write a mask; the scale stretches beyond float16's range on the way.
    check_softmax(input, mask=torch.where(torch.rand(5, 65, device=device) > 0.5, 0.0, -1e4).to(dtype), scale=4.0)


# --- The same bits every time, every element written ----------------------------------------------------------------


@dtypes
def test_two_runs_give_the_same_bits(kernel_backend, device, dtype):
    input = random(5, 9, 65, device=device, dtype=dtype)
    grad_output = torch.randn(5, 9, 65, device=device).to(dtype)
    mask = torch.randn(9, 65, device=device)
    for dim in (1, 2):
        runs = []
        for _ in range(2):
            leaf = input.clone().requires_grad_()
            output = G.softmax(leaf, dim, scale=0.5, mask=mask)
            output.backward(grad_output)
            runs.append((output.detach(), leaf.grad))
        same_bits("forward", runs[0][0], runs[1][0])
        same_bits("gradient", runs[0][1], runs[1][1])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_every_element_is_written(kernel_backend, device, poisoned_memory, dim):
    mask = torch.rand(9, 33, device=device) > 0.5
    mask[3] = False
    check_softmax(random(5, 9, 33, device=device), dim)
    check_softmax(random(5, 9, 33, device=device), dim, mask=mask)


@pytest.mark.parametrize("shape", [(2, 9, 33), (33, 9), (3, 5000)], ids=str)
def test_every_element_is_written_right_of_the_causal_limit(kernel_backend, device, poisoned_memory, shape):
    check_softmax(random(*shape, device=device), is_causal=True)


# --- The PyTorch launchers, the registered ops, torch.compile -------------------------------------------------------


@dtypes_and_float64
@pytest.mark.parametrize("name", CALLS)
def test_the_pytorch_launchers(device, dtype, name):
    scale, mask, is_causal = arguments_of(name, device)
    for dim in (-1,) if is_causal else (-1, 0, 1):
        check(
            lambda x: SoftmaxFunction.apply(x, dim, None, scale, mask, is_causal, "torch"),  # noqa: B023
            lambda x, precision: oracle_softmax.softmax(
                x,
                dim,  # noqa: B023
                scale=scale,
                mask=mask,
                is_causal=is_causal,
                precision=precision,
            ),
            random(2, 7, 9, device=device, dtype=dtype),
        )


@pytest.mark.parametrize("name", CALLS)
def test_the_pytorch_launchers_gradient_is_the_difference_quotient(device, name):
    input = random(2, 7, 9, device=device, dtype=torch.float64).requires_grad_()
    arguments = arguments_of(name, device)
    assert torch.autograd.gradcheck(lambda x: SoftmaxFunction.apply(x, -1, None, *arguments, "torch"), input)


def test_the_pytorch_launchers_convert_the_dtype(device):
    input = random(7, 9, device=device, dtype=torch.float16).requires_grad_()
    output = SoftmaxFunction.apply(input, -1, torch.float32, 1.0, None, False, "torch")
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, F.softmax(input, -1, dtype=torch.float32))
    output.square().sum().backward()
    assert input.grad.dtype == torch.float16


@pytest.mark.deep
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape(kernel_backend, device, data):
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="shape")
    dim = data.draw(st.integers(-len(shape), len(shape) - 1), label="dim")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    extensions = {"scale": data.draw(st.floats(-3, 3), label="scale")}
    kind = data.draw(st.sampled_from([None, "bool", "additive"]), label="mask")
    if kind is not None:
        kept = data.draw(st.integers(0, len(shape)), label="mask dims")
        ones = data.draw(st.lists(st.booleans(), min_size=kept, max_size=kept), label="broadcast")
        mask_shape = [1 if one else size for one, size in zip(ones, shape[len(shape) - kept :])]
        mask = torch.randn(mask_shape, device=device)
        extensions["mask"] = mask > -0.3 if kind == "bool" else mask
    if len(shape) > 1 and dim in (-1, len(shape) - 1):
        extensions["is_causal"] = data.draw(st.booleans(), label="is_causal")
    check_softmax(random(*shape, device=device, dtype=dtype), dim, **extensions)
