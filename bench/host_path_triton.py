"""The Triton backend for host_path.py: Triton's own launcher, in C, down to a driver that does nothing."""

from __future__ import annotations

import stub_driver
from host_path import as_on_a_gpu, prefer

LIMIT = 4.7


def prepare() -> str | None:
    reason = stub_driver.missing()
    if reason is not None:
        return reason
    stub_driver.activate()
    import torch

    as_on_a_gpu(torch)
    prefer("triton")
    return None


def versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__}
