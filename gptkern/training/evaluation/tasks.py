"""The tasks: what is read, what the model is asked, and what its answers are worth.

Each is made with the data, which it reads and holds against model and tokenizer, and is then asked once for the texts
as they are and once more for texts with noise.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptkern.formatting import count, shown
from gptkern.training.data.examples import (
    COMPLETION,
    LABEL,
    NO_RELATION,
    TEXT,
    TRANSLATION,
    Example,
    as_completion,
    label_completion,
    objects,
    read_examples,
)
from gptkern.training.data.tokenizers import Tokenizer
from gptkern.training.errors import UserError
from gptkern.training.evaluation import candidates, metrics, reading
from gptkern.training.evaluation.candidates import Continuations, Question
from gptkern.training.evaluation.generating import greedy
from gptkern.training.evaluation.likelihood import Computing
from gptkern.training.evaluation.noise import noisy

TOKENS = 128  # that a translation has at most


class Asked(NamedTuple):
    """What came of it.

    Args:
        statistic: of the examples' answers. details: what else there is to tell, as JSON. cut: prompts that were cut.
    """

    statistic: metrics.Statistic
    details: dict[str, Any]
    cut: int


class Encoder:
    """Texts as the ids that `example_rows.encode` makes of them; an error says which text has none."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]

    def prompt(self, text: str) -> list[int]:
        """The end of the text before it where it is empty; of a tokenizer without one nothing."""
        return self.tokenizer.encode(text).tolist() or self.end

    def refuse_empty(self, where: str) -> None:
        raise UserError(
            f"{where}: its prompt is empty, and no token of {self.tokenizer.name} stands for the end of the text before"
        )

    def continuation(self, text: str, where: str) -> list[int]:
        ids = self.tokenizer.encode(text).tolist()
        if not ids:
            name = self.tokenizer.name
            raise UserError(f"{where}: none of {shown(text)} is a token by {name}; it needs one at least")
        return ids


class Choices:
    """Multiple choice: the likeliest is taken, once as it is, and once by how likely it is for each of its bytes.

        accuracy                 of argmax_c log p(c | prompt)
        accuracy_per_byte        of argmax_c log p(c | prompt) / bytes of c

    Source: Brown et al., "Language Models are Few-Shot Learners", 2020 (arXiv:2005.14165), section 2.4 (there for each
    token, which hangs on the tokenizer).
    """

    task = reading.CHOICE

    def __init__(self, data: str, option: str, model, tokenizer: Tokenizer):
        self.model, self.encoder = model, Encoder(tokenizer)
        self.questions = list(reading.choices(data, option))
        self.continuations = []
        for question in self.questions:
            of_question = [self.encoder.continuation(text, question.where) for text in question.texts()[1]]
            _check_room(of_question, model.config.context, question.where)
            if not self.encoder.prompt(question.texts()[0]):
                self.encoder.refuse_empty(question.where)
            self.continuations.append(of_question)

    def __len__(self) -> int:
        return len(self.questions)

    def ask(self, how: Computing, changed: Callable[[str], str] = str) -> Asked:
        cut, asked = 0, []
        for question, continuations in zip(self.questions, self.continuations):
            text = question._replace(prompt=changed(question.prompt)).texts()[0]
            # Noise may leave nothing.
            prompt = self.encoder.prompt(text or question.prompt)
            asked.append(Question(prompt, Continuations(continuations)))
            cut += asked[-1].is_cut(self.model.config.context)
        right, right_per_byte = [], []
        for question, found in zip(self.questions, candidates.nats_of(self.model, asked, how)):
            sizes = [len(text.encode()) for text in question.texts()[1]]
            right.append(int(found.argmin()) == question.answer)
            right_per_byte.append(int((found / sizes).argmin()) == question.answer)
        return Asked(metrics.of_means(accuracy=right, accuracy_per_byte=right_per_byte), {}, cut)


class Labels:
    """Classification, and relations: by the model's head where it has one, else the likeliest label after the text.

    Where the tokens of one label begin those of another, what is asked for is each label and the end of the text behind
    it: by itself the shorter one is never less likely.

    Args:
        labels: all that there are; None: those of the data. negative: the label that stands for none, of relations;
            None of a classification.
    """

    def __init__(
        self, data: str, option: str, model, tokenizer: Tokenizer, labels: Sequence[str] | None = None,
        negative: str | None = None,
    ):  # fmt: skip
        self.model, self.encoder = model, Encoder(tokenizer)
        self.task = reading.CLASSIFICATION if negative is None else reading.RELATION
        self.head = getattr(model, "score", None)
        self.examples = of_kind(data, option, self.task, LABEL)
        self.labels = sorted({example.completion for example in self.examples}) if labels is None else list(labels)
        places = {label: place for place, label in enumerate(self.labels)}
        if len(places) < len(self.labels):
            raise UserError(f"labels are {_listed(self.labels)}; each of them needs to be there once")
        for example in self.examples:
            if example.completion not in places:
                raise UserError(
                    f"{where(data, option, example)}: label {shown(example.completion)} is none of the "
                    f"{count(len(self.labels), 'label')} that there are: {_listed(self.labels)}"
                )
            if not self._prompt(example):
                self.encoder.refuse_empty(where(data, option, example))
        if len(self.labels) < 2:
            raise UserError(
                f"{option} {shown(data)}: all of it is labelled {shown(self.labels[0])}; it needs two labels at least"
            )
        self.truth = [places[example.completion] for example in self.examples]
        self.negative = places.get(negative)
        if negative is not None and self.negative is None and negative != NO_RELATION:
            raise UserError(f"--negative {shown(negative)}: no label is called so; they are {_listed(self.labels)}")
        self.continuations = [
            self.encoder.continuation(label_completion(label), f"label {shown(label)}") for label in self.labels
        ]
        begins = _one_begins_another(self.continuations) if self.head is None else None
        if begins is not None and self.continuations[begins[0]] == self.continuations[begins[1]]:
            one, other = (shown(self.labels[place]) for place in begins)
            raise UserError(
                f"labels {one} and {other} have the same tokens by {tokenizer.name}, which tells them from each other "
                "nowhere; it needs other labels, or a model with a head over them"
            )
        self.ends = begins is not None
        if begins is not None:
            if not self.encoder.end:
                one, other = (shown(self.labels[place]) for place in begins)
                raise UserError(
                    f"label {other} begins with label {one}, and no token of {tokenizer.name} stands for the end of a "
                    "text: the longer one would never be the likelier; it needs other labels, or a model whose "
                    "tokenizer has an end of text"
                )
            self.continuations = [[*ids, *self.encoder.end] for ids in self.continuations]
        if self.head is None:
            for label, ids in zip(self.labels, self.continuations):
                _check_room([ids], model.config.context, f"label {shown(label)}")

    def __len__(self) -> int:
        return len(self.examples)

    def ask(self, how: Computing, changed: Callable[[str], str] = str) -> Asked:
        prompts = [self._prompt(example, changed) for example in self.examples]
        context = self.model.config.context
        if self.head is not None:
            return self._answered(
                candidates.by_head(self.model, self.head, prompts, how), sum(len(ids) > context for ids in prompts)
            )
        continuations = Continuations(self.continuations)
        asked = [Question(prompt, continuations) for prompt in prompts]
        decided = [int(found.argmin()) for found in candidates.nats_of(self.model, asked, how)]
        return self._answered(decided, sum(each.is_cut(context) for each in asked))

    def _answered(self, decided: Sequence[int], cut: int) -> Asked:
        classes = len(self.labels)
        matrix = metrics.confusion_matrix(np.asarray(self.truth), np.asarray(decided), classes)
        by = "head" if self.head is not None else "likelihood of the label" + " and the end of the text" * self.ends
        details = {"by": by, "labels": self.labels, "confusion_matrix": matrix.tolist()}
        if self.task == reading.CLASSIFICATION:
            return Asked(metrics.of_decisions(self.truth, decided, classes), details, cut)
        details["negative"] = None if self.negative is None else self.labels[self.negative]
        return Asked(metrics.of_relations(self.truth, decided, classes, self.negative), details, cut)

    def _prompt(self, example: Example, changed: Callable[[str], str] = str) -> list[int]:
        text = changed(example.prompt) or example.prompt  # noise may leave nothing
        return self.encoder.prompt(as_completion(example._replace(prompt=text))[0])


class Translations:
    """Translations that the model says greedily: how many are the very target, BLEU and chrF by sacrebleu.

    Args:
        tokens: that a translation has at most.

    Sources: Papineni et al., "BLEU", 2002; Popović, "chrF", 2015; Post, "A Call for Clarity in Reporting BLEU Scores",
    2018 (arXiv:1804.08771), for the signatures.
    """

    task = reading.TRANSLATION

    def __init__(self, data: str, option: str, model, tokenizer: Tokenizer, tokens: int = TOKENS):
        self.model, self.encoder, self.tokens = model, Encoder(tokenizer), tokens
        self.scorers = sacrebleu_scorers()
        self.examples = of_kind(data, option, self.task, TRANSLATION)
        self.texts: list[str] = []  # that were said when it was asked last
        # Which tokens may end a line.
        self._breaks = functools.cache(lambda token: "\n" in tokenizer.decode([token]))
        # What a target has of lines its translation may have.
        self.lines = any("\n" in example.completion.strip() for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def ask(self, how: Computing, changed: Callable[[str], str] = str) -> Asked:
        # What is said has its place in the context, too.
        room = max(1, self.model.config.context - self.tokens)
        prompts = [
            self.encoder.prompt(as_completion(example._replace(prompt=changed(example.prompt)))[0])
            for example in self.examples
        ]
        cut = sum(len(prompt) > room for prompt in prompts)
        end = self.encoder.tokenizer.end_of_text
        said = greedy(self.model, [prompt[-room:] for prompt in prompts], self.tokens, end, how, self._is_over)
        self.texts = [self._text(ids) for ids, _ in said]
        targets = [example.completion.strip() for example in self.examples]
        details = {"ended": sum(ended for _, ended in said), "tokens": self.tokens}
        statistic, details["signatures"] = of_translations(self.texts, targets, self.scorers)
        return Asked(statistic, details, cut)

    def _is_over(self, ids: Sequence[int]) -> bool:
        """Whether a line has ended, where the targets are lines."""
        return not self.lines and self._breaks(ids[-1]) and "\n" in self.encoder.tokenizer.decode(ids).lstrip()

    def _text(self, ids: Sequence[int]) -> str:
        text = self.encoder.tokenizer.decode(ids).strip()
        return text if self.lines else text.partition("\n")[0].strip()


def sacrebleu_scorers() -> dict[str, Any]:
    """Raises UserError where sacrebleu is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sacrebleu":
            raise
        raise UserError("--task translation needs sacrebleu: install the extra evaluate (README)") from None
    return {"bleu": BLEU(), "chrf": CHRF()}


def of_translations(
    texts: Sequence[str], targets: Sequence[str], scorers: dict[str, Any]
) -> tuple[metrics.Statistic, dict[str, str]]:
    """(statistic, sacrebleu's signature of each score): exact match from 0 to 1, BLEU and chrF from 0 to 100."""
    exact = np.array([text == target for text, target in zip(texts, targets)], np.float64)
    signatures, sums = {}, {}
    for name, scorer in scorers.items():
        # A score of many texts is one of the sums of what is counted in each.
        sums[name] = np.array(scorer._extract_corpus_statistics(texts, [targets]), np.float64)
        # It knows its signature once it has seen how many references there are.
        scorer.corpus_score(texts[:1], [targets[:1]])
        signatures[name] = str(scorer.get_signature())

    def statistic(picked: np.ndarray) -> dict[str, float]:
        scores = {
            name: float(scorers[name]._compute_score_from_stats(counts[picked].sum(0)).score)
            for name, counts in sums.items()
        }
        return {"exact_match": float(exact[picked].mean()), **scores}

    return statistic, signatures


def of_kind(data: str, option: str, task: str, kind: str) -> list[Example]:
    """The examples of a file, which have to be of a kind."""
    words = {
        TEXT: "text",
        COMPLETION: "prompt and completion",
        LABEL: "text and label",
        TRANSLATION: "source and target",
    }
    examples = []
    for example in read_examples(data, option):
        if example.kind != kind:
            raise UserError(
                f"{where(data, option, example)} has {words[example.kind]}; --task {task} needs {words[kind]}"
            )
        examples.append(example)
    return examples


def where(data: str, option: str, example: Example) -> str:
    """What an error calls it; of a list in JSON the object's number counts."""
    if len(reading.files(data)) == 2:
        return f"{option} {shown(data)}: line {example.line}"
    return f"{next(objects(data, option))[0].rpartition(' ')[0]} {example.line}"


def with_noise(rate: float, seed: int) -> Callable[[str], str]:
    return lambda text: noisy(text, rate, seed)


def _check_room(continuations: Sequence[Sequence[int]], context: int, where: str) -> None:
    longest = max(map(len, continuations))
    if longest > context:
        raise UserError(
            f"{where}: what may follow a prompt has {longest} tokens; it needs {context} at most, the model's context"
        )


def _one_begins_another(rows: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """The places of a row, and of one that begins with it."""
    # Sorted, what begins with a row comes right behind it.
    ordered = sorted((list(row), place) for place, row in enumerate(rows))
    pairs = itertools.pairwise(ordered)
    return next(((place, other) for (row, place), (longer, other) in pairs if longer[: len(row)] == row), None)


def _listed(labels: Sequence[str]) -> str:
    named = ", ".join(shown(label) for label in labels[:5])
    return f"{named} and {len(labels) - 5} more" if len(labels) > 5 else named
