"""attention: the contract, the PyTorch backend, the registered ops and the autograd.Function.

    S = log2(e) * scale * Q @ K^T          P = softmax(scale * Q @ K^T) = 2^(S - lse)
    O = P @ V                              lse = log2(sum over the keys of 2^S)

Backward, with delta = sum over head_dim of dO * O:
    dV = P^T @ dO            dP = dO @ V^T
    dS = P * (dP - delta)    dQ = scale * dS @ K            dK = scale * dS^T @ Q

With a mask S = log2(e) * (scale * Q @ K^T + mask), or -inf where a bool mask has False. With dropout, D being 1 for the
probabilities that are kept and 0 for the others (gptkern.backends.philox):
    O = (P * D) @ V / (1 - dropout_p)
    dV = (P * D)^T @ dO / (1 - dropout_p)  dP = D * (dO @ V^T) / (1 - dropout_p)

Inside gptkern a call is (query, key, value, is_causal, scale, attn_mask, dropout_p, lower_right): four dimensions, one
head_dim, scale > 0; key and value have the same number of heads, which divides the query's; attn_mask is None or
broadcasts to (batch, heads, length_q, length_k), and then is_causal is False. The causal mask is aligned to the upper
left corner (query i sees keys j <= i), with lower_right to that one (j <= i + length_k - length_q). The launchers get
one argument more, seed: (1,) int64, or None where dropout_p is 0.

lse, the log-sum-exp, is (batch, heads, length_q), float32 (float64 for float64 input), and -inf for a query without
any key; in base 2, because a change of base would round it twice more, and its error is that of every probability of
the row. With an additive mask it is (2, batch, heads, length_q): log2(sum over the keys of 2^(S - log2(e) * m)), and m,
the largest scale * Q @ K^T + mask of the row (0 where no key is seen). Masks hide with the dtype's lowest number too,
and beside a sum of -3e38 nothing would be left of the logarithm, which the gradient needs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gptkern.backends import dispatch, philox
from gptkern.backends.philox import new_seed
from gptkern.backends.registration import (
    KernelFunction,
    Operator,
    autocast,
    is_unseen,
    needs_gradient,
    once_differentiable,
)
from gptkern.operators.attention import pytorch
from gptkern.operators.attention.checks import check, check_mask, checked_dropout

_LOG2E = math.log2(math.e)


class Call(NamedTuple):
    """A checked call: four dimensions where kernels run, one head_dim, scale > 0; is_causal is False beside a mask."""

    query: torch.Tensor  # (batch, heads, length_q, head_dim)
    key: torch.Tensor  # (batch, kv_heads, length_k, head_dim)
    value: torch.Tensor  # as key
    is_causal: bool
    scale: float
    attn_mask: torch.Tensor | None = None  # bool or additive, broadcasts to (batch, heads, length_q, length_k)
    dropout_p: float = 0.0
    lower_right: bool = False  # of is_causal: query i sees keys j <= i + length_k - length_q
    seed: torch.Tensor | None = None  # (1,) int64, of the dropout


class Gradient(NamedTuple):
    """What the backward gets besides the call."""

    grad_output: torch.Tensor  # (batch, heads, length_q, head_dim)
    output: torch.Tensor  # (batch, heads, length_q, head_dim)
    lse: torch.Tensor  # as the forward returned it
    need_query: bool
    need_key: bool
    need_value: bool


@dispatch.twin_of(pytorch.PYTORCHS_OWN)
def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention, the twin of `torch.nn.functional.scaled_dot_product_attention`.

        P = softmax(scale * query @ key^T)        over the keys; with is_causal, key j is seen by query i if j <= i
        output = P @ value

    The probabilities are never written to memory: the forward keeps the log-sum-exp of each row (float32), from
    which the backward recomputes them. Softmax sums and products accumulate in float32. float32 products follow
    `torch.get_float32_matmul_precision()`. The backward has no atomics: it is the same on every run.

    Args:
        query: (…, heads, length_q, head_dim). key, value: (…, kv_heads, length_k, head_dim); any lengths, 0 and
            length_q != length_k included. Kernels need four dimensions (other ranks run on PyTorch), take any
            strides whose last one is 1, and do not copy such a view (cuda: one whose rows are aligned to 16 bytes).
        attn_mask: bool (True takes part) or additive (added to the scores; of float32 or the query's dtype),
            broadcastable to (…, heads, length_q, length_k), with any strides; it is never expanded in memory. Or
            `torch.nn.attention.bias.causal_lower_right(length_q, length_k)`: key j is seen by query i if
            j <= i + length_k - length_q, the alignment for a query whose keys are in a cache; or
            `causal_upper_left(…)`, which is is_causal. A query that a mask hides all keys from gives zeros, and
            zero gradients, as PyTorch's own operators do (torch 2.5 and later). Beside a large finite number (-1e9) in
            all of a row the scores are lost in float32: it gives the mean of the values, and the mean's gradient.
            Kernels compute no gradient for a mask.
        dropout_p: probability of dropping an attention weight; those that stay are divided by 1 - dropout_p, after
            the softmax. As in PyTorch it is applied whether a module trains or not, and which weights are dropped is
            drawn from PyTorch's generator of the device: one int64 seed a call, so `torch.manual_seed` and
            activation checkpointing repeat it, and the mask is made again in the backward (other masks than
            PyTorch's own kernels make, of the same frequencies). 1 drops all.
        is_causal: the upper-left causal mask, as in PyTorch: query 0 sees key 0 alone, whatever the lengths.
        scale: 1/sqrt(head_dim) by default; any sign.
        enable_gqa: lets kv_heads divide heads; query head h then reads key/value head h // (heads // kv_heads).
            Without it a single key/value head is broadcast over the query's, as PyTorch does.

    Returns:
        (…, heads, length_q, head_dim of value), the query's dtype, its heads and lengths laid out as the query's.
        A query with no key (length_k = 0) gives zeros.

    Raises (of the same type as PyTorch):
        RuntimeError: the dtypes, devices, batch sizes or head_dims differ; the head counts differ (without
            enable_gqa) or do not divide; key and value differ in length; attn_mask together with is_causal,
            of another dtype or device, or not broadcastable; dropout_p is below 0 or above 1; query, key or value
            with fewer than two dimensions.
        TypeError: an argument that must be a tensor, a number or a bool is none.
        ValueError: a causal bias together with is_causal.

    Backends: torch; triton for float16, bfloat16 and float32, cuda for float16 and bfloat16: head_dim a multiple of 8
    up to 256 and equal for query and value, forward and backward (no second derivative). attn_mask, dropout and the
    lower-right alignment: triton; a mask that requires a gradient: torch.

    Sources: Dao, "FlashAttention-2", 2023 (arXiv:2307.08691). Dropout by a counter-based generator: Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox4x32-10).
    """
    arguments = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    if (found := dispatch.recalled("attention", arguments)) is not None:
        return _on_kernels(Call(query, key, value, is_causal, found[1]), found[0], True)
    choice = dispatch.settled(query)
    if choice is None:
        if attn_mask is None:
            # What _checked does, which takes a little of the host's time itself.
            cast, mask, lower_right = check(query, key, value, None, is_causal, scale, enable_gqa), None, False
            causal = is_causal
        else:
            cast, mask, causal, lower_right = _checked(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        dropout_p = checked_dropout(dropout_p)
        factor = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale)
        call = Call(*cast, causal, factor, mask, dropout_p, lower_right)
        choice, unseen = dispatch.chosen("attention", call)
        if choice.backend == "torch:cudnn":
            cudnn = dispatch.load(choice.backend, "attention")
            return cudnn.attention(query, key, value, causal, scale, enable_gqa)
        if choice.backend != "torch":
            if not factor > 0 or dropout_p > 0:
                signed_query, factor = pytorch.with_positive_scale(cast[0], factor)
                seed = new_seed(query.device) if dropout_p > 0 else None
                call, unseen = call._replace(query=signed_query, scale=factor, seed=seed), None
            elif unseen and attn_mask is None:
                dispatch.remember("attention", arguments, (choice.backend, factor))
            return _on_kernels(call, choice.backend, unseen)
    if (is_causal and attn_mask is not None) or (not torch.compiler.is_compiling() and _differ_in_length(key, value)):
        # One kernel of PyTorch's, the CPU's, takes both, and values of any number.
        _checked(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    try:
        return pytorch.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    except (RuntimeError, IndexError, TypeError):
        if not _is_plain(query):
            raise
        _checked(query, key, value, attn_mask, is_causal, scale, enable_gqa)
        checked_dropout(dropout_p)
        if attn_mask is None or attn_mask.dim() >= 2:
            raise
    # PyTorch's operator looks for two dimensions in a mask that broadcasts with fewer.
    attn_mask = torch.atleast_2d(attn_mask)
    return pytorch.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _differ_in_length(key, value) -> bool:
    try:
        length = key.size(-2)
        # A tracer's sizes are no numbers.
        return type(length) is int and length != value.size(-2)
    except (AttributeError, RuntimeError, IndexError, TypeError):  # what has no length: PyTorch says so
        return False


def _checked(query, key, value, attn_mask, is_causal, scale, enable_gqa):
    """-> (query, key, value) and the mask as autocast has them, is_causal, whether it is aligned to the lower right.

    Raises an error that names what is wrong: before a kernel runs, or once PyTorch has refused a call.
    """
    lower_right = False
    if attn_mask is not None and pytorch.is_causal_bias(attn_mask):
        attn_mask, is_causal, lower_right = _alignment(attn_mask, query, key, is_causal)
    cast = check(query, key, value, attn_mask, is_causal, scale, enable_gqa)
    if attn_mask is not None:
        attn_mask = _as_autocast_has_it(attn_mask, query)
        check_mask(attn_mask, *cast[:2])
        if attn_mask.dim() < 2:
            attn_mask = torch.atleast_2d(attn_mask)
    return cast, attn_mask, is_causal, lower_right


def _is_plain(tensor) -> bool:
    """Whether it has a shape to check: it is neither nested nor sparse, nor of a subclass."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided


def _alignment(bias, query, key, is_causal):
    """-> no mask, is_causal, whether it is aligned to the lower right: what a torch.nn.attention.bias stands for."""
    if is_causal:
        raise ValueError("attention: attn_mask is a causal bias and is_causal is True; it needs one of them at most")
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:
        return None, True, False
    if isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and min(query.dim(), key.dim()) >= 2:
        lengths = query.shape[-2], key.shape[-2]
        if (bias.seq_len_q, bias.seq_len_kv) != lengths:
            raise RuntimeError(
                f"attention: attn_mask is a causal bias of {bias.seq_len_q} queries and {bias.seq_len_kv} keys; it "
                f"needs the lengths of query and key, {lengths[0]} and {lengths[1]}"
            )
    return None, True, True


def _as_autocast_has_it(mask, query):
    """An additive mask in the dtype of the products, as PyTorch casts it; strides of 0 stay, so it is not expanded."""
    cast = autocast("lower", query, mask)[1] if isinstance(mask, torch.Tensor) else mask
    if cast is mask or 0 not in mask.stride():
        return cast
    shape = mask.shape
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return autocast("lower", query, mask)[1].expand(shape)


# --- The torch backend: bare launchers in plain PyTorch -------------------------------------------------------------


def unsupported(call: Call) -> None:
    return None


def forward(call: Call):
    """-> output (batch, heads, length_q, head_dim), lse (batch, heads, length_q), or two of them: see the module."""
    query, key, value, is_causal, scale, attn_mask, dropout_p, lower_right, seed = call
    q, k, v = _grouped(query, key, value)
    scores = _scores(q, k, is_causal, scale, attn_mask, lower_right)
    lse = empty_lse(query, attn_mask)
    if lse.dim() == 4 and key.shape[2] > 0:
        largest = scores.amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == -math.inf, 0.0)
        lse[0].copy_(((scores - largest).logsumexp(-1) * _LOG2E).flatten(1, 2))
        lse[1].copy_(largest[..., 0].flatten(1, 2))
    elif key.shape[2] > 0:
        # lse = log2(sum over the keys of 2^S)
        lse.copy_((scores.logsumexp(-1) * _LOG2E).flatten(1, 2))
    else:
        no_key(lse)
    # Of a query that sees no key the softmax is NaN, and P is 0.
    p = scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    output = empty_in_layout_of(query)
    output.copy_(((p * _kept(query, key, dropout_p, seed)) @ v).flatten(1, 2))
    return output, lse


def backward(gradient: Gradient, call: Call):
    """-> dquery, dkey, dvalue of the shapes, dtypes and layouts of query, key, value; what is not needed is empty."""
    grad_output, output, lse, need_query, need_key, need_value = gradient
    query, key, value, is_causal, scale, attn_mask, dropout_p, lower_right, seed = call
    q, k, v = _grouped(query, key, value)
    grad, out = (tensor.to(lse.dtype).view(q.shape) for tensor in (grad_output.contiguous(), output.contiguous()))
    probabilities = _probabilities(_scores(q, k, is_causal, scale, attn_mask, lower_right), lse)
    kept = _kept(query, key, dropout_p, seed)
    dquery, dkey, dvalue = (
        empty_in_layout_of(tensor) if needed else tensor.new_empty(0)
        for tensor, needed in ((query, need_query), (key, need_key), (value, need_value))
    )
    if need_value:
        # dV = (P * D)^T @ dO / (1 - dropout_p), summed over the query heads of a group
        dvalue.copy_(((probabilities * kept).mT @ grad).sum(2))
    if need_query or need_key:
        # dS = P * (dP - delta),  dP = D * (dO @ V^T) / (1 - dropout_p)
        dscores = probabilities * ((grad @ v.mT) * kept - (grad * out).sum(-1, keepdim=True))
        if need_query:
            dquery.copy_((scale * (dscores @ k)).flatten(1, 2))
        if need_key:
            dkey.copy_((scale * (dscores.mT @ q)).sum(2))
    return dquery, dkey, dvalue


def _grouped(query, key, value):
    """-> q (batch, kv_heads, group, length_q, head_dim), k and v (batch, kv_heads, 1, length_k, head_dim)."""
    dtype = _statistics_dtype(query)
    batch, heads, length_q, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads if kv_heads else 1
    q = query.to(dtype).reshape(batch, kv_heads, group, length_q, head_dim)
    return q, key.to(dtype)[:, :, None], value.to(dtype)[:, :, None]


def _scores(q, k, is_causal, scale, attn_mask, lower_right):
    """S in the natural base, which softmax takes: (batch, kv_heads, group, length_q, length_k)."""
    scores = scale * (q @ k.mT)
    if is_causal:
        length_q, length_k = scores.shape[-2:]
        seen = torch.ones(length_q, length_k, dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(~seen.tril(length_k - length_q if lower_right else 0), -math.inf)
    if attn_mask is not None:
        batch, kv_heads, group, length_q, length_k = scores.shape
        mask = attn_mask.expand(batch, kv_heads * group, length_q, length_k).reshape(scores.shape)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    return scores


def _probabilities(scores, lse):
    """P = 2^(S - lse), 0 for a query that sees no key; lse as `forward` returns it."""
    if lse.dim() == 4:
        lse, largest = lse.view(2, *scores.shape[:-1], 1)
        scores = scores - largest
    else:
        lse = lse.view(*scores.shape[:-1], 1)
    # 2^(-inf - inf) = 0, and 2^(-inf + inf) would be NaN
    return torch.exp2(scores * _LOG2E - lse.masked_fill(lse == -math.inf, math.inf))


def _kept(query, key, dropout_p, seed):
    """D / (1 - dropout_p), (batch, kv_heads, group, length_q, length_k), or 1 without dropout."""
    if seed is None:
        return 1.0
    if dropout_p == 1:
        return 0.0
    batch, heads, length_q, _ = query.shape
    kv_heads, length_k = key.shape[1:3]
    kept = philox.kept(seed, (batch, heads, length_q, length_k), dropout_p)
    return kept.view(batch, kv_heads, heads // max(kv_heads, 1), length_q, length_k) / (1 - dropout_p)


# --- Registration and autograd --------------------------------------------------------------------------------------


def empty_in_layout_of(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised (batch, heads, length, head_dim) tensor of the given one's shape and order in memory, dense.

    Of a (batch, length, heads, head_dim) projection seen as (batch, heads, length, head_dim), or of one third of a
    packed qkv projection, the result is such a view again, so that the model's transpose back makes no copy.
    """
    if tensor.is_contiguous():
        # By its format: else the strides of dimensions of one place, which may be any, stay.
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    batch, heads, length, head_dim = tensor.shape
    if tensor.stride(1) < tensor.stride(2):
        return tensor.new_empty((batch, length, heads, head_dim)).transpose(1, 2)
    return tensor.new_empty((batch, heads, length, head_dim))


def empty_lse(query: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
    """The uninitialised log-sum-exp: (batch, heads, length_q); with an additive mask (2, batch, heads, length_q)."""
    batch, heads, length_q, _ = query.shape
    dtype = _statistics_dtype(query)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        return query.new_empty(2, batch, heads, length_q, dtype=dtype)
    return query.new_empty(batch, heads, length_q, dtype=dtype)


def no_key(lse: torch.Tensor) -> torch.Tensor:
    """Fills the log-sum-exp of queries that see no key."""
    if lse.dim() == 4:
        lse[1].zero_()
        lse[0].fill_(-math.inf)
        return lse
    return lse.fill_(-math.inf)


def log_sum_exp(kept: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of scale * Q @ K^T + mask over the keys: natural, (batch, heads, length_q), -inf without a key.

    The one form in which it leaves this room, whatever a kernel keeps for its backward. Results over parts of the keys
    combine by it: lse = logaddexp(lse_1, lse_2), output = sum over the parts of exp(lse_i - lse) * output_i.

    Args:
        kept: what a forward launcher returned beside the output.
    """
    if kept.dim() == 4:
        return torch.add(kept[1], kept[0], alpha=math.log(2))
    return kept * math.log(2)


def _statistics_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _forward_fake(call: Call):
    return empty_in_layout_of(call.query), empty_lse(call.query, call.attn_mask)


def _backward_fake(gradient: Gradient, call: Call):
    return tuple(
        empty_in_layout_of(tensor) if needed else tensor.new_empty(0) for tensor, needed in zip(call[:3], gradient[3:])
    )


TWIN = scaled_dot_product_attention
OPERATOR = Operator("attention", Call, 2, _forward_fake, Gradient, 3, _backward_fake)


def _on_kernels(call: Call, backend: str, unseen: bool | None):
    """-> output."""
    query, key, value, is_causal, scale, mask, dropout_p, lower_right, seed = call
    if unseen is None:
        unseen = is_unseen(call)
    if not needs_gradient(query, key, value):
        return OPERATOR.forward(call, backend, unseen)[0]
    if mask is None and seed is None:
        if unseen:
            return _AttentionPlainFunction.apply_unseen(query, key, value, backend, call)
        return _AttentionPlainFunction.apply(query, key, value, backend, None, is_causal, scale, lower_right)
    apply = AttentionFunction.apply_unseen if unseen else AttentionFunction.apply
    return apply(query, key, value, is_causal, scale, backend, mask, dropout_p, lower_right, seed, False, unseen)


class _AttentionPlainFunction(KernelFunction):
    """AttentionFunction without a mask and dropout: fewer arguments for autograd to look at."""

    @staticmethod
    def forward(ctx, query, key, value, backend, call, is_causal=False, scale=1.0, lower_right=False):
        # Where nobody looks on, the call that was made before is handed on.
        unseen = call is not None
        if not unseen:
            call = Call(query, key, value, is_causal, scale, None, 0.0, lower_right)
        output, lse = OPERATOR.forward(call, backend, unseen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.options = call[3:], backend
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, output, lse = ctx.saved_tensors
        options, backend = ctx.options
        call = Call(query, key, value, *options)
        needs = ctx.needs_input_grad
        gradients = _gradients(Gradient(grad_output, output, lse, *needs[:3]), call, backend)
        return *gradients, *(None,) * (len(needs) - 3)


def _gradients(gradient: Gradient, call: Call, backend: str) -> tuple:
    """-> of query, key and value, None where they are not needed."""
    with torch.no_grad():
        computed = OPERATOR.backward(gradient, call, backend)
    gradients = [found if needed else None for found, needed in zip(computed, gradient[3:])]
    return once_differentiable("attention", gradients, (gradient.grad_output, *call[:3]))


class AttentionFunction(KernelFunction):
    """The autograd.Function of attention in four dimensions.

    `apply(query, key, value, is_causal, scale, backend, attn_mask=None, dropout_p=0.0, lower_right=False, seed=None,
    return_lse=False)` -> output, or with return_lse the pair (output, lse). The arguments are trusted:
    gptkern.functional.scaled_dot_product_attention checks them.

    Args:
        query: (batch, heads, length_q, head_dim). key, value: (batch, kv_heads, length_k, head_dim), where
            kv_heads divides heads.
        scale: a positive number.
        backend: "torch", "triton" or "cuda"; cuda has no attn_mask, dropout_p and lower_right.
        attn_mask: bool or floating point, broadcastable to (batch, heads, length_q, length_k), without is_causal. It
            gets no gradient.
        dropout_p: in [0, 1]; above 0 with seed, (1,) int64 on the query's device, which decides what is dropped.
        lower_right: with is_causal, query i sees the keys j <= i + length_k - length_q.
        return_lse: also return the natural log-sum-exp of the scores, (batch, heads, length_q), float32 (float64 for
            float64 input), which has no gradient.
        unseen: what `unseen.is_unseen` says of the call, from a twin that has asked; None: it is asked.
    """

    @staticmethod
    def forward(
        ctx, query, key, value, is_causal, scale, backend, attn_mask=None, dropout_p=0.0, lower_right=False, seed=None,
        return_lse=False, unseen=None,
    ):  # fmt: skip
        call = Call(query, key, value, is_causal, scale, attn_mask, dropout_p, lower_right, seed)
        output, lse = OPERATOR.forward(call, backend, unseen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, output, lse, attn_mask, seed)
        ctx.options = is_causal, scale, dropout_p, lower_right
        ctx.backend = backend
        if not return_lse:
            return output
        natural = log_sum_exp(lse)
        ctx.mark_non_differentiable(natural)
        return output, natural

    @staticmethod
    def backward(ctx, grad_output, _=None):
        rest = (None,) * 9
        if grad_output is None:
            return None, None, None, *rest
        query, key, value, output, lse, attn_mask, seed = ctx.saved_tensors
        is_causal, scale, *extras = ctx.options
        call = Call(query, key, value, is_causal, scale, attn_mask, *extras, seed)
        gradient = Gradient(grad_output, output, lse, *ctx.needs_input_grad[:3])
        return *_gradients(gradient, call, ctx.backend), *rest
