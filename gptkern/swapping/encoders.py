"""torch.nn's encoders and MultiheadAttention: what their fast path gives beside speed.

In eval mode these leave Python, and so their own submodules, for one fused operator. A swapped one does not: it is told
that there is no fast path (gptkern.swapping.twins). Three things hang on it:

- Nested tensors are taken on it alone. They go the stock way, as do the stock errors.
- TransformerEncoder drops padded positions at its beginning, and puts zeros in their places before its last norm.
- It ignores is_causal, which without a mask is an error on the other path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gptkern.swapping.rerouting import Rerouted, with_own_code
from gptkern.swapping.twins import Replacement

# Where forward takes its mask and is_causal, beside by their names. TransformerEncoder hands them on.
_MASKS = {torch.nn.TransformerEncoderLayer: ("src_mask", 1), torch.nn.MultiheadAttention: ("attn_mask", 5)}
_HINTS = {torch.nn.TransformerEncoderLayer: 3, torch.nn.MultiheadAttention: 7}


def with_fast_path(cls: type, rerouted: Callable, find: Callable) -> Callable:
    """A forward for a class of twins.ROUTED_MODULES; `rerouted` where the class has no fast path.

    Args:
        rerouted: the class's forward, which never takes the fast path.
        find: what it was rerouted with.
    """
    if cls is torch.nn.CrossEntropyLoss:
        return rerouted
    if cls is torch.nn.TransformerEncoder:
        rerouted = _padding_with_zeros(rerouted)
    else:
        rerouted = _ignoring_the_hint(cls, rerouted, find)

    @with_own_code
    def forward(self, *args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_nested:
                return cls.forward(self, *args, **kwargs)
        return rerouted(self, *args, **kwargs)

    return forward


def _ignoring_the_hint(cls: type, rerouted: Callable, find: Callable) -> Callable:
    """The forward which, without a mask, ignores is_causal where the stock one takes the fast path."""
    (mask_name, mask_place), hint_place = _MASKS[cls], _HINTS[cls]

    def find_fast_path(function: Callable):
        if function is torch.backends.mha.get_fastpath_enabled:
            return None
        if function is torch._transformer_encoder_layer_fwd or function is torch._native_multi_head_attention:
            return Replacement("", _nothing)
        return find(function)

    # The stock decision, and None in place of what it then returns.
    none_on_fast_path = Rerouted(cls, find_fast_path).methods["forward"]

    @with_own_code
    def forward(self, *args, **kwargs):
        if not (kwargs.get("is_causal") or (len(args) > hint_place and args[hint_place])):
            return rerouted(self, *args, **kwargs)
        mask = args[mask_place] if len(args) > mask_place else kwargs.get(mask_name)
        if mask is not None:
            return rerouted(self, *args, **kwargs)
        result = none_on_fast_path(self, *args, **kwargs)
        if result is not None:
            return result
        if "is_causal" in kwargs:
            return rerouted(self, *args, **{**kwargs, "is_causal": False})
        return rerouted(self, *args[:hint_place], False, *args[hint_place + 1 :], **kwargs)

    return forward


def _nothing(*args) -> None:
    return None


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
