"""Philox4x32-10 in plain PyTorch: the dropout mask of attention, bit for bit as the kernels make it.

A counter of four 32-bit words c and a key of two, k, give four random words. Ten rounds, the key moving on between:

    (high0, low0) = 0xD2511F53 * c0           (high1, low1) = 0xCD9E8D57 * c2
    c = (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0)
    k = (k0 + 0x9E3779B9, k1 + 0xBB67AE85)

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import torch

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
# Probabilities of four neighbouring keys take the four words of one counter.
_WORDS = 4


def philox(key: tuple, counter: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four int64 tensors of words from 0 to 2^32 - 1.

    Args:
        key: two, and counter: four int64 tensors (or numbers) of such words, which broadcast.
    """
    (k0, k1), (c0, c1, c2, c3) = key, torch.broadcast_tensors(*map(torch.as_tensor, counter))
    for _ in range(_ROUNDS):
        # An int64 product of two words wraps around modulo 2^64, and its bits are those of the product still.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _WORD, (product1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox_in_a_row(key: tuple[int, int], first: int, count: int, c2: int, c3: int) -> torch.Tensor:
    """(count, 4) int32, the bits of the words of counters (first + i in two words, c2, c3), on a CPU: as `philox` gives
    them, in memory that stays in its caches. The counters stay below 2^63.
    """
    c0 = torch.arange(first, first + count)
    c1, c2, c3 = c0 >> 32, torch.full_like(c0, c2), torch.full_like(c0, c3)
    c0 &= _WORD
    (k0, k1), spare = key, (torch.empty_like(c0), torch.empty_like(c0))
    for _ in range(_ROUNDS):
        product0, product1 = (torch.mul(c, by, out=to) for c, by, to in zip((c0, c2), _MULTIPLIERS, spare))
        # What lies above a word's bits is cut off where it would be multiplied.
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        spare, c1, c3 = (c1, c3), product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    words = torch.empty((count, _WORDS), dtype=torch.int32)
    for column, word in zip(words.unbind(1), (c0, c1, c2, c3)):
        column.copy_(word)
    return words


def new_seed(device: torch.device) -> torch.Tensor:
    """(1,) int64 from PyTorch's generator of the device: no synchronisation, and a CUDA graph draws it anew."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def kept(seed: torch.Tensor, shape: tuple[int, int, int, int], dropout_p: float) -> torch.Tensor:
    """bool (batch, heads, length_q, length_k): the probabilities that dropout keeps.

    (batch, head, i, j) is kept where word j % 4 of Philox(key = seed, counter = (j // 4, i, batch * heads + head, 0)),
    read as an int32, is not below round(dropout_p * 2^32) - 2^31. With dropout_p = 1 nothing is.

    Args:
        seed: (1,) int64.
    """
    batch, heads, length_q, length_k = shape
    number = {"dtype": torch.int64, "device": seed.device}
    groups = torch.arange(-(-length_k // _WORDS), **number)
    rows = torch.arange(length_q, **number)[:, None]
    batch_heads = torch.arange(batch * heads, **number)[:, None, None]
    words = philox((seed & _WORD, (seed >> 32) & _WORD), (groups, rows, batch_heads, groups.new_zeros(())))
    words = torch.stack(words, dim=-1).flatten(-2)[..., :length_k].view(shape)
    # As an int32: words from 2^31 on are negative.
    signed = words - ((words >> 31) << 32)
    return (signed >= round(dropout_p * 2**32) - 2**31) & (dropout_p < 1)
