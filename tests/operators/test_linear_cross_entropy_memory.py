"""linear_cross_entropy: how much memory a call takes beside its inputs, and how many products, counted op by op.

On fake tensors, which have shapes and no memory, all of a GPU's launchers but the kernels runs: these read and write
what is there already. (PyTorch without CUDA refuses most operators on fakes of a GPU, so the fakes are a CPU's, which
are multiplied as a GPU's.) On a CPU the same counts are of calls that run.
"""

from __future__ import annotations

import pytest
import torch
from linear_cross_entropy_calls import IGNORED, cut, tensors_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gptkern import functional as F
from gptkern.backends import vocabulary
from gptkern.operators.linear_cross_entropy import chunks, contract
from gptkern.operators.linear_cross_entropy.call import Call, Gradient

ROWS, WIDTH, VOCABULARY = 8192, 4096, 128256
_PRODUCTS = {"mm": 0, "addmm": 1}
_WIDER = (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out)


class Counted(TorchDispatchMode):
    """Of the operators inside the block: multiplications of matrix products, and the most bytes that were alive of
    what they have made. `results` are of products, the largest each."""

    def __init__(self):
        super().__init__()
        self.multiplications, self.peak, self.largest_product = 0, 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    def knows(self, *tensors: torch.Tensor) -> Counted:
        """These were there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}
        return self

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__.rstrip("_")
        if op.namespace == "gptkern":
            # What is inside of the registered ops is what is looked at.
            with self:
                return self._launched(name, args)
        if name in _PRODUCTS:
            a, b = args[_PRODUCTS[name] :][:2]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
            self.largest_product = max(self.largest_product, a.shape[0] * b.shape[1])
        # Products into a wider dtype are a GPU's alone; their result is `out`.
        result = kwargs["out"] if op in _WIDER else op(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result

    def _launched(self, name, args):
        fields = args[:-1]
        if name == "linear_cross_entropy_forward":
            found = contract.forward(Call(*fields))
        else:
            count = len(Gradient._fields)
            found = contract.backward(Gradient(*fields[:count]), Call(*fields[count:]))
        return tuple(args[0].new_empty(0) if one is None else one for one in found)


def _call(input, weight, target, **changes):
    call = Call(
        input, weight, target, None, None, "mean", IGNORED, 0.0, 0.0, None, 1.0, torch.float32, False, 0, None,
        False, False, False,
    )  # fmt: skip
    return call._replace(**changes)


def on_a_gpu(rows, width, classes, dtype, monkeypatch, **changes):
    """Forward and backward of a GPU's launchers on fake tensors: (counts, bytes of the gradients, one product)."""
    kernels = pytest.importorskip("gptkern.operators.linear_cross_entropy.triton", reason="triton is not installed")
    launches = []

    def update(call, statistics, z, start):
        launches.append((start, z.shape, z.dtype))

    def gradient(call, known, z, start, out):
        assert out.shape == z.shape and out.dtype == dtype
        launches.append((start, out.shape, out.dtype))

    monkeypatch.setattr(kernels, "_ROWS", chunks.Rows(update, gradient))
    monkeypatch.setattr(vocabulary, "_widens", lambda x: False)
    with FakeTensorMode():
        input, weight = (torch.empty(count, width, dtype=dtype) for count in (rows, classes))
        target = torch.empty(rows, dtype=torch.int64)
        call = _call(input, weight, target, **changes)
        with Counted().knows(input, weight, target) as counted:
            loss, maximum, total, miss, *_ = kernels.forward(call)
            found = kernels.backward(Gradient(torch.ones_like(loss), maximum, total, miss, True, True, False), call)
        sizes = [gradient.untyped_storage().nbytes() for gradient in found[:2]]
        assert [(gradient.shape, gradient.dtype) for gradient in found[:2]] == [
            (input.shape, dtype),
            (weight.shape, dtype),
        ]
    # Every chunk once forward and once backward, over the whole vocabulary.
    assert sum(shape[1] for _, shape, _ in launches) == 2 * classes
    return counted, sum(sizes), rows * width * classes, len(launches) // 2


def test_memory_and_products_of_llama(monkeypatch):
    counted, of_gradients, product, count = on_a_gpu(ROWS, WIDTH, VOCABULARY, torch.bfloat16, monkeypatch)
    assert of_gradients == 2 * WIDTH * (ROWS + VOCABULARY)
    assert of_gradients < counted.peak <= 1.5 * of_gradients, counted.peak / of_gradients
    assert counted.multiplications == 4 * product
    # Few and large: logits of a chunk, gradients of a chunk of the weight.
    assert count == 16 and counted.largest_product >= 2**25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1024, 16384])
@pytest.mark.parametrize("options", [{}, dict(label_smoothing=0.1, z_loss=0.1, softcap=30.0, stats=True)], ids=str)
def test_memory_of_other_sizes(monkeypatch, rows, dtype, options):
    """Half of the gradients, or what is said of small ones: 2^25 logits, dx in float32 or x, some numbers a row."""
    counted, of_gradients, product, _ = on_a_gpu(rows, 2048, 32000, dtype, monkeypatch, **options)
    size = dtype.itemsize
    least = 2**25 * (6 if size == 2 else 4) + rows * 2048 * 4 + 256 * rows
    assert counted.peak - of_gradients <= max(of_gradients // 2, least)
    assert counted.multiplications == 4 * product


def test_options_bound_the_logits_on_a_gpu(monkeypatch):
    counted, *_, count = on_a_gpu(4096, 64, 32000, torch.bfloat16, monkeypatch, chunk=100 * 32000)
    # 100 tokens' logits are 781 classes of 4096 tokens: three tiles.
    assert count == 42 and counted.largest_product == 768 * 4096


# --- On a CPU ---------------------------------------------------------------------------------------------------------


def on_this_cpu(rows, width, classes, dtype, tokens, *, ignored=False, grad=True, **options):
    (input, weight, _), target = tensors_of(rows, width, classes, dtype, bias=False, ignored=ignored)
    leaves = [tensor.requires_grad_(grad) for tensor in (input, weight)]
    with Counted().knows(*leaves, target) as counted:
        loss = F.linear_cross_entropy(*leaves, target, options=cut(tokens), **options)
        if grad:
            loss.sum().backward()
    return counted, rows * width * classes


@pytest.mark.parametrize(
    ("options", "products"),
    [
        (dict(grad=False), 1),
        (dict(), 3),
        (dict(reduction="none"), 4),
        (dict(dtype=torch.bfloat16), 4),
    ],
    ids=str,
)
def test_products_on_a_cpu(options, products):
    options = dict(dtype=torch.float32) | options
    counted, product = on_this_cpu(64, 16, 500, tokens=8, **options)
    assert counted.multiplications == products * product


@pytest.mark.parametrize("options", [dict(), dict(reduction="none"), dict(grad=False)], ids=str)
def test_ignored_rows_are_not_multiplied_on_a_cpu(options):
    every, _ = on_this_cpu(64, 16, 500, torch.float32, 8, **options)
    counted, _ = on_this_cpu(64, 16, 500, torch.float32, 8, ignored=True, **options)
    # Every fourth one is ignored.
    assert counted.multiplications * 4 == every.multiplications * 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_on_a_cpu(reduction):
    rows, width, classes, tokens = 512, 16, 4000, 32
    counted, _ = on_this_cpu(rows, width, classes, torch.float32, tokens, reduction=reduction)
    gradients = 4 * width * (rows + classes)
    # A chunk's logits once, a row's numbers, and some of a chunk: no copy of it, nothing of all rows and classes.
    assert counted.peak < gradients + 4 * tokens * classes * 1.2 + 400 * rows < 4 * rows * classes


@pytest.mark.deep
@pytest.mark.timeout(900)
def test_an_eighth_of_the_vocabulary_for_real():
    """8192 tokens of width 4096 and 16,032 classes in bfloat16: as torch.compile's eager float32 has it, by samples."""
    classes = VOCABULARY // 8
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(ROWS, WIDTH, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(classes, WIDTH, generator=generator) / 32).bfloat16().requires_grad_()
    target = torch.randint(classes, (ROWS,), generator=generator)
    with Counted().knows(input, weight, target) as counted:
        loss = F.linear_cross_entropy(input, weight, target, loss_dtype=torch.float32)
        loss.backward()
    assert counted.multiplications == 4 * ROWS * WIDTH * classes
    # 16 bits are widened here: the input whole, and dx, of the weight a chunk; z has 2^25 logits.
    wide = 2 * 4 * ROWS * WIDTH + 4 * 4096 * WIDTH + 4 * 2**25
    gradients = 2 * WIDTH * (ROWS + classes)
    assert counted.peak < gradients + 1.6 * wide
    # A part of the rows, whole.
    some = slice(0, 64)
    logits = input[some].detach().double() @ weight.detach().double().T
    expected = torch.nn.functional.cross_entropy(logits, target[some], reduction="none")
    each = F.linear_cross_entropy(
        input[some].detach(), weight.detach(), target[some], reduction="none", loss_dtype=torch.float32
    )
    torch.testing.assert_close(each.double(), expected, rtol=1e-5, atol=1e-5)
    g = torch.softmax(logits, 1)
    g[torch.arange(64), target[some]] -= 1.0
    dx = (g @ weight.detach().double()) / ROWS
    torch.testing.assert_close(input.grad[some].double(), dx, rtol=1e-2, atol=2e-3 * dx.abs().max().item())


def test_the_counter_sees_logits_that_are_whole():
    """Of few logits, which are PyTorch's: the counts of what would not be allowed."""
    (input, weight, _), target = tensors_of(64, 16, 500, torch.float32, bias=False, ignored=False)
    leaves = [tensor.requires_grad_() for tensor in (input, weight)]
    assert contract.SMALL >= 64 * 500
    with Counted().knows(*leaves, target) as counted:
        F.linear_cross_entropy(*leaves, target).backward()
    assert counted.multiplications == 3 * 64 * 16 * 500
    assert counted.peak > 2 * 4 * 64 * 500
