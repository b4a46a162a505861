"""Attention, causal and full, against PyTorch's own kernels, each of them forced."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import gptkern.functional as G
from gptkern import tolerance

# (batch, heads, length, head_dim, is_causal). On a GPU 16,384 tokens of a model 2,048 wide, as published numbers are.
if harness.DEVICE == "cuda":
    DTYPE = torch.bfloat16
    LENGTHS, TOKENS, WIDTH = (1024, 2048, 4096, 8192, 16384), 16384, 2048
    SHAPES = [
        (TOKENS // length, WIDTH // head_dim, length, head_dim, True) for head_dim in (64, 128) for length in LENGTHS
    ]
    SHAPES += [(8, 12, 1024, 64, True), (16, 12, 1024, 80, True), (4, 16, 4096, 128, False)]
else:
    DTYPE = torch.float32
    SHAPES = [(1, 12, 256, 64, True), (1, 12, 256, 64, False)]

# The kernels behind F.scaled_dot_product_attention; on Hopper its default is not its fastest.
FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
PEERS = ["eager", *FORCED, "torch.compile"]
# torch.compile on attention written out keeps the scores in memory: beyond this length it is no peer.
LONGEST_WRITTEN_OUT = 4096
# On a CPU gptkern calls PyTorch's operator: what it adds is the twin's own host time.
LIMIT_ON_CPU = 1.05
# A backward has five products where a forward has two.
BACKWARD_FLOPS = 2.5


def shape_name(batch, heads, length, head_dim, is_causal) -> str:
    return f"{batch}x{heads}x{length}x{head_dim} {str(DTYPE)[6:]} {'causal' if is_causal else 'full'}"


def flops(batch, heads, length, head_dim, is_causal) -> float:
    """Of a forward: two products, of which a causal one needs half."""
    return 4 * batch * heads * length**2 * head_dim / (2 if is_causal else 1)


def written_out(query, key, value, is_causal):
    """Attention as models write it by hand."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return F.softmax(scores, -1) @ value


def peer_or_reason(peer, shape):
    """(the peer's function of (query, key, value), "") or (None, why it does not run here)."""
    *_, length, _, is_causal = shape

    def eager(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    if peer == "torch.compile":
        if length > LONGEST_WRITTEN_OUT:
            return None, f"written-out attention keeps the scores; not beyond length {LONGEST_WRITTEN_OUT}"
        return harness.peer_or_reason(peer, lambda *tensors: written_out(*tensors, is_causal))
    if peer not in FORCED:
        return eager, ""
    if harness.DEVICE != "cuda":
        return None, f"{peer} attention is a peer on GPUs alone"

    def forced(query, key, value):
        with sdpa_kernel(FORCED[peer]):
            return eager(query, key, value)

    try:
        tensors = make_inputs(*shape, requires_grad=True)
        forced(*tensors).sum().backward()
    except RuntimeError as error:
        return None, f"PyTorch's {peer} attention does not run here: {str(error).splitlines()[0]}"
    return forced, ""


def make_inputs(batch, heads, length, head_dim, is_causal, requires_grad):
    """query, key, value: (batch, heads, length, head_dim), views of (batch, length, heads, head_dim) as in a GPT."""
    tensors = torch.randn(3, batch, length, heads, head_dim, device=harness.DEVICE, dtype=DTYPE).transpose(2, 3)
    return tuple(tensor.detach().requires_grad_(requires_grad) for tensor in tensors)


def one_head(precision, tensors, grad_output, is_causal):
    """The first head's output and gradients in `precision`: no other head has a part in them, and they fit."""
    leaves = [tensor.detach()[:1, :1].to(precision).requires_grad_() for tensor in tensors]
    output = written_out(*leaves, is_causal)
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output[:1, :1].to(precision))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape_name(*shape).replace(" ", "-"))
def test_attention(benchmark, shape, direction, peer):
    theirs, reason = peer_or_reason(peer, shape)
    if theirs is None:
        pytest.skip(reason)
    is_causal = shape[-1]

    def ours(query, key, value):
        return G.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    limit = LIMIT_ON_CPU if harness.DEVICE == "cpu" and peer == "eager" else None
    comparison = harness.Comparison(f"attention {direction}", shape_name(*shape), peer, limit)
    bytes_of_one = 4 * torch.Size(shape[:4]).numel() * DTYPE.itemsize
    backward = direction == "backward"
    inputs = harness.sets_of_inputs(lambda: make_inputs(*shape, requires_grad=backward), bytes_of_one)
    grad_output = torch.randn_like(inputs[0][0])
    reference, yardstick = (
        one_head(precision, inputs[0], grad_output, is_causal) for precision in (torch.float64, torch.float32)
    )
    output = ours(*inputs[0])
    comparison.check(output.detach()[:1, :1], reference[0], yardstick[0])
    if not backward:
        comparison.time(benchmark, ours, theirs, inputs, flops=flops(*shape))
        return
    gradients = torch.autograd.grad(output, inputs[0], grad_output)
    for gradient, right, plain in zip(gradients, reference[1:], yardstick[1:]):
        comparison.check(gradient[:1, :1], right, plain, tolerance.GRADIENT_FACTOR)
    graphs = [(ours(*tensors), theirs(*tensors), tensors) for tensors in inputs]

    def ours_backward(output, _, tensors):
        return torch.autograd.grad(output, tensors, grad_output, retain_graph=True)

    def theirs_backward(_, output, tensors):
        return torch.autograd.grad(output, tensors, grad_output, retain_graph=True)

    comparison.time(benchmark, ours_backward, theirs_backward, graphs, flops=BACKWARD_FLOPS * flops(*shape))
