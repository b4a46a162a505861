"""Which of a model's linear layers become int8, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from gptkern.nn import Int8Linear
from gptkern.quantizing.layers import Place, is_conv1d
from gptkern.quantizing.report import Skipped
from gptkern.quantizing.weights_read import modules_at, weights_read

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def planned(
    model: torch.nn.Module, held_in: list[list[Place]], skip: tuple[str, ...], filter: Callable | None
) -> tuple[list[list[Place]], list[Skipped]]:
    """(the layers to quantise, each by its places; those left alone)"""
    holders, read = holders_in(model), read_by_modules(model)
    in_ddp = {m for ddp in model.modules() if isinstance(ddp, DistributedDataParallel) for m in ddp.modules()}
    chosen, skipped = [], []
    for held in held_in:
        module, name = held[0].module(), held[0].name
        if not looks_linear(module):
            continue
        reason = _skip_named(held, skip) or obstacle(held, module, holders)
        if reason is None and module in read:
            reason = "its parent reads its weight"
        if reason is None and module in in_ddp:
            reason = "DistributedDataParallel waits for its weight's gradient: quantise first, wrap then"
        if reason is None and filter is not None and not filter(name, module):
            reason = "filter returned False"
        if reason is None:
            chosen.append(held)
        else:
            skipped.append(Skipped(name, type(module).__name__, reason))
    return chosen, skipped


def looks_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Int8Linear) or any(
        cls.__name__ == "Conv1D" for cls in type(module).__mro__
    )


def ends_with(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}")


def _skip_named(held: list[Place], skip: tuple[str, ...]) -> str | None:
    for place in held:
        parts = place.name.split(".")
        for count in range(1, len(parts) + 1):
            for entry in skip:
                if ends_with(".".join(parts[:count]), entry):
                    return f"skip names {entry!r}"
    return None


def obstacle(held: list[Place], module: torch.nn.Module, holders: Holders) -> str | None:
    """Why a layer cannot be quantised, or None."""
    cls = type(module)
    if isinstance(module, Int8Linear):
        return "it is int8 already"
    if parametrize.is_parametrized(module):
        return "it is parametrised: its weight is computed from other tensors"
    if cls is not torch.nn.Linear and not is_conv1d(module):
        if any(isinstance(place.parent, torch.nn.MultiheadAttention) for place in held):
            return "torch.nn.MultiheadAttention reads its weight and does not call it"
        if isinstance(module, torch.nn.Linear):
            own = "" if cls.forward is torch.nn.Linear.forward else ", with a forward of its own"
            return f"a subclass of torch.nn.Linear{own}"
        return "not transformers' own Conv1D"
    if any(isinstance(place.parent, torch.nn.TransformerEncoderLayer) for place in held):
        return "torch.nn.TransformerEncoderLayer reads its weight in inference and does not call it"
    if "forward" in vars(module):
        return "a forward was set on the instance itself"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias (normalised or pruned, say)"
    weight, bias = module.weight, module.bias
    for name, tensor in (("weight", weight), ("bias", bias)):
        if type(tensor) is not torch.nn.Parameter and not (name == "bias" and tensor is None):
            return f"its {name} is a {type(tensor).__name__}"
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"its {name} is {tensor.dtype}"
        if tensor is not None and tensor.layout != torch.strided:
            return f"its {name} is {tensor.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    start, stop = _extent(weight)
    for holder in holders[weight.untyped_storage()._cdata]:
        if holder.module_id != id(module) and holder.start < stop and start < holder.stop:
            return f"its weight is tied to {holder.name}"
    return None


class Holder(NamedTuple):
    """A tensor of the model in a storage."""

    name: str
    module_id: int
    start: int  # of its first byte
    stop: int  # past its last


# A storage, known by its address in PyTorch (on the meta device, too, where data_ptr is 0) -> what lies in it.
Holders = dict[int, list[Holder]]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage between a tensor's first element and its last: (start, stop)."""
    start = tensor.storage_offset()
    count = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    return start * tensor.element_size(), (start + count) * tensor.element_size()


def holders_in(model: torch.nn.Module) -> Holders:
    found: Holders = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            # A tensor subclass (DTensor, say) may have no storage; such a layer is left alone anyway.
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
                holder = Holder(f"{path}.{name}" if path else name, id(module), *_extent(tensor))
                found.setdefault(tensor.untyped_storage()._cdata, []).append(holder)
    return found


def read_by_modules(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules whose weight another one's forward reads: `self.fc.weight`, `self.mlp[0].weight`."""
    paths = {cls: weights_read(cls) for cls in set(map(type, model.modules()))}
    return {found for module in model.modules() for path in paths[type(module)] for found in modules_at(module, path)}
