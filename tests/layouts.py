"""Tensors in the memory layouts that a kernel can meet, with memory around them that must not be read."""

from __future__ import annotations

import itertools

import torch

# Elements of guard on each side. A multiple of 16 keeps a tensor as aligned as a fresh one.
GUARD = 64
# What lies between the elements of a strided tensor: far from what the tests put into them, and within int8.
FAR = 101


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy inside a larger buffer of NaN (of the largest value for integers).

    A load that passes the end, which no error reports, puts these values into the result.
    """
    poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    buffer = torch.full((tensor.numel() + 2 * GUARD,), poison, dtype=tensor.dtype, device=tensor.device)
    view = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def strided_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows further apart than they are wide, as a slice of a wider tensor has them."""
    buffer = guarded(tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 7), FAR))
    return buffer[..., 3 : 3 + tensor.shape[-1]].copy_(tensor)


def every_other_row(tensor: torch.Tensor) -> torch.Tensor:
    """Every other row of a tensor twice as long, from the last dimension but one."""
    buffer = guarded(tensor.new_full((*tensor.shape[:-2], 2 * tensor.shape[-2], tensor.shape[-1]), FAR))
    return buffer[..., ::2, :].copy_(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The last two dimensions swapped in memory: the last one is not the contiguous one."""
    return guarded(tensor.transpose(-1, -2)).transpose(-1, -2)


def every_other_element(tensor: torch.Tensor) -> torch.Tensor:
    """The last dimension with stride 2."""
    buffer = guarded(tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), FAR))
    return buffer[..., ::2].copy_(tensor)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first row for all of them, with stride 0. Its values are not the tensor's."""
    return guarded(tensor[:1]).expand_as(tensor)


def permuted_batch(tensor: torch.Tensor) -> torch.Tensor:
    """The first two dimensions swapped in memory, as (batch, length, width) from (length, batch, width)."""
    return guarded(tensor.transpose(0, 1)).transpose(0, 1)


def of_own_strides(*tensors: torch.Tensor, step: int = 1) -> list[torch.Tensor]:
    """The tensors in strides that none shares with another: a kernel that walks one by another's strides shows it.

    Args:
        step: rows begin whole numbers of so many elements apart. A vector's elements keep a kernel on its vectors.
    """
    views, taken = [], set()
    for tensor in tensors:
        for room in itertools.count(2):
            view = _with_room(tensor, room, step)
            # Of one dimension the elements' own; else those of rows, and of what is around them.
            strides = set(enumerate(reversed(view.stride()[:-1]), 1)) or {(0, view.stride(0))}
            if not strides & taken:
                break
        taken |= strides
        views.append(view)
    return views


def _with_room(tensor: torch.Tensor, room: int, step: int) -> torch.Tensor:
    """A copy with room behind each dimension, or between the elements of a tensor that has but one."""
    if tensor.dim() == 1:
        return guarded(tensor.new_full((len(tensor) * room,), FAR))[::room].copy_(tensor)
    *sizes, width = tensor.shape
    buffer = guarded(tensor.new_full([*(size + room for size in sizes), (-(-width // step) + room) * step], FAR))
    return buffer[tuple(map(slice, tensor.shape))].copy_(tensor)


def apart(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """One place of the dimension ends an element before the next one begins; the first is aligned."""
    room = list(tensor.shape)
    room[dim] = 1
    inner = tensor.shape[dim + 1 :].numel()
    flat = tensor.reshape(*tensor.shape[: dim + 1], inner)
    wider = guarded(torch.cat((flat, flat[..., :1]), -1))
    strides = list(wider.stride()[: dim + 1]) + list(guarded(tensor).stride()[dim + 1 :])
    return wider.as_strided(tensor.shape, strides, wider.storage_offset())


def in_order(tensor: torch.Tensor, order: tuple[int, ...], room: int) -> torch.Tensor:
    """A copy whose dimensions lie in memory in this order, outermost first, with NaN behind them.

    Args:
        room: elements behind the innermost dimension, and as many rows behind the last of them. Of integers and bools
            all bits are set there.
    """
    sizes = [tensor.shape[dim] for dim in order]
    sizes[-2:] = sizes[-2] + room, sizes[-1] + room
    poison = torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else FAR
    buffer = tensor.new_full(sizes, poison).permute([order.index(dim) for dim in range(tensor.dim())])
    return buffer[tuple(map(slice, tensor.shape))].copy_(tensor)


LAYOUTS = [strided_rows, every_other_row, transposed, every_other_element, expanded, permuted_batch]
