"""How the tests call softmax: inputs, options, and a call that is judged against the oracle."""

from __future__ import annotations

import oracle_softmax
import pytest
import torch
from checking import check

import gptkern
import gptkern.functional as G

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
dtypes_and_float64 = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(device=device, dtype=dtype)


def check_softmax(input, dim=-1, grad_output=None, **extensions) -> torch.Tensor:
    return check(
        lambda x: G.softmax(x, dim, **extensions),
        lambda x, precision: oracle_softmax.softmax(x, dim, **extensions, precision=precision),
        input,
        grad_output=grad_output,
    )


def refuses_float64(backend: str, call, *used: torch.dtype) -> bool:
    """Whether the call uses float64 on the cuda backend, which leaves it to Triton and says so."""
    if backend != "cuda" or torch.float64 not in used:
        return False
    with pytest.raises(gptkern.BackendError, match="float64"):
        call()
    return True


CALLS = {
    "plain": {},
    "scale": {"scale": 0.5},
    "bool mask": {"scale": 0.5, "mask": torch.arange(7 * 9).view(7, 9) % 3 > 0},
    "additive mask": {"mask": torch.linspace(-1, 1, 9)},
    "causal": {"is_causal": True},
}


def arguments_of(name: str, device: str) -> tuple:
    """(scale, mask, is_causal) of a call of the table."""
    mask = CALLS[name].get("mask")
    return CALLS[name].get("scale", 1.0), None if mask is None else mask.to(device), CALLS[name].get("is_causal", False)
