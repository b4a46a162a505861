"""rms_norm: special values, lengths beside tiles, alignments of each operand, through every kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional
from checking import same_bits
from conftest import KERNEL_BACKENDS
from layouts import guarded
from rms_norm_calls import check, tensors_of

from gptkern import functional as F
from gptkern.backends import dispatch

TRITON, CUDA = KERNEL_BACKENDS
# A row of bfloat16 that is held, aligned and not, and one that is walked.
WIDTHS = [
    *(pytest.param("triton", width, chunks, marks=TRITON.marks)
      for width, chunks in ((64, False), (61, False), (48, True), (37, True))),
    *(pytest.param("cuda", width, False, marks=CUDA.marks) for width in (64, 61, 6201, 16_392, 32_776)),
]  # fmt: skip


@pytest.mark.parametrize("poison", [torch.inf, pytest.param(torch.nan, marks=pytest.mark.deep)])
@pytest.mark.parametrize(("kernel_backend", "width", "chunks"), WIDTHS, indirect=["kernel_backend"])
def test_a_special_value_stays_in_its_row(kernel_backend, device, monkeypatch, width, chunks, poison):
    if chunks:
        kernels = dispatch.load("triton", "rms_norm")
        monkeypatch.setattr(kernels, "REGISTER_WIDTH", {"forward": 16, "backward": 16})
        monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)
    input, weight = tensors_of(3, width, torch.bfloat16, device)
    clean = F.rms_norm(input, (width,), weight, 1e-5)
    for place in (0, width - 1):
        dirty = guarded(input)
        dirty[1, place] = poison
        output = F.rms_norm(dirty, (width,), weight, 1e-5)
        # An infinity makes rstd 0, a NaN all of the row.
        expected = torch.nn.functional.rms_norm(dirty.float(), (width,), weight.float(), 1e-5).to(dirty.dtype)
        same_bits("the row", output[1], expected[1])
        same_bits("the other rows", output[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("width", [64, pytest.param(16_392, marks=pytest.mark.deep)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_operand_is_not_aligned(cuda_backend, device, which, width):
    tensors = [*tensors_of(3, width, torch.bfloat16, device), guarded(torch.randn(3, width, device=device).bfloat16())]
    tensor = tensors[which]
    if tensor.dim() == 1:
        tensors[which] = guarded(torch.cat((tensor[:1], tensor)))[1:]
    else:
        tensors[which] = guarded(torch.cat((tensor, tensor[:, :1]), 1))[:, :-1]
    input, weight, dy = tensors
    check((input, weight), grad=dy)


@pytest.mark.deep
@pytest.mark.parametrize("edge", [8, 16, 32, 64, 128, 256, 512, 1024, 2048])
def test_widths_and_rows_beside_tiles(kernel_backend, device, poisoned_memory, edge):
    for width in (edge - 1, edge, edge + 1):
        check(tensors_of(3, width, torch.bfloat16, device))
    # Rows of a tile: 2048 elements of Triton's.
    for rows in {max(2048 // edge + step, 1) for step in (-1, 0, 1)}:
        check(tensors_of(rows, edge, torch.bfloat16, device))


@pytest.mark.deep
@pytest.mark.parametrize("edge", [8192, 16_384, 32_768])
def test_widths_beside_what_is_held_on_cuda(cuda_backend, device, poisoned_memory, edge):
    for width in (edge - 8, edge - 7, edge - 1, edge, edge + 1, edge + 8):
        check(tensors_of(2, width, torch.bfloat16, device))


@pytest.mark.parametrize("partials", [17, pytest.param(40, marks=pytest.mark.deep)])
def test_any_number_of_partial_sums_on_cuda(cuda_backend, device, monkeypatch, partials):
    """As many as a GPU makes; an emulated one has two multiprocessors."""
    monkeypatch.setattr(dispatch.load("cuda", "rms_norm"), "most_partials", lambda width, device: partials)
    check(tensors_of(2 * 40 + 1, 2056, torch.bfloat16, device))
