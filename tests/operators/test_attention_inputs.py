"""attention: what it takes: strides, frozen inputs, dtypes, PyTorch's calls, its errors, registered ops, compile."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracle_attention
import pytest
import torch
import torch.nn.functional as F
from attention_calls import DTYPES, Shape, check_attention, dtypes, random_call, random_tensors, taken
from checking import Watched, assert_compiles, check, raised_by, same_bits
from layouts import of_own_strides

import gptkern
import gptkern.functional as G

# --- Strides --------------------------------------------------------------------------------------------------------


@dtypes
def test_packed_projections(backend, device, dtype):
    # (batch, length, 3 * heads * head_dim), as one linear layer gives them: three views of one tensor.
    packed = torch.randn(2, 19, 3 * 2 * 16).to(device=device, dtype=taken(dtype))

    def split(packed):
        return (part.view(2, 19, 2, 16).transpose(1, 2) for part in packed.split(32, dim=2))

    check(
        lambda packed: G.scaled_dot_product_attention(*split(packed), is_causal=True),
        lambda packed, precision: oracle_attention.attention(*split(packed), is_causal=True, precision=precision),
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


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_every_operand_has_strides_of_its_own(kernel_backend, device, is_causal):
    query, key, value = random_call(Shape(2, 4, 2, 17, 35, 16), device)
    *call, grad_output = of_own_strides(query, key, value, torch.randn_like(query), step=8)
    check_attention(*call, grad_output=grad_output, is_causal=is_causal)


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
        lambda x, precision: oracle_attention.attention(x, x, x, is_causal=True, precision=precision),
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


# name: the call, PyTorch's error, and what the message names.
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
    "enable_gqa is an int": (lambda f, q, k, v: f(q, k, v, enable_gqa=1), TypeError, "enable_gqa"),
    "enable_gqa of NumPy": (lambda f, q, k, v: f(q, k, v, enable_gqa=np.bool_(True)), TypeError, "enable_gqa"),
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
    assert not isinstance(raised.value, gptkern.BackendError), "a wrong call, not one that kernels do not cover"
    raised.match(words)


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(1), torch.tensor(0.5), True], ids=repr)
def test_numbers_of_numpy_and_tensors_of_one(backend, device, number):
    call = random_call(Shape(), device)
    plain = G.scaled_dot_product_attention(*call, scale=float(number))
    same_bits("scale", G.scaled_dot_product_attention(*call, scale=number), plain)
    F.scaled_dot_product_attention(*call, scale=number, dropout_p=number)
    for zero in (np.float32(0), torch.tensor(0.0)):
        same_bits("dropout_p", G.scaled_dot_product_attention(*call, scale=number, dropout_p=zero), plain)


@pytest.mark.parametrize("number", [torch.ones(1), torch.tensor(1.0, requires_grad=True), np.array(1.0), 1j], ids=repr)
def test_what_is_no_number(triton_backend, device, number):
    for name in ("scale", "dropout_p"):
        for function in (F.scaled_dot_product_attention, G.scaled_dot_product_attention):
            error = raised_by(function, *random_call(Shape(), device), **{name: number})
            assert isinstance(error, TypeError) and name in str(error)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_fewer_than_two_dimensions(triton_backend, device, dtype, needs_grad):
    tensors = random_tensors(Shape(2, 2, 2, 6, 9, 8), device, dtype)
    query, key, value = (tensor.requires_grad_(needs_grad) for tensor in tensors)
    for mask in (torch.zeros((), device=device), torch.randn(9, device=device), torch.arange(9, device=device) > 3):
        for name in ("torch", triton_backend):
            with gptkern.backend(name):
                output = G.scaled_dot_product_attention(query, key, value, mask)
                expected = G.scaled_dot_product_attention(query, key, value, mask.expand(6, 9))
            same_bits(name, output, expected)


# what is given besides query, key and value: the error's type and text, the same on every backend
NAMED = {
    "one dimension": (lambda d: dict(attn_mask=torch.zeros(8, device=d)), RuntimeError, "attn_mask has shape (8,)"),
    "bool": (lambda d: dict(attn_mask=torch.ones(8, device=d) > 0), RuntimeError, "attn_mask has shape (8,)"),
    "five": (lambda d: dict(attn_mask=torch.zeros(1, 2, 2, 6, 9, device=d)), RuntimeError, "has shape (1, 2, 2, 6, 9)"),
    "five, bool": (lambda d: dict(attn_mask=torch.ones(1, 1, 1, 6, 9, device=d) > 0), RuntimeError, "(1, 1, 1, 6, 9)"),
    "on meta": (lambda d: dict(attn_mask=torch.zeros(6, 9, device="meta")), RuntimeError, "attn_mask is on meta"),
    "bool on meta": (lambda d: dict(attn_mask=torch.ones(6, 9, device="meta") > 0), RuntimeError, "mask is on meta"),
    "a list": (lambda d: dict(attn_mask=[0.0]), TypeError, "attn_mask is list"),
    "below 0": (lambda d: dict(dropout_p=-0.1), RuntimeError, "dropout_p is -0.1"),
    "above 1": (lambda d: dict(dropout_p=2), RuntimeError, "dropout_p is 2.0"),
    "no dropout_p": (lambda d: dict(dropout_p=None), TypeError, "dropout_p is NoneType"),
    "an int": (lambda d: dict(enable_gqa=1), TypeError, "enable_gqa is int"),
    "no bool": (lambda d: dict(is_causal=None), TypeError, "is_causal is NoneType"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_wrong_option_is_named(backend, device, name, dtype):
    given, error, words = NAMED[name]
    call = random_tensors(Shape(2, 2, 2, 6, 9, 8), device, dtype)
    raised = raised_by(G.scaled_dot_product_attention, *call, **given(device))
    assert type(raised) is error and str(raised).startswith("attention: ") and words in str(raised), repr(raised)


def test_key_and_value_of_different_lengths(backend, device):
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


# --- The PyTorch launchers and the registered ops -------------------------------------------------------------------


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
