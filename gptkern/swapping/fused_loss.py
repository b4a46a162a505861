"""The loss of a model's own forward on gptkern's linear_cross_entropy, where the caller does not read the logits.

    logits = self.lm_head(hidden)                   hidden, where the loss will be taken
    loss = None
    if labels is not None:
        loss = self.loss_function(logits, labels, …)    linear_cross_entropy(hidden, lm_head.weight, labels, …)
    return Output(loss=loss, logits=logits)         logits=None, where the loss was taken

loss_code.py reads the forward's source, loss_change.py changes it; here is what the changed code calls. What a module
is may change after a swap. So a call looks whether the head is a plain nn.Linear without hooks, the loss PyTorch's or
transformers' own, a factor or a cap a number, what the code takes for the vocabulary's size the head's, and whether the
hidden states have as many dimensions as the code reads of the logits. Where one of them is not so, the forward is the
stock one, logits and all, and a warning says why, once. It also is while torch.jit.trace records, which keeps no None.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from gptkern import functional as F
from gptkern.backends import tracing
from gptkern.swapping import logits_code
from gptkern.swapping.activations import is_bare
from gptkern.swapping.loss_change import MAY_FUSE, OPTIONS, OURS
from gptkern.swapping.loss_code import CRITERION, CROSS_ENTROPY, FUNCTION, HELD, MADE, TRANSFORMERS, Site

UNKNOWN = object()  # a size before the call that it is of


def cells(site: Site) -> dict[str, Callable]:
    """What the changed code calls: whether the loss is fused, the loss, and what takes the place of the logits."""
    said: set[str] = set()

    def may_fuse(model, head, factor, softcap, called, hidden, *sizes) -> bool:
        if tracing.in_jit_trace():
            return False
        reason = reason_against(model, head, factor, softcap, called, site, sizes)
        if reason is None and site.rank is not None and hidden.dim() != site.rank:
            reason = f"its hidden states have {hidden.dim()} dimensions, and its code takes logits of {site.rank}"
        if reason is None:
            return True
        if not torch.compiler.is_compiling() and reason not in said:
            said.add(reason)
            name = type(model).__name__
            text = f"{name} computes its logits whole, and its loss of them: {site.where}: {reason}"
            warnings.warn(text, stacklevel=3)
        return False

    loss = {FUNCTION: _of_function, TRANSFORMERS: _of_transformers, MADE: _of_module, HELD: _of_module}[site.kind]

    def ours(head, factor, softcap, *args, **kwargs):
        if site.is_divided:
            factor = 1.0 / factor
        return loss(_Loss(site, head, factor, softcap), *args, **kwargs)

    return {MAY_FUSE: may_fuse, OURS: ours, OPTIONS: _Options, **logits_code.CELLS}


def reason_against(
    model: torch.nn.Module, head: object, factor: object, softcap: object, called: object, site: Site, sizes: tuple
) -> str | None:
    """Why a model's head and loss cannot run as one, as they are now; None where they can."""
    name = site.head
    if type(head) is not torch.nn.Linear:
        return f"its {name} is a {type(head).__name__}, not a torch.nn.Linear"
    if not is_bare(head):
        return f"its {name} has hooks, or a forward of its own"
    if type(head.weight) not in (torch.nn.Parameter, torch.Tensor):
        return f"the weight of its {name} is a {type(head.weight).__name__}, not a plain tensor"
    if site.factor is not None and not isinstance(factor, int | float):
        return f"its logits are scaled by a {type(factor).__name__}, not by a number"
    if site.is_divided and factor == 0:
        return "its logits are divided by 0"
    if site.softcap is not None and softcap is not None and not isinstance(softcap, int | float):
        return f"its logits are capped by a {type(softcap).__name__}, not by a number"
    for (text, _), size in zip(site.sizes, sizes):
        if size is not UNKNOWN and (not isinstance(size, int) or size != head.weight.shape[0]):
            return (
                f"its loss takes {text}, {size}, for the vocabulary, and its {name} has {head.weight.shape[0]} outputs"
            )
    return _reason_against_loss(model, called, site)


def _reason_against_loss(model: torch.nn.Module, called: object, site: Site) -> str | None:
    if site.kind == TRANSFORMERS and model.loss_function is not _causal_lm_loss():
        return "its loss function is not transformers' ForCausalLMLoss"
    if site.kind == FUNCTION and called is not CROSS_ENTROPY and called is not F.cross_entropy:
        return "its loss is not PyTorch's F.cross_entropy any more"
    if site.kind == MADE and called is not CRITERION:
        return "its loss is not a torch.nn.CrossEntropyLoss any more"
    if site.kind == HELD and not _is_criterion(type(called)):
        return f"its {site.criterion} is a {type(called).__name__}, not a torch.nn.CrossEntropyLoss"
    if site.kind == HELD and not is_bare(called):
        return f"its {site.criterion} has hooks, or a forward of its own"
    return None


def _is_criterion(cls: type) -> bool:
    # A swap for cross_entropy gives it a subclass of its own.
    return cls is CRITERION or (cls.__base__ is CRITERION and getattr(cls, "_gptkern_routed", None) is not None)


def _causal_lm_loss() -> Callable | None:
    return getattr(sys.modules.get("transformers.loss.loss_utils"), "ForCausalLMLoss", None)


class _Options(NamedTuple):
    """What a torch.nn.CrossEntropyLoss is made with, and keeps."""

    weight: torch.Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0


class _Loss:
    """F.cross_entropy of the logits that a head would make."""

    def __init__(self, site: Site, head: torch.nn.Linear, factor: float | None, softcap: float | None):
        self.site, self.head, self.factor, self.softcap = site, head, factor, softcap

    def __call__(self, input, target, weight=None, **options):
        """input: the hidden states, (rows, width), or (batch, length, width) where the classes are the logits' second
        dimension; target: as F.cross_entropy's."""
        if not self.site.is_moved:
            return self.of_rows(input, target, weight, **options)
        if target.dim() == input.dim():
            # (batch, classes, length): probabilities
            target = target.transpose(1, 2)
        if target.shape[:2] != input.shape[:2]:
            needs = f"it needs {tuple(input.shape[:2])}"
            raise ValueError(f"cross_entropy: target has {tuple(target.shape[:2])} batch and positions; {needs}")
        loss = self.of_rows(input.flatten(0, 1), target.flatten(0, 1), weight, **options)
        return loss.view(input.shape[:2]) if options.get("reduction") == "none" else loss

    def of_rows(self, input, target, weight, **options):
        """input: (rows, width); target: (rows,), or (rows, classes)."""
        head, is_float = self.head, self.site.is_float
        if weight is not None and (weight.dtype != input.dtype or torch.is_autocast_enabled(input.device.type)):
            # linear_cross_entropy would round the weights of a float32 loss to the dtype of the product.
            return F.cross_entropy(self.logits(input), target, weight, **options)
        if options.get("ignore_index") == -100:
            # PyTorch's default, which a criterion has with probabilities too; given, it would be an error there.
            del options["ignore_index"]
        return F.linear_cross_entropy(
            input,
            head.weight,
            target,
            linear_bias=head.bias,
            loss_dtype=torch.float32 if is_float else None,
            weight=weight,
            softcap=self.softcap,
            logit_scale=1.0 if self.factor is None else self.factor,
            **options,
        )

    def logits(self, input):
        logits = torch.nn.functional.linear(input, self.head.weight, self.head.bias)
        logits = logits if self.factor is None else logits * self.factor
        logits = logits.float() if self.site.is_float else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _of_function(loss: _Loss, input, target, weight=None, **options):
    return loss(input, target, weight, **options)


def _of_module(loss: _Loss, criterion: _Options | torch.nn.CrossEntropyLoss, input, target):
    return loss(
        input,
        target,
        criterion.weight,
        ignore_index=criterion.ignore_index,
        reduction=criterion.reduction,
        label_smoothing=criterion.label_smoothing,
    )


def _of_transformers(
    loss: _Loss,
    logits,  # in their place the hidden states (batch, length, width)
    labels,  # (batch, length), the tokens themselves: the next one is the target
    vocab_size,
    num_items_in_batch=None,
    ignore_index=-100,
    shift_labels=None,  # (batch, length), the targets
    **kwargs,
):
    """ForCausalLMLoss of the logits that the head would make of the hidden states."""
    if vocab_size != loss.head.weight.shape[0]:
        outputs = loss.head.weight.shape[0]
        raise ValueError(f"the head has {outputs} outputs; the loss's vocab_size is {vocab_size}")
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    found = loss(logits.flatten(0, -2), target, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return found
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(found.device)
    return found / num_items_in_batch
