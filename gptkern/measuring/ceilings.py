"""What this device can do, measured: the rates that a kernel's own is a share of.

    copy        bytes read and written a second by a large copy
    float32     operations a second of a large matrix product, IEEE or as torch.get_float32_matmul_precision says
    bfloat16    the same with bfloat16 operands
    int8        the same with int8 operands and an int32 result (torch._int_mm)

They are what libraries reach here, not a data sheet's peak: a kernel may pass 100 %.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from gptkern.measuring import timing

# Bytes of the copy, and size of the square matrices: large enough to fill the device, small enough for a laptop.
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
MATRIX = {"cuda": 8192, "cpu": 1024}
# An 8-bit or 16-bit product can take a CPU without instructions for it seconds at the size above.
SMALL_MATRIX = {"cuda": 8192, "cpu": 256}
ROUNDS = 10


def measure(kind: str, smoke: bool = False) -> dict[str, dict[str, Any]]:
    """name -> {"value", "unit", "how"}; what the device cannot run is left out.

    Args:
        kind: "cuda" or "cpu". smoke: tiny sizes, whose rates mean nothing, to run the code.
    """
    with timing.own_stream(kind):
        found = {"copy": _copy(kind, COPY_BYTES[kind] if not smoke else 2**20)}
        for name in ("float32", "bfloat16", "int8"):
            size = 64 if smoke else (MATRIX if name == "float32" else SMALL_MATRIX)[kind]
            # Not every device has an 8-bit product.
            with contextlib.suppress(RuntimeError):
                found[name] = _product(kind, name, size)
    return found


def _copy(kind: str, size: int) -> dict[str, Any]:
    source = torch.randint(256, (size,), dtype=torch.uint8, device=kind)
    seconds = _seconds(lambda a, b: b.copy_(a), [(source, torch.empty_like(source))])
    return {"value": 2 * size / seconds, "unit": "B/s", "how": f"a copy of {size >> 20} MiB, bytes read and written"}


def _product(kind: str, name: str, size: int) -> dict[str, Any]:
    how, function = f"a {size}x{size}x{size} product of {name}", torch.mm
    left, right = torch.randn(2, size, size, device=kind).unbind()
    if name == "int8":
        left, right, function, how = left.mul(32).char(), right.mul(32).char(), torch._int_mm, f"{how} (torch._int_mm)"
    elif name == "float32":
        how += f", precision {torch.get_float32_matmul_precision()}"
    else:
        left, right = left.to(getattr(torch, name)), right.to(getattr(torch, name))
    # The second operand as a linear layer's weight: transposed.
    seconds = _seconds(lambda a, b: function(a, b), [(left, right.t())])
    return {"value": 2 * size**3 / seconds, "unit": "FLOP/s", "how": how}


def _seconds(function: Callable, inputs: list[tuple]) -> float:
    return timing.spread(timing.durations([function], inputs, ROUNDS)[0]).median
