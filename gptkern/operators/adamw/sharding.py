"""Parameters that are spread over a mesh of devices: which part of the whole lies here, and the norm of the whole.

DTensors alone are known to be parts of something; FSDP2 (torch.distributed.fsdp.fully_shard) makes them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Element e here (row-major) is element start + (e // run) · stride + e % run of the whole tensor."""

    start: int
    run: int
    stride: int


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Where nobody has imported these there are none."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of the tensor lies in this process: itself, or the DTensor's own memory."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def spread_as(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient, spread as the parameter is: of a sum that is still to be made, the sum."""
    if is_sharded(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def sharded_dimensions(param: torch.Tensor) -> dict[int, list[int]]:
    """{dimension of the tensor: dimensions of the mesh that it is spread over}."""
    found: dict[int, list[int]] = {}
    for mesh_dimension, placement in enumerate(param.placements):
        if placement.is_partial():
            raise ValueError(f"AdamW: a parameter of shape {tuple(param.shape)} has placements {param.placements}; "
                             "each needs to be a shard or a replica")  # fmt: skip
        if not placement.is_replicate():
            found.setdefault(placement.dim, []).append(mesh_dimension)
    return found


def place_of(param: torch.Tensor) -> Place:
    """Where the part of a parameter that lies here has its elements in the whole.

    Raises:
        NotImplementedError: it is spread over two dimensions neither of which is the first that it has more than one
            of, or by strides with gaps.
    """
    shape, here = param.shape, local(param)
    whole = Place(0, max(1, here.numel()), max(1, here.numel()))
    if not is_sharded(param) or here.numel() == 0:
        return whole
    spread = [dimension for dimension in sharded_dimensions(param) if here.shape[dimension] != shape[dimension]]
    if not spread:
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(shape, param.device_mesh, param.placements)
    strides = [shape[dimension + 1 :].numel() for dimension in range(len(shape))]
    start = sum(at * stride for at, stride in zip(offset, strides))
    # What lies behind the last dimension that is spread is whole, and one run with it.
    last = max(spread)
    run = here.shape[last:].numel()
    before = [dimension for dimension in range(last) if here.shape[dimension] > 1]
    # Runs follow one another in steps of one size where of all that is before, only the first is not whole.
    gaps = any(dimension in spread for dimension in before[1:]) or not _is_nested(param)
    if gaps or tuple(size) != tuple(here.shape):
        raise NotImplementedError(
            f"AdamW: a parameter of shape {tuple(shape)} has placements {param.placements}; stochastic rounding needs "
            "it to be spread over one dimension, or over its first and one more"
        )
    return Place(start, run, strides[before[-1]] if before else run)


def _is_nested(param: torch.Tensor) -> bool:
    """Whether of a dimension that is spread by strides, as FSDP over tensor parallelism has it, each part is one run:
    that is so where the dimensions of the mesh behind it make as many parts as its stride skips."""
    for mesh_dimension, placement in enumerate(param.placements):
        parts = getattr(placement, "split_factor", 1)
        for behind in range(mesh_dimension + 1, len(param.placements)):
            if getattr(param.placements[behind], "dim", None) == getattr(placement, "dim", -1):
                parts /= param.device_mesh.size(behind)
        if hasattr(placement, "split_factor") and parts != 1:
            return False
    return True


def norms_over_meshes(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], norm_of) -> list[torch.Tensor]:
    """0-d norms, one for each way in which gradients are spread, dtype and device, of the whole tensors.

    Of each dimension of the mesh that a tensor is spread over the sums of squares are added; replicas count once.

    Args:
        pairs: (parameter, gradient), spread alike. norm_of: norm_of(list of plain tensors) -> 0-d.
    """
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for param, grad in pairs:
        mesh, dimensions = None, ()
        if is_sharded(param):
            mesh = param.device_mesh
            dimensions = tuple(sorted(itertools.chain(*sharded_dimensions(param).values())))
        here = local(grad)
        kinds.setdefault((mesh, dimensions, here.device, here.dtype), []).append(here)
    norms = []
    for (mesh, dimensions, _, _), here in kinds.items():
        norm = norm_of(here)
        if dimensions:
            # ‖g‖² = Σ over the shards of ‖g here‖²
            squares = norm.square()
            for dimension in dimensions:
                torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))
            norm = squares.sqrt()
        norms.append(norm)
    return norms
