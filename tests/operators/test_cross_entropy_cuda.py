"""cross_entropy in CUDA C++: its variants against the oracle, alignments, digits, in place, stats, what it refuses."""

from __future__ import annotations

import math

import oracle_cross_entropy
import pytest
import torch
import torch.nn.functional as F
from checking import same_bits
from cross_entropy_calls import CALLS, call_of, check_cross_entropy, classes_for, dtypes, random, weights_for
from layouts import guarded, of_own_strides
from sharp import deep

import gptkern
import gptkern.functional as G
from gptkern.backends import dispatch

NAMES = [name for name, (*_, is_probabilities) in CALLS.items() if not is_probabilities]
calls = pytest.mark.parametrize("name", NAMES)

# --- Against the oracle ---------------------------------------------------------------------------------------------


# By vectors of 16 bytes: threads a row, several warps, steps of a thread. Rows that begin aligned, and one class less.
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float32)], ids=str)
@pytest.mark.parametrize("vectors", [1, 32, 33, 257, 1025, *deep(2, 5, 31, 65, 129)])
def test_variants(cuda_backend, device, poisoned_memory, dtype, vectors, odd):
    classes = vectors * 16 // dtype.itemsize - odd
    rows = max(2, min(19, 2000 // vectors))
    check_cross_entropy(guarded(random(rows, classes, device=device, dtype=dtype)), reduction="none")


# From 1024 rows on a row has 256 threads at most, and of few classes a block has many rows.
@pytest.mark.parametrize("classes", [9, 64, 65, *deep(1, 2)])
def test_many_rows(cuda_backend, device, poisoned_memory, classes):
    check_cross_entropy(guarded(random(1030, classes, device=device, dtype=torch.bfloat16)))


def test_many_rows_of_several_steps(cuda_backend, device, monkeypatch):
    input = random(1024, 8300, device=device, dtype=torch.bfloat16)
    target = torch.full((1024,), -100, device=device)
    target[[0, 500, 1023]] = torch.tensor([8299, 0, 4000], device=device)
    found = G.cross_entropy(input, target, reduction="none")
    expected = F.cross_entropy(input.float()[[0, 500, 1023]], target[[0, 500, 1023]], reduction="none")
    torch.testing.assert_close(found[[0, 500, 1023]].float(), expected, rtol=2**-8, atol=0)
    assert found.count_nonzero() == 3


@calls
@dtypes
@pytest.mark.parametrize("classes", [*deep(33), 64])
def test_options(cuda_backend, device, poisoned_memory, dtype, name, classes):
    input = guarded(random(7, classes, device=device, dtype=dtype))
    target, weight, options = call_of(name, input)
    check_cross_entropy(input, target, weight, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *deep(torch.float32)], ids=str)
@pytest.mark.parametrize("name", ["everything", *deep("plain")])
def test_gpt2s_odd_rows(cuda_backend, device, poisoned_memory, dtype, name):
    input = guarded(random(3, 50257, device=device, dtype=dtype))
    _, weight, options = call_of(name, input)
    check_cross_entropy(input, torch.tensor([50256, -100, 0], device=device), weight, **options)


@pytest.mark.deep
def test_the_widest_rows(cuda_backend, device):
    check_cross_entropy(random(2, 262144, device=device), torch.tensor([262143, 4095], device=device), softcap=3.0)


@dtypes
@pytest.mark.parametrize("offset", [0, 1, 3, 4, 7])
def test_rows_that_begin_anywhere(cuda_backend, device, dtype, offset):
    # What lies between the rows and around them is NaN.
    whole = torch.full((6, 101), math.nan, device=device).to(dtype)
    rows = whole[1:5, offset : offset + 70]
    rows.copy_(random(4, 70))
    check_cross_entropy(rows, torch.tensor([0, 69, 7, 8], device=device), reduction="none")


@pytest.mark.parametrize("classes", [61, 64])
def test_every_operand_has_strides_of_its_own(cuda_backend, device, classes):
    input, grad_output = random(5, classes, device=device), torch.randn(5, device=device)
    input, grad_output = of_own_strides(input, grad_output, step=1 if classes % 4 else 4)
    target = of_own_strides(classes_for(input), torch.zeros(5, dtype=torch.int64))[0].to(device)
    weight = guarded(weights_for(input).repeat_interleave(2))[::2]
    check_cross_entropy(input, target, weight, grad_output=grad_output, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("shape", [(1, 9), (4, 1), (1, 1)], ids=str)
def test_one_row_and_one_class(cuda_backend, device, shape):
    check_cross_entropy(random(*shape, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device))
    input = random(*shape, device=device)[0]
    check_cross_entropy(input, torch.zeros((), dtype=torch.int64, device=device))


@pytest.mark.parametrize("ignored", [-100, 3, 255])
def test_bytes_as_classes(cuda_backend, device, ignored):
    input = random(12, 9, device=device)
    target = classes_for(input, None)
    target[::3] = ignored % 256
    check_cross_entropy(input, target.to(torch.uint8), weights_for(input), ignore_index=ignored % 256)


def test_weights_of_another_dtype(cuda_backend, device):
    # Under autocast PyTorch takes them.
    input, weight = random(5, 33, device=device, dtype=torch.bfloat16), weights_for(random(5, 33, device=device))
    for dtype in (torch.float32, torch.float16):
        with torch.autocast(device, dtype=torch.bfloat16):
            found = G.cross_entropy(input, classes_for(input, None) * 0 + 7, weight.to(dtype))
        expected = F.cross_entropy(input.float(), classes_for(input, None) * 0 + 7, weight.to(dtype).float())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


# --- What is ignored, wrong or not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("name", ["each row", "everything"])
def test_an_ignored_row_is_not_read(cuda_backend, device, poisoned_memory, name, classes):
    input = random(6, classes, device=device)
    target, weight, options = call_of(name, input)
    target[:] = torch.tensor([1, -100, 2, -100, -100, 0])
    input[target == -100] = math.nan
    leaf = input.requires_grad_()
    output = G.cross_entropy(leaf, target, weight, **options)
    output.sum().backward()
    assert (output[target == -100] == 0).all() and (leaf.grad[target == -100] == 0).all()
    assert output.isfinite().all() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}], ids=str)
def test_all_ignored_and_no_rows(cuda_backend, device, options):
    for rows in (4, 0):
        input = random(rows, 9, device=device).requires_grad_()
        target = torch.full((rows,), -100, device=device)
        output = G.cross_entropy(input, target, **options)
        same_bits("the loss", output, F.cross_entropy(input, target, **options))
        (gradient,) = torch.autograd.grad(output, input)
        assert gradient.shape == input.shape and (gradient == 0).all()


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_special_values_as_in_pytorch(cuda_backend, device, value, options, classes):
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
def test_huge_logits(cuda_backend, device, dtype, softcap):
    input = (random(5, 65, device=device) * 1e4).clamp(-6e4, 6e4).to(dtype)
    input[0], input[1, ::2] = 6e4, -6e4
    check_cross_entropy(input, softcap=softcap, reduction="none")


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
def test_a_class_that_there_is_none_of(cuda_backend, device, classes, options):
    input = random(5, classes, device=device).requires_grad_()
    target = torch.tensor([0, classes, -1, 2**40 + 1, 3], device=device)
    output = G.cross_entropy(input, target, weights_for(input), reduction="none", z_loss=0.1, **options)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    wrong = torch.tensor([False, True, True, True, False], device=device)
    same_bits("NaN", output.isnan(), wrong)
    same_bits("NaN of the gradient", gradient.isnan(), wrong[:, None].expand(gradient.shape))
    loss, stats = G.cross_entropy(input, target, return_stats=True)
    assert loss.isnan() and not stats.correct[1:4].any()


# --- Digits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [9, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rest", [1e-3, 1e-6, 1e-9])
def test_the_true_classs_gradient_where_its_probability_is_near_1(cuda_backend, device, dtype, rest, classes):
    # p = 1 - rest: its logit is log((1 - rest) / rest * (classes - 1)) above the others', all of them near 20.
    input = 20.0 + 0.1 * torch.randn(6, classes)
    target = torch.arange(6) % classes
    input[torch.arange(6), target] = 20.0 + math.log((1 - rest) / rest * (classes - 1))
    input, target = input.to(device=device, dtype=dtype), target.to(device)
    exact = torch.softmax(input.double(), 1).scatter(1, target[:, None], 0.0).sum(1).neg()
    leaf = input.clone().requires_grad_()
    output = G.cross_entropy(leaf, target, reduction="none")
    output.backward(torch.ones_like(output))
    found = leaf.grad.double().gather(1, target[:, None])[:, 0]
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert ((found - exact).abs() <= tolerance * exact.abs()).all(), (found / exact - 1).abs().max()
    loss = -torch.log1p(exact)
    assert ((output.double() - loss).abs() <= tolerance * loss).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_smoothed_loss_of_far_logits_keeps_its_digits(cuda_backend, device, dtype):
    """Sums of logits near 100,000, of which the losses are what is left."""
    input = (random(5, 300, device=device) + 1e5).to(dtype)
    target = classes_for(input, None)
    found = G.cross_entropy(input, target, label_smoothing=0.2, reduction="none")
    expected = F.cross_entropy(input.double(), target, label_smoothing=0.2, reduction="none")
    tolerance = max(torch.finfo(dtype).eps, 2e-6)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)


def test_the_same_bits_whatever_the_schedule(cuda_backend, device):
    from gptkern.backends.cuda import emulated

    if device != "cpu":
        seeds = range(2)
    else:
        seeds = (1, 2, 3, 1_000_003)
    for rows, classes in ((40, 33), (3, 9000)):
        input = random(rows, classes, device=device, dtype=torch.bfloat16)
        target, runs = classes_for(input), []
        for seed in seeds:
            if device == "cpu":
                emulated.load().set_seed(seed)
            leaf = input.clone().requires_grad_()
            output, stats = G.cross_entropy(leaf, target, label_smoothing=0.1, return_stats=True)
            output.backward()
            runs.append((output.detach(), leaf.grad, *stats))
        for run in runs[1:]:
            for actual, expected in zip(run, runs[0]):
                same_bits("run", actual, expected)


# --- The gradient over the logits, stats ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("classes", [33, 64, 9003])
def test_in_place(cuda_backend, device, classes, name):
    input = random(6, classes, device=device, dtype=torch.bfloat16)
    target, weight, options = call_of(name, input)
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    logits = leaves[0] * 1.0
    for x, in_place in ((logits, True), (leaves[1], False)):
        loss = G.cross_entropy(x, target, weight, in_place_gradient=in_place, **options)
        loss.backward(torch.ones_like(loss))
    same_bits("the gradient", leaves[0].grad, leaves[1].grad)
    same_bits("what stands in the logits", logits.detach(), leaves[1].grad)


def test_in_place_of_strided_rows(cuda_backend, device):
    leaf = random(4, 40, device=device).requires_grad_()
    logits = (leaf * 1.0)[:, 3:36]
    target = classes_for(logits)
    G.cross_entropy(logits, target, in_place_gradient=True).backward()
    other = leaf.detach().clone().requires_grad_()
    G.cross_entropy(other[:, 3:36], target).backward()
    same_bits("the gradient", leaf.grad, other.grad)
    same_bits("what stands in the logits", logits.detach(), leaf.grad[:, 3:36])


@pytest.mark.parametrize("classes", [33, 75, 4000])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 1.0, "logit_scale": 2.0, "label_smoothing": 0.1}], ids=["plain", "all"]
)
@dtypes
def test_stats(cuda_backend, device, poisoned_memory, dtype, classes, options):
    input = random(9, classes, device=device, dtype=dtype)
    # Equal ones, of which the first counts: in one vector, in two, in an edge, of a thread and of several.
    for row, places in enumerate(([2, 5], [0, 8], [7, classes - 1], [classes // 2, classes - 2])):
        input[row, places] = 19.0
        input[row + 4, places] = 19.0
    target = torch.tensor([2, 0, 7, classes // 2, 5, 8, classes - 1, classes - 2, 1], device=device)
    loss, stats = G.cross_entropy(input, target, return_stats=True, **options)
    same_bits("the loss", loss, G.cross_entropy(input, target, **options))
    kept = {key: value for key, value in options.items() if key != "label_smoothing"}
    lse, entropy, correct = oracle_cross_entropy.stats(input, target, **kept)
    torch.testing.assert_close(stats.lse, lse.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy, entropy.float(), rtol=1e-5, atol=2e-6)
    same_bits("correct", stats.correct, correct)
    assert correct[:4].all() and not correct[4:8].any()


def test_stats_of_special_values(cuda_backend, device):
    input = torch.tensor([[0.0, -math.inf, -math.inf], [math.nan, 1.0, 2.0], [5.0, math.inf, 1.0]], device=device)
    input = torch.cat((input, input[1:]))
    target = torch.tensor([0, 0, 1, 2, 0], device=device)
    _, stats = G.cross_entropy(input, target, return_stats=True)
    assert stats.correct.tolist() == [True, True, True, False, False]
    assert stats.lse[0] == 0 and stats.entropy[0] == 0 and stats.lse[1].isnan()


# --- What is left to others, registered ops -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: (x.double(), x[:, 0].long()), "input is torch.float64"),
        (lambda x: (x, x.softmax(1)), "the targets are class probabilities"),
        (lambda x: (x.view(3, 3, 4), x[:3, :4].long()), "do not lie next to each other"),
        (lambda x: (x.T, torch.zeros(4, dtype=torch.int64, device=x.device)), "do not lie next to each other"),
        (lambda x: (x[:, ::2], torch.zeros(9, dtype=torch.int64, device=x.device)), "do not lie next to each other"),
        (lambda x: (x[:, :0], torch.zeros(9, dtype=torch.int64, device=x.device)), "there are 0 classes"),
    ],
    ids=["float64", "probabilities", "positions", "transposed", "every second", "none"],
)
def test_what_is_left_to_others_has_a_reason(cuda_backend, device, make, words):
    with pytest.raises(gptkern.BackendError, match=words):
        G.cross_entropy(*make(random(9, 4, device=device)))


def test_weights_that_want_a_gradient_are_left_to_others(cuda_backend, device):
    input = random(9, 4, device=device)
    with pytest.raises(gptkern.BackendError, match="the weight requires a gradient"):
        G.cross_entropy(input, classes_for(input), weights_for(input).requires_grad_())


def test_registered_ops(cuda_backend, device):
    forward = torch.ops.gptkern.cross_entropy_forward.default
    backward = torch.ops.gptkern.cross_entropy_backward.default
    tests = {}  # all of them on the first case; the slow ones, of torch.compile, are the same for the others
    for reduction, need_stats, dtype in (("mean", True, torch.float32), ("none", False, torch.bfloat16)):
        input = random(5, 33, device=device, dtype=dtype)
        target, weight = classes_for(input), weights_for(input)
        options = reduction, -100, 0.1, 0.01, None, 1.0, dtype, need_stats, False
        torch.library.opcheck(forward, (input, target, weight, *options, cuda_backend), **tests)
        loss, statistics, denominator, *_ = forward(input, target, weight, *options, cuda_backend)
        kept = torch.ones_like(loss), statistics, denominator if reduction == "mean" else None
        torch.library.opcheck(backward, (*kept, input, target, weight, *options, cuda_backend), **tests)
        tests = {"test_utils": ("test_schema", "test_faketensor")}


@pytest.mark.deep
def test_compiles_to_one_graph(cuda_backend, device):
    input, target = random(5, 33, device=device), torch.tensor([1, -100, 32, 0, 7], device=device)
    torch._dynamo.reset()
    results = []
    compiled = torch.compile(G.cross_entropy, fullgraph=True, backend="aot_eager")
    for call in (G.cross_entropy, compiled):
        leaf = input.clone().requires_grad_()
        loss, stats = call(leaf, target, z_loss=0.1, return_stats=True)
        loss.backward()
        results.append((loss.detach(), leaf.grad, *stats))
    for eager, graph in zip(*results):
        same_bits("compiled", graph, eager)


def test_a_cuda_call_is_chosen_by_what_it_covers():
    """Where probabilities or positions come, Triton's kernels run; each says why CUDA C++ did not."""
    call = dispatch.load("torch", "cross_entropy").Call
    unsupported = dispatch.load("cuda", "cross_entropy").unsupported
    x, options = random(4, 5), ("mean", -100, 0.0, 0.0, None, 1.0, torch.float32, False, False)
    assert unsupported(call(x, torch.zeros(4, dtype=torch.int64), None, *options)) is None
    assert "probabilities" in unsupported(call(x, x, None, *options))
