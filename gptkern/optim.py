"""Twins of torch.optim: `gptkern.optim.AdamW` in place of `torch.optim.AdamW`."""

from gptkern.operators.adamw.optimizer import AdamW

__all__ = ["AdamW"]
