"""Norms and rotary embeddings that models of transformers write out in Python, known by their code.

Llama's RMSNorm, and every other model's whose code is the same, runs on gptkern.functional.rms_norm. transformers
rounds the normalised row to the input's dtype, and then its product with the weight; here it is rounded once. So in 16
bits the two differ by a unit in the last place or one and a half, and float64 is not cut to float32 on the way; in
float32 they are equal up to the order of operations. Where the weight's dtype is not the input's, the product stays
PyTorch's, with its result's dtype.

The rotary embedding is the function `apply_rotary_pos_emb` of a model's own file, called by its name: the attention's
forward is made anew with another function in that name (rerouting.py), where the code is that of Llama, GPT-NeoX
or GPT-J. It too is rounded once, and keeps the query's dtype where transformers widens it to that of cos.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable

import torch

from gptkern import functional as F
from gptkern.backends import handing

ROTARY_NAME = "apply_rotary_pos_emb"
_is_traced = torch.compiler.is_dynamo_compiling


def same_code(function: Callable, other: Callable) -> bool:
    """Whether two functions do the same, and so do the functions that they call by name."""
    function, other = inspect.unwrap(function), inspect.unwrap(other)
    code = _code_of(function)
    if code is None or code != _code_of(other):
        return False
    if (function.__defaults__, function.__kwdefaults__) != (other.__defaults__, other.__kwdefaults__):
        return False
    named = [(function.__globals__.get(name), other.__globals__.get(name)) for name in function.__code__.co_names]
    return all(
        same_code(ours, theirs) if isinstance(ours, types.FunctionType) else _equal(ours, theirs)
        for ours, theirs in named
        if ours is not theirs
    )


def _equal(ours: object, theirs: object) -> bool:
    try:
        return type(ours) is type(theirs) and bool(ours == theirs)
    except Exception:  # an == of its own, as a tensor's
        return False


def _code_of(function: Callable) -> tuple | None:
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    constants = code.co_consts
    # A docstring is the first constant.
    if constants and isinstance(constants[0], str) and function.__doc__ is not None:
        constants = (None, *constants[1:])
    return code.co_code, code.co_names, code.co_varnames, constants


def rotary(function: types.FunctionType) -> Callable | None:
    """What takes the place of a model's function `apply_rotary_pos_emb`, where its code is known."""
    for module, replaced in _FORMS.items():
        if same_code(function, getattr(importlib.import_module(f"transformers.models.{module}"), ROTARY_NAME)):
            return replaced(function)
    return None


def _half_split(original: Callable) -> Callable:
    """Llama's and GPT-NeoX's apply_rotary_pos_emb; the latter turns as many elements as cos is wide."""

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim != 1:  # heads behind the positions
            return original(q, k, cos, sin, unsqueeze_dim)
        # q, k (batch, heads, length, head_dim); cos, sin (batch, length, rotary_dim)
        rotary_dim = cos.shape[-1]
        return tuple(F.rotary_embedding(x, cos, sin, rotary_dim=rotary_dim) for x in (q, k))

    return apply_rotary_pos_emb


def _interleaved(original: Callable) -> Callable:
    """GPT-J's apply_rotary_pos_emb."""

    def apply_rotary_pos_emb(tensor, sin, cos):
        # tensor (batch, length, heads, rotary_dim), read and written in that order
        # cos, sin (batch, length, rotary_dim / 2)
        return F.rotary_embedding(tensor.transpose(1, 2), cos, sin, interleaved=True).transpose(1, 2)

    return apply_rotary_pos_emb


# Where the function is written, and what takes its place.
_FORMS = {
    "llama.modeling_llama": _half_split,
    "gpt_neox.modeling_gpt_neox": _half_split,
    "gptj.modeling_gptj": _interleaved,
}


def rms_norm(self, hidden_states):
    """LlamaRMSNorm.forward: (…, width) -> (…, width)."""
    if not _is_traced() and handing.thread.handed is not None:
        taken = handing.take(self, hidden_states)
        if taken is not None:
            return taken
    weight = self.weight
    if weight.dtype != hidden_states.dtype:
        return weight * F.rms_norm(hidden_states, weight.shape, None, self.variance_epsilon)
    return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


def rms_norm_of_sum(self, input, residual):
    """LlamaRMSNorm.forward of input + residual, and the sum; None where its product with the weight is PyTorch's."""
    weight = self.weight
    if weight.dtype != input.dtype:
        return None
    return F.rms_norm(input, weight.shape, weight, self.variance_epsilon, residual=residual)
