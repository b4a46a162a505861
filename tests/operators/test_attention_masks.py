"""attention under attn_mask, and under the causal biases of torch.nn.attention.bias: against the oracle and PyTorch."""

from __future__ import annotations

import math

import oracle_attention
import pytest
import torch
import torch.nn.functional as F
from checking import Watched, assert_compiles, check, raised_by, same_bits
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import gptkern
import gptkern.functional as G
from gptkern.autograd import AttentionFunction

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
B, H, Q, K, D = 2, 2, 19, 45, 16

# Exponents of up to 16 are known to 16 * 2⁻²⁴ in float32, and so are the logarithms of the probabilities; a gradient
# sums several.
OF_EXPONENTS = 3e-6


def call(device, dtype=torch.float32, batch=B, heads=H, kv_heads=H, length_q=Q, length_k=K, head_dim=D):
    sizes = (batch, heads, length_q, head_dim), (batch, kv_heads, length_k, head_dim)
    return [torch.randn(sizes[i > 0]).to(device=device, dtype=dtype) for i in range(3)]


@pytest.fixture
def small_tiles(triton_backend):
    """Two tiles of keys, the second one cut short; test_masks_in_other_tiles has many of queries too."""
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(32, 32):
        yield


def check_masked(query, key, value, mask, need=None):
    floor = OF_EXPONENTS if query.dtype == torch.float32 else 0.0
    gqa = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return check(
        lambda q, k, v: G.scaled_dot_product_attention(q, k, v, attn_mask=mask, **gqa),
        lambda q, k, v, precision: oracle_attention.attention(q, k, v, attn_mask=mask, precision=precision),
        query, key, value, floor=floor, need=need,
    )  # fmt: skip


def seen(*size) -> torch.Tensor:
    """A random bool mask of which every row has a True."""
    mask = torch.rand(size) > 0.4
    mask[..., 0] = True
    return mask


def padding() -> torch.Tensor:
    """(batch, 1, 1, length_k): the second sequence ends after 9 keys."""
    mask = torch.arange(K) < torch.tensor([K, 9])[:, None]
    return mask[:, None, None]


def hidden_by(mask: torch.Tensor, number: float, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, number)


LOWEST = torch.finfo(torch.float32).min

MASKS = {
    "bool (B, 1, 1, K)": padding,
    "bool (B, 1, Q, K)": lambda: seen(B, 1, Q, K),
    "bool (H, 1, K)": lambda: seen(H, 1, K),
    "bool of columns in memory": lambda: seen(B, 1, K, Q).logical_or(torch.arange(K)[:, None] < 2).transpose(2, 3),
    "bool, every second of a larger one": lambda: seen(B, 2, 2 * Q, 3 * K)[:, 1:, ::2, ::3],
    "padding and causal": lambda: padding() & torch.ones(Q, K, dtype=torch.bool).tril(K - Q),
    "added (Q, K)": lambda: torch.randn(Q, K),
    "added (H, 1, K)": lambda: torch.randn(H, 1, K) * 3,
    "added (B, H, Q, K)": lambda: torch.randn(B, H, Q, K),
    "added, expanded": lambda: torch.randn(1, 1, Q, 1).expand(B, H, Q, K),
    "-inf (B, 1, 1, K)": lambda: hidden_by(padding(), -math.inf),
    "the lowest number (B, 1, 1, K)": lambda: hidden_by(padding(), LOWEST),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(small_tiles, device, name):
    check_masked(*call(device), MASKS[name]().to(device))


@dtypes
@pytest.mark.parametrize("name", ["bool (B, 1, Q, K)", "bool (B, 1, 1, K)", "added (Q, K)"])
def test_masks_of_every_dtype(triton_backend, device, dtype, name):
    # An additive mask may be of the query's dtype, too.
    mask = MASKS[name]().to(device)
    check_masked(*call(device, dtype, kv_heads=1), mask.to(dtype) if mask.is_floating_point() else mask)


@dtypes
def test_a_float32_mask_for_any_query(small_tiles, device, dtype):
    check_masked(*call(device, dtype, batch=1), hidden_by(seen(Q, K), LOWEST).to(device))


@pytest.mark.parametrize("tiles", [(32, 16), (16, 16)], ids=str)
def test_masks_in_other_tiles(triton_backend, device, poisoned_memory, tiles):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(*tiles):
        query, key, value = call(device, batch=1, heads=2, kv_heads=1, length_q=35, length_k=35)
        check_masked(query, key, value, seen(1, 2, 35, 35).to(device))
        check_masked(query, key, value, torch.randn(2, 35, 35, device=device))


@pytest.mark.parametrize("name", ["bool (B, 1, Q, K)", "the lowest number (B, 1, 1, K)", "bool (B, 1, 1, K)"])
def test_the_pytorch_launchers(device, name):
    mask = MASKS[name]().to(device)
    check(
        lambda q, k, v: AttentionFunction.apply(q, k, v, False, 0.25, "torch", mask),
        lambda q, k, v, precision: oracle_attention.attention(q, k, v, attn_mask=mask, scale=0.25, precision=precision),
        *call(device, heads=4, kv_heads=2),
        floor=OF_EXPONENTS,
    )


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_frozen_inputs(triton_backend, device, need, poisoned_memory):
    query, key, value = call(device, batch=1)
    check_masked(query, key, value, seen(Q, K).to(device), need=need)
    check_masked(query, key, value, torch.randn(Q, K, device=device), need=need)


def test_hidden_probabilities_are_exactly_0(small_tiles, device):
    # Value row j is the unit vector j: the output's row i is the probabilities of query i.
    query, key, _ = call(device, batch=1, heads=1, kv_heads=1, length_q=40, length_k=64, head_dim=64)
    value = torch.eye(64, device=device)[None, None]
    visible = seen(40, 64).to(device)
    for mask in (visible, hidden_by(visible.cpu(), -math.inf).to(device), hidden_by(visible.cpu(), LOWEST).to(device)):
        probabilities = G.scaled_dot_product_attention(query, key, value, attn_mask=mask)[0, 0]
        assert (probabilities[~visible] == 0).all()
        assert (probabilities[visible] > 0).all()


def test_what_is_hidden_changes_nothing(small_tiles, device):
    query, key, value = call(device)
    mask = padding().to(device)
    before = G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    key[1, :, 9:], value[1, :, 9:] = 1e4, -1e4
    same_bits("the output", G.scaled_dot_product_attention(query, key, value, attn_mask=mask), before)


# --- Rows that see nothing ------------------------------------------------------------------------------------------


def whole_rows_hidden(kind: str) -> torch.Tensor:
    mask = seen(B, 1, Q, K)
    mask[:, :, 3] = False
    mask[1, :, 16:] = False
    return mask if kind == "bool" else hidden_by(mask, -math.inf)


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_rows_that_see_nothing_are_pytorchs(triton_backend, device, poisoned_memory, kind):
    """Zeros and zero gradients, as `math`, the plainest of PyTorch's own backends, has them."""
    mask = whole_rows_hidden(kind).to(device)
    tensors, runs = call(device), []
    for function in (G.scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(16, 32), sdpa_kernel(SDPBackend.MATH):
            output = function(*leaves, attn_mask=mask)
        output.sum().backward()
        runs.append([output.detach(), *(leaf.grad for leaf in leaves)])
    output, dquery = runs[0][:2]
    for empty in (output[:, :, 3], output[1, :, 16:], dquery[:, :, 3], dquery[1, :, 16:]):
        assert (empty == 0).all()
    for ours, pytorchs in zip(*runs):
        torch.testing.assert_close(ours, pytorchs, atol=1e-5, rtol=1e-5)
    check_masked(*tensors, mask)


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("size", [(1, K), (Q, K)], ids=str)
def test_a_mask_that_hides_everything(triton_backend, device, poisoned_memory, kind, size):
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask = mask if kind == "bool" else torch.full(size, -math.inf, device=device)
    leaves = [tensor.requires_grad_() for tensor in call(device, batch=1)]
    output = G.scaled_dot_product_attention(*leaves, attn_mask=mask)
    output.sum().backward()
    for result in (output, *(leaf.grad for leaf in leaves)):
        assert (result == 0).all()


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_row_of_the_lowest_number_is_uniform(triton_backend, device, name):
    """As in PyTorch's math: the scores are lost beside -3e38, every key counts alike, and so it is differentiated."""
    mask = hidden_by(seen(B, 1, Q, K), LOWEST).to(device)
    mask[:, :, 3], mask[1, :, 16:] = LOWEST, LOWEST
    query, key, value = call(device)
    output = check(
        lambda q, k, v: AttentionFunction.apply(q, k, v, False, 0.25, name, mask),
        lambda q, k, v, precision: oracle_attention.attention(q, k, v, attn_mask=mask, scale=0.25, precision=precision),
        query, key, value, floor=OF_EXPONENTS,
    )  # fmt: skip
    torch.testing.assert_close(output[:, :, 3], value.mean(2))


def test_a_query_without_keys_under_a_mask(triton_backend, device, poisoned_memory):
    query, key, value = (tensor.requires_grad_() for tensor in call(device, length_k=0))
    for mask in (torch.ones(Q, 0, dtype=torch.bool, device=device), torch.ones(Q, 0, device=device)):
        output = G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert (output == 0).all()
        output.sum().backward()
        assert (query.grad == 0).all()


# --- The twin behaves as PyTorch's ----------------------------------------------------------------------------------


def test_a_mask_is_read_in_place(triton_backend, device, monkeypatch):
    from gptkern.operators.attention import triton as kernels

    found = []
    of = kernels.extras_of
    monkeypatch.setattr(kernels, "extras_of", lambda *given: found.append(of(*given)) or found[-1])
    query, key, value = call(device)
    for mask in (padding().to(device), torch.randn(Q, 1, device=device).expand(B, 1, Q, K)):
        G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        read = found.pop()
        assert read.mask.data_ptr() == mask.data_ptr() and read.mask.shape == (B, H, Q, K)
        assert 0 in read.mask_strides
    # Autocast casts the mask, and only what there is of it.
    with torch.autocast(device, torch.bfloat16):
        G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert found[0].mask.dtype == torch.bfloat16
    assert found[0].mask.untyped_storage().nbytes() == 2 * Q


def test_a_mask_of_huge_strides_is_copied_without_what_it_repeats():
    from gptkern.operators.attention.triton_launch import _broadcast

    mask = torch.empty(1, device="meta").as_strided((Q, 7, K), (2**25, 0, 1))
    copied = _broadcast(mask.transpose(0, 1), (B, 7, Q, K))
    assert copied.shape == (B, 7, Q, K)
    assert copied.stride() == (0, 0, K, 1)
    # Batch and head are found by 64-bit offsets, however far apart.
    padded = torch.empty(2, 1, 3000, 3001, device="meta")[..., :3000]
    read = _broadcast(padded, (2, 7, 3000, 3000))
    assert read._base is padded._base and read.stride() == (3000 * 3001, 0, 3001, 1)


def test_batches_of_a_mask_far_apart(triton_backend, device):
    near = torch.rand(B, 1, Q, K, device=device) < 0.7
    far = torch.empty(2**31 + 8192, dtype=torch.bool, device=device).as_strided(near.shape, (2**31 + 8, 0, K, 1))
    far.copy_(near)
    query, key, value = (tensor.requires_grad_() for tensor in call(device))
    found, expected = (G.scaled_dot_product_attention(query, key, value, attn_mask=mask) for mask in (far, near))
    same_bits("output", found, expected)
    for name, *pair in zip("qkv", *(torch.autograd.grad(o.sum(), (query, key, value)) for o in (found, expected))):
        same_bits(name, *pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_as_in_pytorch(triton_backend, device, dtype):
    query, key, value = call(device)
    mask = hidden_by(seen(Q, K), -math.inf).to(device) + torch.randn(Q, K, device=device).to(dtype)
    with torch.autocast(device, torch.float16):
        output = G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, atol=4e-3, rtol=4e-3)


def test_a_mask_that_needs_a_gradient_stays_with_pytorch(kernel_backend, device):
    dtype = torch.float16
    query, key, value = call(device, dtype)
    mask = torch.randn(Q, K, device=device).to(dtype).requires_grad_()
    with pytest.raises(gptkern.BackendError, match="attn_mask"):
        G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with gptkern.backend("torch"):
        G.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert mask.grad.isfinite().all()
    if kernel_backend == "triton":
        with torch.no_grad():
            G.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def test_the_cuda_kernels_refuse_a_mask(cuda_backend, device):
    query, key, value = call(device, torch.float16)
    with pytest.raises(gptkern.BackendError, match="attn_mask"):
        G.scaled_dot_product_attention(query, key, value, attn_mask=seen(Q, K).to(device))
    with pytest.raises(gptkern.BackendError, match="lower right"):
        G.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(Q, K))


# name: the mask, what the message says of it, and the queries' shape where it is another one.
OF_SHAPE = rf"attn_mask has shape .*; it needs one that broadcasts to \({B}, {H}, {Q}, {K}\)"
BAD_MASKS = {
    "integers": (lambda: torch.ones(Q, K, dtype=torch.int32), "attn_mask is torch.int32"),
    "float64": (lambda: torch.ones(Q, K, dtype=torch.float64), "attn_mask is torch.float64"),
    "another 16-bit dtype": (lambda: torch.ones(Q, K, dtype=torch.bfloat16), "attn_mask is torch.bfloat16"),
    "too few keys": (lambda: torch.ones(Q, K - 1), OF_SHAPE),
    "too many queries": (lambda: torch.ones(Q + 1, K), OF_SHAPE),
    "another batch": (lambda: torch.ones(3, 1, Q, K, dtype=torch.bool), OF_SHAPE),
    "a dimension more": (lambda: torch.ones(2, 1, 1, Q, K), OF_SHAPE),
    "rows for one query": (lambda: torch.ones(Q, K), rf"broadcasts to \({B}, {H}, 1, {K}\)", (B, H, 1, D)),
    "batches for one text": (lambda: torch.ones(3, 1, Q, K), OF_SHAPE, (1, H, Q, D)),
    "heads for one head": (lambda: torch.ones(3, Q, K, dtype=torch.bool), OF_SHAPE, (B, 1, Q, D)),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_raise_alike_on_every_backend(backend, device, name):
    build, words, *shape = BAD_MASKS[name]
    query, key, value = call(device, torch.float16 if "16-bit" in name else torch.float32)
    if shape:
        query = torch.randn(*shape, device=device)
    mask = build().to(device)
    pytorchs = raised_by(F.scaled_dot_product_attention, query, key, value, attn_mask=mask)
    assert isinstance(pytorchs, RuntimeError), f"the table is wrong about PyTorch: {pytorchs!r}"
    with pytest.raises(RuntimeError, match=words) as raised:
        G.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert not isinstance(raised.value, gptkern.BackendError)


def test_a_mask_of_what_key_broadcasts_is_none_too_large(device):
    query, key, value = call(device)
    mask = torch.randn(B, 1, Q, K, device=device)
    output = G.scaled_dot_product_attention(query[:1], key, value, attn_mask=mask)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query[:1].expand(B, H, Q, D), key, value, mask))


@pytest.mark.parametrize("mask", ["bool", "added", "a causal bias"])
def test_a_mask_beside_is_causal_is_refused_alike_on_every_backend(backend, device, mask):
    # PyTorch's kernel for the CPU takes both in float32; its documentation, and its other kernels, do not.
    masks = {"bool": seen(Q, K), "added": torch.randn(Q, K), "a causal bias": causal_lower_right(Q, K)}
    expected = ValueError if mask == "a causal bias" else RuntimeError
    with pytest.raises(expected, match=r"attn_mask .*is_causal"):
        G.scaled_dot_product_attention(*call(device), attn_mask=masks[mask].to(device), is_causal=True)


def test_other_ranks_are_left_to_pytorch(triton_backend, device):
    query, key, value = (tensor[None] for tensor in call(device))
    with pytest.raises(gptkern.BackendError, match=r"have 5, 5 and 5 dimensions"):
        G.scaled_dot_product_attention(query, key, value, attn_mask=torch.ones(1, 1, 1, Q, K, device=device))


def test_masks_compile(triton_backend, device):
    mask = seen(B, 1, 1, K).to(device)
    assert_compiles(lambda q, k, v: G.scaled_dot_product_attention(q, k, v, attn_mask=mask), *call(device))


def test_a_second_derivative_is_refused(triton_backend, device):
    leaves = [tensor.requires_grad_() for tensor in call(device, batch=1, length_q=3, length_k=5)]
    output = G.scaled_dot_product_attention(*leaves, attn_mask=torch.randn(3, 5, device=device))
    gradient = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="attention has no second derivative"):
        gradient.sum().backward()


# --- The causal alignments ------------------------------------------------------------------------------------------


def check_lower_right(query, key, value):
    floor = OF_EXPONENTS if query.dtype == torch.float32 else 0.0
    bias = causal_lower_right(query.shape[2], key.shape[2])
    gqa = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return check(
        lambda q, k, v: G.scaled_dot_product_attention(q, k, v, attn_mask=bias, **gqa),
        lambda q, k, v, precision: oracle_attention.attention(
            q, k, v, is_causal=True, lower_right=True, precision=precision
        ),
        query, key, value, floor=floor,
    )  # fmt: skip


@pytest.mark.parametrize("tiles", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("length_q, length_k", [(1, 45), (17, 50), (33, 34), (40, 48)])
def test_lower_right(triton_backend, device, poisoned_memory, tiles, length_q, length_k):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(*tiles):
        check_lower_right(*call(device, batch=1, heads=1, kv_heads=1, length_q=length_q, length_k=length_k))


@dtypes
def test_lower_right_of_every_dtype(triton_backend, device, dtype):
    check_lower_right(*call(device, dtype, batch=1, length_q=7, length_k=33))


def test_lower_right_of_the_pytorch_launchers(device):
    check(
        lambda q, k, v: AttentionFunction.apply(q, k, v, True, 0.25, "torch", None, 0.0, True),
        lambda q, k, v, precision: oracle_attention.attention(
            q, k, v, is_causal=True, lower_right=True, precision=precision
        ),
        *call(device),
        floor=OF_EXPONENTS,
    )


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize("tiles", [(16, 16), (16, 32)], ids=str)
def test_queries_before_the_first_key_give_zeros(triton_backend, device, poisoned_memory, tiles):
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(*tiles):
        output = check_lower_right(*call(device, batch=1, length_q=50, length_k=19))
        assert (output[:, :, :31] == 0).all() and (output[:, :, 31:] != 0).any(-1).all()


@pytest.mark.parametrize("length", [1, 16, 33])
def test_equal_lengths_are_plainly_causal(kernel_backend, device, length):
    query, key, value = call(device, torch.float16, batch=1, length_q=length, length_k=length)
    expected = G.scaled_dot_product_attention(query, key, value, is_causal=True)
    for bias in (causal_lower_right(length, length), causal_upper_left(length, length)):
        same_bits("equal lengths", G.scaled_dot_product_attention(query, key, value, attn_mask=bias), expected)


def test_upper_left_is_is_causal(kernel_backend, device):
    query, key, value = call(device, torch.float16)
    expected = G.scaled_dot_product_attention(query, key, value, is_causal=True)
    actual = G.scaled_dot_product_attention(query, key, value, causal_upper_left(Q, K))
    same_bits("upper left", actual, expected)


@pytest.mark.parametrize("length_q, length_k", [(1, 9), (5, 9)])
def test_causal_biases_as_in_pytorch(backend, device, length_q, length_k):
    query, key, value = call(device, torch.float16, length_q=length_q, length_k=length_k)
    for bias in (causal_upper_left(length_q, length_k), causal_lower_right(length_q, length_k)):
        if backend == "cuda" and bias.variant.name == "LOWER_RIGHT":
            continue
        actual = G.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        with sdpa_kernel(SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        torch.testing.assert_close(actual, expected, atol=4e-3, rtol=4e-3)


def test_a_step_of_generation_is_the_last_row_of_the_whole(triton_backend, device):
    query, key, value = call(device, length_q=33, length_k=33)
    whole = G.scaled_dot_product_attention(query, key, value, is_causal=True)
    for count in (1, 4):
        last = G.scaled_dot_product_attention(query[:, :, -count:], key, value, causal_lower_right(count, 33))
        torch.testing.assert_close(last, whole[:, :, -count:], atol=1e-5, rtol=1e-5)


def test_tiles_outside_of_the_trapezoid_are_not_touched(triton_backend, device):
    # 37 queries and 50 keys in tiles of 16: query i sees the keys up to i + 13.
    query, key, value = call(device, batch=1, heads=1, kv_heads=1, length_q=37, length_k=50)
    bias = causal_lower_right(37, 50)
    with gptkern.backends.dispatch.load("triton", "attention").forced_tiles(16, 16):
        late = [tensor.clone() for tensor in (query, key, value)]
        late[1][:, :, 32:], late[2][:, :, 32:] = math.nan, math.nan
        leaves = [tensor.requires_grad_() for tensor in late]
        output = G.scaled_dot_product_attention(*leaves, attn_mask=bias)
        # Queries 0 to 15 see keys up to 28, in two tiles.
        assert output[:, :, :16].isfinite().all()
        grad_output = torch.ones_like(output)
        dquery = torch.autograd.grad(output, leaves[:1], grad_output)[0]
        assert dquery[:, :, :16].isfinite().all()
        # Keys 48 and 49 are seen by queries from 35 on, in the third tile.
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        output = G.scaled_dot_product_attention(*leaves, attn_mask=bias)
        grad_output[:, :, :32] = math.nan
        for gradient in torch.autograd.grad(output, leaves[1:], grad_output):
            assert gradient[:, :, 48:].isfinite().all()


def test_bad_causal_biases(kernel_backend, device):
    query, key, value = call(device, torch.float16)
    for bias in (causal_upper_left(Q, K), causal_lower_right(Q, K)):
        with pytest.raises(ValueError):
            F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=True)
        with pytest.raises(ValueError, match="attn_mask"):
            G.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask"):
        G.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(Q, K + 1))


def test_a_causal_bias_compiles(triton_backend, device):
    bias = causal_lower_right(Q, K)
    assert_compiles(lambda q, k, v: G.scaled_dot_product_attention(q, k, v, attn_mask=bias), *call(device))


def test_a_model_inside_of_kernels_takes_a_causal_bias(triton_backend, device):
    query, key, value = call(device)
    bias = causal_lower_right(Q, K)
    with Watched() as watched, gptkern.kernels():
        actual = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    assert watched.names == ["attention_forward"]
    same_bits("inside of kernels()", actual, G.scaled_dot_product_attention(query, key, value, attn_mask=bias))
