"""attention in plain mathematics, and which probabilities its dropout keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from oracles import ORACLE, masked_softmax


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
    probabilities = masked_softmax(scores, takes_part, zero_if_empty=True)
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
