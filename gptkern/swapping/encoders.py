"""torch.nn's encoders and MultiheadAttention: what their fast path gives beside speed.

In eval mode these leave Python, and so their own submodules, for one fused operator. A swapped one does not: it is told
that there is no fast path (gptkern.swapping.twins). Two things hang on it:

- Nested tensors are taken on it alone. They go the stock way, as do the stock errors.
- TransformerEncoder drops padded positions at its beginning, and puts zeros in their places before its last norm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gptkern.swapping.rerouting import with_own_code


def with_fast_path(cls: type, rerouted: Callable) -> Callable:
    """A forward for a class of twins.ROUTED_MODULES.

    Args:
        rerouted: the class's forward, which never takes the fast path.
    """
    if cls is torch.nn.TransformerEncoder:
        rerouted = _padding_with_zeros(rerouted)

    @with_own_code
    def forward(self, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_nested:
                return cls.forward(self, *args, **kwargs)
        return rerouted(self, *args, **kwargs)

    return forward


def _padding_with_zeros(rerouted: Callable) -> Callable:
    @with_own_code
    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        if src_key_padding_mask is None or not _drops_padding(self, src, mask):
            return rerouted(self, src, mask, src_key_padding_mask, is_causal)
        output = src  # (batch, length, width)
        for layer in self.layers:
            # Without a mask is_causal says nothing on the fast path, and is an error on the other.
            output = layer(output, src_mask=None, is_causal=False, src_key_padding_mask=src_key_padding_mask)
        padded = src_key_padding_mask.bool()  # (batch, length); True, or -inf, is padding
        if getattr(self, "mask_check", True):
            # Only padding at the end is dropped. Where it stands, the device finds out: the host does not wait for it.
            padded = padded & (padded[:, :-1] <= padded[:, 1:]).all()
        output = output.masked_fill(padded.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    return forward


def _drops_padding(encoder: torch.nn.TransformerEncoder, src: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the stock encoder drops the padding, as far as its values do not decide it."""
    layer = encoder.layers[0]
    if (
        mask is not None
        or src.dim() != 3
        or layer.training
        or not getattr(encoder, "use_nested_tensor", False)
        or not torch.backends.mha.get_fastpath_enabled()
        or torch.is_autocast_enabled()
        or (torch.compiler.is_compiling() and getattr(encoder, "mask_check", True))
    ):
        return False
    if torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in layer.parameters())):
        return False
    return not torch.overrides.has_torch_function((src, layer.linear1.weight))
