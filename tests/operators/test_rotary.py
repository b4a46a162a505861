"""rotary: every backend against the oracle, and against the formulas that models have."""

from __future__ import annotations

import hypothesis.strategies as st
import oracle_rotary
import pytest
import torch
from checking import check, same_bits
from hypothesis import HealthCheck, given, settings
from layouts import guarded
from rotary_calls import (
    DTYPES,
    angles,
    check_rotary,
    dtypes_and_float64,
    for_each_element,
    layouts,
    packed,
    random,
    refuses_float64,
)

import gptkern.functional as G
from gptkern.autograd import RotaryFunction

# --- Against the oracle ---------------------------------------------------------------------------------------------


# (batch, heads, length, head_dim, rotary_dim)
SHAPES = [
    (2, 3, 9, 16, 16),
    (1, 5, 37, 64, 64),  # more slots than a CUDA block has threads; one head more than are under way at a time
    (2, 1, 3, 2, 2),
    (1, 9, 2, 80, 32),  # Phi-2; two blocks of heads
    (2, 2, 3, 96, 24),  # GPT-NeoX 20B: half of 24 is no whole vector
    (1, 2, 3, 20, 10),
    (1, 2, 5, 25, 14),
    (1, 3, 1, 256, 64),  # GPT-J, generating
    (1, 1, 2, 1100, 1080),  # wider than a Triton tile
    (1, 2, 3, 7, 0),
]


@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, device, shape, interleaved, poisoned_memory):
    *sizes, rotary_dim = shape
    cos, sin = angles(sizes[2], rotary_dim // 2, device=device)
    for dtype in (torch.bfloat16, torch.float32):
        input = guarded(random(*sizes, device=device, dtype=dtype))
        assert check_rotary(input, cos, sin, interleaved, rotary_dim=rotary_dim).is_contiguous()


@layouts
@dtypes_and_float64
def test_every_dtype(backend, device, dtype, interleaved, poisoned_memory):
    for head_dim, rotary_dim in ((32, 32), (40, 16), (9, 6)):
        input, (cos, sin) = (
            random(2, 5, 3, head_dim, device=device, dtype=dtype),
            angles(3, rotary_dim // 2, device=device),
        )
        call = dict(interleaved=interleaved, rotary_dim=rotary_dim)
        if not refuses_float64(backend, lambda: G.rotary_embedding(input, cos, sin, **call), dtype):  # noqa: B023
            check_rotary(input, cos, sin, **call)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 9, 32, 32), (2, 5, 3, 80, 32), (1, 2, 5, 25, 14)], ids=str)
def test_a_third_of_a_packed_projection(backend, device, dtype, shape, interleaved, poisoned_memory):
    *sizes, rotary_dim = shape
    input = packed(*sizes, device=device, dtype=dtype)
    output = check_rotary(input, *angles(sizes[2], rotary_dim // 2, device=device), interleaved)
    # In memory (batch, length, heads, head_dim), as the input, and dense.
    assert output.transpose(1, 2).is_contiguous()


@layouts
def test_each_sequence_has_positions_of_its_own(backend, device, interleaved):
    input = random(3, 2, 5, 16, device=device)
    cos, sin = angles(3, 5, 8, device=device)
    output = check_rotary(input, cos, sin, interleaved)
    for batch in range(3):
        alone = G.rotary_embedding(input[batch : batch + 1], cos[batch], sin[batch], interleaved=interleaved)
        same_bits(f"sequence {batch}", output[batch : batch + 1], alone)
    check_rotary(input, cos[:1], sin[:1], interleaved)


@layouts
def test_every_head_has_its_positions_angle(backend, device, interleaved):
    """The same in every head, and no two positions alike: an angle looked up by the head would show."""
    input = random(1, 1, 6, 16, device=device).expand(1, 6, 6, 16)
    cos, sin = angles(6, 8, device=device)
    output = G.rotary_embedding(input, cos, sin, interleaved=interleaved)
    for head in range(1, 6):
        same_bits(f"head {head}", output[:, head], output[:, 0])
    check_rotary(input.clone(), cos, sin, interleaved)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_an_entry_for_each_element(backend, device, dtype, interleaved, rotary_dim):
    """What Hugging Face's models make: the width is rotary_dim."""
    input = random(2, 3, 5, 16, device=device, dtype=dtype)
    cos, sin = angles(2, 5, rotary_dim // 2, device=device, dtype=dtype)
    output = check_rotary(input, cos, sin, interleaved)
    leaf = input.detach().requires_grad_()
    both = (for_each_element(tensor, interleaved) for tensor in (cos, sin))
    again = G.rotary_embedding(leaf, *both, interleaved=interleaved, rotary_dim=rotary_dim)
    same_bits("forward", again, output)
    grad_output = random(*input.shape, device=device, dtype=dtype)
    again.backward(grad_output)
    plain = input.detach().requires_grad_()
    G.rotary_embedding(plain, cos, sin, interleaved=interleaved).backward(grad_output)
    same_bits("gradient", leaf.grad, plain.grad)


def rotate_half(x):
    """Llama's, as Hugging Face writes it."""
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def rotate_every_two(x):
    """GPT-J's."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


@pytest.mark.parametrize("interleaved, rotate", [(False, rotate_half), (True, rotate_every_two)])
def test_the_formulas_of_the_models(backend, device, interleaved, rotate):
    input = random(2, 3, 5, 16, device=device)
    cos, sin = (for_each_element(tensor, interleaved) for tensor in angles(2, 5, 8, device=device))
    expected = input * cos[:, None] + rotate(input) * sin[:, None]
    torch.testing.assert_close(G.rotary_embedding(input, cos, sin, interleaved=interleaved), expected)


@layouts
def test_turned_forth_and_back(backend, device, interleaved):
    input = random(2, 3, 5, 16, device=device)
    cos, sin = angles(5, 8, device=device)
    forth = G.rotary_embedding(input, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(G.rotary_embedding(forth, cos, -sin, interleaved=interleaved), input)
    # Lengths of the pairs stay: a rotation.
    torch.testing.assert_close(forth.norm(dim=-1), input.norm(dim=-1))


@layouts
@pytest.mark.parametrize(
    "dtype, of_angles",
    [
        (torch.float16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes_of_the_angles(backend, device, dtype, of_angles, interleaved):
    input = random(1, 2, 5, 32, device=device, dtype=dtype)
    cos, sin = angles(5, 16, device=device, dtype=of_angles)
    if not refuses_float64(
        backend, lambda: G.rotary_embedding(input, cos, sin, interleaved=interleaved), dtype, of_angles
    ):
        check_rotary(input, cos, sin, interleaved)


def test_nothing_is_rounded_on_the_way(backend, device):
    """Angles in 16 bits and 16-bit inputs: still float32 inside, and one rounding."""
    input = random(1, 2, 9, 64, device=device, dtype=torch.bfloat16)
    cos, sin = angles(9, 32, device=device)
    exact = oracle_rotary.rotary_embedding(input, cos, sin)
    actual = G.rotary_embedding(input, cos, sin)
    # A correctly rounded result differs in no more than those that lie between two.
    assert (actual != exact.bfloat16()).float().mean() < 0.01


# --- Strides and alignment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8), (2, 2, 3, 0)], ids=str)
@layouts
def test_empty_inputs(backend, device, shape, interleaved):
    input = torch.randn(shape, device=device, requires_grad=True)
    cos, sin = angles(shape[2], shape[3] // 2, device=device)
    output = G.rotary_embedding(input, cos, sin, interleaved=interleaved)
    output.sum().backward()
    assert output.shape == input.grad.shape == shape


def test_special_values_stay_in_their_pair(backend, device):
    input = torch.ones(1, 1, 2, 12, device=device)
    input[0, 0, 0, 1], input[0, 0, 1, 11] = torch.nan, torch.inf
    cos, sin = angles(2, 4, device=device)
    output = G.rotary_embedding(input, cos, sin)
    assert output[0, 0, 0].isnan().nonzero().flatten().tolist() == [1, 5]
    assert output[0, 0, 1].isinf().nonzero().flatten().tolist() == [11]


def test_many_heads_and_few(kernel_backend, device):
    """Blocks of heads that are not full; the same bits whoever shares the angles."""
    input = random(1, 21, 3, 16, device=device, dtype=torch.bfloat16)
    cos, sin = angles(3, 8, device=device)
    output = check_rotary(input, cos, sin)
    for heads in (1, 2, 4, 8, 13):
        same_bits(f"{heads} heads", G.rotary_embedding(input[:, :heads], cos, sin), output[:, :heads])


def test_a_block_with_all_its_heads(cuda_backend, device):
    """So many positions that blocks are enough: then each has two rounds of heads, of which the last are not full."""
    check_rotary(random(2, 14, 70, 64, device=device), *angles(70, 32, device=device))


# --- The PyTorch launchers, the registered ops, torch.compile -------------------------------------------------------


@layouts
@dtypes_and_float64
def test_the_pytorch_launchers(device, dtype, interleaved):
    cos, sin = angles(2, 5, 6, device=device)
    check(
        lambda x: RotaryFunction.apply(x, cos, sin, 12, interleaved, "torch"),
        lambda x, precision: oracle_rotary.rotary_embedding(x, cos, sin, interleaved=interleaved, precision=precision),
        packed(2, 3, 5, 16, device=device, dtype=dtype),
    )


@layouts
def test_the_pytorch_launchers_gradient_is_the_difference_quotient(device, interleaved):
    input = random(2, 3, 5, 8, device=device, dtype=torch.float64).requires_grad_()
    cos, sin = angles(5, 3, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RotaryFunction.apply(x, cos, sin, 6, interleaved, "torch"), input)


@pytest.mark.deep
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=6)
@given(data=st.data())
def test_any_shape(kernel_backend, device, data):
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    batch, heads, length = (data.draw(st.integers(1, most), label="size") for most in (3, 10, 12))
    head_dim = data.draw(st.integers(2, 70), label="head_dim")
    pairs = data.draw(st.integers(1, head_dim // 2), label="pairs")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    make = packed if data.draw(st.booleans(), label="packed") else random
    of_batch = (batch,) if data.draw(st.booleans(), label="positions of its own") else ()
    cos, sin = angles(*of_batch, length, pairs, device=device, dtype=data.draw(st.sampled_from([dtype, torch.float32])))
    interleaved = data.draw(st.booleans(), label="interleaved")
    input = make(batch, heads, length, head_dim, device=device, dtype=dtype)
    check_rotary(input, cos, sin, interleaved, rotary_dim=2 * pairs)
