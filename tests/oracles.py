"""The oracles: every operator as plain mathematics on float64 tensors. They share no code with gptkern.

Each oracle takes its tensors and converts them to `precision` first:

    precision=torch.float64    the oracle
    precision=torch.float32    the yardstick: the same mathematics with float32 internals. gptkern.measuring.tolerance
                               rounds it to the dtype of the result that is judged.

Gradients come from PyTorch's autograd through these few lines of arithmetic (`gradients`), not from a second
formula, so a wrong derivation in an operator's backward cannot be repeated here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

ORACLE = torch.float64
YARDSTICK = torch.float32


def gradients(function: Callable, tensors: Sequence[torch.Tensor], grad_output, precision: torch.dtype) -> tuple:
    """The gradients of `function(*tensors)` with respect to every tensor, computed in `precision`.

    Args:
        function: one tensor, or a tuple of them, from the tensors; called with their copies in `precision`.
        grad_output: the gradient that comes in, or a tuple of them.
    """
    leaves = [tensor.detach().to(precision, copy=True).requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    if isinstance(outputs, torch.Tensor):
        outputs, grad_output = (outputs,), (grad_output,)
    return torch.autograd.grad(outputs, leaves, [grad.to(precision) for grad in grad_output])


def _softmax(scores: torch.Tensor, takes_part: torch.Tensor | bool, zero_if_empty: bool) -> torch.Tensor:
    """softmax over the last dimension, of the entries where takes_part is True; the others are 0.

    A row of which nothing takes part is 0 with zero_if_empty, else NaN (0 / 0), as in PyTorch.
    """
    scores = torch.where(torch.as_tensor(takes_part, device=scores.device), scores, -math.inf)
    if scores.shape[-1] == 0:
        return scores
    # Shifting a row changes nothing in exact arithmetic: the largest score is a constant to the gradient.
    largest = scores.detach().max(-1, keepdim=True).values
    empty = largest == -math.inf
    exponentials = torch.exp(scores - largest.masked_fill(empty, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    return exponentials / (total.masked_fill(empty, 1.0) if zero_if_empty else total)


# --- attention ------------------------------------------------------------------------------------------------------


def attention(
    query: torch.Tensor,  # (batch, heads, length_q, head_dim)
    key: torch.Tensor,  # (batch, kv_heads, length_k, head_dim)
    value: torch.Tensor,  # (batch, kv_heads, length_k, head_dim of value)
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,  # bool or added; broadcasts to (batch, heads, length_q, length_k)
    lower_right: bool = False,
    kept: torch.Tensor | None = None,  # bool (batch, heads, length_q, length_k)
    dropout_p: float = 0.0,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """softmax(scale * query @ keyᵀ + mask) @ value; is_causal: query i sees key j if j <= i. A query that sees none: 0.

    lower_right: the last query sees the last key, the one before it the last but one. The probabilities that are not
    kept become 0, the others are divided by 1 - dropout_p.
    """
    query, key, value = (tensor.to(precision) for tensor in (query, key, value))
    group = query.shape[1] // key.shape[1]
    # query head h reads key/value head h // group
    head_of = torch.arange(query.shape[1], device=query.device) // group
    key, value = key[:, head_of], value[:, head_of]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * (query @ key.transpose(-1, -2))
    row = torch.arange(query.shape[2], device=query.device)[:, None]
    column = torch.arange(key.shape[2], device=query.device)[None, :]
    takes_part = column >= 0
    if is_causal and lower_right:
        takes_part = (key.shape[2] - 1) - column >= (query.shape[2] - 1) - row
    elif is_causal:
        takes_part = column <= row
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        takes_part = takes_part & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.to(precision)
    probabilities = _softmax(scores, takes_part, zero_if_empty=True)
    if kept is not None:
        probabilities = torch.where(kept, probabilities / (1 - dropout_p), 0.0)
    return probabilities @ value


def philox(key: Sequence, counter: Sequence) -> list:
    """The four words of Philox4x32-10 (Salmon et al. 2011): numpy's uint64, or anything that becomes it."""
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    left, right = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    x = [np.asarray(part, dtype=np.uint64) for part in counter]
    k = [np.asarray(part, dtype=np.uint64) for part in key]
    for number in range(10):
        if number > 0:
            k = [(k[0] + np.uint64(0x9E3779B9)) & word, (k[1] + np.uint64(0xBB67AE85)) & word]
        # Products of 32-bit words fit 64 bits without a sign.
        one, two = left * x[0], right * x[2]
        x = [(two >> half) ^ x[1] ^ k[0], two & word, (one >> half) ^ x[3] ^ k[1], one & word]
    return x


def kept_by_dropout(seed: int, shape: tuple[int, int, int, int], dropout_p: float) -> torch.Tensor:
    """bool (batch, heads, length_q, length_k), for dropout_p < 1: element by element as backends/philox.py says it."""
    batch, heads, length_q, length_k = shape
    which, row, column = np.meshgrid(*(np.arange(n) for n in (batch * heads, length_q, length_k)), indexing="ij")
    unsigned = seed % 2**64
    words = philox((unsigned % 2**32, unsigned // 2**32), (column // 4, row, which, 0 * row))
    word = np.choose(column % 4, words).astype(np.int64)
    as_int32 = np.where(word >= 2**31, word - 2**32, word)
    return torch.from_numpy(as_int32 >= round(dropout_p * 2**32) - 2**31).view(shape)


# --- rotary ---------------------------------------------------------------------------------------------------------


def rotary_embedding(
    input: torch.Tensor,  # (batch, heads, length, head_dim)
    cos: torch.Tensor,  # (length, pairs) or (batch or 1, length, pairs)
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """Each pair of elements as a complex number, times cos + i sin of its position; the other elements stay."""
    x, cos, sin = (tensor.to(precision) for tensor in (input, cos, sin))
    pairs = cos.shape[-1]
    first = torch.arange(pairs, device=x.device)
    real, imaginary = (2 * first, 2 * first + 1) if interleaved else (first, first + pairs)
    turn = torch.complex(cos, sin).unsqueeze(-3)  # (batch or nothing, 1, length, pairs)
    y = torch.complex(x[..., real].contiguous(), x[..., imaginary].contiguous()) * turn
    return x.index_copy(-1, real, y.real).index_copy(-1, imaginary, y.imag)


# --- softmax --------------------------------------------------------------------------------------------------------


def softmax(
    input: torch.Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """softmax of scale * input + mask over `dim`, of the entries that a bool mask and is_causal let take part.

    A row of which nothing takes part is 0 where there is a mask or is_causal, else NaN.
    """
    scores = input.to(precision) * scale
    takes_part = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        takes_part = takes_part & mask
    elif mask is not None:
        scores = scores + mask.to(precision)
    if is_causal:
        takes_part = takes_part.tril()  # element j of row i takes part if j <= i
    if scores.dim() == 0:
        return _softmax(scores[None], takes_part[None], zero_if_empty=mask is not None)[0]
    scores, takes_part = scores.transpose(dim, -1), takes_part.transpose(dim, -1)
    y = _softmax(scores, takes_part, zero_if_empty=mask is not None or is_causal)
    return y.transpose(dim, -1)


# --- layer_norm -----------------------------------------------------------------------------------------------------


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    precision: torch.dtype = ORACLE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) with s = input + residual and y = (s - E[s]) / √(E[(s - E[s])²] + eps) * weight + bias."""
    s = input.to(precision) if residual is None else input.to(precision) + residual.to(precision)
    dims = tuple(range(s.ndim - len(normalized_shape), s.ndim))
    centred = s - s.mean(dims, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(precision)
    y = y if bias is None else y + bias.to(precision)
    return y, s


# --- rms_norm -------------------------------------------------------------------------------------------------------


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """x / √(E[x²] + eps) * weight."""
    x = input.to(precision)
    dims = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y = x / torch.sqrt((x * x).mean(dims, keepdim=True) + eps)
    return y if weight is None else y * weight.to(precision)


# --- int8_linear ----------------------------------------------------------------------------------------------------


def quantize_int8(input: torch.Tensor, dim: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale): scale = max(max|x| / 127, 2⁻¹²⁶) along dim, or 1 if all is 0; q = x / scale, halves to even.

    In NumPy's float32 (float64 for float64), whose divisions are correctly rounded: exact, to be compared bit for bit.
    """
    x = input.detach().cpu()
    x = (x if x.dtype == torch.float64 else x.float()).numpy()
    largest = np.abs(x).max(axis=dim, keepdims=True)
    scale = np.maximum((largest / x.dtype.type(127)).astype(np.float32), np.finfo(np.float32).tiny)
    scale = np.where(largest == 0, np.float32(1), scale)
    q = np.clip(np.rint(x / scale), -127, 127).astype(np.int8)
    return torch.from_numpy(q), torch.from_numpy(scale.squeeze(dim))


def gelu(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """z * Φ(z), or its approximation by tanh; z itself where activation is None."""
    if activation == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return z


def int8_linear(
    input: torch.Tensor,  # (…, in_features)
    weight: torch.Tensor,  # (out_features, in_features) int8
    weight_scale: torch.Tensor,  # (out_features,) float32
    bias: torch.Tensor | None = None,  # (out_features,)
    activation: str | None = None,
    *,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None,
    precision: torch.dtype = ORACLE,
) -> torch.Tensor:
    """activation((x @ weightᵀ) * weight_scale + bias), with x the input, or q * scale of `quantized` (w8a8).

    Gradients pass straight through the quantisation, as if x were the input.
    """
    z = input.to(precision) @ weight.to(precision).T
    if quantized is not None:
        q, scale = quantized
        # The product is of integers and below 2³¹: exact in float64, whatever the precision of the rest.
        product = (q.double() @ weight.cpu().double().T).to(precision) * scale.to(precision)[..., None]
        z = product.to(z.device) + (z - z.detach())
    z = z * weight_scale.to(precision)
    return gelu(z if bias is None else z + bias.to(precision), activation)
