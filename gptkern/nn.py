"""Twins of torch.nn modules, and Int8Linear.

A twin is a stateless subclass of the module that it replaces: same parameters, buffers, hooks, state_dict keys and
constructor; only `forward` differs. So `gptkern.swap` sets a module's class, and `gptkern.unswap` sets it back.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Mapping

import torch

from gptkern import functional as F
from gptkern.backends import dispatch, handing
from gptkern.operators.int8_linear.contract import check_options

# What torch.compile traces has nothing waiting.
_is_traced = torch.compiler.is_dynamo_compiling
_waiting = handing.thread


def _refuse_scripting(module: torch.nn.Module) -> None:
    """What torch.jit.script calls of each module first: TorchScript cannot read a twin's forward."""
    name = type(module).__name__
    remedy = (
        "torch.jit.trace takes it"
        if isinstance(module, Int8Linear)
        else f"it needs torch.nn.{name}: call gptkern.unswap(model) first, if gptkern.swap put it there"
    )
    raise RuntimeError(
        f"torch.jit.script: the model holds gptkern.nn.{name}, of which TorchScript knows nothing; {remedy}"
    )


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on gptkern.functional.layer_norm."""

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _is_traced() and _waiting.handed is not None and (taken := handing.take(self, input)) is not None:
            return taken
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def _gptkern_normalise_sum(self, input, residual):
        # For gptkern.swap: forward(input + residual), and the sum. A subclass's forward may be another one.
        if type(self) is not LayerNorm:
            return None
        return F.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual, _own_nodes=True
        )


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on gptkern.functional.rms_norm."""

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_traced() and _waiting.handed is not None and (taken := handing.take(self, x)) is not None:
            return taken
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def _gptkern_normalise_sum(self, input, residual):
        if type(self) is not RMSNorm:
            return None
        return F.rms_norm(input, self.normalized_shape, self.weight, self.eps, residual=residual, _own_nodes=True)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on gptkern.functional.softmax."""

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class GELU(torch.nn.GELU):
    """`torch.nn.GELU` on gptkern.functional.gelu.

    While torch.compile compiles, and no backend is forced, on PyTorch's: Inductor writes it into the kernel of what
    stands around it.
    """

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if dispatch.is_left_to_compiler():
            return super().forward(input)
        return F.gelu(input, approximate=self.approximate)


class SiLU(torch.nn.SiLU):
    """`torch.nn.SiLU` on gptkern.functional.silu; while torch.compile compiles, as GELU."""

    __prepare_scriptable__ = _refuse_scripting

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if dispatch.is_left_to_compiler():
            return super().forward(input)
        return F.silu(input, self.inplace)


class Int8Linear(torch.nn.Module):
    """A linear layer whose weight is int8 with one scale for each output: gptkern.functional.int8_linear.

        y = act(x @ (int8_weight * weight_scale)^T + bias)

    A new one holds zeros and waits for a state_dict; `from_linear` quantises a trained layer. The weight does not
    learn: it and its scales are buffers. The bias does, as torch.nn.Linear's, and gradients pass to the input.

    In a state_dict the codes have a key of their own, so that no load takes them for weights, nor weights for them:
    `int8_weight` (out_features, in_features) int8, `weight_scale` (out_features,) float32, `bias` as it is. Codes that
    an older file has under "weight" are taken too. What save_pretrained of transformers writes has a tensor of one
    element under "weight" besides, which no float layer takes: where config.json does not name the layer, transformers
    would go on with random weights.

    Args:
        in_features, out_features: widths of the input's and of the output's last dimension.
        bias: whether there is one.
        activation: None, "gelu" or "gelu_tanh", applied in the same pass.
        mode: "w8a8", "w8a16" or "auto", as for int8_linear.
        device, dtype: of the bias. `int8_weight` is int8 and `weight_scale` float32, and they stay so when a model is
            cast.

    Raises:
        ValueError: unknown activation or mode.
        RuntimeError: `load_state_dict`, strict or not, of a weight that is not int8, or of scales that are not
            float32. Nothing of the layer is changed; in a model that `quantize` or `load_quantized` went through,
            nothing of the model. A model that was built around such a one later, or around a layer made by hand, may
            have loaded its other layers by then: neither knows the other. After `quantize` of the whole, with a filter
            that returns False, it refuses as a whole.
        AttributeError: `weight` is set.
    """

    __prepare_scriptable__ = _refuse_scripting

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | None = None,
        mode: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_options("Int8Linear", activation, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.mode = mode
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        zeros = torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_linear(cls, module: torch.nn.Module, *, activation: str | None = None, mode: str = "auto") -> Int8Linear:
        """The int8 layer of a trained one, which stays as it is.

        Device, dtype of the bias, training mode and the bias's requires_grad are kept; hooks are not.

        Args:
            module: a torch.nn.Linear (or a subclass that keeps its forward), or transformers' Conv1D, whose weight is
                (in_features, out_features).

        Raises:
            TypeError: any other module.
            ValueError: unknown activation or mode.
        """
        if isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward:
            weight = module.weight
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            weight = module.weight.t()
        else:
            raise TypeError(
                f"Int8Linear.from_linear: module is {type(module).__name__}; it needs torch.nn.Linear, or Conv1D of "
                "transformers"
            )
        out_features, in_features = weight.shape
        bias = module.bias
        # On the meta device nothing is filled in only to be replaced.
        layer = cls(in_features, out_features, bias is not None, activation=activation, mode=mode, device="meta")
        layer.int8_weight, layer.weight_scale = F.quantize_int8(weight)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(module.training)

    @property
    def weight(self) -> torch.Tensor:
        """`int8_weight`, for code that asks a linear layer's weight for its device or dtype; it cannot be set.

        What writes into it (`copy_`, an initialisation) writes the codes, and PyTorch cuts floats off to integers.
        """
        return self.int8_weight

    def __setattr__(self, name, value):
        # A property's setter would not see a Parameter, which Module registers.
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__}.weight cannot be set: the layer is int8 and has int8_weight and weight_scale. "
                "Set the weight of a torch.nn.Linear and make that int8: gptkern.quantize, or Int8Linear.from_linear"
            )
        super().__setattr__(name, value)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.int8_linear(
            input, self.int8_weight, self.weight_scale, self.bias, activation=self.activation, mode=self.mode
        )

    def _apply(self, fn, recurse=True):
        # .half(), .to(dtype) and .type(dtype) would round the scales, or the weight, to a dtype that they cannot have.
        kept = self.int8_weight, self.weight_scale
        super()._apply(fn, recurse)
        for name, before in zip(("int8_weight", "weight_scale"), kept):
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        model = _saved_by_transformers()
        if model is not None:
            destination[f"{prefix}weight"] = torch.zeros(1, dtype=torch.int8)
            if self is next(module for module in model.modules() if isinstance(module, Int8Linear)):
                _warn_unknown(model)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        state_dict = with_own_keys(state_dict, [prefix])
        refuse_unfit(f"load_state_dict of {type(self).__name__}", unfit(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __setstate__(self, state):
        super().__setstate__(state)
        # Pickled when the codes' name was that of a float weight.
        if "weight" in self._buffers:
            self._buffers = with_own_keys(self._buffers, [""])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}, mode={self.mode!r}"
        )


# --- transformers' save_pretrained ------------------------------------------------------------------------------------


def _saved_by_transformers() -> torch.nn.Module | None:
    """The model of transformers of which save_pretrained asks for a state_dict.

    A layer does not know what holds it, and quantize may have seen a part of the model alone. Of all that
    save_pretrained does, state_dict alone comes by the layer, and says nothing of who calls: so the stack is asked.
    """
    cls = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if cls is None:
        return None
    code = inspect.unwrap(cls.save_pretrained).__code__
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame and frame.f_locals[code.co_varnames[0]]


def _warn_unknown(model: torch.nn.Module) -> None:
    quantizer, is_adapter = getattr(model, "hf_quantizer", None), getattr(model, "_hf_peft_config_loaded", False)
    known = getattr(quantizer or model.config, "quantization_config", None)
    method = known.get("quant_method") if isinstance(known, dict) else getattr(known, "quant_method", None)
    # Adapters are saved without what they adapt.
    if method != "gptkern" and not is_adapter:
        name = type(model).__name__
        warnings.warn(
            f"save_pretrained: {name} holds int8 layers that gptkern.quantize made in a part of it, or that were put "
            "in by hand: config.json does not name them, and from_pretrained will refuse the file; "
            "gptkern.load_quantized takes it. For from_pretrained call gptkern.quantize(model, "
            "filter=lambda name, layer: False), which looks at the whole model and makes no other layer int8, and "
            "save again",
            stacklevel=2,
        )


# --- What a state_dict holds for an int8 layer -----------------------------------------------------------------------

_NAMED_AT_MOST = 8


def with_own_keys(state_dict: Mapping[str, torch.Tensor], prefixes: Iterable[str]) -> dict[str, torch.Tensor]:
    """The state_dict with the codes of the int8 layers of these prefixes ("blocks.0.fc.") under their own key."""
    renamed, marks = {}, set()
    for prefix in prefixes:
        old, new = f"{prefix}weight", f"{prefix}int8_weight"
        if _dtype(state_dict, old) == torch.int8:
            if new not in state_dict:
                renamed[old] = new
            elif state_dict[old].dim() == 1:
                marks.add(old)  # by save_pretrained, for who does not know int8 layers
    return {renamed.get(key, key): value for key, value in state_dict.items() if key not in marks}


def unfit(state_dict: Mapping[str, torch.Tensor], prefix: str) -> list[str]:
    """What the state_dict holds for the int8 layer of this prefix that it cannot take: "key is …; it needs …"."""
    needed = {"int8_weight": torch.int8, "weight_scale": torch.float32}
    lines = []
    for key in ("weight", *needed):
        value, dtype = state_dict.get(f"{prefix}{key}"), _dtype(state_dict, f"{prefix}{key}")
        if dtype is not None and not isinstance(value, torch.Tensor):
            lines.append(f"{prefix}{key} is a {qualified_name(value)}; it needs a tensor")
        # Codes under the older key are no float weight.
        elif dtype is not None and dtype != needed.get(key, torch.int8):
            needs = f"{prefix}int8_weight, {torch.int8}" if key == "weight" else f"{needed[key]}"
            lines.append(f"{prefix}{key} is {dtype}; the layer is int8 and needs {needs}")
    return lines


def refuse_unfit(what: str, lines: list[str], error: type[Exception] = RuntimeError) -> None:
    """Raise an error that names what does not fit, if anything."""
    if lines:
        more = len(lines) - _NAMED_AT_MOST
        listed = [*lines[:_NAMED_AT_MOST], *([f"and {more} more"] if more > 0 else [])]
        of_floats = any("the layer is int8" in line for line in lines)
        advice = ". Float weights go into a float model, which gptkern.quantize makes int8 then" if of_floats else ""
        raise error(f"{what}: {'; '.join(listed)}{advice}")


def qualified_name(value: object) -> str:
    """ "numpy.ndarray" """
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _dtype(state_dict: Mapping[str, torch.Tensor], key: str) -> torch.dtype | None:
    # A state_dict may hold more than tensors.
    return getattr(state_dict.get(key), "dtype", None)
