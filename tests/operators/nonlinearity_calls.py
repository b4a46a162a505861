"""How the tests call gelu, silu, swiglu and geglu: tensors, and a call that is judged against the oracle."""

from __future__ import annotations

import oracle_nonlinearity
import torch
from checking import check as check_against
from layouts import guarded

import gptkern.functional as G

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FUNCTIONS = ["gelu", "gelu_tanh", "silu"]
# What there is besides the input.
KINDS = ["plain", "bias", "pair", "packed"]
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def combinations():
    """(function, kind) of all that has a twin: SiLU has no bias."""
    return [(function, kind) for kind in KINDS for function in FUNCTIONS if (function, kind) != ("silu", "bias")]


def tensors_of(kind, *shape, dtype, device, bias_dtype=None):
    """The call's tensors, with memory around them that is NaN. shape: the result's."""
    width = shape[-1] if shape else 1
    input = (
        torch.randn(*shape[:-1], 2 * width, device=device) if kind == "packed" else torch.randn(shape, device=device)
    )
    tensors = [guarded(input.mul(2).to(dtype))]
    if kind == "pair":
        tensors.append(guarded(torch.randn(shape, device=device).to(dtype)))
    if kind == "bias":
        tensors.append(guarded(torch.randn(width, device=device).to(bias_dtype or dtype)))
    return tensors


def call(function, kind, input, other=None):
    """By the public twin."""
    if kind == "bias":
        return G.gelu(input, approximate=_APPROXIMATE[function], bias=other)
    if kind == "plain":
        return G.silu(input) if function == "silu" else G.gelu(input, approximate=_APPROXIMATE[function])
    if function == "silu":
        return G.swiglu(input, other)
    return G.geglu(input, other, _APPROXIMATE[function])


def check(function, kind, tensors, *, grad=None, need=None, by=call):
    """Runs the call forward and backward and judges the result and every gradient; by: as `call`."""
    output = check_against(
        lambda *given: by(function, kind, *given),
        lambda *given, precision: oracle_nonlinearity.nonlinearity(
            *given, function=function, kind=kind, precision=precision
        ),
        *tensors, grad_output=grad, need=need,
    )  # fmt: skip
    assert (output.dtype, output.device) == (tensors[0].dtype, tensors[0].device)
    return output
