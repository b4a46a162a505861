"""cross_entropy: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    s    = logit_scale * x,  then softcap * tanh(s / softcap) where there is a softcap
    lse  = log sum_c exp(s_c)
    loss = sum_c t_c * w_c * (lse - s_c)  +  z_loss * lse² * own        t: the target after label smoothing

own is w_y of a target that is a class y, and 1 of class probabilities. `mean` divides the sum over rows by that of own.

Backward, with p = softmax(s), e the label smoothing, C classes, and g the gradient that reaches the row:
    dx_j = g * ds/dx * (p_j * (rest + 2 * z_loss * lse * own)  -  rest_j  +  (1 - e) * w_y * (p_j - [j = y]))
    of a class            rest_j = e / C * w_j                          rest = sum_j rest_j
    of probabilities      rest_j = ((1 - e) * t_j + e / C) * w_j        (and no third term)
    p_y - 1 = -exp(log_others - log_total)

A row keeps m = max(s), log_total = log sum_c exp(s_c - m), log_others, the same without the target's class, and rest.
p_y - 1 is never computed as that: near p_y = 1 it would have no digits left.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch, few_logits, tracing
from gptkern.backends.losses import (
    NO_EXTENSION,
    CrossEntropyStats,
    LossOptions,
    checked_options,
    compute_dtype,
    is_probabilities,
    legacy_reduction,
    own_weights,
    reduced,
    row_losses,
    scores,
    stats_of,
    without_ignored,
)
from gptkern.backends.registration import KernelFunction, Operator, Written, needs_gradient, once_differentiable
from gptkern.backends.unseen import is_unseen

# The torch backend: bare launchers in plain PyTorch.
from gptkern.operators.cross_entropy.pytorch import backward, forward, row_shape, unsupported

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
__all__ = ["CrossEntropyFunction", "backward", "cross_entropy", "forward", "row_shape", "unsupported"]


class Call(NamedTuple):
    """A checked call. Rows are (N, d1, …), classes the second dimension; a single row came as one of N = 1."""

    input: torch.Tensor  # (N, C, d1, …)
    target: torch.Tensor  # (N, d1, …) int64 or uint8: classes;  (N, C, d1, …) floating point: probabilities
    weight: torch.Tensor | None  # (C,)
    reduction: str  # "none", "mean" or "sum"
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    dtype: torch.dtype  # the loss's
    need_stats: bool
    in_place_gradient: bool


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (), or of reduction "none" (N, d1, …)
    statistics: torch.Tensor  # (4, rows): m, log_total, log_others, rest; float32 (float64)
    denominator: torch.Tensor | None  # (): what "mean" divided by, where the targets are classes; as statistics
    written: Written | None  # (N, C, d1, …): the logits, where their gradient is written over them


@dispatch.twin_of(F.cross_entropy)
def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
    in_place_gradient: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, CrossEntropyStats]:
    """Cross-entropy of logits and targets, the twin of `torch.nn.functional.cross_entropy`.

        s = logit_scale * input,  then softcap * tanh(s / softcap) where there is a softcap
        lse = log sum_c exp(s_c)
        loss = sum_c t_c * weight_c * (lse - s_c)  +  z_loss * lse² * weight_y

    with t the target after label smoothing. The logits are read once, and once more in the backward, which writes
    their gradient. Sums are kept in float32 (float64 for float64 input).

    Args:
        input: (C,), (N, C) or (N, C, d1, …), floating point: logits, any C, any strides.
        target: (), (N,) or (N, d1, …) of classes, int64 or uint8; or of the input's shape, floating point: class
            probabilities.
        weight: (C,), or None: multiplies the loss of each class. Of the input's dtype.
        size_average, reduce: PyTorch's older names of `reduction`, with its warning.
        ignore_index: a class whose rows have loss 0 and gradient 0, whatever they hold, NaN too. (Where PyTorch runs a
            GPU's call a row of NaN has a gradient of NaN, as F.cross_entropy's: nobody looks at a GPU's values.)
        reduction: "none", "mean" or "sum". "mean" divides by the sum of the weights of the targets that count, of
            probabilities by the number of rows; where nothing counts it is NaN, as PyTorch's.
        label_smoothing: from 0 to 1: so much of the target is spread over all classes evenly.
        z_loss: from 0 up: weight of lse², averaged as the loss is (of probabilities: without the classes' weights).
        softcap: above 0, or None.
        logit_scale: multiplies the logits; its gradient is not taken.
        return_stats: return the pair (loss, CrossEntropyStats).
        in_place_gradient: the backward writes the gradient over the logits and takes no memory of its own. What
            autograd has saved of them elsewhere raises by their version counter when it is used afterwards, this
            loss's own second backward too; a plain read sees the gradient. Inside torch.compile the compiler plans the
            memory, and the logits stay.

    Returns:
        A scalar, or for reduction "none" the target's shape (the input's without classes). Of the input's dtype;
        float32 under autocast; where probabilities or their weights are wider, theirs. Stats are float32 (float64) and
        bool, of the shape that reduction "none" gives.

    Raises (of the same type as PyTorch):
        RuntimeError: the target's shape or dtype does not fit; the weight's; ignore_index from 0 up beside
            probabilities; label_smoothing above 1; tensors on several devices.
        ValueError: the target's batch differs from the input's; the reduction's name; z_loss below 0; a softcap that is
            not above 0; in_place_gradient of a leaf that requires grad, or of logits whose elements share memory.
        NotImplementedError: the input is not floating point.
        IndexError: on a CPU, a class outside of 0 … C - 1.
        TypeError: an argument that must be a tensor or a number is none.

    Of a class outside of 0 … C - 1 kernels read nothing: the row's loss and gradient are NaN. (PyTorch's kernels end
    with an assertion on the device, after which the process cannot use it any more.)

    Backends: torch; triton for float16, bfloat16 and float32, forward and backward (no second derivative; probabilities
    or weights that require grad run on PyTorch); cuda for the same, of classes as targets and rows whose classes lie
    next to each other. Sums over rows have a fixed order: the same on every run.

    Sources: Szegedy et al., 2016 (arXiv:1512.00567) for label smoothing; Chowdhery et al., PaLM, 2022
    (arXiv:2204.02311) for the z-loss; Milakov, Gimelshein, 2018 (arXiv:1805.02867) for one pass over a row.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce, reduction)
    arguments = (
        input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, return_stats,
        in_place_gradient,
    )  # fmt: skip
    if (found := dispatch.recalled("cross_entropy", arguments)) is not None:
        return _on_kernels(Call(input, target, *found[1:]), found[0], True)
    choice = dispatch.settled(input)
    is_plain = not return_stats and not in_place_gradient and softcap is None and z_loss == 0.0 and logit_scale == 1.0
    if choice is not None and is_plain:
        return _on_pytorch(input, target, weight, ignore_index, reduction, label_smoothing)
    options = checked_options(
        "cross_entropy", reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale
    )  # fmt: skip
    _check(input, target, weight, options.ignore_index)
    if in_place_gradient:
        _check_may_be_written(input)
    if choice is None:
        call = _call(input, target, weight, options, bool(return_stats), bool(in_place_gradient))
        choice, unseen = dispatch.chosen("cross_entropy", call)
        if choice.backend != "torch":
            if unseen and weight is None and input.dim() > 1 and not (in_place_gradient or target.is_floating_point()):
                dispatch.remember("cross_entropy", arguments, (choice.backend, *call[2:]))
            found = _on_kernels(call, choice.backend, unseen)
            return found if input.dim() > 1 else _of_one_row(found, reduction)
        if is_plain:
            return _on_pytorch(input, target, weight, ignore_index, reduction, label_smoothing)
    return _extended_on_pytorch(input, target, weight, options, return_stats, in_place_gradient)


# --- Checks ---------------------------------------------------------------------------------------------------------


def _check(input, target, weight, ignore_index):
    for name, argument in (("input", input), ("target", target), ("weight", weight)):
        if not isinstance(argument, torch.Tensor) and (argument is not None or name != "weight"):
            raise TypeError(f"cross_entropy: {name} is a {type(argument).__name__}; it needs to be a Tensor")
    if not input.is_floating_point():
        raise NotImplementedError(f"cross_entropy: input is {input.dtype}; it needs a floating-point dtype")
    shape, wanted = tracing.sizes(input), tracing.sizes(target)
    if not shape:
        raise RuntimeError("cross_entropy: input is a scalar; it needs the shape (C,), (N, C) or (N, C, d1, …)")
    if shape == wanted:
        _check_probabilities(target, ignore_index)
    else:
        _check_classes(shape, target, wanted)
    classes = shape[0] if len(shape) == 1 else shape[1]
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"cross_entropy: {name} is on {tensor.device}; it needs the input's, {input.device}")
    if weight is None:
        return
    if tracing.sizes(weight) != (classes,):
        raise RuntimeError(f"cross_entropy: weight has shape {tuple(weight.shape)}; it needs one a class, ({classes},)")
    # Probabilities' weights take part in the promotion of dtypes; autocast widens both.
    if weight.dtype != input.dtype and shape != wanted and not _autocast_is_on(input):
        raise RuntimeError(f"cross_entropy: weight is {weight.dtype}; it needs the input's dtype, {input.dtype}")


def _check_probabilities(target, ignore_index):
    if not target.is_floating_point():
        raise RuntimeError(
            f"cross_entropy: target is {target.dtype} and of the input's shape, which are class probabilities; it "
            "needs a floating-point dtype"
        )
    if ignore_index >= 0:
        raise RuntimeError(
            f"cross_entropy: ignore_index is {ignore_index} beside class probabilities, of which none is ignored; it "
            "needs to be below 0"
        )


def _check_classes(shape, target, found):
    rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    if found != rows and not (len(shape) == 1 and found == (1,)):
        differs = len(shape) == 2 and len(found) == 1
        raise (ValueError if differs else RuntimeError)(
            f"cross_entropy: target has shape {tuple(target.shape)}; beside an input of shape {tuple(shape)} it needs "
            f"{tuple(rows)} of classes, or the input's shape of class probabilities"
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"cross_entropy: target is {target.dtype}; classes need int64 or uint8")


def _check_may_be_written(input):
    """Whether a gradient may be written over the logits."""
    # Inside torch.compile nothing is, and a view does not say of what.
    base = input if torch.compiler.is_compiling() or not input._is_view() else input._base
    for tensor, of in ((input, ""), (base, "a view of ")):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError(
                f"cross_entropy: in_place_gradient writes over the input, which is {of}a leaf that requires grad; it "
                "needs the result of an operation"
            )
    if any(size > 1 and stride == 0 for size, stride in zip(input.shape, input.stride())) or (
        # Strides that are symbols cannot be sorted.
        not torch.compiler.is_compiling() and _overlaps(input)
    ):
        raise ValueError(
            f"cross_entropy: in_place_gradient writes over the input, whose elements share memory (shape "
            f"{tuple(input.shape)}, strides {tuple(input.stride())}); it needs one that does not overlap itself"
        )


def _overlaps(input) -> bool:
    """Whether two elements may be one in memory: with the dimensions by stride, one is not wider than the next's."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(input.shape, input.stride()) if size > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def _autocast_is_on(input) -> bool:
    return input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)


def _result_dtype(input, target, weight) -> torch.dtype:
    """The loss's dtype, as PyTorch promotes and autocast widens."""
    dtype = input.dtype
    if is_probabilities(input, target):
        dtype = torch.promote_types(dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    return torch.float32 if dtype in _SIXTEEN_BITS and _autocast_is_on(input) else dtype


def _call(input, target, weight, options, need_stats, in_place_gradient) -> Call:
    dtype = _result_dtype(input, target, weight)
    if input.dim() == 1:
        input, target = input[None], target.reshape(1) if input.shape != target.shape else target[None]
    return Call(input, target, weight, *options, dtype, need_stats, in_place_gradient)


def _of_one_row(found, reduction):
    """What was computed as a batch of one row."""
    loss, stats = found if type(found) is tuple else (found, None)
    loss = loss.view(()) if reduction == "none" else loss
    return loss if stats is None else (loss, CrossEntropyStats(*(tensor.view(()) for tensor in stats)))


# --- The twin on PyTorch --------------------------------------------------------------------------------------------


def _on_pytorch(input, target, weight, ignore_index, reduction, label_smoothing):
    """PyTorch's own operator; 16 bits on a CPU in float32, rounded once, with the digits of p near 1."""
    if not _is_widened(input, target, weight):
        input = without_ignored(input, target, ignore_index)
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    options = checked_options("cross_entropy", reduction, ignore_index, label_smoothing, 0.0, None, 1.0)
    _check(input, target, weight, options.ignore_index)
    return _widened(input, target, weight, options, False, False)


def _is_widened(input, target, weight) -> bool:
    """Whether the call is one of 16 bits on a CPU that PyTorch takes too."""
    if not isinstance(input, torch.Tensor) or not input.is_cpu or input.dtype not in _SIXTEEN_BITS:
        return False
    if not isinstance(target, torch.Tensor) or not (weight is None or isinstance(weight, torch.Tensor)):
        return False
    if torch.overrides.has_torch_function_variadic(input, target, weight):
        return False
    return input.dim() > 0 and not input.is_nested and input.layout == torch.strided


def _extended_on_pytorch(input, target, weight, options, return_stats, in_place_gradient):
    if _is_widened(input, target, weight):
        return _widened(input, target, weight, options, return_stats, in_place_gradient)
    x = _WrittenOver.apply(input) if in_place_gradient and _may_write(input) else input
    loss = _plain(without_ignored(x, target, options.ignore_index), target, weight, options)
    if not return_stats:
        return loss
    return loss, stats_of(input, target, options.ignore_index, options.logit_scale, options.softcap)


def _may_write(input) -> bool:
    return needs_gradient(input) and not torch.compiler.is_compiling() and not tracing.is_transformed()


def _widened(input, target, weight, options, return_stats, in_place_gradient):
    stats = (
        stats_of(input, target, options.ignore_index, options.logit_scale, options.softcap) if return_stats else None
    )
    _check_range(input, target, options.ignore_index)
    is_few = input.dim() == 2 and weight is None and not in_place_gradient and options[2:] == NO_EXTENSION
    if is_few and few_logits.takes(input, target, input.shape[1]):
        dtype = _result_dtype(input, target, weight)
        loss = few_logits.cross_entropy(input, target, options.ignore_index, options.reduction, dtype)
        return loss if stats is None else (loss, stats)
    wants = needs_gradient(input, target, weight)
    others = needs_gradient(target if target.is_floating_point() else None, weight)
    if not wants or others or torch.compiler.is_compiling() or tracing.is_transformed():
        x = _WrittenOver.apply(input) if in_place_gradient and _may_write(input) else input
        loss = _plain(without_ignored(x, target, options.ignore_index), target, weight, options)
    else:
        call = _call(input, target, weight, options, False, in_place_gradient)
        loss = CrossEntropyFunction.apply(*call, "torch")
        loss = loss if input.dim() > 1 else _of_one_row(loss, options.reduction)
    return loss if stats is None else (loss, stats)


def _check_range(input, target, ignore_index):
    """PyTorch's IndexError of a class that there is none of, on a CPU."""
    if target.is_floating_point() or not tracing.has_values(target) or not target.numel():
        return
    classes, (least, most) = input.shape[0 if input.dim() == 1 else 1], target.aminmax()
    if least.item() >= 0 and most.item() < classes:
        return
    target = target.long()
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(outside.any()):
        raise IndexError(
            f"cross_entropy: target holds {int(target[outside][0])}; it needs classes from 0 to {classes - 1}, or "
            f"ignore_index, {ignore_index}"
        )


def _plain(input, target, weight, options):
    """The loss in PyTorch's operators, differentiable as often as they are."""
    reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    dtype = _result_dtype(input, target, weight)
    s = scores(input, logit_scale, softcap)
    if target.is_floating_point():
        target = target.to(torch.promote_types(target.dtype, s.dtype))
    weight = None if weight is None else weight.to(torch.promote_types(weight.dtype, s.dtype))
    if not z_loss:
        return F.cross_entropy(s, target, weight, None, ignore_index, None, reduction, label_smoothing).to(dtype)
    losses = row_losses(s, target, weight, ignore_index, label_smoothing, z_loss)
    if reduction == "mean" and is_probabilities(s, target):
        return losses.mean().to(dtype)
    denominator = None
    if reduction == "mean":
        denominator = own_weights(target, weight, ignore_index, losses.dtype).sum()
    return reduced(losses, denominator, reduction).to(dtype)


class _WrittenOver(torch.autograd.Function):
    """The identity, whose backward writes the gradient over the tensor: what kernels do in place, of PyTorch's."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input.view_as(input)

    @staticmethod
    def backward(ctx, gradient):
        (input,) = ctx.saved_tensors
        with torch.no_grad():
            written = input.detach()
            written.copy_(gradient)
        return once_differentiable("cross_entropy with in_place_gradient", [written], (gradient,), _REMEDY)[0]


_REMEDY = "The logits that it would need were written over."


# --- Registration and autograd --------------------------------------------------------------------------------------


def _forward_fake(call: Call):
    input, shape = call.input, row_shape(call)
    loss = input.new_empty(shape if call.reduction == "none" else (), dtype=call.dtype)
    dtype = compute_dtype(input.dtype)
    statistics = input.new_empty((4, math.prod(shape)), dtype=dtype)
    divides = call.reduction == "mean" and not call.target.is_floating_point()
    denominator = input.new_empty((), dtype=dtype) if divides else None
    if not call.need_stats:
        return loss, statistics, denominator, None, None, None
    lse, entropy = (input.new_empty(shape, dtype=dtype) for _ in range(2))
    return loss, statistics, denominator, lse, entropy, input.new_empty(shape, dtype=torch.bool)


def _backward_fake(gradient: Gradient, call: Call):
    return torch.empty_like(call.input) if gradient.written is None else None


TWIN = cross_entropy
OPERATOR = Operator("cross_entropy", Call, 6, _forward_fake, Gradient, 1, _backward_fake)


class CrossEntropyFunction(KernelFunction):
    """The autograd.Function of cross_entropy.

    `apply(input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, dtype,
    need_stats, in_place_gradient, backend)` -> loss; with need_stats (loss, lse, entropy, correct). The arguments are
    trusted: gptkern.functional.cross_entropy checks them.

    Args:
        input: (N, C, d1, …). target: (N, d1, …) of classes, or as the input. weight: (C,) or None; neither of these two
            gets a gradient.
        dtype: the loss's.
        backend: "torch", "triton" or "cuda".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(
        ctx, input, target, weight, reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, dtype,
        need_stats, in_place_gradient, backend, unseen=None,
    ):  # fmt: skip
        # Kernels walk it in steps of one element.
        weight = None if weight is None else weight.contiguous()
        options = reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, dtype
        call = Call(input, target, weight, *options, need_stats, in_place_gradient)
        loss, statistics, denominator, *stats = OPERATOR.forward(call, backend, unseen)
        # A gradient that nobody computed arrives as None, not as zeros in memory.
        ctx.set_materialize_grads(False)
        divides = reduction == "mean" and not target.is_floating_point()
        ctx.save_for_backward(input, target, weight, statistics, denominator if divides else None)
        ctx.options, ctx.in_place, ctx.backend = options, in_place_gradient, backend
        if not need_stats:
            return loss
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx, grad_output, *_):
        absent = (None,) * 13
        if grad_output is None or not ctx.needs_input_grad[0]:
            return None, *absent
        input, target, weight, statistics, denominator = ctx.saved_tensors
        if torch.is_grad_enabled() and ctx.backend == "torch" and not ctx.in_place:
            return _differentiable(ctx.options, input, target, weight, grad_output), *absent
        with torch.no_grad():
            # As the forward made them: saved_tensors_hooks may hand back other strides.
            statistics = statistics.contiguous()
            weight = None if weight is None else weight.contiguous()
            written = input.detach() if ctx.in_place and not torch.compiler.is_compiling() else None
            call = Call(input, target, weight, *ctx.options, False, ctx.in_place)
            dx = OPERATOR.backward(Gradient(grad_output, statistics, denominator, written), call, ctx.backend)
        remedy = (_REMEDY,) if written is not None else ()
        gradients = [dx if written is None else written]
        return *once_differentiable("cross_entropy", gradients, (grad_output, input), *remedy), *absent


def _differentiable(options, input, target, weight, grad_output):
    """The gradient as PyTorch's operators give it, to be differentiated again."""
    *options, dtype = options
    loss = _plain(input, target, weight, LossOptions(*options)).to(dtype)
    (gradient,) = torch.autograd.grad(loss, input, grad_output, create_graph=True)
    return gradient


def _on_kernels(call: Call, backend: str, unseen: bool | None):
    """-> loss, or the pair of it and the stats."""
    if call.weight is not None and not call.weight.is_contiguous():
        # Kernels walk it in steps of one element.
        call = call._replace(weight=call.weight.contiguous())
    if unseen is None:
        unseen = is_unseen(call)
    if not needs_gradient(call.input):
        loss, _, _, *stats = OPERATOR.forward(call, backend, unseen)
        return (loss, CrossEntropyStats(*stats)) if call.need_stats else loss
    apply = CrossEntropyFunction.apply_unseen if unseen else CrossEntropyFunction.apply
    found = apply(*call, backend, unseen)
    return (found[0], CrossEntropyStats(*found[1:])) if call.need_stats else found
