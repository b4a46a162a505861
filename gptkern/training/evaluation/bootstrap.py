"""Intervals of metrics: what they would be on other examples of the same kind.

Percentile bootstrap: of n examples n are drawn with replacement, many times over; the interval is from the 2.5th to the
97.5th percentile of what a metric is on them. Examples are drawn whole, and all metrics are of the same draws.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gptkern.training.evaluation.metrics import Statistic

CONFIDENCE = 0.95


class Measured(NamedTuple):
    """A metric. `low` and `high` are None where nothing was drawn, or all of it is one example."""

    value: float
    low: float | None = None
    high: float | None = None


def draws(count: int, times: int, seed: int) -> Iterator[np.ndarray]:
    """`times` times the places of `count` examples, (count,), drawn with replacement; the same ones for a seed.

    Made of PCG64's 64 raw bits, which no version of NumPy may change.
    """
    generator = np.random.PCG64(seed % 2**64)
    for _ in range(times):
        raw = generator.random_raw(count) >> np.uint64(32)
        # floor(u · count) of u in [0, 1) in 32 bits: no place is likelier by more than count / 2^32
        yield ((raw * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def measured(statistic: Statistic, count: int, times: int = 1000, seed: int = 0) -> dict[str, Measured]:
    """The metrics of `count` examples, with their intervals from `times` draws; 0 for none."""
    values = statistic(np.arange(count))
    if times == 0 or count < 2:
        return {name: Measured(value) for name, value in values.items()}
    drawn: dict[str, list[float]] = {name: [] for name in values}
    for picked in draws(count, times, seed):
        for name, value in statistic(picked).items():
            drawn[name].append(value)
    beyond = (1 - CONFIDENCE) / 2
    ends = {name: np.quantile(found, (beyond, 1 - beyond)) for name, found in drawn.items()}
    return {name: Measured(value, float(ends[name][0]), float(ends[name][1])) for name, value in values.items()}
