"""The device that a model runs on."""

from __future__ import annotations

import warnings

import torch

from gptkern.formatting import shown
from gptkern.training.errors import UserError


def resolve_device(name: str, option: str = "--device") -> torch.device:
    """The device of that name; "auto" is the GPU where there is one, else the CPU.

    Args:
        option: what an error calls the name.

    Raises:
        UserError: PyTorch does not know the device or cannot reach it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    needs = "it needs auto, cpu, cuda or cuda:N"
    try:
        with warnings.catch_warnings():
            # Of names that PyTorch is to drop.
            warnings.simplefilter("ignore")
            device = torch.device(name)
    except Exception as error:
        raise UserError(f"{option} {shown(name)}: no device has this name; {needs}") from error
    reason = _unreachable(device)
    if reason is not None:
        raise UserError(f"{option} {shown(name)}: {reason}; {needs}")
    return device


def _unreachable(device: torch.device) -> str | None:
    if device.type == "cpu":
        return f"there is one CPU, and no {device}" if device.index else None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch sees no GPU here"
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            return f"there {'is 1 GPU' if count == 1 else f'are {count} GPUs'}, the first of them cuda:0"
    try:
        # Not `empty` alone: a tensor on meta holds no values.
        torch.zeros(1, device=device).item()
    except Exception as error:
        # Of a device that it was not built for PyTorch's own words are a dump of its dispatcher.
        reason = f": {str(error).splitlines()[0]}" if device.type == "cuda" else ""
        return f"this PyTorch cannot compute on {device.type} here{reason}"
    return None


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
