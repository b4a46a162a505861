"""All that a training is between two updates, as named tensors that can be saved and read back in place.

    model.<key>                          the model's state_dict; of tied weights the first key alone; of a model with
                                         LoRA's adapters what learns alone
    optimizer.<parameter>.exp_avg        and .exp_avg_sq, .step: AdamW's
    generators.<rank>.cpu, and .cuda     states of each process's own random numbers, uint8

The names are the same ones from before the first update to the end; so are the tensors of model and optimizer. Each
update puts other ones in the place of the generators'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gptkern.formatting import shown
from gptkern.training.adapting import is_partly_trained
from gptkern.training.errors import UserError
from gptkern.training.process_state import Generators


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.AdamW, generators: Generators) -> dict[str, torch.Tensor]:
    """The tensors themselves, not copies. Updates write into those of model and optimizer; not into the generators'."""
    found, seen = {}, set()
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    partly = is_partly_trained(model)
    for key, value in model.state_dict().items():
        if partly and key not in learning:
            continue
        # state_dict's tensors are detached views: the same memory is the same weight.
        place = value.data_ptr(), value.shape, value.stride()
        if value.numel() and place in seen:
            continue
        seen.add(place)
        found[f"model.{key}"] = value
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return found | {f"generators.{generators.rank}.{kind}": state for kind, state in generators.states.items()}


def check(mine: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Whether `given` fits: before anything is changed.

    Generators of another kind of device may be missing or left over: a training that goes on elsewhere draws others.
    Those of other processes are left over. This process's own have to be there.

    Raises:
        UserError: names what is missing, too much, or of another shape or dtype.
    """
    expected = {name for name in mine if not name.startswith("generators.") or name.endswith(".cpu")}
    missing = sorted(expected - given.keys())
    if missing and missing[-1].startswith("generators."):
        raise UserError(f"the state has no {missing[0]}: it is of another process, or of fewer of them")
    if missing:
        raise UserError(f"the state has no {shown(missing[0])}{_others(missing)}: it is of another model")
    if left := sorted(name for name in given.keys() - mine.keys() if not name.startswith("generators.")):
        raise UserError(f"the state has {shown(left[0])}{_others(left)}, which this training has not")
    for name in sorted(mine.keys() & given.keys()):
        own, other = mine[name], given[name]
        if own.shape != other.shape or own.dtype != other.dtype:
            raise UserError(
                f"the state's {name} is {tuple(other.shape)}, {other.dtype}; "
                f"this training needs {tuple(own.shape)}, {own.dtype}"
            )


def check_scaler(mine: Mapping[str, Any], given: Any) -> None:
    """Whether `given` is a GradScaler's state.

    Raises:
        UserError: names what is missing or no number above 0.
    """
    given = given if isinstance(given, dict) else {}
    for key in mine:
        value = given.get(key)
        least = 0 if key == "_growth_tracker" else 1e-300
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
            raise UserError(f"the state's loss scale has {key} {value!r}; it needs a finite number above 0")


def _others(names: list[str]) -> str:
    return f" (nor {len(names) - 1} more)" if len(names) > 1 else ""


@torch.no_grad()
def load(mine: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], generators: Generators) -> None:
    """Put the values of `given`, which was checked, in place. What was read in place already costs nothing."""
    for name, value in mine.items():
        if name.startswith("generators."):
            kind = name.rpartition(".")[2]
            if name in given:
                generators.states[kind] = given[name].detach().to("cpu", copy=True)
        elif given[name].data_ptr() != value.data_ptr():
            value.copy_(given[name])
