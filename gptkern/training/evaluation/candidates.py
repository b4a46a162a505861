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
from gptkern.training.evaluation.likelihood import Computing, Row, nats, read
from gptkern.training.precision import autocast

READ_TOGETHER = 64  # batches: rows of about the same length find each other


class Question(NamedTuple):
    """A prompt with what may follow it, as ids; neither is empty."""

    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]


class Places(NamedTuple):
    """Where the tokens of a continuation are asked for: in which row, from which of its targets on."""

    row: int
    start: int


def room(question: Question, context: int) -> int:
    """Tokens of the prompt that the longest continuation leaves room for; below 1 it does not fit."""
    return context + 1 - max(map(len, question.continuations))


def rows(question: Question, context: int) -> tuple[list[Row], list[Places]]:
    """The rows that ask for all continuations, and where each is. A prompt that is too long is cut at its left."""
    prompt = list(question.prompt)[-room(question, context) :]
    found = [Places(0, 0)] * len(question.continuations)
    ids: list[list[int]] = []
    places: list[list[int]] = []
    targets: list[list[int]] = []
    for index in sorted(range(len(found)), key=lambda index: -len(question.continuations[index])):
        continuation = list(question.continuations[index])
        # All but its last token is read.
        read = prompt + continuation[:-1]
        row = next((row for row, other in enumerate(ids) if other[: len(read)] == read), None)
        if row is None:
            row = len(ids)
            ids, places, targets = [*ids, read], [*places, []], [*targets, []]
        found[index] = Places(row, len(targets[row]))
        places[row] += range(len(prompt) - 1, len(read))
        targets[row] += continuation
    return [Row(*each) for each in zip(ids, places, targets)], found


def nats_of(model: GPT, questions: Iterable[Question], how: Computing) -> Iterator[np.ndarray]:
    """Of each question -log p of its continuations, (continuations,) in float64."""
    context = model.config.context
    waiting: list[tuple[Question, list[Places], int]] = []
    together: list[Row] = []

    def answered() -> Iterator[np.ndarray]:
        found = nats(model, together, how)
        for question, places, first in waiting:
            yield np.array(
                [
                    found[first + place.row][place.start : place.start + len(continuation)].sum()
                    for place, continuation in zip(places, question.continuations)
                ]
            )

    for question in questions:
        of_question, places = rows(question, context)
        waiting.append((question, places, len(together)))
        together += of_question
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
        for index, place in zip(picked, logits.float().argmax(-1).tolist()):
            decided[index] = place
        how.called(len(picked))
    return decided
