"""The cross-entropy of few logits of 16 bits on a CPU, where the number of PyTorch's calls is what counts.

    p    = softmax(x) in float32
    miss = sum of p_c over c != y, which is 1 - p_y with all of its digits
    loss = -log p_y,  as -log(1 - miss) where p_y is above a half
    dx_c = g * (p_c - [c = y]),  of the target -g * miss: p_y - 1 is never computed as that

The forward keeps p - [c = y], so that the backward is one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptkern.backends import tracing
from gptkern.backends.registration import KernelFunction, needs_gradient

# Elements of the logits, of which the forward keeps a copy in float32.
MOST = 2**17


def takes(x: torch.Tensor, target: torch.Tensor, classes: int) -> bool:
    """Whether these are few logits of a CPU's call that nobody looks into, transforms or compiles.

    Args:
        x: (rows, …), the logits or what they come of. target: (rows,), classes.
    """
    return (
        0 < target.numel() * classes <= MOST
        and target.dtype == torch.int64
        and tracing.has_values(target)
        and not tracing.is_transformed()
        and not torch.overrides.has_torch_function_unary(x)
    )


def cross_entropy(
    x: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str, dtype: torch.dtype
) -> torch.Tensor:
    """F.cross_entropy(x, target) of `dtype`, for what `takes` says yes to.

    Args:
        x: (rows, classes), float16, bfloat16 or float32. target: (rows,) int64, each a class or ignored.
    """
    if needs_gradient(x):
        return _Function.apply_unseen(x, target, ignore_index, reduction, dtype)
    return _in_pytorch(x, target, ignore_index, reduction, dtype)


def _in_pytorch(x, target, ignore_index, reduction, dtype):
    return F.cross_entropy(x.float(), target, None, None, ignore_index, None, reduction).to(dtype)


class _Function(KernelFunction):
    @staticmethod
    def forward(ctx, x, target, ignore_index, reduction, dtype):
        count, classes = x.shape
        at, ignored = target[:, None], None
        if 0 <= ignore_index < classes or target.min() < 0:
            ignored = at == ignore_index
            at = at.masked_fill(ignored, 0)
            count -= int(ignored.sum())
        log_p = F.log_softmax(x, 1, None, torch.float32)
        log_p_y = log_p.gather(1, at)
        p = log_p.exp_().scatter_(1, at, 0.0)
        miss = p.sum(1, keepdim=True)
        is_likely = miss < 0.5
        # -log(1 - miss)
        loss = torch.where(is_likely, torch.log1p(miss.neg_()), log_p_y).neg_()
        # p_c - [c = y]
        p.scatter_(1, at, miss)
        if ignored is not None:
            loss.masked_fill_(ignored, 0.0)
            p.masked_fill_(ignored, 0.0)
        ctx.save_for_backward(x, target, p)
        ctx.options, ctx.count = (ignore_index, reduction, dtype), count
        if reduction == "none":
            return loss.squeeze(1).to(dtype)
        total = loss.sum()
        return (total / count if reduction == "mean" else total).to(dtype)

    @staticmethod
    def backward(ctx, g):
        x, target, p = ctx.saved_tensors
        ignore_index, reduction, dtype = ctx.options
        if torch.is_grad_enabled():
            # The gradient as PyTorch's operators give it, to be differentiated again.
            loss = _in_pytorch(x, target, ignore_index, reduction, dtype)
            return *torch.autograd.grad(loss, x, g, create_graph=True), None, None, None, None
        if reduction == "none":
            g = g[:, None]
        elif reduction == "mean":
            # Of no row that counts p is 0, and 0 * NaN no number, as PyTorch has it not.
            g = g.float() / max(ctx.count, 1)
        return (p * g.float()).to(x.dtype), None, None, None, None
