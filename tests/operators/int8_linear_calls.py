"""How the tests call int8_linear: tensors, and a call that is judged against the oracle."""

from __future__ import annotations

import oracle_int8_linear
import oracle_quantize_int8
import torch
from checking import check
from hypothesis import HealthCheck, Phase, settings
from layouts import guarded

from gptkern import functional as F
from gptkern.autograd import Int8LinearFunction

KERNEL_DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MODES = ["w8a16", "w8a8"]
ACTIVATIONS = [None, "gelu", "gelu_tanh"]

# At most this many rows take w8a16 in mode "auto".
FEW_ROWS = 16

# The fixtures are the same for every example; and to shrink a failing one, interpreted, takes minutes.
PROPERTY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],
)


def weight_of(out_features, in_features, device):
    """(weight, weight_scale): every int8 value, scales that make the product about as large as the input."""
    weight = torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8, device=device)
    weight_scale = (torch.rand(out_features, device=device) + 0.5) / (64 * max(in_features, 1) ** 0.5)
    return guarded(weight), guarded(weight_scale)


def tensors_of(rows, in_features, out_features, dtype, device, bias_dtype=None):
    """(input, weight, weight_scale, bias)."""
    input = guarded(torch.randn(rows, in_features, device=device).to(dtype))
    bias = guarded(torch.randn(out_features, device=device).to(bias_dtype or dtype))
    return input, *weight_of(out_features, in_features, device), bias


def function_on(backend):
    """The autograd.Function itself, with the signature of the twin."""

    def call(input, weight, weight_scale, bias=None, *, activation=None, mode):
        return Int8LinearFunction.apply(input, weight, weight_scale, bias, activation, mode, backend)

    return call


def judge(input, weight, weight_scale, bias, *, activation=None, mode, call=F.int8_linear, **how):
    """Runs the call forward and backward and judges the result and the gradients of input and bias."""
    rows = input.numel() // max(input.shape[-1], 1)
    runs_as = mode if mode != "auto" else ("w8a16" if rows <= FEW_ROWS else "w8a8")
    quantized = oracle_quantize_int8.quantize_int8(input) if runs_as == "w8a8" and rows else None

    def oracle(input, bias=None, *, precision):
        return oracle_int8_linear.int8_linear(
            input, weight, weight_scale, bias, activation, quantized=quantized, precision=precision
        )

    def twin(input, bias=None):
        return call(input, weight, weight_scale, bias, activation=activation, mode=mode)

    output = check(twin, oracle, *((input,) if bias is None else (input, bias)), **how)
    assert output.dtype == input.dtype
    assert output.device == input.device
    return output
