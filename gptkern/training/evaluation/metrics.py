"""Numbers made of decisions: accuracy, F1 scores, exact match. With M[t, p] the examples of class t decided to be p:

    accuracy = Σ_c M[c, c] / Σ M
    F1 of c  = 2 M[c, c] / (Σ_p M[c, p] + Σ_t M[t, c])
    macro-F1 = the mean over the classes that are there, as truth or as decision

    micro-F1 without a negative class n: over c ≠ n
        precision = Σ M[c, c] / the decisions that are not n         recall = Σ M[c, c] / the truths that are not n
        F1        = 2 Σ M[c, c] / both counts together

A quotient by 0 is 0.

Source: Zhang et al., "Position-aware Attention and Supervised Data Improve Slot Filling", 2017, section 5: relations
are to be found, so that "no relation" counts where it is missed or guessed wrongly, and not where it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# (the numbers of some examples, of which each may be there several times) -> metrics by their names.
Statistic = Callable[[np.ndarray], dict[str, float]]


def confusion_matrix(truth: np.ndarray, decided: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes), int64: a row a true class, a column a decision."""
    return np.bincount(truth * classes + decided, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: np.ndarray) -> float:
    return _quotient(matrix.trace(), matrix.sum())


def macro_f1(matrix: np.ndarray) -> float:
    there = matrix.sum(0) + matrix.sum(1)
    # F1 = 2 M[c, c] / (truths + decisions)
    scores = 2 * matrix.diagonal()[there > 0] / there[there > 0]
    return float(scores.mean()) if len(scores) else 0.0


def micro_without(matrix: np.ndarray, negative: int | None) -> tuple[float, float, float]:
    """(precision, recall, F1) of all classes but one; None: of all, where each of the three is the accuracy."""
    kept = np.array([index for index in range(len(matrix)) if index != negative], int)
    right = matrix[kept, kept].sum()
    decided, true = matrix[:, kept].sum(), matrix[kept].sum()
    return _quotient(right, decided), _quotient(right, true), _quotient(2 * right, decided + true)


def of_decisions(truth: Sequence[int], decided: Sequence[int], classes: int) -> Statistic:
    """Accuracy and macro-F1."""
    truth, decided = np.asarray(truth), np.asarray(decided)

    def statistic(picked: np.ndarray) -> dict[str, float]:
        matrix = confusion_matrix(truth[picked], decided[picked], classes)
        return {"accuracy": accuracy(matrix), "macro_f1": macro_f1(matrix)}

    return statistic


def of_relations(truth: Sequence[int], decided: Sequence[int], classes: int, negative: int | None) -> Statistic:
    """Micro-F1 without the negative class, its precision and recall, and the accuracy over all classes."""
    truth, decided = np.asarray(truth), np.asarray(decided)

    def statistic(picked: np.ndarray) -> dict[str, float]:
        matrix = confusion_matrix(truth[picked], decided[picked], classes)
        precision, recall, f1 = micro_without(matrix, negative)
        return {"micro_f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy(matrix)}

    return statistic


def of_means(**columns: Sequence[float]) -> Statistic:
    """The mean of each column."""
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    return lambda picked: {name: float(values[picked].mean()) for name, values in arrays.items()}


def _quotient(above: float, below: float) -> float:
    return float(above / below) if below else 0.0
