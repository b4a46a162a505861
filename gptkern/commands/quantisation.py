"""int8 for a trained GPT: every linear layer but the output one, whose weight is the embedding's."""

from __future__ import annotations

import copy
import itertools

import torch

from gptkern.models.gpt import GPT
from gptkern.nn import Int8Linear


def quantised(model: GPT) -> tuple[GPT, list[str]]:
    """A copy of the model with int8 linear layers, and the paths of the layers that were quantised."""
    model = copy.deepcopy(model).eval()
    names = []
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not model.lm_head:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, Int8Linear.from_linear(module))
            names.append(name)
    return model, names


def size_in_bytes(module: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
