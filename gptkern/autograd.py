"""The autograd.Functions, one an operator. Their arguments are trusted; the operators of gptkern.functional check."""

from gptkern.operators.attention.contract import AttentionFunction
from gptkern.operators.cross_entropy.contract import CrossEntropyFunction
from gptkern.operators.distillation_loss.contract import DistillationLossFunction
from gptkern.operators.int8_linear.contract import Int8LinearFunction
from gptkern.operators.layer_norm.contract import LayerNormFunction
from gptkern.operators.linear_cross_entropy.contract import LinearCrossEntropyFunction
from gptkern.operators.linear_distillation_loss.contract import LinearDistillationLossFunction
from gptkern.operators.nonlinearity.contract import ActivationFunction
from gptkern.operators.rms_norm.contract import RMSNormFunction
from gptkern.operators.rotary.contract import RotaryFunction
from gptkern.operators.softmax.contract import SoftmaxFunction

__all__ = [
    "ActivationFunction",
    "AttentionFunction",
    "CrossEntropyFunction",
    "DistillationLossFunction",
    "Int8LinearFunction",
    "LayerNormFunction",
    "LinearCrossEntropyFunction",
    "LinearDistillationLossFunction",
    "RMSNormFunction",
    "RotaryFunction",
    "SoftmaxFunction",
]
