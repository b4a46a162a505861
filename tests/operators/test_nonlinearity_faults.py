"""gelu, silu, swiglu, geglu: alignments of each operand, widths and rows beside those of blocks, on every kernel."""

from __future__ import annotations

import pytest
import torch
from layouts import guarded
from nonlinearity_calls import KINDS, check, tensors_of

from gptkern.backends import dispatch


# The operands, and last the gradient that comes in.
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("kind", ["pair", "packed", "bias"])
def test_one_operand_is_not_aligned(kernel_backend, device, kind, which):
    tensors = tensors_of(kind, 3, 64, dtype=torch.bfloat16, device=device)
    tensors.append(guarded(torch.randn(3, 64, device=device).bfloat16()))
    if which >= len(tensors):
        return
    tensor = tensors[which]
    # It begins an element late, or its rows are an element longer than a multiple of the vectors'.
    if tensor.dim() == 1:
        tensors[which] = guarded(torch.cat((tensor[:1], tensor)))[1:]
    else:
        tensors[which] = guarded(torch.cat((tensor, tensor[:, :1]), 1))[:, :-1]
    *tensors, dy = tensors
    check("gelu_tanh", kind, tensors, grad=dy)


@pytest.mark.parametrize("kind", ["plain", "pair"])
def test_all_of_one_row_begin_in_the_middle_of_a_vector(kernel_backend, device, kind):
    tensors = [guarded(torch.cat((t[:1], t)))[1:] for t in tensors_of(kind, 77, dtype=torch.float16, device=device)]
    check("silu", kind, tensors)


# 2048 elements of a contiguous tensor are a row of CUDA's, 1024 of Triton's; a warp has 256 or 128 with a bias.
@pytest.mark.deep
@pytest.mark.parametrize("edge", [8, 16, 32, 64, 128, 256, 512, 1024, 2048])
def test_widths_and_rows_beside_tiles(kernel_backend, device, poisoned_memory, edge):
    for kind in KINDS:
        for width in (edge - 1, edge, edge + 1):
            check("gelu", kind, tensors_of(kind, 3, width, dtype=torch.bfloat16, device=device))
        for rows in {max(1024 // edge + step, 1) for step in (-1, 0, 1)}:
            check("gelu", kind, tensors_of(kind, rows, edge, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("partials", [1, 5, pytest.param(17, marks=pytest.mark.deep)])
def test_any_number_of_partial_sums_on_cuda(cuda_backend, device, monkeypatch, partials):
    """As many as a GPU makes; an emulated one has two multiprocessors."""
    monkeypatch.setattr(dispatch.load("cuda", "nonlinearity"), "partials", lambda rows, width, input: partials)
    for width in (264, 261):
        check("gelu", "bias", tensors_of("bias", 2 * 17 * 8 + 1, width, dtype=torch.bfloat16, device=device))
