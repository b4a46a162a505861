"""cross_entropy: rows and lanes beside tiles, what is expanded, offsets past 2^31, vectors: through every kernel."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from checking import same_bits
from conftest import DEVICE
from cross_entropy_calls import call_of, check_cross_entropy, classes_for, probabilities_for, random, weights_for
from far_memory import ending_with, far, last_programs, sparse
from layouts import guarded
from sharp import deep, sharp

import gptkern.functional as G
from gptkern.backends import dispatch
from gptkern.operators.cross_entropy.contract import Call, Gradient


def narrow(monkeypatch, step: int = 64) -> None:
    """Rows from 16 classes on have programs of their own."""
    kernels = dispatch.load("triton", "cross_entropy")
    monkeypatch.setattr(kernels, "WIDE_ROW", 16)
    monkeypatch.setattr(kernels, "_ROW_STEP", step)


# The kernels of rows, aligned and not, of tiles, and of tiles of positions.
KERNELS = {"rows": (5, 80), "odd rows": (5, 75), "tiles": (5, 9), "positions": (2, 7, 5)}
kernels = pytest.mark.parametrize("kernel", KERNELS)
some_kernels = pytest.mark.parametrize("kernel", sharp(KERNELS, "odd rows", "positions"))


def an_input(kernel: str, device: str, monkeypatch, dtype=torch.float32) -> torch.Tensor:
    narrow(monkeypatch, 32)
    return guarded(random(*KERNELS[kernel], device=device, dtype=dtype))


@kernels
@pytest.mark.parametrize("name", ["everything", "probabilities, everything", *deep("z-loss", "smoothed, weights")])
def test_every_kernel(triton_backend, device, monkeypatch, poisoned_memory, kernel, name):
    input = an_input(kernel, device, monkeypatch)
    target, weight, options = call_of(name, input)
    check_cross_entropy(input, target, weight, **options)


@some_kernels
def test_each_row_by_its_own_gradient(triton_backend, device, monkeypatch, kernel):
    check_cross_entropy(an_input(kernel, device, monkeypatch), reduction="none")


@some_kernels
def test_ignored_rows_are_zeros(triton_backend, device, monkeypatch, poisoned_memory, kernel):
    input = an_input(kernel, device, monkeypatch)
    target = classes_for(input)
    leaf = input.movedim(1, -1).masked_fill((target == -100)[..., None], math.nan).movedim(-1, 1).requires_grad_()
    output = G.cross_entropy(leaf, target, reduction="none", label_smoothing=0.1, z_loss=0.1)
    output.sum().backward()
    rows = leaf.grad.movedim(1, -1)
    assert (rows[target == -100] == 0).all() and (output[target == -100] == 0).all() and leaf.grad.isfinite().all()


@kernels
def test_a_class_behind_the_last_is_not_read(triton_backend, device, monkeypatch, kernel):
    input = an_input(kernel, device, monkeypatch)
    target = torch.full_like(classes_for(input), input.shape[1] * 1000)
    assert G.cross_entropy(input, target, weights_for(input), reduction="none").isnan().all()


@some_kernels
def test_a_first_step_of_minus_infinity(triton_backend, device, monkeypatch, kernel):
    input = an_input(kernel, device, monkeypatch)
    with torch.no_grad():
        input.movedim(1, -1)[..., : input.shape[1] * 2 // 3] = -math.inf
    target = torch.full_like(classes_for(input), input.shape[1] - 1)
    check_cross_entropy(input, target, reduction="none")
    _, stats = G.cross_entropy(input, target, return_stats=True)
    p = torch.softmax(input.double(), 1)
    entropy = -torch.where(p > 0, p * p.log(), 0.0).sum(1)
    torch.testing.assert_close(stats.entropy, entropy.float(), rtol=1e-5, atol=1e-6)


@some_kernels
def test_the_first_of_equal_ones(triton_backend, device, monkeypatch, kernel):
    input = an_input(kernel, device, monkeypatch).clamp(-5, 5)
    classes = input.shape[1]
    for first, second in (
        (0, classes - 1),
        (1, 2),
        (classes - 2, classes - 1),
        (classes // 2, classes // 2 + 3),
        (1, min(33, classes - 1)),
    ):
        logits = input.clone()
        logits[:, [first, second]] = 9.0
        for target, correct in ((first, True), (second, False)):
            wanted = torch.full_like(classes_for(input), target)
            assert (G.cross_entropy(logits, wanted, return_stats=True)[1].correct == correct).all()


@some_kernels
@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_probabilities(triton_backend, device, monkeypatch, kernel, dim):
    input = an_input(kernel, device, monkeypatch)
    target = probabilities_for(input).narrow(dim, 0, 1).expand(input.shape)
    check_cross_entropy(input, target)
    check_cross_entropy(input, torch.full((1,) * input.dim(), 1 / input.shape[1], device=device).expand(input.shape))


@pytest.mark.parametrize(
    ("least", "most", "softcap"),
    [(-1.0, 1.0, 1000.0), (6.0, 9.0, 30.0), (-80.0, 80.0, 30.0)],
    ids=["near 0", "at the seam of two forms", "near 1"],
)
def test_tanh(triton_backend, device, least, most, softcap):
    input = torch.linspace(least, most, 40, device=device)
    check_cross_entropy(input.view(4, 10), torch.tensor([0, 9, 3, 5], device=device), softcap=softcap, reduction="none")


def test_the_largest_is_in_an_edge(triton_backend, device, monkeypatch):
    narrow(monkeypatch)
    input = random(4, 75, device=device)
    input[[0, 1], 0] = input[[2, 3], 74] = 300.0
    check_cross_entropy(guarded(input), torch.tensor([0, 5, 74, 40], device=device), reduction="none")


@pytest.mark.parametrize("rows", [31, 32, 33, *deep(1, 64, 65)])
def test_lanes_beside_tiles(triton_backend, device, poisoned_memory, rows):
    check_cross_entropy(guarded(random(rows, 100, device=device)), reduction="none")
    check_cross_entropy(guarded(random(2, 40, rows, device=device)), reduction="none")


@pytest.mark.parametrize(
    ("shape", "reason"), [((1, 2_097_121), "2097121 classes"), ((2**31, 1), "rows"), ((3, 0), "no classes")]
)
def test_more_than_the_kernels_count(shape, reason):
    # On meta tensors nothing is allocated.
    input, target = torch.empty(shape, device="meta"), torch.empty(shape[:1], dtype=torch.int64, device="meta")
    call = Call(input, target, None, "mean", -100, 0.0, 0.0, None, 1.0, torch.float32, False, False)
    kernels = dispatch.load("triton", "cross_entropy")
    assert reason in kernels.unsupported(call)
    assert kernels.unsupported(call._replace(input=torch.empty(1, 2_097_120, device="meta"))) is None


# --- Vectors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (lambda x: x[:4, :48], (False, 8)),
        (lambda x: x[:4, :47], (True, 8)),  # of rows that begin alike the last vector is not whole
        (lambda x: x.view(-1)[: 4 * 47].view(4, 47), (True, 8)),
        (lambda x: x[:4, 1:49], (True, 8)),
    ],
)
def test_odd_rows_are_loaded_by_whole_vectors(device, rows, expected):
    kernels = dispatch.load("triton", "cross_entropy")
    x = rows(torch.zeros(8, 64, dtype=torch.bfloat16, device=device))
    walk = kernels._walk(x)
    assert kernels._peels(x.shape[1], walk.strides, (x,)) == expected
    _, constants = kernels._tile(walk, 50257, x)
    assert constants["VECTOR"] == 8


def test_what_begins_otherwise_is_not_loaded_by_vectors(device):
    kernels = dispatch.load("triton", "cross_entropy")
    whole = torch.zeros(8, 64, dtype=torch.bfloat16, device=device)
    for other in (whole[:4, 1:48], torch.zeros(4, 47, dtype=torch.bfloat16, device=device), whole[:4, :47].float()):
        walk = kernels._walk(whole[:4, :47], other)
        assert kernels._peels(47, walk.strides, (whole[:4, :47], other)) == (False, 8)


def test_the_gradient_of_odd_rows_is_loaded_by_whole_vectors(triton_backend, device, monkeypatch):
    kernels, seen = dispatch.load("triton", "cross_entropy"), []
    peels = kernels._peels
    monkeypatch.setattr(kernels, "_peels", lambda *given: seen.append(peels(*given)) or seen[-1])
    for dtype, vector in ((torch.bfloat16, 8), (torch.float32, 4)):
        input = random(2, 1025, device=device, dtype=dtype).requires_grad_()
        G.cross_entropy(input, classes_for(input.detach())).backward()
        assert seen == [(True, vector)] * 2
        seen.clear()


# --- Offsets past 2^31 ----------------------------------------------------------------------------------------------

needs_address_space = pytest.mark.skipif(
    DEVICE != "cpu" or sys.platform != "linux", reason="memory that is reserved and not there: MAP_NORESERVE of Linux"
)


def far_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Its last place along the dimension lies past 2^31."""
    strides = list(tensor.contiguous().stride())
    strides[dim] = -(-(2**31) // (tensor.shape[dim] - 1) // 64) * 64
    return far(tensor, *strides)


def runs_of(input, target, **options):
    leaf = input.detach().requires_grad_()
    output = G.cross_entropy(leaf, target, reduction="none", **options)
    output.backward(torch.linspace(1, 2, output.numel()).view(output.shape).to(output.dtype))
    return output.detach(), leaf.grad


# (shape, the dimension along which neighbours lie far apart)
FAR_APART = [((4, 80), 0), ((4, 75), 0), ((4, 9), 0), ((4, 9), 1), ((3, 7, 5), 0), ((3, 7, 5), 1), ((3, 7, 5), 2)]


@needs_address_space
@pytest.mark.parametrize(
    ("shape", "along"),
    [
        pytest.param(*case, marks=[] if case in [((4, 75), 0), ((4, 9), 1), ((3, 7, 5), 2)] else pytest.mark.deep)
        for case in FAR_APART
    ],
)
def test_an_operand_that_is_far_apart(triton_backend, monkeypatch, shape, along):
    narrow(monkeypatch)
    input = random(*shape, dtype=torch.bfloat16)
    for target in (classes_for(input), probabilities_for(input)):
        for is_target in (False, True) if target.is_floating_point() else (False,):
            expected = runs_of(input, target)
            moved = (input, far_along(target, along)) if is_target else (far_along(input, along), target)
            for actual, wanted in zip(runs_of(*moved), expected):
                same_bits("the result", actual, wanted)


@needs_address_space
@pytest.mark.parametrize("shape", [(4, 80), (4, 9), (3, 7, 5)])
def test_a_gradient_written_far_apart(triton_backend, monkeypatch, shape):
    narrow(monkeypatch)
    input = random(*shape, dtype=torch.bfloat16)
    target = classes_for(input)
    call = Call(input, target, None, "mean", -100, 0.0, 0.0, None, 1.0, torch.bfloat16, False, True)
    kernels = dispatch.load("triton", "cross_entropy")
    _, statistics, denominator, *_ = kernels.forward(call)
    gradient = Gradient(torch.tensor(2.0), statistics, denominator, None)
    expected = kernels.backward(gradient, call)
    moved = far_along(input, 0)
    assert kernels.backward(gradient._replace(written=moved), call._replace(input=moved)) is None
    same_bits("the gradient", moved, expected)


@needs_address_space
@pytest.mark.deep
@pytest.mark.parametrize("classes", [48, 45, 9])
def test_more_than_2_31_logits(triton_backend, monkeypatch, classes):
    narrow(monkeypatch)
    kernels = dispatch.load("triton", "cross_entropy")
    rows = 2**31 // classes + 5
    last, target = random(3, classes, dtype=torch.bfloat16), torch.tensor([1, -100, classes - 1])
    options = None, "none", -100, 0.0, 0.0, None, 1.0, torch.bfloat16, False, False
    near = Call(last, target, *options)
    whole = sparse(rows, torch.int64)
    whole[-3:] = target
    past = Call(ending_with(last, rows), whole, *options)
    with last_programs(8):
        losses, statistics, *_ = kernels.forward(past)
    expected, near_statistics, *_ = kernels.forward(near)
    same_bits("the losses", losses[-2:], expected[-2:])
    same_bits("the statistics", statistics[:, -2:], near_statistics[:, -2:])
    gradient = torch.linspace(1, 2, 3).to(torch.bfloat16)
    with last_programs(8):
        found = kernels.backward(Gradient(ending_with(gradient, rows), statistics, None, None), past)
    wanted = kernels.backward(Gradient(gradient, near_statistics, None, None), near)
    same_bits("the gradient", found[-2:], wanted[-2:])
