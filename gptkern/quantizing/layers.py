"""Where a model holds its layers, and how an int8 layer takes the place of a float one."""

from __future__ import annotations

import sys
import types
from typing import NamedTuple

import torch

from gptkern.nn import Int8Linear

# What a layer carries over to its int8 successor, each the dict that its handles know.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def transformers() -> types.ModuleType | None:
    """gptkern.quantizing.transformers, where the process has loaded what a model of transformers is made of."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from gptkern.quantizing import transformers

    return transformers


class Place(NamedTuple):
    """Where a module is held. It holds no module itself, so that a replaced one is freed."""

    parent: torch.nn.Module
    attribute: str
    name: str

    def module(self) -> torch.nn.Module:
        return self.parent._modules[self.attribute]

    def put(self, module: torch.nn.Module) -> None:
        self.parent._modules[self.attribute] = module


def places(model: torch.nn.Module) -> list[list[Place]]:
    """For each module in the model, all places that hold it."""
    found: dict[int, list[Place]] = {}
    for path, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is not None:
                name = f"{path}.{attribute}" if path else attribute
                found.setdefault(id(module), []).append(Place(parent, attribute, name))
    return [found[id(module)] for module in model.modules() if id(module) in found]


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is exactly transformers' Conv1D; there is none where transformers was not imported."""
    return type(module) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def take_over(module: torch.nn.Module, layer: Int8Linear) -> None:
    """The int8 layer gets what its float predecessor had besides the weight."""
    # The same Parameter: an optimizer or a tie may hold it.
    layer.bias = module.bias
    for name in _HOOKS:
        vars(layer)[name] = vars(module)[name]
    # Load hooks that are given their module hold it weakly themselves.
    for key, hook in layer._load_state_dict_pre_hooks.items():
        if getattr(hook, "with_module", False):
            layer._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, layer)
    for name, value in vars(module).items():
        vars(layer).setdefault(name, value)


def put_empty(held: list[Place], mode: str, activation: str | None = None) -> None:
    """An Int8Linear without memory, in all places of a torch.nn.Linear or Conv1D; its bias stays as it is."""
    module = held[0].module()
    out_features, in_features = module.weight.t().shape if is_conv1d(module) else module.weight.shape
    layer = Int8Linear(
        in_features, out_features, module.bias is not None, activation=activation, mode=mode, device="meta"
    )
    take_over(module, layer.train(module.training))
    for place in held:
        place.put(layer)
