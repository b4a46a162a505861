"""attention on PyTorch's own operator, and what it is kept from where that is wrong.

On a CPU PyTorch has two kernels of attention. `flash` keeps of each row lse = log(sum over the keys of exp(S)), one
number, and computes P = exp(S - lse) from it in the backward; `math` writes P down. Where a mask adds -1e9 to a whole
row, lse is -1e9: nothing of the logarithm is left in it, and the P of that row sum to anything but 1. The forward
of both, and the backward of `math`, are softmax's in float32, the mean of all values where the mask absorbs the scores.
"""

from __future__ import annotations

import math

import torch

from gptkern.backends import tracing
from gptkern.backends.registration import autocast, without_autocast

# What F names, whatever a user has set in its place: a function around it is called by the user's code, and once.
PYTORCHS_OWN = torch._C._nn.scaled_dot_product_attention

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# A log-sum-exp of this size is known to 2⁻¹⁹ in float32, and so are the probabilities.
_LARGEST_LSE = 64.0


def attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """F.scaled_dot_product_attention, which checks its arguments itself."""
    if isinstance(query, torch.Tensor) and query.is_cpu:
        if is_causal and scale is not None:
            # PyTorch's causal kernel for the CPU gives NaN where the scale is not positive (seen in 2.13).
            query, scale = with_positive_scale(query, scale)
        may_be_16_bits = query.dtype in _SIXTEEN_BITS or torch.is_autocast_enabled("cpu")
        if may_be_16_bits and isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
            cast = autocast("lower", query, key, value)
            dtype = cast[0].dtype
            if dtype in _SIXTEEN_BITS and all(tensor.dtype == dtype for tensor in cast):
                # PyTorch rounds P and dS to 16 bits on the CPU and sums a group's dK and dV in 16 bits: up to twice
                # the error that gptkern.measuring.tolerance allows.
                query, key, value = (tensor.float() for tensor in cast)
                if isinstance(attn_mask, torch.Tensor) and attn_mask.dtype == dtype:
                    attn_mask = attn_mask.float()
                with without_autocast("cpu"):
                    return _on_a_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).to(dtype)
        if attn_mask is not None:
            return _on_a_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return PYTORCHS_OWN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def is_causal_bias(mask) -> bool:
    # By its name: an import of torch.nn.attention.bias takes as long as that of PyTorch's compiler, which it loads.
    kind = type(mask)
    return kind.__name__ == "CausalBias" and kind.__module__ == "torch.nn.attention.bias"


def with_positive_scale(query, scale):
    """The same scores from a positive scale, without rounding: kernels take a row's maximum before they scale it."""
    if scale < 0:
        return -query, -scale
    return (query * 0.0, 1.0) if scale == 0 else (query, scale)


def _on_a_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    if isinstance(attn_mask, torch.Tensor) and not attn_mask.is_cpu:
        # PyTorch reads memory that a mask on the meta device does not have.
        raise RuntimeError(
            f"attention: attn_mask is on {attn_mask.device}; it needs the query's device, {query.device}"
        )
    if attn_mask is not None and _flash_may_lose_a_row(query, key, value, attn_mask):
        attention = torch.ops.aten._scaled_dot_product_attention_math
        return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
    return PYTORCHS_OWN(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _flash_may_lose_a_row(query, key, value, mask) -> bool:
    """Whether there may be a gradient to compute, and a row whose log-sum-exp the mask may make large."""
    if not isinstance(mask, torch.Tensor) or not mask.is_floating_point():
        return False
    if not torch.is_grad_enabled() and not _is_kept():
        return False
    if is_causal_bias(mask) or mask.dtype not in (torch.float32, query.dtype):
        return False  # It is is_causal, or refused.
    needed = query.requires_grad or key.requires_grad or value.requires_grad
    if torch.compiler.is_compiling():
        # torch.compile guards what needs a gradient, unlike the other ways to trace.
        return needed or torch.compiler.is_exporting()
    return not tracing.has_values(mask) or (needed and _has_a_large_row(mask.detach()))


def _is_kept() -> bool:
    """Whether a graph is made that may be run for gradients though none is asked for now.

    Each of torch.jit.trace's is checked against one that is made under no_grad, too.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return tracing.in_jit_trace() or tracing.in_dispatch_mode()


def _has_a_large_row(mask) -> bool:
    if mask.numel() == 0:
        return False
    # Of what was expanded one copy says all, and is all that need be read.
    mask = mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())]
    largest = mask.amax(-1)
    low, high = (bound.item() for bound in largest.aminmax())
    if low == -math.inf:
        # A row of -inf alone gives zeros, and zero gradients, in any kernel.
        low, high = (bound.item() for bound in largest.masked_fill(largest == -math.inf, 0.0).aminmax())
    return not (low >= -_LARGEST_LSE and high <= _LARGEST_LSE)
