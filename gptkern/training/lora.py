"""LoRA: a few numbers beside each linear layer learn, and the layer's own stay what they are.

    y = W x + b + (alpha / rank) · B (A x)          A: (rank, in_features), drawn     B: (out_features, rank), zeros

B is zero at first, so that a model with new adapters computes what the model did. In place: an adapted layer is the
same object with the same `weight` and `bias`, under the same keys of the state_dict; it changes its class, and has the
Parameters `lora_A` and `lora_B` besides. All other parameters are frozen. An int8 layer's codes and scales stay int8;
the gradient passes through them to the layer's input.

    names = lora.add(model, rank=8)
    optimizer = AdamW(lora.trainable(model).values(), lr=2e-4)
    …
    save_file(lora.state(model), "adapters.safetensors")
    lora.merge(model, reversible=False)                      a plain model again, with what it has learned

Adapters go into a model before it is wrapped (DistributedDataParallel, fully_shard) and before or after gptkern.swap;
int8 before adapters. Products are in the layer's input's dtype, under autocast in autocast's; the adapters are kept in
float32, in which small updates are not lost.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021 (arXiv:2106.09685), sections 4.1 and 4.2;
of adapters beside quantised layers: Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), section 3, of which is also that
all linear layers want to be adapted, and not attention's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gptkern.formatting import shown
from gptkern.nn import Int8Linear
from gptkern.training.lora_targets import check_rank, chosen_layers

__all__ = ["add", "load", "merge", "remove", "state", "trainable", "unmerge"]

_NAMES = "lora_A", "lora_B", "lora_alpha"

_INT8_OPTIONS = "activation", "mode"  # attributes of Int8Linear that no torch.nn.Linear has

# Of a module's __dict__: its parameters that learned before `add`; and of a merged layer, what `unmerge` puts back.
_THAWED, _MERGED = "_lora_thawed", "_lora_merged"


# --- Layers -----------------------------------------------------------------------------------------------------------


class _Adapter:
    """What both classes of adapted layers have. lora_A and lora_B are Parameters, the rest numbers."""

    lora_A: nn.Parameter  # (rank, in_features)
    lora_B: nn.Parameter  # (out_features, rank)
    lora_alpha: float
    lora_dropout: float

    def lora_update(self, input: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features): (alpha / rank) · B (A dropout(input))"""
        x = F.dropout(input, self.lora_dropout, self.training) if self.lora_dropout else input
        inner = F.linear(x, self.lora_A.to(x.dtype)) * self.lora_scale  # (…, rank)
        return F.linear(inner, self.lora_B.to(x.dtype))

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_A.shape[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, alpha={self.lora_alpha:g}"


class LoRALinear(_Adapter, nn.Linear):
    """A torch.nn.Linear with an adapter; `add` makes it of one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.Linear.forward(self, input) + self.lora_update(input)


class LoRAInt8Linear(_Adapter, Int8Linear):
    """A gptkern.nn.Int8Linear with an adapter; `add` makes it of one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return Int8Linear.forward(self, input) + self.lora_update(input)


_ADAPTED: dict[type, type] = {nn.Linear: LoRALinear, Int8Linear: LoRAInt8Linear}
_BASES = {adapted: base for base, adapted in _ADAPTED.items()}


class _Merged(NamedTuple):
    """What a layer that was merged had: the base's own tensors, and the adapter."""

    base: dict[str, torch.Tensor]  # weight, or int8_weight and weight_scale
    adapter: dict[str, Any]


# --- Adding and taking away -------------------------------------------------------------------------------------------


def add(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Iterable[str] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Put adapters beside a model's linear layers, and freeze everything else.

        y = W x + b + (alpha / rank) · B (A dropout(x))

    A is drawn from a normal distribution of variance 1 / in_features, on the CPU, so that a seed gives the same one on
    every device; B is zero. Both are float32 (float64 beside a float64 weight), on the layer's device. Parameters that
    shall learn besides, those of a new head, say, get their requires_grad afterwards.

    Args:
        model: any module, or itself a linear layer. Adapted are modules of exactly the type torch.nn.Linear or
            gptkern.nn.Int8Linear.
        rank: at least 1, and at most the smaller side of each weight.
        alpha: of the factor alpha / rank; None for the rank, a factor of 1.
        dropout: of the adapters' input, while training.
        targets: patterns of layers' names, of a whole name or of its end: "blocks.0.attention.qkv", "attention.qkv",
            "blocks.*.perceptron.*". None: every layer that can be adapted, but no lm_head.
        generator: of the CPU, of the numbers in A; None for PyTorch's default.

    Returns:
        The names of the adapted layers.

    Raises:
        TypeError: model is no module, targets is a string.
        ValueError: the model has adapters already; a number is out of range; a pattern matches no linear layer, or one
            that cannot be adapted, with the reason: its weight is also another module's (a tied lm_head, which merged
            would change the embedding), read past the layer, or computed from other tensors; it is a subclass, or has
            an activation of its own. All of these are raised before anything is changed.
    """
    _check_model("add", model)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora.add: rank is {rank!r}; it needs a whole number of at least 1")
    alpha = rank if alpha is None else alpha
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"lora.add: alpha is {alpha!r}; it needs a finite number above 0")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"lora.add: dropout is {dropout!r}; it needs a number of at least 0 and below 1")
    if isinstance(targets, str):
        raise TypeError(f"lora.add: targets is {targets!r}; it needs a list of patterns, as [{targets!r}]")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"lora.add: generator is on {generator.device}; it needs to be on the CPU")
    _refuse_adapted("add", model)
    chosen = chosen_layers("add", model, None if targets is None else list(targets))
    for name, module in chosen.items():
        check_rank("add", name, module, rank)
    drawn = {}
    for name, module in chosen.items():
        dtype = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        # A ~ N(0, 1 / in_features): A x is as large as x
        a = torch.randn(rank, module.in_features, dtype=dtype, generator=generator) / math.sqrt(module.in_features)
        device = module.weight.device
        drawn[name] = a.to(device), torch.zeros(module.out_features, rank, dtype=dtype, device=device)
    _freeze(model)
    for name, module in chosen.items():
        _adapt(module, *drawn[name], float(alpha), float(dropout))
    return list(chosen)


def remove(model: nn.Module) -> list[str]:
    """Take the adapters away, merged or not: the model as it was before `add`, bit for bit, parameters that learned
    learning again.

    Returns:
        The names of the layers that had one.

    Raises:
        TypeError: model is no module. ValueError: it has no adapters; or, as `unmerge`.
    """
    _check_model("remove", model)
    if any(_MERGED in vars(module) for module in model.modules()):
        unmerge(model)
    found = _adapted("remove", model)
    for module in found.values():
        _take_away(module)
    _thaw(model)
    return list(found)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the model: "blocks.0.attention.qkv.lora_A", ….

    Raises:
        TypeError: model is no module. ValueError: it has no adapters, or they are merged.
    """
    _check_model("trainable", model)
    found = _adapted("trainable", model)
    return {f"{_prefix(name)}{key}": getattr(module, key) for name, module in found.items() for key in _NAMES[:2]}


# --- Files ------------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, as safetensors saves them: for each layer `lora_A`, `lora_B` and `lora_alpha`, a scalar.

    Raises:
        TypeError: model is no module. ValueError: it has no adapters, or they are merged.
    """
    _check_model("state", model)
    found: dict[str, torch.Tensor] = {}
    for name, module in _adapted("state", model).items():
        values = module.lora_A.detach(), module.lora_B.detach(), torch.tensor(module.lora_alpha, dtype=torch.float64)
        found |= {f"{_prefix(name)}{key}": value for key, value in zip(_NAMES, values)}
    return found


@torch.no_grad()
def load(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Put what `state` gave into the model's adapters. A model that has none gets them, with a dropout of 0.

    Returns:
        The names of the adapted layers.

    Raises:
        TypeError: model is no module, state is no mapping of tensors.
        ValueError: names, shapes, ranks or alphas are not those of the model's adapters, or no layer of the model can
            have them; a value is no finite number; the adapters are merged. Nothing is changed then.
    """
    _check_model("load", model)
    given = _grouped(state)
    if any(_MERGED in vars(module) for module in model.modules()):
        raise ValueError("lora.load: the model's adapters are merged; it needs lora.unmerge first")
    there = {name: module for name, module in model.named_modules() if type(module) in _BASES}
    layers = there or chosen_layers("load", model, list(given), exact=True)
    for words, names in (("has no", layers.keys() - given.keys()), ("has", given.keys() - layers.keys())):
        if names:
            which = shown(f"{_prefix(min(names))}{_NAMES[0]}")
            raise ValueError(f"lora.load: state {words} {which}; it needs the names of the model's own adapters")
    for name, (a, b, alpha) in given.items():
        module, rank = layers[name], a.shape[0]
        for key, tensor, shape in zip(_NAMES, (a, b), ((rank, module.in_features), (module.out_features, rank))):
            if tensor.shape != shape:
                what = f"{shown(_prefix(name) + key)} has shape {tuple(tensor.shape)}"
                raise ValueError(f"lora.load: {what}; it needs {shape}")
        check_rank("load", name, module, rank)
        if there and (rank, alpha) != (module.lora_A.shape[0], module.lora_alpha):
            own = f"rank {module.lora_A.shape[0]} and alpha {module.lora_alpha:g}"
            raise ValueError(f"lora.load: {shown(name)} has rank {rank} and alpha {alpha:g}; the model's has {own}")
    if not there:
        _freeze(model)
    for name, (a, b, alpha) in given.items():
        if there:
            layers[name].lora_A.copy_(a)
            layers[name].lora_B.copy_(b)
        else:
            dtype = torch.float64 if layers[name].weight.dtype == torch.float64 else torch.float32
            _adapt(layers[name], a.to(dtype, copy=True), b.to(dtype, copy=True), alpha, 0.0)
    return list(layers)


def _grouped(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Layer -> (A, B, alpha), each of which can be one."""
    if not isinstance(state, Mapping):
        raise TypeError(f"lora.load: state is a {type(state).__name__}; it needs names and tensors, as lora.state gave")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, part = str(key).rpartition(".")
        if part not in _NAMES:
            raise ValueError(f"lora.load: state has {shown(str(key))}; it needs adapters alone, as lora.state gave")
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"lora.load: {shown(key)} is a {type(value).__name__}; it needs a tensor")
        dimensions = 0 if part == _NAMES[2] else 2
        if value.dim() != dimensions or not value.is_floating_point() or not bool(value.isfinite().all()):
            what = f"{shown(key)} is {value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"lora.load: {what}; it needs finite floating-point numbers of {dimensions} dimensions")
        groups.setdefault(name, {})[part] = value
    if not groups:
        raise ValueError("lora.load: state is empty; it needs what lora.state gave")
    for name, group in groups.items():
        for part in _NAMES:
            if part not in group:
                raise ValueError(f"lora.load: state has no {shown(_prefix(name) + part)}")
        if not float(group[_NAMES[2]]) > 0:
            alpha = f"{shown(_prefix(name) + _NAMES[2])} is {float(group[_NAMES[2]]):g}"
            raise ValueError(f"lora.load: {alpha}; it needs to be above 0")
    return {name: (group[_NAMES[0]], group[_NAMES[1]], float(group[_NAMES[2]])) for name, group in groups.items()}


# --- Merging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(model: nn.Module, *, reversible: bool = True, dtype: torch.dtype | None = None) -> list[str]:
    """Put what the adapters add into the weights: the model is a plain one again, which computes the same in less time.

        W = W + (alpha / rank) · B A          in float32 (float64 for a float64 weight), rounded once to W's dtype

    An int8 layer becomes a torch.nn.Linear of the dequantised weight and its update. It does not stay int8, because an
    update of less than half a step of the codes would be gone: `gptkern.quantize(model)` makes it int8 again, with new
    scales, and its report says the error of each layer.

    Args:
        reversible: keep the weights as they were and the adapters in memory, for `unmerge`. False: a layer at a time
            lets them go, and parameters that learned before `add` learn again.
        dtype: of weights that were int8; None for the dtype of the layer's bias, or where it has none, of its adapter.

    Returns:
        The names of the layers that were merged.

    Raises:
        TypeError: model is no module. ValueError: it has no adapters, they are merged, or dtype is no floating point.
    """
    _check_model("merge", model)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"lora.merge: dtype is {dtype}; it needs floating point")
    found = _adapted("merge", model)
    for module in found.values():
        base = _put_merged(module, reversible, dtype)
        adapter = _take_away(module)
        if reversible:
            vars(module)[_MERGED] = _Merged(base, adapter)
        else:
            for name in _INT8_OPTIONS:
                vars(module).pop(name, None)
    if not reversible:
        _thaw(model)
    return list(found)


@torch.no_grad()
def unmerge(model: nn.Module) -> list[str]:
    """Take back `merge`: the weights' own bits, int8 codes included, and the same Parameters of the adapters.

    What was written into a merged weight in between is lost.

    Returns:
        The names of the layers.

    Raises:
        TypeError: model is no module. ValueError: no layer was merged reversibly, or one was made another kind since
            (int8, say). Nothing is changed then.
    """
    _check_model("unmerge", model)
    found = {name: module for name, module in model.named_modules() if _MERGED in vars(module)}
    if not found:
        raise ValueError("lora.unmerge: no layer of the model is merged; it needs what lora.merge(model) merged")
    for name, module in found.items():
        if type(module) is not nn.Linear:
            what = f"{shown(name)} became a {type(module).__name__} after it was merged"
            raise ValueError(f"lora.unmerge: {what}; it needs to be the torch.nn.Linear that it was")
    for module in found.values():
        base, adapter = vars(module).pop(_MERGED)
        device = module.weight.device
        if "weight" in base:
            module.weight.copy_(base["weight"])
        else:
            del module._parameters["weight"]
            module.__class__ = Int8Linear
            module._buffers.update({name: tensor.to(device) for name, tensor in base.items()})
        a, b, alpha, dropout = adapter.values()
        # The same objects: an optimizer holds them.
        a.data, b.data = a.data.to(device), b.data.to(device)
        _adapt(module, a, b, alpha, dropout)
    return list(found)


def _put_merged(module: LoRALinear | LoRAInt8Linear, reversible: bool, dtype: torch.dtype | None):
    """The merged weight into the layer, which has its adapter still; returns the base's tensors."""
    if isinstance(module, LoRALinear):
        base = {"weight": module.weight.detach().clone()} if reversible else {}
        module.weight.copy_(_merged_weight(module, module.weight))
        return base
    if dtype is None:
        dtype = module.lora_A.dtype if module.bias is None else module.bias.dtype
    base = {name: module._buffers[name] for name in ("int8_weight", "weight_scale")}
    # W = int8_weight · weight_scale, a scale for each row
    weight = _merged_weight(module, base["int8_weight"].float() * base["weight_scale"][:, None])
    for name in base:
        del module._buffers[name]
    # Where a stock layer has it: before the bias.
    bias = module._parameters.pop("bias")
    module._parameters["weight"] = nn.Parameter(weight.to(dtype), requires_grad=not reversible)
    module._parameters["bias"] = bias
    return base


def _merged_weight(module: _Adapter, weight: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    # W + (alpha / rank) · B A
    return weight.to(dtype) + module.lora_scale * (module.lora_B.to(dtype) @ module.lora_A.to(dtype))


# --- One layer --------------------------------------------------------------------------------------------------------


def _adapt(module: nn.Module, a: torch.Tensor, b: torch.Tensor, alpha: float, dropout: float) -> None:
    device = module.weight.device
    module.__class__ = _ADAPTED[type(module)]
    for name, value in zip(_NAMES, (a, b)):
        is_parameter = isinstance(value, nn.Parameter)
        module._parameters[name] = value if is_parameter else nn.Parameter(value.to(device))
    module.lora_alpha, module.lora_dropout = alpha, dropout


def _take_away(module: nn.Module) -> dict[str, Any]:
    """The layer without its adapter: of the class that it was, or of torch.nn.Linear where its weight is float now."""
    adapter = {name: module._parameters.pop(name) for name in _NAMES[:2]}
    adapter |= {name: vars(module).pop(name) for name in ("lora_alpha", "lora_dropout")}
    module.__class__ = nn.Linear if "weight" in module._parameters else Int8Linear
    return adapter


def _freeze(model: nn.Module) -> None:
    for module in model.modules():
        learning = [name for name, value in module._parameters.items() if value is not None and value.requires_grad]
        for name in learning:
            module._parameters[name].requires_grad_(False)
        if learning:
            vars(module)[_THAWED] = learning


def _thaw(model: nn.Module) -> None:
    for module in model.modules():
        for name in vars(module).pop(_THAWED, ()):
            module._parameters[name].requires_grad_(True)


# --- Checks -----------------------------------------------------------------------------------------------------------


def _adapted(where: str, model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, of the adapted ones."""
    found = {name: module for name, module in model.named_modules() if type(module) in _BASES}
    if not found:
        merged = any(_MERGED in vars(module) for module in model.modules())
        what = "are merged; it needs lora.unmerge first" if merged else "are none; it needs those that lora.add adds"
        raise ValueError(f"lora.{where}: the model's adapters {what}")
    return found


def _refuse_adapted(where: str, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module) in _BASES or _MERGED in vars(module):
            merged = ", merged" if _MERGED in vars(module) else ""
            what = f"{shown(name) or 'the layer'} has an adapter already{merged}"
            raise ValueError(f"lora.{where}: {what}; it needs a model without: lora.remove takes them away")


def _check_model(where: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"lora.{where}: model is a {type(model).__name__}; it needs a torch.nn.Module")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _prefix(name: str) -> str:
    return f"{name}." if name else ""
