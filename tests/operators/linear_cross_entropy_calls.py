"""How the tests call linear_cross_entropy: tensors, chunks, and a call that is judged against the oracle."""

from __future__ import annotations

import math
from types import SimpleNamespace

import oracle_linear_cross_entropy as oracle
import pytest
import torch
from checking import check as check_against
from conftest import KERNEL_BACKENDS, _forced
from layouts import guarded

from gptkern import functional as F

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
IGNORED = -100
# Of CUDA C++ there are no kernels.
BACKENDS = ["torch", KERNEL_BACKENDS[0]]


@pytest.fixture(name="loss_backend", params=BACKENDS)
def _loss_backend(request):
    """The name of a backend, which is forced while the test runs."""
    with _forced(request.param, request.node.nodeid):
        yield request.param


def cut(tokens: int | None = None, **fields) -> SimpleNamespace:
    """options: logits of so many tokens are a chunk."""
    usual = dict(allow_retain_graph=False, chunking_method="auto", acc_policy="auto", acc_dtype=None)
    return SimpleNamespace(**usual | dict(batch_chunk_size=tokens) | fields)


def tensors_of(rows, width, classes, dtype, *, bias=True, ignored=True, spread=2.0):
    """(input, linear_weight, linear_bias), target: with memory around them that is NaN."""
    input = guarded(torch.randn(rows, width).to(dtype))
    weight = guarded((torch.randn(classes, width) * (spread / math.sqrt(width))).to(dtype))
    of_class = guarded(torch.randn(classes).to(dtype)) if bias else None
    target = torch.randint(classes, (rows,))
    if ignored:
        target[1::4] = IGNORED
    return (input, weight, of_class), guarded(target)


def check(tensors, target, *, tokens=None, need=None, grad=None, loss_dtype=torch.float32, **options):
    """Runs the call forward and backward and judges the loss and every gradient."""
    present = [tensor for tensor in tensors if tensor is not None]
    extended = dict(options)
    ignore_index = extended.pop("ignore_index", None)

    def ours(input, linear_weight, linear_bias=None):
        if input.dtype == torch.float64 and loss_dtype == torch.float32:
            return F.linear_cross_entropy(
                input, linear_weight, target, linear_bias=linear_bias, options=cut(tokens), ignore_index=ignore_index,
                **extended,
            )  # fmt: skip
        return F.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, options=cut(tokens), ignore_index=ignore_index,
            loss_dtype=loss_dtype, **extended,
        )  # fmt: skip

    def judged(input, linear_weight, linear_bias=None, *, precision):
        index = IGNORED if ignore_index is None else ignore_index
        return oracle.linear_cross_entropy(
            input, linear_weight, linear_bias, target, ignore_index=index, precision=precision, **extended
        )

    return check_against(ours, judged, *present, grad_output=grad, need=need)


def gradients(loss, leaves, grad=None):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], grad)
