"""int8_linear: scales that are zero or NaN, operands of other layouts, lengths beside tiles, through every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from checking import same_bits
from int8_linear_calls import ACTIVATIONS, KERNEL_DTYPES, MODES, judge, tensors_of
from layouts import every_other_element, guarded, transposed

from gptkern import functional as F

# Rows that take the kernel of few rows, and the tiles.
ROWS = [5, 18]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [5, pytest.param(18, marks=pytest.mark.deep)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.deep)], ids=str)
def test_all_scales_are_zero(kernel_backend, device, dtype, rows, activation):
    for mode in MODES:
        input, weight, weight_scale, bias = tensors_of(rows, 31, 7, dtype, device)
        judge(input, weight, torch.zeros_like(weight_scale), bias, mode=mode, activation=activation)
        leaf = input.detach().requires_grad_()
        F.int8_linear(leaf, weight, torch.zeros_like(weight_scale), mode=mode, activation=activation).sum().backward()
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize("mode", MODES)
def test_a_scale_that_is_nan_shows(kernel_backend, device, mode, place):
    input, weight, weight_scale, bias = tensors_of(5, 31, 7, torch.bfloat16, device)
    weight_scale[place] = math.nan
    leaf = input.detach().requires_grad_()
    output = F.int8_linear(leaf, weight, weight_scale, bias, mode=mode)
    output.sum().backward()
    assert (output.isnan() == (torch.arange(7, device=device) == place)).all() and leaf.grad.isnan().all()


@pytest.mark.deep
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_special_value_stays_in_its_row(kernel_backend, device, mode, dtype, rows):
    input, weight, weight_scale, bias = tensors_of(rows, 160, 7, dtype, device)
    others = [row for row in range(rows) if row != 4]
    clean = F.int8_linear(input, weight, weight_scale, bias, mode=mode)
    for place, value in ((0, math.nan), (159, math.nan), (64, math.inf)):
        dirty = guarded(input)
        dirty[4, place] = value
        output = F.int8_linear(dirty, weight, weight_scale, bias, mode=mode)
        assert not output[4].isfinite().any() or (mode == "w8a8" and value == math.inf)
        same_bits("the other rows", output[others], clean[others])


# in_features of several steps of every tile: a step along one operand must not be the other's.
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.deep)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_neighbours_of_one_operand_lie_apart(kernel_backend, device, mode, dtype, rows):
    tensors = tensors_of(rows, 272, 20, dtype, device)
    dy = torch.randn(rows, 20, device=device).to(dtype)
    for which, layout in ((0, transposed), (0, every_other_element), (1, transposed), (1, every_other_element)):
        operands = [layout(tensor) if index == which else tensor for index, tensor in enumerate(tensors)]
        judge(*operands, mode=mode, grad_output=dy)
    judge(*tensors, mode=mode, grad_output=transposed(dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_beside_those_of_a_matrix_instruction(kernel_backend, device, poisoned_memory, dtype):
    for rows in (7, 8, 9, 15, 16, 17):
        judge(*tensors_of(rows, 64, 24, dtype, device), mode="w8a16")


@pytest.mark.deep
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("edge", [16, 32, 64, 128, 256, 512])
def test_sizes_beside_tiles(kernel_backend, device, poisoned_memory, edge, mode):
    for size in (edge - 1, edge, edge + 1):
        judge(*tensors_of(5, size, 24, torch.bfloat16, device), mode=mode)
        judge(*tensors_of(18, size, 24, torch.bfloat16, device), mode=mode)
        if edge <= 128:
            judge(*tensors_of(5, 40, size, torch.bfloat16, device), mode=mode, activation="gelu")
            judge(*tensors_of(size, 40, 24, torch.bfloat16, device), mode=mode, activation="gelu")
