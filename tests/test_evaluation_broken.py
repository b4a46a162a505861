"""The evaluation, broken on purpose: the test that is meant for each fault has to see it.

One expression is changed in a copy of a module, whose names stand in for the package's while the test runs.
"""

from __future__ import annotations

import importlib
import pkgutil
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import test_evaluation as whole

from gptkern.training import evaluation

PACKAGE = Path(evaluation.__file__).parent
MODULES = [
    importlib.import_module(f"{evaluation.__name__}.{each.name}") for each in pkgutil.iter_modules([str(PACKAGE)])
]


class Fault(NamedTuple):
    module: str
    old: str  # stands there once
    new: str
    check: Callable[[], None]


DECISIONS = partial(whole.test_decisions_and_relations_are_those_of_scikit_learn, 1)
NEGATIVE = whole.test_relations_that_are_none_count_where_they_are_wrong
TRANSLATIONS = whole.test_translations_are_those_of_sacrebleu
BINOMIAL = whole.test_the_interval_of_a_share_is_that_of_the_binomial_distribution
DRAWS = whole.test_draws_are_the_same_ones_wherever_they_are_drawn
RATE = whole.test_noise_has_its_rate_and_each_kind_its_quarter
SAME = whole.test_noise_is_the_same_everywhere_and_hangs_on_seed_and_text_alone
FLOAT64 = whole.test_likelihoods_are_those_of_float64_whatever_is_computed_beside_them
ALONE = whole.test_continuations_that_share_rows_have_the_likelihoods_that_they_have_alone
GREEDY = whole.test_what_is_said_greedily_is_what_generate_says
WINDOWS = partial(whole.test_each_token_is_asked_for_once_in_the_first_window_that_reaches_it, 5, 2, 99)

FAULTS = {
    "truth for decision": Fault("metrics", "truth * classes + decided", "decided * classes + truth", DECISIONS),
    "macro-F1 over all labels": Fault("metrics", "(scores.mean())", "(scores.sum() / len(matrix))", DECISIONS),
    "F1 without its 2": Fault("metrics", "scores = 2 * matrix", "scores = matrix", DECISIONS),
    "the negative class counts": Fault("metrics", "if index != negative", "if True", DECISIONS),
    "a negative decision counts": Fault("metrics", "matrix[:, kept].sum()", "matrix.sum()", NEGATIVE),
    "a draw without replacement": Fault(
        "bootstrap", "in draws(count, times, seed):", "in (np.arange(count) for _ in range(times)):", BINOMIAL
    ),
    "an interval of half": Fault("bootstrap", "beyond = (1 - CONFIDENCE) / 2", "beyond = 0.25", BINOMIAL),
    "a seed for all": Fault("bootstrap", "np.random.PCG64(seed % 2**64)", "np.random.PCG64(0)", DRAWS),
    "chrF of the first half": Fault("tasks", "counts[picked].sum(0)", "counts[picked[::2]].sum(0)", TRANSLATIONS),
    "half of the noise": Fault("noise", "if draw() >= rate:", "if draw() >= rate / 2:", RATE),
    "one kind in two": Fault("noise", "int(4 * draw())", "int(2 * draw())", RATE),
    "noise without a seed": Fault("noise", 'f"{seed}\\n{text}"', "text", SAME),
    "filled up on the left": Fault("likelihood", "filled[: len(row)] =", "filled[-len(row) :] =", FLOAT64),
    "the place of the longest row": Fault("likelihood", "row * length + place", "(row + 1) * length - 1", FLOAT64),
    "rows in another order": Fault("likelihood", "found[index] = part", "found[start] = part", FLOAT64),
    "a prompt without its end": Fault("candidates", "[-(context + 1 - ", "[: (context + 1 - ", ALONE),
    "a place too far": Fault("candidates", "[len(prompt) - 1 + place", "[len(prompt) + place", ALONE),
    "what fills up is read": Fault("generating", "len(row) - 1 for row in ids", "-1 for row in ids", GREEDY),
    "windows side by side whatever the stride": Fault("windows", "begin += stride", "begin += context", WINDOWS),
    "a text ends with its part": Fault("windows", "(part.last and done", "(done", WINDOWS),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name, monkeypatch):
    fault = FAULTS[name]
    source = (PACKAGE / f"{fault.module}.py").read_text()
    assert source.count(fault.old) == 1, f"{fault.old!r} stands {source.count(fault.old)} times in {fault.module}.py"
    original = importlib.import_module(f"{evaluation.__name__}.{fault.module}")
    changed = types.ModuleType(original.__name__)
    exec(compile(source.replace(fault.old, fault.new), f"{fault.module}.py", "exec"), changed.__dict__)
    for module in (*MODULES, whole):
        for key, value in list(vars(module).items()):
            # A function or a class that the module defines, wherever it was imported.
            if getattr(value, "__module__", None) == original.__name__ and key in vars(changed):
                monkeypatch.setattr(module, key, getattr(changed, key))
    with pytest.raises(Exception) as seen:
        fault.check()
    assert isinstance(seen.value, AssertionError | IndexError), seen.value
