"""Which layers of a model can have LoRA's adapters, by patterns of their names, and why the others cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptkern.formatting import shown
from gptkern.nn import Int8Linear
from gptkern.quantizing.choosing import Holders, ends_with, holders_in, looks_linear, obstacle, read_by_modules
from gptkern.quantizing.layers import places

# Where no patterns are given: most often the embedding's own weight, and else as large.
_LEFT_ALONE = "lm_head"


def chosen_layers(
    where: str, model: nn.Module, patterns: list[str] | None, exact: bool = False
) -> dict[str, nn.Module]:
    """Name -> layer, of those that shall be adapted.

    Args:
        where: the function of `lora` that an error names. patterns: as `lora.add` has them.
        exact: they are whole names.

    Raises:
        ValueError: a pattern matches no linear layer, or one that cannot be adapted; or there is none that can be.
    """
    held_in = {id(held[0].module()): held for held in places(model)}
    linear = {name: module for name, module in model.named_modules() if looks_linear(module)}
    matches: Callable[[str, str], bool] = str.__eq__ if exact else _matches
    for pattern in patterns or []:
        if not any(matches(name, pattern) for name in linear):
            there = f"it has {_some(list(linear))}" if linear else "it has none"
            raise ValueError(f"lora.{where}: {shown(str(pattern))} names no linear layer of the model; {there}")
    holders, read = holders_in(model), read_by_modules(model)
    wrapped = {module for each in model.modules() if _is_wrapper(each) for module in each.modules()}
    chosen, first = {}, ""
    for name, module in linear.items():
        if patterns is None and ends_with(name, _LEFT_ALONE):
            continue
        if patterns is not None and not any(matches(name, pattern) for pattern in patterns):
            continue
        reason = _against(module, held_in.get(id(module), []), holders)
        if reason is None and module in read:
            reason = "its parent reads its weight past it"
        if reason is None and module in wrapped:
            reason = "it is wrapped (DistributedDataParallel, FSDP): adapters first, wrap then"
        if reason is None:
            chosen[name] = module
            continue
        first = first or f"{shown(name)}: {reason}"
        if patterns is not None:
            raise ValueError(f"lora.{where}: {first}; it needs to be left out of the adapted layers")
    if not chosen:
        raise ValueError(f"lora.{where}: the model has no linear layer that can be adapted{first and f' ({first})'}")
    return chosen


def _is_wrapper(module: nn.Module) -> bool:
    # Whoever wraps has imported it: an int8 layer's buffers do not tell that the model is sharded.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return isinstance(module, (DistributedDataParallel, *sharded))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _against(module: nn.Module, held: list, holders: Holders) -> str | None:
    """Why a layer cannot be adapted, or None."""
    if type(module) is Int8Linear:
        if module.activation is not None:
            return f"its activation is {module.activation!r}, which would have to follow the adapter"
        return "a forward was set on the instance itself" if "forward" in vars(module) else None
    if type(module) is not nn.Linear and not isinstance(module, nn.Linear):
        return f"it is a {type(module).__name__}, and no torch.nn.Linear or gptkern.nn.Int8Linear"
    return obstacle(held, module, holders)


def check_rank(where: str, name: str, module: nn.Module, rank: int) -> None:
    """Raises ValueError where a layer's weight has no such rank."""
    most = min(module.in_features, module.out_features)
    if not 1 <= rank <= most:
        sizes = f"{shown(name) or 'the layer'} is {module.out_features} x {module.in_features}"
        raise ValueError(f"lora.{where}: rank is {rank}; {sizes} and needs one from 1 to {most}")


def _some(names: list[str]) -> str:
    return ", ".join(map(shown, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
