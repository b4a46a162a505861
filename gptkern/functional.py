"""Twins of torch.nn.functional: `import gptkern.functional as F` in place of `import torch.nn.functional as F`.

A twin takes every argument that PyTorch's takes, with the same meaning; its extensions are keyword-only.
"""

from gptkern.ops.attention import scaled_dot_product_attention
from gptkern.ops.int8_linear import int8_linear, quantize_int8
from gptkern.ops.layer_norm import layer_norm
from gptkern.ops.rms_norm import rms_norm
from gptkern.ops.rotary import rotary_embedding
from gptkern.ops.softmax import softmax

__all__ = [
    "int8_linear",
    "layer_norm",
    "quantize_int8",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "softmax",
]
