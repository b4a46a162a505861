"""quantize(model), load_quantized(model, state_dict): int8 linear layers in a model that was trained without them.

    weight_scale = max|row| / 127        weight = round(row / weight_scale)        a row holds one output's weights

torch.nn.Linear and transformers' Conv1D become gptkern.nn.Int8Linear, in place in the modules that hold them, one after
another: the float weight of a layer is let go before the next layer is looked at.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from gptkern import functional as F
from gptkern.backends.dispatch import explain
from gptkern.nn import Int8Linear
from gptkern.operators.int8_linear.contract import check_options
from gptkern.swapping import reading

_logger = logging.getLogger("gptkern")

# Skipped where it is there, and no error where it is not, unless a caller names it: the output layer's errors reach the
# logits unaveraged, and its weight is most often the embedding's.
DEFAULT_SKIP = ("lm_head",)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a layer carries over to its int8 successor, each the dict that its handles know.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# Of the tensors' attributes, those that an int8 weight has as well as the float one.
_SAME_FOR_INT8 = {"device", "is_cuda"}


class Quantized(NamedTuple):
    """A layer that became int8."""

    name: str  # its path in the model
    original: str  # its class before
    shape: tuple[int, int]  # (out_features, in_features)
    bytes_before: int  # weight and bias
    bytes_after: int  # weight, scales and bias
    error: float | None  # |weight - int8 * scale| / |weight|, Frobenius norms; None on the meta device


class Skipped(NamedTuple):
    """A linear layer that was left alone."""

    name: str
    original: str
    reason: str


class QuantizeReport:
    """What `quantize` did; `print(report)` shows it as a table.

    Attributes:
        quantized: the layers that became int8, by this call.
        skipped: the linear layers that were left alone, and why.
        bytes_before, bytes_after: of the layers that became int8.
        model_bytes_before, model_bytes_after: of all parameters and buffers of the model, shared ones once.
    """

    def __init__(
        self, quantized: list[Quantized], skipped: list[Skipped], model_bytes_before: int, model_bytes_after: int
    ):
        self.quantized = quantized
        self.skipped = skipped
        self.bytes_before = sum(layer.bytes_before for layer in quantized)
        self.bytes_after = sum(layer.bytes_after for layer in quantized)
        self.model_bytes_before = model_bytes_before
        self.model_bytes_after = model_bytes_after

    def __repr__(self) -> str:
        return f"QuantizeReport({len(self.quantized)} quantized, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        rows = [
            (q.name, q.original, "{} x {}".format(*q.shape), *_sizes(q.bytes_before, q.bytes_after), _percent(q.error))
            for q in self.quantized
        ]
        rows.append(("all of these", "", "", *_sizes(self.bytes_before, self.bytes_after), ""))
        rows.append(("the model", "", "", *_sizes(self.model_bytes_before, self.model_bytes_after), ""))
        heading = ("layer", "class", "out x in", "before", "after", "smaller", "error")
        lines = [f"{len(self.quantized)} layers quantized, {len(self.skipped)} skipped", *_table([heading, *rows])]
        if self.skipped:
            lines += ["", *_table([("skipped", "class", "because"), *self.skipped])]
        return "\n".join(lines)


def quantize(
    model: torch.nn.Module,
    mode: str = "auto",
    skip: Iterable[str] = DEFAULT_SKIP,
    filter: Callable[[str, torch.nn.Module], bool] | None = None,
) -> QuantizeReport:
    """Make a model's linear layers int8, in place.

    Replaced are modules of exactly the type torch.nn.Linear, or Conv1D of transformers, by gptkern.nn.Int8Linear
    with the same bias, hooks, training flag and attributes. Left alone, and named in the report, are layers whose
    weight is not a plain tensor that they alone hold: tied, parametrised, pruned, normalised, sharded, not finite; and
    those whose weight a module's forward reads itself (`x @ self.fc.weight.t()`), as far as its code tells: not where
    it takes the layer or the weight out of `self` under another name. Name such a layer in `skip`.
    Before or after `gptkern.swap` is the same; `gptkern.unswap` leaves int8 layers in place.

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
        ValueError: unknown mode, or skip names no module of the model.
        gptkern.BackendError: a backend is forced and cannot quantise one of the layers.

    All of these are raised before anything is changed. An error later (out of memory, say) leaves every layer whole:
    those before it are int8, the others as they were, and another call goes on from there.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}; it needs a torch.nn.Module")
    if isinstance(model, torch.nn.Linear) or _is_conv1d(model):
        raise TypeError(
            f"quantize: model is itself a {type(model).__name__}; it needs a module that holds linear layers. "
            "gptkern.nn.Int8Linear.from_linear gives the int8 layer of a single one"
        )
    check_options("quantize", None, mode)
    if filter is not None and not callable(filter):
        raise TypeError(
            f"quantize: filter is a {type(filter).__name__}; it needs a function of (name, module), or None"
        )
    places = _places(model)
    skip = _checked_skip(skip, [place.name for held in places for place in held])
    planned, skipped = _planned(model, places, skip, filter)
    for held in planned:
        explain(F.quantize_int8, held[0].module().weight)

    bytes_before = size_in_bytes(model)
    quantized = []
    for held in planned:
        try:
            quantized.append(_quantize_in_place(held, mode))
        except _NotFiniteError:
            skipped.append(Skipped(held[0].name, _class_name(held[0]), "its weight holds a NaN or an infinity"))
    report = QuantizeReport(quantized, skipped, bytes_before, size_in_bytes(model))
    _logger.info("quantize: %s", report)
    return report


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


def size_in_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once, those of lazy modules not yet."""
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return _size(before), _size(after), f"{before / after:.2f} x" if after else ""


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    power = min(int(math.log10(count)) // 3, 3)
    return f"{count / 1000**power:.2f} {('kB', 'MB', 'GB')[power - 1]}"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}%"


# --- What is quantised ------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where a module is held. It holds no module itself, so that a replaced one is freed."""

    parent: torch.nn.Module
    attribute: str
    name: str

    def module(self) -> torch.nn.Module:
        return self.parent._modules[self.attribute]

    def put(self, module: torch.nn.Module) -> None:
        self.parent._modules[self.attribute] = module


def _places(model: torch.nn.Module) -> list[list[_Place]]:
    """For each module in the model, all places that hold it."""
    found: dict[int, list[_Place]] = {}
    for path, parent in model.named_modules():
        for attribute, module in parent._modules.items():
            if module is not None:
                name = f"{path}.{attribute}" if path else attribute
                found.setdefault(id(module), []).append(_Place(parent, attribute, name))
    return [found[id(module)] for module in model.modules() if id(module) in found]


def _checked_skip(skip: Iterable[str], names: list[str]) -> tuple[str, ...]:
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"quantize: skip is {skip!r}; it needs a list of modules' names, as ['lm_head']")
    if skip is DEFAULT_SKIP:
        return skip
    skip = tuple(skip)
    for entry in skip:
        if not isinstance(entry, str):
            raise TypeError(f"quantize: skip holds a {type(entry).__name__}; it needs modules' names, as ['lm_head']")
        if not any(_ends_with(name, entry) for name in names):
            raise ValueError(
                f"quantize: skip holds {entry!r}, which is no module of the model; it needs a module's name, or the "
                "end of one, as in model.named_modules()"
            )
    return skip


def _ends_with(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}")


def _planned(
    model: torch.nn.Module, places: list[list[_Place]], skip: tuple[str, ...], filter: Callable | None
) -> tuple[list[list[_Place]], list[Skipped]]:
    """(the layers to quantise, each by its places; those left alone)"""
    holders, read = _holders(model), _read_by_modules(model)
    in_ddp = {m for ddp in model.modules() if isinstance(ddp, DistributedDataParallel) for m in ddp.modules()}
    planned, skipped = [], []
    for held in places:
        module, name = held[0].module(), held[0].name
        if not _looks_linear(module):
            continue
        reason = _skip_named(held, skip) or _obstacle(held, module, holders)
        if reason is None and module in read:
            reason = "its parent reads its weight"
        if reason is None and module in in_ddp:
            reason = "DistributedDataParallel waits for its weight's gradient: quantise first, wrap then"
        if reason is None and filter is not None and not filter(name, module):
            reason = "filter returned False"
        if reason is None:
            planned.append(held)
        else:
            skipped.append(Skipped(name, type(module).__name__, reason))
    return planned, skipped


def _is_conv1d(module: torch.nn.Module) -> bool:
    """Whether it is exactly transformers' Conv1D; there is none where transformers was not imported."""
    return type(module) is getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def _looks_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Int8Linear) or any(
        cls.__name__ == "Conv1D" for cls in type(module).__mro__
    )


def _skip_named(held: list[_Place], skip: tuple[str, ...]) -> str | None:
    for place in held:
        parts = place.name.split(".")
        for count in range(1, len(parts) + 1):
            for entry in skip:
                if _ends_with(".".join(parts[:count]), entry):
                    return f"skip names {entry!r}"
    return None


def _obstacle(held: list[_Place], module: torch.nn.Module, holders: _Holders) -> str | None:
    """Why a layer cannot be quantised, or None."""
    cls = type(module)
    if isinstance(module, Int8Linear):
        return "it is int8 already"
    if parametrize.is_parametrized(module):
        return "it is parametrised: its weight is computed from other tensors"
    if cls is not torch.nn.Linear and not _is_conv1d(module):
        if any(isinstance(place.parent, torch.nn.MultiheadAttention) for place in held):
            return "torch.nn.MultiheadAttention reads its weight and does not call it"
        if isinstance(module, torch.nn.Linear):
            own = "" if cls.forward is torch.nn.Linear.forward else ", with a forward of its own"
            return f"a subclass of torch.nn.Linear{own}"
        return "not transformers' own Conv1D"
    if any(isinstance(place.parent, torch.nn.TransformerEncoderLayer) for place in held):
        return "torch.nn.TransformerEncoderLayer reads its weight in inference and does not call it"
    if "forward" in vars(module):
        return "a forward was set on the instance itself"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias (normalised or pruned, say)"
    weight, bias = module.weight, module.bias
    for name, tensor in (("weight", weight), ("bias", bias)):
        if type(tensor) is not torch.nn.Parameter and not (name == "bias" and tensor is None):
            return f"its {name} is a {type(tensor).__name__}"
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"its {name} is {tensor.dtype}"
        if tensor is not None and tensor.layout != torch.strided:
            return f"its {name} is {tensor.layout}"
    if weight.numel() == 0:
        return "its weight is empty"
    start, stop = _extent(weight)
    for holder in holders[weight.untyped_storage()._cdata]:
        if holder.module_id != id(module) and holder.start < stop and start < holder.stop:
            return f"its weight is tied to {holder.name}"
    return None


class _Holder(NamedTuple):
    """A tensor of the model in a storage."""

    name: str
    module_id: int
    start: int  # of its first byte
    stop: int  # past its last


# A storage, known by its address in PyTorch (on the meta device, too, where data_ptr is 0) -> what lies in it.
_Holders = dict[int, list[_Holder]]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage between a tensor's first element and its last: (start, stop)."""
    start = tensor.storage_offset()
    count = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    return start * tensor.element_size(), (start + count) * tensor.element_size()


def _holders(model: torch.nn.Module) -> _Holders:
    found: _Holders = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            # A tensor subclass (DTensor, say) may have no storage; such a layer is left alone anyway.
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
                holder = _Holder(f"{path}.{name}" if path else name, id(module), *_extent(tensor))
                found.setdefault(tensor.untyped_storage()._cdata, []).append(holder)
    return found


def _read_by_modules(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules whose weight another one's forward reads: `self.fc.weight`, `self.mlp.fc.weight`."""
    found = set()
    paths = {cls: _weights_read(cls) for cls in set(map(type, model.modules()))}
    for module in model.modules():
        for path in paths[type(module)]:
            inner = module
            for attribute in path:
                inner = inner._modules.get(attribute) if isinstance(inner, torch.nn.Module) else None
            if inner is not None:
                found.add(inner)
    return found


def _weights_read(cls: type) -> set[tuple[str, ...]]:
    """("fc",) for each self.fc.weight in the code of a class's forward, or of a method that is called from there."""
    found = set()
    for function in reading.followed(cls):
        for this, *attributes in reading.chains(function.__code__):
            if "weight" in attributes[1:] and function.__code__.co_varnames[:1] == (this,):
                end = attributes.index("weight", 1)
                if not _SAME_FOR_INT8 & set(attributes[end + 1 : end + 2]):
                    found.add(tuple(attributes[:end]))
    return found


# --- One layer --------------------------------------------------------------------------------------------------------


class _NotFiniteError(Exception):
    pass


def _class_name(place: _Place) -> str:
    return type(place.module()).__name__


@torch.no_grad()
def _quantize_in_place(held: list[_Place], mode: str) -> Quantized:
    module = held[0].module()
    layer = Int8Linear.from_linear(module, mode=mode)
    weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.t()
    error = None
    if not weight.is_meta:
        if not layer.weight_scale.isfinite().all():
            raise _NotFiniteError
        error = _error(weight, layer.weight, layer.weight_scale)
    _take_over(module, layer)
    for place in held:
        place.put(layer)
    return Quantized(
        held[0].name,
        type(module).__name__,
        tuple(layer.weight.shape),
        size_in_bytes(module),
        size_in_bytes(layer),
        error,
    )


def _error(weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> float:
    """|weight - q * scale| / |weight|; weight and q (out_features, in_features), scale (out_features,)"""
    weight = weight if weight.dtype == torch.float64 else weight.float()
    norm = weight.norm().item()
    return torch.addcmul(weight, q, scale.unsqueeze(1), value=-1).norm().item() / norm if norm else 0.0


def _take_over(module: torch.nn.Module, layer: Int8Linear) -> None:
    """The int8 layer gets what its float predecessor had besides the weight."""
    # The same Parameter: an optimizer or a tie may hold it.
    layer.bias = module.bias
    for name in _HOOKS:
        vars(layer)[name] = vars(module)[name]
    # Load hooks that are given their module hold it weakly themselves.
    for key, hook in layer._load_state_dict_pre_hooks.items():
        if getattr(hook, "with_module", False):
            layer._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, layer)
    for name, value in vars(module).items():
        vars(layer).setdefault(name, value)


# --- Loading ----------------------------------------------------------------------------------------------------------


def _put_empty_layers(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], mode: str) -> None:
    """Int8Linear on the meta device where the state_dict has int8 weights and the model other linear layers."""
    # A state_dict may hold more than tensors.
    names = {
        key.removesuffix(".weight") for key, value in state_dict.items() if getattr(value, "dtype", None) == torch.int8
    }
    for held in _places(model):
        name, module = held[0].name, held[0].module()
        if isinstance(module, Int8Linear) or names.isdisjoint(place.name for place in held):
            continue
        if type(module) is not torch.nn.Linear and not _is_conv1d(module):
            raise TypeError(
                f"load_quantized: state_dict has an int8 weight for {name}, which is a {type(module).__name__}; it "
                "needs torch.nn.Linear, or Conv1D of transformers"
            )
        out_features, in_features = module.weight.shape if type(module) is torch.nn.Linear else module.weight.t().shape
        layer = Int8Linear(in_features, out_features, module.bias is not None, mode=mode, device="meta")
        _take_over(module, layer.train(module.training))
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
