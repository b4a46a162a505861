"""Fine-tuning: the same losses as an independent loop over single examples, through kills, on the command line."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_folders import save_run
from training_runs import lines_of, run, state_of, stopping_at

from gptkern import cli
from gptkern.models.gpt import GPT, GPTConfig
from gptkern.training import recipe_files, running
from gptkern.training import run as train_module
from gptkern.training.checkpoints import Checkpoints
from gptkern.training.data.example_rows import ExampleStore, load_examples
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.errors import UserError
from gptkern.training.exporting import export
from gptkern.training.loading import load_model
from gptkern.training.loop import Trainer
from gptkern.training.recipe import Recipe

CONFIG = GPTConfig(vocab_size=257, context=24, layers=1, width=16, heads=2)
STEPS, BATCH, LR = 9, 4, 0.01
RECIPE = {"steps": STEPS, "batch": BATCH, "length": 24, "lr": LR, "accumulate": 2, "seed": 3}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """A report takes as long as the rest of such a run; tests/test_training_run.py looks at it."""
    monkeypatch.setattr(running, "report", lambda *_: None)
    monkeypatch.setattr(train_module, "report", lambda *_: None)


def rows(count: int = 30) -> list[dict[str, str]]:
    return [{"prompt": "ab" * (n % 6), "completion": str(n * n) + "x" * (n % 3)} for n in range(count)]


def written(path: Path, content: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def a_store(path: Path) -> ExampleStore:
    return load_examples(written(path / "a.jsonl", rows()), bytes_tokenizer(), 24, held_out=0.2)


def a_model() -> GPT:
    torch.manual_seed(8)
    return GPT(CONFIG)


def test_losses_are_those_of_a_loop_over_single_examples(tmp_path):
    """Each example alone, without padding, its logits at the completion's places alone; then AdamW of PyTorch."""
    store = a_store(tmp_path)
    run(tmp_path / "run", recipe=RECIPE, store=store, model=a_model(), swap=True)
    order = store.rows(24, 3).numbers(0, STEPS * BATCH).tolist()
    texts = {}
    for row in range(len(store.train)):
        ids = store.train.ids[store.train.starts[row] : store.train.stops[row]].tolist()
        texts[row] = ids, int(store.train.given[row])
    given = {
        "".join(map(chr, ids[:n])).replace(chr(256), ""): "".join(map(chr, ids[n:-1])) for ids, n in texts.values()
    }
    assert given.items() <= {(row["prompt"], row["completion"]) for row in rows()} and all(
        ids[-1] == 256 for ids, _ in texts.values()
    )
    model = a_model()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    expected = []
    for step in range(STEPS):
        some = [texts[row] for row in order[BATCH * step : BATCH * (step + 1)]]
        total = 0.0
        for ids, prompt in some:
            logits = model(torch.tensor([ids[:-1]]))[0][0, prompt - 1 :]
            total = total + F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum")
        loss = total / sum(len(ids) - prompt for ids, prompt in some)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        height = 1.0 if step == 0 else (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))) / 2
        for group in optimizer.param_groups:
            group["lr"] = LR if step == 0 else 0.1 * LR + 0.9 * LR * height
        optimizer.step()
        expected.append(loss.item())
    lines = lines_of(tmp_path / "run")
    assert [line["loss"] for line in lines] == pytest.approx(expected, rel=2e-4)
    assert [line["lr"] for line in lines][1:] == pytest.approx(
        [0.1 * LR + 0.9 * LR * (1 + math.cos(math.pi * (n - 1) / (STEPS - 1))) / 2 for n in range(1, STEPS)]
    )
    assert [line["tokens"] for line in lines] == [
        sum(len(texts[row][0]) - texts[row][1] for row in order[BATCH * n : BATCH * (n + 1)]) for n in range(STEPS)
    ]
    held_out = [(store.validation, row) for row in range(len(store.validation))]
    total, count = 0.0, 0
    model = load_model(tmp_path / "run").model
    for part, row in held_out:
        ids, prompt = part.ids[part.starts[row] : part.stops[row]].tolist(), int(part.given[row])
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0][0, prompt - 1 :]
        total += F.cross_entropy(logits, torch.tensor(ids[prompt:]), reduction="sum").item()
        count += len(ids) - prompt
    assert lines[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_kills_and_resumptions_change_nothing(tmp_path):
    def started(out, **more):
        return run(tmp_path / out, recipe=RECIPE, store=a_store(tmp_path), model=a_model(), **more)

    started("whole")
    started("parts", **stopping_at(2))
    for step in (5, 6, STEPS):
        run(tmp_path / "parts", recipe=RECIPE, store=a_store(tmp_path), config=CONFIG, resume=True, **stopping_at(step))
    assert state_of(tmp_path / "parts") == state_of(tmp_path / "whole")


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "base", a_model(), bytes_tokenizer())
    written(tmp_path / "data.jsonl", rows())
    return tmp_path


def finetune(*arguments: str, lr: str = "0.01") -> int:
    return cli.main(["finetune", *arguments, "--lr", lr, "--batch", "4", "--device", "cpu", "--tensorboard", "off"])


def test_the_command_learns_goes_on_and_its_recipe_is_one(folder, capsys):
    assert finetune("base", "--data", "data.jsonl", "--epochs", "2", "--out", "run") == 0
    printed = capsys.readouterr().out
    stored = recipe_files.read(folder / "run" / "recipe.toml").values
    train = int(printed.split(" examples to train on")[0].split()[-1])
    assert stored["steps"] == math.ceil(2 * train / 4) and "epochs" not in stored
    assert stored["from"] == str(folder / "base") and stored["examples"] == str(folder / "data.jsonl")
    lines = lines_of(folder / "run")
    assert lines[-1]["validation_loss"] < lines[0]["untrained_validation_loss"] - 0.5
    assert finetune("base", "--resume", "--out", "run", "--data", "data.jsonl") == 0
    assert cli.main(["train", "--recipe", "run/recipe.toml", "--out", "again"]) == 0
    assert lines_of(folder / "again") == lines
    # From a model that was exported, and with examples to test on of their own.
    loaded = load_model(folder / "base")
    export(loaded, folder / "exported")
    written(folder / "other.jsonl", rows(3))
    assert (
        finetune("exported", "--data", "data.jsonl", "--validation", "other.jsonl", "--steps", "2", "--out", "b") == 0
    )
    assert "30 examples to train on" in capsys.readouterr().out
    assert lines_of(folder / "b")[0]["loss"] == pytest.approx(lines[0]["loss"], rel=0.5)


@pytest.mark.deep
def test_tacred_and_parallel_texts_and_a_compiled_model(folder, capsys):
    """Of every kind that the command reads; rows of one shape where PyTorch compiles for shapes."""
    words = {"token": ["Ann", "met", "Bo"], "subj_type": "PERSON", "obj_type": "PERSON", "relation": "no_relation"}
    places = {"subj_start": 0, "subj_end": 0, "obj_start": 2, "obj_end": 2}
    relations = [words | places | {"relation": f"per:{n % 2}", "token": ["Ann", str(n), "Bo"]} for n in range(12)]
    (folder / "train.json").write_text(json.dumps(relations))
    (folder / "a.en").write_text("".join(f"{n} a\n" for n in range(12)))
    (folder / "a.de").write_text("".join(f"{n} b\n" for n in range(12)))
    for data, kind in (("train.json", "label"), ("a.en,a.de", "translation")):
        assert finetune("base", "--data", data, "--steps", "2", "--out", kind) == 0
        assert load_model(folder / kind).about["examples"]["kind"] == kind
        stored = recipe_files.read(folder / kind / "recipe.toml").values["examples"]
        assert stored == ",".join(str(folder / part) for part in data.split(","))
        assert cli.main(["finetune", "--resume", "--out", kind]) == 0
    shapes = set()
    store = load_examples("a.en,a.de", bytes_tokenizer(), 24)
    for compiled in (False, True):
        recipe = Recipe(steps=4, batch=2, length=24, lr=0.01, compile=compiled)
        with contextlib.closing(Trainer(a_model(), store, recipe)) as trainer:
            shapes.add((compiled, trainer.batches.next().ids.shape[1]))
    assert shapes == {(False, 16), (True, 24)}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--data", "data.jsonl"], "CHECKPOINT is missing"),
        (["base"], "--data is missing"),
        (["base", "--data", ""], "--data is empty"),
        (["", "--data", "data.jsonl"], "CHECKPOINT is empty"),
        (["nowhere", "--data", "data.jsonl"], "CHECKPOINT "),
        (["base", "--data", "nowhere"], "--data nowhere: No such file"),
        (["base", "--data", "bad.jsonl"], "--data bad.jsonl: line 2 has text"),
        (["base", "--data", "data.jsonl", "--validation", "bad.jsonl"], "--validation bad.jsonl: line 2"),
        (["base", "--data", "data.jsonl", "--validation", "a", "--held-out", "0.2"], "--held-out and --validation"),
        (["base", "--data", "data.jsonl", "--epochs", "2", "--steps", "2"], "--steps and --epochs"),
        (["base", "--data", "data.jsonl", "--held-out", "1"], "--held-out is 1; it needs a finite number above 0"),
        (["base", "--data", "data.jsonl", "--context", "25"], "--context 25 is longer than the model's, 24"),
        (["base", "--data", "data.jsonl", "--preset", "nano"], "--preset"),
        (["base", "--data", "data.jsonl", "--patience", "0"], "--patience is 0"),
        (["base", "--data", "data.jsonl", "--lora", "17"], "lora is 17; it needs a rank of at most the model's width"),
        (["base", "--data", "data.jsonl", "--lora-alpha", "2"], "--lora-alpha has no effect without --lora"),
        (["--resume", "--out", "nothing"], "--out nothing holds no run"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_work(folder, capsys, arguments, words):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"text": "a"}\n')
    before = sorted(path.name for path in folder.iterdir())
    assert finetune(*arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("gptkern finetune: "), error
    assert sorted(path.name for path in folder.iterdir()) == before


def test_other_examples_do_not_go_on(folder, capsys):
    assert finetune("base", "--data", "data.jsonl", "--steps", "2", "--out", "run") == 0
    written(folder / "data.jsonl", rows(29))
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", "--out", "run"]) == 2
    assert "are not what the run in run is trained on" in capsys.readouterr().err


# --- Adapters, and a head ---------------------------------------------------------------------------------------------


def test_lora_learns_adapters_alone_goes_on_and_is_merged_into_its_base(folder, capsys):
    arguments = ["base", "--data", "data.jsonl", "--lora", "3", "--lora-alpha", "6", "--steps", "6"]
    assert finetune(*arguments, "--out", "run") == 0
    assert "LoRA of rank 3: 768 numbers learn" in capsys.readouterr().out
    before, after = load_model(folder / "base").model, load_model(folder / "run")
    checkpoint, _ = Checkpoints(folder / "run" / "checkpoints").newest()
    of_model = {
        name.removeprefix("model."): shape for name, (_, shape) in checkpoint.names().items() if "model." in name
    }
    assert len(of_model) == 8 and all(name.endswith((".lora_A", ".lora_B")) for name in of_model)
    tensors = {name: torch.empty(shape) for name, shape in of_model.items()}
    checkpoint.read(tensors, "model.")
    adapted = 0
    for name, weight in after.model.state_dict().items():
        expected = before.state_dict()[name]
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A" in tensors:
            update = tensors[f"{layer}.lora_B"].double() @ tensors[f"{layer}.lora_A"].double() * (6 / 3)
            assert update.abs().max() > 1e-4
            expected, adapted = (expected.double() + update).float(), adapted + 1
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
    assert adapted == 4 and type(after.model.blocks[0].attention.qkv) is torch.nn.Linear
    # Through a kill; what the run is of stays what it was.
    assert finetune(*arguments, "--out", "parts", "--save-every", "2") == 0
    for each in Checkpoints(folder / "parts" / "checkpoints").all()[1:]:
        shutil.rmtree(each.folder)
    assert cli.main(["finetune", "--resume", "--out", "parts"]) == 0
    whole, parts = state_of(folder / "run"), state_of(folder / "parts")
    assert (parts["tensors"], parts["lines"]) == (whole["tensors"], whole["lines"])
    assert finetune("run", *arguments[1:], "--out", "b") == 2
    assert "CHECKPOINT" in (error := capsys.readouterr().err) and "is a run of LoRA's adapters" in error
    shutil.rmtree(folder / "base")
    save_run(folder / "base", GPT(CONFIG), bytes_tokenizer())
    with pytest.raises(UserError, match="is not the one that its adapters are for"):
        load_model(folder / "run")


def test_adapters_do_not_replace_the_model_that_they_are_for(folder, capsys):
    assert finetune("base", "--data", "data.jsonl", "--steps", "1", "--out", "run") == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    for base in ("run", "run/checkpoints/step-00000001"):
        more = ["--data", "data.jsonl", "--lora", "2", "--steps", "1", "--overwrite", "--out", "run"]
        assert finetune(base, *more) == 2
        assert "holds the model that the adapters are for" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_a_head_is_that_of_transformers(folder, capsys):
    from transformers import GPT2ForSequenceClassification

    texts = [{"text": "ab" * (n % 9 + 1) + str(n), "label": ["few", "many", "some"][n % 3]} for n in range(40)]
    written(folder / "labels.jsonl", texts[:30])
    written(folder / "test.jsonl", texts[30:])
    arguments = ["--data", "labels.jsonl", "--validation", "test.jsonl", "--head", "--steps", "8"]
    for more in ([], ["--lora", "2"]):
        assert finetune("base", *arguments, *more, "--out", f"run{len(more)}") == 0
        assert f"(gptkern evaluate run{len(more)} --data FILE)" in capsys.readouterr().out
        loaded = load_model(folder / f"run{len(more)}")
        assert loaded.about["labels"] == ["few", "many", "some"] == loaded.about["examples"]["labels"]
        export(loaded, folder / f"out{len(more)}")
        theirs = GPT2ForSequenceClassification.from_pretrained(folder / f"out{len(more)}").eval()
        assert theirs.config.id2label == {0: "few", 1: "many", 2: "some"}
        losses = []
        for row in texts[30:]:
            with torch.no_grad():
                logits = theirs(torch.tensor([list(row["text"].encode())])).logits[0]
            losses.append(F.cross_entropy(logits, torch.tensor(theirs.config.label2id[row["label"]])).item())
        lines = lines_of(folder / f"run{len(more)}")
        assert lines[-1]["validation_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert {line["tokens"] for line in lines} == {4}
        again = load_model(folder / f"out{len(more)}")
        assert again.about["labels"] == loaded.about["labels"]
        assert torch.equal(again.model.score.weight, loaded.model.score.weight)
    # A head is not what another training begins with.
    assert finetune("run0", "--data", "data.jsonl", "--steps", "2", "--out", "b") == 0
    assert not hasattr(load_model(folder / "b").model, "score")
    capsys.readouterr()
    assert finetune("base", "--data", "data.jsonl", "--head", "--steps", "2", "--out", "c") == 2
    assert "is of the kind completion; --head needs examples of text and label" in capsys.readouterr().err
