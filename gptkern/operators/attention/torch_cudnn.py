"""attention on PyTorch: cuDNN's kernels asked for first.

PyTorch asks cuDNN first on Hopper and Blackwell by itself where it trusts the cuDNN that it was built with; which one
that is changes from release to release. This variant is that choice made the same everywhere: cuDNN from 9.15.1 on
(older ones are wrong for lengths that are no multiple of 128: issue 169849 of pytorch/pytorch), then PyTorch's other
kernels, of those that are switched on. It is the same function in any case, with PyTorch's autograd, so there are no
launchers here.
"""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch
from gptkern.operators.attention.contract import Call

# Hopper is the first for which cuDNN's kernels are other ones than flash's.
OLDEST_GPU = (9, 0)
OLDEST_CUDNN = 91501
_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD_DIM, _HEAD_DIM_STEP = 128, 8
# PyTorch's order is the process's: two threads that set it and put it back would leave either one's behind.
_order = threading.Lock()
# Holds something once PyTorch has chosen its own order.
_settled: list[bool] = []


def unavailable(device: torch.device) -> str | None:
    """Why cuDNN's kernels are no choice on a device, or None."""
    if device.type != "cuda":
        return f"cuDNN is for NVIDIA GPUs and the input is on {device.type}"
    if not torch.backends.cudnn.is_available() or not torch.backends.cuda.cudnn_sdp_enabled():
        return "this PyTorch has no cuDNN, or its attention is switched off"
    version = torch.backends.cudnn.version() or 0
    if version < OLDEST_CUDNN:
        return f"cuDNN is version {version}; its attention is right from {OLDEST_CUDNN} on"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        found = ".".join(map(str, capability))
        return f"cuDNN's attention is of use from compute capability 9.0 on, and this GPU has {found}"
    return None


def unsupported(call: Call) -> str | None:
    """What cuDNN has no kernel for, or PyTorch does not give it: there another one would run than this says."""
    query, key, value = call[:3]
    if query.dtype not in _DTYPES:
        return f"the dtype is {query.dtype}; cuDNN's attention needs float16 or bfloat16"
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"query has {query.dim()} dimensions; cuDNN's attention needs 4"
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return f"batch sizes are {query.shape[0]}, {key.shape[0]} and {value.shape[0]}; cuDNN's attention needs one"
    head_dims = query.shape[-1], value.shape[-1]
    if max(head_dims) > _LARGEST_HEAD_DIM or any(size % _HEAD_DIM_STEP for size in head_dims):
        needs = f"a multiple of {_HEAD_DIM_STEP} up to {_LARGEST_HEAD_DIM}"
        return f"head_dim is {head_dims[0]}; cuDNN's attention needs {needs}"
    if 0 in query.shape or 0 in key.shape or key.shape[2] == 1:
        return f"the lengths are {query.shape[2]} and {key.shape[2]}; cuDNN's attention needs two keys or more"
    if call.attn_mask is not None or call.lower_right:
        return "attn_mask is given: a query without any key would give NaN"
    if call.dropout_p > 0:
        return f"dropout_p is {call.dropout_p}; PyTorch gives cuDNN few of these"
    if call.scale <= 0:
        return f"scale is {call.scale}; cuDNN's attention is asked for positive ones alone"
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, and cuDNN's backward is none"
    return None


def attention(query, key, value, is_causal, scale, enable_gqa):
    """F.scaled_dot_product_attention with cuDNN first."""
    call = dict(is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.compiler.is_compiling():
        # Once, when it is traced: there is no lock to take in a graph.
        return _with_cudnn_first(query, key, value, call)
    if not _settled:
        # PyTorch makes up its mind at its first call: what is put back later has to be that, and not what was before.
        with torch.no_grad():
            F.scaled_dot_product_attention(*(tensor[:1, :1, :8] for tensor in (query, key, value)))
        _settled.append(True)
    if torch._C._get_sdp_priority_order()[0] == int(torch._C._SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, **call)
    with _order:
        before = torch._C._get_sdp_priority_order()
        try:
            return _with_cudnn_first(query, key, value, call)
        finally:
            # sdpa_kernel puts what is switched off last.
            torch._C._set_sdp_priority_order(before)


def _with_cudnn_first(query, key, value, call):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
    # What the user has switched off stays off.
    order = [SDPBackend.CUDNN_ATTENTION, *(other for other, is_on in zip(others, _switched_on()) if is_on)]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(query, key, value, **call)


# These cannot be traced.
@dispatch.constant_while_compiling
def _switched_on() -> tuple[bool, bool, bool]:
    """Whether flash, efficient and math attention are."""
    switches = torch.backends.cuda
    return switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled(), switches.math_sdp_enabled()
