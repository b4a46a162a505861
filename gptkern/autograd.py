"""The autograd.Functions, one an operator. Their arguments are trusted; the operators of gptkern.functional check."""

from gptkern.ops.layer_norm import LayerNormFunction

__all__ = ["LayerNormFunction"]
