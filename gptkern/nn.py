"""Twins of torch.nn modules.

Each is a stateless subclass of the module that it replaces: same parameters, buffers, hooks, state_dict keys and
constructor; only `forward` differs. So `gptkern.swap` sets a module's class, and `gptkern.unswap` sets it back.
"""

from __future__ import annotations

import torch

from gptkern import functional as F


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on gptkern.functional.layer_norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on gptkern.functional.softmax."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)
