"""`gptkern evaluate`: the tasks from files to numbers, what is told beside them, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import plain_gpt
import pytest
import torch
from model_folders import TEXTS, bpe, model, save_run, transformers_gpt2

from gptkern import cli
from gptkern.commands import evaluate as command
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import exporting
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.errors import RunError, UserError
from gptkern.training.evaluation import evaluating, likelihood, reading, tasks
from gptkern.training.loading import Loaded, load_model

CHOICES = [
    {"prompt": "die Maus und der", "choices": ["Löwe", "Igel 7", "x"], "answer": 0},
    {"question": "wer?", "choices": ["die Maus", "der Löwe und die Maus"], "answer": 1},
    {"prompt": "der Löwe und die Maus, der Löwe und die Maus, der Löwe ", "choices": [" 1", "2 3 4"], "answer": 1},
]
LABELLED = [("die Maus 4", "Maus"), ("der Löwe", "Löwe"), ("日本語", "Mausfalle"), ("und", "Maus"), ("7 und 49", "x")]
TOKENS = ["Marie", "Curie", "was", "born", "in", "Warsaw", "."]
RELATIONS = [
    {
        "token": TOKENS, "subj_start": 0, "subj_end": 1, "subj_type": "PERSON", "obj_start": place, "obj_end": place,
        "obj_type": "CITY", "relation": relation, "id": "more keys",
    }
    for place, relation in ((5, "per:city_of_birth"), (4, "no_relation"), (6, "no_relation"), (3, "per:title"))
]  # fmt: skip
PAIRS = [("the lion", "der Löwe"), ("the mouse", "die Maus"), ("and", "und")]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    save_run(folder, model())
    return folder


@pytest.fixture
def here(tmp_path, run_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    os.symlink(run_folder, "run")
    lines("choices.jsonl", CHOICES)
    lines("labels.jsonl", [{"text": text, "label": label} for text, label in LABELLED])
    Path("tacred.json").write_text(json.dumps(RELATIONS))
    Path("a.en").write_text("".join(f"{source}\n" for source, _ in PAIRS))
    Path("a.de").write_text("".join(f"{target}\n" for _, target in PAIRS))
    Path("text.txt").write_text("der Löwe und die Maus\n" * 40)
    return tmp_path


def lines(name: str, objects) -> None:
    Path(name).write_text("".join(json.dumps(each) + "\n" for each in objects))


@pytest.fixture
def evaluate(capsys):
    """evaluate(arguments) -> (exit status, the JSON, what was printed, the errors)"""

    def run(*arguments: str):
        Path("out.json").unlink(missing_ok=True)
        status = cli.main(["evaluate", *arguments, "--json", "out.json", "--device", "cpu"])
        found = json.loads(Path("out.json").read_text()) if Path("out.json").exists() else None
        return status, found, *capsys.readouterr()

    return run


def test_what_help_says_is_the_library_s():
    assert (evaluating.AUTO, *reading.TASKS) == command.TASKS
    assert (likelihood.BATCH, evaluating.DRAWS) == (command.BATCH, command.DRAWS)


# --- Tasks ------------------------------------------------------------------------------------------------------------


def test_multiple_choice(here, evaluate):
    status, found, printed, errors = evaluate("run", "--data", "choices.jsonl")
    assert (status, errors, found["task"], found["examples"]) == (0, "", "choice", 3)
    right, per_byte = [], []
    prompts = ["die Maus und der", "Question: wer?\nAnswer:", CHOICES[2]["prompt"]]
    texts = [[" Löwe", " Igel 7", " x"], [" die Maus", " der Löwe und die Maus"], [" 1", "2 3 4"]]
    cut = 0
    for prompt, continuations, asked in zip(prompts, texts, CHOICES):
        ids = [bpe().encode(text).tolist() for text in continuations]
        before = bpe().encode(prompt).tolist()
        room = 25 - max(map(len, ids))
        cut += len(before) > room
        nats = np.array([plain_gpt.nats(model(), before[-room:], each) for each in ids])
        right.append(nats.argmin() == asked["answer"])
        per_byte.append((nats / [len(text.encode()) for text in continuations]).argmin() == asked["answer"])
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert found["metrics"]["accuracy_per_byte"]["value"] == pytest.approx(np.mean(per_byte))
    assert found["cut"] == cut > 0 and "the context has 24 tokens" in printed
    assert 0 <= found["metrics"]["accuracy"]["low"] <= found["metrics"]["accuracy"]["high"] <= 1


def test_labels_of_which_one_begins_another_are_asked_for_with_their_ends(here, evaluate):
    status, found, printed, _ = evaluate("run", "--data", "labels.jsonl")
    assert status == 0 and found["details"]["labels"] == ["Löwe", "Maus", "Mausfalle", "x"]
    ids = {label: bpe().encode(f" {label}").tolist() for label in found["details"]["labels"]}
    assert ids["Mausfalle"][: len(ids["Maus"])] == ids["Maus"] and "and the end of the text" in printed
    expected = np.zeros((4, 4), int)
    for text, label in LABELLED:
        before = bpe().encode(text).tolist()
        nats = [plain_gpt.nats(model(), before, [*each, bpe().end_of_text]) for each in ids.values()]
        expected[list(ids).index(label), int(np.argmin(nats))] += 1
    assert found["details"]["confusion_matrix"] == expected.tolist()
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(expected.trace() / 5)


def test_a_head_decides_and_knows_its_labels(here):
    made, labels = model(), ["x", "Maus", "Löwe", "Mausfalle"]
    made.score = torch.nn.Linear(48, 4, bias=False)
    loaded = Loaded(made, bpe(), {"kind": "run", "labels": labels})
    found = evaluating.evaluate(loaded, "labels.jsonl", draws=0)
    expected = np.zeros((4, 4), int)
    for text, label in LABELLED:
        logits = made.score.weight.double() @ plain_gpt.features(made, bpe().encode(text).tolist())[-1]
        expected[labels.index(label), int(logits.argmax())] += 1
    assert found.details == {"by": "head", "labels": labels, "confusion_matrix": expected.tolist()}
    loaded.about["labels"][0] = "y"
    with pytest.raises(UserError, match=r"--data labels\.jsonl: line 5: label x is none of the 4 labels"):
        evaluating.evaluate(loaded, "labels.jsonl")


def test_labels_that_nothing_tells_apart_are_refused(here):
    loaded = Loaded(model(), bpe(), {"kind": "run"})
    with pytest.raises(
        UserError, match="labels are Maus, Löwe, Mausfalle, x, Maus; each of them needs to be there onc"
    ):
        evaluating.evaluate(loaded, "labels.jsonl", labels=["Maus", "Löwe", "Mausfalle", "x", "Maus"])
    # A tokenizer that drops what it does not know has one row of ids for both.
    alike = copy.copy(bpe())
    known, unlike = alike.encode, {" Mausfalle": " Maus"}
    alike.encode = lambda text: known(unlike.get(text, text))
    with pytest.raises(UserError, match=r"labels Maus and Mausfalle have the same tokens by .*; it needs other labels"):
        evaluating.evaluate(Loaded(model(), alike, {"kind": "run"}), "labels.jsonl")


@pytest.mark.parametrize("data", ["labels.jsonl", "choices.jsonl", "a.en,a.de", "text.txt", "head"])
def test_what_overflows_decides_nothing(here, data):
    made, about = model(), {"kind": "run"}
    with torch.no_grad():
        made.final_norm.weight.fill_(float("inf"))
    if data == "head":
        made.score, data = torch.nn.Linear(48, 4, bias=False), "labels.jsonl"
        about["labels"] = ["Löwe", "Maus", "Mausfalle", "x"]
    Path("text.txt").write_text("die Maus und der Löwe")
    with pytest.raises(RunError, match="in fp32 the model computes what is no finite number"):
        evaluating.evaluate(Loaded(made, bpe(), about), data, draws=0)


def test_relations_without_the_negative_class(here, evaluate):
    status, found, printed, _ = evaluate("run", "--data", "tacred.json")
    assert (status, found["task"], found["details"]["negative"]) == (0, "relation", "no_relation")
    labels, matrix = found["details"]["labels"], np.array(found["details"]["confusion_matrix"])
    assert labels == ["no_relation", "per:city_of_birth", "per:title"] and matrix.sum(1).tolist() == [2, 1, 1]
    right = matrix[1, 1] + matrix[2, 2]
    expected = 2 * right / (matrix[:, 1:].sum() + matrix[1:].sum())
    assert found["metrics"]["micro_f1"]["value"] == pytest.approx(expected) and "likelihood of the label" in printed
    other = evaluate("run", "--data", "tacred.json", "--negative", "per:title")[1]
    assert other["details"]["negative"] == "per:title"


def test_translations(here, evaluate):
    status, found, printed, _ = evaluate("run", "--data", "a.en,a.de", "--tokens", "5", "--bootstrap", "20")
    assert (status, found["task"], [each["file"] for each in found["data"]]) == (0, "translation", ["a.en", "a.de"])
    import sacrebleu

    said = []
    for source, _ in PAIRS:
        ids = bpe().encode(f"{source} =").tolist()
        for _ in range(5):
            token = int(plain_gpt.log_probabilities(model(), ids)[-1].argmax())
            if token == bpe().end_of_text:
                break
            ids.append(token)
        said.append(bpe().decode(ids[len(bpe().encode(f"{source} =")) :]).strip().partition("\n")[0].strip())
    targets = [[target for _, target in PAIRS]]
    assert found["metrics"]["chrf"]["value"] == pytest.approx(sacrebleu.corpus_chrf(said, targets).score)
    assert found["metrics"]["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(said, targets).score)
    assert found["details"]["signatures"]["bleu"] in printed and found["settings"]["bootstrap"]["draws"] == 20


def test_a_translation_ends_with_its_line_where_targets_are_lines(here):
    said = bpe().encode("\n der Löwe\nund mehr").tolist()

    class Said(torch.nn.Module):
        """Says these tokens, whatever it reads."""

        config, lm_head = model().config, torch.nn.Identity()

        def forward(self, ids, head):
            place = (ids != 0).sum(1) - len(bpe().encode("a ="))
            wanted = [said[int(each)] for each in place]
            return torch.nn.functional.one_hot(torch.tensor(wanted), 300)[:, None].float().expand(
                -1, ids.shape[1], -1
            ), None

    for targets, text in (("der Löwe", "der Löwe"), ("der\nLöwe", "der Löwe\nund mehr")):
        lines("one.jsonl", [{"source": "a", "target": targets}])
        asked = tasks.Translations("one.jsonl", "--data", Said(), bpe(), len(said))
        found = asked.ask(likelihood.Computing())
        assert asked.texts == [text]
        assert found.details["ended"] == ("\n" not in targets)


def test_language_of_text_of_objects_and_of_prepared_tokens(here, evaluate):
    lines("all.jsonl", [{"text": text} for text in TEXTS])
    tokenizer = str(here / "run" / "tokenizer.json")
    assert cli.main(["data", "all.jsonl", "--out", "tokens", "--tokenizer", tokenizer, "--held-out", "0.3"]) == 0
    held_out = [
        text for text in TEXTS if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < 0.3 * 2**64
    ]
    lines("held_out.jsonl", [{"text": text} for text in held_out])
    Path("list.json").write_text(json.dumps([{"text": text} for text in held_out]))
    status, of_tokens, printed, _ = evaluate("run", "--data", "tokens", "--stride", "24")
    assert (status, of_tokens["details"]["stride"], of_tokens["details"]["documents"]) == (0, 24, len(held_out))
    assert of_tokens["details"]["bytes"] == len("".join(held_out).encode()) and 5 < len(held_out) < 55
    for name, batch in (("held_out.jsonl", "16"), ("list.json", "3")):
        found = evaluate("run", "--data", name, "--stride", "24", "--batch", batch)[1]
        assert found["details"] == of_tokens["details"]
        for metric, value in of_tokens["metrics"].items():
            assert found["metrics"][metric] == pytest.approx(value, rel=1e-6)
    assert "perplexity per token (context 24, stride 24)" in printed
    half = evaluate("run", "--data", "text.txt")
    assert half[1]["details"]["stride"] == 12 and "(context 24, stride 12)" in half[2]
    assert half[1]["details"]["bytes"] == len(Path("text.txt").read_bytes())


def test_completions_behind_their_prompts(here, evaluate):
    lines(
        "two.jsonl",
        [
            {"prompt": "der Löwe " * 20, "completion": "und die Maus"},
            {"prompt": "", "completion": "ja"},
            {"prompt": "a", "completion": ""},
        ],
    )
    status, found, printed, _ = evaluate("run", "--data", "two.jsonl")
    assert found["details"]["skipped"] == 1 and "2 documents; 1 empty one skipped" in printed
    ids = bpe().encode("und die Maus").tolist()
    before = bpe().encode("der Löwe " * 20).tolist()[-(25 - len(ids)) :]
    expected = plain_gpt.nats(model(), before, ids) + plain_gpt.nats(model(), [0], bpe().encode("ja").tolist())
    assert (status, found["cut"], found["details"]["bytes"]) == (0, 1, 14)
    assert found["metrics"]["nats_per_byte"]["value"] == pytest.approx(expected / 14, rel=1e-5)


# --- Beside the numbers -----------------------------------------------------------------------------------------------


def test_noise_stands_beside_the_clean_numbers_and_is_the_same_again(here, evaluate):
    arguments = ["run", "--data", "labels.jsonl", "--noise", "0.5", "--seed", "4"]
    status, found, printed, _ = evaluate(*arguments)
    clean = evaluate("run", "--data", "labels.jsonl", "--seed", "4")[1]
    assert status == 0 and found["metrics"] == clean["metrics"] and "noise" not in clean and "noise 0.5" in printed
    assert found["noise"]["rate"] == 0.5 and found["noise"]["metrics"].keys() == found["metrics"].keys()
    assert found["noise"]["details"] != found["details"]
    assert evaluate(*arguments)[1] == found


def test_every_kind_of_folder_says_the_same(here, evaluate):
    exporting.export(load_model("run"), "plain")
    arguments = ["--data", "text.txt", "--bootstrap", "0"]
    metrics = [evaluate(name, *arguments)[1]["metrics"] for name in ("run", "run/checkpoints/step-00000007", "plain")]
    assert metrics[0] == metrics[1] == metrics[2]


@pytest.mark.deep
def test_a_gpt2_of_transformers_has_the_loss_that_it_has_there(here, evaluate):
    theirs = transformers_gpt2()
    theirs.save_pretrained("theirs")
    bpe().save(Path("theirs"))
    ids = torch.tensor([[0, *bpe().encode(Path("text.txt").read_text().splitlines()[0]).tolist()]])
    Path("line.txt").write_text(Path("text.txt").read_text().splitlines()[0])
    found = evaluate("theirs", "--data", "line.txt")[1]["metrics"]["nats_per_token"]["value"]
    assert found == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-4)


def test_the_json_says_what_was_evaluated_and_how(here, evaluate):
    _, found, _, _ = evaluate("run", "--data", "text.txt", "--seed", "9", "--int8", "--stock")
    data = Path("text.txt").read_bytes()
    assert found["data"] == [{"file": "text.txt", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}]
    assert (found["model"]["kind"], found["model"]["step"], found["model"]["int8"]) == ("run", 7, True)
    assert (found["settings"]["seed"], found["settings"]["precision"], found["model"]["swapped"]) == (9, "fp32", False)
    assert set(found["versions"]) == {"gptkern", "torch", "numpy", "python"}


def test_a_model_that_is_worth_nothing_has_no_bounds(here, evaluate):
    made = model(vocab_size=257)
    with torch.no_grad():
        made.final_norm.weight.fill_(1e4)
    save_run(here / "wild", made, bytes_tokenizer())
    status, found, printed, _ = evaluate("wild", "--data", "text.txt", "--bootstrap", "0")
    assert status == 0 and found["metrics"]["perplexity"]["value"] is None and " inf" in printed
    assert found["metrics"]["nats_per_token"]["value"] > 1000


# --- What is refused --------------------------------------------------------------------------------------------------

MANY = {"text": "a", "label": "b"}
REFUSED = {
    "no file": (None, [], "--data bad.jsonl: there is no such file; it needs a file"),
    "empty": ("", [], "--data bad.jsonl: it has no example"),
    "empty text": ("", ["--data", "bad.txt"], "--data bad.txt: there is no text in it"),
    "no JSON": ('{"text": "a", "label": "b"}\n{"text": "a"\n', [], "--data bad.jsonl: line 2 is no JSON: "),
    "other keys": ([{"a": 1, "b": 2}], [], "--data bad.jsonl: line 1 has a, b; it needs text, or objects with "),
    "no choices": ([{"prompt": "a", "choices": ["b", "c"], "answer": 0}, {"prompt": "a", "answer": 0}], [],
                   "--data bad.jsonl: line 2 has no choices; it needs prompt or question, choices and answer"),
    "one choice": ([{"prompt": "a", "choices": ["b"], "answer": 0}], [], "line 1: choices is a list of 1; it needs a "),
    "an empty choice": ([{"prompt": "a", "choices": ["b", " "], "answer": 0}], [], "line 1: choices[1] is empty"),
    "a wrong answer": ([{"prompt": "a", "choices": ["b", "c"], "answer": 2}], [], "line 1: answer is 2; it needs the "),
    "true": ([{"prompt": "a", "choices": ["b", "c"], "answer": True}], [], "line 1: answer is no such place; it "),
    "a long choice": ([{"prompt": "a", "choices": ["b", "XYZ" * 20], "answer": 0}], [],
                      "line 1: what may follow a prompt has "),
    "an unknown label": ([MANY, {"text": "a", "label": "d"}], ["--labels", "b,c"],
                         "--data bad.jsonl: line 2: label d is none of the 2 labels that there are: b, c"),
    "one label": ([MANY, MANY], [], "--data bad.jsonl: all of it is labelled b; it needs two labels at least"),
    "labels twice": ([MANY], ["--labels", "b,b"], "--labels b,b: it needs two labels at least, each once"),
    "another kind": ([MANY], ["--task", "translation"], "line 1 has text and label; --task translation needs source"),
    "labels as a text": ([MANY], ["--task", "language"], "line 1 has neither text alone nor prompt and completion"),
    "no effect": ([MANY], ["--stride", "4"], "--stride has no effect on the task classification; it is of language"),
    "noise": ([{"text": "a"}], ["--noise", "0.1"], "--noise has no effect on the task language"),
    "a wide stride": ([{"text": "a"}], ["--stride", "25"], "--stride is 25; it needs to be from 1 to 24, the model's "),
    "many tokens": ([{"source": "a", "target": "b"}], ["--tokens", "24"], "--tokens is 24; it needs to be from 1 to "),
    "no negative": ([MANY, {"text": "a", "label": "c"}], ["--task", "relation", "--negative", "d"],
                    "--negative d: no label is called so; they are b, c"),
    "no place": ([MANY], ["--json", "nowhere/is/out.json"], "--json nowhere/is/out.json: "),
    "no model": ([MANY], [], "FOLDER text.txt is no checkpoint: it is a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_line_and_nothing_is_written(here, capsys, name):
    content, more, message = REFUSED[name]
    for file in ("bad.jsonl", "bad.txt"):
        if content is not None:
            Path(file).write_text(content) if isinstance(content, str) else lines(file, content)
    folder = "text.txt" if name == "no model" else "run"
    Path("out.json").write_text("mine")
    before = ["evaluate", folder, "--device", "cpu"]
    assert cli.main([*before, "--data", "bad.jsonl", "--json", "out.json", *more]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith("gptkern evaluate: ") and errors.count("\n") == 1 and message in errors
    assert Path("out.json").read_text() == "mine"


def test_tokens_of_another_tokenizer_are_refused(here, capsys):
    lines("all.jsonl", [{"text": text} for text in TEXTS])
    cli.main(["data", "all.jsonl", "--out", "tokens", "--tokenizer", "bytes", "--held-out", "0.3"])
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--data", "tokens", "--device", "cpu"]) == 2
    assert "--data tokens are tokens by bytes, and the model's are by bpe of 300" in capsys.readouterr().err


def test_labels_that_begin_alike_need_an_end_of_text(here, capsys):
    save_run(here / "bytes", model(vocab_size=256), bytes_tokenizer(end_of_text=False))
    assert cli.main(["evaluate", "bytes", "--data", "labels.jsonl", "--device", "cpu"]) == 2
    assert "label Mausfalle begins with label Maus, and no token of bytes stands for" in capsys.readouterr().err


def test_without_sacrebleu_translations_say_what_to_install(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert cli.main(["evaluate", "run", "--data", "a.en,a.de", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == (
        "gptkern evaluate: --task translation needs sacrebleu: install the extra evaluate (README)\n"
    )


def test_less_memory_than_it_takes_is_said_before(here, capsys, monkeypatch):
    from gptkern.training.evaluation import room

    monkeypatch.setattr(room, "available", lambda device: 10**6)
    assert cli.main(["evaluate", "run", "--data", "text.txt", "--device", "cpu", "--batch", "64"]) == 2
    assert "the evaluation needs " in (errors := capsys.readouterr().err) and "smaller --batch (now 64)" in errors


@pytest.mark.deep
def test_ctrl_c_ends_with_its_status_and_leaves_the_json(here):
    Path("long.txt").write_text("der Löwe und die Maus\n" * 20000)
    Path("out.json").write_text("mine")
    arguments = ["evaluate", "run", "--data", "long.txt", "--stride", "1", "--json", "out.json", "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-m", "gptkern", *arguments], stderr=subprocess.PIPE, text=True)
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "gptkern evaluate: interrupted\n")
    assert Path("out.json").read_text() == "mine" and not list(Path().glob(".out*"))


@pytest.mark.deep
@pytest.mark.parametrize("what", ["labelled", "headed", "translated"])
def test_what_was_fine_tuned_is_worth_more_than_chance_and_less_under_noise(here, evaluate, what):
    """Three kinds of words, of which one label begins another, by likelihood and by a head; words with translations."""
    draw = random.Random(0)
    words = {"beast": ["cat", "dog", "lion"], "beasts": ["cats", "dogs", "lions"], "city": ["Rome", "Oslo", "Bern"]}
    pairs = [("one", "eins"), ("two", "zwei"), ("four", "vier")]

    def made():
        if what == "translated":
            both = draw.choices(pairs, k=2)
            return {"source": " ".join(each for each, _ in both), "target": " ".join(each for _, each in both)}
        label = draw.choice(list(words))
        return {"text": f"{draw.randrange(100)} {draw.choice(words[label])} again", "label": label}

    torch.manual_seed(0)
    save_run(here / "base", GPT(GPTConfig(vocab_size=257, context=40, layers=2, width=64, heads=2)), bytes_tokenizer())
    lines("train.jsonl", [made() for _ in range(300)])
    lines("test.jsonl", [made() for _ in range(40)])
    options = [
        "--validation",
        "test.jsonl",
        "--steps",
        "200",
        "--lr",
        "5e-3",
        "--device",
        "cpu",
        "--tensorboard",
        "off",
    ]
    options += ["--head"] if what == "headed" else []
    assert cli.main(["finetune", "base", "--data", "train.jsonl", "--out", "tuned", *options]) == 0
    status, found, _, _ = evaluate("tuned", "--data", "test.jsonl", "--noise", "0.2")
    metric = "exact_match" if what == "translated" else "macro_f1"
    clean, noisy = found["metrics"][metric], found["noise"]["metrics"][metric]
    assert status == 0 and clean["value"] > 0.9 and noisy["value"] < clean["value"] - 0.1
    assert clean["low"] <= clean["value"] <= clean["high"]
    assert found["details"].get("by", "head" * (what == "headed")).startswith("head") == (what == "headed")
