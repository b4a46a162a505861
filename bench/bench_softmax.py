"""softmax against PyTorch's own, torch.compile and Liger-Kernel."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F

import gptkern.functional as G
from gptkern import tolerance

# (shape, dim, dtype). On a CPU all are over 1 MB, where the limit of LIMIT_ON_CPU holds.
if harness.DEVICE == "cuda":
    SHAPES = [((32768, width), -1, torch.bfloat16) for width in (1024, 4096, 16384, 65536)]
    SHAPES += [((32768, 4096), -1, torch.float32), ((64, 512, 4096), 1, torch.bfloat16)]
    CAUSAL = (8, 12, 1024, 1024)
else:
    SHAPES = [((1024, 1024), -1, torch.float32), ((16, 50257), -1, torch.float32), ((512, 4096), -1, torch.bfloat16)]
    CAUSAL = (1, 12, 256, 256)
PEERS = ["eager", "torch.compile", "liger"]
SCALE = 0.125
# On a CPU gptkern calls PyTorch's operator: what it adds is the twin's own host time.
LIMIT_ON_CPU = 1.05


def shape_name(shape, dim, dtype) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype)[6:]}" + ("" if dim == -1 else f" dim {dim}")


def run(benchmark, comparison, ours, theirs, plain, make, direction, bytes_of_x):
    """Checks `ours` against `plain`, which is PyTorch's in the dtype it is given, and times it against `theirs`."""
    inputs = harness.sets_of_inputs(make, bytes_of_x)
    (x,) = inputs[0]
    dy = torch.randn_like(x)
    leaves = [x.detach().to(precision).requires_grad_() for precision in (torch.float64, torch.float32)]
    y, reference, yardstick = ours(x), *map(plain, leaves)
    comparison.check(y.detach(), reference.detach(), yardstick.detach())
    if direction == "forward":
        # Reads x, writes y.
        comparison.time(benchmark, ours, theirs, inputs, 2 * bytes_of_x)
        return
    (dx,) = torch.autograd.grad(y, x, dy)
    dx_reference, dx_yardstick = (
        torch.autograd.grad(result, leaf, dy.to(leaf.dtype))[0]
        for result, leaf in zip((reference, yardstick), leaves)
    )  # fmt: skip
    comparison.check(dx, dx_reference, dx_yardstick, tolerance.GRADIENT_FACTOR)
    graphs = [(ours(x), theirs(x), x) for (x,) in inputs]

    def ours_backward(y, _, x):
        return torch.autograd.grad(y, x, dy, retain_graph=True)

    def theirs_backward(_, y, x):
        return torch.autograd.grad(y, x, dy, retain_graph=True)

    # Reads y and dy, writes dx.
    comparison.time(benchmark, ours_backward, theirs_backward, graphs, 3 * bytes_of_x)


def maker(shape, dtype, direction):
    return lambda: (torch.randn(shape, device=harness.DEVICE, dtype=dtype, requires_grad=direction == "backward"),)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("shape, dim, dtype", SHAPES, ids=[shape_name(*of).replace(" ", "-") for of in SHAPES])
def test_softmax(benchmark, shape, dim, dtype, direction, peer):
    theirs, reason = harness.peer_or_reason(peer, lambda x: F.softmax(x, dim), "liger_softmax")
    if theirs is None:
        pytest.skip(reason)
    if peer == "liger" and dim != -1:
        pytest.skip("Liger-Kernel's softmax is over the last dimension")
    limit = LIMIT_ON_CPU if harness.DEVICE == "cpu" else None
    comparison = harness.Comparison(f"softmax {direction}", shape_name(shape, dim, dtype), peer, limit)
    bytes_of_x = torch.Size(shape).numel() * dtype.itemsize
    run(
        benchmark, comparison, lambda x: G.softmax(x, dim), theirs, lambda x: F.softmax(x, dim),
        maker(shape, dtype, direction), direction, bytes_of_x,
    )  # fmt: skip


@pytest.mark.parametrize("peer", PEERS[:2])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_softmax_causal(benchmark, direction, peer):
    """The softmax of GPT's attention, with its scale and its causal mask, against what models write by hand."""
    hidden = torch.ones(CAUSAL[-2:], dtype=torch.bool, device=harness.DEVICE).triu(1)

    def by_hand(x):
        return F.softmax((x * SCALE).masked_fill(hidden, -torch.inf), -1)

    theirs, reason = harness.peer_or_reason(peer, by_hand)
    if theirs is None:
        pytest.skip(reason)
    dtype = torch.bfloat16 if harness.DEVICE == "cuda" else torch.float32
    comparison = harness.Comparison(f"softmax causal {direction}", shape_name(CAUSAL, -1, dtype), peer)
    # Half of the input is read, all of the output is written: less than a copy of x, which counts here.
    bytes_of_x = torch.Size(CAUSAL).numel() * dtype.itemsize
    run(
        benchmark, comparison, lambda x: G.softmax(x, -1, scale=SCALE, is_causal=True), theirs, by_hand,
        maker(CAUSAL, dtype, direction), direction, bytes_of_x,
    )  # fmt: skip
