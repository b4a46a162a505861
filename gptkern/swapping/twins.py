"""What swap puts in the place of what: the one map of operators here.

An operator that is new to swap gets a line in FUNCTIONS, and one in MODULES where PyTorch has a module for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern import nn
from gptkern.backends.dispatch import TWINS
from gptkern.swapping import activations
from gptkern.swapping.reading import Calls


class Replacement(NamedTuple):
    """What is called in place of a function, and the operator that it runs on ("" for none)."""

    operator: str
    function: Callable


# By the names below a model of transformers is known to compute these itself (gptkern.swapping.transformers).
ATTENTION, RMS_NORM, ROTARY = "attention", "rms_norm", "rotary"
# No operator of its own: a sum and the norm of it in one call, of layer_norm or rms_norm.
RESIDUAL_NORM = "residual_norm"
# These are found in a forward's source, too (gptkern.swapping.edits).
ACTIVATION, LOSS = "nonlinearity", "linear_cross_entropy"
CROSS_ENTROPY = "cross_entropy"

# Operator -> the PyTorch functions whose calls are routed to their twins. PyTorch has none for the rotary embedding.
FUNCTIONS: dict[str, tuple[Callable, ...]] = {
    ATTENTION: (torch._C._nn.scaled_dot_product_attention,),  # F's, were that replaced before this is imported
    "layer_norm": (F.layer_norm,),
    RMS_NORM: (F.rms_norm, torch.rms_norm),
    ROTARY: (),
    "softmax": (F.softmax, torch.softmax, torch.Tensor.softmax),
    ACTIVATION: tuple(activations.FUNCTIONS),
    CROSS_ENTROPY: (F.cross_entropy,),
    RESIDUAL_NORM: (),
}
SWAPPABLE = tuple(FUNCTIONS)
# The loss of a model's own forward is swapped where that is asked for alone: the logits are then not there.
ALL = (*SWAPPABLE, LOSS)

# Exact type -> (its twin, the operator that the twin runs on).
MODULES: dict[type, tuple[type, str]] = {
    torch.nn.LayerNorm: (nn.LayerNorm, "layer_norm"),
    torch.nn.RMSNorm: (nn.RMSNorm, RMS_NORM),
    torch.nn.Softmax: (nn.Softmax, "softmax"),
    torch.nn.GELU: (nn.GELU, ACTIVATION),
    torch.nn.SiLU: (nn.SiLU, ACTIVATION),
}
# PyTorch's own modules whose forward is rerouted as that of a model's is, and what they run on. In eval mode the two
# encoders bypass their submodules, LayerNorms included.
ROUTED_MODULES: dict[type, tuple[str, ...]] = {
    torch.nn.MultiheadAttention: (ATTENTION, "softmax"),
    torch.nn.TransformerEncoderLayer: (ATTENTION, "layer_norm"),
    torch.nn.TransformerEncoder: (ATTENTION, "layer_norm"),
    torch.nn.CrossEntropyLoss: (CROSS_ENTROPY,),
}

_REPLACEMENTS = {
    function: Replacement(operator, activations.FUNCTIONS.get(function) or TWINS[function])
    for operator, functions in FUNCTIONS.items()
    for function in functions
}


def replacements(operators: tuple[str, ...]) -> dict[Callable, Callable]:
    """PyTorch's function -> its twin, of these operators."""
    return {function: found.function for function, found in _REPLACEMENTS.items() if found.operator in operators}


def _never_take_the_fast_path() -> bool:
    return False


# torch.nn's encoder and MultiheadAttention leave Python, and so their own submodules, for one fused operator in eval
# mode where this function allows it.
_FAST_PATHS = {torch.backends.mha.get_fastpath_enabled: Replacement("", _never_take_the_fast_path)}


def find(function: Callable) -> Replacement | None:
    """What takes the place of a function that a forward calls by its name."""
    try:
        return _REPLACEMENTS.get(function) or _FAST_PATHS.get(function)
    except TypeError:  # not hashable
        return None


# --- What a model computes in Python --------------------------------------------------------------------------------


def _attends(calls: Calls) -> bool:
    softmax = {"softmax", "Softmax"} & (calls.operators | calls.names)
    return calls.products >= 2 and bool(softmax) and ATTENTION not in calls.operators


def _normalises(calls: Calls) -> bool:
    return {"rsqrt", "mean"} <= calls.names and not {"layer_norm", RMS_NORM} & calls.operators


# Operator -> whether a forward computes it out of PyTorch's operators, and how the report of a swap says so.
_WRITTEN_OUT: dict[str, tuple[Callable[[Calls], bool], str]] = {
    ATTENTION: (_attends, "its attention is written out as matrix products around a softmax"),
    RMS_NORM: (_normalises, "its norm is written out in Python"),
}


def written_out(calls: Calls) -> dict[str, str]:
    """Operator -> the reason why a class that computes it in Python is left alone."""
    return {operator: reason for operator, (found, reason) in _WRITTEN_OUT.items() if found(calls)}
