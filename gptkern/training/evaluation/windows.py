"""Texts that are longer than the context, cut into windows of which each token is asked for once.

A document is its tokens x_1 … x_n behind x_0, the end of the text before it, as in training. Window k reads the C
tokens of the context from k·s on, s the stride, and is asked for what follows them, where no window before it was:

    s = C          windows side by side: the first token of one is predicted of a single other
    s < C          windows overlap: of a long text each token but the first C is predicted of at least C - s others

A smaller stride takes more windows, C/s times as many, and gives a lower perplexity of the same model: the two are told
together. Without a token for the end of a text (bytes of a plain text) nothing is before x_1, which is not asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptkern.training.evaluation.likelihood import Row


class Part(NamedTuple):
    """A document, or a part of a long one.

    Args:
        ids: (tokens,). bytes: of its text in UTF-8. given: (tokens,), read in place of the end of the text before it.
        first, last: whether the document begins, and ends, with it.
    """

    ids: np.ndarray
    bytes: int
    given: np.ndarray = np.empty(0, np.int64)
    first: bool = True
    last: bool = True


def windows(
    parts: Iterable[Part], context: int, stride: int, end_of_text: int | None
) -> Iterator[tuple[Row, np.ndarray]]:
    """Pairs (row, the number of the part that each of its targets is of); parts are counted from 0."""
    ids = owners = np.empty(0, np.int64)
    begin = done = 0
    for number, part in enumerate(parts):
        if part.first:
            before = [] if end_of_text is None else [end_of_text]
            ids = np.array(part.given if len(part.given) else before, np.int64)
            owners = np.full(len(ids), -1)
            begin, done = 0, max(1, len(ids))
        # From here on `begin` and `done`, the next target, count from the beginning of what is left.
        ids = np.concatenate([ids[begin:], part.ids.astype(np.int64)])
        owners = np.concatenate([owners[begin:], np.full(len(part.ids), number)])
        begin, done = 0, done - begin
        while len(ids) - begin > context or (part.last and done < len(ids)):
            end = min(begin + context, len(ids) - 1)
            if end >= done:
                places = range(done - 1 - begin, end - begin)
                yield Row(ids[begin:end], places, ids[done : end + 1]), owners[done : end + 1]
                done = end + 1
            begin += stride
