"""The distillation losses: strides, errors, dtypes, registered ops, compiled code, transforms, memory."""

from __future__ import annotations

import math
import types

import conftest
import pytest
import torch
import torch.nn.functional as F
from checking import Watched, assert_compiles, raised_by, same_bits
from distillation_calls import (
    check_linear,
    check_logits,
    linear_of,
    logits_of,
    on_every_backend,
    target_of,
    top_of,
    use_small_chunks,
)
from layouts import of_own_strides
from sharp import deep, sharp
from test_saved_tensors import LAYOUTS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptkern
import gptkern.functional as G
from gptkern import operators
from gptkern.backends import distillation, vocabulary
from gptkern.operators.distillation_loss import contract
from gptkern.operators.linear_distillation_loss import contract as linear

JSD = dict(divergence="jsd", beta=0.3, mix=0.5)


# --- Layouts ----------------------------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("classes", [33, *deep(32)])
def test_every_operand_has_strides_of_its_own(backend, device, monkeypatch, classes):
    use_small_chunks(monkeypatch)
    student, teacher = of_own_strides(*(logits_of(2, 5, classes, device=device) for _ in range(2)))
    target = of_own_strides(torch.arange(10, device=device).view(2, 5))[0]
    grad = of_own_strides(torch.randn(2, 5, device=device))[0]
    check_logits(student, teacher, target, grad=grad, reduction="none", **JSD)
    # The last dimension is not the contiguous one.
    check_logits(student.mT.contiguous().mT, teacher.mT.contiguous().mT, target, **JSD)
    # A row for all of them.
    check_logits(student, teacher[:1, :1].expand_as(teacher), target, **JSD)
    log_probabilities, indices = top_of(teacher, 6)
    top = *of_own_strides(log_probabilities), of_own_strides(indices)[0]
    check_logits(student, None, target, grad=grad, teacher_top=top, reduction="none", **JSD)


@on_every_backend
def test_a_linear_call_has_strides_of_its_own(backend, device, monkeypatch):
    use_small_chunks(monkeypatch)
    student = of_own_strides(*linear_of(2, 5, width=6, classes=33, device=device))
    teacher = of_own_strides(*linear_of(2, 5, width=9, classes=33, device=device))
    target = of_own_strides(torch.arange(10, device=device).view(2, 5))[0]
    grad = of_own_strides(torch.randn(2, 5, device=device))[0]
    check_linear(tuple(student), tuple(teacher), target, grad=grad, reduction="none", **JSD)
    transposed = student[0], student[1].mT.contiguous().mT, student[2]
    check_linear(transposed, dict(teacher_logits=logits_of(2, 5, 33, device=device).mT.contiguous().mT.view(2, 5, 33)))


@on_every_backend
@pytest.mark.parametrize("classes", [1, *(pytest.param(n, marks=pytest.mark.deep) for n in (15, 16, 63, 64, 65)), 17])
def test_classes_beside_tiles(backend, device, monkeypatch, poisoned_memory, classes):
    if backend == "triton":
        from gptkern.backends.triton import distillation as kernels

        monkeypatch.setattr(kernels, "BLOCK", 16)
    student, teacher = (logits_of(2, classes, device=device) for _ in range(2))
    target = torch.full((2,), classes - 1, device=device)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        check_logits(student, teacher, target, divergence=divergence, mix=0.5, temperature=2.0)
    check_logits(student, None, target, teacher_top=top_of(teacher, min(3, classes)), mix=0.5)


@on_every_backend
def test_one_row_without_a_batch(backend, device):
    student, weight, _ = linear_of(width=6, classes=33, device=device)
    check_linear((student, weight, None), dict(teacher_logits=logits_of(33, device=device)), reduction="none")
    check_logits(logits_of(33, device=device), logits_of(33, device=device), torch.tensor(3, device=device), mix=0.5)


# --- dtypes, gradients ------------------------------------------------------------------------------------------------


@pytest.mark.deep
@on_every_backend
@pytest.mark.parametrize("of_teacher", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("of_student", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_of_their_own(backend, device, of_student, of_teacher):
    student, teacher = (
        logits_of(5, 33, dtype=of_student, device=device),
        logits_of(5, 33, dtype=of_teacher, device=device),
    )
    assert check_logits(student, teacher).dtype == of_student
    student = linear_of(5, width=6, classes=33, dtype=of_student, device=device)
    teacher = linear_of(5, width=9, classes=33, dtype=of_teacher, device=device)
    assert check_linear(student, teacher).dtype == of_student


@pytest.mark.parametrize("backend", ["torch", "torch:launchers"], indirect=True)
def test_float64(backend, device):
    check_logits(
        *(logits_of(5, 33, device=device).double() for _ in range(2)), target_of(5, classes=33, device=device), **JSD
    )
    student, teacher = (tuple(x.double() for x in linear_of(5, width=6, classes=33, device=device)) for _ in range(2))
    check_linear(student, teacher, target_of(5, classes=33, device=device), **JSD)


def test_float64_is_left_to_pytorch(triton_backend, device):
    with pytest.raises(gptkern.BackendError, match=r"student is torch\.float64"):
        G.distillation_loss(*(logits_of(5, 33, device=device).double() for _ in range(2)))
    with pytest.raises(gptkern.BackendError, match=r"teacher is torch\.float64"):
        G.distillation_loss(logits_of(5, 33, device=device), logits_of(5, 33, device=device).double())


@on_every_backend
def test_the_teacher_gets_no_gradient(backend, device):
    student, weight, _ = linear_of(5, width=6, classes=33, device=device)
    of_teacher = [x.requires_grad_() for x in linear_of(5, width=9, classes=33, device=device)]
    student.requires_grad_()
    G.linear_distillation_loss(student, weight, *of_teacher[:2], teacher_bias=of_teacher[2]).backward()
    assert student.grad is not None and all(x.grad is None for x in of_teacher)
    log_probabilities, indices = top_of(logits_of(5, 33, device=device), 3)
    G.linear_distillation_loss(student, weight, teacher_top=(log_probabilities.requires_grad_(), indices)).backward()
    assert log_probabilities.grad is None
    teacher = logits_of(5, 33, device=device).requires_grad_()
    assert not G.distillation_loss(logits_of(5, 33, device=device), teacher).requires_grad


@on_every_backend
def test_without_gradients_it_is_the_same(backend, device):
    student, teacher = (linear_of(5, width=6, classes=33, device=device) for _ in range(2))
    with torch.no_grad():
        alone = G.linear_distillation_loss(*student[:2], *teacher[:2])
        of_logits = G.distillation_loss(teacher[0], student[0])
    leaf = student[0].requires_grad_()
    same_bits("linear", alone, G.linear_distillation_loss(leaf, student[1], *teacher[:2]).detach())
    same_bits("logits", of_logits, G.distillation_loss(teacher[0].clone().requires_grad_(), leaf).detach())


def test_autocast_multiplies_in_its_dtype_and_gives_float32(device):
    student, teacher = (linear_of(5, width=6, classes=33, device=device, bias=False) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        found = G.linear_distillation_loss(*student[:2], *teacher[:2])
    expected = G.linear_distillation_loss(*(x.bfloat16() for x in (*student[:2], *teacher[:2])), reduction="none")
    assert found.dtype == torch.float32 and expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.float().mean(), rtol=1e-2, atol=1e-3)
    plain = G.linear_distillation_loss(*student[:2], *teacher[:2])
    assert not torch.equal(found, plain)


def test_a_second_derivative(device):
    student, teacher = logits_of(2, 33, device=device).requires_grad_(), logits_of(2, 33, device=device)
    for backend in (None, "torch"):
        with gptkern.backend(backend):
            # Small logits on a CPU, and PyTorch by name.
            (first,) = torch.autograd.grad(G.distillation_loss(student, teacher), student, create_graph=True)
            assert torch.autograd.grad(first.square().sum(), student)[0].any()
    with gptkern.backend("torch:launchers"):
        (first,) = torch.autograd.grad(G.distillation_loss(student, teacher), student, create_graph=True)
        with pytest.raises(NotImplementedError, match="distillation_loss has no second derivative"):
            first.sum().backward()
    hidden, weight, _ = linear_of(2, width=6, classes=33, device=device)
    hidden.requires_grad_()
    for backend in (None, "torch:launchers"):
        with gptkern.backend(backend):
            loss = G.linear_distillation_loss(hidden, weight, teacher_logits=teacher)
            (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
            if backend is None and device == "cpu":
                assert torch.autograd.grad(first.square().sum(), hidden)[0].any()
                continue
            with pytest.raises(NotImplementedError, match=r"distillation_loss of F\.linear's logits"):
                first.sum().backward()


def test_transforms_run_on_pytorchs_operators(device):
    hidden, weight, _ = linear_of(5, width=6, classes=33, device=device)
    teacher = logits_of(5, 33, device=device)
    loss = lambda x: G.linear_distillation_loss(x, weight, teacher_logits=teacher, **(JSD | dict(mix=0.0)))  # noqa: E731
    leaf = hidden.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(hidden), leaf.grad)
    _, tangent = torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(tangent, leaf.grad.sum())


# --- Which way a call goes --------------------------------------------------------------------------------------------


def test_a_cpu_keeps_no_tensor_of_the_logits_size(device, automatic_choice, monkeypatch):
    student, teacher = (logits_of(5, 33, device=device) for _ in range(2))
    with Watched() as watched:
        G.distillation_loss(student.requires_grad_(), teacher)
        assert watched.names == []
        monkeypatch.setattr(contract, "SMALL", student.numel() - 1)
        G.distillation_loss(student, teacher)
        assert watched.names == ["distillation_loss_forward"]
        given = linear_of(5, width=6, classes=33, device=device)[:2]
        G.linear_distillation_loss(*given, teacher_logits=teacher)
        assert watched.names[1:] == []
        monkeypatch.setattr(linear, "SMALL", student.numel() - 1)
        G.linear_distillation_loss(*given, teacher_logits=teacher)
        assert watched.names[1:] == ["linear_distillation_loss_forward"]


# --- Errors -----------------------------------------------------------------------------------------------------------


def errors():
    """name -> (what is called, the exception's type, its message)"""
    s, t = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    x, w = torch.randn(2, 3, 4), torch.randn(7, 4)
    target = torch.zeros(2, 3, dtype=torch.int64)
    top = torch.log_softmax(t, -1).topk(2)
    loss, linear_loss = G.distillation_loss, G.linear_distillation_loss
    return {
        "vocabularies": (
            lambda: loss(s, torch.randn(2, 3, 9)), ValueError,
            "teacher_logits has 9 classes and student_logits 7, 2 more",
        ),
        "linear vocabularies": (
            lambda: linear_loss(x, w, x, torch.randn(5, 4)), ValueError,
            "teacher_weight has 5 classes and student_weight 7, 2 fewer",
        ),
        "vocabulary of logits": (
            lambda: linear_loss(x, w, teacher_logits=torch.randn(2, 3, 8)), ValueError, "8 classes .* 7, 1 more",
        ),
        "no teacher": (lambda: loss(s), ValueError, "none is given; it needs one"),
        "two teachers": (lambda: loss(s, t, teacher_top=top), ValueError, "both are given"),
        "no linear teacher": (lambda: linear_loss(x, w), ValueError, "none is given"),
        "two linear teachers": (
            lambda: linear_loss(x, w, x, w, teacher_logits=t), ValueError,
            "teacher and teacher_weight and teacher_logits are given",
        ),
        "a bias of nobody": (
            lambda: linear_loss(x, w, teacher_logits=t, teacher_bias=w[:, 0]), ValueError,
            "teacher_bias is given without",
        ),
        "a teacher without a weight": (
            lambda: linear_loss(x, w, x), TypeError,
            "teacher_weight is a NoneType and teacher is given; .* teacher and teacher_weight go together",
        ),
        "a weight without a teacher": (
            lambda: linear_loss(x, w, teacher_weight=w), TypeError,
            "teacher is a NoneType and teacher_weight is given; .* teacher and teacher_weight go together",
        ),
        "divergence": (lambda: loss(s, t, divergence="kl"), ValueError, "divergence is 'kl'; it needs one of"),
        "reduction": (lambda: loss(s, t, reduction="batchmean"), ValueError, "reduction is 'batchmean'"),
        "beta": (lambda: loss(s, t, divergence="jsd", beta=1.0), ValueError, "beta is 1.0; .* forward_kl and rev"),
        "beta of 0": (lambda: loss(s, t, divergence="jsd", beta=0), ValueError, "above 0 and below 1 .at 0 and 1 jsd"),
        "beta above": (lambda: loss(s, t, divergence="jsd", beta=1.5), ValueError, "beta is 1.5"),
        "temperature": (lambda: loss(s, t, temperature=0.0), ValueError, "temperature is 0.0"),
        "no temperature": (lambda: loss(s, t, temperature=math.nan), ValueError, "temperature is nan"),
        "words": (lambda: loss(s, t, temperature="1"), TypeError, "temperature is a str; it needs a number"),
        "mix": (lambda: loss(s, t, target, mix=1.5), ValueError, "mix is 1.5"),
        "mix of nothing": (lambda: loss(s, t, mix=0.5), ValueError, "target is None and mix is 0.5"),
        "stored at a temperature": (
            lambda: loss(s, teacher_top=top, temperature=2.0), ValueError,
            "temperature is 2.0 and teacher_top is given",
        ),
        "ignore_index": (lambda: loss(s, t, ignore_index=0.5), TypeError, "ignore_index is a float"),
        "target's shape": (lambda: loss(s, t, target[0]), RuntimeError, r"target has shape \(3,\); .* \(2, 3\)"),
        "target's dtype": (lambda: loss(s, t, target.int()), RuntimeError, "target is torch.int32"),
        "target's class": (lambda: loss(s, t, target + 7), IndexError, "target holds 7; it needs classes from 0 to 6"),
        "negative class": (lambda: loss(s, t, target - 1), IndexError, "target holds -1"),
        "top's class": (
            lambda: loss(s, teacher_top=(top[0], top[1] + 7)), IndexError, r"teacher_top\[1\] holds \d+; it needs",
        ),
        "a class twice": (
            lambda: loss(s, teacher_top=(top[0], torch.zeros_like(top[1]))), ValueError, "holds a class twice",
        ),
        "no pair": (lambda: loss(s, teacher_top=top[0]), TypeError, "teacher_top is a Tensor; it needs the pair"),
        "top's shapes": (
            lambda: loss(s, teacher_top=(top[0], top[1][..., :1])), RuntimeError, "teacher_top has shapes",
        ),
        "top's indices": (lambda: loss(s, teacher_top=(top[0], top[0])), TypeError, "is torch.float32; it needs int64"),
        "rows": (lambda: loss(s, t[:1]), RuntimeError, r"teacher_logits has shape \(1, 3, 7\); .* \(2, 3, \*\)"),
        "integers": (lambda: loss(s.long(), t), RuntimeError, "student_logits is torch.int64"),
        "no tensor": (lambda: loss([1.0], t), TypeError, "student_logits is a list"),
        "no classes": (lambda: loss(s[..., :0], t[..., :0]), ValueError, "at least one class"),
        "width": (lambda: linear_loss(x, w[:, :3], x, w), RuntimeError, r"student_weight has shape \(7, 3\)"),
        "teacher's width": (lambda: linear_loss(x, w, x, w[:, :3]), RuntimeError, r"teacher_weight has shape \(7, 3\)"),
        "bias": (lambda: linear_loss(x, w, x, w, student_bias=w[0]), RuntimeError, r"student_bias has shape \(4,\)"),
        "dtypes": (lambda: linear_loss(x, w.half(), x, w), RuntimeError, "student_weight is torch.float16"),
        "device": (lambda: loss(s, t.to("meta")), RuntimeError, "teacher_logits is on meta; it needs the student's"),
    }  # fmt: skip


@pytest.mark.parametrize("name", errors())
def test_errors(name, automatic_choice):
    call, kind, message = errors()[name]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert type(raised.value) is kind


@pytest.mark.parametrize("of_hidden", [False, True])
@pytest.mark.parametrize(
    "stored, message",
    [
        (lambda logits: logits, r"teacher_top\[0\] holds \d"),
        (lambda logits: logits - 100.0, None),
        (lambda logits: logits.softmax(-1), r"teacher_top\[0\] holds 0\.\d"),
        # Below 0, but not normalised.
        (lambda logits: logits - logits.max(), r"the exponentials of a row of teacher_top\[0\] sum to [12]\."),
    ],
    ids=["logits", "rest", "probabilities", "sums"],
)
def test_what_is_no_logarithm_of_probabilities(device, automatic_choice, of_hidden, stored, message):
    hidden, weight, _ = linear_of(6, width=5, classes=7, device=device, bias=False)
    values = torch.tensor([2.0, 1.9, -1.0, 0.5, 1.8, 0.1, -2.0]).expand(6, 7)
    top = tuple(stored(values).topk(3))

    def loss(target=None):
        given = dict(target=target, teacher_top=top)
        if of_hidden:
            return G.linear_distillation_loss(hidden, weight, **given)
        return G.distillation_loss(values, **given)

    if message is None:
        loss()
        return
    with pytest.raises(ValueError, match=f"{message}.*teacher_top needs .*log_softmax.*topk"):
        loss()
    # Of rows that do not count nothing is asked.
    loss(torch.full((6,), -100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_logarithms_are_taken(device, automatic_choice, dtype):
    for classes, size in ((1, 1.0), (4096, 1e-2), (4096, 30.0)):
        logits = size * torch.randn(4, classes, device=device)
        top = torch.log_softmax(logits, -1).topk(classes)
        G.distillation_loss(logits, teacher_top=(top[0].to(dtype).float(), top[1]))
        G.distillation_loss(logits, teacher_top=(top[0].to(dtype), top[1]))


def test_a_class_that_is_none_is_nan_where_nobody_looks(triton_backend, device, monkeypatch):
    # As on a GPU, whose values are not looked at.
    from gptkern.backends import distillation_checks

    monkeypatch.setattr(distillation_checks.tracing, "has_values", lambda tensor: False)
    student, teacher = (logits_of(3, 33, device=device) for _ in range(2))
    losses = G.distillation_loss(student, teacher, torch.tensor([2, 33, -1], device=device), mix=0.5, reduction="none")
    assert losses.isnan().tolist() == [False, True, True]


# --- Registered ops, compiled code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name_of_backend", ["torch", "triton"])
def test_the_registered_ops(triton_backend, device, name_of_backend):
    student, teacher, target = logits_of(5, 33, device=device), logits_of(5, 33, device=device), torch.arange(5)
    options = "jsd", 0.3, 1.0, 0.5, -100
    log_probabilities, indices = top_of(teacher, 3)
    for of_teacher in ((teacher, None, None), (None, log_probabilities, indices)):
        call = contract.Call(student, *of_teacher, target, *options)
        tests = dict(test_utils=("test_schema", "test_faketensor"))
        ops = torch.ops.gptkern
        torch.library.opcheck(ops.distillation_loss_forward.default, (*call, name_of_backend), **tests)
        losses, *kept = ops.distillation_loss_forward(*call, name_of_backend)
        given = torch.ones_like(losses), *kept, *call, name_of_backend
        torch.library.opcheck(ops.distillation_loss_backward.default, given, **tests)
    hidden, weight, bias = linear_of(5, width=6, classes=33, device=device)
    call = linear.Call(hidden, weight, bias, None, None, None, teacher, None, None, target, *options)
    torch.library.opcheck(ops.linear_distillation_loss_forward.default, (*call, name_of_backend), **tests)
    losses, *kept = ops.linear_distillation_loss_forward(*call, name_of_backend)
    for needs in ((True, True, True), (True, False, False), (False, True, False)):
        given = torch.ones_like(losses), *kept, *needs, *call, name_of_backend
        torch.library.opcheck(ops.linear_distillation_loss_backward.default, given, **tests)


@pytest.mark.parametrize("backend", [*deep("torch", "torch:launchers"), conftest.KERNEL_BACKENDS[0]], indirect=True)
def test_compiled_as_eager(backend, device, monkeypatch):
    # A small call on PyTorch's operators is rounded in another order than the node that a compiler sees.
    monkeypatch.setattr(linear, "SMALL", 0)
    student, teacher = (linear_of(5, width=6, classes=33, device=device) for _ in range(2))
    target = target_of(5, classes=33, device=device)
    assert_compiles(
        lambda x, w: G.linear_distillation_loss(x, w, *teacher[:2], target=target, **JSD), *student[:2]
    )  # fmt: skip
    top = top_of(logits_of(5, 33, device=device), 3)
    assert_compiles(
        lambda s: G.distillation_loss(s, teacher_top=top, target=target, **JSD), logits_of(5, 33, device=device)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_small_call_is_compiled_to_the_eager_one_within_rounding(dtype):
    student, teacher = (linear_of(5, width=6, classes=33, dtype=dtype) for _ in range(2))
    target = target_of(5, classes=33, device="cpu")

    def loss(x, w):
        return G.linear_distillation_loss(x, w, *teacher[:2], target=target, **JSD)

    found = []
    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, w = (tensor.detach().clone().requires_grad_() for tensor in student[:2])
        function(x, w).sum().backward()
        found.append((function(x, w).detach(), x.grad, w.grad))
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager)


# --- Memory and products ----------------------------------------------------------------------------------------------


def launched(name, args):
    fields = args[:-1]
    module = linear if name.startswith("linear") else contract
    if name.endswith("forward"):
        found = module.forward(module.Call(*fields))
    else:
        count = len(module.Gradient._fields)
        found = module.backward(module.Gradient(*fields[:count]), module.Call(*fields[count:]))
    return found if isinstance(found, torch.Tensor) else tuple(args[0].new_empty(0) if x is None else x for x in found)


class Counting(TorchDispatchMode):
    """The most bytes that live at once of what is made inside the block, and the multiplications of all products.

    Args:
        known: what was there before.
    """

    def __init__(self, *known: torch.Tensor | None):
        super().__init__()
        self.most, self.products = 0, 0
        self._known = {x.untyped_storage()._cdata for x in known if x is not None}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = op.overloadpacket
        if op.namespace == "gptkern":
            # What is inside of the registered op is what is looked at.
            with self:
                return launched(packet.__name__, args)
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[packet is not torch.ops.aten.mm :][:2]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        # PyTorch without CUDA has no fake of this one; its result is `out`.
        results = kwargs["out"] if op is torch.ops.aten.addmm.dtype_out else op(*args, **kwargs)
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return results


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("given", ["hidden", "logits"])
def test_memory_and_products_of_a_large_step(given, divergence):
    """8192 tokens, width 4096, vocabulary 128,256, in bfloat16 on a GPU, as fake tensors: nothing is computed."""
    tokens, width, teacher_width, classes = 8192, 4096, 8192, 128_256
    seen = []

    def gradient(student, *_):
        *_, output = _
        assert output.shape == student.shape and output.dtype == torch.bfloat16
        seen.append(output.shape)

    # A GPU's kernels make no tensors.
    rows = types.SimpleNamespace(walk=lambda *_: None, walk_again=lambda *_: None, gradient=gradient)
    with FakeTensorMode(), torch.no_grad():

        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(*shape, dtype=dtype, device="cuda")

        of_teacher = [None] * 6
        if given == "hidden":
            of_teacher[:2] = empty(tokens, teacher_width), empty(classes, teacher_width)
        else:
            of_teacher[3] = empty(tokens, classes)
        call = linear.Call(
            empty(tokens, width), empty(classes, width), None, *of_teacher, None, divergence, 0.5, 1.0, 0.0, -100
        )
        grad = empty(tokens, dtype=torch.float32)
        with Counting(*call[:10], grad) as forward:
            kept = linear.forward_on(rows, call)[1:]
        with Counting(*call[:10], grad, *kept) as backward:
            linear.backward_on(rows, linear.Gradient(grad, *kept, True, True, False), call)
    assert sum(shape[1] for shape in seen) == classes and len(seen) < 50
    gradients = 2 * (tokens + classes) * width
    assert forward.most < 0.5 * gradients and gradients < backward.most < 1.5 * gradients, (forward.most, backward.most)
    product = tokens * width * classes
    of_both = product + (tokens * teacher_width * classes if given == "hidden" else 0)
    walks = 2 if divergence == "jsd" else 1
    assert forward.products == walks * of_both
    assert backward.products == of_both + 2 * product


@pytest.mark.parametrize("given", ["hidden", *deep("logits", "top")])
@pytest.mark.parametrize("dtype", [*deep(torch.float32), torch.bfloat16], ids=str)
def test_a_cpu_never_holds_the_logits(device, monkeypatch, given, dtype):
    rows, classes = 64, 16_032
    monkeypatch.setattr(vocabulary, "LEAST_ELEMENTS", 2**15)
    monkeypatch.setattr(distillation, "_BLOCK", {"cpu": 2**12, "cuda": 2**12})
    leaves = [x.requires_grad_() for x in linear_of(rows, width=8, classes=classes, dtype=dtype, device=device)]
    hidden, weight, _ = linear_of(rows, width=12, classes=classes, dtype=dtype, device=device, bias=False)
    logits = F.linear(hidden.float(), weight.float())
    of_teacher = {
        "hidden": dict(teacher=hidden, teacher_weight=weight),
        "logits": dict(teacher_logits=logits),
        "top": dict(teacher_top=top_of(logits, 8)),
    }[given]
    with Counting(*leaves, hidden, weight, logits) as counting:
        loss = G.linear_distillation_loss(*leaves[:2], student_bias=leaves[2], divergence="jsd", **of_teacher)
        loss.backward()
    assert counting.most < 4 * rows * classes / 2
    found = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    whole = F.linear(*(leaf.float() for leaf in leaves))
    of_logits = of_teacher if given == "top" else dict(teacher_logits=logits)
    with gptkern.backend("torch"), Counting() as counting:
        expected = G.distillation_loss(whole, **of_logits, divergence="jsd")
        expected.backward()
    # The counter sees what would not be allowed.
    assert counting.most > 4 * rows * classes
    near = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(loss.float(), expected, **near)
    for one, leaf in zip(found, leaves):
        torch.testing.assert_close(one, leaf.grad, **near)


@pytest.mark.parametrize("given", ["hidden", "top"])
@pytest.mark.parametrize("counting", [0, 5])
def test_a_cpu_multiplies_only_rows_that_count(device, given, counting, monkeypatch):
    monkeypatch.setattr(linear, "SMALL", 0)
    student = linear_of(20, width=5, classes=37, device=device)
    teacher = linear_of(20, width=8, classes=37, device=device)
    if given == "top":
        teacher = dict(teacher_top=top_of(logits_of(20, 37, device=device), 3))
    target = torch.full((20,), -100)
    target[3 : 3 + counting] = 7
    reduction = "mean" if counting else "sum"
    check_linear(student, teacher, target, reduction=reduction, divergence="reverse_kl", mix=0.5)
    of_teacher = dict(zip(("teacher", "teacher_weight"), teacher)) if given == "hidden" else teacher
    leaves = [x.clone().requires_grad_() for x in student[:2]]
    with Counting() as counted:
        G.linear_distillation_loss(*leaves, target=target, reduction="sum", **of_teacher).backward()
    of_both = 5 + (8 if given == "hidden" else 0)
    assert counted.products == counting * 37 * (2 * of_both + 2 * 5)


@on_every_backend
@pytest.mark.parametrize("layout", sharp(LAYOUTS, next(iter(LAYOUTS))))
def test_saved_tensors_may_come_back_in_another_layout(backend, device, layout):
    student = [x.requires_grad_() for x in linear_of(5, width=6, classes=33, device=device)]
    teacher = linear_of(5, width=9, classes=33, device=device)
    target, top = target_of(5, classes=33, device=device), top_of(logits_of(5, 33, device=device), 4)

    def gradients():
        losses = (
            G.linear_distillation_loss(*student[:2], *teacher[:2], target, student_bias=student[2], **JSD),
            G.linear_distillation_loss(*student[:2], target=target, teacher_top=top, student_bias=student[2], mix=0.5),
            G.distillation_loss(student[0], teacher[0][:, :6], **(JSD | dict(mix=0.0))),
        )
        return [gradient for loss in losses for gradient in torch.autograd.grad(loss, student, allow_unused=True)]

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(LAYOUTS[layout], lambda kept: kept):
        found = gradients()
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_both_are_in_the_list_of_operators():
    assert {"distillation_loss", "linear_distillation_loss"} <= set(operators.NAMES)
    assert isinstance(raised_by(G.distillation_loss, None), TypeError)
