"""The optimizer over the operator: AdamW's groups and state, clipping, scaling, shards."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gptkern.operators.adamw import blockwise, sharding, states
from gptkern.operators.adamw.contract import Call, norm_of, start, statistics_dtype

FLOATING = torch.float16, torch.bfloat16, torch.float32, torch.float64
STATE_DTYPES = None, torch.float32, "int8"
# Of a group, beside torch.optim.AdamW's.
_OWN = ("stochastic_rounding", "state_dtype", "seed")


class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay: `torch.optim.AdamW`'s twin, one launch for all tensors of a kind.

        g = grad / grad_scale · min(1, max_norm / (‖grad / grad_scale‖ + 1e-6))
        θ = θ − lr · weight_decay · θ
        m = β₁ m + (1 − β₁) g                      v = β₂ v + (1 − β₂) g²
        θ = θ − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + eps)

    in float32 (float64 of float64), whatever parameters and states are held in. The step is PyTorch's fused one where
    PyTorch runs it: the same bits. It never waits for the device.

    Args:
        params: parameters, named parameters, or groups of them, of float16, bfloat16, float32 or float64. DTensors, as
            torch.distributed.fsdp.fully_shard makes them, are updated shard by shard.
        lr: a number, or a tensor of one element: on the device it may change under a captured graph.
        betas: numbers, or tensors of one element on the CPU.
        eps, weight_decay, maximize: as torch.optim.AdamW's.
        amsgrad: divide by the largest average of squares so far.
        foreach, fused: torch.optim.AdamW chooses among its implementations by them. This one is always fused and over
            all tensors at once: None and True are what it does, foreach=False too. fused=False asks for what it
            is not, and is refused; so are both True at once, as there.
        capturable: the step may be captured in a CUDA graph. It computes the same without; torch's check of it while a
            graph is captured is kept. Warm up with a step first.
        differentiable: False; a step that autograd differentiates is torch.optim.AdamW's.
        max_norm: all gradients, of all groups, are scaled to a norm of at most this before the update, as
            torch.nn.utils.clip_grad_norm_ does, but inside of the step: `.grad` stays as it is. The norm is summed in
            float32 in a fixed order, over every dimension of a mesh that a parameter is spread over. math.inf measures
            and clips nothing. None: neither. No part of the state_dict.
        stochastic_rounding: bfloat16 parameters, of which no float32 copy is held, are rounded up or down at random,
            with the probability that makes the mean exact: an update smaller than half a unit in the last place is not
            lost. The random numbers are Philox's, keyed by `seed`, counted by the element's place in the whole
            parameter, the parameter's number among all of the optimizer's, and the step: the same bits on every
            sharding and in a resumed run. Parameters of float32 and float64 are rounded to the nearest. What is
            a shard without being a DTensor counts as a whole.
        state_dtype: of the averages. None is the parameter's, as torch's; torch.float32 is at least that; "int8" is 8
            bits in blocks of 256 elements that never cross a row of dimension 0, by the dynamic map of Dettmers et al.
            (gptkern/operators/adamw/blockwise.py), and float32 of parameters with fewer than two dimensions or rows of
            less than 64 elements. With "int8" hand torch.optim.AdamW `to_float_state_dict()`, not `state_dict()`.
        seed: of the rounding at random, a whole number from 0 to 2⁶³ − 1.

    `stochastic_rounding`, `state_dtype` and `seed` may differ from group to group. `grad_norm` is the norm before it
    was clipped (and after the gradients were unscaled), 0-d on the device: None before the first step and where
    max_norm is None.

    torch.amp.GradScaler leaves unscaling and skipping to the step, as it does to PyTorch's fused optimizers (attributes
    `grad_scale` and `found_inf`): where a gradient overflowed nothing changes, the count of steps included. Unlike
    PyTorch's, `.grad` is not unscaled in place.

    state_dict and load_state_dict exchange with torch.optim.AdamW's both ways, with `step`, `exp_avg`, `exp_avg_sq` and
    `max_exp_avg_sq`; steps are float32 on the device. What is loaded is brought into `state_dtype`: averages in 8 bits
    have keys of their own (`exp_avg_codes`, `exp_avg_absmax`, `exp_avg_sq_codes`, `exp_avg_sq_absmax`), are made from
    floating ones, and the other way round. torch.optim.AdamW knows none of these keys: its load_state_dict ends with a
    ValueError that names `to_float_state_dict()`, which it takes; the updates are under `step_of_codes` there.

    Raises:
        TypeError: params holds what is no tensor.
        ValueError: a hyperparameter out of its range, complex or integer parameters, options that contradict each
            other, a gradient that is sparse or not spread as its parameter is (RuntimeError, as torch's, of sparse
            ones), a state of another shape; the message names it, and nothing has changed.
        RuntimeError: differentiable, or foreach and fused both.

    Backends: torch; triton and cuda for parameters of float16, bfloat16 and float32.

    Sources: Loshchilov, Hutter, 2019 (arXiv:1711.05101); Reddi, Kale, Kumar, 2018 (amsgrad); Dettmers, Lewis, Shleifer,
    Zettlemoyer, 2022 (arXiv:2110.02861).
    """

    # What torch.amp.GradScaler asks for.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        stochastic_rounding: bool = False,
        state_dtype: torch.dtype | str | None = None,
        seed: int = 0,
    ):
        _check_implementation(foreach, differentiable, fused)
        if isinstance(lr, torch.Tensor) and foreach and not capturable:
            raise ValueError(
                "AdamW: lr is a tensor and foreach True; capturable needs to be True then, or foreach None"
            )
        if max_norm is not None and not (
            isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool) and max_norm >= 0
        ):
            raise ValueError(f"AdamW: max_norm is {max_norm!r}; it needs to be a number from 0 on, or None")
        self.max_norm = max_norm
        self.grad_norm: torch.Tensor | None = None
        self._own = {"stochastic_rounding": stochastic_rounding, "state_dtype": state_dtype, "seed": seed}
        self._places: dict[torch.Tensor, tuple] = {}
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable, fused=True
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's. A group may have its own `stochastic_rounding`, `state_dtype` and `seed`.

        Raises:
            ValueError: its options or parameters are none that this optimizer takes.
        """
        for key, value in self._own.items():
            self.defaults.setdefault(key, value)
        if isinstance(param_group, dict) and "params" in param_group:
            if "max_norm" in param_group:
                raise ValueError("AdamW: a group has max_norm; it is of all groups together: AdamW(…, max_norm=)")
            implementation = (param_group.get(key) for key in ("foreach", "differentiable", "fused"))
            _check_implementation(*implementation)
            options = {**self.defaults, **param_group, "foreach": None, "differentiable": False, "fused": True}
            params = param_group["params"]
            if isinstance(params, torch.Tensor):
                params = [params]
            elif not isinstance(params, set):
                params = param_group["params"] = list(params)
            # (name, parameter) or the parameter
            tensors = [each[1] if isinstance(each, tuple) and len(each) == 2 else each for each in params]
            _check_group(options, [each for each in tensors if isinstance(each, torch.Tensor)])
            param_group = {**param_group, "foreach": None, "differentiable": False, "fused": True}
        super().add_param_group(param_group)

    # --- The step -----------------------------------------------------------------------------------------------------

    # While something compiles it is left as it is: one launch, of which nothing could be fused.
    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the model anew and returns the loss, which is returned.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All gradients are looked at before anything changes.
        items = self._items()
        clip = self._clip([item[1:] for of_group in items for item in of_group])
        calls = [
            self._call(kind, group, clip)
            for group, of_group in zip(self.param_groups, items)
            for kind in self._kinds(of_group, group)
        ]
        for call in calls:
            start(call)
        return loss

    def _items(self) -> list[list[tuple[int, torch.Tensor, torch.Tensor]]]:
        """Of each group (number, parameter, gradient) of what has one: the parameter's place among all."""
        number, items = 0, []
        for group in self.param_groups:
            if any(isinstance(beta, torch.Tensor) and not beta.is_cpu for beta in group["betas"]):
                raise ValueError("AdamW: betas are on a GPU; they need to be numbers, or tensors on the CPU")
            found = []
            for index, param in enumerate(group["params"]):
                grad = param.grad
                if grad is not None:
                    if type(grad) is not torch.Tensor or grad.layout != torch.strided or sharding.is_sharded(param):
                        grad = _checked_gradient(_name(group, index, number), param, grad)
                    found.append((number, param, grad))
                number += 1
            items.append(found)
        return items

    def _clip(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """What gradients are multiplied by, 0-d on the device; keeps the norm.

        Args:
            pairs: (parameter, gradient).
        """
        if self.max_norm is None or not pairs:
            return None
        norms = sharding.norms_over_meshes(pairs, norm_of)
        device = norms[0].device
        norm = norms[0]
        if len(norms) > 1:
            norm = torch.linalg.vector_norm(torch.stack([each.to(device, non_blocking=True) for each in norms]), 2)
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            norm = norm / scale.to(device, non_blocking=True).reshape(())
        self.grad_norm = norm
        if math.isinf(self.max_norm):
            return None
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def _kinds(self, items: list[tuple], group: dict[str, Any]) -> Iterable[list[tuple]]:
        """The group's items in lists that one call may take, as (parameter, gradient, state, where it lies), of this
        process's own tensors."""
        kinds: dict[tuple, list[tuple]] = {}
        rounding = group["stochastic_rounding"]
        for number, param, grad in items:
            state = self.state[param]
            if not state:
                state.update(states.first(param, group))
            place = ()
            if rounding and param.dtype == torch.bfloat16:
                if param not in self._places:
                    self._places[param] = sharding.place_of(param)
                place = number, *self._places[param]
            if sharding.is_sharded(param):
                state = {key: sharding.local(value) for key, value in state.items() if isinstance(value, torch.Tensor)}
                param, grad = sharding.local(param), sharding.local(grad)
            held = state["exp_avg"] if "exp_avg" in state else state["exp_avg_codes"]
            kind = param.device, param.dtype, grad.dtype, held.dtype
            kinds.setdefault(kind, []).append((param, grad, state, place))
        return kinds.values()

    def _call(self, items: list[tuple], group: dict[str, Any], clip: torch.Tensor | None) -> Call:
        params, grads, held, places = zip(*items)
        device, dtype = params[0].device, statistics_dtype(params[0])
        coded = "exp_avg_codes" in held[0]
        keys = ("exp_avg_codes", "exp_avg_sq_codes") if coded else ("exp_avg", "exp_avg_sq")
        lists = [[state[key] for state in held] for key in keys]
        lists.append([state["max_exp_avg_sq"] for state in held] if group["amsgrad"] else [])
        scales = ("exp_avg_absmax", "exp_avg_sq_absmax")
        lists += [[state[key] for state in held] for key in scales] if coded else [[], []]
        lr, on_device = group["lr"], None
        if isinstance(lr, torch.Tensor) and lr.is_cpu == (device.type == "cpu"):
            on_device = lr.to(device, non_blocking=True).reshape(())
        scale, found = (
            None if value is None else value.to(device, torch.float32, non_blocking=True).reshape(())
            for value in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        return Call(
            list(params), list(grads), *lists,
            steps=[state["step"] for state in held],
            places=[number for place in places for number in place],
            lr=float(lr) if on_device is None else 0.0,
            lr_on_device=on_device,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            seed=group["seed"] if places[0] else None,
            grad_scale=scale,
            found_inf=found,
            clip=None if clip is None else clip.to(device, dtype, non_blocking=True),
        )  # fmt: skip

    # --- State --------------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Optimizer's. Averages in 8 bits stay so: torch.optim.AdamW refuses them when it loads them
        (ValueError), and takes `to_float_state_dict()`."""
        found = super().state_dict()
        return {**found, "state": {key: states.saved(value) for key, value in found["state"].items()}}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this optimizer's `state_dict`, or torch.optim.AdamW's, was taken. All of it is checked first.

        Hyperparameters are the loaded ones, as with torch.optim.AdamW; those that it has not (stochastic_rounding,
        seed) only where they were saved. state_dtype stays this optimizer's: averages are converted to it.

        Raises:
            ValueError: groups or states do not fit the parameters; the message names what.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        state_dict = {
            **state_dict, "state": {key: states.opened(value) for key, value in state_dict["state"].items()}
        }  # fmt: skip
        given = [param_id for group in state_dict["param_groups"] for param_id in group["params"]]
        if [len(group["params"]) for group in state_dict["param_groups"]] == [
            len(group["params"]) for group in self.param_groups
        ]:
            # What is another number of groups or parameters, torch.optim.Optimizer names.
            merged = [
                {**own, **loaded, "state_dtype": own["state_dtype"], "params": own["params"]}
                for own, loaded in zip(self.param_groups, state_dict["param_groups"])
            ]
            for group in merged:
                _check_group(group, group["params"])
            for param_id, (name, param, group) in zip(given, _named(merged)):
                states.check(name, param, state_dict["state"].get(param_id, {}), group["amsgrad"])
        # Optimizer would cast all to the parameter's dtype: what is no tensor, dict or iterable it leaves alone.
        sealed = {key: _Sealed(value) if key in set(given) else value for key, value in state_dict["state"].items()}
        hooks, self._optimizer_load_state_dict_pre_hooks = self._optimizer_load_state_dict_pre_hooks, OrderedDict()
        try:
            super().load_state_dict({**state_dict, "state": sealed})
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm, "_own": self._own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        self.__dict__.update({"grad_norm": None, "_places": {}})
        # torch.optim.Adam's reads the states, which have to be open by then.
        sealed = {param: value for param, value in state["state"].items() if isinstance(value, _Sealed)}
        for index, group in enumerate(state["param_groups"]):
            own = before[index] if before else state.get("defaults", {})
            for key in _OWN:
                group.setdefault(key, own[key])
            if before:
                group["state_dtype"] = own["state_dtype"]
            group.update(foreach=None, differentiable=False, fused=True)
            for param in group["params"]:
                if param in sealed:
                    state["state"][param] = states.converted(param, sealed[param].value, group)
        super().__setstate__(state)

    def to_float_state_dict(self) -> dict[str, Any]:
        """The state_dict as torch.optim.AdamW has it: averages in float32 in place of codes, none of the keys that it
        has not."""
        found = super().state_dict()
        params = [param for _, param, _ in _named(self.param_groups)]
        floating = {
            key: states.decoded(params[key], value) if "exp_avg_codes" in value else value
            for key, value in found["state"].items()
        }
        groups = [{key: value for key, value in group.items() if key not in _OWN} for group in found["param_groups"]]
        return {**found, "state": floating, "param_groups": groups}


class _Sealed:
    """The state of one parameter on its way through torch.optim.Optimizer.load_state_dict."""

    def __init__(self, value: dict[str, Any]):
        self.value = value

    def __deepcopy__(self, memo):
        return self


def _named(groups: list[dict[str, Any]]) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(what an error calls it, the parameter, its group)"""
    number = 0
    for group in groups:
        for index, param in enumerate(group["params"]):
            yield _name(group, index, number), param, group
            number += 1


def _name(group: dict[str, Any], index: int, number: int) -> str:
    names = group.get("param_names")
    return f"parameter {number}" if names is None else f"parameter {names[index]!r}"


def _checked_gradient(name: str, param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient, spread as the parameter is."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"AdamW: the gradient of {name} is sparse; it needs to be dense")
    if sharding.is_sharded(grad) != sharding.is_sharded(param):
        raise ValueError(f"AdamW: of {name} one of parameter and gradient is a DTensor; both need to be")
    return sharding.spread_as(param, grad)


def _check_implementation(foreach, differentiable, fused) -> None:
    if differentiable:
        raise RuntimeError(
            "AdamW: differentiable is True; the step is fused, which autograd does not see: use torch.optim.AdamW"
        )
    if fused and foreach:
        raise RuntimeError("AdamW: foreach and fused are both True; at most one may be")
    if fused is not None and not fused:
        raise ValueError(f"AdamW: fused is {fused}; the step is always fused: leave it out, or use torch.optim.AdamW")


def _check_group(group: dict[str, Any], params: list[torch.Tensor]) -> None:
    state_dtype, seed, rounding = group["state_dtype"], group["seed"], group["stochastic_rounding"]
    if group.get("differentiable"):
        raise ValueError("AdamW: differentiable is True; the step is fused, which autograd does not see")
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f'AdamW: state_dtype is {state_dtype!r}; it needs to be None, torch.float32 or "int8"')
    if state_dtype == "int8" and group["amsgrad"]:
        raise ValueError('AdamW: amsgrad is True and state_dtype "int8"; the largest average is not held in 8 bits')
    if not isinstance(rounding, bool):
        raise ValueError(f"AdamW: stochastic_rounding is {rounding!r}; it needs to be True or False")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"AdamW: seed is {seed!r}; it needs to be a whole number from 0 to 2**63 - 1")
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(f"AdamW: lr is {tuple(lr.shape)}, {lr.dtype}; it needs one element, floating point")
    elif not lr >= 0:
        raise ValueError(f"AdamW: lr is {lr!r}; it needs to be a number from 0 on")
    for index, beta in enumerate(group["betas"]):
        if isinstance(beta, torch.Tensor):
            if not beta.is_cpu:
                raise ValueError(f"AdamW: betas[{index}] is on {beta.device}; it needs to be a number, or on the CPU")
        elif not 0 <= beta < 1:
            raise ValueError(f"AdamW: betas[{index}] is {beta!r}; it needs to be from 0 to below 1")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"AdamW: {name} is {group[name]!r}; it needs to be a number from 0 on")
    for index, param in enumerate(params):
        if param.dtype not in FLOATING:
            needs = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
            raise ValueError(f"AdamW: {_name(group, index, index)} of a group is {param.dtype}; it needs {needs}")
        if rounding and param.dtype == torch.float16:
            raise ValueError(
                f"AdamW: {_name(group, index, index)} of a group is float16; stochastic_rounding is for bfloat16"
            )
        if sharding.is_sharded(param):
            spread = sharding.sharded_dimensions(param)
            if state_dtype == "int8" and blockwise.is_coded(param.shape) and set(spread) - {0}:
                raise ValueError(
                    f"AdamW: {_name(group, index, index)} of a group is spread over dimension {max(spread)}; "
                    'state_dtype "int8" needs whole rows of dimension 0'
                )
