"""Hugging Face transformers: quantised models through save_pretrained and from_pretrained.

    gptkern.quantize(model)
    model.save_pretrained(folder)

    import gptkern.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(folder)

transformers keeps quantisation methods in a list by name; importing this module adds "gptkern" to it, as its
documentation tells to, and changes nothing else. `quantize` and `load_quantized` give each model of transformers that
holds int8 layers a `hf_quantizer`, which save_pretrained asks: it writes the layers' names into config.json, and
from_pretrained makes them int8 before it reads the weights.

Where the name is not known, transformers goes on with a warning, and would leave the layers with random weights. So the
file has a tensor of one element under each layer's `weight`: a float layer does not take it, and that is an error. The
layers put it there themselves, in models too of which `quantize` has seen a part alone.
"""

from __future__ import annotations

import re

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gptkern.nn import Int8Linear
from gptkern.quantizing.choosing import looks_linear
from gptkern.quantizing.layers import places, put_empty
from gptkern.quantizing.refusing import look_first

METHOD = "gptkern"


def let_save(model: torch.nn.Module) -> None:
    """Each model of transformers in the model that holds int8 layers can be saved with them."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or getattr(module, "hf_quantizer", None) is not None:
            continue
        if any(isinstance(inner, Int8Linear) for inner in module.modules()):
            module.hf_quantizer = Int8Quantizer(Int8Config())


def other_method(model: torch.nn.Module) -> str | None:
    """The method by which transformers has quantised the model, or a part of it, already."""
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None) if isinstance(module, PreTrainedModel) else None
        if quantizer is not None and not isinstance(quantizer, Int8Quantizer):
            method = quantizer.quantization_config.quant_method
            return getattr(method, "value", method)
    return None


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """`quantization_config` in config.json.

    Attributes:
        layers: name of each int8 layer -> its "mode" and "activation", as gptkern.nn.Int8Linear takes them.
    """

    def __init__(self, layers: dict[str, dict] | None = None, **_):
        self.quant_method = METHOD
        self.layers = layers or {}
        # For people: nothing reads it.
        self.needs = "import gptkern.integrations.transformers"


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What save_pretrained and from_pretrained ask about a model with int8 layers."""

    # quantization_config= for a float model is an error: gptkern.quantize is what makes it int8.
    requires_calibration = True

    # --- save_pretrained ----------------------------------------------------------------------------------------------

    def is_serializable(self, *arguments, **options) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *arguments, **options) -> tuple[dict, dict]:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
        # Now, not when it was quantised: until it is saved the config may be another model's too.
        self.quantization_config = Int8Config(
            {name: {"mode": layer.mode, "activation": layer.activation} for name, layer in layers.items()}
        )
        model.config.quantization_config = self.quantization_config
        return model.state_dict(), {}

    # --- from_pretrained ----------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **options
    ) -> None:
        if _is_float(checkpoint_files):
            return
        # The layers' names are those of the model that was saved: with the head, or the part below it alone.
        prefix = f"{model.base_model_prefix}."
        layers = {
            spelling: options
            for name, options in self.quantization_config.layers.items()
            for spelling in (name, prefix + name, name.removeprefix(prefix))
        }
        for held in places(model):
            chosen = next((layers[place.name] for place in held if place.name in layers), None)
            if chosen is not None and looks_linear(held[0].module()):
                put_empty(held, **chosen)
        expected = rf"({'|'.join(map(re.escape, layers))})\.weight$"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), expected}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **options) -> PreTrainedModel:
        absent = [
            f"{name}.{key}"
            for name, layer in model.named_modules()
            if isinstance(layer, Int8Linear)
            for key, tensor in layer.named_buffers()
            # transformers' mark of what it has read; what it leaves on the disk is on the meta device.
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if absent:
            raise ValueError(
                f"from_pretrained: the checkpoint has no {', '.join(absent)}; config.json says that gptkern quantised "
                "these layers. Float weights need a config.json without quantization_config"
            )
        # A cast leaves int8 layers alone, and biases and norms may be trained: transformers need not forbid either.
        model.is_quantized = False
        look_first(model)
        let_save(model)
        return model

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _is_float(checkpoint_files: list[str] | None) -> bool:
    """Whether the files hold a float model: saved beside a quantised one, that had the same config object."""
    if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
        return False
    from safetensors import safe_open

    for file in checkpoint_files:
        with safe_open(file, "pt") as opened:
            if any(key.endswith(".int8_weight") for key in opened.keys()):  # noqa: SIM118, it is no dict
                return False
    return True
