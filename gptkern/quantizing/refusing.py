"""Loads of the other kind are refused as a whole.

load_state_dict goes from the root down and fills each module on its way, so that an int8 layer sees weights that it
cannot take when those before it are filled already. The modules that hold int8 layers look for it first.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gptkern.nn import Int8Linear, refuse_unfit, unfit


def look_first(model: torch.nn.Module) -> None:
    """Each module of the model that holds int8 layers refuses a state_dict that one of them cannot take.

    On the way to each layer, not at the root alone: a block is loaded by itself, and models become parts of others.
    """
    for path in sorted({prefix for name in _int8_layers(model) for prefix in _parents(name)}):
        holder = model.get_submodule(path)
        hooks = holder._load_state_dict_pre_hooks.values()
        if not any(getattr(hook, "hook", None) is _refuse for hook in hooks):
            holder.register_load_state_dict_pre_hook(_refuse)


def unfit_for(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> list[str]:
    """What the state_dict holds for the model's int8 layers that they cannot take."""
    return [line for name in _int8_layers(model) for line in unfit(state_dict, f"{prefix}{name}.".lstrip("."))]


def _refuse(module: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str, *arguments) -> None:
    refuse_unfit(f"load_state_dict of {type(module).__name__}", unfit_for(module, state_dict, prefix))


def _int8_layers(model: torch.nn.Module) -> list[str]:
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if isinstance(module, Int8Linear)]


def _parents(name: str) -> list[str]:
    """ "a.b.c" -> "", "a", "a.b" """
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))] if name else []
