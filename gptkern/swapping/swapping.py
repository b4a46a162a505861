"""swap(model), unswap(model), kernels(): gptkern's operators in a model that was written without them.

    torch.nn.LayerNorm, RMSNorm, Softmax, GELU, SiLU
                                            change their class to the twin in gptkern.nn
    a module whose forward calls F.scaled_dot_product_attention, F.layer_norm, F.rms_norm or F.softmax inline
                                            changes its class to a subclass of its own, whose forward is the
                                            original one with those calls rerouted (gptkern.swapping.rerouting)
    a module of transformers (gptkern.swapping.transformers)
                                            gets its attention by the name "gptkern"; a rotary embedding or a norm in
                                            code that is known is rerouted as above
    a forward that multiplies with an activation, or takes its own loss (gptkern.swapping.edits)
                                            changes its class likewise; its code is changed by its source

A swapped module is the same object with the same parameters, buffers, hooks and state_dict keys; its original class
and config are noted in its `__dict__`, from where `unswap` takes them back. No global is touched.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch.overrides import TorchFunctionMode

from gptkern.swapping import routed_classes
from gptkern.swapping.originals import BY_NAME, CONFIGS, ORIGINAL, bare, in_place_of, is_replacement, original_class
from gptkern.swapping.plan import Plan
from gptkern.swapping.report import Restored, SwapReport, UnswapReport
from gptkern.swapping.twins import LOSS, SWAPPABLE

_logger = logging.getLogger("gptkern")


def swap(
    model: torch.nn.Module, ops: Iterable[str] | None = None, strict: bool = False, *, fused_loss: bool = False
) -> SwapReport:
    """Put gptkern's operators into a model, in place.

    Replaced are modules of exactly the type `torch.nn.LayerNorm`, `RMSNorm` or `Softmax`; modules whose forward calls
    `F.scaled_dot_product_attention`, `F.layer_norm`, `F.rms_norm` or `F.softmax`, itself, in a method of its own, or in
    a function of its own package; `torch.nn.MultiheadAttention` and `torch.nn.TransformerEncoder`, which then keep to
    Python in eval mode; a block's `x = x + f(x)` for which a norm is called next, which becomes one call of that norm's
    operator with `residual=` ("residual_norm" in `ops`); and of transformers' models the attention, the rotary
    embedding and Llama's norm. `F.gelu`, `F.silu`, their modules and transformers' classes for them run on
    "nonlinearity" (while torch.compile compiles, and no backend is forced, on PyTorch, since Inductor writes them into
    other kernels); a product `act(gate) * up` with one of them, found in the forward's source, is swiglu or geglu in
    one call, of the packed tensor where gate and up are its halves and nothing else reads them. `F.cross_entropy` is
    gptkern's, in a torch.nn.CrossEntropyLoss too; transformers' `self.loss_function`, which calls it in another file,
    is named as skipped where "cross_entropy" is asked for by `ops`. A call that cannot be read off the code (a function
    looked up in a table, a tensor's method) is not found: `gptkern.kernels()` reaches it. Attention or a norm that is
    written out in Python is named as skipped, as is a method called by `super()` that makes such calls, and the
    generated code of a torch.fx.GraphModule.

    A sum and its norm are computed together at the calls at which nobody can see it: not where the norm has hooks, a
    forward or a class of its own, nor where PyTorch runs both (a CPU). The norm may be one of the block, or, in a model
    whose blocks stand in a torch.nn.ModuleList and return such a sum, the first of the next block or the model's last:
    these not inside torch.compile, inference mode or activation checkpoints, nor where one of the blocks has hooks.
    Autograd sees a sum and its norm, as in the stock model: who keeps the sum, hooks it or asks for its gradient gets
    the whole of it.

    A rerouted module gets a subclass of its class, so a class's own `__init_subclass__` runs; where that raises, where
    the module refuses another class, or its own code asks for its exact class, it is skipped. Other code that knows a
    module by its exact class (`type(block) is LayerNorm`, a registry of subclasses) sees the other one. A lazy module
    stays swapped in what its first call makes of it. A method that is patched on the class later counts, routed again,
    from the next call on, and a global that is changed at once, as they do without a swap; what torch.compile has
    traced follows where it would for the stock model (not a method other than forward that is patched).

    Parameters stay the same objects, state_dict keys stay the same; dropout, eps, hooks, requires_grad and the
    training flag are not looked at. A second call changes nothing. `gptkern.unswap` takes it back.

    Args:
        model: any module; shared submodules are swapped once.
        ops: the operators to put in, of `gptkern.swapping.SWAPPABLE`; all by default.
        strict: raise where anything asked for has to be skipped.
        fused_loss: the loss that the model's own forward takes of the logits of its head (transformers' causal models
            with `labels`, the reference GPT with `targets`, and others whose source shows no more between head and loss
            than a factor, a softcap, `.float()`, a view as rows of the vocabulary, a slice of positions or the classes
            moved to the second dimension) runs on `linear_cross_entropy`, which makes no logits: a call with targets
            then returns the loss, and None for the logits. The loss is F.cross_entropy, a torch.nn.CrossEntropyLoss
            that the forward makes or the module holds, or transformers' `loss_function`, with their options, and has
            the dtype that it had. transformers' tuples (`return_dict=False`, an output's `[…]`) leave them out: `[1]`
            is then what came behind them, as a rule the cache. A call without targets is unchanged. Where it is not
            known what a forward does with its logits, or that nothing is written between its head and its loss, it is
            left alone, and the report says why, with the file and line. Where a head or a loss is another one by the
            time of a call, or a size that the code takes for the vocabulary's is not the head's, the logits are made,
            and a warning says so; torch.jit.trace records the stock forward.

    Returns:
        The report: what was replaced, and what was left alone and why.

    Raises:
        TypeError: model is no torch.nn.Module, ops is a string, or fused_loss is no bool.
        ValueError: ops names an unknown operator.
        RuntimeError: strict, and something was skipped; the model is then unchanged.
    """
    operators = _checked_operators(ops)
    if not isinstance(fused_loss, bool):
        raise TypeError(f"swap: fused_loss is {fused_loss!r}; it needs True or False")
    operators = (*operators, LOSS) if fused_loss else operators
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"swap: model is a {type(model).__name__}; it needs a torch.nn.Module")
    plan = Plan(model, operators)
    for name, module in model.named_modules():
        plan.decide(name or "(model)", module)
        if ops is not None:
            plan.name_loss_elsewhere(name or "(model)", module)
    plan.name_missing_loss()
    report = plan.report
    if strict:
        plan.refuse_to_skip()
    plan.carry_out(strict)
    _logger.info("swap: %s", report)
    return report


def unswap(model: torch.nn.Module) -> UnswapReport:
    """Take gptkern's operators out of a model again, in place: each swapped module gets its original class back.

    Modules that were built as gptkern.nn modules stay. A model that was never swapped is left as it is.

    Returns:
        The report: what was restored.

    Raises:
        TypeError: model is no torch.nn.Module.
        RuntimeError: a module's class was changed again after the swap; the model is then unchanged.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"unswap: model is a {type(model).__name__}; it needs a torch.nn.Module")
    swapped = [(name, module) for name, module in model.named_modules() if ORIGINAL in module.__dict__]
    for name, module in swapped:
        current, original = bare(type(module)), original_class(module)
        # A class with a __reduce__ of its own gives copies of its own class, with the note.
        if current is not original and not is_replacement(current, original):
            raise RuntimeError(
                f"unswap: {name or '(model)'} became a {type(module).__name__} after it was swapped (a "
                "parametrisation, say); undo that first. The model is unchanged"
            )
    names = {module: name or "(model)" for name, module in model.named_modules()}
    restored: dict[str, str] = {}
    for _, module in swapped:
        # A module that refuses attributes by now has to be given back all the same.
        object.__setattr__(module, "__class__", in_place_of(type(module), original_class(module)))
        del module.__dict__[ORIGINAL]
        restored[names[module]] = bare(type(module)).__name__
    for module in model.modules():
        if CONFIGS in module.__dict__:
            module.__dict__.pop(routed_classes.PREPARE_SCRIPTABLE, None)
        is_by_name = module.__dict__.pop(BY_NAME, False)
        for attribute, config in module.__dict__.pop(CONFIGS, {}).items():
            # Another config that was put there since stays.
            if module.__dict__.get(attribute) is config.current:
                module.__dict__[attribute] = config.restore()
                # Others hold the config, too; nothing of theirs was replaced.
                if is_by_name:
                    restored.setdefault(names[module], type(module).__name__)
    return UnswapReport([Restored(name, cls) for name, cls in restored.items()])


def kernels(ops: Iterable[str] | None = None) -> TorchFunctionMode:
    """`with gptkern.kernels():` routes the calls of PyTorch's functions made inside it to gptkern's operators.

    Routed are F.scaled_dot_product_attention, F.layer_norm, F.rms_norm, F.softmax, torch.softmax and
    Tensor.softmax, F.gelu, F.silu and F.cross_entropy (what PyTorch's own modules call inside their C++ or
    composite functions, as torch.nn.MultiheadAttention does, is not seen; nor is a rotary embedding, for which
    PyTorch has no function). It holds in the thread that enters it, and nests.

    Args:
        ops: the operators to route, of `gptkern.swapping.SWAPPABLE`; all by default.

    Raises:
        TypeError: ops is a string. ValueError: ops names an unknown operator.
    """
    return routed_classes.Routing(_checked_operators(ops))


def _checked_operators(ops: Iterable[str] | None) -> tuple[str, ...]:
    if ops is None:
        return SWAPPABLE
    if isinstance(ops, str) or not isinstance(ops, Iterable):
        raise TypeError(f"ops is {ops!r}; it needs a list of operators, as ['layer_norm']")
    ops = tuple(ops)
    for operator in ops:
        if operator not in SWAPPABLE:
            raise ValueError(f"ops holds {operator!r}; it needs any of {', '.join(map(repr, SWAPPABLE))}")
    # One order, so that the same request gives the same class.
    return tuple(operator for operator in SWAPPABLE if operator in ops)
