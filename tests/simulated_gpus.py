"""GPUs that are not there: what PyTorch says of them, and a user's file of measurements on one."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.backends import dispatch
from gptkern.backends.tables import files, user
from gptkern.backends.triton import launching

H200 = user.Device("NVIDIA H200", 90)


def simulate(monkeypatch, *gpus: tuple[str, tuple[int, int]]) -> torch.device:
    """From here on cuda:0, cuda:1, … are these (name, compute capability); returns cuda:0."""

    def of(device):
        return gpus[torch.device("cuda:0" if device is None else device).index or 0]

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: of(device)[1])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: of(device)[0])
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(launching, "missing", lambda: None)
    dispatch.forget()
    return torch.device("cuda", 0)


def users_file(**changes: Any):
    """Writes what `gptkern tune` found on an H200, with these parts in place of nothing; returns its path."""
    content = dict(format=user.FORMAT, device=H200.name, architecture=H200.architecture, versions=user.versions())
    files.write(user.path(H200), content | dict(date="2026-11-23", configurations={}, backends={}) | changes)
    dispatch.forget()
    return user.path(H200)
