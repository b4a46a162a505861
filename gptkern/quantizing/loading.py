"""load_quantized(model, state_dict): a quantised model again, from its state_dict."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import torch

from gptkern.nn import Int8Linear, check_options, qualified_name, refuse_unfit, with_own_keys
from gptkern.quantizing import layers
from gptkern.quantizing.choosing import looks_linear
from gptkern.quantizing.layers import Place, is_conv1d, places, put_empty
from gptkern.quantizing.refusing import look_first, unfit_for
from gptkern.quantizing.report import Quantized, QuantizeReport, Skipped, size_in_bytes

_logger = logging.getLogger("gptkern")

_CODES = ".int8_weight"


def load_quantized(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], mode: str = "auto"
) -> QuantizeReport:
    """Load a quantised model's state_dict into a fresh model that need not be quantised, or hold anything, yet.

        save_model(quantised_model, "model.safetensors")            # of safetensors.torch; it writes tied weights once
        with torch.device("meta"):
            model = GPT(config)                                     # no memory at all
        print(gptkern.load_quantized(model, load_file("model.safetensors")))

    Layers that have an `int8_weight` in the state_dict become gptkern.nn.Int8Linear, in place; those that are already
    stay so. The tensors are taken as they are, not copied, with their device and dtype; weights that the model ties
    stay tied, and the state_dict needs only one of their names. Hooks, attributes and the training flag are the
    model's. Older files, which have the codes under "weight", are taken as well.

    Args:
        model: of the class and the configuration that was quantised, on any device.
        state_dict: as quantised_model.state_dict() gave it, all in one.
        mode: of the layers that become int8, as for `quantize`; a state_dict does not say it.

    Returns:
        A report as `quantize` gives: the layers that are int8 now, with their bytes before and after, and the linear
        layers that are not. A layer's error is None: what was rounded is not known any more.

    Raises:
        TypeError: model is no module, state_dict is no mapping, holds int8 codes for a module that is no linear
            layer, or for an int8 layer something that is no tensor, a weight that is not int8 or scales that are not
            float32.
        ValueError: unknown mode, nothing in the state_dict is int8, or under other names than the model's ("module.…"),
            or in a dictionary inside it; or tied weights differ in it.
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
    held_in = [held for held in places(model) if looks_linear(held[0].module())]
    before = {held[0].name: (type(held[0].module()).__name__, size_in_bytes(held[0].module())) for held in held_in}
    bytes_before = size_in_bytes(model)
    # Nothing is written into a tensor below: these dictionaries are all that changes.
    kept = [
        (d, dict(d))
        for m in model.modules()
        for d in (m._modules, m._parameters, m._buffers, m._load_state_dict_pre_hooks)
    ]
    try:
        state_dict = _put_empty_layers(model, state_dict, mode)
        groups = list(_tied_names(model))
        model.load_state_dict(_with_tied_names(state_dict, groups), strict=True, assign=True)
        for names in groups:
            _tie(model, names)
        _check_filled(model, state_dict)
        look_first(model)
        if transformers := layers.transformers():
            transformers.let_save(model)
    except BaseException:
        for dictionary, content in kept:
            dictionary.clear()
            dictionary.update(content)
        raise
    report = _report(held_in, before, bytes_before, size_in_bytes(model))
    _logger.info("load_quantized: %s", report)
    return report


def _put_empty_layers(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], mode: str
) -> Mapping[str, torch.Tensor]:
    """Int8Linear on the meta device where the state_dict has int8 codes and the model other linear layers.

    Returns:
        The state_dict with all codes under their own keys.
    """
    held_in = places(model)
    names = {key.removesuffix(_CODES) for key in state_dict if key.endswith(_CODES)} | {
        # Of older files; a state_dict may hold more than tensors.
        key.removesuffix(".weight")
        for key, value in state_dict.items()
        if key.endswith(".weight") and getattr(value, "dtype", None) == torch.int8
    }
    for held in held_in:
        name, module = held[0].name, held[0].module()
        if isinstance(module, Int8Linear) or names.isdisjoint(place.name for place in held):
            continue
        if type(module) is not torch.nn.Linear and not is_conv1d(module):
            if "int8_weight" in {*module._parameters, *module._buffers}:
                continue  # a module of another kind that has the name
            raise TypeError(
                f"load_quantized: state_dict has an int8 weight for {name}, which is a {type(module).__name__}; it "
                "needs torch.nn.Linear, or Conv1D of transformers"
            )
        put_empty(held, mode)
    int8_layers = [f"{place.name}." for held in held_in if isinstance(held[0].module(), Int8Linear) for place in held]
    if isinstance(model, Int8Linear):
        int8_layers.append("")
    state_dict = with_own_keys(state_dict, int8_layers)
    refuse_unfit("load_quantized", unfit_for(model, state_dict), TypeError)
    if not any(f"{prefix}int8_weight" in state_dict for prefix in int8_layers):
        arrays = [key for key, value in state_dict.items() if hasattr(value, "dtype")]
        if arrays and not any(isinstance(value, torch.Tensor) for value in state_dict.values()):
            kind = qualified_name(state_dict[arrays[0]])
            raise TypeError(f"load_quantized: {arrays[0]} in state_dict is a {kind}; it needs a tensor")
        raise ValueError(f"load_quantized: {_why_nothing_is_int8(model, state_dict, names)}")
    return state_dict


def _why_nothing_is_int8(model: torch.nn.Module, state_dict: Mapping, names: set[str]) -> str:
    """What a state_dict is in which no layer of the model is int8.

    Args:
        names: of the modules for which it has int8 codes.
    """
    needs = "it needs the state_dict of a model that gptkern.quantize went through"
    modules = dict(model.named_modules(remove_duplicate=False))
    codes = [key for key in state_dict if key.removesuffix(_CODES).removesuffix(".weight") in names - modules.keys()]
    codes += ["int8_weight"] if "int8_weight" in state_dict else []
    if codes:
        layers = sorted(name for name, module in modules.items() if name and looks_linear(module))
        parts = codes[0].split(".")
        prefix = next((".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[i:-1]) in layers), None)
        return f"state_dict is int8 under other names than the model's: it has {codes[0]}, and the model " + (
            f"{codes[0].removeprefix(f'{prefix}.')}; its keys need to be without {f'{prefix}.'!r}"
            if prefix
            else "no layer of that name" + (f"; its first is {layers[0]}" if layers else "")
        )
    inside = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
    if inside:
        # One of them may be the optimizer's.
        key = next((key for key in inside if any(str(name).endswith(_CODES) for name in state_dict[key])), inside[0])
        kind = type(state_dict[key]).__name__
        return f"state_dict holds a {kind} under {key!r}; {needs}, which state_dict[{key!r}] may be"
    return (
        f"nothing in state_dict is int8; {needs}. model.load_state_dict loads float weights, and "
        "gptkern.quantize(model) makes them int8 then"
    )


def _report(
    held_in: list[list[Place]], before: dict[str, tuple[str, int]], bytes_before: int, bytes_after: int
) -> QuantizeReport:
    loaded, skipped = [], []
    for held in held_in:
        name, module = held[0].name, held[0].module()
        original, size = before[name]
        if isinstance(module, Int8Linear):
            shape = (module.out_features, module.in_features)
            loaded.append(Quantized(name, original, shape, size, size_in_bytes(module), None))
        else:
            skipped.append(Skipped(name, original, "it is float in the state_dict"))
    return QuantizeReport(loaded, skipped, bytes_before, bytes_after)


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


def _check_filled(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    empty = [name for name, tensor in _named_tensors(model) if tensor.is_meta and name not in state_dict]
    if empty and not all(getattr(value, "is_meta", True) for value in state_dict.values()):
        raise RuntimeError(
            f"load_quantized: {', '.join(empty)} would stay on the meta device: state_dicts leave out buffers that "
            "are not persistent. Build the model with its buffers on a real device (accelerate.init_empty_weights "
            "does), or all of it"
        )
