"""What a study was begun with, and what follows from it for each of its trials.

All trials train on the same number of tokens, within rounding, whatever their batch:

    tokens = steps · batch · length                          of the recipe that the search starts from
    steps of a trial = ⌊tokens / (batch · length · parts)⌋ · parts
    parts = eta^(rungs - 1)                                  after each of which the held-out loss is looked at
    rung r is at steps · eta^r / parts
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from gptkern.formatting import shown
from gptkern.training import recipe_files
from gptkern.training.errors import UserError
from gptkern.training.recipe import Recipe
from gptkern.training.search import halving
from gptkern.training.search.space import Grid, Space
from gptkern.training.search.study import WAYS, Trial
from gptkern.training.values import Choice, Whole

BUDGETS = ("trials", "tokens", "minutes")
METHODS = ("random", "grid")
SAMPLERS = ("tpe", "gp")
PRUNERS = ("median", "none")
MOST_PARTS = 4096
MOST_AT_ONCE = 10_000  # trials of a way
# What has to fit together: which values of it are tried together before any work.
_TOGETHER = (("batch", "accumulate"), ("schedule", "warmup", "decay"))
_WHOLE = {
    "amount": Whole(1), "seed": recipe_files.KEYS["seed"].kind, "eta": Whole(2, 64), "rungs": Whole(1, 13),
    "points": Whole(1, 1000), "startup": Whole(1, 10**6), "length": Whole(1),
}  # fmt: skip
_WORDS = {
    "kind": Choice(BUDGETS), "method": Choice(METHODS), "sampler": Choice(SAMPLERS), "pruner": Choice(PRUNERS),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a study was begun with.

    Args:
        base: every key of a recipe with its value, as `recipe_files.completed` gives them, device and precision
            decided. length: tokens of a row.
        space: what is varied. ways: of WAYS, in their order. kind, amount: the budget of each way.
        seed: of the trials' parameters and of their own seeds.
        eta, rungs: of successive halving. method: "random" or "grid", of at most `points` values of a range.
        sampler: "tpe" or "gp", after `startup` random trials. pruner: "median" or "none".
        advice: what experience says, a list of {"key", "value", "reason", "source"}.
    """

    base: dict[str, Any]
    length: int
    space: Space
    ways: tuple[str, ...] = WAYS
    kind: str = "trials"
    amount: int = 16
    seed: int = 0
    eta: int = 2
    rungs: int = 4
    method: str = "random"
    points: int = 4
    sampler: str = "tpe"
    startup: int = 8
    pruner: str = "median"
    advice: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Settings:
        """What `about` of a study holds.

        Raises:
            UserError: it is none of a study.
        """
        try:
            base = about["base"]
            if base.keys() != recipe_files.KEYS.keys():
                odd = sorted(base.keys() ^ recipe_files.KEYS.keys())
                raise ValueError(f"its recipe has other keys: {', '.join(odd)}")
            for key, value in base.items():
                if value is not None:
                    base[key] = recipe_files.KEYS[key].kind.checked(value)
            values = {name: kind.checked(about[name]) for name, kind in (_WHOLE | _WORDS).items()}
            space, ways = Space.of(about["space"], ""), tuple(about["ways"])
            if not ways or any(way not in WAYS for way in ways):
                raise ValueError("its ways are none")
            advice = tuple(
                {name: item[name] for name in ("key", "value", "reason", "source")} for item in about["advice"]
            )
            settings = cls(base=base, space=space, ways=ways, advice=advice, **values)
            settings.check()
            return settings
        except (UserError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"the study does not say what it was begun with: {shown(str(error))}") from None

    def described(self) -> dict[str, Any]:
        """As `of` takes it; JSON can hold it."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return found | {"space": self.space.described(), "ways": list(self.ways), "advice": list(self.advice)}

    # --- Sizes --------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> int:
        return self.eta ** (self.rungs - 1)

    @property
    def tokens(self) -> int:
        """That a trial trains on, at most."""
        return self.base["steps"] * self.base["batch"] * self.length

    @property
    def bought(self) -> int:
        """Trials that successive halving begins with, of a budget in tokens."""
        return halving.bought(Fraction(self.amount, self.tokens), self.eta, self.rungs)

    def steps(self, batch: int) -> int:
        """Updates of a trial with so many rows an update."""
        return self.tokens // (batch * self.length * self.parts) * self.parts

    def step_of_rung(self, trial: Trial) -> int:
        """The step until which a trial is to be trained now."""
        if trial.way != "experiment":
            return trial.steps
        return trial.steps * self.eta ** min(trial.rung, self.rungs - 1) // self.parts

    @property
    def advised(self) -> dict[str, Any]:
        """The parameters of the trial of experience."""
        return {item["key"]: item["value"] for item in self.advice}

    # --- Trials -------------------------------------------------------------------------------------------------------

    def trial(self, number: int, way: str, params: Mapping[str, Any], bracket: int = 0) -> Trial:
        batch = params.get("batch", self.base["batch"])
        return Trial(
            number, way, dict(params), {}, steps=self.steps(batch), tokens_per_step=batch * self.length, bracket=bracket
        )

    def values(self, trial: Trial) -> dict[str, Any]:
        """Every key of a trial's recipe with its value: `gptkern train` takes them."""
        found = self.base | trial.params
        part = max(1, trial.steps // self.parts)
        found |= {"steps": trial.steps, "context": self.length, "save_every": part, "evaluate_every": part, "keep": 1}
        # Values that do nothing are the default's, as in a recipe's file, which does not hold them.
        found |= {key: recipe_files.KEYS[key].default for key in recipe_files.without_effect(found)}
        return found | {"seed": derived(self.seed, trial.number)}

    def recipe(self, trial: Trial) -> Recipe:
        """Raises ValueError where its values do not fit together."""
        return recipe_files.recipe_of(self.values(trial), length=self.length, device=self.base["device"])

    # --- Checks -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What can be known before any work of all that the space holds.

        Raises:
            UserError: values of the space do not fit together, or the budget buys no trial.
        """
        if self.parts > MOST_PARTS:
            raise UserError(
                f"--eta {self.eta} and --rungs {self.rungs}: a trial would have {self.parts} parts; it needs "
                f"at most {MOST_PARTS}"
            )
        space = self.space
        if not space.parameters and set(self.ways) - {"experience"}:
            raise UserError("the space is empty; it needs a key that is varied")
        schedules = space.ends("schedule", self.base["schedule"])
        for key in ("decay", "final_lr"):
            if key in space.parameters and all(
                key in recipe_files.without_effect({"schedule": one}) for one in schedules
            ):
                raise UserError(f"{key} has no effect on the schedule {', '.join(schedules)}: it is varied in vain")
        for batch in space.ends("batch", self.base["batch"]):
            if self.steps(batch) < self.parts:
                raise UserError(
                    f"batch {batch}: the {self.tokens:,} tokens of a trial are {self.tokens // (batch * self.length)} "
                    f"updates; it needs at least {self.parts}, one for each part of a trial (--steps, --rungs, --eta)"
                )
        for keys in (*_TOGETHER, *((key,) for key in space.parameters)):
            for values in itertools.product(*(space.ends(key, self.base[key]) for key in keys)):
                params = dict(zip(keys, values))
                if keys == ("heads",) or "width" in keys:
                    continue  # of the model: whoever has its preset looks at these
                # A value that only its partners make possible is tried with them.
                if len(keys) == 1 and any(keys[0] in group for group in _TOGETHER):
                    continue
                try:
                    self.recipe(self.trial(0, "experiment", params))
                except ValueError as error:
                    raise UserError(f"the space holds {_listed(params)}: {error}") from None
        count = {"trials": self.amount, "tokens": self.amount // self.tokens, "minutes": 0}[self.kind]
        if "experiment" in self.ways and self.kind == "tokens":
            count = self.bought
        if self.method == "grid" and "experiment" in self.ways:
            grid = len(Grid(space, self.points))
            count = grid if self.kind == "minutes" else min(count, grid)
        if count > MOST_AT_ONCE:
            raise UserError(
                f"the budget, {self.amount} {self.kind}, is {count} trials of a way; it needs at most {MOST_AT_ONCE}"
            )
        if "experience" in self.ways:
            try:
                self.recipe(self.trial(0, "experience", self.advised))
            except ValueError as error:
                raise UserError(f"what experience says does not fit what was given: {error}") from None
        if self.kind == "tokens" and self.amount < self.tokens:
            raise UserError(f"--tokens is {self.amount}; it needs at least those of one trial, {self.tokens}")


def derived(seed: int, number: int) -> int:
    """The seed of a trial: 63 bits of a hash of the study's and its number."""
    return int.from_bytes(hashlib.sha256(f"trial:{seed}:{number}".encode()).digest()[:8], "big") >> 1


def _listed(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in params.items())
