"""Which of several continuations of a prompt a model finds the likeliest; or which class its head does.

    log p(continuation | prompt) = Σ_i log p(token i of it | prompt, its tokens before i)

Continuations that begin alike are read together: of labels of one token each the prompt is read once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from gptkern.models.gpt import GPT
from gptkern.training.evaluation.likelihood import Computing, Row, check_finite, nats, read
from gptkern.training.precision import autocast

READ_TOGETHER = 64  # batches: rows of about the same length find each other


class Continuations:
    """What may follow a prompt, and which rows ask for it.

    Args:
        ids: of each, none of them empty.
    """

    def __init__(self, ids: Sequence[Sequence[int]]):
        self.ids = [list(each) for each in ids]
        self.longest = max(map(len, self.ids))
        # Of each row what it reads behind the prompt, how far behind its end each target is asked for, and the targets.
        self.read: list[list[int]] = []
        self.behind: list[list[int]] = []
        self.targets: list[list[int]] = []
        # Of each continuation its row, and which of the targets there is its first.
        self.places = [(0, 0)] * len(self.ids)
        rows: dict[tuple[int, ...], int] = {}  # by what they begin with
        for index in sorted(range(len(self.ids)), key=lambda index: -len(self.ids[index])):
            read = tuple(self.ids[index][:-1])
            if read not in rows:
                rows |= {read[:stop]: len(self.read) for stop in range(len(read) + 1)}
                self.read.append(list(read))
                self.behind.append([])
                self.targets.append([])
            row = rows[read]
            self.places[index] = row, len(self.targets[row])
            self.behind[row] += range(len(read) + 1)
            self.targets[row] += self.ids[index]


class Question(NamedTuple):
    """A prompt, of one id at least, with what may follow it."""

    prompt: Sequence[int]
    continuations: Continuations

    def is_cut(self, context: int) -> bool:
        """Whether the prompt is too long for the longest continuation to have room behind it."""
        return len(self.prompt) > context + 1 - self.continuations.longest

    def rows(self, context: int) -> list[Row]:
        """What asks for all of them. A prompt that is too long is cut at its left."""
        prompt, asked = list(self.prompt)[-(context + 1 - self.continuations.longest) :], self.continuations
        return [
            Row(prompt + read, [len(prompt) - 1 + place for place in behind], targets)
            for read, behind, targets in zip(asked.read, asked.behind, asked.targets)
        ]


def nats_of(model: GPT, questions: Iterable[Question], how: Computing) -> Iterator[np.ndarray]:
    """Of each question -log p of its continuations, (continuations,) in float64."""
    context = model.config.context
    waiting: list[tuple[Question, int]] = []
    together: list[Row] = []

    def answered() -> Iterator[np.ndarray]:
        found = nats(model, together, how)
        for question, first in waiting:
            asked = question.continuations
            parts = [found[first + row][start : start + len(ids)] for (row, start), ids in zip(asked.places, asked.ids)]
            yield np.array([part.sum() for part in parts])

    for question in questions:
        waiting.append((question, len(together)))
        together += question.rows(context)
        if len(together) >= READ_TOGETHER * how.batch:
            yield from answered()
            waiting, together = [], []
    if waiting:
        yield from answered()


@torch.no_grad()
def by_head(model: GPT, head: torch.nn.Linear, prompts: Sequence[Sequence[int]], how: Computing) -> list[int]:
    """Of each prompt the class of the largest of  head(features at its last token).

    What is longer than the context is cut at its left.
    """
    decided = [0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), how.batch):
        picked = order[start : start + how.batch]
        ids = [list(prompts[index])[-model.config.context :] for index in picked]
        features = read(model, ids, how)  # (rows, length, width)
        last = torch.tensor([len(row) - 1 for row in ids], device=how.device)
        with autocast(how.device, how.precision):
            logits = head(features[torch.arange(len(ids), device=how.device), last])  # (rows, classes)
        check_finite(bool(logits.isfinite().all()), how)
        for index, place in zip(picked, logits.float().argmax(-1).tolist()):
            decided[index] = place
        how.called(len(picked))
    return decided
