"""attention: every backend against the oracle; the same bits every time; the PyTorch launchers; the log-sum-exp."""

from __future__ import annotations

import hypothesis.strategies as st
import oracle_attention
import pytest
import torch
from attention_calls import DTYPES, OF_HUGE_SCORES, OF_LOG_SUM_EXP, Shape, check_attention, dtypes, random_call
from checking import check, same_bits
from hypothesis import HealthCheck, given, settings
from layouts import of_own_strides

import gptkern
import gptkern.functional as G
from gptkern.autograd import AttentionFunction

# --- Against the oracle ---------------------------------------------------------------------------------------------


# Lengths around the sizes of tiles (16, 32, 64, 128), one below, one above; head_dims between the powers of two.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 8),
    Shape(2, 2, 2, 7, 7, 16),
    Shape(1, 2, 2, 16, 17, 40),
    Shape(1, 1, 1, 33, 65, 64),
    Shape(1, 1, 1, 65, 33, 80),
    Shape(1, 4, 2, 17, 33, 64),
    Shape(1, 4, 1, 33, 17, 8),
    Shape(1, 1, 1, 129, 129, 64),
    Shape(1, 2, 1, 64, 128, 32),
    Shape(1, 2, 2, 1, 130, 64),
    Shape(1, 2, 2, 65, 1, 8),
]


@pytest.mark.parametrize(
    "dtype, is_causal",
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False)],
    ids=["float32 full", "float32 causal", "float16 causal", "bfloat16 full"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, device, dtype, is_causal, shape):
    check_attention(*random_call(shape, device, dtype), is_causal=is_causal)


# The CUDA kernels' tiles are fixed: lengths of several of them.
CUDA_TILES = [Shape(1, 1, 1, 200, 200, 16), Shape(1, 1, 1, 70, 300, 64), Shape(1, 2, 1, 300, 130, 80)]


CUDA_TILES += [Shape(1, 4, 2, 97, 161, head_dim) for head_dim in (96, 128, 256)]


@pytest.mark.parametrize("tiles", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "shape", [Shape(1, 1, 1, 48, 48, 16), Shape(1, 1, 1, 17, 50, 16), Shape(1, 2, 1, 50, 33, 8)], ids=str
)
def test_many_tiles(triton_backend, device, poisoned_memory, tiles, is_causal, shape):
    with gptkern.backends.dispatch.load(triton_backend, "attention").forced_tiles(*tiles):
        check_attention(*random_call(shape, device), is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", CUDA_TILES, ids=str)
def test_many_tiles_on_cuda(cuda_backend, device, poisoned_memory, dtype, is_causal, shape):
    check_attention(*random_call(shape, device, dtype), is_causal=is_causal, scale=0.3)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(15, 17), (16, 15), (17, 16), (31, 32), (32, 33), (33, 31)], ids=str)
def test_lengths_beside_whole_tiles(triton_backend, device, poisoned_memory, lengths, is_causal):
    with gptkern.backends.dispatch.load(triton_backend, "attention").forced_tiles(16, 16):
        check_attention(*random_call(Shape(1, 1, 1, *lengths, 8), device), is_causal=is_causal)


# Tiles of the CUDA kernels: 128 queries and 64 keys forward, 64 and 32 backward.
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", [(31, 65), (63, 127), (65, 64), (127, 63), (128, 33), (129, 128)], ids=str)
def test_lengths_beside_whole_tiles_on_cuda(cuda_backend, device, poisoned_memory, lengths, is_causal):
    check_attention(*random_call(Shape(1, 1, 1, *lengths, 16), device), is_causal=is_causal)


@dtypes
def test_many_tiles_of_every_dtype(triton_backend, device, poisoned_memory, dtype):
    with gptkern.backends.dispatch.load(triton_backend, "attention").forced_tiles(16, 16):
        check_attention(*random_call(Shape(2, 2, 1, 33, 50, 16), device, dtype), is_causal=True, scale=0.3)


@pytest.mark.parametrize("head_dim", [24, 48, 72, 96, 128, 136, 192, 256])
def test_head_dims(backend, device, head_dim):
    shape = Shape(1, 1, 1, 18, 19, head_dim)
    check_attention(*random_call(shape, device, torch.float16), is_causal=True)
    check_attention(*random_call(shape, device))


@dtypes
@pytest.mark.parametrize("scale", [0.5, 0.01])
def test_scale(backend, device, dtype, scale):
    check_attention(*random_call(Shape(length_q=33, length_k=34), device, dtype), scale=scale, is_causal=True)


@dtypes
def test_scale_of_one(backend, device, dtype):
    call = random_call(Shape(length_q=33, length_k=34), device, dtype)
    check_attention(*call, scale=1.0, is_causal=True, floor=32 * OF_LOG_SUM_EXP if dtype == torch.float32 else 0.0)


@dtypes
@pytest.mark.parametrize("scale", [-0.25, 0.0])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_scales_at_which_pytorchs_kernel_for_the_cpu_gives_nan(kernel_backend, device, dtype, scale, is_causal):
    # The smallest product has the largest score, and -inf * 0 is NaN: a mask has to come after the scale.
    check_attention(*random_call(Shape(length_q=33, length_k=34), device, dtype), scale=scale, is_causal=is_causal)


def test_more_batches_than_a_grid_takes(cuda_backend, device, monkeypatch, tmp_path):
    batch = 65_536
    if device == "cpu":
        # Blocks are slow on the emulator: there a grid takes fewer.
        from cuda_modules import changed_module

        from gptkern.backends.cuda import emulated

        module = changed_module(
            "attention", "constexpr int LARGEST_GRID =", "int(MOST_GRID_YZ)", "2", tmp_path / "csrc"
        )
        monkeypatch.setattr(emulated, "load", lambda: module)
        batch = 5
    query, key, value = random_call(Shape(batch, 2, 1, 3, 5, 8), device)
    check_attention(query, key, value)
    # A later grid begins each tensor by its own stride, of the log-sum-exp too: no two are alike.
    query, key, value = of_own_strides(query, key, value, step=8)
    check_attention(query, key, value)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 3), (3, 1)])
def test_grouped_query_heads(backend, device, is_causal, heads, kv_heads):
    shape = Shape(1, heads, kv_heads, 19, 35, 16)
    check_attention(*random_call(shape, device), is_causal=is_causal)


def test_a_single_query_head_of_a_group_reads_its_own_key_head(backend, device):
    # Value head j holds the number j: the output is the key/value head that a query head read.
    query, key, value = random_call(Shape(1, 6, 3, 5, 9, 8), device)
    value[:] = torch.arange(3, device=device)[None, :, None, None]
    output = G.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    expected = (
        torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0], device=device)
        .to(output.dtype)[None, :, None, None]
        .expand(output.shape)
    )
    torch.testing.assert_close(output, expected)


@dtypes
def test_the_causal_limit_is_exact(backend, device, dtype):
    # Value row j is the unit vector j: the output's row i is the probabilities of query i, 0 from i + 1 on.
    length = 64
    query, key, _ = random_call(Shape(1, 1, 1, length, length, 64), device, dtype)
    value = torch.eye(length, device=device).to(dtype)[None, None]
    probabilities = G.scaled_dot_product_attention(query, key, value, is_causal=True)[0, 0]
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    assert (probabilities[~seen] == 0).all()
    assert (probabilities[seen] > 0).all()


@pytest.mark.parametrize("length_q, length_k", [(70, 70), (70, 140), (140, 70)])
def test_later_keys_change_no_earlier_query(kernel_backend, device, length_q, length_k):
    query, key, value = random_call(Shape(1, 1, 1, length_q, length_k, 16), device)
    before = G.scaled_dot_product_attention(query, key, value, is_causal=True)
    cut = 65
    key[:, :, cut:], value[:, :, cut:] = 1e4, -1e4
    after = G.scaled_dot_product_attention(query, key, value, is_causal=True)
    same_bits("queries before the cut", after[:, :, :cut], before[:, :, :cut])
    if length_q > cut:
        assert (after[:, :, cut:] != before[:, :, cut:]).any()


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "shape",
    [Shape(batch=0), Shape(heads=0, kv_heads=0), Shape(length_q=0), Shape(length_k=0), Shape(length_q=0, length_k=0)],
    ids=str,
)
def test_empty_calls(backend, device, is_causal, shape):
    query, key, value = (tensor.requires_grad_() for tensor in random_call(shape, device))
    output = G.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    assert output.shape == query.shape
    assert (output == 0).all()  # a query with no key gives zeros
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


def test_a_query_with_no_key_in_poisoned_memory(kernel_backend, device, poisoned_memory):
    query, key, value = (tensor.requires_grad_() for tensor in random_call(Shape(length_k=0), device))
    output = G.scaled_dot_product_attention(query, key, value)
    assert (output == 0).all()
    output.sum().backward()
    assert (query.grad == 0).all()


def test_keys_with_no_query_in_poisoned_memory(kernel_backend, device, poisoned_memory):
    query, key, value = (tensor.requires_grad_() for tensor in random_call(Shape(length_q=0), device))
    G.scaled_dot_product_attention(query, key, value).sum().backward()
    assert (key.grad == 0).all()
    assert (value.grad == 0).all()


def test_causal_keys_that_no_query_sees_have_gradient_zero(kernel_backend, device, poisoned_memory):
    query, key, value = random_call(Shape(1, 1, 1, 5, 200, 16), device)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    G.scaled_dot_product_attention(*leaves, is_causal=True).square().sum().backward()
    for tensor in (key, value):
        assert (tensor.grad[:, :, :5] != 0).any()
        assert (tensor.grad[:, :, 5:] == 0).all()


# --- Huge values ----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_huge_logits(backend, device, dtype, is_causal):
    # Scores of about 1e4: each row is all but one-hot, and exp of an unshifted score overflows.
    query, key, value = random_call(Shape(1, 2, 2, 33, 70, 16), device, dtype)
    output = check_attention(query * 100, key * 50, value, is_causal=is_causal, floor=OF_HUGE_SCORES)
    assert output.isfinite().all()


def test_scores_beyond_the_range_of_float16(backend, device):
    query, key, value = random_call(Shape(1, 1, 1, 17, 33, 64), device, torch.float16)
    query, key = query.sign() * 6e4, key.sign() * 6e4
    output = G.scaled_dot_product_attention(query, key, value)
    assert output.isfinite().all()


def test_values_near_the_largest_float16(backend, device):
    query, key, value = random_call(Shape(1, 1, 1, 17, 33, 16), device, torch.float16)
    output = G.scaled_dot_product_attention(query, key, value.sign() * 6e4)
    assert output.isfinite().all()
    same = G.scaled_dot_product_attention(query, key, torch.full_like(value, 6e4))
    torch.testing.assert_close(same, torch.full_like(same, 6e4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_enormous_scores(backend, device, dtype):
    # Scores of 1e8. The backward's need not round as the forward's, whose maximum was kept: another order of the sum, a
    # fused multiply-add. What is between them, some 2^-24 of a score, has to stay within the range of exp2.
    query, key, value = random_call(Shape(1, 1, 1, 17, 33, 16), device, dtype)
    leaves = [tensor.requires_grad_() for tensor in (query * 1e4, key * 1e4, value)]
    output = G.scaled_dot_product_attention(*leaves, is_causal=True)
    assert output.isfinite().all()
    output.sum().backward()
    assert leaves[2].grad.isfinite().all()
    if device == "cpu":  # 1e30, and on a GPU the forward's S - m is a fused multiply-add of its own
        with torch.no_grad():
            assert G.scaled_dot_product_attention(query * 1e15, key * 1e15, value, is_causal=True).isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_scores_far_below_zero(backend, device, is_causal):
    # All the scores of a row are about -400: exp underflows to an empty row unless the maximum is taken off first,
    # and a key past the tail, whose score would be 0, overflows the probabilities of the backward.
    query, key, value = random_call(Shape(1, 1, 1, 33, 70, 16), device)
    check_attention(10 + query, -10 + key, value, is_causal=is_causal, floor=OF_HUGE_SCORES)


def test_scores_that_grow_along_the_row(backend, device):
    # Every tile of keys has a larger maximum than those before: sums and outputs have to be rescaled each time.
    query, key, value = random_call(Shape(1, 1, 1, 20, 260, 16), device)
    query[..., 0], key[..., 0] = 8.0, torch.linspace(-20, 20, 260, device=device)
    # In 16 bits dS is rounded to 2⁻¹¹ of itself, and multiplied by keys of 20.
    floor = 0.0 if query.dtype == torch.float32 else 2 * 20 * 2**-11
    check_attention(query, key, value, floor=floor)
    check_attention(query, key.flip(2), value, floor=floor)


# --- The same bits every time, every element written ----------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_two_runs_give_the_same_bits(kernel_backend, device, dtype, is_causal):
    query, key, value = random_call(Shape(1, 2, 1, 33, 70, 16), device, dtype)
    grad_output = torch.randn(query.shape, device=device).to(dtype)
    runs = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = G.scaled_dot_product_attention(*leaves, is_causal=is_causal, enable_gqa=True)
        output.backward(grad_output)
        runs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for name, one, other in zip(("output", "dquery", "dkey", "dvalue"), *runs):
        same_bits(name, one, other)


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_every_element_is_written(kernel_backend, device, poisoned_memory, dtype, is_causal):
    for shape in (Shape(2, 2, 1, 17, 40, 40), Shape(1, 1, 1, 70, 17, 8)):
        check_attention(*random_call(shape, device, dtype), is_causal=is_causal)


# --- The PyTorch launchers and the registered ops -------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_pytorch_launchers(device, dtype, is_causal):
    for shape in (Shape(2, 4, 2, 17, 19, 16), Shape(1, 2, 2, 19, 7, 40), Shape(1, 3, 1, 33, 33, 8)):
        check(
            lambda q, k, v: AttentionFunction.apply(q, k, v, is_causal, 0.3, "torch"),
            lambda q, k, v, precision: oracle_attention.attention(
                q, k, v, is_causal=is_causal, scale=0.3, precision=precision
            ),
            *random_call(shape, device, dtype),
        )


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "shape", [Shape(1, 1, 1, 4, 5, 8), Shape(1, 2, 1, 3, 2, 8), Shape(length_k=0), Shape(length_q=0)], ids=str
)
def test_the_pytorch_launchers_gradient_is_the_difference_quotient(device, is_causal, shape):
    call = [tensor.double().requires_grad_() for tensor in random_call(shape, device)]
    assert torch.autograd.gradcheck(lambda q, k, v: AttentionFunction.apply(q, k, v, is_causal, 0.4, "torch"), call)


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_the_pytorch_launchers_and_frozen_inputs(device, need):
    check(
        lambda q, k, v: AttentionFunction.apply(q, k, v, True, 0.25, "torch"),
        lambda q, k, v, precision: oracle_attention.attention(q, k, v, is_causal=True, precision=precision),
        *random_call(Shape(1, 4, 2, 17, 19, 16), device),
        need=need,
    )


def test_the_log_sum_exp_is_the_same_on_every_backend(kernel_backend, device):
    call = random_call(Shape(2, 4, 2, 17, 35, 16), device)
    for is_causal in (False, True):
        plain = is_causal, 0.3, None, 0.0, False, None
        _, expected = torch.ops.gptkern.attention_forward(*call, *plain, "torch")
        _, actual = torch.ops.gptkern.attention_forward(*call, *plain, kernel_backend)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_parts_of_the_keys_combine_by_the_log_sum_exp(backend, device, mask):
    if mask is not None and backend == "cuda":
        pytest.skip("masks are Triton's: the CUDA kernels refuse them")
    query, key, value = random_call(Shape(2, 4, 2, 17, 67, 16), device)
    if mask == "additive":
        mask = torch.randn(2, 1, 17, 67, device=device) * 3
    elif mask == "bool":
        mask = torch.rand(2, 1, 17, 67, device=device) < 0.5
        mask[:, :, 0, :31] = False  # a query that sees no key of the first part
        mask[:, :, 1] = False  # and one that sees none at all

    def part(first, last):
        seen = None if mask is None else mask[..., first:last]
        keys = key[:, :, first:last], value[:, :, first:last]
        return AttentionFunction.apply(query, *keys, False, 0.3, backend, seen, 0.0, False, None, True)

    whole, lse = part(0, 67)
    scores = 0.3 * query.double() @ key.double().repeat_interleave(2, 1).mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    assert lse.shape == query.shape[:3] and lse.dtype == torch.float32 and not lse.requires_grad
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
    (first, lse_1), (second, lse_2) = part(0, 31), part(31, 67)
    torch.testing.assert_close(torch.logaddexp(lse_1, lse_2), lse, rtol=1e-6, atol=1e-5)
    weights = [torch.exp(each - lse).nan_to_num(0.0)[..., None] for each in (lse_1, lse_2)]
    combined = weights[0] * first + weights[1] * second
    each = 4 * torch.finfo(whole.dtype).eps  # three results of this dtype, and their sum
    torch.testing.assert_close(combined, whole.float(), rtol=each, atol=max(each, 1e-5))


# --- torch.compile and any shape ------------------------------------------------------------------------------------


@pytest.mark.deep
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape(kernel_backend, device, data):
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    kv_heads, group = data.draw(st.integers(1, 2), label="kv_heads"), data.draw(st.integers(1, 2), label="group")
    length = st.integers(1, 70)
    shape = Shape(
        1,
        kv_heads * group,
        kv_heads,
        data.draw(length, label="length_q"),
        data.draw(length, label="length_k"),
        8 * data.draw(st.integers(1, 6), label="head_dim / 8"),
    )
    call = random_call(
        shape, device, data.draw(st.sampled_from(DTYPES[:2] if kernel_backend == "cuda" else DTYPES), label="dtype")
    )
    check_attention(*call, is_causal=data.draw(st.booleans(), label="is_causal"))
