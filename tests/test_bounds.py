"""The check of tests/bounds.py sees what it is for, and nothing else."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

if DEVICE != "cpu":
    pytest.skip("the check is of interpreted kernels, and there is a GPU", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from bounds import inside_bounds


@triton.jit
def _copy(x_ptr, y_ptr, loaded, stored, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < loaded, other=0.0)
    tl.store(y_ptr + i, x, mask=i < stored)


@triton.jit
def _scalar(x_ptr, y_ptr, offset):
    tl.store(y_ptr, tl.load(x_ptr + offset))


def _tensors():
    # slices of larger tensors: what lies beyond exists, and is not theirs
    return torch.arange(32.0)[8:18], torch.zeros(32)[8:18]


def test_a_kernel_within_its_tensors_runs():
    x, y = _tensors()
    with inside_bounds():
        _copy[(1,)](x, y, 10, 10, BLOCK=16)
        assert torch.equal(x, y)
        _scalar[(1,)](x, y, 9)
    assert y[0] == x[9]


@pytest.mark.parametrize(
    ("loaded", "stored", "access"), [(11, 10, "loads 1"), (10, 11, "stores 1"), (16, 10, "loads 6")]
)
def test_what_lies_beyond_is_seen(loaded, stored, access):
    x, y = _tensors()
    _copy[(1,)](x, y, loaded, stored, BLOCK=16)  # without the check nothing happens
    with inside_bounds(), pytest.raises(Exception, match=f"OutOfBounds.*_copy {access} elements"):
        _copy[(1,)](x, y, loaded, stored, BLOCK=16)


@pytest.mark.parametrize("offset", [-1, 10])
def test_a_single_element_beyond_is_seen(offset):
    x, y = _tensors()
    with inside_bounds(), pytest.raises(Exception, match=r"OutOfBounds.*_scalar loads 1 elements"):
        _scalar[(1,)](x, y, offset)


def test_the_check_ends():
    x, y = _tensors()
    with inside_bounds():
        pass
    _copy[(1,)](x, y, 11, 10, BLOCK=16)
