"""rotary: every backend against the oracle, and against the formulas that models have."""

from __future__ import annotations

import hypothesis.strategies as st
import oracles
import pytest
import torch
from checking import Watched, assert_compiles, check, same_bits
from hypothesis import HealthCheck, given, settings
from layouts import guarded

import gptkern
import gptkern.functional as G
from gptkern.autograd import RotaryFunction

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
dtypes_and_float64 = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(device=device, dtype=dtype)


def angles(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles: (length, pairs) or (batch, length, pairs), with NaN around them."""
    turned = torch.rand(*shape) * 6.3
    return tuple(guarded(tensor.to(device=device, dtype=dtype)) for tensor in (turned.cos(), turned.sin()))


def for_each_element(tensor: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """(…, pairs) -> (…, 2 pairs), as GPT-J repeats them, or Llama."""
    return tensor.repeat_interleave(2, -1) if interleaved else torch.cat((tensor, tensor), -1)


def packed(batch, heads, length, head_dim, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """The first third of a (batch, length, 3, heads, head_dim), as a projection leaves query, key and value."""
    return guarded(random(batch, length, 3, heads, head_dim, device=device, dtype=dtype))[:, :, 0].transpose(1, 2)


def check_rotary(input, cos, sin, interleaved=False, grad_output=None, **options) -> torch.Tensor:
    output = check(
        lambda x: G.rotary_embedding(x, cos, sin, interleaved=interleaved, **options),
        lambda x, precision: oracles.rotary_embedding(x, cos, sin, interleaved=interleaved, precision=precision),
        input,
        grad_output=grad_output,
    )
    assert output.dtype == input.dtype
    untouched = slice(2 * cos.shape[-1], None)
    same_bits("what passes through", output[..., untouched], input.detach()[..., untouched])
    return output


def refuses_float64(backend: str, call, *used: torch.dtype) -> bool:
    """Whether the call uses float64 on the cuda backend, which leaves it to Triton and says so."""
    if backend != "cuda" or torch.float64 not in used:
        return False
    with pytest.raises(gptkern.BackendError, match="float64"):
        call()
    return True


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
    exact = oracles.rotary_embedding(input, cos, sin)
    actual = G.rotary_embedding(input, cos, sin)
    # A correctly rounded result differs in no more than those that lie between two.
    assert (actual != exact.bfloat16()).float().mean() < 0.01


# --- Strides and alignment ------------------------------------------------------------------------------------------


def strided_inputs(device, dtype):
    """(name, input (…, head_dim 16))"""
    base = guarded(random(3, 4, 6, 48, device=device, dtype=dtype))
    yield "a slice of the heads' elements", base[..., 16:32]
    yield "every second", base[::2, ::2, ::2, :16]
    yield "(batch, length, heads, head_dim)", base[..., :16].transpose(1, 2)
    yield "(length, batch, heads, head_dim)", base[..., :16].permute(1, 2, 0, 3)
    yield "(heads, length, batch, head_dim)", base[..., :16].permute(2, 0, 1, 3)
    yield "one head for all", base[:2, :1, :3, :16].expand(2, 3, 3, 16)
    yield "one position for all", base[:2, :3, :1, :16].expand(2, 3, 5, 16)
    yield "elements apart", base[:2, :3, :5, :32:2]
    yield "elements outside", guarded(random(2, 3, 16, 5, device=device, dtype=dtype)).transpose(2, 3)


@layouts
def test_strided_inputs(backend, device, interleaved, poisoned_memory):
    for name, view in strided_inputs(device, torch.bfloat16):
        cos, sin = angles(view.shape[2], 8, device=device)
        try:
            output = check_rotary(view, cos, sin, interleaved)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        heads_inside = view.stride(1) < view.stride(2)
        assert (output.transpose(1, 2) if heads_inside else output).is_contiguous(), name


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_tensors_that_begin_anywhere(backend, device, dtype, offset, interleaved, poisoned_memory):
    input = random(2 * 3 * 5 * 32 + offset, device=device, dtype=dtype)[offset:].view(2, 3, 5, 32)
    check_rotary(input, *angles(5, 16, device=device), interleaved)
    check_rotary(input.clone(), *angles(5, 16, device=device), interleaved, grad_output=input.detach().flip(0))
    # Rows begin at every place in a vector.
    odd = random(2, 3, 5, 32 + offset, device=device, dtype=dtype)[..., :32]
    check_rotary(odd, *angles(5, 16, device=device), interleaved, grad_output=odd.detach().clone())


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_of_the_angles(backend, device, dtype, interleaved):
    input = random(2, 3, 5, 32, device=device, dtype=dtype)

    def half(*tensors):
        check_rotary(input, *tensors, interleaved)

    def full(cos, sin):
        pair = slice(None, None, 2) if interleaved else slice(0, 16)
        check(
            lambda x: G.rotary_embedding(x, cos, sin, interleaved=interleaved),
            lambda x, precision: oracles.rotary_embedding(
                x, cos[..., pair], sin[..., pair], interleaved=interleaved, precision=precision
            ),
            input,
        )

    longer = angles(9, 16, device=device, dtype=dtype)
    half(*(tensor[3:8] for tensor in longer))
    # GPT-J keeps both in one tensor; cos and sin of other strides than each other.
    half(*torch.cat(angles(2, 5, 16, device=device, dtype=dtype), -1).split(16, -1))
    cos, sin = angles(2, 5, 16, device=device, dtype=dtype)
    half(cos.transpose(1, 2).contiguous().transpose(1, 2), sin)
    half(cos[:1].expand(2, 5, 16), sin[1:].expand(2, 5, 16))
    half(cos[:, :1].expand(2, 5, 16), sin)
    half(torch.cat((cos[..., :1], cos), -1)[..., 1:], sin)
    cos, sin = (for_each_element(tensor, interleaved) for tensor in (cos, sin))
    full(cos, sin)
    full(cos.transpose(1, 2).contiguous().transpose(1, 2), torch.cat((sin, sin), -1)[..., :32])


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_incoming_gradients_of_any_strides(backend, device, dtype, interleaved):
    input = packed(2, 3, 5, 16, device=device, dtype=dtype)
    cos, sin = angles(5, 6, device=device)
    for grad_output in (
        random(2, 5, 3, 16, device=device, dtype=dtype).transpose(1, 2),
        random(16, 5, 3, 2, device=device, dtype=dtype).permute(3, 2, 1, 0),
        random(4, 6, 10, 32, device=device, dtype=dtype)[::2, ::2, ::2, ::2],
        random(1, 1, 1, 16, device=device, dtype=dtype).expand(2, 3, 5, 16),
        random(1, device=device, dtype=dtype).expand(2, 3, 5, 16),
    ):
        check_rotary(input, cos, sin, interleaved, grad_output=grad_output)


def test_the_gradient_of_a_sum(backend, device):
    input = random(1, 2, 3, 8, device=device).requires_grad_()
    cos, sin = angles(3, 4, device=device)
    (G.rotary_embedding(input, cos, sin) * 3).sum().backward()
    expected = torch.cat((cos + sin, cos - sin), -1).expand(1, 2, 3, 8) * 3
    torch.testing.assert_close(input.grad, expected)


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


# --- Gradients ------------------------------------------------------------------------------------------------------


def test_no_gradient_that_nobody_asked_for(kernel_backend, device):
    input, (cos, sin) = random(1, 2, 3, 8, device=device), angles(3, 4, device=device)
    with Watched() as watched:
        output = G.rotary_embedding(input, cos, sin)
        assert not output.requires_grad
        with torch.no_grad():
            assert not G.rotary_embedding(input.clone().requires_grad_(), cos, sin).requires_grad
    assert watched.names == ["rotary_forward"] * 2
    leaf = input.clone().requires_grad_()
    with Watched() as watched:
        G.rotary_embedding(leaf, cos, sin).sum().backward()
    assert watched.names == ["rotary_forward", "rotary_backward"]
    assert cos.grad is None and sin.grad is None


def test_backward_twice_with_retain_graph(backend, device):
    input, (cos, sin) = random(1, 2, 3, 8, device=device).requires_grad_(), angles(3, 4, device=device)
    output = G.rotary_embedding(input, cos, sin)
    grad_output = torch.randn(1, 2, 3, 8, device=device)
    (first,) = torch.autograd.grad(output, input, grad_output, retain_graph=True)
    (second,) = torch.autograd.grad(output, input, grad_output)
    same_bits("the second backward", second, first)


def test_a_second_derivative_is_refused(kernel_backend, device):
    input, (cos, sin) = random(1, 2, 3, 8, device=device).requires_grad_(), angles(3, 4, device=device)
    (gradient,) = torch.autograd.grad(G.rotary_embedding(input, cos, sin).pow(3).sum(), input, create_graph=True)
    with pytest.raises(NotImplementedError, match="rotary_embedding has no second derivative"):
        gradient.sum().backward()


@layouts
def test_pytorch_gives_every_derivative(device, interleaved):
    input = random(1, 1, 2, 5, device=device, dtype=torch.float64).requires_grad_()
    cos, sin = (tensor.requires_grad_() for tensor in angles(2, 2, device=device, dtype=torch.float64))
    both = [for_each_element(tensor.detach(), interleaved).requires_grad_() for tensor in (cos, sin)]
    with gptkern.backend("torch"):
        for call in ((input, cos, sin), (input, *both)):

            def turned(*tensors):
                return G.rotary_embedding(*tensors, interleaved=interleaved, rotary_dim=4)

            assert torch.autograd.gradcheck(turned, call)
            assert torch.autograd.gradgradcheck(turned, call)


def test_angles_that_require_grad_run_on_pytorch(device):
    tensors = random(2, 2, 5, 16, device=device), *angles(2, 5, 8, device=device)
    with gptkern.backend("torch"):
        check(
            G.rotary_embedding,
            lambda x, cos, sin, precision: oracles.rotary_embedding(x, cos, sin, precision=precision),
            *tensors,
        )


@pytest.mark.parametrize("which", [0, 1])
def test_angles_that_require_grad_are_refused_by_kernels(kernel_backend, device, which):
    input, tensors = random(1, 2, 3, 8, device=device), angles(3, 4, device=device)
    expected = G.rotary_embedding(input, *tensors)
    tensors[which].requires_grad_()
    with pytest.raises(gptkern.BackendError, match="cos or sin requires a gradient"):
        G.rotary_embedding(input, *tensors)
    with torch.no_grad():  # nobody asks for its gradient here
        same_bits("without gradients", G.rotary_embedding(input, *tensors), expected)


def test_pytorch_keeps_the_layout_too(device):
    with gptkern.backend("torch"):
        for rotary_dim in (16, 8):
            cos, sin = angles(5, rotary_dim // 2, device=device)
            for interleaved in (False, True):
                call = dict(interleaved=interleaved, rotary_dim=rotary_dim)
                inside = G.rotary_embedding(packed(2, 3, 5, 16, device=device), cos, sin, **call)
                assert inside.transpose(1, 2).is_contiguous()
                assert G.rotary_embedding(inside.contiguous(), cos, sin, **call).is_contiguous()


# --- Arguments ------------------------------------------------------------------------------------------------------

# name: (changes of the call, the exception, what its message has to say)
BAD_CALLS = {
    "input is a list": (dict(input=[1.0]), TypeError, "input is list; it needs a tensor"),
    "cos is None": (dict(cos=None), TypeError, "cos is NoneType; it needs a tensor"),
    "sin is a number": (dict(sin=1.0), TypeError, "sin is float; it needs a tensor"),
    "integers": (dict(input=torch.ones(2, 3, 5, 16).long()), RuntimeError, "input is torch.int64; it needs a floating"),
    "complex cos": (dict(cos=torch.ones(5, 8) * 1j), RuntimeError, "cos is torch.complex64; it needs a floating"),
    "three dimensions": (dict(input=torch.ones(3, 5, 16)), RuntimeError,
                         r"input has shape \(3, 5, 16\); it needs \(batch, heads, length, head_dim\)"),
    "another length": (dict(cos=torch.ones(6, 8)), RuntimeError,
                       r"cos has shape \(6, 8\); it needs .* the input's length, 5, and batch, 2"),
    "another batch": (dict(cos=torch.ones(3, 5, 8)), RuntimeError, r"cos has shape \(3, 5, 8\); it needs"),
    "four dimensions of cos": (dict(cos=torch.ones(2, 1, 5, 8)), RuntimeError, r"cos has shape \(2, 1, 5, 8\)"),
    "one dimension of cos": (dict(cos=torch.ones(8)), RuntimeError, r"cos has shape \(8,\)"),
    "sin of another shape": (dict(sin=torch.ones(1, 5, 8)), RuntimeError,
                             r"sin has shape \(1, 5, 8\); it needs that of cos, \(5, 8\)"),
    "sin of another dtype": (dict(sin=torch.ones(5, 8).half()), RuntimeError,
                             "sin is torch.float16; it needs the dtype of cos, torch.float32"),
    "sin on another device": (dict(sin=torch.ones(5, 8, device="meta")), RuntimeError,
                              "sin is on meta; it needs the input's device, "),
    "too wide": (dict(cos=torch.ones(5, 9), sin=torch.ones(5, 9)), RuntimeError,
                 r"cos has shape \(5, 9\); its last dimension needs to be head_dim, 16, or half of .* at most 8"),
    "an odd head_dim": (dict(input=torch.ones(2, 3, 5, 7), cos=torch.ones(5, 7), sin=torch.ones(5, 7)), RuntimeError,
                        r"input has shape \(2, 3, 5, 7\) and all of its head_dim is turned; that needs to be even"),
    "interleaved is a number": (dict(interleaved=1), TypeError, "interleaved is int; it needs a bool"),
    "rotary_dim is a float": (dict(rotary_dim=8.0), TypeError, "rotary_dim is float; it needs an int"),
    "rotary_dim is a bool": (dict(rotary_dim=True), TypeError, "rotary_dim is bool; it needs an int"),
    "rotary_dim is odd": (dict(rotary_dim=7), ValueError, "rotary_dim is 7; it needs to be even"),
    "rotary_dim is negative": (dict(rotary_dim=-2), ValueError, "rotary_dim is -2; it needs to be even"),
    "rotary_dim is too large": (dict(rotary_dim=18), ValueError, "rotary_dim is 18; .* at most the .* head_dim, 16"),
    "rotary_dim of another width": (dict(rotary_dim=10), ValueError,
                                    r"cos has shape \(5, 8\); with rotary_dim=10 its last dimension needs to be 10 or"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(backend, device, name):
    changes, error, words = BAD_CALLS[name]
    call = dict(input=torch.ones(2, 3, 5, 16), cos=torch.ones(5, 8), sin=torch.ones(5, 8)) | changes
    call = {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for key, value in call.items()
    }
    with pytest.raises(error, match=f"rotary_embedding: {words}"):
        G.rotary_embedding(call.pop("input"), call.pop("cos"), call.pop("sin"), **call)


def test_the_width_says_what_is_turned(backend, device):
    input = random(1, 1, 3, 16, device=device)
    for width, rotary_dim, turned in ((8, None, 16), (4, None, 8), (16, None, 16), (8, 8, 8), (8, 16, 16), (4, 4, 4)):
        # A quarter of a turn exchanges a pair's elements: none that is turned stays.
        cos, sin = torch.zeros(3, width, device=device), torch.ones(3, width, device=device)
        output = G.rotary_embedding(input, cos, sin, rotary_dim=rotary_dim)
        assert ((output == input).all(2).flatten() == (torch.arange(16, device=device) >= turned)).all()


def test_the_options_are_keyword_only(device):
    with pytest.raises(TypeError):
        G.rotary_embedding(random(1, 1, 3, 8, device=device), *angles(3, 4, device=device), True)


@dtypes
def test_autocast_leaves_the_inputs_dtype(backend, device, dtype):
    input, (cos, sin) = random(1, 2, 3, 8, device=device, dtype=dtype), angles(3, 4, device=device)
    expected = G.rotary_embedding(input, cos, sin)
    with torch.autocast(device, dtype=torch.bfloat16):
        leaf = input.clone().requires_grad_()
        output = G.rotary_embedding(leaf, cos, sin)
    same_bits("under autocast", output, expected)
    output.backward(random(1, 2, 3, 8, device=device, dtype=dtype))
    assert leaf.grad.dtype == dtype


# --- The PyTorch launchers, the registered ops, torch.compile -------------------------------------------------------


@layouts
@dtypes_and_float64
def test_the_pytorch_launchers(device, dtype, interleaved):
    cos, sin = angles(2, 5, 6, device=device)
    check(
        lambda x: RotaryFunction.apply(x, cos, sin, 12, interleaved, "torch"),
        lambda x, precision: oracles.rotary_embedding(x, cos, sin, interleaved=interleaved, precision=precision),
        packed(2, 3, 5, 16, device=device, dtype=dtype),
    )


@layouts
def test_the_pytorch_launchers_gradient_is_the_difference_quotient(device, interleaved):
    input = random(2, 3, 5, 8, device=device, dtype=torch.float64).requires_grad_()
    cos, sin = angles(5, 3, device=device, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RotaryFunction.apply(x, cos, sin, 6, interleaved, "torch"), input)


def test_the_registered_ops(backend, device):
    cos, sin = angles(5, 4, device=device)
    input = packed(2, 3, 5, 16, device=device, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.gptkern.rotary_forward.default, (input, cos, sin, 8, False, backend))
    torch.library.opcheck(
        torch.ops.gptkern.rotary_backward.default, (input[..., ::2], None, cos, sin, 8, True, backend)
    )


def test_a_packed_projection_compiled_as_eager(backend, device):
    cos, sin = angles(5, 8, device=device)

    def both(qkv):
        query, key, value = qkv.view(2, 5, 3, 3, 16).transpose(1, 3).unbind(2)
        return G.rotary_embedding(query, cos, sin) * G.rotary_embedding(key, cos, sin, interleaved=True) + value

    assert_compiles(both, random(2, 5, 144, device=device))


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
