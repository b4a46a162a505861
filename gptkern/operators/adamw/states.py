"""The state of one parameter: what AdamW keeps of it, and how one that was saved becomes one that it keeps.

    step                 0-d float32 on the parameter's device: its updates
    exp_avg, exp_avg_sq  as the parameter, in its group's dtype; with amsgrad max_exp_avg_sq too
    exp_avg_codes        int8, as the parameter; exp_avg_absmax float32 (rows, blocks): of 8 bits, in exp_avg's place
    exp_avg_sq_codes     uint8; exp_avg_sq_absmax: likewise

Of a DTensor all but the step are DTensors that are spread as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from gptkern.operators.adamw import blockwise, sharding
from gptkern.operators.adamw.contract import laid_out_as

CODES = "exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax"
# What a saved state of codes has in the step's place: torch.optim.AdamW's load_state_dict makes a number of it and says
# what it could not. Without it the first step would end with a KeyError.
NO_STEP = b"averages in 8 bits of gptkern.optim.AdamW: torch.optim.AdamW needs its to_float_state_dict()"
STEP_OF_CODES = "step_of_codes"


def held_dtype(param: torch.Tensor, group: dict[str, Any]) -> torch.dtype | None:
    """The dtype of a parameter's averages; None: codes."""
    if group["state_dtype"] is None:
        return param.dtype
    if group["state_dtype"] == "int8" and blockwise.is_coded(param.shape):
        return None
    return torch.promote_types(param.dtype, torch.float32)


def first(param: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What torch.optim.AdamW makes at the first step of a parameter, in the group's dtype."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=param.device)}
    dtype = held_dtype(param, group)
    if dtype is not None:
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        return state | {key: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format) for key in keys}
    for key, of_codes in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        codes = torch.zeros_like(param, dtype=of_codes, memory_format=torch.contiguous_format)
        state[f"{key}_codes"] = codes
        scales = torch.zeros(blockwise.blocks_of(sharding.local(param).shape), device=param.device)
        state[f"{key}_absmax"] = _spread_as(param, scales)
    return state


def _spread_as(param: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(rows, blocks) of the rows here, spread as the parameter is."""
    if not sharding.is_sharded(param):
        return scales
    from torch.distributed.tensor import DTensor

    shape = torch.Size(blockwise.blocks_of(param.shape))
    return DTensor.from_local(
        scales, param.device_mesh, param.placements, run_check=False, shape=shape, stride=(shape[1], 1)
    )


def _rewrapped(param: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """A tensor of the parameter's shape here, spread as the parameter is."""
    if not sharding.is_sharded(param):
        return here
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        here, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """What state_dict has of a state."""
    if "exp_avg_codes" not in state:
        return state
    return {**state, "step": NO_STEP, STEP_OF_CODES: state["step"]}


def opened(state: Any) -> Any:
    """What `saved` was given; what is none of it stays as it is."""
    if not isinstance(state, dict) or not isinstance(state.get("step"), bytes):
        return state
    rest = {key: value for key, value in state.items() if key not in ("step", STEP_OF_CODES)}
    return {**rest, "step": state[STEP_OF_CODES]} if STEP_OF_CODES in state else rest


def check(name: str, param: torch.Tensor, state: dict[str, Any], amsgrad: bool) -> None:
    """Whether a state that is to be loaded fits: kernels walk it by the parameter's size."""
    if not isinstance(state, dict):
        raise ValueError(f"AdamW: the state of {name} is a {type(state).__name__}; it needs to be a dict")
    if not state:
        return
    keys = CODES if "exp_avg_codes" in state else ("exp_avg", "exp_avg_sq")
    if amsgrad or "max_exp_avg_sq" in state:
        keys = (*keys, "max_exp_avg_sq")
    for key in ("step", *keys):
        if key not in state:
            raise ValueError(f"AdamW: the state of {name} has no {key}")
    if isinstance(state["step"], torch.Tensor) and state["step"].numel() != 1:
        raise ValueError(f"AdamW: the state of {name} has step {tuple(state['step'].shape)}; it needs one number")
    for key in keys:
        needs = torch.Size(blockwise.blocks_of(param.shape)) if key.endswith("_absmax") else param.shape
        if not isinstance(state[key], torch.Tensor) or state[key].shape != needs:
            got = tuple(state[key].shape) if isinstance(state[key], torch.Tensor) else type(state[key]).__name__
            raise ValueError(f"AdamW: the state of {name} has {key} {got}; it needs {tuple(needs)}")
        if sharding.is_sharded(state[key]) != sharding.is_sharded(param):
            raise ValueError(f"AdamW: of {name} one of parameter and {key} is a DTensor; both need to be")


def decoded(param: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A state with float32 averages in place of codes."""
    codes = [sharding.local(state[key]) for key in CODES]
    rest = {key: value for key, value in state.items() if key not in CODES}
    return rest | {
        "exp_avg": _rewrapped(param, blockwise.decoded(*codes[:2])),
        "exp_avg_sq": _rewrapped(param, blockwise.decoded_square(*codes[2:])),
    }


@torch.no_grad()
def converted(param: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """A checked state as this optimizer holds it, on the parameter's device."""
    if not state:
        return dict(state)
    found = {key: value.to(param.device) if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    found["step"] = torch.as_tensor(found["step"], dtype=torch.float32, device=param.device).reshape(())
    dtype = held_dtype(param, group)
    if dtype is None and "exp_avg_codes" in found:
        return found
    if "exp_avg_codes" in found:
        found = decoded(param, found)
    if dtype is not None:
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            if key in found:
                value = found[key].to(dtype)
                found[key] = value if sharding.is_sharded(param) else laid_out_as(value, param)
        return found
    m, v = (sharding.local(found.pop(key)).float() for key in ("exp_avg", "exp_avg_sq"))
    (m_codes, m_scales), (v_codes, v_scales) = blockwise.encoded(m), blockwise.encoded_square(v)
    found["exp_avg_codes"], found["exp_avg_sq_codes"] = _rewrapped(param, m_codes), _rewrapped(param, v_codes)
    found["exp_avg_absmax"], found["exp_avg_sq_absmax"] = _spread_as(param, m_scales), _spread_as(param, v_scales)
    return found
