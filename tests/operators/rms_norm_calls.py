"""How the tests call rms_norm: tensors, and a call that is judged against the oracle."""

from __future__ import annotations

import oracle_rms_norm
import torch
from checking import check as check_against
from layouts import guarded

from gptkern import functional as F

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SIXTEEN_BITS = [torch.float16, torch.bfloat16]


def tensors_of(rows, width, dtype, device, *, weight=True, parameter=None):
    """(input, weight), None where it is not wanted, with memory around them that is NaN."""
    input = guarded(torch.randn(rows, width, device=device).add(0.5).to(dtype))
    if not weight:
        return input, None
    return input, guarded(torch.randn(width, device=device).add(1.0).to(parameter or dtype))


def default_eps(dtype):
    """What None stands for: of 16-bit input too, PyTorch computes in float32."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def check(tensors, *, normalized_shape=None, eps=1e-5, grad=None, need=(True, True), call=None):
    """Runs the call forward and backward and judges the result and every gradient."""
    input = tensors[0]
    shape = normalized_shape or (input.shape[-1],)

    def ours(input, weight=None):
        if call is not None:
            return call(input, weight, eps)
        return F.rms_norm(input, shape, weight, eps)

    def oracle(input, weight=None, *, precision):
        added = default_eps(tensors[0].dtype) if eps is None else eps
        return oracle_rms_norm.rms_norm(input, shape, weight, added, precision=precision)

    present = [tensor for tensor in tensors if tensor is not None]
    output = check_against(ours, oracle, *present, grad_output=grad, need=need[: len(present)])
    assert (output.shape, output.dtype, output.device) == (input.shape, input.dtype, input.device)
    return output
