"""The endless, shuffled sequence of rows that a training reads, each of which can be computed alone.

    rows of an epoch   R = max(1, tokens // length − 1)
    row n              is of epoch e = n // R, and begins at token  offset(e) + length · order(e)(n mod R)
    offset(e)          drawn from 0 … tokens − length · R − 1: where the text is cut differs from epoch to epoch
    order(e)           a permutation of 0 … R − 1, drawn by a Feistel network with the seed's and the epoch's keys; what
                       comes to lie beyond R goes through it again (cycle walking: Black and Rogaway, "Ciphers with
                       Arbitrary Finite Domains", 2002)

A row has length + 1 tokens: the last one is a target alone, and the first one of the row behind it in the text. Every
epoch so has every token as a target once, but for the first offset(e) + 1 and what is left at the end, at most
2 · length together, which are others in other epochs. Nothing is held in memory, and no row depends on how many were
read before.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gptkern.training.errors import UserError

if TYPE_CHECKING:
    from gptkern.training.data.store import Tokens

ROUNDS = 8
LEAST_BITS = 6  # of 2 to 16 rows: with fewer bits some orders came more often than chance allows


class Part(NamedTuple):
    """What one process computes of an update.

    Args:
        ids, targets: (rows, length) int64; -100 is no target.
        tokens: targets that count in the whole update, over all processes. read: ids of it that are no padding.
    """

    ids: np.ndarray
    targets: np.ndarray
    tokens: int
    read: int


class Rows:
    """The shuffled rows of a split.

    Args:
        tokens: the split. length: of a row, of which the ids have one more. seed: any whole number.
        split: its name, for people.

    Raises:
        UserError: there are fewer than length + 1 tokens.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int, split: str = "training"):
        check_length(tokens, length, split)
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_epoch = max(1, len(tokens) // length - 1)
        self._offsets = len(tokens) - self.per_epoch * length  # so many to draw from

    def starts(self, first: int, rows: int) -> np.ndarray:
        """Where the rows first, first + 1, … begin in the split, (rows,) int64."""
        parts, number = [], first
        while number < first + rows:
            epoch, place = divmod(number, self.per_epoch)
            most = min(self.per_epoch - place, first + rows - number)
            keys, offset = self._epoch(epoch)
            parts.append(offset + self.length * permuted(np.arange(place, place + most), self.per_epoch, keys))
            number += most
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def rows(self, first: int, rows: int) -> np.ndarray:
        """The rows first, first + 1, …, (rows, length + 1) int64."""
        ids = np.empty((rows, self.length + 1), np.int64)
        for row, start in zip(ids, self.starts(first, rows).tolist()):
            row[:] = self.tokens.read(start, start + self.length + 1)
        return ids

    def part(self, update: int, batch: int, first: int, rows: int) -> Part:
        """Of an update of `batch` rows those from `first` on."""
        ids, tokens = self.rows(update * batch + first, rows), batch * self.length
        return Part(ids[:, :-1], ids[:, 1:], tokens, tokens)

    def row(self, number: int) -> np.ndarray:
        """One row, (length + 1,) int64."""
        return self.rows(number, 1)[0]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        """The keys of its permutation, and its offset."""
        drawn = int.from_bytes(_drawn(self.seed, epoch, "offset"), "little")
        return order_keys(self.seed, epoch), drawn % self._offsets


def order_keys(seed: int, epoch: int) -> np.ndarray:
    """Of the permutation of an epoch, (ROUNDS,) uint64."""
    return np.frombuffer(_drawn(seed, epoch, "order"), "<u8", ROUNDS)


def _drawn(seed: int, epoch: int, purpose: str) -> bytes:
    return hashlib.blake2b(f"{seed} {epoch} {purpose}".encode()).digest()


def check_length(tokens: Tokens, length: int, split: str) -> None:
    """Raises UserError where a split has no row of that length."""
    if len(tokens) < length + 1:
        raise UserError(f"the {split} text has {len(tokens)} tokens; rows of {length} need at least {length + 1}")


def permuted(numbers: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of 0 … size − 1 takes numbers, (count,) int64; keys: (ROUNDS,) uint64."""
    bits = max(LEAST_BITS, (size - 1).bit_length())
    values = _feistel(numbers.astype(np.uint64), bits, keys)
    # A value beyond the size is taken further along its cycle, on which there is one within: the number itself.
    while (beyond := values >= size).any():
        values[beyond] = _feistel(values[beyond], bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0 … 2^bits − 1: (left, right) -> (right, left ^ mix(right ^ key)), once for each key.

    mix is the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014), of
    which the upper bits are taken. The halves change places, and so do their numbers of bits: there is an even number
    of rounds.
    """
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64(2**right_bits - 1)
    for key in keys:
        mixed = right ^ key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        left, right = right, left ^ (mixed >> np.uint64(64 - left_bits))
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
