"""How likely a model finds tokens after others.

    nats of a target = lse(z) - z_target,    z = features · weight^T  of the place before it

Rows of several lengths are filled up at their right ends. A causal model sees nothing of what lies to the right, and
places are counted from the left: what a row is given does not depend on those that it is computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

import gptkern.functional as F
from gptkern.models.gpt import GPT
from gptkern.training.errors import RunError
from gptkern.training.precision import autocast

BATCH = 16  # rows that are computed together


class Row(NamedTuple):
    """What a model reads, and what is asked of it.

    Args:
        ids: at least one and at most the context. places: in ids, after which a target is asked for; one may come
            several times. targets: as many.
    """

    ids: Sequence[int]
    places: Sequence[int]
    targets: Sequence[int]


class Computing(NamedTuple):
    """How a model is run.

    Args:
        device: that the model is on. precision: "fp32", "bf16" or "fp16". batch: rows together.
        called: after each batch with the number of its rows.
    """

    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    batch: int = BATCH
    called: Callable[[int], object] = lambda rows: None


@torch.no_grad()
def nats(model: GPT, rows: Sequence[Row], how: Computing) -> list[np.ndarray]:
    """-log p of each target, natural: for each row a float64 array of as many. The model is in eval mode.

    The longest rows come first: what does not fit into memory shows at once.

    Raises:
        RunError: one of them is no finite number.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
    for start in range(0, len(order), how.batch):
        picked = order[start : start + how.batch]
        features = read(model, [rows[index].ids for index in picked], how)  # (rows, length, width)
        length = features.shape[1]
        places = [row * length + place for row, index in enumerate(picked) for place in rows[index].places]
        targets = [target for index in picked for target in rows[index].targets]
        with autocast(how.device, how.precision):
            # The logits of the places that are asked for, and never whole where they are many.
            values = F.linear_cross_entropy(
                features.flatten(0, 1)[torch.tensor(places, device=how.device, dtype=torch.int64)],
                model.lm_head.weight,
                torch.tensor(targets, device=how.device, dtype=torch.int64),
                reduction="none", loss_dtype=torch.float32,
            )  # fmt: skip
        values = values.cpu().double().numpy()
        check_finite(np.isfinite(values).all(), how)
        ends = np.cumsum([len(rows[index].targets) for index in picked])
        for index, part in zip(picked, np.split(values, ends[:-1])):
            found[index] = part
        how.called(len(picked))
    return found


def check_finite(is_finite: bool, how: Computing) -> None:
    """Raises RunError where what a model says is no number: the first of several NaN would pass for a decision."""
    if not is_finite:
        raise RunError(
            f"in {how.precision} the model computes what is no finite number: nothing is decided by that; it needs a "
            "precision in which it does not overflow, or another model"
        )


def read(model: GPT, rows: Sequence[Sequence[int]], how: Computing) -> torch.Tensor:
    """What `lm_head` is given, (rows, length, width), length the longest row's; without meaning behind a row's end."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for filled, row in zip(ids, rows):
        filled[: len(row)] = torch.tensor(row, dtype=torch.int64)
    with autocast(how.device, how.precision):
        return model(ids.to(how.device), head=False)[0]
