"""cross_entropy: every backend against the oracle; digits; rows in steps; the gradient over the logits; stats."""

from __future__ import annotations

import math

import oracle_cross_entropy
import pytest
import torch
import torch.nn.functional as F
from checking import check, same_bits
from cross_entropy_calls import (
    CALLS,
    call_of,
    calls,
    check_cross_entropy,
    classes_for,
    dtypes,
    probabilities_for,
    random,
    slow_calls,
    weights_for,
)
from layouts import guarded, of_own_strides
from sharp import deep

import gptkern
import gptkern.functional as G
from gptkern.autograd import CrossEntropyFunction
from gptkern.backends import dispatch, losses


@pytest.fixture
def narrow_rows(triton_backend, monkeypatch):
    """Rows from 16 classes on have programs of their own, in steps of 64."""
    kernels = dispatch.load(triton_backend, "cross_entropy")
    monkeypatch.setattr(kernels, "WIDE_ROW", 16)
    monkeypatch.setattr(kernels, "_ROW_STEP", 64)
    return triton_backend


# Where the others go the same way.
one_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.deep) for dtype in (torch.float16, torch.float32))],
    ids=str,
)


# --- Against the oracle ---------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("classes", [1, 64, 65, *deep(2, 17, 129)])
def test_classes(plain_or_triton, device, dtype, classes):
    output = check_cross_entropy(random(9, classes, device=device, dtype=dtype))
    assert output.dtype == dtype and output.shape == ()


@calls
@dtypes
def test_options(plain_or_triton, device, dtype, name):
    input = random(7, 33, device=device, dtype=dtype)
    target, weight, options = call_of(name, input)
    check_cross_entropy(input, target, weight, **options)


@pytest.mark.parametrize("shape", [(33,), (2, 9, 5), (3, 7, 2, 3), *deep((2, 3, 2, 2, 2, 2), (1, 40, 70))], ids=str)
@pytest.mark.parametrize("name", ["everything", "probabilities, everything", *deep("plain", "each row")])
def test_positions(plain_or_triton, device, shape, name):
    input = random(*shape, device=device)
    target, weight, options = call_of(name, input)
    output = check_cross_entropy(input, target, weight, **options)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    assert output.shape == (rows if options.get("reduction") == "none" else ())


@dtypes
@pytest.mark.parametrize("classes", [16, 63, 64, 65, *deep(17, 127, 128, 130, 200)])
def test_rows_in_steps(narrow_rows, device, dtype, poisoned_memory, classes):
    check_cross_entropy(guarded(random(5, classes, device=device, dtype=dtype)), reduction="none")


@slow_calls
def test_rows_in_steps_with_options(narrow_rows, device, poisoned_memory, name):
    for classes in (64, 75):
        input = guarded(random(5, classes, device=device, dtype=torch.bfloat16))
        target, weight, options = call_of(name, input)
        check_cross_entropy(input, target, weight, **options)


@dtypes
@pytest.mark.parametrize("offset", [1, 4, *deep(0, 3, 7)])
def test_rows_that_begin_anywhere(narrow_rows, device, dtype, offset):
    # What lies between the rows and around them is NaN.
    whole = torch.full((6, 101), math.nan, device=device).to(dtype)
    rows = whole[1:5, offset : offset + 70]
    rows.copy_(random(4, 70))
    check_cross_entropy(rows, reduction="none")


def test_a_row_as_wide_as_its_edges(narrow_rows, device, monkeypatch):
    monkeypatch.setattr(dispatch.load(narrow_rows, "cross_entropy"), "WIDE_ROW", 1)
    for classes in (1, 2, 7, 8, 9, 16, 17, 19):
        check_cross_entropy(guarded(random(4, classes, device=device, dtype=torch.bfloat16)), reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float32)], ids=str)
def test_gpt2s_odd_rows(plain_or_triton, device, dtype):
    check_cross_entropy(random(3, 50257, device=device, dtype=dtype), torch.tensor([50256, -100, 0], device=device))


@pytest.mark.deep
def test_the_widest_rows(plain_or_triton, device):
    check_cross_entropy(random(2, 262144, device=device), torch.tensor([262143, 4095], device=device), softcap=3.0)


def strided(device, dtype=torch.float32):
    base = random(18, 34, 12, device=device, dtype=dtype)
    yield "transposed", base[:9, :17, 0].T
    yield "every second", base[::2, ::2, 0]
    yield "classes last, as models have them", base[:3, :5, :7].transpose(1, 2)
    yield "classes first", base[:5, :4, :6].transpose(0, 1)
    yield "expanded rows", base[:1, :17, 0].expand(4, 17)
    yield "positions of two strides", base[:2, ::2].view(2, 17, 3, 4).permute(0, 2, 1, 3)[:, :, ::2]
    yield "positions of three strides", random(2, 4, 6, 8, 5, device=device, dtype=dtype)[:, :, ::2, ::3, ::2]


def test_strides(plain_or_triton, device):
    for name, view in strided(device):
        for kind in ("each row", "probabilities, each row"):
            target, weight, options = call_of(kind, view)
            try:
                check_cross_entropy(view, target, weight, **options)
            except AssertionError as error:
                raise AssertionError(f"{name}, {kind}: {error}") from error


@pytest.mark.parametrize("shape", [(5, 33), (3, 40, 5), (4, 80)], ids=str)
def test_every_operand_has_strides_of_its_own(narrow_rows, device, shape):
    input = random(*shape, device=device)
    tensors = input, probabilities_for(input), torch.randn(shape[:1] + shape[2:], device=device)
    input, target, grad_output = of_own_strides(*tensors)
    check_cross_entropy(input, target, grad_output=grad_output, reduction="none")
    classes = of_own_strides(classes_for(input), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64))[0]
    weight = guarded(weights_for(input).repeat_interleave(2))[::2]
    check_cross_entropy(input, classes.to(device), weight, grad_output=grad_output, reduction="none")


def test_the_gradient_has_the_strides_of_the_logits(plain_or_triton, device):
    logits = random(2, 7, 33, device=device).transpose(1, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(G.cross_entropy(logits, classes_for(logits)), logits)
    assert plain_or_triton == "torch" or gradient.stride() == logits.stride()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("ignored", [-100, 3, 255, 7])
def test_ignore_index(plain_or_triton, device, dtype, ignored):
    input = random(12, 9, device=device)
    target = classes_for(input, None)
    target[::3] = ignored % 256 if dtype == torch.uint8 else ignored
    check_cross_entropy(
        input,
        target.to(dtype),
        weights_for(input),
        ignore_index=ignored % 256 if ignored < 0 and dtype == torch.uint8 else ignored,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_class_of_uint8_is_no_negative_ignore_index(plain_or_triton, device, dtype):
    """PyTorch compares uint8 with -100 as if that were 156."""
    input, target = random(3, 200, device=device).to(dtype), torch.tensor([156, 5, 7], device=device)
    options = dict(z_loss=0.1, return_stats=True)
    (loss, stats), (wanted, of_long) = (
        G.cross_entropy(input, classes, **options) for classes in (target.to(torch.uint8), target)
    )
    assert torch.equal(loss, wanted) and all(map(torch.equal, stats, of_long))
    if input.is_cpu and plain_or_triton == "torch":
        with pytest.raises(IndexError):
            G.cross_entropy(input[:, :100], target.to(torch.uint8))


# --- What is ignored, wrong or not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("name", ["each row", "everything"])
def test_an_ignored_row_is_not_read(narrow_rows, device, poisoned_memory, name, classes):
    input = random(6, classes, device=device)
    target, weight, options = call_of(name, input)
    target[:] = torch.tensor([1, -100, 2, -100, -100, 0])
    input[target == -100] = math.nan
    leaf = input.requires_grad_()
    output = G.cross_entropy(leaf, target, weight, **options)
    output.sum().backward()
    assert (output[target == -100] == 0).all() and (leaf.grad[target == -100] == 0).all()
    assert output.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"z_loss": 0.1}], ids=str)
def test_all_ignored(plain_or_triton, device, options):
    input = random(4, 9, device=device).requires_grad_()
    target = torch.full((4,), -100, device=device)
    output = G.cross_entropy(input, target, **options)
    plain = {key: value for key, value in options.items() if key != "z_loss"}
    same_bits("the loss", output, F.cross_entropy(input, target, **plain))
    (gradient,) = torch.autograd.grad(output, input)
    assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0, 9), (2, 9, 0), (0, 9, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("extended", [{}, {"softcap": 2.0, "z_loss": 0.1}], ids=["plain", "extended"])
def test_no_rows(plain_or_triton, device, shape, reduction, extended):
    for make in (classes_for, probabilities_for):
        input = random(*shape, device=device).requires_grad_()
        target = make(input.detach())
        output = G.cross_entropy(input, target, reduction=reduction, **extended)
        same_bits("the loss", output, F.cross_entropy(input, target, reduction=reduction))
        output.sum().backward()
        assert input.grad.shape == shape


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_special_values_as_in_pytorch(plain_or_triton, device, value, options, classes, monkeypatch):
    if plain_or_triton == "triton":
        monkeypatch.setattr(dispatch.load("triton", "cross_entropy"), "WIDE_ROW", 16)
    input = random(6, classes, device=device)
    target = torch.tensor([1, 5, 2, 3, 4, 0], device=device)
    input[0, 0] = input[1, 5] = input[2, 2] = value
    input[2, 0] = input[3] = -math.inf
    input[4, :3] = -math.inf
    results = []
    for function in (G.cross_entropy, F.cross_entropy):
        leaf = input.clone().requires_grad_()
        output = function(leaf, target, reduction="none", **options)
        output.sum().backward()
        results.append((output, leaf.grad))
    for name, actual, expected in zip(("loss", "gradient"), *results):
        torch.testing.assert_close(actual, expected, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("softcap", [None, 30.0])
@dtypes
def test_huge_logits(plain_or_triton, device, dtype, softcap):
    input = (random(5, 65, device=device) * 1e4).clamp(-6e4, 6e4).to(dtype)
    input[0], input[1, ::2] = 6e4, -6e4
    check_cross_entropy(input, softcap=softcap, reduction="none")


@pytest.mark.parametrize("classes", [9, 80])
def test_a_class_that_there_is_none_of(narrow_rows, device, classes):
    input = random(5, classes, device=device).requires_grad_()
    target = torch.tensor([0, classes, -1, 2**40 + 1, 3], device=device)
    output = G.cross_entropy(input, target, weights_for(input), reduction="none", z_loss=0.1)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    wrong = torch.tensor([False, True, True, True, False], device=device)
    same_bits("NaN", output.isnan(), wrong)
    same_bits("NaN of the gradient", gradient.isnan(), wrong[:, None].expand(gradient.shape))
    assert G.cross_entropy(input, target).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("extended", [{}, {"z_loss": 0.1}], ids=["plain", "extended"])
def test_a_class_that_there_is_none_of_on_a_cpu(dtype, extended):
    with gptkern.backend("torch"):
        for wrong in (9, -1):
            with pytest.raises(IndexError, match=str(wrong)):
                G.cross_entropy(random(2, 9, dtype=dtype), torch.tensor([0, wrong]), **extended)


# --- Digits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("dtype", [torch.float32, *deep(torch.bfloat16, torch.float16)], ids=str)
@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9])
def test_the_true_classs_gradient_where_its_probability_is_near_1(
    plain_or_triton, device, dtype, rest, classes, monkeypatch
):
    if plain_or_triton == "triton":
        monkeypatch.setattr(dispatch.load("triton", "cross_entropy"), "WIDE_ROW", 16)
    # p = 1 - rest: its logit is log((1 - rest) / rest * (classes - 1)) above the others', all of them near 20.
    above = math.log((1 - rest) / rest * (classes - 1))
    input = 20.0 + 0.1 * torch.randn(6, classes)
    target = torch.arange(6) % classes
    input[torch.arange(6), target] = 20.0 + above
    input, target = input.to(device=device, dtype=dtype), target.to(device)
    exact = torch.softmax(input.double(), 1)
    exact = exact.scatter(1, target[:, None], 0.0).sum(1).neg()
    leaf = input.clone().requires_grad_()
    # Times 2^10, so that float16 has normal numbers for it.
    output = G.cross_entropy(leaf, target, reduction="none", logit_scale=1.0)
    output.backward(torch.full((6,), 1024.0, device=device).to(dtype))
    found = leaf.grad.double().gather(1, target[:, None])[:, 0] / 1024
    is_pytorchs = plain_or_triton == "torch" and dtype == torch.float32
    tolerance = 2e-7 / rest if is_pytorchs else {torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    if dtype == torch.float16 and rest < 1e-6:
        tolerance = 0.1  # a subnormal
    assert ((found - exact).abs() <= tolerance * exact.abs()).all(), (found / exact - 1).abs().max()
    if not is_pytorchs and dtype != torch.float16:
        loss = -torch.log1p(exact)
        assert ((output.double() - loss).abs() <= max(tolerance, torch.finfo(dtype).eps) * loss).all()


# --- The gradient over the logits -----------------------------------------------------------------------------------


def written_over(input, target, *, softcap=None, **options):
    """(logits, loss, the leaf's gradient, how often the logits were written) of a call in place."""
    leaf = input.clone().requires_grad_()
    logits = leaf * 1.0
    before = logits._version
    loss = G.cross_entropy(logits, target, softcap=softcap, in_place_gradient=True, **options)
    loss.backward(torch.ones_like(loss))
    return logits, loss.detach(), leaf.grad, logits._version - before


@pytest.mark.parametrize("name", ["everything", "probabilities, everything", *deep("plain")])
@pytest.mark.parametrize("shape", [(6, 33), (6, 75), (3, 9, 5)], ids=str)
@one_dtype
def test_in_place(plain_or_triton, device, dtype, shape, name, monkeypatch):
    if plain_or_triton == "triton":
        monkeypatch.setattr(dispatch.load("triton", "cross_entropy"), "WIDE_ROW", 64)
    input = random(*shape, device=device, dtype=dtype)
    target, weight, options = call_of(name, input)
    logits, loss, gradient, written = written_over(input, target, weight=weight, **options)
    leaf = input.clone().requires_grad_()
    expected = G.cross_entropy(leaf, target, weight, **options)
    expected.backward(torch.ones_like(expected))
    same_bits("the loss", loss, expected.detach())
    same_bits("the gradient", gradient, leaf.grad)
    same_bits("what stands in the logits", logits.detach(), gradient)
    assert written == 1


def test_in_place_of_strided_logits(plain_or_triton, device):
    leaf = random(3, 7, 33, device=device).requires_grad_()
    logits = (leaf * 1.0).transpose(1, 2)
    target = classes_for(logits)
    G.cross_entropy(logits, target, in_place_gradient=True).backward()
    other = leaf.detach().clone().requires_grad_()
    G.cross_entropy(other.transpose(1, 2), target).backward()
    same_bits("the gradient", leaf.grad, other.grad)
    same_bits("what stands in the logits", logits.detach(), leaf.grad.transpose(1, 2))


def test_in_place_of_logits_that_are_copied_to_be_read(plain_or_triton, device):
    leaf = random(2, 4, 6, 8, 5, device=device).requires_grad_()
    logits = (leaf * 1.0)[:, :, ::2, ::3, ::2]
    target = classes_for(logits)
    G.cross_entropy(logits, target, in_place_gradient=True).backward()
    other = leaf.detach().clone().requires_grad_()
    G.cross_entropy(other[:, :, ::2, ::3, ::2], target).backward()
    same_bits("the gradient", leaf.grad, other.grad)
    same_bits("what stands in the logits", logits.detach(), leaf.grad[:, :, ::2, ::3, ::2])


@dtypes
def test_another_use_of_what_was_written_over_raises(plain_or_triton, device, dtype):
    leaf = random(5, 9, device=device, dtype=dtype).requires_grad_()
    logits = leaf * 1.0
    other = logits.square().sum()  # saves the logits
    loss = G.cross_entropy(logits, classes_for(logits), in_place_gradient=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_written_over(plain_or_triton, device):
    leaf = random(5, 9, device=device).requires_grad_()
    target = classes_for(leaf.detach())
    for logits, words in (
        (leaf, "a leaf that requires grad"),
        (leaf.view(5, 9), "a view of a leaf that requires grad"),
        ((leaf * 1.0)[:1].expand(5, 9), "share memory"),
        ((leaf * 1.0).view(-1).as_strided((5, 9), (1, 2)), "share memory"),
    ):
        with pytest.raises(ValueError, match=words):
            G.cross_entropy(logits, target, in_place_gradient=True)
    # Nothing is written where nobody asks for a gradient.
    plain = leaf.detach().clone()
    G.cross_entropy(plain, target, in_place_gradient=True)
    same_bits("the logits", plain, leaf.detach())
    assert plain._version == 0


def test_a_second_derivative_of_what_was_written_over_is_refused(plain_or_triton, device):
    leaf = random(5, 9, device=device).requires_grad_()
    loss = G.cross_entropy(leaf * 1.0, classes_for(leaf.detach()), in_place_gradient=True)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*written over"):
        gradient.sum().backward()


# --- Stats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*deep((7, 33)), (7, 75), (3, 9, 5)], ids=str)
@pytest.mark.parametrize(
    "options", [*deep({}), {"softcap": 1.0, "logit_scale": 2.0, "label_smoothing": 0.1}], ids=["plain", "all"]
)
@pytest.mark.parametrize("make", [classes_for, probabilities_for])
@one_dtype
def test_stats(plain_or_triton, device, dtype, shape, options, make, monkeypatch):
    if plain_or_triton == "triton":
        monkeypatch.setattr(dispatch.load("triton", "cross_entropy"), "WIDE_ROW", 64)
        monkeypatch.setattr(dispatch.load("triton", "cross_entropy"), "_ROW_STEP", 32)
    input = random(*shape, device=device, dtype=dtype)
    # Equal ones, of which the first counts: in one step, in two, in an edge.
    input[0, [2, 5]] = input[2, [0, 8]] = input[3 % shape[0], [7, shape[1] - 1]] = 9.0
    target = make(input)
    if make is classes_for:
        target[0], target[2], target[3 % shape[0]] = 2, 8, 7
    leaf = input.clone().requires_grad_()
    loss, stats = G.cross_entropy(leaf, target, return_stats=True, **options)
    alone = G.cross_entropy(input, target, **options)
    torch.testing.assert_close(loss, alone, rtol=torch.finfo(dtype).eps * 2, atol=0)
    kept = {key: value for key, value in options.items() if key != "label_smoothing"}
    lse, entropy, correct = oracle_cross_entropy.stats(input, target, **kept)
    assert isinstance(stats, losses.CrossEntropyStats)
    assert stats.lse.dtype == stats.entropy.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in stats)
    torch.testing.assert_close(stats.lse, lse.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy, entropy.float(), rtol=1e-5, atol=2e-6)
    same_bits("correct", stats.correct, correct)
    loss.backward()
    other = input.clone().requires_grad_()
    G.cross_entropy(other, target, **options).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_stats_of_one_row_and_of_special_values(plain_or_triton, device):
    loss, stats = G.cross_entropy(
        random(9, device=device), torch.tensor(3, device=device), return_stats=True, reduction="none"
    )
    assert loss.shape == stats.lse.shape == stats.correct.shape == ()
    input = torch.tensor([[0.0, -math.inf, -math.inf], [math.nan, 1.0, 2.0], [5.0, math.inf, 1.0]], device=device)
    _, stats = G.cross_entropy(input, torch.tensor([0, 0, 1], device=device), return_stats=True)
    assert stats.correct.tolist() == [True, True, True]
    assert stats.lse[0] == 0 and stats.entropy[0] == 0 and stats.lse[1].isnan()


# --- The same bits every time, sums over rows -----------------------------------------------------------------------


@dtypes
def test_two_runs_give_the_same_bits(triton_backend, device, dtype):
    input = random(40, 33, device=device, dtype=dtype)
    target = classes_for(input)
    runs = []
    for _ in range(2):
        leaf = input.clone().requires_grad_()
        output = G.cross_entropy(leaf, target, label_smoothing=0.1)
        output.backward()
        runs.append((output.detach(), leaf.grad))
    same_bits("forward", runs[0][0], runs[1][0])
    same_bits("gradient", runs[0][1], runs[1][1])


@pytest.mark.parametrize("rows", [8, 9, 33, *deep(7, 16, 17, 100)])
@pytest.mark.parametrize("name", ["weights", "probabilities", *deep("plain", "sum")])
def test_more_rows_than_one_program_sums(triton_backend, device, monkeypatch, poisoned_memory, rows, name):
    from gptkern.backends.triton import row_sums

    monkeypatch.setattr(row_sums, "BLOCK", 4)
    monkeypatch.setattr(row_sums, "ALONE", 8)
    input = random(rows, 5, device=device)
    target, weight, options = call_of(name, input)
    check_cross_entropy(input, target, weight, **options)


# --- The PyTorch launchers ------------------------------------------------------------------------------------------


def arguments_of(name: str, input: torch.Tensor) -> tuple:
    target, weight, options = call_of(name, input)
    return (
        target, weight, options.get("reduction", "mean"), -100, options.get("label_smoothing", 0.0),
        options.get("z_loss", 0.0), options.get("softcap"), options.get("logit_scale", 1.0), input.dtype, False, False,
    )  # fmt: skip


@calls
def test_the_pytorch_launchers(device, name):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        input = random(7, 9, device=device, dtype=dtype)
        target, weight, *rest = arguments_of(name, input)
        options = CALLS[name][0]

        def launchers(x, target=target, weight=weight, rest=rest):
            return CrossEntropyFunction.apply(x, target, weight, *rest, "torch")

        def oracle(x, target=target, weight=weight, options=options, *, precision):
            return oracle_cross_entropy.cross_entropy(x, target, weight, **options, precision=precision)

        check(launchers, oracle, input)


@calls
def test_the_pytorch_launchers_gradient_is_the_difference_quotient(device, name):
    input = random(3, 4, 2, device=device, dtype=torch.float64).requires_grad_()
    arguments = arguments_of(name, input.detach())

    def function(x):
        return CrossEntropyFunction.apply(x, *arguments, "torch")

    assert torch.autograd.gradcheck(function, input)
    if name in ("plain", "everything"):
        assert torch.autograd.gradgradcheck(function, input)
