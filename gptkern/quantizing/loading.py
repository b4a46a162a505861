"""load_quantized(model, state_dict): a quantised model again, from its state_dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from gptkern.nn import Int8Linear, check_options
from gptkern.quantizing.layers import is_conv1d, places, take_over


def load_quantized(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], mode: str = "auto"
) -> torch.nn.Module:
    """Load a quantised model's state_dict into a fresh model that need not be quantised, or hold anything, yet.

        save_model(quantised_model, "model.safetensors")            # of safetensors.torch; it writes tied weights once
        with torch.device("meta"):
            model = GPT(config)                                     # no memory at all
        gptkern.load_quantized(model, load_file("model.safetensors"))

    Layers whose weight is int8 in the state_dict become gptkern.nn.Int8Linear; those that are already stay so. The
    tensors are taken as they are, not copied, with their device and dtype; weights that the model ties stay tied, and
    the state_dict needs only one of their names.

    Args:
        model: of the class and the configuration that was quantised, on any device.
        state_dict: as quantised_model.state_dict() gave it, all in one.
        mode: of the layers that become int8, as for `quantize`; a state_dict does not say it.

    Returns:
        The model.

    Raises:
        TypeError: model is no module, state_dict is no mapping, holds an int8 weight for a module that is no linear
            layer, or for an int8 layer a weight that is not int8 or scales that are not float32.
        ValueError: unknown mode, or tied weights differ in the state_dict.
        RuntimeError: names or shapes do not fit (what torch.nn.Module.load_state_dict says about it); or something
            stays on the meta device, because state_dicts leave it out.

    After an error the model is as it was.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"load_quantized: model is a {type(model).__name__}; it needs a torch.nn.Module")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_quantized: state_dict is a {type(state_dict).__name__}; it needs names and tensors, as "
            "safetensors.torch.load_file returns"
        )
    check_options("load_quantized", None, mode)
    # Nothing is written into a tensor below: these dictionaries are all that changes.
    before = [
        (d, dict(d))
        for m in model.modules()
        for d in (m._modules, m._parameters, m._buffers, m._load_state_dict_pre_hooks)
    ]
    try:
        _put_empty_layers(model, state_dict, mode)
        groups = list(_tied_names(model))
        model.load_state_dict(_with_tied_names(state_dict, groups), strict=True, assign=True)
        for names in groups:
            _tie(model, names)
        _check_dtypes(model)
        _check_filled(model, state_dict)
    except BaseException:
        for dictionary, content in before:
            dictionary.clear()
            dictionary.update(content)
        raise
    return model


def _put_empty_layers(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], mode: str) -> None:
    """Int8Linear on the meta device where the state_dict has int8 weights and the model other linear layers."""
    # A state_dict may hold more than tensors.
    names = {
        key.removesuffix(".weight") for key, value in state_dict.items() if getattr(value, "dtype", None) == torch.int8
    }
    for held in places(model):
        name, module = held[0].name, held[0].module()
        if isinstance(module, Int8Linear) or names.isdisjoint(place.name for place in held):
            continue
        if type(module) is not torch.nn.Linear and not is_conv1d(module):
            raise TypeError(
                f"load_quantized: state_dict has an int8 weight for {name}, which is a {type(module).__name__}; it "
                "needs torch.nn.Linear, or Conv1D of transformers"
            )
        out_features, in_features = module.weight.shape if type(module) is torch.nn.Linear else module.weight.t().shape
        layer = Int8Linear(in_features, out_features, module.bias is not None, mode=mode, device="meta")
        take_over(module, layer.train(module.training))
        for place in held:
            place.put(layer)


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers, shared ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tied_names(model: torch.nn.Module) -> Iterator[list[str]]:
    """The names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    return (group for group in names.values() if len(group) > 1)


def _with_tied_names(state_dict: Mapping[str, torch.Tensor], groups: list[list[str]]) -> dict[str, torch.Tensor]:
    """The state_dict with each tied tensor under all of its names; files hold it under one."""
    complete = dict(state_dict)
    for group in groups:
        present = [name for name in group if name in state_dict]
        for name in present[1:]:
            first, other = state_dict[present[0]], state_dict[name]
            if first is not other and not torch.equal(first, other):
                raise ValueError(
                    f"load_quantized: state_dict has other values for {name} than for {present[0]}; the model ties both"
                )
        complete |= {name: state_dict[present[0]] for name in group if present}
    return complete


def _tie(model: torch.nn.Module, names: list[str]) -> None:
    """One tensor again under all names: load_state_dict has made a parameter of each."""
    first, *others = [(model.get_submodule(path), key) for path, _, key in (name.rpartition(".") for name in names)]
    tensor = getattr(*first)
    for module, key in others:
        (module._parameters if key in module._parameters else module._buffers)[key] = tensor


def _check_dtypes(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        for name, dtype in (("weight", torch.int8), ("weight_scale", torch.float32)):
            if isinstance(module, Int8Linear) and getattr(module, name).dtype != dtype:
                raise TypeError(
                    f"load_quantized: {f'{path}.{name}'.lstrip('.')} is {getattr(module, name).dtype} in the "
                    f"state_dict; an int8 layer needs {dtype}"
                )


def _check_filled(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    empty = [name for name, tensor in _named_tensors(model) if tensor.is_meta and name not in state_dict]
    if empty and not all(getattr(value, "is_meta", True) for value in state_dict.values()):
        raise RuntimeError(
            f"load_quantized: {', '.join(empty)} would stay on the meta device: state_dicts leave out buffers that "
            "are not persistent. Build the model with its buffers on a real device (accelerate.init_empty_weights "
            "does), or all of it"
        )
