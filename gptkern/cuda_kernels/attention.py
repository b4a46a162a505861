"""attention on CUDA C++: launchers over csrc/attention.cu and csrc/attention_backward.cu."""

from __future__ import annotations

import math

import torch

from gptkern.cuda_kernels import common
from gptkern.ops.attention import empty_in_layout_of, outside_of_kernels

_DTYPES = (torch.float16, torch.bfloat16)
# Rows are copied by 16 bytes: 8 values.
_VECTOR = 8
_VECTOR_BYTES = 16
# Offsets within a tile of at most 128 rows are 32-bit.
_LARGEST_ROW_STRIDE = 2**31 // 128
# csrc/attention.cu: heads are the second number of a grid.
_MOST_HEADS = 65535
_LOG2E = math.log2(math.e)


def unsupported(query, key, value, is_causal, scale, attn_mask=None, dropout_p=0.0):
    if attn_mask is not None:
        return "attn_mask is given, and these kernels have the causal mask alone"
    if dropout_p != 0.0:
        return f"dropout_p is {dropout_p}, and these kernels have no dropout"
    if query.dim() == 4 and query.shape[1] > _MOST_HEADS:
        return f"query has {query.shape[1]} heads; the CUDA kernels take {_MOST_HEADS}"
    return outside_of_kernels(query, key, value, _DTYPES)


def forward(query, key, value, is_causal, scale):
    """-> output (batch, heads, length_q, head_dim), lse (batch, heads, length_q) float32, in base 2."""
    batch, heads, length_q, head_dim = query.shape
    _, kv_heads, length_k, _ = key.shape
    output = empty_in_layout_of(query)
    lse = query.new_empty((batch, heads, length_q), dtype=torch.float32)
    if batch == 0 or heads == 0 or length_q == 0:
        return output, lse
    if length_k == 0:
        return output.zero_(), lse.fill_(-math.inf)
    query, q_batch, q_head, q_row = _readable(query)
    key, k_batch, k_head, k_row = _readable(key)
    value, v_batch, v_head, v_row = _readable(value)
    o_batch, o_head, o_row, _ = output.stride()
    address = common.address
    common.call(
        "attention_forward", query,
        address(query), address(key), address(value), address(output), address(lse),
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
        batch, heads, kv_heads, length_q, length_k, head_dim,
        scale * _LOG2E, is_causal, common.DTYPES[query.dtype],
    )  # fmt: skip
    return output, lse


def backward(
    grad_output, query, key, value, output, lse, is_causal, scale, need_query, need_key, need_value
):  # fmt: skip
    """-> dquery, dkey, dvalue of the shapes, dtypes and layouts of query, key, value; what is not needed is empty."""
    batch, heads, length_q, head_dim = query.shape
    _, kv_heads, length_k, _ = key.shape
    grad_query = empty_in_layout_of(query) if need_query else query.new_empty(0)
    grad_key = empty_in_layout_of(key) if need_key else key.new_empty(0)
    grad_value = empty_in_layout_of(value) if need_value else value.new_empty(0)
    if query.numel() == 0 or key.numel() == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    grad_output, *grad_output_strides = _readable(grad_output)
    query, *query_strides = _readable(query)
    key, *key_strides = _readable(key)
    value, *value_strides = _readable(value)
    # What was saved comes back through hooks, which may have copied it.
    output, *output_strides = _readable(output)
    lse = lse.contiguous()
    delta = torch.empty_like(lse) if need_query or need_key else None
    address = common.address
    common.call(
        "attention_backward", query,
        address(grad_output), address(query), address(key), address(value), address(output), address(lse),
        address(delta), address(grad_query), address(grad_key), address(grad_value),
        grad_output_strides, query_strides, key_strides, value_strides, output_strides,
        grad_query.stride(), grad_key.stride(), grad_value.stride(),
        batch, heads, kv_heads, length_q, length_k, head_dim,
        scale, is_causal, common.DTYPES[query.dtype],
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _readable(tensor):
    """-> the tensor itself, or a copy where the kernels cannot read it by 16 bytes, and its strides but the last."""
    batch, head, row, last = tensor.stride()
    if last != 1 or (batch | head | row) % _VECTOR or row >= _LARGEST_ROW_STRIDE or tensor.data_ptr() % _VECTOR_BYTES:
        # Not contiguous(): a contiguous view may begin anywhere.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        batch, head, row, _ = tensor.stride()
    return tensor, batch, head, row
