"""quantize(model): int8 linear layers in a model that was trained without them.

    weight_scale = max|row| / 127        int8_weight = round(row / weight_scale)        a row holds one output's weights

torch.nn.Linear and transformers' Conv1D become gptkern.nn.Int8Linear, in place in the modules that hold them, one after
another: the float weight of a layer is let go before the next layer is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch

from gptkern import functional as F
from gptkern.backends.dispatch import explain
from gptkern.nn import Int8Linear, check_options
from gptkern.quantizing import layers
from gptkern.quantizing.choosing import ends_with, planned
from gptkern.quantizing.layers import Place, is_conv1d, places, take_over
from gptkern.quantizing.refusing import look_first
from gptkern.quantizing.report import Quantized, QuantizeReport, Skipped, size_in_bytes

_logger = logging.getLogger("gptkern")

# Skipped where it is there, and no error where it is not, unless a caller names it: the output layer's errors reach the
# logits unaveraged, and its weight is most often the embedding's.
DEFAULT_SKIP = ("lm_head",)


def quantize(
    model: torch.nn.Module,
    mode: str = "auto",
    skip: Iterable[str] = DEFAULT_SKIP,
    filter: Callable[[str, torch.nn.Module], bool] | None = None,
) -> QuantizeReport:
    """Make a model's linear layers int8, in place.

    Replaced are modules of exactly the type torch.nn.Linear, or Conv1D of transformers, by gptkern.nn.Int8Linear
    with the same bias, hooks, training flag and attributes. Left alone, and named in the report, are layers whose
    weight is not a plain tensor that they alone hold: tied, parametrised, pruned, normalised, sharded, not finite, too
    large or too small for scales of float32; and those whose weight a module's forward reads itself
    (`x @ self.fc.weight.t()`, `x.to(self.mlp[0].weight.dtype)`), as far as its code tells: of `self.mlp[0]` all of
    `mlp`; not where it hands the layer to a function that reads the weight. Name such a layer in `skip`.
    Before or after `gptkern.swap` is the same; `gptkern.unswap` leaves int8 layers in place.

    In a state_dict an int8 layer has `int8_weight` and `weight_scale` in the place of `weight`. load_state_dict of the
    model, or of a part of it, refuses float weights for an int8 layer before anything is changed, with strict=False
    too. A model of transformers is saved by its save_pretrained and loaded by from_pretrained, after
    `import gptkern.integrations.transformers`; any other by safetensors and `load_quantized`.

    A float weight is freed before the next layer is quantised, if nobody else holds it (an optimizer would). On the
    meta device the layers become int8 and hold nothing: `load_quantized` fills them.

    Args:
        model: any module that holds linear layers.
        mode: "w8a8", "w8a16" or "auto", as for gptkern.functional.int8_linear.
        skip: modules that are left alone with all that they hold: by name ("blocks.0.attention") or the end of one
            ("lm_head", "attention.project").
        filter: called with each layer's name and module; the layer is left alone where it returns False.

    Returns:
        The report: each layer's bytes before and after, the error of its weight, what was left alone and why.

    Raises:
        TypeError: model is no module, or is itself a linear layer, which can only be replaced where something holds it;
            skip is a string or holds something else than strings; filter cannot be called.
        ValueError: unknown mode, skip names no module of the model, or transformers has quantised it already
            (`quantization_config`).
        gptkern.BackendError: a backend is forced and cannot quantise one of the layers.

    All of these are raised before anything is changed. An error later (out of memory, say) leaves every layer whole:
    those before it are int8, the others as they were, and another call goes on from there.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}; it needs a torch.nn.Module")
    if isinstance(model, torch.nn.Linear) or is_conv1d(model):
        raise TypeError(
            f"quantize: model is itself a {type(model).__name__}; it needs a module that holds linear layers. "
            "gptkern.nn.Int8Linear.from_linear gives the int8 layer of a single one"
        )
    check_options("quantize", None, mode)
    if filter is not None and not callable(filter):
        raise TypeError(
            f"quantize: filter is a {type(filter).__name__}; it needs a function of (name, module), or None"
        )
    held_in = places(model)
    skip = _checked_skip(skip, [place.name for held in held_in for place in held])
    chosen, skipped = planned(model, held_in, skip, filter)
    transformers = layers.transformers()
    if method := transformers and transformers.other_method(model):
        raise ValueError(
            f"quantize: transformers has quantised the model by {method!r}; it needs one that was loaded in floating "
            "point, as save_pretrained could write layers of one kind alone"
        )
    for held in chosen:
        explain(F.quantize_int8, held[0].module().weight)

    bytes_before = size_in_bytes(model)
    quantized = []
    try:
        for held in chosen:
            try:
                quantized.append(_quantize_in_place(held, mode))
            except _NoScaleError as reason:
                skipped.append(Skipped(held[0].name, _class_name(held[0]), str(reason)))
    finally:
        look_first(model)
        if transformers:
            transformers.let_save(model)
    report = QuantizeReport(quantized, skipped, bytes_before, size_in_bytes(model))
    _logger.info("quantize: %s", report)
    return report


def _checked_skip(skip: Iterable[str], names: list[str]) -> tuple[str, ...]:
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"quantize: skip is {skip!r}; it needs a list of modules' names, as ['lm_head']")
    if skip is DEFAULT_SKIP:
        return skip
    skip = tuple(skip)
    for entry in skip:
        if not isinstance(entry, str):
            raise TypeError(f"quantize: skip holds a {type(entry).__name__}; it needs modules' names, as ['lm_head']")
        if not any(ends_with(name, entry) for name in names):
            raise ValueError(
                f"quantize: skip holds {entry!r}, which is no module of the model; it needs a module's name, or the "
                "end of one, as in model.named_modules()"
            )
    return skip


class _NoScaleError(Exception):
    """Why float32 scales do not hold a weight."""


def _class_name(place: Place) -> str:
    return type(place.module()).__name__


@torch.no_grad()
def _quantize_in_place(held: list[Place], mode: str) -> Quantized:
    module = held[0].module()
    layer = Int8Linear.from_linear(module, mode=mode)
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.t()
    error = None
    if not weight.is_meta:
        _check_scales(weight, layer)
        error = _error(weight, layer.int8_weight, layer.weight_scale)
    take_over(module, layer)
    for place in held:
        place.put(layer)
    return Quantized(
        held[0].name,
        type(module).__name__,
        tuple(layer.int8_weight.shape),
        size_in_bytes(module),
        size_in_bytes(layer),
        error,
    )


def _check_scales(weight: torch.Tensor, layer: Int8Linear) -> None:
    if not layer.weight_scale.isfinite().all():
        if weight.isfinite().all():
            # Of float64 alone.
            raise _NoScaleError(f"its weight goes up to {weight.abs().max().item():.2g}, past a scale of float32")
        raise _NoScaleError("its weight holds a NaN or an infinity")
    if not layer.int8_weight.any() and weight.any():
        raise _NoScaleError(f"its weight goes up to {weight.abs().max().item():.2g}, below a scale of float32")


def _error(weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> float:
    """|weight - q * scale| / |weight|; weight and q (out_features, in_features), scale (out_features,)"""
    weight = weight if weight.dtype == torch.float64 else weight.float()
    norm = weight.norm().item()
    return torch.addcmul(weight, q, scale.unsqueeze(1), value=-1).norm().item() / norm if norm else 0.0
