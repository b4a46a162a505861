"""linear_cross_entropy: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    z = input @ linear_weight^T + linear_bias
    s = logit_scale * z,  and where softcap is given  s = softcap * tanh(s / softcap)
    lse = log sum_c exp s_c
    row = weight_y * ((1 - e) * (lse - s_y) + z_loss * lse²) + e / classes * sum_c weight_c * (lse - s_c)

with y the target, e the label smoothing; 0 where y is ignored. "mean" divides by the sum of weight_y.

Backward, with g the row's incoming gradient and p = exp(s - lse):
    dloss/ds_c = g * ((1 - e) weight_y (p_c - [c = y]) + e / classes (W p_c - weight_c) + 2 z_loss lse weight_y p_c)
where W is the sum of all weights. At the target p - 1 is minus the others' probabilities, summed as they go by.

The logits are never whole in memory: chunks.py says how they are cut. Plain tensors with few logits, and what is not
one class of a vocabulary a row (probabilities, K dimensions), are PyTorch's F.linear and F.cross_entropy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from gptkern.backends import dispatch, few_logits, tracing
from gptkern.backends.losses import NO_EXTENSION, CrossEntropyStats, LossOptions, checked_options
from gptkern.backends.registration import KernelFunction, Operator, autocast, needs_gradient, once_differentiable
from gptkern.backends.vocabulary import FEW_LOGITS, compute_dtype
from gptkern.operators.linear_cross_entropy import checks, chunks, reference, rows
from gptkern.operators.linear_cross_entropy.call import Call, Gradient

__all__ = ["Call", "Gradient", "LinearCrossEntropyFunction", "linear_cross_entropy"]

SMALL = FEW_LOGITS


def linear_cross_entropy(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
    loss_dtype: torch.dtype | None = None,
    group=None,
):
    """Cross-entropy of a linear layer's outputs, which are never whole in memory: the twin of
    `torch.nn.functional.linear_cross_entropy` (PyTorch 2.13), also for older ones, which have none.

        s = logit_scale * (input @ linear_weight^T + linear_bias)    (softcap: s = softcap * tanh(s / softcap))
        lse = log sum_c exp(s_c)
        row = weight_y * (lse - s_y + z_loss * lse²), smoothed as F.cross_entropy does;  0 where y is ignore_index

    The logits are computed in chunks and the gradients with them; sums, and the true class's p - 1, are float32
    (float64 for float64). Beyond inputs and gradients a call takes up to half of the gradients' memory, or 2^25 logits
    where that is more and a copy of the input. Gradients of what is frozen are not computed.

    Args:
        input: (width,) or (rows, width), floating point.
        linear_weight: (classes, width), or (classes, d_1, …, d_K, width) for a loss of K dimensions.
        target: class indices, () or (rows,), int64 or uint8; with K dimensions (rows, d_1, …, d_K). Or probabilities of
            the logits' shape.
        linear_bias: (classes,), with K dimensions (classes, d_1, …, d_K).
        weight: (classes,), how much each class counts; with `group` of the whole vocabulary.
        reduction: "mean" (divided by the sum of the weights of the targets that count; NaN where none does), "sum" or
            "none".
        ignore_index: the target of rows that do not count; None: -100. On a CPU they are left out before the first
            product; on a GPU, whose host does not know how many they are, products multiply all rows and kernels
            skip them.
        label_smoothing: from 0 to 1.
        options: None, or what has the fields of torch.nn.LinearCrossEntropyOptions (any object does: PyTorch before
            2.13 has no such class): then small logits are cut too. `batch_chunk_size` tokens of the whole vocabulary
            say how many logits a chunk has at most, and so does `chunking_method` by PyTorch's formula, but for "auto",
            which is our own. `acc_policy` and `acc_dtype` ask for no more than float32 sums, which there are always;
            `allow_retain_graph` for what always holds.
        z_loss: adds z_loss * lse² to each row, averaged as the loss is.
        softcap: caps the logits, above 0.
        logit_scale: multiplies the logits, before the cap.
        return_stats: returns the pair (loss, CrossEntropyStats), of lse, entropy and correct.
        loss_dtype: the loss's dtype. None: PyTorch's, which is the input's, and float32 under autocast.
        group: a torch.distributed process group over which linear_weight and linear_bias are sharded: rank r has
            classes r * n to (r + 1) * n, the same n on each. input, target and weight are the same on every rank, and
            so are the loss and the input's gradient.

    Returns:
        The loss: a scalar, or with "none" the target's shape. With return_stats also lse and entropy in float32
        (float64), and correct, bool: the likeliest class, of equal ones the first, is the target; each of the target's
        shape, without gradients, and 0 where ignored.

    Raises (of the same type as PyTorch):
        RuntimeError: shapes or dtypes that do not fit; tensors on several devices; ignore_index with probabilities;
            label_smoothing above 1.
        ValueError: another reduction; z_loss below 0; targets of another number than rows; softcap is not above
            0; options that PyTorch's class refuses; ranks with parts of several sizes.
        IndexError: on a CPU, a target that is no class. On a GPU its row's loss is NaN.
        TypeError: an argument that must be a tensor, a number or a process group is none.
        NotImplementedError: group with probabilities, K dimensions, a tensor subclass or under a transform; and a
            second derivative where logits were cut.

    Where the logits are whole, and everything is F.cross_entropy of F.linear: on the torch backend up to 2^22 of them,
    16 bits on a CPU apart, whose products would round them; probabilities and K dimensions (with `options` a warning
    says so), a `weight` that requires a gradient; under torch.func, forward mode and torch.jit.trace; of tensor
    subclasses. On a CPU in float32 and float64 with "mean" or "sum" the forward computes the gradients, which takes 3
    products; elsewhere the backward does, which computes the logits again: 4.

    Backends: torch, also for float64; triton for float16, bfloat16 and float32.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024 (arXiv:2411.09009), for the loss
    without its logits; Hsu et al., "Liger Kernel", 2024 (arXiv:2410.10989).
    """
    is_plain = (
        options is None and loss_dtype is None and not return_stats and group is None
        and z_loss == 0.0 and softcap is None and logit_scale == 1.0
    )  # fmt: skip
    if is_plain and _is_small_and_usual(input, linear_weight, target, linear_bias):
        index = -100 if ignore_index is None else ignore_index
        return reference.usual(input, linear_weight, target, linear_bias, weight, reduction, index, label_smoothing)
    logits_shape = checks.shapes(input, linear_weight, target, linear_bias, weight, ignore_index)
    checks.loss_dtype(loss_dtype)
    checks.process_group(group)
    loss_options = checked_options(
        "linear_cross_entropy", reduction, -100 if ignore_index is None else ignore_index, label_smoothing, z_loss,
        softcap, logit_scale,
    )  # fmt: skip
    count, classes, width = math.prod(input.shape[:-1]), linear_weight.shape[0], input.shape[-1]
    chunk = checks.chunk_elements(options, count, width, classes, input)
    tensors = input, linear_weight, target, linear_bias, weight
    choice, whole = dispatch.settled(input), _why_whole(tensors, logits_shape)
    if whole is None and options is None and group is None and _is_small(choice, input, logits_shape):
        whole = "the logits are few"
    if whole is not None:
        if group is not None:
            needs = "it needs class indices, plain tensors and one vocabulary"
            raise NotImplementedError(f"linear_cross_entropy: group is given and {whole}; {needs}")
        if options is not None:
            checks.warn_whole(whole)
        return reference.whole(*tensors, logits_shape, loss_options, return_stats, loss_dtype)
    return _chunked(*tensors, loss_options, choice, options is not None, chunk, return_stats, loss_dtype, group)


def _chunked(
    input,
    linear_weight,
    target,
    linear_bias,
    weight,
    options: LossOptions,
    choice,
    is_cut,
    chunk,
    return_stats,
    loss_dtype,
    group,
):
    """The twin where the logits are cut, or few and of 16 bits on a CPU.

    Args:
        is_cut: whether few ones are cut too.
    """
    shape, under_autocast = target.shape, _under_autocast(input)
    result_dtype = loss_dtype or (torch.float32 if under_autocast else input.dtype)
    input, linear_weight, linear_bias = autocast("lower", input, linear_weight, linear_bias)
    if weight is not None and under_autocast:
        # autocast's cross_entropy takes weights of any dtype
        weight = weight.to(input.dtype)
    target = target.long()
    is_one_row = input.dim() == 1
    if is_one_row:
        input, target = input[None], target[None]
    classes = linear_weight.shape[0] * (1 if group is None else group.size())
    checks.of_chunks(input, linear_weight, target, linear_bias, weight, classes)
    if input.is_cpu and tracing.has_values(target):
        checks.indices(target, options.ignore_index, classes)
    is_cut = is_cut or group is not None or is_one_row or weight is not None or options[2:] != NO_EXTENSION
    is_pytorchs = choice is not None and choice.backend == "torch" and input.is_cpu and input.dtype.itemsize == 2
    if is_pytorchs and not is_cut and few_logits.takes(input, target, classes):
        return reference.in_float32(
            input, linear_weight, target, linear_bias, options, bool(return_stats), result_dtype
        )  # fmt: skip
    name = None if group is None else group.group_name
    call = Call(
        input, linear_weight, target, linear_bias, weight, *options, result_dtype, bool(return_stats), chunk, name,
        False, False, False,
    )  # fmt: skip
    unseen = None
    if choice is None:
        choice, unseen = dispatch.chosen("linear_cross_entropy", call)
    if choice.backend in ("torch", dispatch.LAUNCHERS):
        call = _ahead(call)
    if needs_gradient(input, linear_weight, linear_bias):
        apply = LinearCrossEntropyFunction.apply_unseen if unseen else LinearCrossEntropyFunction.apply
        loss, maximum, total, entropy, correct = apply(*call, choice.backend, unseen)
    else:
        loss, maximum, total, _, entropy, correct, *_ = OPERATOR.forward(call, choice.backend, unseen)
    if options.reduction == "none":
        loss = loss.view(shape)
    if not return_stats:
        return loss
    lse = (maximum + torch.log(total)).detach()
    return loss, CrossEntropyStats(*(one.view(shape) for one in (lse, entropy, correct)))


if hasattr(F, "linear_cross_entropy"):
    dispatch.twin_of(F.linear_cross_entropy)(linear_cross_entropy)


def _why_whole(tensors, logits_shape) -> str | None:
    """Why this call's logits have to be whole in memory, or None."""
    input, linear_weight, target, _, weight = tensors
    if linear_weight.dim() > 2:
        return (
            f"linear_weight has shape {tuple(linear_weight.shape)}, for a loss of {linear_weight.dim() - 2} dimensions"
        )
    if tuple(target.shape) == logits_shape and logits_shape:
        return "target contains probabilities"
    if target.dtype not in (torch.int64, torch.uint8):
        return f"target is {target.dtype}"
    if not input.is_floating_point() or not linear_weight.is_floating_point():
        return f"input is {input.dtype} and linear_weight {linear_weight.dtype}"
    present = [tensor for tensor in tensors if tensor is not None]
    if weight is not None and weight.requires_grad:
        return "weight requires a gradient"
    for tensor in present:
        if tensor.layout != torch.strided or tensor.is_nested:
            return "a tensor is nested or sparse"
    if torch.compiler.is_compiling():
        return None
    if tracing.in_torch_func():
        return "a torch.func transform is active"
    if tracing.in_jit_trace():
        return "torch.jit.trace records it"
    for tensor in present:
        if tracing.is_dual(tensor):
            return "a tensor carries a tangent"
        if torch.overrides.has_torch_function((tensor,)):
            return f"a tensor is a {type(tensor).__name__}"
    return None


def _is_small_and_usual(input, linear_weight, target, linear_bias) -> bool:
    """Whether F.linear and F.cross_entropy check all that there is to check, and run on whole logits (`_is_small`)."""
    if not (isinstance(input, torch.Tensor) and isinstance(linear_weight, torch.Tensor)):
        return False
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        return False
    if input.dim() != 2 or linear_weight.dim() != 2 or target.dim() != 1 or input.dtype.itemsize < 4:
        return False
    # What else may be wrong is worded where it is checked.
    if input.shape[1] != linear_weight.shape[1] or target.shape != input.shape[:1]:
        return False
    if linear_bias is not None and getattr(linear_bias, "shape", None) != linear_weight.shape[:1]:
        return False
    if not input.is_cpu or input.layout != torch.strided or input.is_nested or torch.compiler.is_compiling():
        return False
    return input.shape[0] * linear_weight.shape[0] <= SMALL and dispatch.settled(input) is not None


def _is_small(choice, input, logits_shape) -> bool:
    """Whether PyTorch's operators run on whole logits: of 16 bits a CPU's would be rounded before they are summed."""
    if choice is None or choice.backend != "torch" or (input.is_cpu and input.dtype.itemsize < 4):
        return False
    return math.prod(logits_shape) <= SMALL


def _under_autocast(input: torch.Tensor) -> bool:
    kind = input.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _ahead(call: Call) -> Call:
    """The call, on a CPU with the gradients that its forward computes: whole rows cost no product more than eager's."""
    input, weight, bias = call.input, call.linear_weight, call.linear_bias
    if not input.is_cpu or call.reduction == "none" or call.group is not None or input.dtype.itemsize < 4:
        return call
    if not torch.is_grad_enabled():
        return call
    return call._replace(
        ahead_input=input.requires_grad, ahead_weight=weight.requires_grad,
        ahead_bias=bias is not None and bias.requires_grad,
    )  # fmt: skip


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> str | None:
    return None


def forward(call: Call):
    """-> loss () or (rows,) in result_dtype; maximum, total, miss (rows,) float32 (float64 for float64); entropy and
    correct (rows,) or None; dinput, dweight, dbias for a grad_output of 1, or None."""
    kept = _kept_rows(call)
    part = call if kept is None else call._replace(input=call.input[kept], target=call.target[kept])
    ahead = call.ahead_input or call.ahead_weight or call.ahead_bias
    dx = dweight = dbias = None
    if ahead:
        found, dx, dweight, dbias = rows.forward_with_gradients(part)
    else:
        found = chunks.forward(part, _ROWS)
    # Before rows are put back: those that were left out add nothing.
    loss = chunks.reduced(part, found.loss)
    _, maximum, total, miss, entropy, correct = found
    if kept is not None:
        if call.reduction == "none":
            loss = _put_back(call, kept, loss)
        maximum, miss = _put_back(call, kept, maximum), _put_back(call, kept, miss)
        total = _put_back(call, kept, total, 1.0)
        entropy, correct, dx = (_put_back(call, kept, one) for one in (entropy, correct, dx))
    return loss, maximum, total, miss, entropy, correct, dx, dweight, dbias


def backward(gradient: Gradient, call: Call):
    """-> dinput (rows, width), dweight (classes, width), dbias (classes,), None where it is not needed."""
    kept = _kept_rows(call)
    if kept is None:
        return chunks.backward(gradient, call, _ROWS, call.input.is_cpu)
    of_rows = {name: getattr(gradient, name)[kept] for name in ("maximum", "total", "miss")}
    if call.reduction == "none":
        of_rows["grad_output"] = gradient.grad_output[kept]
    part = call._replace(input=call.input[kept], target=call.target[kept])
    dx, dweight, dbias = chunks.backward(gradient._replace(**of_rows), part, _ROWS, True)
    return _put_back(call, kept, dx), dweight, dbias


_ROWS = chunks.Rows(rows.update, rows.gradient)


def _kept_rows(call: Call) -> torch.Tensor | None:
    """On a CPU the rows that count, where not all do; elsewhere their number is not known to the host."""
    if not call.input.is_cpu:
        return None
    ignored = chunks.is_ignored(call)
    return (~ignored).nonzero()[:, 0] if ignored.any() else None


def _put_back(call: Call, kept: torch.Tensor, tensor: torch.Tensor | None, empty: float = 0.0):
    """(kept, …) -> (rows, …)"""
    if tensor is None:
        return None
    whole = tensor.new_full((call.input.shape[0], *tensor.shape[1:]), empty)
    return whole.index_copy_(0, kept, tensor)


# --- Registration and autograd --------------------------------------------------------------------------------------


def _forward_fake(call: Call):
    x, count = call.input, call.input.shape[0]
    dtype = compute_dtype(x.dtype)
    loss = x.new_empty((count,) if call.reduction == "none" else (), dtype=call.result_dtype)
    maximum, total, miss = (x.new_empty(count, dtype=dtype) for _ in range(3))
    entropy, correct = (x.new_empty(count, dtype=kind) if call.stats else None for kind in (dtype, torch.bool))
    of_call = Gradient(loss, maximum, total, miss, call.ahead_input, call.ahead_weight, call.ahead_bias)
    return loss, maximum, total, miss, entropy, correct, *_backward_fake(of_call, call)


def _backward_fake(gradient: Gradient, call: Call):
    x, classes = call.input, call.linear_weight.shape[0]
    return (
        x.new_empty(x.shape) if gradient.need_input else None,
        x.new_empty(classes, x.shape[1]) if gradient.need_weight else None,
        x.new_empty(classes) if gradient.need_bias else None,
    )


TWIN = linear_cross_entropy
OPERATOR = Operator("linear_cross_entropy", Call, 9, _forward_fake, Gradient, 3, _backward_fake)


class LinearCrossEntropyFunction(KernelFunction):
    """The autograd.Function of linear_cross_entropy for class indices.

    `apply(*call, backend)` -> loss, maximum, total, entropy, correct, with lse = maximum + log(total); all but the loss
    have no gradients, and the last two are None or empty where the call has no `stats`. The arguments are trusted:
    gptkern.functional.linear_cross_entropy checks them.

    Args:
        call: the fields of the contract's Call.
        backend: "torch" or "triton".
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *fields, backend, unseen = arguments if len(arguments) == len(Call._fields) + 2 else (*arguments, None)
        call = Call(*fields)
        loss, maximum, total, miss, entropy, correct, *ahead = OPERATOR.forward(call, backend, unseen)
        ctx.set_materialize_grads(False)
        ctx.is_ahead = call.ahead_input or call.ahead_weight or call.ahead_bias
        kept = ahead if ctx.is_ahead else (maximum, total, miss)
        ctx.save_for_backward(call.input, call.linear_weight, call.target, call.linear_bias, call.weight, *kept)
        ctx.options, ctx.backend, ctx.count = tuple(call)[5:], backend, len(arguments)
        ctx.mark_non_differentiable(*(one for one in (maximum, total, entropy, correct) if one is not None))
        return loss, maximum, total, entropy, correct

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * ctx.count
        input, linear_weight, target, linear_bias, weight, *kept = ctx.saved_tensors
        need_input, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        with torch.no_grad():
            if ctx.is_ahead:
                needs = need_input, need_weight, need_bias
                found = [one if need else None for one, need in zip(kept, needs)]
                found = _scaled(found, grad_output)
            else:
                call = Call(input, linear_weight, target, linear_bias, weight, *ctx.options)
                # saved_tensors_hooks may hand back other strides.
                statistics = (one.contiguous() for one in kept)
                gradient = Gradient(grad_output, *statistics, need_input, need_weight, need_bias)
                found = OPERATOR.backward(gradient, call, ctx.backend)
                found = [one if need else None for one, need in zip(found, (need_input, need_weight, need_bias))]
        dx, dweight, dbias = once_differentiable(
            "linear_cross_entropy", found, (grad_output, input, linear_weight),
            "F.cross_entropy(F.linear(input, linear_weight), target) has one.",
        )  # fmt: skip
        return dx, dweight, None, dbias, *(None,) * (ctx.count - 4)


def _scaled(gradients: list[torch.Tensor | None], grad_output: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of a forward that took grad_output for 1, with as little new memory as may be."""
    if tracing.has_values(grad_output):
        # What autograd will not use again may be given away and written over; what it keeps is never the caller's.
        keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
        if not keeps and grad_output == 1.0:
            return gradients
        if not keeps:
            return [None if one is None else one.mul_(grad_output) for one in gradients]
    return [None if one is None else one * grad_output for one in gradients]
