"""layer_norm against PyTorch's own, torch.compile and Liger-Kernel."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern import tolerance

# (rows, width, dtype). On a CPU all are over 1 MB, where the limit of LIMIT_ON_CPU holds; the narrow one is GPT-2's.
if harness.DEVICE == "cuda":
    SHAPES = [(32768, width, torch.bfloat16) for width in (768, 1024, 4096, 8192, 16384)]
    SHAPES += [(32768, 4096, torch.float32)]
else:
    SHAPES = [(1024, 768, torch.float32), (1024, 1024, torch.float32), (512, 4096, torch.bfloat16)]
PEERS = ["eager", "torch.compile", "liger"]
EPS = 1e-5
# On a CPU gptkern calls PyTorch's operator: what it adds is the twin's own host time. Not with 16 bits, where it
# computes in float32, which takes longer and is what PyTorch's own gradients lack.
LIMIT_ON_CPU = {torch.float32: 1.05}


def twin(x, weight, bias):
    return G.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def make_inputs(rows, width, dtype, requires_grad):
    x = torch.randn(rows, width, device=harness.DEVICE, dtype=dtype, requires_grad=requires_grad)
    weight = torch.randn(width, device=harness.DEVICE, dtype=dtype, requires_grad=requires_grad)
    bias = torch.randn(width, device=harness.DEVICE, dtype=dtype, requires_grad=requires_grad)
    return x, weight, bias


def in_precision(precision, tensors, dy):
    """y, dx, dweight and dbias of PyTorch's layer_norm on the inputs converted to `precision`."""
    leaves = [tensor.detach().to(precision).requires_grad_() for tensor in tensors]
    y = eager(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(precision))


def checked(comparison, tensors, y, gradients, dy):
    reference, yardstick = (in_precision(precision, tensors, dy) for precision in (torch.float64, torch.float32))
    comparison.check(y.detach(), reference[0], yardstick[0])
    # dweight and dbias sum over all rows: they have tests of their own, with a bound that grows with the rows.
    if gradients:
        comparison.check(gradients[0], reference[1], yardstick[1], tolerance.GRADIENT_FACTOR)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}-{str(shape[2])[6:]}")
def test_layer_norm(benchmark, shape, direction, peer):
    def liger(x, weight, bias):
        return theirs(x, weight, bias, EPS)

    theirs, reason = harness.peer_or_reason(peer, eager, "liger_layer_norm")
    if theirs is None:
        pytest.skip(reason)
    other = liger if peer == "liger" else theirs
    rows, width, dtype = shape
    bytes_of_x = rows * width * dtype.itemsize
    limit = LIMIT_ON_CPU.get(dtype) if harness.DEVICE == "cpu" else None
    comparison = harness.Comparison(f"layer_norm {direction}", f"{rows}x{width} {str(dtype)[6:]}", peer, limit)
    inputs = harness.sets_of_inputs(lambda: make_inputs(*shape, direction == "backward"), bytes_of_x)
    dy = torch.randn_like(inputs[0][0])

    if direction == "forward":
        checked(comparison, inputs[0], twin(*inputs[0]), (), dy)
        # Reads x, writes y.
        comparison.time(benchmark, twin, other, inputs, 2 * bytes_of_x)
        return
    y = twin(*inputs[0])
    checked(comparison, inputs[0], y, torch.autograd.grad(y, inputs[0], dy), dy)
    graphs = [(twin(*tensors), other(*tensors), tensors) for tensors in inputs]

    def ours_backward(ours, _, tensors):
        return torch.autograd.grad(ours, tensors, dy, retain_graph=True)

    def theirs_backward(_, theirs, tensors):
        return torch.autograd.grad(theirs, tensors, dy, retain_graph=True)

    # Reads x and dy, writes dx.
    comparison.time(benchmark, ours_backward, theirs_backward, graphs, 3 * bytes_of_x)
