"""attention on PyTorch: cuDNN's kernels asked for first.

PyTorch's own order puts flash before cuDNN; on Hopper and Blackwell cuDNN's kernels use what flash, which is built for
Ampere's instructions, does not. What cuDNN refuses goes to PyTorch's other kernels, in its order: the same function in
any case, with PyTorch's autograd, so there are no launchers here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern.operators.attention.contract import Call

# Hopper is the first for which cuDNN's kernels are other ones than flash's.
OLDEST = (9, 0)
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD_DIM, _HEAD_DIM_STEP = 128, 8


def unavailable(device: torch.device) -> str | None:
    """Why cuDNN's kernels are no choice on a device, or None."""
    if device.type != "cuda":
        return f"cuDNN is for NVIDIA GPUs and the input is on {device.type}"
    if not torch.backends.cudnn.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return "this PyTorch has no cuDNN, or its attention is switched off"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return (
            f"cuDNN's attention is of use from compute capability 9.0 on; this GPU has {'.'.join(map(str, capability))}"
        )
    return None


def unsupported(call: Call) -> str | None:
    """What cuDNN has no kernel for: there PyTorch would choose another one, which it does by itself."""
    query, key, value = call[:3]
    if query.dtype not in _DTYPES:
        return f"the dtype is {query.dtype}; cuDNN's attention needs float16 or bfloat16"
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"query has {query.dim()} dimensions; cuDNN's attention needs 4"
    head_dims = query.shape[-1], value.shape[-1]
    if max(head_dims) > _LARGEST_HEAD_DIM or any(size % _HEAD_DIM_STEP for size in head_dims):
        needs = f"a multiple of {_HEAD_DIM_STEP} up to {_LARGEST_HEAD_DIM}"
        return f"head_dim is {head_dims[0]}; cuDNN's attention needs {needs}"
    if 0 in query.shape or 0 in key.shape:
        return "a size is 0"
    if call.attn_mask is not None or call.lower_right:
        return "attn_mask is given: a query without any key would give NaN"
    return None


def attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
    """F.scaled_dot_product_attention with cuDNN first."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ]  # fmt: skip
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
