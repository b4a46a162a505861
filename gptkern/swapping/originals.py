"""What a module was before a swap: its class, noted in its `__dict__`, from where `unswap` takes it back.

torch.distributed.fsdp.fully_shard makes a class of two, FSDPModule and the module's own. The latter is what is swapped:
the other has no code of its own.
"""

from __future__ import annotations

import sys

import torch

from gptkern.swapping import routed_classes
from gptkern.swapping.twins import MODULES

# Where a swapped module's `__dict__` keeps its original class, and the configs that stood under its attributes.
ORIGINAL = "_gptkern_original"
CONFIGS = "_gptkern_configs"
# Where it is noted that a module's attention comes by the name in its config: others hold that config, too.
BY_NAME = "_gptkern_by_name"


def original_class(module: torch.nn.Module) -> type:
    """The class without a swap: of a lazy module that was swapped and called since, the one that it became."""
    current = bare(type(module))
    noted = module.__dict__.get(ORIGINAL, current)
    after = routed_classes.becomes(noted)
    return after if after is not None and (current is after or is_replacement(current, after)) else noted


def noted_configs(module: torch.nn.Module) -> dict:
    return module.__dict__.get(CONFIGS, {})


def is_replacement(cls: type, original: type) -> bool:
    """Whether `cls` is what a swap makes of `original`."""
    return cls is MODULES.get(original, (None,))[0] or routed_classes.is_routed(cls, original)


def bare(cls: type) -> type:
    """The class that a module had before torch.distributed.fsdp.fully_shard made one of FSDPModule and it.

    That is the one to swap: the other has no code of its own.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or len(cls.__bases__) != 2 or not issubclass(cls.__bases__[0], fsdp.FSDPModule):
        return cls
    return cls.__bases__[1]


def in_place_of(cls: type, replacement: type) -> type:
    """`replacement`; where fully_shard has made `cls`, what it would make of `replacement`."""
    if bare(cls) is cls:
        return replacement
    bases = cls.__bases__[0], replacement
    for known in type.__subclasses__(replacement):
        if known.__bases__ == bases:
            return known
    # its __deepcopy__, which says that there is none
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, own)
