"""Successive halving: of the trials at a rung the best part in eta goes on, from its own checkpoint, the rest ends.

    n_0 trials until step steps / eta^(rungs-1)
    n_(r+1) = max(1, ⌊n_r / eta⌋) of them until steps / eta^(rungs-1-(r+1)), and so on to all steps

A trial's recipe, its schedule too, is that of all of its steps from the beginning on: at a rung it is on its way, and
going on costs the steps in between alone.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016
(arXiv:1502.07943).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from gptkern.training.search.study import WORST, Trial


def sizes(count: int, eta: int, rungs: int) -> list[int]:
    """Trials at each rung."""
    found = [count]
    while len(found) < rungs:
        found.append(max(1, found[-1] // eta))
    return found


def cost(count: int, eta: int, rungs: int) -> Fraction:
    """Of `count` trials, in whole trials."""
    ends = [Fraction(eta**rung, eta ** (rungs - 1)) for rung in range(rungs)]
    parts = [end - before for end, before in zip(ends, [Fraction(0), *ends])]
    return sum((n * part for n, part in zip(sizes(count, eta, rungs), parts)), Fraction(0))


def bought(trials: Fraction, eta: int, rungs: int) -> int:
    """The most trials to begin with whose halving costs no more than so many whole ones; 0 where one costs more."""
    if trials < 1:
        return 0
    low, high = 1, 2
    while cost(high, eta, rungs) <= trials:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle, eta, rungs) <= trials else (low, middle)
    return low


def promoted(trials: Sequence[Trial], eta: int) -> list[int]:
    """The numbers of those of a rung that go on: the lowest losses, of equal ones the lower number.

    Args:
        trials: all that came to the rung, and have ended, or wait there. What failed counts, and does not go on.
    """
    ranked = sorted(trials, key=lambda trial: (_loss(trial), trial.number))
    count = max(1, len(trials) // eta)
    return sorted(trial.number for trial in ranked[:count] if _loss(trial) < math.inf)


def _loss(trial: Trial) -> float:
    return math.inf if trial.state in WORST or trial.loss is None else trial.loss
