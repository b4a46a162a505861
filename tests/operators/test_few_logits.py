"""Losses of few logits of 16 bits on a CPU, rows that are ignored whatever they hold, float16's small gradients."""

from __future__ import annotations

import oracle_cross_entropy
import oracle_linear_cross_entropy as oracle
import pytest
import torch
from checking import check
from linear_cross_entropy_calls import _loss_backend, cut  # noqa: F401
from sharp import deep
from torch.utils._python_dispatch import TorchDispatchMode

import gptkern.functional as G
from gptkern.backends import few_logits, vocabulary
from gptkern.operators.linear_cross_entropy import chunks, rows
from gptkern.operators.linear_cross_entropy.call import Call, Gradient

IGNORED = -100


# --- Few logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [IGNORED, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float16)], ids=str)
def test_few_logits_of_sixteen_bits(dtype, ignore_index, reduction, monkeypatch):
    x, w, bias = torch.randn(7, 6).to(dtype), torch.randn(9, 6).to(dtype), torch.randn(9).to(dtype)
    # p of the target 0.999 and 1 - 1e-6, of another one 1e-30
    x[:3] = torch.tensor([[9.1, 0, 0, 0, 0, 0], [16.0, 0, 0, 0, 0, 0], [70.0, 0, 0, 0, 0, 0]]).to(dtype)
    w[:, 0] = torch.eye(9)[0].to(dtype)
    target = torch.tensor([0, 0, 1, 3, ignore_index, 8, 2])
    done = []
    inner = few_logits._Function.forward
    monkeypatch.setattr(few_logits._Function, "forward", staticmethod(lambda *call: done.append(1) or inner(*call)))
    options = dict(reduction=reduction, ignore_index=ignore_index)
    grad = torch.rand(7) + 0.5 if reduction == "none" else None
    check(
        lambda x, w, b: G.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        lambda x, w, b, precision: oracle.linear_cross_entropy(x, w, b, target, **options, precision=precision),
        x, w, bias, grad_output=None if grad is None else grad.to(dtype),
    )  # fmt: skip
    check(
        lambda x: G.cross_entropy(x, target, **options),
        lambda x, precision: oracle_cross_entropy.cross_entropy(x, target, **options, precision=precision),
        (x @ w.t()), grad_output=None if grad is None else grad.to(dtype),
    )  # fmt: skip
    assert len(done) >= 2


@pytest.mark.parametrize("below", [6.9, 13.8])
def test_what_is_nearly_certain_keeps_its_digits(below):
    """p of the target 0.999 and 1 - 1e-6: float32's p - 1 has no digit of bfloat16 left."""
    x = torch.tensor([[0.0, -below]]).bfloat16()
    exact = x.double()[0].softmax(0)[1]
    for loss, leaf in (
        (G.cross_entropy, x),
        (lambda x, y: G.linear_cross_entropy(torch.ones(1, 1).bfloat16(), x.t(), y), x),
    ):
        leaf = leaf.clone().requires_grad_()
        value = loss(leaf, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(value, leaf)
        for found, wanted in ((value, -torch.log1p(-exact)), (gradient[0, 0], -exact), (gradient[0, 1], exact)):
            assert abs(found.double() - wanted) <= 2.0**-8 * wanted.abs()


def test_few_logits_are_differentiated_twice_and_of_nothing_that_counts():
    x, target = torch.randn(4, 5).bfloat16().requires_grad_(), torch.tensor([0, 1, IGNORED, 4])
    wide = x.detach().float().requires_grad_()
    second = []
    for leaf, loss in ((x, G.cross_entropy), (wide, torch.nn.functional.cross_entropy)):
        (first,) = torch.autograd.grad(loss(leaf, target), leaf, create_graph=True)
        (found,) = torch.autograd.grad(first.float().square().sum(), leaf)
        second.append(found.float())
    torch.testing.assert_close(*second, rtol=2e-2, atol=1e-3)
    loss = G.cross_entropy(x, torch.full((4,), IGNORED))
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and not gradient.any()
    # What is impossible adds nothing, and what is certain has no gradient.
    certain = torch.tensor([[3.0, -torch.inf, -torch.inf]], dtype=torch.bfloat16).requires_grad_()
    loss = G.cross_entropy(certain, torch.tensor([0]))
    assert loss == 0.0 and not torch.autograd.grad(loss, certain)[0].any()
    with pytest.raises(IndexError):
        G.cross_entropy(x, torch.tensor([0, 1, 2, 5]))


# --- Rows that do not count -------------------------------------------------------------------------------------------


def _of_two_dimensions(z, y):
    classes = torch.where(y < 0, y, y % 20)
    return G.cross_entropy(z.unflatten(1, (20, 2)), torch.stack((classes, classes), 1))


def _losses(dtype):
    """name -> (loss of leaves and target, leaves), of which the first has 16 rows."""
    x, w, logits = (one.to(dtype) for one in (torch.randn(16, 6), torch.randn(40, 6), 2 * torch.randn(16, 40)))
    teacher, of_class = torch.log_softmax(torch.randn(16, 40), 1), (torch.rand(40) + 0.5).to(dtype)
    extended = dict(z_loss=0.1, softcap=5.0, label_smoothing=0.1)
    mixed = dict(divergence="jsd", mix=0.25)
    return {
        "cross_entropy": (G.cross_entropy, [logits]),
        "of two dimensions": (_of_two_dimensions, [logits]),
        "extended": (lambda z, y: G.cross_entropy(z, y, **extended), [logits]),
        "weights": (lambda z, y: G.cross_entropy(z, y, of_class, return_stats=True)[0], [logits]),
        "few": (G.linear_cross_entropy, [x, w]),
        "few, extended": (lambda x, w, y: G.linear_cross_entropy(x, w, y, **extended), [x, w]),
        "cut": (lambda x, w, y: G.linear_cross_entropy(x, w, y, options=cut(3)), [x, w]),
        "cut, each row": (
            lambda x, w, y: G.linear_cross_entropy(x, w, y, reduction="none", options=cut(3)).sum(), [x, w],
        ),
        "distillation": (lambda z, y: G.distillation_loss(z, teacher, y, **mixed), [logits]),
        "linear distillation": (
            lambda x, w, y: G.linear_distillation_loss(x, w, target=y, teacher_logits=teacher, **mixed), [x, w],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("poison", [torch.nan, *deep(torch.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _losses(torch.float32))
def test_whatever_an_ignored_row_holds_is_in_no_gradient(loss_backend, name, dtype, poison):
    loss, leaves = _losses(dtype)[name]
    target = torch.randint(40, (16,))
    target[2] = IGNORED
    found = []
    for held in (1.0, poison):
        given = [leaf.clone() for leaf in leaves]
        given[0][2, ::2] = held
        given = [leaf.requires_grad_() for leaf in given]
        value = loss(*given, target)
        found.append((value.detach(), *torch.autograd.grad(value, given)))
    (loss_of_one, *clean), (loss_of_other, *poisoned) = found
    assert torch.equal(loss_of_one, loss_of_other) and loss_of_one.isfinite()
    assert not poisoned[0][2].any()
    for one, other in zip(clean, poisoned):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


# --- Small gradients in float16 ---------------------------------------------------------------------------------------


class _WiderProducts(TorchDispatchMode):
    """float16 products into float32, which PyTorch has of a GPU's tensors alone."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out):
            *operands, dtype = args
            product = aten.mm if func in (aten.mm.dtype, aten.mm.dtype_out) else aten.addmm
            found = product(*(operand.to(dtype) for operand in operands))
            return kwargs["out"].copy_(found) if "out" in kwargs else found
        return func(*args, **kwargs)


@pytest.mark.parametrize("scale", [1e-4, *deep(1.0, 1e3)])
def test_gradients_of_many_tokens_are_no_subnormals_of_float16(monkeypatch, scale):
    """As a GPU computes them: logits in float32, their gradient in float16, products into float32."""
    monkeypatch.setattr(vocabulary, "_widens", lambda x: False)
    x, w, target = torch.randn(6, 16).half(), torch.randn(50, 16).half(), torch.randint(50, (6,))
    bias = torch.zeros(50).half()
    call = Call(x, w, target, bias, None, "sum", IGNORED, 0.1, 0.01, None, 0.5, torch.float32, False, 120, None,
                False, False, False)  # fmt: skip
    held = chunks.Rows(rows.update, rows.gradient)
    with _WiderProducts():
        kept = chunks.forward(call, held)
        statistics = kept.maximum, kept.total, kept.miss
        found = chunks.backward(Gradient(torch.tensor(scale), *statistics, True, True, True), call, held)
    leaves = [one.double().requires_grad_() for one in (x, w, bias)]
    loss = oracle.linear_cross_entropy(*leaves, target, reduction="sum", label_smoothing=0.1, z_loss=0.01,
                                       logit_scale=0.5)  # fmt: skip
    for one, exact in zip(found, torch.autograd.grad(loss, leaves, torch.tensor(scale).double())):
        error = (one.double() - exact).abs()
        # Half a unit of float16, or of its subnormals, and what the products add up.
        assert (error <= 4e-3 * exact.abs() + 4e-4 * exact.abs().amax() + 2.0**-24).all()
