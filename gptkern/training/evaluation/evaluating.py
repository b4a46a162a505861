"""A model and data in, an evaluation out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from gptkern.formatting import shown
from gptkern.training import loading
from gptkern.training.data.examples import NO_RELATION
from gptkern.training.errors import UserError
from gptkern.training.evaluation import bootstrap, reading, room, tasks
from gptkern.training.evaluation.bootstrap import Measured
from gptkern.training.evaluation.language import Language
from gptkern.training.evaluation.likelihood import BATCH, Computing
from gptkern.training.loading import Loaded
from gptkern.version import __version__

AUTO = "auto"
DRAWS = 1000


class Evaluation(NamedTuple):
    """What a model was found to be worth.

    Args:
        task: "language", "choice", "classification", "relation" or "translation". examples: how many.
        metrics: by their names. noisy: the same of prompts with noise; None where there was to be none.
        details: of the task: stride and context; labels and confusion matrix, a row a true label, a column a decision;
            sacrebleu's signatures. noisy_details: of the prompts with noise.
        cut: prompts of which the beginning had no place in the context. noisy_cut: of those with noise.
        about: data and their digest, model, settings, versions.
    """

    task: str
    examples: int
    metrics: dict[str, Measured]
    details: dict[str, Any]
    cut: int
    noisy: dict[str, Measured] | None
    noisy_details: dict[str, Any] | None
    noisy_cut: int | None
    about: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """All of it, with numbers that JSON has: a perplexity without bounds is null."""
        found = {"task": self.task, "examples": self.examples, "metrics": _listed(self.metrics), "cut": self.cut}
        found |= {"details": self.details}
        if self.noisy is not None:
            found["noise"] = {"rate": self.about["settings"]["noise"], "metrics": _listed(self.noisy)}
            found["noise"] |= {"cut": self.noisy_cut, "details": self.noisy_details}
        return found | self.about


def evaluate(
    loaded: Loaded,
    data: str,
    task: str = AUTO,
    *,
    stride: int | None = None,
    labels: Sequence[str] | None = None,
    negative: str | None = None,
    tokens: int | None = None,
    noise: float | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    batch: int = BATCH,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    called: Callable[[int], object] = lambda rows: None,
    name: str = "MODEL",
    option: str = "--data",
) -> Evaluation:
    """What a model is worth on data.

        language        nats and bits per byte of the text in UTF-8, nats per token, perplexity; each token once
        choice          accuracy of argmax_c log p(c | prompt), and with it divided by c's bytes
        classification  accuracy, macro-F1, confusion matrix
        relation        micro-F1, precision, recall without the negative class, accuracy, confusion matrix
        translation     exact match, and sacrebleu's BLEU and chrF, of what the model says greedily

    Intervals are percentile bootstrap's, of 95 %, over the examples (of a text, over its parts of some 8 KiB).

    Args:
        loaded: what `load_model` returns; the model is on `device`, and may be swapped and quantised.
        data: a file's path, two parallel files with a comma between, or a folder of `gptkern data`. task: one of these;
            "auto" is what the data are of.
        stride: of language, tokens from a window of the model's context to the next, at most the context; None: half
            of it. labels: of classification and relation, all that there are; None: those of the model's head, or else
            of the data. negative: of relation; None: "no_relation". tokens: of translation, the most that one has;
            None: 128, or half of the context where that is less.
        noise: rate at which characters of the prompts are swapped, dropped, inserted and replaced, for the same metrics
            once more; not of language. draws: of the bootstrap; 0 for no intervals. seed: of noise and draws.
        batch: rows that are computed together, which changes roundings alone. precision: "fp32", "bf16" or "fp16".
        called: after each batch with the number of its rows. name, option: what errors call model and data.

    Raises:
        UserError: data, model and options do not fit together, or into memory; names file and line. Nothing was run.
        RunError: what the model computes is no finite number.
    """
    tokenizer = loading.with_tokenizer(loaded, name)
    model = loaded.model
    task = reading.task_of(data, option) if task == AUTO else task
    if task not in reading.TASKS:
        raise UserError(f"--task {shown(task)}: it needs one of {AUTO}, {', '.join(reading.TASKS)}")
    _check_used(task, stride=stride, labels=labels, negative=negative, tokens=tokens, noise=noise)
    device = torch.device(device)
    how = Computing(device, precision, batch, called)
    context = model.config.context
    if stride is not None and not 1 <= stride <= context:
        raise UserError(f"--stride is {stride}; it needs to be from 1 to {context}, the model's context")
    if tokens is not None and not 1 <= tokens < context:
        raise UserError(
            f"--tokens is {tokens}; it needs to be from 1 to {context - 1}: the model's context has {context}"
        )
    room.check(model.config, how)
    before = reading.digest(data, option)
    asked: Language | tasks.Choices | tasks.Labels | tasks.Translations
    if task == reading.LANGUAGE:
        asked = Language(data, option, model, tokenizer, stride or max(1, context // 2))
    elif task == reading.CHOICE:
        asked = tasks.Choices(data, option, model, tokenizer)
    elif task == reading.TRANSLATION:
        asked = tasks.Translations(data, option, model, tokenizer, tokens or min(tasks.TOKENS, max(1, context // 2)))
    else:
        negative = (negative or NO_RELATION) if task == reading.RELATION else None
        asked = tasks.Labels(data, option, model, tokenizer, _labels(loaded, labels), negative)
    was_training = model.training
    model.eval()
    try:
        clean = asked.ask(how)
        noised = None if noise is None else asked.ask(how, tasks.with_noise(noise, seed))
    finally:
        model.train(was_training)
    units = clean.details["parts"] if task == reading.LANGUAGE else len(asked)
    measured = [
        None if each is None else bootstrap.measured(each.statistic, units, draws, seed) for each in (clean, noised)
    ]
    about = {
        "data": before,
        "model": _about_model(loaded, tokenizer),
        "settings": {
            "device": str(device), "precision": precision, "batch": batch, "seed": seed, "noise": noise,
            "bootstrap": {"draws": draws, "confidence": bootstrap.CONFIDENCE, "of": _UNITS.get(task, "examples")},
        },
        "versions": _versions(task),
    }  # fmt: skip
    return Evaluation(
        task, len(asked), measured[0], clean.details, clean.cut, measured[1],
        None if noised is None else noised.details, None if noised is None else noised.cut, about,
    )  # fmt: skip


_UNITS = {reading.LANGUAGE: "parts"}
# What the options that not every task has are of.
_USED = {
    "stride": (reading.LANGUAGE,),
    "labels": (reading.CLASSIFICATION, reading.RELATION),
    "negative": (reading.RELATION,),
    "tokens": (reading.TRANSLATION,),
    "noise": (reading.CHOICE, reading.CLASSIFICATION, reading.RELATION, reading.TRANSLATION),
}


def _check_used(task: str, **given: Any) -> None:
    for key, value in given.items():
        if value is not None and task not in _USED[key]:
            raise UserError(f"--{key} has no effect on the task {task}; it is of {' and '.join(_USED[key])}")


def _labels(loaded: Loaded, given: Sequence[str] | None) -> Sequence[str] | None:
    own = loaded.about.get("labels")
    if own is not None:
        if given is not None:
            raise UserError(f"--labels has no effect: the model has a head of {len(own)} labels of its own")
        return own
    return given


def _about_model(loaded: Loaded, tokenizer) -> dict[str, Any]:
    config = loaded.model.config
    found = {"kind": loaded.about["kind"], "step": loaded.about.get("step"), "tokenizer": tokenizer.name}
    sizes = {key: getattr(config, key) for key in ("vocab_size", "context", "layers", "width", "heads")}
    return found | sizes


def _versions(task: str) -> dict[str, str]:
    found = {"gptkern": __version__, "torch": str(torch.__version__), "numpy": np.__version__}
    found["python"] = platform.python_version()
    if task == reading.TRANSLATION:
        import sacrebleu

        found["sacrebleu"] = sacrebleu.__version__
    return found


def _listed(metrics: dict[str, Measured]) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            key: value if value is not None and np.isfinite(value) else None for key, value in each._asdict().items()
        }
        for name, each in metrics.items()
    }
