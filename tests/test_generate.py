"""`gptkern generate` on tokens: whole characters as they come, the end of a text, prompts that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_folders import TEXTS, bpe, model, save_run, transformers_gpt2

from gptkern import cli
from gptkern.models.gpt import GPT
from gptkern.training import exporting
from gptkern.training.data.tokenizers import bytes_tokenizer
from gptkern.training.loading import load_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "run"
    save_run(folder, model())
    return folder


@pytest.fixture
def here(tmp_path, written, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(written, "run")
    return Path()


@pytest.fixture
def generate(capsys):
    """generate(arguments) -> (exit status, the text, the errors)"""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["generate", *arguments, "--device", "cpu"])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def drawn(monkeypatch):
    """drawn(ids): what any model draws. A list of what had been printed when each was drawn, by capsys."""

    def draw(ids, seen=lambda: None) -> list:
        printed = []

        def stream(self, prompt, tokens, *_):
            printed.append(prompt.tolist())
            for token in list(ids)[:tokens]:
                printed.append(seen())
                yield torch.tensor([[token]])

        monkeypatch.setattr(GPT, "stream", stream)
        return printed

    return draw


def test_every_kind_of_folder_says_the_same(here, generate):
    exporting.export(load_model("run"), "plain")
    exporting.export(load_model("run"), "planes", planes=True)
    options = ["--tokens", "9", "--prompt", "der Löwe", "--seed", "3", "--temperature", "0.9"]
    said = {generate(name, *options)[1] for name in ("run", "run/checkpoints/step-00000007", "plain", "planes")}
    assert len(said) == 1 and said.pop().startswith("der Löwe")
    status, text, _ = generate("plain", *options, "--int8")
    assert status == 0 and text.startswith("der Löwe")
    assert generate("run", *options[:-1], "0", "--stock")[1] == generate("run", *options[:-1], "0", "--top-k", "1")[1]


def test_a_gpt2_of_transformers_continues_as_transformers_does(here, generate, capsys):
    theirs = transformers_gpt2()
    theirs.save_pretrained("theirs")
    bpe().save(Path("theirs"))
    capsys.readouterr()
    ids = torch.tensor([bpe().encode("die Maus").tolist()])
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0]
    expected = expected.tolist()
    status, text, errors = generate("theirs", "--prompt", "die Maus", "--temperature", "0", "--tokens", "12")
    end = expected.index(0) if 0 in expected else len(expected)
    assert (status, text) == (0, bpe().decode(expected[:end]) + "\n")
    assert errors.startswith(f"[{end - ids.shape[1]} tokens")


def test_characters_come_whole_whatever_tokens_their_bytes_are_in(here, generate, drawn, capsys):
    text = " ß€ 한국어 🎉!"
    ids = bpe().encode(text).tolist()
    whole = [bpe()._inner.decode(ids[: index + 1]).rstrip("\ufffd") for index in range(len(ids))]
    assert len(set(whole)) < len(whole) - 5, "characters of several tokens"
    printed = drawn(ids, lambda: capsys.readouterr().out)
    status, rest, errors = generate("run", "--prompt", "é", "--tokens", "1000")
    assert status == 0 and printed[0] == [bpe().encode("é").tolist()]
    # What was there before the first was drawn, and after each: all that is whole by then, and no more.
    assert printed[1] == "é" and "".join(printed[1:]) + rest == f"é{text}\n"
    assert ["".join(printed[2 : 3 + index]) for index in range(len(ids) - 1)] == whole[:-1]
    assert errors.startswith(f"[{len(ids)} tokens in ")


def test_bytes_that_are_no_text_show_as_such(here, generate, drawn):
    ids = [token for token in bpe().encode("é日").tolist()][:-1]
    drawn(ids)
    assert generate("run", "--prompt", "a")[1] == "aé\ufffd\n"


@pytest.mark.parametrize("tokens, said", [("1", "[1 token in "), ("2", "[2 tokens, then the end of the text, in ")])
def test_the_end_of_a_text_is_the_end(here, generate, drawn, tokens, said):
    ids = bpe().encode("ab").tolist()
    assert len(ids) == 2
    printed = drawn([*ids, bpe().end_of_text, *ids])
    status, text, errors = generate("run", "--prompt", "x", "--tokens", tokens if tokens == "1" else "100")
    assert (status, text) == (0, "xab\n" if tokens == "2" else "xa\n") and errors.startswith(said)
    assert len(printed) == (4 if tokens == "2" else 2), "nothing is drawn after it"
    assert "<|endoftext|>" not in text


def test_the_end_of_a_text_of_bytes(here, generate, drawn):
    save_run(here / "bytes", model(vocab_size=257), bytes_tokenizer())
    drawn([*b"ab", 256, *b"cd"])
    status, text, errors = generate("bytes", "--prompt", "x")
    assert (status, text) == (0, "xab\n") and errors.startswith("[2 tokens, then the end of the text, in ")


def test_no_token_at_all(here, generate):
    status, text, errors = generate("run", "--prompt", "die ", "--tokens", "0")
    assert (status, text) == (0, "die \n") and errors.startswith("[0 tokens in ")


def test_an_end_that_is_written_in_a_prompt_is_a_text(here, generate, drawn):
    printed = drawn([])
    assert generate("run", "--prompt", "a<|endoftext|>b")[1] == "a<|endoftext|>b\n"
    assert bpe().end_of_text not in printed[0][0]


def test_a_vocabulary_that_was_rounded_up_has_tokens_of_nothing(here, generate, drawn):
    save_run(here / "run", model(vocab_size=320))
    drawn([*bpe().encode("ab").tolist(), 319, 300])
    assert generate("run", "--prompt", "x")[1] == "xab\n"


def test_more_than_all_tokens_are_all(here, generate):
    options = ["run", "--tokens", "5", "--seed", "1", "--temperature", "2"]
    assert generate(*options, "--top-k", str(10**9))[1] == generate(*options, "--top-k", "300")[1]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "--prompt is empty; it needs at least one character"),
        ("\ud800", "--prompt '\\ud800': it needs to be text, or bytes"),
        ("a\udcff", "--prompt 'a\\udcff': it needs to be text; tokens by bpe of 300 are no bytes"),
    ],
)
def test_a_prompt_that_is_no_text(here, generate, prompt, message):
    status, text, errors = generate("run", "--prompt", prompt)
    assert (status, text, errors) == (2, "", f"gptkern generate: {message}\n")


def test_a_prompt_of_which_nothing_is_a_token(here, generate):
    """Of a tokenizer of whole words, by others, that has no word for what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "b": 2}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<eos>"])
    exporting.export(load_model("run"), "out")
    words.save("out/tokenizer.json")
    status, text, errors = generate("out", "--prompt", "日本語")
    assert (status, text) == (2, "")
    assert errors == "gptkern generate: --prompt 日本語: none of it is a token by bpe of 3; it needs one at least\n"
    status, text, errors = generate("out", "--prompt", "ab", "--tokens", "3")
    assert status == 0 and text.startswith("ab")


def test_a_training_that_failed_says_nothing(here, generate):
    broken = model()
    broken.token_embedding.weight.data[4, 4] = torch.inf
    save_run(here / "run", broken, step=8)
    status, text, errors = generate("run")
    assert (status, text) == (2, "") and "FOLDER run holds NaN or an infinity in token_embedding.weight" in errors


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(here, generate):
    newest = save_run(here / "run", model(), step=9)
    (newest / "about.json").write_text(json.dumps({}))
    status, text, errors = generate("run", "--prompt", TEXTS[1], "--tokens", "1")
    assert status == 0 and text.startswith(TEXTS[1])
    assert errors.startswith("gptkern generate: passed over: run/checkpoints/step-00000009/about.json: ")
    assert "; step 7 is taken\n" in errors
