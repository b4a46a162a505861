"""attention on CUDA C++: launchers over csrc/attention/forward.cu and csrc/attention/backward.cu."""

from __future__ import annotations

import math

import torch

from gptkern.backends.cuda import common
from gptkern.operators.attention.checks import outside_of_kernels
from gptkern.operators.attention.contract import Call, Gradient, empty_in_layout_of

_DTYPES = (torch.float16, torch.bfloat16)
# csrc/attention/forward.cu: heads are the second number of a grid.
_MOST_HEADS = 65535


def unsupported(call: Call) -> str | None:
    query, _, _, _, _, attn_mask, dropout_p, lower_right, _ = call
    if attn_mask is not None:
        return "attn_mask is given, and these kernels have the causal mask alone"
    if dropout_p != 0.0:
        return f"dropout_p is {dropout_p}, and these kernels have no dropout"
    if lower_right:
        return "the causal mask is aligned to the lower right, and these kernels have the upper left alone"
    shape = query.shape
    if len(shape) == 4 and shape[1] > _MOST_HEADS:
        return f"query has {shape[1]} heads; the CUDA kernels take {_MOST_HEADS}"
    return outside_of_kernels(call, _DTYPES)


def forward(call: Call):
    """-> output (batch, heads, length_q, head_dim), lse (batch, heads, length_q) float32, in base 2."""
    query, key, value, is_causal, scale, *_ = call
    output = empty_in_layout_of(query)
    batch, heads, length_q, _ = query.shape
    lse = query.new_empty(batch, heads, length_q, dtype=torch.float32)
    if key.numel() == 0:
        return output.zero_(), lse.fill_(-math.inf)
    common.start("attention_forward", query, key, value, output, lse, is_causal, scale)
    return output, lse


def backward(gradient: Gradient, call: Call):
    """-> dquery, dkey, dvalue of the shapes, dtypes and layouts of query, key, value; what is not needed is empty."""
    grad_output, output, lse, need_query, need_key, need_value = gradient
    query, key, value, is_causal, scale, *_ = call
    grad_query = empty_in_layout_of(query) if need_query else query.new_empty(0)
    grad_key = empty_in_layout_of(key) if need_key else key.new_empty(0)
    grad_value = empty_in_layout_of(value) if need_value else value.new_empty(0)
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format) if need_query or need_key else None
    common.start(
        "attention_backward", grad_output, query, key, value, output, lse, delta, grad_query, grad_key, grad_value,
        is_causal, scale,
    )  # fmt: skip
    return grad_query, grad_key, grad_value
