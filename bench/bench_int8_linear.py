"""int8_linear against F.linear in the input's dtype and torch._int_mm; quantize_int8 against PyTorch's operators."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F

import gptkern.functional as G

# (rows, in_features, out_features): decoding one and sixteen sequences, then prompts and training.
if harness.DEVICE == "cuda":
    SHAPES = [(1, 4096, 4096), (16, 4096, 16384), (64, 4096, 16384), (4096, 768, 3072), (8192, 4096, 16384)]
    DTYPE = torch.bfloat16
else:
    SHAPES = [(1, 768, 3072), (16, 768, 3072), (256, 768, 3072)]
    DTYPE = torch.float32
# torch._int_mm has only products of int8 with int8; F.linear holds the weight in the input's dtype.
MODES_AND_PEERS = [("w8a16", "F.linear"), ("w8a8", "F.linear"), ("w8a8", "torch._int_mm")]
# On a GPU torch._int_mm needs more rows than this.
INT_MM_ROWS = 16


def make_inputs(rows, in_features, out_features):
    """(input, weight in the input's dtype, int8 weight, its scales, bias)."""
    input = torch.randn(rows, in_features, device=harness.DEVICE, dtype=DTYPE)
    weight = torch.randn(out_features, in_features, device=harness.DEVICE) * in_features**-0.5
    bias = torch.randn(out_features, device=harness.DEVICE, dtype=DTYPE)
    return input, weight.to(DTYPE), *G.quantize_int8(weight), bias


def linear(input, weight, int8_weight, weight_scale, bias):
    return F.linear(input, weight, bias)


def int_mm(input, weight, int8_weight, weight_scale, bias):
    """w8a8 of PyTorch's own operators, each of which reads and writes memory."""
    q, input_scale = quantized_eager(input)
    product = torch._int_mm(q, int8_weight.t())
    return (product * input_scale * weight_scale + bias).to(input.dtype)


def quantized_eager(input):
    scale = input.float().abs().amax(-1, keepdim=True) / 127
    return torch.round(input / scale).clamp(-127, 127).to(torch.int8), scale


def in_precision(precision, mode, input, int8_weight, weight_scale, bias):
    if mode == "w8a8":
        q, input_scale = G.quantize_int8(input)
        # Whole numbers below 2^53: exact.
        product = (q.double() @ int8_weight.double().t()).to(precision) * input_scale.to(precision)[:, None]
    else:
        product = input.to(precision) @ int8_weight.to(precision).t()
    return product * weight_scale.to(precision) + bias.to(precision)


@pytest.mark.parametrize(("mode", "peer"), MODES_AND_PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_int8_linear(benchmark, shape, mode, peer):
    rows, in_features, out_features = shape
    if peer == "torch._int_mm" and harness.DEVICE == "cuda" and rows <= INT_MM_ROWS:
        pytest.skip(f"torch._int_mm needs more than {INT_MM_ROWS} rows on a GPU")

    def ours(input, weight, int8_weight, weight_scale, bias):
        return G.int8_linear(input, int8_weight, weight_scale, bias, mode=mode)

    bytes_of_weight = in_features * out_features
    inputs = harness.sets_of_inputs(lambda: make_inputs(*shape), bytes_of_weight)
    comparison = harness.Comparison(f"int8_linear {mode}", f"{'x'.join(map(str, shape))} {str(DTYPE)[6:]}", peer)
    input, _, *quantized = inputs[0]
    reference, yardstick = (
        in_precision(precision, mode, input, *quantized) for precision in (torch.float64, torch.float32)
    )
    comparison.check(ours(*inputs[0]), reference, yardstick)
    # Reads the weight and the input, writes the output.
    bytes_moved = bytes_of_weight + rows * (in_features + out_features) * DTYPE.itemsize
    theirs = linear if peer == "F.linear" else int_mm
    comparison.time(benchmark, ours, theirs, inputs, bytes_moved, 2 * rows * in_features * out_features)


@pytest.mark.parametrize("shape", sorted({(rows, in_features) for rows, in_features, _ in SHAPES}), ids=str)
def test_quantize_int8(benchmark, shape):
    rows, width = shape
    inputs = harness.sets_of_inputs(
        lambda: (torch.randn(rows, width, device=harness.DEVICE, dtype=DTYPE),), rows * width * DTYPE.itemsize
    )
    comparison = harness.Comparison("quantize_int8", f"{rows}x{width} {str(DTYPE)[6:]}", "eager")
    q, scale = G.quantize_int8(*inputs[0])
    reference = inputs[0][0].double()
    # The yardstick is the quantisation itself, in PyTorch's own operators: the result may err by half a step.
    eager_q, eager_scale = quantized_eager(*inputs[0])
    comparison.check(q * scale[:, None], reference, eager_q * eager_scale)
    # Reads the input, writes a byte for each element.
    comparison.time(benchmark, G.quantize_int8, quantized_eager, inputs, rows * width * (DTYPE.itemsize + 1))
