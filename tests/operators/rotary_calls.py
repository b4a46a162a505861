"""How the tests call rotary_embedding: inputs, angles, and a call that is judged against the oracle."""

from __future__ import annotations

import oracle_rotary
import pytest
import torch
from checking import check, same_bits
from layouts import guarded

import gptkern
import gptkern.functional as G

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
dtypes_and_float64 = pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def random(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(device=device, dtype=dtype)


def angles(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of random angles: (length, pairs) or (batch, length, pairs), with NaN around them."""
    turned = torch.rand(*shape) * 6.3
    return tuple(guarded(tensor.to(device=device, dtype=dtype)) for tensor in (turned.cos(), turned.sin()))


def for_each_element(tensor: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """(…, pairs) -> (…, 2 pairs), as GPT-J repeats them, or Llama."""
    return tensor.repeat_interleave(2, -1) if interleaved else torch.cat((tensor, tensor), -1)


def packed(batch, heads, length, head_dim, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """The first third of a (batch, length, 3, heads, head_dim), as a projection leaves query, key and value."""
    return guarded(random(batch, length, 3, heads, head_dim, device=device, dtype=dtype))[:, :, 0].transpose(1, 2)


def check_rotary(input, cos, sin, interleaved=False, grad_output=None, **options) -> torch.Tensor:
    output = check(
        lambda x: G.rotary_embedding(x, cos, sin, interleaved=interleaved, **options),
        lambda x, precision: oracle_rotary.rotary_embedding(x, cos, sin, interleaved=interleaved, precision=precision),
        input,
        grad_output=grad_output,
    )
    assert output.dtype == input.dtype
    untouched = slice(2 * cos.shape[-1], None)
    same_bits("what passes through", output[..., untouched], input.detach()[..., untouched])
    return output


def refuses_float64(backend: str, call, *used: torch.dtype) -> bool:
    """Whether the call uses float64 on the cuda backend, which leaves it to Triton and says so."""
    if backend != "cuda" or torch.float64 not in used:
        return False
    with pytest.raises(gptkern.BackendError, match="float64"):
        call()
    return True
