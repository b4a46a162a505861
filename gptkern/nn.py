"""Twins of torch.nn modules, and Int8Linear.

A twin is a stateless subclass of the module that it replaces: same parameters, buffers, hooks, state_dict keys and
constructor; only `forward` differs. So `gptkern.swap` sets a module's class, and `gptkern.unswap` sets it back.
"""

from __future__ import annotations

import torch

from gptkern import functional as F
from gptkern.operators.int8_linear.contract import check_options


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on gptkern.functional.layer_norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on gptkern.functional.rms_norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on gptkern.functional.softmax."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class Int8Linear(torch.nn.Module):
    """A linear layer whose weight is int8 with one scale for each output: gptkern.functional.int8_linear.

        y = act(x @ (weight * weight_scale)^T + bias)

    A new one holds zeros and waits for a state_dict; `from_linear` quantises a trained layer. The weight does not
    learn: it and its scales are buffers. The bias does, as torch.nn.Linear's, and gradients pass to the input.

    Args:
        in_features, out_features: widths of the input's and of the output's last dimension.
        bias: whether there is one.
        activation: None, "gelu" or "gelu_tanh", applied in the same pass.
        mode: "w8a8", "w8a16" or "auto", as for int8_linear.
        device, dtype: of the bias. `weight` is int8 and `weight_scale` float32, and they stay so when a model is cast.

    Raises:
        ValueError: unknown activation or mode.
    """

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
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
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
        layer.weight, layer.weight_scale = F.quantize_int8(weight)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer.train(module.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.int8_linear(
            input, self.weight, self.weight_scale, self.bias, activation=self.activation, mode=self.mode
        )

    def _apply(self, fn, recurse=True):
        # .half(), .to(dtype) and .type(dtype) would round the scales, or the weight, to a dtype that they cannot have.
        kept = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        for name, before in zip(("weight", "weight_scale"), kept):
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}, mode={self.mode!r}"
        )
