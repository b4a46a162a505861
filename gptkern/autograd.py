"""The autograd.Functions, one an operator. Their arguments are trusted; the operators of gptkern.functional check."""

from gptkern.ops.attention import AttentionFunction
from gptkern.ops.int8_linear import Int8LinearFunction
from gptkern.ops.layer_norm import LayerNormFunction
from gptkern.ops.rms_norm import RMSNormFunction
from gptkern.ops.rotary import RotaryFunction
from gptkern.ops.softmax import SoftmaxFunction

__all__ = [
    "AttentionFunction",
    "Int8LinearFunction",
    "LayerNormFunction",
    "RMSNormFunction",
    "RotaryFunction",
    "SoftmaxFunction",
]
