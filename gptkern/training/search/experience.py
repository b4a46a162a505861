"""A recipe by experience: rules that others found, each choice with its reason and its source. Nothing is trained.

With N parameters, D tokens to train on, B tokens of an update, and C = D · operations of a token without embeddings:

    D    what is given; else the least of 20 N and 4 times the text
    B    N >= 1e8: GPT-3's batch for N, log-log between the sizes of its table, whose ends count beyond them
         N <  1e8: 0.2920 · C^0.3271
         either way at most D / 1000, and as rows a power of two
    lr   of B above, before it was cut: GPT-3's for N, or 0.3118 · C^-0.1250; then · √(B cut / B above), Adam's rule
    W    updates of the warm-up: 2 / (1 - beta2), from GPT-3's share of a training up to a tenth

They are a beginning, not an optimum: the table is of trainings of 3e11 tokens, the laws in C were fitted from 1e17
operations on, and what lies elsewhere is an extrapolation. Each `Choice` says which rule it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gptkern import formatting
from gptkern.models.gpt import GPTConfig
from gptkern.training import memory as memories
from gptkern.training import mup, recipe_files
from gptkern.training.recipe import Recipe

# Parameters, peak learning rate, tokens of a batch: Brown et al., table 2.1.
GPT3_TABLE = (
    (125e6, 6.0e-4, 0.5e6), (350e6, 3.0e-4, 0.5e6), (760e6, 2.5e-4, 0.5e6), (1.3e9, 2.0e-4, 1e6),
    (2.7e9, 1.6e-4, 1e6), (6.7e9, 1.2e-4, 2e6), (13e9, 1.0e-4, 2e6), (175e9, 0.6e-4, 3.2e6),
)  # fmt: skip
LEAST_OF_TABLE = 1e8  # parameters: GPT-2's smallest, of 124 million, is still one of the table's
TOKENS_PER_PARAMETER = 20
EPOCHS = 4
LEAST_UPDATES = 1000
GPT3_WARMUP = 375e6 / 300e9  # tokens of the warm-up, of the training
MOST_WARMUP = 0.1

BROWN = "Brown et al. 2020, GPT-3 (arXiv:2005.14165)"
DEEPSEEK = "Bi et al. 2024, DeepSeek LLM (arXiv:2401.02954), equation 1"
HOFFMANN = "Hoffmann et al. 2022, Chinchilla (arXiv:2203.15556)"
MUENNIGHOFF = "Muennighoff et al. 2023 (arXiv:2305.16264)"
MALLADI = "Malladi et al. 2022 (arXiv:2205.10287)"
MA = "Ma, Yarats 2021 (arXiv:1910.04209)"
XUE = "Xue et al. 2023 (arXiv:2305.13230)"
YANG = "Yang et al. 2022, Tensor Programs V (arXiv:2203.03466)"
CHEN = "Chen et al. 2016 (arXiv:1604.06174)"


class Choice(NamedTuple):
    """A key of a recipe, its value, why, and who says so ("" where it follows from what is given)."""

    key: str
    value: Any
    reason: str
    source: str = ""


def choices(
    config: GPTConfig,
    tokens: int | None = None,
    *,
    text: int | None = None,
    length: int | None = None,
    batch: int | None = None,
    memory: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    found: tuple[int, float] | None = None,
) -> list[Choice]:
    """The rules' recipe of a model.

    Args:
        tokens: to train on, however often they are the same ones; None for as many as its compute is best spent with.
        text: different tokens that there are; None where that is not known. length: tokens of a row; None for the
            context. batch: rows of an update, where they are decided.
        memory: bytes, for which the update is cut into pieces; None for no limit. device, precision: a Recipe's.
        found: (width, lr) of a narrower model with heads of the same size, which µP transfers.

    Raises:
        ValueError: a number is below 1. UserError: no narrower model has that width.
    """
    length = config.context if length is None else length
    for name, value in (("tokens", tokens), ("text", text), ("length", length), ("batch", batch), ("memory", memory)):
        if value is not None and value < 1:
            raise ValueError(f"choices: {name} is {value}; it needs to be at least 1")
    if found is not None:
        mup.check(config, found[0])
    parameters = memories.parameter_count(config)
    made = _Rules(config, parameters, length)
    total, of_steps = made.tokens(tokens, text)
    rows, of_batch, reference = made.batch(total, batch)
    steps = max(1, total // (rows * length))
    chosen = [Choice("steps", steps, *of_steps), Choice("batch", rows, *of_batch)]
    chosen += made.pieces(rows, memory, device, precision)
    chosen += made.rate(total, rows, reference, found)
    beta2 = 0.95
    warmup = min(max(2 / (1 - beta2) / steps, GPT3_WARMUP), MOST_WARMUP)
    epochs = None if text is None else total / text
    return [
        *chosen,
        Choice("schedule", "cosine", "the cosine down to a tenth of the peak", f"{BROWN}, appendix B"),
        Choice("final_lr", 0.1, "the cosine ends there", f"{BROWN}, appendix B"),
        Choice("warmup", _rounded(warmup), f"2 / (1 - beta2) = 40 updates, between GPT-3's share, {GPT3_WARMUP:g}, and "
               f"{MOST_WARMUP:g}", f"{MA}; {BROWN}, appendix B"),
        Choice("weight_decay", 0.1, "of matrices", f"{BROWN}, appendix B"),
        Choice("beta1", 0.9, "as GPT-3", f"{BROWN}, appendix B"),
        Choice("beta2", beta2, "as GPT-3: shorter than Adam's own 0.999", f"{BROWN}, appendix B"),
        Choice("clip", 1.0, "the norm of all gradients together", f"{BROWN}, appendix B"),
        _dropout(epochs),
    ]  # fmt: skip


def recipe(chosen: Sequence[Choice]) -> dict[str, Any]:
    """Their values by key."""
    return {choice.key: choice.value for choice in chosen}


def text(chosen: Sequence[Choice], given: Mapping[str, Any] | None = None) -> str:
    """A recipe file: each choice under its reason and source, as comments.

    Args:
        given: keys that stand there as they are, before the choices and in place of those of the same key.
    """
    given = given or {}
    parts = ["# A recipe by experience: rules of others, nothing was trained. `gptkern train --recipe` reads it.\n"]
    if any(value is not None for value in given.values()):
        parts.append(f"\n# as given\n{recipe_files.text(given)}")
    for choice in chosen:
        if given.get(choice.key) is None:
            source = f"\n# {_line(choice.source)}" if choice.source else ""
            parts.append(f"\n# {_line(choice.reason)}{source}\n{recipe_files.text({choice.key: choice.value})}")
    return "".join(parts)


def scaled(lr: float, ratio: float, optimizer: str = "adam") -> float:
    """The learning rate of a batch `ratio` times as large.

        adam    lr · √ratio      Malladi et al., 2022 (arXiv:2205.10287)
        sgd     lr · ratio       Goyal et al., 2017 (arXiv:1706.02677)

    gptkern trains with AdamW; SGD's rule is for comparison with what others report.

    Raises:
        ValueError: ratio is not above 0, or the optimizer is neither.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"scaled: ratio is {ratio!r}; it needs a finite number above 0")
    if optimizer not in ("adam", "sgd"):
        raise ValueError(f"scaled: optimizer is {optimizer!r}; it needs adam or sgd")
    return lr * (math.sqrt(ratio) if optimizer == "adam" else ratio)


def of_table(parameters: float) -> tuple[float, float]:
    """(learning rate, tokens of a batch) of GPT-3's table, log-log between its sizes; its ends beyond them."""
    sizes = [row[0] for row in GPT3_TABLE]
    parameters = min(max(parameters, sizes[0]), sizes[-1])
    above = next(index for index, size in enumerate(sizes) if parameters <= size)
    if above == 0:
        return GPT3_TABLE[0][1:]
    (low, *values), (high, *others) = GPT3_TABLE[above - 1 : above + 1]
    part = math.log(parameters / low) / math.log(high / low)
    lr, tokens = (a * (b / a) ** part for a, b in zip(values, others))
    return lr, tokens


def of_compute(operations: float) -> tuple[float, float]:
    """(learning rate, tokens of a batch) of a training of so many operations: DeepSeek LLM's laws."""
    return 0.3118 * operations**-0.1250, 0.2920 * operations**0.3271


class _Rules:
    def __init__(self, config: GPTConfig, parameters: int, length: int):
        self.config, self.parameters, self.length = config, parameters, length

    def tokens(self, given: int | None, text: int | None) -> tuple[int, tuple[str, str]]:
        """(tokens, why so many updates)"""
        if given is not None:
            return given, (f"{given:,} tokens, as given", "")
        best = TOKENS_PER_PARAMETER * self.parameters
        words = f"about {TOKENS_PER_PARAMETER} tokens a parameter are compute-optimal: {best:,} of {self.parameters:,}"
        if text is None or best <= EPOCHS * text:
            return best, (words, HOFFMANN)
        words += f"; here {EPOCHS} epochs of the text's {text:,}, after which the same ones are worth ever less"
        return EPOCHS * text, (words, f"{HOFFMANN}; {MUENNIGHOFF}")

    def reference(self, total: int) -> tuple[float, float, str, str]:
        """(learning rate, tokens of its batch, the rule, its source)"""
        if self.parameters >= LEAST_OF_TABLE:
            return *of_table(self.parameters), f"GPT-3's table at {self.parameters:,} parameters", f"{BROWN}, table 2.1"
        width, layers = self.config.width, self.config.layers
        operations = total * (72 * layers * width**2 + 12 * layers * width * self.length)
        rule = f"{self.parameters:,} parameters are below GPT-3's table; of {operations:.2g} operations"
        if operations < 1e17:
            rule += " (the law was fitted from 1e17 on)"
        return *of_compute(operations), rule, DEEPSEEK

    def batch(self, total: int, given: int | None) -> tuple[int, tuple[str, str], tuple[float, float, str, str]]:
        """(rows, why, what `reference` says)"""
        reference = _, of_rule, rule, source = self.reference(total)
        if given is not None:
            return given, ("as given", ""), reference
        most = total / LEAST_UPDATES
        rows = 2 ** max(0, round(math.log2(min(of_rule, most) / self.length)))
        words = f"{rule}: {of_rule:,.0f} tokens"
        if most < of_rule:
            words += f"; {most:,.0f} leave {LEAST_UPDATES:,} updates"
        return rows, (f"{words}; {rows} rows of {self.length} are {rows * self.length:,}", source), reference

    def rate(self, total, rows: int, reference, found) -> list[Choice]:
        if found is not None:
            width, lr = found
            words = f"the learning rate of a width of {width}, which µP keeps for one of {self.config.width}"
            return [Choice("mup", width, "the width for which lr was found", YANG), Choice("lr", lr, words, YANG)]
        lr, of_rule, rule, source = reference
        ratio = rows * self.length / of_rule
        words = f"{rule}: {lr:.2g}, of batches of {of_rule:,.0f} tokens; times √{ratio:.3g} for this one's, Adam's rule"
        return [Choice("lr", _rounded(scaled(lr, ratio)), words, f"{source}; {MALLADI}")]

    def pieces(self, rows: int, most: int | None, device: str, precision: str) -> list[Choice]:
        """The fewest pieces of an update that fit; with recomputed blocks where else none do."""
        if most is None:
            return []

        def needed(accumulate: int, recompute: str = "none") -> int:
            made = Recipe(
                steps=1, batch=rows, length=self.length, lr=1.0, accumulate=accumulate, recompute=recompute,
                precision=precision, device=device,
            )  # fmt: skip
            return memories.needed(self.config, made).total

        divisors = [each for each in range(1, rows + 1) if rows % each == 0]
        there = formatting.size(most)
        for recompute in ("none", "full"):
            for accumulate in divisors:
                size = needed(accumulate, recompute)
                if size <= most:
                    words = (
                        f"in {formatting.count(accumulate, 'piece')} an update needs {formatting.size(size)} of {there}"
                    )
                    more = Choice("recompute", recompute, "without it no piece fits into the memory", CHEN)
                    return [Choice("accumulate", accumulate, words), *([more] if recompute == "full" else [])]
        words = f"of a row at a time, the least that there is; {formatting.size(size)} are needed and there are {there}"
        return [Choice("accumulate", rows, words), Choice("recompute", "full", "it takes the least memory", CHEN)]


def _dropout(epochs: float | None) -> Choice:
    if epochs is None or epochs <= EPOCHS:
        passes = "" if epochs is None else f"; here it is read {epochs:.2g} times"
        return Choice("dropout", 0.0, f"none where a text is read up to {EPOCHS} times{passes}", XUE)
    return Choice("dropout", 0.1, f"the text is read {epochs:.2g} times, more than {EPOCHS}", XUE)


def _rounded(value: float) -> float:
    """Three significant digits: no rule knows more."""
    return float(f"{value:.3g}")


def _line(words: str) -> str:
    """Within a comment."""
    return " ".join(words.split())
