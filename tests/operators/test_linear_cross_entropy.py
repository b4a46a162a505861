"""linear_cross_entropy against its oracle: shapes, chunks, options, numerics, the PyTorch launchers."""

from __future__ import annotations

import math

import oracle_linear_cross_entropy as oracle
import pytest
import torch
import torch.nn.functional
from layouts import guarded
from linear_cross_entropy_calls import DTYPES, IGNORED, _loss_backend, check, cut, gradients, tensors_of  # noqa: F401
from sharp import deep

import gptkern
from gptkern import functional as F
from gptkern.autograd import LinearCrossEntropyFunction
from gptkern.backends import vocabulary
from gptkern.operators.linear_cross_entropy import contract

if torch.cuda.is_available():
    pytest.skip("the oracle's tensors are on the CPU; gptkern check compares a GPU's kernels", allow_module_level=True)

# (rows, width, classes, tokens of a chunk): one chunk, many, chunks of one class, a tail of one class.
SHAPES = [
    (1, 1, 1, None), (5, 3, 2, 1), (17, 33, 65, None), (17, 33, 65, 4),
    pytest.param(8, 16, 64, 1, marks=pytest.mark.deep), pytest.param(9, 40, 257, 2, marks=pytest.mark.deep),
]  # fmt: skip


# --- Against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*deep(*DTYPES[:-1]), DTYPES[-1]])
@pytest.mark.parametrize(("rows", "width", "classes", "tokens"), SHAPES)
def test_forward_and_gradients(loss_backend, dtype, rows, width, classes, tokens):
    tensors, target = tensors_of(rows, width, classes, dtype, bias=rows % 2 == 1)
    check(tensors, target, tokens=tokens, reduction="sum")
    check(tensors, target, tokens=tokens, reduction="none")


OPTIONS = [
    dict(label_smoothing=0.1),
    dict(z_loss=0.05),
    dict(softcap=1.5),
    dict(logit_scale=-0.5),
    dict(weighted=True),
    dict(weighted=True, label_smoothing=0.3),
    dict(weighted=True, label_smoothing=1.0, z_loss=0.1, softcap=2.0, logit_scale=0.7),
]


@pytest.mark.parametrize(
    "reduction", ["mean", pytest.param("sum", marks=pytest.mark.deep), pytest.param("none", marks=pytest.mark.deep)]
)
@pytest.mark.parametrize("options", [*deep(*OPTIONS[:4]), *OPTIONS[4:]], ids=str)
def test_options(loss_backend, options, reduction):
    options = dict(options)
    tensors, target = tensors_of(9, 8, 33, torch.float32)
    if options.pop("weighted", False):
        options["weight"] = guarded(torch.rand(33) + 0.5)
    for tokens in (None, 2):
        # A mean's gradients are small beside the rule's rounding: they come in large.
        grad = torch.tensor(30.0) if reduction != "none" else torch.randn(9)
        check(tensors, target, tokens=tokens, reduction=reduction, grad=grad, **options)


@pytest.mark.parametrize("dtype", [DTYPES[0], *deep(DTYPES[1])])
def test_everything_in_sixteen_bits(loss_backend, dtype):
    tensors, target = tensors_of(13, 24, 70, dtype)
    weight = guarded((torch.rand(70) + 0.5).to(dtype))
    options = dict(weight=weight, label_smoothing=0.2, z_loss=0.02, softcap=3.0, logit_scale=1.3)
    check(tensors, target, tokens=3, reduction="sum", **options)


@pytest.mark.parametrize(
    "need", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("reduction", [*deep("sum"), "none"])
def test_what_is_frozen_gets_no_gradient(loss_backend, need, reduction):
    check(*tensors_of(7, 5, 19, torch.float32), tokens=2, need=need, reduction=reduction)


def test_float64():
    check(*tensors_of(7, 5, 19, torch.float64), tokens=2, reduction="sum", loss_dtype=None)
    check(*tensors_of(7, 5, 19, torch.float64), tokens=2, reduction="none", loss_dtype=None)


def test_float64_is_left_to_pytorch(triton_backend):
    (input, weight, _), target = tensors_of(3, 5, 7, torch.float64)
    with pytest.raises(gptkern.BackendError, match=r"input is torch\.float64"):
        F.linear_cross_entropy(input, weight, target)


@pytest.mark.parametrize(
    ("ignored", "index"),
    [
        ("some", 3),
        ("all", IGNORED),
        pytest.param("some", -1, marks=pytest.mark.deep),
        pytest.param("none", IGNORED, marks=pytest.mark.deep),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", *deep("sum"), "none"])
def test_ignored_rows(loss_backend, ignored, index, reduction):
    (input, weight, bias), target = tensors_of(8, 6, 11, torch.float32, ignored=False)
    if ignored == "all":
        target = torch.full_like(target, index)
    elif ignored == "some":
        target[[0, 3, 7]] = index
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    # Whatever an ignored row holds counts for nothing in its loss.
    loss = F.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], ignore_index=index, reduction=reduction, options=cut(2)
    )
    theirs = [tensor.detach().requires_grad_() for tensor in (input, weight, bias)]
    logits = torch.nn.functional.linear(*theirs)
    expected = torch.nn.functional.cross_entropy(logits, target, ignore_index=index, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    grad = torch.ones_like(loss)
    for ours, right in zip(gradients(loss, leaves, grad), gradients(expected, theirs, grad)):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-6)
    assert (ignored == "all" and reduction == "mean") == bool(loss.isnan().any())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(loss_backend, reduction):
    input = torch.zeros(0, 4, requires_grad=True)
    weight = torch.ones(6, 4, requires_grad=True)
    loss = F.linear_cross_entropy(input, weight, torch.zeros(0, dtype=torch.int64), reduction=reduction, options=cut())
    expected = torch.nn.functional.cross_entropy(
        torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64), reduction=reduction
    )
    torch.testing.assert_close(loss, expected, equal_nan=True)
    dx, dweight = gradients(loss, (input, weight), torch.ones_like(loss))
    assert dx.shape == (0, 4) and not dweight.any()


def test_one_row_without_a_batch(loss_backend):
    (input, weight, bias), target = tensors_of(1, 6, 11, torch.float32, ignored=False)
    for reduction in ("mean", "none"):
        loss, stats = F.linear_cross_entropy(
            input[0], weight, target[0], linear_bias=bias, reduction=reduction, options=cut(), return_stats=True
        )
        expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(input, weight, bias)[0], target[0])
        assert loss.shape == stats.lse.shape == stats.correct.shape == ()
        torch.testing.assert_close(loss, expected)


def test_targets_of_eight_bits(loss_backend):
    (input, weight, _), target = tensors_of(5, 6, 11, torch.float32, ignored=False)
    loss = F.linear_cross_entropy(input, weight, target.to(torch.uint8), options=cut())
    torch.testing.assert_close(loss, F.linear_cross_entropy(input, weight, target, options=cut()), rtol=0, atol=0)


# --- Numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*deep(*DTYPES[:-1]), DTYPES[-1]])
@pytest.mark.parametrize("miss", [*deep(1e-3), 1e-6])
@pytest.mark.parametrize("tokens", [None, 1])
def test_a_target_that_is_all_but_certain_keeps_its_digits(loss_backend, dtype, miss, tokens):
    # One class stands log((C - 1) / miss) above the others: p = 1 - miss, its loss is miss and its gradient -miss.
    rows, classes = 3, 9
    input = torch.ones(rows, 1).to(dtype)
    weight = torch.zeros(classes, 1)
    weight[4] = math.log((classes - 1) / miss)
    weight = weight.to(dtype)
    target = torch.full((rows,), 4)
    bias = torch.zeros(classes, dtype=dtype)
    scale = 1.0 / miss
    check((input, weight, bias), target, tokens=tokens, reduction="sum", grad=torch.tensor(scale))
    bias = bias.requires_grad_()
    loss = F.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction="sum", options=cut(tokens), loss_dtype=torch.float32
    )
    (dbias,) = gradients(loss, [bias], torch.tensor(scale))
    right = oracle.linear_cross_entropy(input, weight, None, target, reduction="sum")
    assert abs(loss.item() - right.item()) < 1e-5 * right.item()
    s = weight[4].double().item()
    expected = -rows * scale * (classes - 1) / (classes - 1 + math.exp(s))
    assert abs(dbias[4].item() - expected) < 2 * torch.finfo(dtype).eps * abs(expected)


def test_logits_far_from_zero(loss_backend):
    (input, weight, bias), target = tensors_of(7, 6, 30, torch.float32, spread=300.0)
    check((input, weight, bias), target, tokens=2, reduction="sum")


def test_a_cap_that_is_reached(loss_backend):
    (input, weight, bias), target = tensors_of(7, 6, 30, torch.float32, spread=40.0)
    check((input, weight, bias), target, tokens=2, reduction="sum", softcap=4.0)


@pytest.mark.parametrize("tokens", [None, 1])
def test_classes_that_are_impossible(loss_backend, tokens):
    (input, weight, bias), target = tensors_of(6, 4, 20, torch.float32, ignored=False)
    # All of the first chunk, so that there is no maximum yet.
    bias[:10] = -torch.inf
    target[:] = torch.tensor([10, 19, 12, 11, 15, 3])
    loss, stats = F.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction="none", options=cut(tokens), return_stats=True
    )
    logits = torch.nn.functional.linear(input, weight, bias)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    assert loss[5] == torch.inf and loss[:5].isfinite().all()
    p = torch.softmax(logits[:, 10:].double(), 1)
    torch.testing.assert_close(stats.entropy.double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-6)
    # Of nothing that is possible PyTorch's loss is NaN.
    nothing = F.linear_cross_entropy(
        input, weight, target, linear_bias=torch.full_like(bias, -torch.inf), reduction="none", options=cut(tokens)
    )
    assert nothing.isnan().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_special_value_stays_in_its_row(loss_backend, poison):
    (input, weight, bias), target = tensors_of(6, 4, 20, torch.float32, ignored=False)
    clean = F.linear_cross_entropy(input, weight, target, linear_bias=bias, reduction="none", options=cut(2))
    input[3, 1] = poison
    leaf = input.requires_grad_()
    loss = F.linear_cross_entropy(leaf, weight, target, linear_bias=bias, reduction="none", options=cut(2))
    others = [0, 1, 2, 4, 5]
    assert loss[3].isnan() and torch.equal(loss[others], clean[others])
    (dx,) = gradients(loss, [leaf], torch.ones(6))
    assert dx[3].isnan().all() and dx[others].isfinite().all()


def test_a_class_that_is_none_is_never_read(loss_backend):
    (input, weight, bias), target = tensors_of(5, 4, 20, torch.float32, ignored=False)
    target[2], target[4] = 20, -5
    with pytest.raises(IndexError, match="Target 20 is out of bounds; it needs to be from 0 to 19"):
        F.linear_cross_entropy(input, weight, target, linear_bias=bias, options=cut(2))
    # Where no value is looked at, as on a GPU, the row says so.
    call = _call(input, weight, target, bias, "none")
    found = contract.OPERATOR.forward(call, loss_backend)
    assert found[0].isnan().tolist() == [False, False, True, False, True]
    gradient = contract.Gradient(torch.ones(5), *found[1:4], True, False, False)
    dx = contract.OPERATOR.backward(gradient, call, loss_backend)[0]
    assert dx.isnan().all(1).tolist() == [False, False, True, False, True]


def _call(input, weight, target, bias, reduction, stats=False):
    return contract.Call(
        input, weight, target, bias, None, reduction, IGNORED, 0.0, 0.0, None, 1.0, torch.float32, stats,
        2 * weight.shape[0], None, False, False, False,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [None, 1])
@pytest.mark.parametrize("softcap", [*deep(None), 2.0])
def test_stats(loss_backend, tokens, softcap):
    (input, weight, bias), target = tensors_of(7, 6, 12, torch.float32)
    s = oracle.scores(input, weight, bias, softcap, 0.8)
    likeliest = s.argmax(1)
    target[[0, 4]] = likeliest[[0, 4]]
    for reduction in ("mean", "none"):
        _, stats = F.linear_cross_entropy(
            input, weight, target, linear_bias=bias, options=cut(tokens), softcap=softcap, logit_scale=0.8,
            return_stats=True, reduction=reduction,
        )  # fmt: skip
        counts = target != IGNORED
        p = torch.softmax(s, 1)
        expected = torch.logsumexp(s, 1) * counts, -(p * p.log()).sum(1) * counts
        torch.testing.assert_close(stats.lse.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.entropy.double(), expected[1], rtol=1e-5, atol=1e-6)
        assert stats.correct.dtype == torch.bool
        assert torch.equal(stats.correct, (likeliest == target) & counts) and stats.correct[[0, 4]].all()


@pytest.mark.parametrize("tokens", [None, 1])
def test_of_equal_classes_the_first_is_the_likeliest(loss_backend, tokens):
    input, weight = torch.ones(3, 1), torch.zeros(8, 1)
    weight[[2, 5, 7]] = 1.0
    _, stats = F.linear_cross_entropy(
        input, weight, torch.tensor([2, 5, 7]), options=cut(tokens), return_stats=True
    )  # fmt: skip
    assert stats.correct.tolist() == [True, False, False]


def test_twice_the_same_bits(loss_backend):
    tensors, target = tensors_of(9, 20, 99, torch.float32)
    results = []
    for _ in range(2):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], options=cut(3))
        results.append([loss, *gradients(loss, leaves)])
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float32)])
def test_everything_is_written(loss_backend, poisoned_memory, dtype):
    tensors, target = tensors_of(9, 8, 33, dtype)
    for reduction in ("sum", "none"):
        check(tensors, target, tokens=2, reduction=reduction)


# --- Wide chunks of Triton's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [16, 17, *deep(15, 32, 33, 70)])
def test_a_chunk_is_walked_in_blocks(triton_backend, monkeypatch, classes):
    from gptkern.operators.linear_cross_entropy import triton as kernels

    monkeypatch.setattr(kernels, "MOST_BLOCK", 16)
    tensors, target = tensors_of(5, 6, classes, torch.float32)
    weight = guarded(torch.rand(classes) + 0.5)
    for tokens in (None, 3):
        check(tensors, target, tokens=tokens, reduction="sum")
        check(tensors, target, tokens=tokens, reduction="none", weight=weight, label_smoothing=0.2, softcap=2.0)
        # Every block has a larger maximum than the one before, and most targets stand in the first.
        rising, early = torch.linspace(0.0, 6.0, classes), torch.tensor([0, IGNORED, 1, 2, classes - 1])
        call = contract.Call(*_call(*tensors[:2], early, rising, "none", stats=True))
        lse, entropy, correct = _stats_of(call, "triton")
        for ours, theirs in zip((lse, entropy), _stats_of(call, "torch")):
            torch.testing.assert_close(ours, theirs)
        assert torch.equal(correct, _stats_of(call, "torch")[2])


def _stats_of(call, backend):
    _, maximum, total, _, entropy, correct, *_ = contract.OPERATOR.forward(call, backend)
    return maximum + total.log(), entropy, correct


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_logits_in_sixteen_bits(triton_backend, dtype):
    """What a GPU multiplies: G in the operands' dtype, beside z in float32, which a CPU's products never see."""
    from gptkern.operators.linear_cross_entropy import chunks, rows
    from gptkern.operators.linear_cross_entropy import triton as kernels

    tensors, target = tensors_of(9, 8, 40, torch.float32)
    # Of an ignored row, whose maximum is not known, its exponential is infinite.
    tensors[2][20] = 200.0
    call = _call(*tensors[:2], target, tensors[2], "none")
    _, maximum, total, miss, *_ = contract.OPERATOR.forward(call, "torch")
    known = chunks.known(call, torch.randn(9), maximum, total, miss)
    z = (tensors[0] @ tensors[1].T)[:, 16:]
    g = torch.full((9, 48), torch.nan, dtype=dtype)[:, :24]
    kernels.gradient(call, known, z.clone(), 16, g)
    right = torch.empty_like(z)
    rows.gradient(call, known, z.clone(), 16, right)
    rows_that_count = target != IGNORED
    assert not g[~rows_that_count].any()
    torch.testing.assert_close(g.float(), right.masked_fill(~rows_that_count[:, None], 0.0), rtol=8e-3, atol=1e-6)


# --- The autograd.Function, second uses, second derivatives -----------------------------------------------------------


def _function(input, weight, bias, target, **changes):
    call = _call(input, weight, target, bias, "none")._replace(result_dtype=input.dtype, **changes)
    return LinearCrossEntropyFunction.apply(*call, "torch")[0]


@pytest.mark.parametrize("reduction", ["mean", "none", *deep("sum")])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.2, z_loss=0.1, softcap=2.0, logit_scale=0.5)], ids=str)
@pytest.mark.parametrize("ahead", [False, True])
def test_by_finite_differences(reduction, options, ahead):
    tensors, target = tensors_of(5, 3, 7, torch.float64)
    if ahead and reduction == "none":
        return
    ahead = dict.fromkeys(("ahead_input", "ahead_weight", "ahead_bias"), ahead)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda *leaves: _function(*leaves, target, reduction=reduction, **options, **ahead), leaves
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [*deep(torch.float32), torch.bfloat16])
def test_a_second_backward(loss_backend, reduction, dtype):
    tensors, target = tensors_of(7, 5, 19, dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    loss = F.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction, options=cut(2)
    )
    grad = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, leaves, grad, retain_graph=True)
    copies = [tensor.clone() for tensor in first]
    second = torch.autograd.grad(loss, leaves, 2 * grad, retain_graph=True)
    last = torch.autograd.grad(loss, leaves, grad)
    for a, copy, b, c in zip(first, copies, second, last):
        assert torch.equal(a, copy) and torch.equal(a, c)
        torch.testing.assert_close(b, 2 * a)


def test_gradients_are_handed_over_without_a_copy():
    """A leaf's grad is the memory that the forward has written: the backward makes nothing of the weight's size."""
    (input, weight, _), target = tensors_of(7, 5, 19, torch.float32)
    leaf = weight.detach().requires_grad_()
    for grad in (None, torch.tensor(0.5)):
        leaf.grad = None
        loss = F.linear_cross_entropy(input, leaf, target, options=cut(2))
        ahead = loss.grad_fn.saved_tensors[6]
        assert ahead.shape == leaf.shape
        address = ahead.data_ptr()
        del ahead
        loss.backward(grad)
        assert leaf.grad.data_ptr() == address


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error(loss_backend, reduction):
    (input, weight, _), target = tensors_of(5, 3, 7, torch.float32)
    leaf = input.requires_grad_()
    loss = F.linear_cross_entropy(leaf, weight, target, reduction=reduction, options=cut(2)).sum()
    (dx,) = torch.autograd.grad(loss, [leaf], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy has no second derivative"):
        dx.sum().backward()


# --- Few logits: PyTorch's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_logits_are_pytorchs_bit_for_bit(dtype):
    tensors, target = tensors_of(7, 5, 19, dtype)
    runs = []
    for call in (
        lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b),
        lambda x, w, b: torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, w, b), target),
    ):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = call(*leaves)
        runs.append([loss, *gradients(loss, leaves)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs))


def test_the_threshold_of_few(monkeypatch):
    tensors, target = tensors_of(8, 5, 16, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for most, name in ((128, "NllLoss"), (127, "LinearCrossEntropyFunction")):
        monkeypatch.setattr(contract, "SMALL", most)
        loss = F.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2])
        assert name in type(loss.grad_fn).__name__, loss.grad_fn


def test_few_logits_have_second_derivatives():
    tensors, target = tensors_of(4, 3, 6, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    options = dict(z_loss=0.1, softcap=2.0, logit_scale=0.7, label_smoothing=0.1)
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, **options), leaves, atol=1e-4
    )


# --- Chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # 16 even chunks of at most 8640 classes, which half of the gradients' memory has room for.
        ((8192, 4096, 128256, torch.bfloat16), 8192),
        # More than that room: 2^25 logits, of 8192 rows 4096 classes, 13 chunks.
        ((8192, 768, 50257, torch.bfloat16), 4096),
        ((100, 64, 1000, torch.float32), 1000),
        ((2**20, 64, 1000, torch.bfloat16), 32),
        ((0, 64, 1000, torch.bfloat16), 1000),
    ],
)
def test_how_many_classes_a_chunk_has(sizes, expected):
    assert vocabulary.at_a_time(*sizes) == expected


def test_chunks_cover_every_class_once():
    for classes in (1, 255, 256, 257, 5000):
        for rows in (1, 3, 1000):
            for asked in (0, 1, 700, 10**6):
                each = vocabulary.at_a_time(rows, 8, classes, torch.float32, asked)
                chunks = vocabulary.Chunks(classes, each, None, False)
                assert [i for start, stop in chunks for i in range(start, stop)] == list(range(classes))
                assert not asked or each * rows <= max(asked, rows)
