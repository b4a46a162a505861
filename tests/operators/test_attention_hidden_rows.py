"""attention where a mask hides all of a row by a finite number: softmax in float32, on every backend, traced or not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import gptkern
import gptkern.functional as G

B, H, H_KV, N, D = 2, 4, 2, 7, 8
LOWEST = torch.finfo(torch.float32).min
NAMES = ["torch", "triton"]


def call(dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """query, key, value, the gradient of the output."""
    return [torch.randn(B, heads, N, D).to(device, dtype) for heads in (H, H_KV, H_KV, H)]


def plain(query, key, value, mask):
    """softmax(scale * query @ keyᵀ + mask) @ value in float32, 0 for a row of -inf."""
    query, key, value = (tensor.float() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(H // H_KV, 1) for tensor in (key, value))
    scores = query @ key.mT / math.sqrt(D) + mask.float()
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ value


def twin(query, key, value, mask):
    return G.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def results(function, query, key, value, grad_output, mask) -> list[torch.Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = function(*leaves, mask)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def gradients(query, key, value, grad_output, mask):
    return results(twin, query, key, value, grad_output, mask)[1:]


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=tolerance, rtol=tolerance)


def added(visible: torch.Tensor, number: float) -> torch.Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, number)


def causal() -> torch.Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def left_padded(number: float) -> torch.Tensor:
    """(B, 1, N, N), as models that compute their own softmax make it: the second text begins at its fourth token."""
    begins = torch.tensor([0, 3])[:, None, None, None]
    return added(causal() & (torch.arange(N) >= begins), number)


def one_row(number: float) -> torch.Tensor:
    mask = torch.zeros(N, N)
    mask[2] = number
    return mask


def one_head(number: float) -> torch.Tensor:
    mask = torch.randn(H, N, N)
    mask[1, :, :] += number
    return mask


MASKS = {
    "left padding, -1e9": lambda: left_padded(-1e9),
    "left padding, the lowest number": lambda: left_padded(LOWEST),
    "left padding, -1e6": lambda: left_padded(-1e6),
    "left padding, -1e4": lambda: left_padded(-1e4),
    "causal and padding added up: -inf": lambda: left_padded(LOWEST) + added(causal(), LOWEST),
    "rows of -inf, and of -1e9": lambda: one_row(-math.inf) + left_padded(-1e9),
    "one row": lambda: one_row(-1e9),
    "one row of a large number": lambda: one_row(1e9),
    "one head": lambda: one_head(-1e5),
    "(B, 1, 1, N)": lambda: added(torch.tensor([True, False]), -1e9)[:, None, None, None].expand(B, 1, 1, N),
    "a number a row": lambda: torch.tensor([0.0, -1e9, -70.0, 0, 0, LOWEST, 0])[:, None],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", MASKS)
def test_the_gradient_is_that_of_float32_mathematics(device, name, mask):
    tensors, mask = call(device=device), MASKS[mask]().to(device)
    with gptkern.backend(name):
        found = results(twin, *tensors, mask)
    assert_close(found, results(plain, *tensors, mask))


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_row_hands_out_equal_parts(device, name):
    query, key, value, _ = call(device=device)
    value.requires_grad_()
    with gptkern.backend(name):
        output = twin(query, key, value, one_row(-1e9).to(device))
    output[:, :, 2].sum().backward()
    torch.testing.assert_close(value.grad, torch.full_like(value, H // H_KV / N))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", ["its own", "float32"])
def test_sixteen_bits(device, dtype, mask_dtype):
    tensors = call(dtype, device)
    mask = left_padded(torch.finfo(dtype).min).to(device, dtype if mask_dtype == "its own" else torch.float32)
    expected = results(plain, *tensors, mask)
    for name in NAMES:
        with gptkern.backend(name):
            assert_close(results(twin, *tensors, mask), expected, 4 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype), gptkern.backend("torch"):
        assert_close(results(twin, *(t.float() for t in tensors), mask), expected, 8 * torch.finfo(dtype).eps)


def test_float64():
    tensors, mask = [tensor.double() for tensor in call()], left_padded(0.0).double()
    mask[..., :4, :] = torch.finfo(torch.float64).min
    query, key, value, grad_output = tensors
    expected = results(
        lambda q, k, v, m: torch.softmax(q @ k.mT / math.sqrt(D) + m, -1) @ v,
        query, *(tensor.repeat_interleave(2, 1) for tensor in (key, value)), grad_output, mask,
    )  # fmt: skip
    found = results(twin, *tensors, mask)
    expected[2:] = (gradient.unflatten(1, (H_KV, 2)).sum(2) for gradient in expected[2:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


# --- Traced, where nobody may look at a mask's values ---------------------------------------------------------------


def assert_right_when_traced(traced):
    """`traced(query, key, value, grad_output, mask)`, traced with a mask of zeros, gives gradients for any."""
    tensors = call()
    for number in (-1e9, 0.0):
        mask = left_padded(number)
        assert_close(traced(*tensors, mask), results(plain, *tensors, mask)[1:])


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx(mode):
    assert_right_when_traced(make_fx(gradients, tracing_mode=mode)(*call(), left_padded(0.0)))


def test_make_fx_of_the_forward_alone():
    # Its inputs need no gradient while it is traced; those of the graph may.
    traced = make_fx(twin)(*call()[:3], left_padded(0.0))
    assert_right_when_traced(lambda *tensors: results(traced, *tensors)[1:])


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_under_no_grad(mode, pre_dispatch):
    with torch.no_grad():
        traced = make_fx(twin, tracing_mode=mode, pre_dispatch=pre_dispatch)(*call()[:3], left_padded(0.0))
    assert_right_when_traced(lambda *tensors: results(traced, *tensors)[1:])


def test_jit_trace():
    traced = torch.jit.trace(twin, (*call()[:3], left_padded(0.0)), check_trace=False)
    assert_right_when_traced(lambda *tensors: results(traced, *tensors)[1:])


def test_torch_func():
    def loss(query, key, value, grad_output, mask):
        return (twin(query[None], key[None], value[None], mask[None])[0] * grad_output).sum()

    def outer(*tensors):
        return torch.func.vmap(loss)(*tensors).sum()

    assert_right_when_traced(torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2))))
    assert_right_when_traced(torch.func.grad(outer, argnums=(0, 1, 2)))


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert_right_when_traced(lambda *tensors: results(compiled, *tensors)[1:])


@pytest.mark.deep
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("with_grad", [False, True])
def test_exported(strict, with_grad):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return twin(*tensors)

    with torch.set_grad_enabled(with_grad):
        exported = torch.export.export(Module(), (*call()[:3], left_padded(0.0)), strict=strict).module()
    assert_right_when_traced(lambda *tensors: results(exported, *tensors)[1:])


# --- What it costs --------------------------------------------------------------------------------------------------

FLASH = "ScaledDotProductFlashAttentionForCpuBackward0"
# Of each row the largest number is small: most of what models add, ALiBi with its causal mask included.
SAFE_MASKS = {
    "causal, the lowest number": lambda: added(causal(), LOWEST),
    "ALiBi": lambda: added(causal(), -math.inf) - torch.arange(H)[None, :, None, None] * torch.arange(N).flip(0),
    "rows of -inf": lambda: one_row(-math.inf),
    "a bias": lambda: torch.randn(N, N) * 10,
    "no keys": lambda: torch.zeros(N, 0),
}


@pytest.mark.parametrize("name", SAFE_MASKS)
def test_pytorchs_fast_kernel_is_kept_where_it_is_right(name):
    query, key, value, grad_output = call()
    if name == "no keys":
        key, value = key[:, :, :0], value[:, :, :0]
    mask = SAFE_MASKS[name]()
    output = G.scaled_dot_product_attention(query.requires_grad_(), key, value, mask, enable_gqa=True)
    stock = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert output.grad_fn.name() == stock.grad_fn.name()
    if name != "no keys":
        assert output.grad_fn.name() == FLASH
    assert torch.equal(*(torch.autograd.grad(o, query, grad_output)[0] for o in (output, stock)))


EXPANDED = {
    "over batch and heads": (lambda: torch.zeros(N, N).expand(B, H, N, N), N * N),
    "over heads, as models make it": (lambda: left_padded(0.0).expand(B, H, N, N), B * N * N),
    "over queries": (lambda: torch.zeros(B, 1, 1, N).expand(B, H, N, N), B * N),
    "over keys": (lambda: torch.zeros(N, 1).expand(N, N), N),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_of_an_expanded_mask_one_copy_is_read(name):
    mask, numbers = EXPANDED[name]
    query, key, value, _ = call()
    # Under a TorchDispatchMode nobody looks at a mask's values.
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        twin(query.requires_grad_(), key, value, mask())
    (read,) = [event.input_shapes[0] for event in profile.function_events if event.name == "aten::amax"]
    assert math.prod(read) == numbers


def test_a_forward_alone_keeps_the_fast_kernel():
    query, key, value, _ = call()
    mask = left_padded(-1e9)
    with torch.no_grad(), torch.autograd.profiler.profile() as ran:
        twin(query, key, value, mask)
    assert any("flash_attention_for_cpu" in event.name for event in ran.function_events)
    query.requires_grad_()
    assert twin(query, key, value, mask).grad_fn.name() != FLASH
