"""Optuna's samplers and pruners, asked for one trial at a time.

Each question makes a study in memory out of the trials that are there, and a sampler whose seed is the trial's own: so
the answer hangs on the trials and on the number alone, and not on how often the process was ended in between.

Sources: Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011 (TPE); Snoek, Larochelle and
Adams, "Practical Bayesian optimization of machine learning algorithms", NeurIPS 2012 (Gaussian processes); Akiba et
al., "Optuna", KDD 2019.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptkern.training.errors import UserError
from gptkern.training.recipe_files import KEYS
from gptkern.training.search.space import Choices, Parameter, Space
from gptkern.training.search.study import FINISHED, PAUSED, PRUNED, STOPPED, WORST, Trial

PACKAGES = {"tpe": ("optuna",), "gp": ("optuna", "scipy")}


def check(sampler: str) -> None:
    """Raises UserError where a package is missing that the sampler needs."""
    missing = [name for name in PACKAGES[sampler] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--way learning with --sampler {sampler} needs {' and '.join(missing)}: install the extra search "
            "(pip install 'gptkern[search]')"
        )


def suggested(
    space: Space, sampler: str, seed: int, startup: int, trials: Sequence[Trial], parts: int
) -> dict[str, Any]:
    """The parameters of a next trial.

    Args:
        sampler: "tpe" or "gp". seed: of this trial. startup: trials that are drawn at random, before the others'
            losses count. trials: those before it, in their order; one that failed counts as worst, one that runs as
            one of which nothing is known yet. parts: of a trial, after each of which it has a held-out loss.
    """
    seed %= 2**32  # what NumPy's generator takes
    with quiet():
        import optuna

        made = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
            if sampler == "tpe"
            else optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        )
        study = optuna.create_study(sampler=made)
        distributions = {key: distribution(key, parameter) for key, parameter in space.parameters.items()}
        study.add_trials([_frozen(trial, distributions, parts, sampler) for trial in trials])
        params = study.ask(fixed_distributions=distributions).params
    # In the space's order, and Python's numbers: JSON takes no NumPy's.
    return {key: KEYS[key].kind.checked(_plain(params[key])) for key in space.parameters}


def is_pruned(space: Space, pruner: str, startup: int, trial: Trial, trials: Sequence[Trial], parts: int) -> bool:
    """Whether a trial is to end at its last held-out loss.

    Args:
        pruner: "median" (Optuna's: the trial's lowest loss is above the median of the finished ones' at this part) or
            "none". startup: finished trials that there need to be. trials: the others.
    """
    if pruner == "none":
        return False
    with quiet():
        import optuna

        study = optuna.create_study()
        distributions = {key: distribution(key, parameter) for key, parameter in space.parameters.items()}
        study.add_trials([_frozen(other, distributions, parts, "tpe") for other in trials])
        frozen = _frozen(trial, distributions, parts, "tpe")
        return bool(optuna.pruners.MedianPruner(n_startup_trials=startup).prune(study, frozen))


def _frozen(trial: Trial, distributions: Mapping[str, Any], parts: int, sampler: str) -> Any:
    import optuna

    states = optuna.trial.TrialState
    of_part = {step * parts // trial.steps: loss for step, loss in trial.values.items()}
    state, value = states.RUNNING, None
    if trial.state in WORST:
        state, value, of_part = states.COMPLETE, math.inf, {}
    elif trial.state == FINISHED:
        state, value = states.COMPLETE, trial.loss
    elif trial.state in (PRUNED, STOPPED, PAUSED):
        state = states.PRUNED
        if sampler == "gp":
            # It knows finished trials alone: what a pruned one had is no lower than what it would have come to.
            state, value = states.COMPLETE, trial.loss
    return optuna.trial.create_trial(
        state=state, value=value, params=dict(trial.params), distributions=dict(distributions),
        intermediate_values=of_part,
    )  # fmt: skip


def distribution(key: str, parameter: Parameter) -> Any:
    """Optuna's distribution of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choices):
        return CategoricalDistribution(parameter.values)
    if parameter.step is None:
        return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
    return IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's lines and warnings of experiments stay away; the process's settings are put back."""
    import optuna

    before = optuna.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            yield
        finally:
            optuna.logging.set_verbosity(before)
