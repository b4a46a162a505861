"""layer_norm: a residual's rounding, special values, lengths beside tiles, alignments of each operand: every kernel."""

from __future__ import annotations

import pytest
import torch
from checking import same_bits
from conftest import KERNEL_BACKENDS
from layer_norm_calls import check, tensors_of
from layouts import guarded

from gptkern import functional as F
from gptkern.backends import dispatch

TRITON, CUDA = KERNEL_BACKENDS
# A row of bfloat16 that is held (by how many vectors a thread), aligned and not, and one that is walked in chunks.
WIDTHS = [
    *(pytest.param("triton", width, chunks, marks=TRITON.marks)
      for width, chunks in ((64, False), (61, False), (48, True), (37, True))),
    *(pytest.param("cuda", width, False, marks=CUDA.marks)
      for width in (64, 61, 512, 760, 2048, 4089, 6201, 12_296, 32_776)),
]  # fmt: skip
every_kernel = pytest.mark.parametrize(("kernel_backend", "width", "chunks"), WIDTHS, indirect=["kernel_backend"])


@pytest.fixture
def narrow(monkeypatch):
    """narrow(chunks) -> Triton's kernels for wide rows run from 17 columns on."""

    def narrowed(chunks):
        if chunks:
            kernels = dispatch.load("triton", "layer_norm")
            monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
            monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)

    return narrowed


@every_kernel
def test_what_is_normalised_is_the_rounded_sum(kernel_backend, device, narrow, width, chunks):
    """Rounding moves a sum near 256 by up to 1, as much as it spreads: statistics of another sum would show."""
    narrow(chunks)
    input = torch.randn(3, width, device=device).add(256).bfloat16()
    residual = torch.randn(3, width, device=device).bfloat16()
    weight, bias, dy, ds = (
        torch.randn(*shape, device=device).bfloat16() for shape in ([width],) * 2 + ([3, width],) * 2
    )
    leaf = input.requires_grad_()
    y, s = F.layer_norm(leaf, (width,), weight, bias, residual=residual)
    torch.autograd.backward((y, s), (dy, ds))
    summed = (input.detach() + residual).requires_grad_()
    expected = F.layer_norm(summed, (width,), weight, bias)
    torch.autograd.backward((expected, summed), (dy, ds))
    same_bits("sum", s.detach(), summed.detach())
    same_bits("output", y, expected)
    torch.testing.assert_close(leaf.grad, summed.grad, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("poison", [torch.nan, pytest.param(-torch.inf, marks=pytest.mark.deep)])
@every_kernel
def test_a_special_value_stays_in_its_row(kernel_backend, device, narrow, width, chunks, poison):
    narrow(chunks)
    input, _, weight, bias = tensors_of(3, width, torch.bfloat16, device)
    clean = F.layer_norm(input, (width,), weight, bias)
    for place in (0, width - 1):
        dirty = guarded(input)
        dirty[1, place] = poison
        output = F.layer_norm(dirty, (width,), weight, bias)
        assert output[1].isnan().all()
        same_bits("the other rows", output[[0, 2]], clean[[0, 2]])


# Of tensors that are aligned all but one: rows of 16 bytes each, which a kernel may copy whole.
@pytest.mark.parametrize("width", [64, pytest.param(12_296, marks=pytest.mark.deep)])
@pytest.mark.parametrize("which", ["input", "residual", "weight", "bias", "dy", "ds"])
def test_one_operand_is_not_aligned(cuda_backend, device, which, width):
    named = dict(
        zip(("input", "residual", "weight", "bias"), tensors_of(3, width, torch.bfloat16, device, residual=True))
    )
    named |= {name: guarded(torch.randn(3, width, device=device).bfloat16()) for name in ("dy", "ds")}
    tensor = named[which]
    if tensor.dim() == 1:
        named[which] = guarded(torch.cat((tensor[:1], tensor)))[1:]
    else:
        named[which] = guarded(torch.cat((tensor, tensor[:, :1]), 1))[:, :-1]
    *tensors, dy, ds = named.values()
    check(tensors, grads=[dy, ds])


@pytest.mark.deep
@pytest.mark.parametrize("edge", [8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048])
def test_widths_and_rows_beside_tiles(kernel_backend, device, poisoned_memory, edge):
    for width in (edge - 1, edge, edge + 1):
        check(tensors_of(3, width, torch.bfloat16, device, residual=True))
    # Rows of a tile: 2048 elements of Triton's.
    for rows in {max(2048 // edge + step, 1) for step in (-1, 0, 1)}:
        check(tensors_of(rows, edge, torch.bfloat16, device))


# Where the CUDA kernels change: what a group of threads holds, aligned (a vector is 8 columns) and not.
@pytest.mark.deep
@pytest.mark.parametrize("edge", [4089, 4096, 6137, 6144, 8192, 12_288, 16_384, 24_576, 32_768])
def test_widths_beside_what_is_held_on_cuda(cuda_backend, device, poisoned_memory, edge):
    for width in (edge - 8, edge - 1, edge, edge + 1, edge + 8):
        check(tensors_of(2, width, torch.bfloat16, device, residual=True))


@pytest.mark.parametrize("partials", [17, pytest.param(40, marks=pytest.mark.deep)])
def test_any_number_of_partial_sums_on_cuda(cuda_backend, device, monkeypatch, partials):
    """As many as a GPU makes; an emulated one has two multiprocessors."""
    monkeypatch.setattr(dispatch.load("cuda", "layer_norm"), "most_partials", lambda width, device: partials)
    check(tensors_of(2 * 40 + 1, 1032, torch.bfloat16, device))
