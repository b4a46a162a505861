"""rotary: what it takes: strides, frozen inputs, dtypes, errors, registered ops, compiled code."""

from __future__ import annotations

import oracle_rotary
import pytest
import torch
from checking import Watched, assert_compiles, check, same_bits
from layouts import guarded, of_own_strides
from rotary_calls import angles, check_rotary, dtypes, for_each_element, layouts, packed, random

import gptkern
import gptkern.functional as G

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
            lambda x, precision: oracle_rotary.rotary_embedding(
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
@pytest.mark.parametrize("step", [1, 4])
def test_every_operand_has_strides_of_its_own(kernel_backend, device, step, interleaved):
    input, grad_output = random(2, 2, 3, 5, 16, device=device)
    input, grad_output, cos, sin = of_own_strides(input, grad_output, *angles(2, 5, 8, device=device), step=step)
    check_rotary(input, cos, sin, interleaved, grad_output=grad_output)


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
            lambda x, cos, sin, precision: oracle_rotary.rotary_embedding(x, cos, sin, precision=precision),
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


@pytest.mark.parametrize(
    "of, words",
    [
        (lambda x: torch.nested.as_nested_tensor([x, x[:1]], layout=torch.jagged), "nested tensor (torch.jagged)"),
        (lambda x: torch.nested.as_nested_tensor([x, x[:1]]), "nested tensor (torch.strided)"),
        (lambda x: x.to_sparse(), "sparse tensor (torch.sparse_coo)"),
    ],
)
def test_an_input_that_is_not_dense(backend, device, of, words):
    with pytest.raises(RuntimeError) as raised:
        G.rotary_embedding(of(torch.randn(3, 2, 8, device=device)), torch.ones(3, 8), torch.ones(3, 8))
    assert str(raised.value).startswith("rotary_embedding: input ") and words in str(raised.value)
