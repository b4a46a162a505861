"""attention: the contract, the PyTorch backend, the registered ops and the autograd.Function."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern import dispatch


@dispatch.twin_of(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention, the twin of `torch.nn.functional.scaled_dot_product_attention`.

        P = softmax(scale * query @ key^T)        over the keys; with is_causal, key j is seen by query i if j <= i
        output = P @ value

    The probabilities are never written to memory: the forward keeps the log-sum-exp of each row (float32), from
    which the backward recomputes them. Softmax sums and products accumulate in float32. float32 products follow
    `torch.get_float32_matmul_precision()`. The backward has no atomics: it is the same on every run.

    Args:
        query: (…, heads, length_q, head_dim). key, value: (…, kv_heads, length_k, head_dim); any lengths, 0 and
            length_q != length_k included. Kernels need four dimensions (other ranks run on PyTorch), take any
            strides whose last one is 1, and do not copy such a view.
        attn_mask: bool (True takes part) or additive, broadcastable to (…, heads, length_q, length_k).
            Runs on PyTorch for now; `gptkern.explain` says so.
        dropout_p: probability of dropping an attention weight. Above 0 it runs on PyTorch for now.
        is_causal: the upper-left causal mask, as in PyTorch: query 0 sees key 0 alone, whatever the lengths.
        scale: 1/sqrt(head_dim) by default.
        enable_gqa: lets kv_heads divide heads; query head h then reads key/value head h // (heads // kv_heads).

    Returns:
        (…, heads, length_q, head_dim of value), the query's dtype. A query with no key (length_k = 0) gives zeros.

    Raises (of the same type as PyTorch):
        RuntimeError: the dtypes, devices, batch sizes or head_dims differ; the head counts differ (without
            enable_gqa) or do not divide; attn_mask together with is_causal; fewer than two dimensions.
        TypeError: an argument that must be a tensor is none.

    Backends: torch; triton for float16, bfloat16 and float32, head_dim a multiple of 8 up to 256 and equal for
    query and value, forward and backward (no second derivative).

    Source: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691).
    """
    raise NotImplementedError
