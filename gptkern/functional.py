"""Twins of torch.nn.functional: `import gptkern.functional as F` in place of `import torch.nn.functional as F`.

A twin takes every argument that PyTorch's takes, with the same meaning; its extensions are keyword-only.
"""

from gptkern.operators.attention.contract import scaled_dot_product_attention
from gptkern.operators.cross_entropy.contract import cross_entropy
from gptkern.operators.distillation_loss.contract import distillation_loss
from gptkern.operators.int8_linear.contract import int8_linear
from gptkern.operators.layer_norm.contract import layer_norm
from gptkern.operators.linear_cross_entropy.contract import linear_cross_entropy
from gptkern.operators.linear_distillation_loss.contract import linear_distillation_loss
from gptkern.operators.nonlinearity.contract import geglu, gelu, linear, silu, swiglu
from gptkern.operators.quantize_int8.contract import quantize_int8
from gptkern.operators.rms_norm.contract import rms_norm
from gptkern.operators.rotary.contract import rotary_embedding
from gptkern.operators.softmax.contract import softmax

__all__ = [
    "cross_entropy",
    "distillation_loss",
    "geglu",
    "gelu",
    "int8_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "quantize_int8",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
]
