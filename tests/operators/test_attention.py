"""attention: every backend against the oracle, and the twin against torch.nn.functional's."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import hypothesis.strategies as st
import oracles
import pytest
import torch
import torch.nn.functional as F
from checking import Watched, assert_compiles, check, raised_by, same_bits
from hypothesis import HealthCheck, given, settings

import gptkern
import gptkern.functional as G
from gptkern.autograd import AttentionFunction

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Shape(NamedTuple):
    """The sizes of one call."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    length_q: int = 17
    length_k: int = 17
    head_dim: int = 16

    def __str__(self):
        return f"b{self.batch} h{self.heads}/{self.kv_heads} q{self.length_q} k{self.length_k} d{self.head_dim}"


def taken(dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype; of a test that names none float32, or float16 on the CUDA kernels, which have no float32."""
    cuda = gptkern.backends.dispatch._forced() == "cuda"
    if dtype == torch.float32 and cuda:
        pytest.skip("attention in float32 is Triton's: the CUDA kernels have 16 bits alone")
    return dtype or (torch.float16 if cuda else torch.float32)


def random_tensors(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key and value of a shape."""
    b, h, h_kv, n_q, n_k, d = shape
    sizes = ((b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d))
    return [torch.randn(size).to(device=device, dtype=dtype) for size in sizes]


def random_call(shape: Shape, device: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """query, key and value that the backend takes."""
    return random_tensors(shape, device, taken(dtype))


# A log-sum-exp between 4 and 16, kept in float32, is known to 16 * 2⁻²⁴, and so is the logarithm of each probability.
OF_LOG_SUM_EXP = 1e-6
# Scores of 1e4 are only known to 1e4 * 2⁻²⁴ in float32, and so is the logarithm of each probability.
OF_HUGE_SCORES = 0.02
# PyTorch's own attention in float32 on a CPU uses an exp of about 20 roundings.
PYTORCHS_EXP = 1e-5


def check_attention(query, key, value, grad_output=None, need=None, floor=0.0, **arguments) -> torch.Tensor:
    gqa = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    if (
        query.dtype == torch.float32
        and gptkern.explain(G.scaled_dot_product_attention, query, key, value, **gqa)[0] == "torch"
    ):
        floor = max(floor, PYTORCHS_EXP)
    output = check(
        lambda q, k, v: G.scaled_dot_product_attention(q, k, v, **arguments, **gqa),
        lambda q, k, v, precision: oracles.attention(q, k, v, **arguments, precision=precision),
        query,
        key,
        value,
        grad_output=grad_output,
        need=need,
        floor=floor,
    )
    assert output.dtype == query.dtype
    return output


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
    check_attention(*random_call(Shape(batch, 2, 1, 3, 5, 8), device))


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


# --- Strides --------------------------------------------------------------------------------------------------------


@dtypes
def test_packed_projections(backend, device, dtype):
    # (batch, length, 3 * heads * head_dim), as one linear layer gives them: three views of one tensor.
    packed = torch.randn(2, 19, 3 * 2 * 16).to(device=device, dtype=taken(dtype))

    def split(packed):
        return (part.view(2, 19, 2, 16).transpose(1, 2) for part in packed.split(32, dim=2))

    check(
        lambda packed: G.scaled_dot_product_attention(*split(packed), is_causal=True),
        lambda packed, precision: oracles.attention(*split(packed), is_causal=True, precision=precision),
        packed,
    )


@dtypes
def test_strided_views(backend, device, dtype):
    query, key, value = random_call(Shape(2, 3, 3, 17, 35, 16), device, dtype)
    large = torch.randn(4, 6, 70, 48, device=device).to(dtype)
    check_attention(query.transpose(1, 2).contiguous().transpose(1, 2), key, value)
    check_attention(large[::2, ::2, 1::4, 8:24], large[::2, ::2, ::2, :16], large[1::2, 1::2, ::2, 16:32])
    # Batch and heads the other way round in memory, and an odd offset.
    swapped = torch.randn(3, 2, 35, 16, device=device).to(dtype).transpose(0, 1)
    check_attention(query, swapped, large.flatten()[1 : 1 + value.numel()].view(value.shape), is_causal=True)


@dtypes
def test_expanded_views(backend, device, dtype):
    query, key, value = random_call(Shape(2, 3, 3, 17, 19, 16), device, dtype)
    check_attention(query[:1].expand(2, 3, 17, 16), key[:, :1].expand(2, 3, 19, 16), value)
    check_attention(query[:, :, :1].expand(2, 3, 17, 16), key, value[:1, :1].expand(2, 3, 19, 16), is_causal=True)


@dtypes
def test_last_dimensions_that_are_not_contiguous(backend, device, dtype):
    query, key, value = random_call(Shape(1, 2, 2, 17, 19, 16), device, dtype)
    strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value)]
    for call in (
        (strided[0], key, value),
        (query, strided[1], strided[2]),
        (query, key, value[..., :1].expand(1, 2, 19, 16)),
        tuple(torch.cat([tensor, tensor], -1)[..., ::2] for tensor in (query, key, value)),
    ):
        try:
            check_attention(*call, is_causal=True)
        except gptkern.BackendError as error:  # a backend may leave them to PyTorch, if it says so
            assert "stride" in str(error) or "contiguous" in str(error)


def test_incoming_gradients_of_any_strides(backend, device):
    query, key, value = random_call(Shape(2, 3, 3, 17, 19, 16), device)

    def random(*size):
        return torch.randn(size, device=device).to(query.dtype)

    for grad_output in (
        random(2, 17, 3, 16).transpose(1, 2),
        random(2, 3, 16, 17).transpose(2, 3),
        random(4, 6, 34, 32)[::2, ::2, ::2, ::2],
        random(1, 3, 1, 16).expand(2, 3, 17, 16),
        random(2, 3, 17, 1).expand(2, 3, 17, 16),
        random().expand(2, 3, 17, 16),
    ):
        check_attention(query, key, value, grad_output=grad_output, is_causal=True)


@dtypes
def test_the_gradient_of_a_sum(backend, device, dtype):
    # sum().backward() hands over a 1 expanded to the whole shape, whose strides are all 0.
    query, key, value = (tensor.requires_grad_() for tensor in random_call(Shape(), device, dtype))
    G.scaled_dot_product_attention(query, key, value).sum().backward()
    # Each query hands out probabilities that sum to 1: over the keys, dvalue sums to the number of queries.
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(value.grad.sum(2), torch.full_like(value.grad.sum(2), 17), rtol=tolerance, atol=0)


def test_the_layout_of_the_result_does_not_matter_downstream(backend, device):
    query, key, value = random_call(Shape(2, 3, 3, 17, 19, 16), device)
    output = G.scaled_dot_product_attention(query, key, value)
    merged = output.transpose(1, 2).reshape(2, 17, 48)
    torch.testing.assert_close(merged[:, :, 16:32], output[:, 1])


# --- Frozen inputs and autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", [n for n in itertools.product([True, False], repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2)])
def test_frozen_inputs(backend, device, poisoned_memory, need, heads, kv_heads):
    check_attention(*random_call(Shape(1, heads, kv_heads, 17, 19, 16), device), need=need, is_causal=True)


def test_no_gradient_that_nobody_asked_for(kernel_backend, device):
    query, key, value = random_call(Shape(), device)
    weight = torch.randn(query.shape, device=device, requires_grad=True)
    with Watched() as watched:
        output = G.scaled_dot_product_attention(query, key, value)
        assert not output.requires_grad
        (output * weight).sum().backward()
        with torch.no_grad():
            assert not G.scaled_dot_product_attention(query.clone().requires_grad_(), key, value).requires_grad
    assert watched.names == ["attention_forward"] * 2


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1), (0, 2)], ids=str)
def test_a_frozen_inputs_gradient_takes_no_memory(kernel_backend, device, frozen):
    shape = Shape(1, 2, 1, 17, 19, 16)
    call = random_call(shape, device)
    for index, tensor in enumerate(call):
        tensor.requires_grad_(index not in frozen)
    with Watched() as watched:
        G.scaled_dot_product_attention(*call, enable_gqa=True).sum().backward()
    ((_, results),) = [c for c in watched.calls if c[0] == "attention_backward"]
    sizes = [0 if result is None else result.numel() for result in results[:3]]
    # key and value share a kernel: what the contract asks is that a pair of which neither is needed is not computed
    if frozen == (1, 2):
        assert sizes[1:] == [0, 0]
    if 0 in frozen:
        assert sizes[0] == 0


def test_a_frozen_input_stays_a_leaf_without_gradient(backend, device):
    query, key, value = random_call(Shape(), device)
    value.requires_grad_()
    G.scaled_dot_product_attention(query, key, value).sum().backward()
    assert query.grad is None
    assert key.grad is None
    assert value.grad is not None


def test_one_tensor_in_every_place(backend, device):
    tensor = torch.randn(1, 2, 17, 16, device=device).to(taken())
    check(
        lambda x: G.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x, precision: oracles.attention(x, x, x, is_causal=True, precision=precision),
        tensor,
    )


def test_backward_twice_with_retain_graph(backend, device):
    call = [tensor.requires_grad_() for tensor in random_call(Shape(), device)]
    output = G.scaled_dot_product_attention(*call)
    grad_output = torch.randn(output.shape, device=device)
    first = torch.autograd.grad(output, call, grad_output, retain_graph=True)
    second = torch.autograd.grad(output, call, grad_output)
    for one, other in zip(first, second):
        same_bits("the second backward", other, one)


def test_a_second_derivative_is_refused(kernel_backend, device):
    call = [tensor.requires_grad_() for tensor in random_call(Shape(), device)]
    output = G.scaled_dot_product_attention(*call)
    gradients = torch.autograd.grad(output.square().sum(), call, create_graph=True)
    plain = [tensor.detach().clone().requires_grad_() for tensor in call]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*plain).square().sum(), plain)
    for gradient, one in zip(gradients, expected):
        tolerance = 1e-5 if one.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(gradient, one, atol=tolerance, rtol=10 * tolerance)
        with pytest.raises(NotImplementedError, match="attention has no second derivative"):
            gradient.sum().backward(retain_graph=True)


def test_pytorch_gives_the_second_derivative(device):
    call = [t.double().requires_grad_() for t in random_call(Shape(1, 1, 1, 3, 4, 8), device)]
    with gptkern.backend("torch"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(G.scaled_dot_product_attention, call)


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


# --- The twin behaves as PyTorch's ----------------------------------------------------------------------------------

SAME_CALLS = {
    "positional": lambda q, k, v: ((q, k, v, None, 0.0, True), {}),
    "keywords": lambda q, k, v: ((), {"query": q, "key": k, "value": v, "is_causal": True}),
    "scale": lambda q, k, v: ((q, k, v), {"scale": 0.3}),
    "integer scale": lambda q, k, v: ((q, k, v), {"scale": 1}),
    "half": lambda q, k, v: ((q.half(), k.half(), v.half()), {}),
    "bfloat16": lambda q, k, v: ((q.bfloat16(), k.bfloat16(), v.bfloat16()), {"is_causal": True}),
    "grouped": lambda q, k, v: ((q, k[:, :1], v[:, :1]), {"enable_gqa": True}),
    "grouped by one": lambda q, k, v: ((q, k, v), {"enable_gqa": True}),
    "no batch": lambda q, k, v: ((q[:0], k[:0], v[:0]), {}),
    "no keys": lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
    "parameters": lambda q, k, v: (tuple(map(torch.nn.Parameter, (q, k, v))), {}),
    "transposed": lambda q, k, v: ((q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), {}),
}
# What kernels leave to PyTorch: under a forced kernel backend a BackendError whose message has these words.
PYTORCHS_CALLS = {
    "a mask that needs a gradient": (
        lambda q, k, v: ((q, k, v, torch.randn(17, 19, device=q.device, requires_grad=True).to(q.dtype)), {}),
        "attn_mask",
    ),
    "float64": (lambda q, k, v: ((q.double(), k.double(), v.double()), {}), "float64"),
    "three dimensions": (lambda q, k, v: ((q[0], k[0], v[0]), {}), "dimensions"),
    "two dimensions": (lambda q, k, v: ((q[0, 0], k[0, 0], v[0, 0]), {"is_causal": True}), "dimensions"),
    "five dimensions": (lambda q, k, v: ((q[None], k[None], v[None]), {}), "dimensions"),
    "head_dim 12": (lambda q, k, v: ((q[..., :12], k[..., :12], v[..., :12]), {}), "head_dim"),
    "head_dim 264": (lambda q, k, v: (tuple(t.repeat(1, 1, 1, 17)[..., :264] for t in (q, k, v)), {}), "head_dim"),
    "another head_dim of value": (lambda q, k, v: ((q, k, v[..., :8]), {}), "value|head_dim"),
}


@pytest.mark.parametrize("name", SAME_CALLS)
def test_the_same_result_as_pytorch(backend, device, name):
    args, kwargs = SAME_CALLS[name](*random_call(Shape(2, 3, 3, 17, 19, 16), device))
    if name == "transposed":
        args = [tensor[:, :17] for tensor in args]
    actual = G.scaled_dot_product_attention(*args, **kwargs)
    expected = F.scaled_dot_product_attention(*args, **kwargs)
    assert actual.requires_grad == expected.requires_grad
    assert actual.device == expected.device
    tolerance = 8 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", PYTORCHS_CALLS)
def test_what_kernels_do_not_cover_runs_on_pytorch(device, name):
    build, _ = PYTORCHS_CALLS[name]
    args, kwargs = build(*random_call(Shape(2, 3, 3, 17, 19, 16), device))
    expected = F.scaled_dot_product_attention(*args, **kwargs)
    for choice in ("torch", None):
        with gptkern.backend(choice):
            same_bits(name, G.scaled_dot_product_attention(*args, **kwargs), expected)


@pytest.mark.parametrize("name", PYTORCHS_CALLS)
def test_what_kernels_do_not_cover_is_refused_when_they_are_forced(kernel_backend, device, name):
    build, words = PYTORCHS_CALLS[name]
    args, kwargs = build(*random_call(Shape(2, 3, 3, 17, 19, 16), device))
    for function in (
        lambda: G.scaled_dot_product_attention(*args, **kwargs),
        lambda: gptkern.explain(F.scaled_dot_product_attention, *args, **kwargs),
    ):
        with pytest.raises(gptkern.BackendError, match=words) as raised:
            function()
        assert kernel_backend in str(raised.value)


def test_dropout_is_refused_by_the_cuda_kernels(cuda_backend, device):
    with pytest.raises(gptkern.BackendError, match="dropout"):
        G.scaled_dot_product_attention(*random_call(Shape(), device), dropout_p=0.1)


def test_explain_says_why_a_mask_runs_on_pytorch():
    # Meta tensors stand for a GPU's: nothing runs, and the automatic choice looks at every argument.
    query, key, value = random_call(Shape(), "meta")
    with gptkern.backend(None):
        choice = gptkern.explain(G.scaled_dot_product_attention, query, key, value)
    assert choice.backend == "torch"
    assert "meta" in choice.reason


def test_masked_rows_on_pytorch_are_pytorchs(device):
    # A query whose whole mask row is False: whatever PyTorch gives is what the twin gives.
    call = random_call(Shape(), device)
    mask = torch.rand(17, 17, device=device) > 0.5
    mask[3] = False
    for attn_mask in (mask, torch.zeros(17, 17, device=device).masked_fill(~mask, -math.inf)):
        with gptkern.backend("torch"):
            actual = G.scaled_dot_product_attention(*call, attn_mask=attn_mask)
        same_bits("masked rows", actual, F.scaled_dot_product_attention(*call, attn_mask=attn_mask))


# name: the call and what the message names on a kernel backend.
BAD_CALLS = {
    "key's dtype": (lambda f, q, k, v: f(q, k.half(), v), RuntimeError, "key|dtype"),
    "value's dtype": (lambda f, q, k, v: f(q, k, v.bfloat16()), RuntimeError, "value|dtype"),
    "key's device": (lambda f, q, k, v: f(q, k.to("meta"), v), RuntimeError, "key|device"),
    "value's device": (lambda f, q, k, v: f(q, k, v.to("meta")), RuntimeError, "value|device"),
    "batches": (lambda f, q, k, v: f(q, torch.cat([k, k[:1]]), torch.cat([v, v[:1]])), RuntimeError, "key|batch"),
    "head_dims": (lambda f, q, k, v: f(q, k[..., :8], v), RuntimeError, "key|head_dim"),
    "heads without enable_gqa": (lambda f, q, k, v: f(q, k[:, :2], v[:, :2]), RuntimeError, "key|heads|enable_gqa"),
    "heads that do not divide": (
        lambda f, q, k, v: f(q, k[:, :3], v[:, :3], enable_gqa=True),
        RuntimeError,
        "key|heads|enable_gqa",
    ),
    "one dimension": (lambda f, q, k, v: f(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), RuntimeError, "query|dimension"),
    "integers": (lambda f, q, k, v: f(q.long(), k.long(), v.long()), RuntimeError, "query|int64|dtype"),
    "mask and is_causal": (
        lambda f, q, k, v: f(q.half(), k.half(), v.half(), q[0, 0] @ k[0, 0].T > 0, is_causal=True, dropout_p=0.5),
        RuntimeError,
        "attn_mask|is_causal",
    ),
    "query is None": (lambda f, q, k, v: f(None, k, v), TypeError, "query"),
    "key is None": (lambda f, q, k, v: f(q, None, v), TypeError, "key"),
    "value is None": (lambda f, q, k, v: f(q, k, None), TypeError, "value"),
    "query is a list": (lambda f, q, k, v: f([1.0], k, v), TypeError, "query"),
    "key is a number": (lambda f, q, k, v: f(q, 1.0, v), TypeError, "key"),
    "attn_mask is a list": (lambda f, q, k, v: f(q, k, v, [True]), TypeError, "attn_mask"),
    "scale is a string": (lambda f, q, k, v: f(q, k, v, scale="x"), TypeError, "scale"),
    "an unknown keyword": (lambda f, q, k, v: f(q, k, v, causal=True), TypeError, "causal"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_raise_as_in_pytorch(backend, device, name):
    call, expected, words = BAD_CALLS[name]
    tensors = random_tensors(Shape(2, 4, 4, 17, 19, 16), device, torch.float32)
    pytorchs = raised_by(call, F.scaled_dot_product_attention, *tensors)
    assert isinstance(pytorchs, expected), f"the table is wrong about PyTorch: {pytorchs!r}"
    with pytest.raises(expected) as raised:
        call(G.scaled_dot_product_attention, *tensors)
    if backend != "torch":
        assert not isinstance(raised.value, gptkern.BackendError), "a wrong call, not one that kernels do not cover"
        raised.match(words)


def test_key_and_value_of_different_lengths(kernel_backend, device):
    query, key, value = random_call(Shape(), device)
    with pytest.raises(RuntimeError, match=r"value|key|length"):
        G.scaled_dot_product_attention(query, key, value[:, :, :-1])


def test_key_and_value_of_different_heads(kernel_backend, device):
    query, key, value = random_call(Shape(1, 4, 4), device)
    with pytest.raises(RuntimeError, match=r"value|key|heads"):
        G.scaled_dot_product_attention(query, key[:, :2], value, enable_gqa=True)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_as_in_pytorch(backend, device, autocast_dtype, dtype):
    query, key, value = (tensor.requires_grad_() for tensor in random_tensors(Shape(), device, dtype))
    with torch.autocast(device, dtype=autocast_dtype):
        output = G.scaled_dot_product_attention(query, key, value, is_causal=True)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert output.dtype == expected.dtype == autocast_dtype
    tolerance = 4 * torch.finfo(autocast_dtype).eps
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.dtype == dtype


def test_autocast_mends_mixed_dtypes_as_in_pytorch(backend, device):
    query, key, value = random_call(Shape(), device)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = G.scaled_dot_product_attention(query, key.bfloat16(), value)
        expected = F.scaled_dot_product_attention(query, key.bfloat16(), value)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, atol=0.03, rtol=0.03)


# --- The PyTorch launchers and the registered ops ---------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_the_pytorch_launchers(device, dtype, is_causal):
    for shape in (Shape(2, 4, 2, 17, 19, 16), Shape(1, 2, 2, 19, 7, 40), Shape(1, 3, 1, 33, 33, 8)):
        check(
            lambda q, k, v: AttentionFunction.apply(q, k, v, is_causal, 0.3, "torch"),
            lambda q, k, v, precision: oracles.attention(q, k, v, is_causal=is_causal, scale=0.3, precision=precision),
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
        lambda q, k, v, precision: oracles.attention(q, k, v, is_causal=True, precision=precision),
        *random_call(Shape(1, 4, 2, 17, 19, 16), device),
        need=need,
    )


def check_registered_ops(name, device, is_causal=True, attn_mask=None, dropout_p=0.0, lower_right=False, seed=None):
    query, key, value = random_call(Shape(1, 4, 2, 5, 7, 8), device, torch.float16)
    # As a packed projection hands it over: the strides of the results are part of what the fakes promise.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    forward, backward = torch.ops.gptkern.attention_forward.default, torch.ops.gptkern.attention_backward.default
    call = query, key, value, is_causal, 0.3, attn_mask, dropout_p, lower_right, seed, name
    output, lse = forward(*call)
    torch.library.opcheck(forward, call)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(backward, (torch.randn_like(output), output, lse, *needs, *call))


def test_the_registered_ops(kernel_backend, device):
    check_registered_ops(kernel_backend, device)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_registered_ops_with_a_mask_and_dropout(triton_backend, device, name):
    seed = torch.tensor([3], device=device)
    check_registered_ops(name, device, False, torch.randn(5, 7, device=device), 0.2, False, seed)


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


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_compiled_as_eager(backend, device, arguments):
    call = random_call(Shape(), device)
    assert_compiles(lambda q, k, v: G.scaled_dot_product_attention(q, k, v, **arguments), *call)


def test_compiled_with_grouped_heads_and_views(backend, device):
    query, key, value = random_call(Shape(2, 4, 2, 17, 19, 16), device, torch.float16)

    def block(q, k, v):
        y = G.scaled_dot_product_attention(q * 2, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(2, 17, 64)

    assert_compiles(block, query, key, value)


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
