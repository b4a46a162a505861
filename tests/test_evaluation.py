"""What `gptkern evaluate` computes: metrics as scikit-learn and sacrebleu have them, likelihoods as float64 has."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import subprocess
import sys

import numpy as np
import plain_gpt
import pytest
import torch
from model_folders import TEXTS, bpe, model

import gptkern
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.evaluation import bootstrap, candidates, generating, language, likelihood, metrics, noise, tasks
from gptkern.training.evaluation import windows as of_windows
from gptkern.training.evaluation.likelihood import Computing, Row


@functools.cache
def subject():
    made = model()
    gptkern.swap(made)
    return made


# --- Metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_decisions_and_relations_are_those_of_scikit_learn(seed):
    from sklearn import metrics as theirs

    classes, draw = 7, np.random.default_rng(seed)
    # Classes that are never true, never decided, or neither.
    truth, decided = draw.integers(0, classes - seed, 80), draw.integers(seed // 2, classes - 1, 80)
    truth[: 80 * seed // 4] = 2
    everything = np.arange(80)
    assert (
        metrics.confusion_matrix(truth, decided, 9) == theirs.confusion_matrix(truth, decided, labels=range(9))
    ).all()
    of_all = metrics.of_decisions(truth, decided, 9)(everything)
    assert of_all["accuracy"] == pytest.approx(theirs.accuracy_score(truth, decided), abs=1e-12)
    assert of_all["macro_f1"] == pytest.approx(theirs.f1_score(truth, decided, average="macro"), abs=1e-12)
    without = [label for label in range(classes) if label != 2]
    expected = theirs.precision_recall_fscore_support(truth, decided, labels=without, average="micro", zero_division=0)
    found = metrics.of_relations(truth, decided, classes, 2)(everything)
    assert [found[name] for name in ("precision", "recall", "micro_f1")] == pytest.approx(expected[:3], abs=1e-12)
    picked = draw.integers(0, 80, 80)
    again = metrics.of_decisions(truth, decided, 9)(picked)
    assert again["macro_f1"] == pytest.approx(
        theirs.f1_score(truth[picked], decided[picked], average="macro"), abs=1e-12
    )


def test_relations_that_are_none_count_where_they_are_wrong():
    # truths none none a a b, decisions none a a none a: of 3 decided relations 1 is right, of 3 true ones 1 is found
    found = metrics.of_relations([0, 0, 1, 1, 2], [0, 1, 1, 0, 1], 3, 0)(np.arange(5))
    assert found == {"micro_f1": pytest.approx(1 / 3), "precision": 1 / 3, "recall": 1 / 3, "accuracy": 0.4}
    assert metrics.of_relations([0, 0], [0, 0], 2, 0)(np.arange(2))["micro_f1"] == 0.0


def test_translations_are_those_of_sacrebleu():
    import sacrebleu

    draw = random.Random(0)
    words = ["the", "a", "cat", "dog", "sat", "on", ",", ".", "was", "not", "big", "und", "Maus", "日本語"]
    targets = [" ".join(draw.choices(words, k=draw.randrange(3, 12))) for _ in range(30)]
    texts = [" ".join(word for word in target.split() if draw.random() > 0.2) for target in targets]
    statistic, signatures = tasks.of_translations(texts, targets, tasks.sacrebleu_scorers())
    for picked in (np.arange(30), np.random.default_rng(1).integers(0, 30, 30)):
        found = statistic(picked)
        given = [texts[place] for place in picked], [[targets[place] for place in picked]]
        assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(*given).score, abs=1e-9) and 0 < found["bleu"] < 100
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(*given).score, abs=1e-9)
        assert found["exact_match"] == pytest.approx(sum(texts[p] == targets[p] for p in picked) / 30)
    assert "tok:13a" in signatures["bleu"] and f"version:{sacrebleu.__version__}" in signatures["chrf"]


# --- Intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    from scipy.stats import binom

    statistic = metrics.of_means(share=[1] * 12 + [0] * 28)
    found = bootstrap.measured(statistic, 40, times=4000, seed=3)["share"]
    assert found.value == 0.3
    assert found.low == pytest.approx(binom.ppf(0.025, 40, 0.3) / 40, abs=1 / 40 + 1e-9)
    assert found.high == pytest.approx(binom.ppf(0.975, 40, 0.3) / 40, abs=1 / 40 + 1e-9)
    # Of two draws from 0 and 1 each of the three means is far from rare.
    assert bootstrap.measured(metrics.of_means(share=[0, 1]), 2)["share"] == (0.5, 0.0, 1.0)


def test_draws_are_the_same_ones_wherever_they_are_drawn():
    first, second = bootstrap.draws(10, 2, seed=-1)
    raw = np.random.PCG64(2**64 - 1).random_raw(20).tolist()
    assert [*first, *second] == [10 * (bits >> 32) >> 32 for bits in raw]
    assert sorted(set(np.concatenate(list(bootstrap.draws(10, 50, 0))))) == list(range(10))


def test_one_example_has_no_interval():
    assert bootstrap.measured(metrics.of_means(share=[1.0]), 1)["share"] == (1.0, None, None)
    assert bootstrap.measured(metrics.of_means(share=[1.0, 0.0]), 2, times=0)["share"] == (0.5, None, None)


# --- Noise ------------------------------------------------------------------------------------------------------------


def test_noise_has_its_rate_and_each_kind_its_quarter():
    length, rate = 20000, 0.1
    text = "".join(chr(0x4E00 + place) for place in range(length))  # each character once
    found = noise.noisy(text, rate, seed=5)
    letters = [letter for letter in found if letter in noise.LETTERS]
    kept = [ord(letter) for letter in found if letter not in noise.LETTERS]
    of_a_kind, deviation = length * rate / 4, math.sqrt(length * rate)
    assert len(letters) == pytest.approx(2 * of_a_kind, abs=4 * deviation), "inserted or replaced"
    assert length - len(kept) == pytest.approx(2 * of_a_kind, abs=4 * deviation), "dropped or replaced"
    assert len(found) - length == pytest.approx(0, abs=4 * deviation), "as many inserted as dropped"
    turned = sum(first > second for first, second in itertools.pairwise(kept))
    assert turned == pytest.approx(of_a_kind, abs=4 * deviation), "swapped"
    assert len(set(kept)) == len(kept) and set(letters) == set(noise.LETTERS)


def test_noise_is_the_same_everywhere_and_hangs_on_seed_and_text_alone():
    assert noise.noisy("The cat sat on the mat.", 0.2, seed=1) == "Th sn sa on the mbat."
    assert noise.noisy("The cat sat on the mat.", 0.2, seed=2) == "hTye cath st on theejmat."
    assert noise.noisy("The cat sat on the mat.", 0.0) == "The cat sat on the mat." and noise.noisy("", 0.9) == ""


# --- Likelihoods ------------------------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_float64_whatever_is_computed_beside_them():
    draw, rows = random.Random(1), []
    for length in (24, 1, 7, 13, 24, 2, 9):
        ids = [draw.randrange(300) for _ in range(length)]
        places = [draw.randrange(length) for _ in range(4)]
        rows.append(Row(ids, places, [draw.randrange(300) for _ in places]))
    alone = likelihood.nats(subject(), rows, Computing(batch=1))
    for batch in (3, 16):
        for one, other in zip(alone, likelihood.nats(subject(), rows, Computing(batch=batch))):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    for row, found in zip(rows, alone):
        expected = -plain_gpt.log_probabilities(subject(), row.ids)
        np.testing.assert_allclose(found, [expected[p, t] for p, t in zip(row.places, row.targets)], rtol=0, atol=5e-5)


def test_continuations_that_share_rows_have_the_likelihoods_that_they_have_alone():
    draw = random.Random(2)
    together = [[5], [6, 7], [6, 8], [6, 7, 9], [6], [10, 11, 12, 13]]
    asked = candidates.Continuations(together)
    questions = [candidates.Question([draw.randrange(300) for _ in range(length)], asked) for length in (1, 9, 60)]
    assert len(questions[0].rows(24)) == 2, "what begins alike is read together"
    assert [question.is_cut(24) for question in questions] == [False, False, True]
    for question, found in zip(questions, candidates.nats_of(subject(), questions, Computing(batch=2))):
        # 24 are read at most, of which the longest takes three
        prompt = question.prompt[-21:]
        expected = [plain_gpt.nats(subject(), prompt, continuation) for continuation in together]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


def test_a_head_decides_by_the_last_token_of_each_prompt():
    draw = random.Random(3)
    head = torch.nn.Linear(48, 5, bias=False)
    prompts = [[draw.randrange(300) for _ in range(length)] for length in (1, 9, 60, 24, 5)]
    features = [plain_gpt.features(subject(), prompt[-24:])[-1] for prompt in prompts]
    expected = [int((head.weight.double() @ each).argmax()) for each in features]
    assert len(set(expected)) > 1
    for batch in (1, 4):
        assert candidates.by_head(subject(), head, prompts, Computing(batch=batch)) == expected


def test_what_is_said_greedily_is_what_generate_says():
    prompts = [[1], list(range(20)), [5, 6, 7], list(range(40)), [9, 8]]
    expected = [
        model().generate(torch.tensor([prompt]), 12, temperature=0)[0, len(prompt) :].tolist() for prompt in prompts
    ]
    for batch in (1, 3):
        found = generating.greedy(subject(), prompts, 12, None, Computing(batch=batch))
        assert found == [(said, False) for said in expected]
    end = expected[1][4]
    for said, (ids, ended) in zip(expected, generating.greedy(subject(), prompts, 12, end, Computing())):
        assert (ids, ended) == ((said[: said.index(end)], True) if end in said else (said, False))


# --- Texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "stride"), [(6, 6), (6, 3), (6, 1), (5, 2)])
@pytest.mark.parametrize("end_of_text", [99, None])
def test_each_token_is_asked_for_once_in_the_first_window_that_reaches_it(context, stride, end_of_text):
    draw = random.Random(context * 10 + stride)
    for _ in range(20):
        documents = [[[draw.randrange(9) for _ in range(draw.randrange(13))] for _ in range(3)] for _ in range(3)]
        given = [draw.randrange(99) for _ in range(draw.randrange(4))]
        parts = [
            of_windows.Part(np.array(ids, np.uint16), 0, np.array(given), number == 0, number == 2)
            for document in documents for number, ids in enumerate(document)
        ]  # fmt: skip
        expected = []
        for number, document in enumerate(documents):
            before = given or [end_of_text] * (end_of_text is not None)
            x = [*before, *itertools.chain(*document)]
            owners = [-1] * len(before) + [3 * number + part for part, ids in enumerate(document) for _ in ids]
            for t in range(max(1, len(before)), len(x)):
                window = max(0, math.ceil((t - context) / stride))
                expected.append((x[window * stride : t], x[t], owners[t]))
        found = [
            (list(row.ids[: place + 1]), target, owner)
            for row, owners in of_windows.windows(parts, context, stride, end_of_text)
            for place, target, owner in zip(row.places, row.targets, owners)
        ]
        assert found == expected


@pytest.mark.parametrize("stride", [24, 7])
def test_a_text_is_worth_what_a_loop_over_its_tokens_says(tmp_path, stride):
    """Two documents behind their ends, tokens of several bytes; each token in a context of its own."""
    texts, end = ["Ein Wort, noch ein Wörtchen — 日本語!", TEXTS[10]], bpe().end_of_text
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    total, count = 0.0, 0
    for text in texts:
        x = [end, *bpe().encode(text).tolist()]
        for t in range(1, len(x)):
            window = max(0, math.ceil((t - 24) / stride))
            total += plain_gpt.nats(subject(), x[window * stride : t], [x[t]])
            count += 1
    asked = language.Language(str(tmp_path / "two.jsonl"), "--data", subject(), bpe(), stride).ask(Computing(batch=2))
    found, size = asked.statistic(np.arange(2)), len("".join(texts).encode())
    assert (asked.details["tokens"], asked.details["bytes"]) == (count, size) and count > 40
    assert found["nats_per_byte"] == pytest.approx(total / size, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_bytes_without_an_end_of_text_leave_the_first_one_out(tmp_path):
    made = model(vocab_size=256)
    (tmp_path / "text.txt").write_bytes("日本".encode())
    asked = language.Language(str(tmp_path / "text.txt"), "--data", made, bytes_tokenizer(end_of_text=False), 24)
    answered = asked.ask(Computing())
    ids = list("日本".encode())
    expected = plain_gpt.nats(made, ids[:1], ids[1:]) / 5
    assert answered.details["bytes"] == answered.details["tokens"] == 5
    assert answered.statistic(np.arange(1))["nats_per_byte"] == pytest.approx(expected, rel=1e-5)


# --- Memory -----------------------------------------------------------------------------------------------------------

MEASURING = """
import sys, torch, numpy as np, gptkern
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training.evaluation import likelihood, room
from gptkern.training.free_memory import forget_peak, peak, resident
vocab, width, context, batch = map(int, sys.argv[1:5])
made = GPT(GPTConfig(vocab, context, layers=2, width=width, heads=4)).eval()
gptkern.swap(made)
how = likelihood.Computing(precision=sys.argv[5], batch=batch)
likelihood.nats(made, [likelihood.Row([1, 2], [0, 1], [1, 1])], how)
rows = [likelihood.Row(np.arange(context), range(context), np.arange(context))] * (2 * batch)
before = resident()
forget_peak()
likelihood.nats(made, rows, how)
print(room.needed(made.config, how) / (peak() - before))
"""


@pytest.mark.deep
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read off /proc")
@pytest.mark.parametrize("sizes", ["256 256 256 64 fp32", "50257 256 256 16 fp32", "8192 256 256 64 bf16"])
def test_the_memory_that_is_asked_for_is_what_it_takes(sizes):
    command = [sys.executable, "-c", MEASURING, *sizes.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.8 < float(done.stdout) < 2.5
